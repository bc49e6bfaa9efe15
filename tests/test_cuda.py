"""CUDA tensors of torch through the plain functions: the values of the CPU, the caller's device and stream, graphs,
memory, seeds, strides, errors."""

import os
import subprocess
import sys

import numpy as np
import pytest

import subquad
from cases import DTYPES, arrays, strided
from cuda_frameworks import DEVICE, needs_cuda, torch_on_cuda
from yoso_checks import BY_NAME, METHOD, check_backward, check_forward

pytestmark = needs_cuda
torch = pytest.importorskip("torch", reason="torch is not installed")

SAMPLED = METHOD["hadamard"]


def random_tensors(*shapes, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    made = [torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in shapes]
    return [x.to(DEVICE, getattr(torch, dtype)) for x in made]


def qkv(tokens=37, dtype="float32", seed=0, heads=4, heads_kv=2, dim=64):
    return random_tensors((2, heads, tokens, dim), *[(2, heads_kv, tokens, dim)] * 2, dtype=dtype, seed=seed)


def step(q, k, v, dout, seed=3, **options):
    """A forward and a backward pass: all results."""
    options = dict(num_hashes=8, hash_bits=5, seed=seed) | options
    out, lse = subquad.yoso_attention(q, k, v, **options, return_lse=True)
    return out, lse, *subquad.yoso_attention_bwd(dout, q, k, v, **options, out=out, lse=lse)


def assert_equal(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


# Values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["hadamard", "published", "wide_codes", "raw", "expectation"])
@pytest.mark.parametrize("name", ["tails", "wide", "masked_grouped", "causal_masked_grouped", "longer"])
def test_forward(name, method, dtype):
    check_forward(BY_NAME[name], METHOD[method], dtype, torch_on_cuda())


GRADIENTS = [("hadamard", grad) for grad in ("sampled", "sampled_exact", "lower_bound", "exact")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "grad"), [*GRADIENTS, ("expectation", "exact"), ("expectation", "lower_bound")])
@pytest.mark.parametrize("name", ["tails", "masked_grouped", "causal_masked_grouped"])
def test_backward(name, method, grad, dtype):
    check_backward(BY_NAME[name], METHOD[method] | dict(grad=grad), dtype, framework=torch_on_cuda())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hashes", "bits"), [(5, 4), (16, 8), (3, 18)])
def test_codes_are_the_bits_of_the_cpu(hashes, bits, dtype):
    for name in ("tails", "wide", "longer", "dims_3_7"):
        x = arrays(BY_NAME[name], dtype=dtype)[0]
        parts = subquad._ext.hadamard_parts(hashes, bits, x.shape[3], "strided")
        signs = subquad.random_signs((3, parts, subquad._ext.hadamard_padded(x.shape[3])), seed=4)
        options = dict(num_hashes=hashes, hash_bits=bits)
        framework = torch_on_cuda()
        there, signs_there = framework.arrays(x, signs)
        codes = subquad.lsh_hash(there, signs=signs_there, **options)
        np.testing.assert_array_equal(framework.read(codes), subquad.lsh_hash(x, signs=signs, **options))


def test_draws_are_the_bits_of_the_cpu():
    for draw in (subquad.random_uniform, subquad.random_signs):
        for shape in ((7,), (3, 5, 130)):
            out = draw(shape, seed=-3, stream=7, out=torch.empty(shape, device=DEVICE))
            np.testing.assert_array_equal(out.cpu().numpy(), draw(shape, seed=-3, stream=7))


def test_sorted_buckets_are_those_of_the_cpu():
    codes = np.random.default_rng(0).integers(0, 40, (2, 3, 4, 1000)).astype(np.uint16)
    keep = np.random.default_rng(1).random((2, 1000)) < 0.8
    framework = torch_on_cuda()
    there, mask = framework.arrays(codes, keep)
    for got, expected in zip(
        subquad.bucket_sort(there, 40, mask=mask), subquad.bucket_sort(codes, 40, mask=keep), strict=True
    ):
        np.testing.assert_array_equal(framework.read(got), expected)


@pytest.mark.parametrize("shape", [(70000, 1, 1, 8), (1, 70000, 1, 8), (70, 1000, 1, 16)], ids=str)
def test_more_heads_than_a_grid_has_rows(shape):
    """One token meets itself in every hash: the sum is its value, and so is the gradient of the value."""
    q, v, dout = random_tensors(shape, shape, shape)
    out = subquad.yoso_attention(q, q, v, num_hashes=2, hash_bits=4, normalize=False)
    torch.testing.assert_close(out, v, rtol=1e-6, atol=0)
    unit = subquad.yoso_attention(q, q, v, num_hashes=2, hash_bits=4)
    torch.testing.assert_close(unit, v / v.norm(dim=-1, keepdim=True), rtol=1e-5, atol=1e-6)
    *_, dv = subquad.yoso_attention_bwd(dout, q, q, v, num_hashes=2, hash_bits=4, normalize=False)
    torch.testing.assert_close(dv, dout, rtol=1e-6, atol=0)


# Strides


def test_strides_change_nothing():
    q, k, v, dout = (np.random.default_rng(i).standard_normal((2, 4, 37, 33), np.float32) for i in range(4))
    framework = torch_on_cuda()
    expected = step(*framework.arrays(q, k, v, dout))
    views = framework.arrays(*(strided(x) for x in (q, k, v, dout)))
    assert not any(x.is_contiguous() for x in views)
    assert_equal(step(*views), expected)
    assert_equal(step(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in views)), expected)
    shared = framework.make(k)[:1, :1].expand(2, 4, 37, 33)
    assert_equal(step(views[0], shared, views[2], views[3]), step(views[0], shared.contiguous(), *views[2:]))
    out = views[2].new_full((2, 37, 4, 36), float("nan")).transpose(1, 2)[..., :33]
    assert subquad.yoso_attention(*views[:3], num_hashes=8, hash_bits=5, seed=3, out=out) is out
    assert torch.equal(out, expected[0])


