"""subquad.torch on CUDA tensors: gradients, torch's checks of an operator, compilation, autocast, graphs, training."""

import pytest

import subquad
from cases import DTYPES
from cuda_frameworks import DEVICE, needs_cuda
from test_torch import OPTIONS, check_gradients, equal, loss_and_gradients, tensors
from yoso_checks import BY_NAME

pytestmark = needs_cuda
torch = pytest.importorskip("torch", reason="torch is not installed")

import subquad.torch as st  # noqa: E402


def on_cuda(name, dtype="float32", requires_grad=True):
    """q, k, v as leaves on the device and the mask keywords."""
    *qkv, masks = tensors(BY_NAME[name], dtype, requires_grad=False)
    leaves = [x.to(DEVICE).requires_grad_(requires_grad) for x in qkv]
    return *leaves, {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in masks.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["sampled", "sampled_exact", "lower_bound", "raw", "expectation"])
def test_gradients_are_those_of_the_plain_functions(options, dtype):
    options = OPTIONS[options]
    for name in ("tails", "causal_masked_grouped"):
        q, k, v, masks = on_cuda(name, dtype)
        out = st.yoso_attention(q, k, v, **options, **masks)
        assert out.device == q.device and out.dtype == q.dtype
        dout = torch.randn(out.shape, device=DEVICE).to(out.dtype)
        out.backward(dout)
        with torch.no_grad():
            saved = {}
            if options.get("normalize", True):
                saved = dict(zip(("out", "lse"), subquad.yoso_attention(
                    q, k, v, **options, **masks, return_lse=True), strict=True))  # fmt: skip
                assert torch.equal(saved["out"], out)
            expected = subquad.yoso_attention_bwd(dout, q, k, v, **options, **masks, **saved)
        assert equal([x.grad for x in (q, k, v)], expected)


@pytest.mark.parametrize("grad", ["exact", "lower_bound"])
def test_collision_attention(grad):
    q, k, v, masks = on_cuda("causal_masked_grouped")
    out = st.collision_attention(q, k, v, 5, grad=grad, **masks)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    with torch.no_grad():
        assert torch.equal(out, subquad.collision_attention(q, k, v, 5, **masks))
        ones = torch.ones_like(out)
        assert equal(gradients, subquad.collision_attention_bwd(ones, q, k, v, 5, grad=grad, **masks))


@pytest.mark.parametrize("options", ["sampled", "raw", "expectation"])
def test_opcheck(options):
    q, k, v, masks = on_cuda("causal_masked_grouped")
    keywords = OPTIONS[options] | {key: x for key, x in masks.items() if x is not False}
    ops = torch.ops.subquad
    torch.library.opcheck(ops.yoso_attention.default, (q, k, v), keywords)
    seed = torch.tensor(2, device=DEVICE)
    torch.library.opcheck(ops.yoso_attention.default, (q, k, v), keywords | dict(seed_tensor=seed))
    with torch.no_grad():
        out, lse = ops.yoso_attention(q, k, v, **keywords)
    detached = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(ops.yoso_attention_bwd.default, (out, *detached), keywords | dict(out=out, lse=lse))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", ["sampled", "expectation"])
def test_compile_forward_and_backward(options, backend):
    if backend == "inductor":
        pytest.importorskip("triton", reason="inductor on CUDA needs triton")
    torch._dynamo.reset()
    q, k, v, masks = on_cuda("causal_masked_grouped")

    def function(q, k, v):
        return st.yoso_attention(q * 2, k, v, **OPTIONS[options], **masks) + 1

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for x, y in zip(loss_and_gradients(compiled, q, k, v), loss_and_gradients(function, q, k, v), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast(dtype):
    q, k, v, _ = on_cuda("grouped", requires_grad=False)
    low = getattr(torch, dtype)
    with torch.autocast(DEVICE, low):
        out = st.yoso_attention(q, k, v, **OPTIONS["sampled"])
    assert out.dtype == low
    assert torch.equal(out, st.yoso_attention(q.to(low), k.to(low), v.to(low), **OPTIONS["sampled"]))


def test_vmap_and_func_grad():
    q, k, v, _ = on_cuda("grouped", requires_grad=False)
    many = torch.stack([q, q + 1, q - 1])
    function = lambda q: st.yoso_attention(q, k, v, num_hashes=4, seed=3)  # noqa: E731
    assert torch.equal(torch.vmap(function)(many), torch.stack([function(x) for x in many]))
    gradient = torch.func.grad(lambda q: function(q).square().sum())(q)
    leaf = q.clone().requires_grad_()
    function(leaf).square().sum().backward()
    assert torch.equal(gradient, leaf.grad)


def test_a_graph_of_a_training_step():
    """Forward and backward through autograd, captured once; the seed moves on from replay to replay."""
    given = [x.detach() for x in on_cuda("longer", "bfloat16")[:3]]
    q, k, v = (x.clone().requires_grad_() for x in given)
    seed = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def step():
        for x in (q, k, v):
            x.grad = None
        out = st.yoso_attention(q, k, v, num_hashes=8, hash_bits=6, seed=seed)
        out.float().square().mean().backward()
        return out, q.grad, k.grad, v.grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for number in (0, 5):
        seed.fill_(number)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [x.detach().clone() for x in results]
        leaves = [x.clone().requires_grad_() for x in given]
        out = st.yoso_attention(*leaves, num_hashes=8, hash_bits=6, seed=number)
        out.float().square().mean().backward()
        assert equal(replayed, [out.detach(), *(x.grad for x in leaves)])


def test_a_layer_learns():
    """A few steps of the YOSO layer on one batch: the loss falls."""
    torch.manual_seed(0)
    layer = st.nn.YosoAttention(32, 4).to(DEVICE)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    x, target = (torch.randn(2, 50, 32, device=DEVICE) for _ in range(2))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0], losses


def test_the_checks_of_the_cpu_agree(monkeypatch):
    """The budget of test_torch, with its tensors on the device."""
    plain = st.yoso_attention

    def through_the_device(q, k, v, **keywords):
        keywords = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in keywords.items()}
        return plain(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), **keywords).cpu()

    monkeypatch.setattr(st, "yoso_attention", through_the_device)
    for options in ("sampled", "sampled_exact", "lower_bound", "exact", "expectation"):
        for dtype in DTYPES:
            check_gradients(BY_NAME["causal_masked_grouped"], OPTIONS[options], dtype)