# Device and stream


def test_results_are_on_the_callers_device():
    current = torch.cuda.current_device()
    for x in step(*qkv(), qkv(seed=1)[0]):
        assert x.device == torch.device(DEVICE, current)
    assert torch.cuda.current_device() == current


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    given = [*qkv(), qkv(seed=1)[0]]
    expected = step(*given)
    results = step(*(x.to("cuda:1") for x in given))
    assert torch.cuda.current_device() == 0 and {str(x.device) for x in results} == {"cuda:1"}
    assert_equal([x.to("cuda:0") for x in results], expected)
    q, k, v, _ = given
    with pytest.raises(TypeError, match=r"^\[yoso_attention\] k: expected an array on cuda:0, where q is, got one on "):
        subquad.yoso_attention(q, k.to("cuda:1"), v)
    stream = torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(stream):
        device, handle, _, scratch = subquad._ext._resources(given[0].to("cuda:1"), 1 << 20)
    assert (device, handle) == ("cuda:1", stream.cuda_stream) and scratch


def test_work_is_put_on_the_current_stream_and_nobody_waits():
    """The inputs are written behind a long kernel on a side stream: work on another one would read zeros."""
    given = [*qkv(), qkv(seed=1)[0]]
    expected = step(*given)
    late = [torch.zeros_like(x) for x in given]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(*late)  # so that torch has memory for this stream, and the device the code of the kernels
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(500_000_000)
        for x, value in zip(late, given, strict=True):
            x.copy_(value)
        results = step(*late)
        assert not side.query(), "a call waited for its stream"
    side.synchronize()
    assert_equal(results, expected)


# CUDA graphs and memory


def test_a_graph_replays_both_passes():
    """Capture fails at any allocation or synchronisation that is not torch's; a replay has the bits of a call."""
    given = [*qkv(), qkv(seed=1)[0]]
    seed = torch.tensor(3, device=DEVICE)
    step(*given, seed=seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*given, seed=seed)
    for number in (3, 2**40 + 1, -5):
        for x, value in zip(given, [*qkv(seed=number % 99), qkv(seed=7)[0]], strict=True):
            x.copy_(value)
        seed.fill_(number)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(results, step(*given, seed=number))


@pytest.mark.parametrize("options", [dict(hashing="gaussian"), dict(grad="exact"), dict(is_causal=True)], ids=str)
def test_graphs_of_other_methods(options):
    given = [*qkv(600), qkv(600, seed=1)[0]]
    expected = step(*given, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*given, **options)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(results, expected)


def test_a_call_leaves_nothing_but_its_results():
    """Other processes may take and free memory of the device meanwhile, so one call in many has to be undisturbed."""
    given = [*qkv(500), qkv(500, seed=1)[0]]
    step(*given)
    torch.cuda.synchronize()

    def requested():
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    beside = []
    for _ in range(20):
        before, free, reserved = requested(), torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
        results = step(*given)
        torch.cuda.synchronize()
        assert requested() - before == sum(x.nbytes for x in results)
        beside.append(free - torch.cuda.mem_get_info()[0] - (torch.cuda.memory_reserved() - reserved))
        del results
    assert 0 in beside, f"bytes of memory beside torch's: {beside}"


# Seeds and options


def test_seeds_may_lie_on_the_device():
    given = [*qkv(), qkv(seed=1)[0]]
    for number in (0, 5, -1, 2**63 - 1):
        expected = step(*given, seed=number)
        assert_equal(step(*given, seed=torch.tensor(number, device=DEVICE)), expected)
        assert_equal(step(*given, seed=torch.tensor(number)), expected)
        assert_equal(step(*given, seed=np.array(number)), expected)
    with pytest.raises(TypeError, match=r"\[yoso_attention\] seed: expected an integer or a 0-d int64 array"):
        step(*given, seed=torch.tensor(3, device=DEVICE, dtype=torch.int32))


def test_explicit_randomness_on_the_device():
    q, k, v = qkv()
    planes = torch.empty(2, 6 * 5, 64, device=DEVICE)
    subquad.random_normal(planes.shape, seed=9, stream=1, out=planes)
    seeded = subquad.yoso_attention(q, k, v, num_hashes=6, hash_bits=5, hashing="gaussian", seed=9)
    assert torch.equal(seeded, subquad.yoso_attention(q, k, v, planes=planes.reshape(2, 6, 5, 64)))


SCRIPT = """
import numpy as np, subquad, torch
x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, 50, 32), np.float32)).cuda()
out = subquad.yoso_attention(x, x, x, num_hashes=4, hash_bits=5)
dq, dk, dv = subquad.yoso_attention_bwd(out, x, x, x, num_hashes=4, hash_bits=5)
codes = torch.full((1, 2, 3, 50), 9, dtype=torch.int32, device="cuda")
try:
    print("unchecked", float(subquad.bucket_attention(codes, codes, x, 8).abs().max()))
except ValueError as error:
    print(error)
print(*(hash(t.cpu().numpy().tobytes()) for t in (out, dq, dk, dv)))
"""


def test_checks_and_synchronous_mode_change_no_bits():
    def run(**variables):
        environment = os.environ | {"PYTHONHASHSEED": "0"} | variables
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    plain, checked, synchronous = run(), run(SUBQUAD_CHECK="1"), run(SUBQUAD_SYNC="1")
    assert plain[1] == checked[1] == synchronous[1]
    assert plain[0] == synchronous[0] == "unchecked 0.0", "codes outside their range count as no bucket"
    assert checked[0].startswith("[bucket_attention] codes_")


# Errors


def test_arrays_on_the_cpu_and_on_a_device():
    q, k, v = qkv()
    host, seed = (q.cpu(), k.cpu(), v.cpu()), torch.tensor(3, device=DEVICE)
    for given, name, here, there in (
        ((q, host[1], v, 0), "k", "cuda", "cpu"),
        ((host[0], k, v, 0), "k", "cpu", "cuda"),
        ((*host, seed), "seed", "cpu", "cuda"),
    ):
        words = rf"^\[yoso_attention\] {name}: expected an array on {here}.*, where q is, got one on {there}"
        with pytest.raises(TypeError, match=words):
            subquad.yoso_attention(*given[:3], seed=given[3])


def test_errors_have_the_sentences_of_the_cpu():
    q, k, v = qkv()
    for error, sentence, call in (
        (TypeError, r"q: expected dtype float32, .*, got torch\.float64 \(refused: cast to float32\)",
         lambda: (q.double(), k.double(), v.double())),
        (TypeError, "k: expected ", lambda: (q, k.half(), v)),
        (ValueError, r"k: expected shape \[B, Hkv, M, D\]", lambda: (q, k[..., :3], v)),
        (RuntimeError, "q: expected a tensor without gradient", lambda: (q.clone().requires_grad_(), k, v)),
        (TypeError, "k: expected ", lambda: (q, k.cpu().numpy(), v)),
    ):  # fmt: skip
        with pytest.raises(error, match=rf"^\[yoso_attention\] {sentence}"):
            subquad.yoso_attention(*call())
    for name, value, error in (("hash_bits", 0, ValueError), ("seed", 1.5, TypeError), ("grad", "x", ValueError)):
        with pytest.raises(error, match=rf"^\[yoso_attention\] {name}: expected "):
            subquad.yoso_attention(q, k, v, **{name: value})


@pytest.mark.parametrize("options", [SAMPLED, METHOD["gaussian"], METHOD["expectation"]], ids=str)
def test_head_dimensions_end_at_256(options):
    (x,) = random_tensors((1, 1, 5, 256))
    subquad.yoso_attention(x, x, x, **options)
    wide = random_tensors((1, 1, 5, 257))[0]
    for given in ((wide, wide, x), (x, x, wide), (wide, wide, wide)):
        with pytest.raises(subquad.UnsupportedError, match=r"^\[\w+\] no kernel on cuda:\d+ for a head dim"):
            subquad.yoso_attention(*given, **options)


WITHOUT_KERNEL = {
    "softmax_attention": lambda x: subquad.softmax_attention(x, x, x),
    "feature_map": lambda x: subquad.feature_map(x, x[0, 0]),
    "linear_attention": lambda x: subquad.linear_attention(x.abs(), x.abs(), x),
    "running_mean": lambda x: subquad.running_mean(x),
}


@pytest.mark.parametrize("name", WITHOUT_KERNEL)
def test_operators_without_a_kernel_name_the_device(name):
    (x,) = random_tensors((1, 2, 20, 16))
    with pytest.raises(subquad.UnsupportedError, match=r"^\[\w+\] no kernel on cuda:\d+"):
        WITHOUT_KERNEL[name](x)
