"""The custom call for CUDA devices on a machine without one: XLA's side is played by ctypes, device memory is memory of
the host, and a stand-in for the compiled module reads it."""

import ctypes
import json
import re
from pathlib import Path

import numpy as np
import pytest

import subquad
from subquad import _ext
from test_jax import equal, loss_of, small
from test_jax_transforms import BATCHED, mapped_and_looped

jax = pytest.importorskip("jax", reason="jax is not installed")

import subquad.jax as sj  # noqa: E402
from subquad.jax import _cuda, _ffi, _ops  # noqa: E402
from xla_by_hand import HOST_TARGET, STREAM, Module, Xla, buffer_of, on_host  # noqa: E402


@pytest.fixture
def module(monkeypatch):
    module = Module()
    for owner in (subquad.methods, subquad.hashing):
        monkeypatch.setattr(owner, "_ext", module)
    return module


# Views of device memory


def test_views_are_those_of_numpy():
    x = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    b = buffer_of(x)
    assert (b.ndim, b.strides) == (4, (60, 20, 5, 1))
    np.testing.assert_array_equal(on_host(b[1, 2]), x[1, 2])
    np.testing.assert_array_equal(on_host(b[()]), x)
    np.testing.assert_array_equal(on_host(b.merged(3)), x.reshape(24, 5))
    wide = b.broadcast_to((7, 2, 3, 4, 5))
    np.testing.assert_array_equal(on_host(wide), np.broadcast_to(x, (7, 2, 3, 4, 5)))
    assert wide.merged(2) is None and wide.merged(1).shape == (7, 2, 3, 4, 5)
    one = buffer_of(x[:1]).broadcast_to((7, 1, 3, 4, 5)).merged(2)
    np.testing.assert_array_equal(on_host(one), np.broadcast_to(x[:1], (7, 3, 4, 5)))
    middle = buffer_of(x[:, :1].copy()).broadcast_to((2, 3, 4, 5))
    np.testing.assert_array_equal(on_host(middle), np.broadcast_to(x[:, :1], (2, 3, 4, 5)))
    assert middle.merged(2) is None
    assert buffer_of(x[:0]).broadcast_to((3, 0, 3, 4, 5)).merged(2).shape == (0, 3, 4, 5)


def test_the_border_knows_device_buffers():
    x = np.ones((2, 3, 4), np.float32)
    b = buffer_of(x)
    assert _ext._describe(b) == ("float32", (2, 3, 4), (12, 4, 1), "cuda:3", x.ctypes.data)
    assert _ext._describe(b.broadcast_to((5, 2, 3, 4)), True)[2] == (0, 12, 4, 1)
    seed = _cuda.DeviceBuffer(b.queue, 0x1000, np.dtype(np.int64), ())
    assert _ext._seed(seed, b) == (0, True)
    asked = []
    b.queue.allocate = lambda size: asked.append(size) or 0xF00
    assert _ext._resources(b, 1000) == ("cuda:3", STREAM, 1, 0xF00) and asked == [1000]
    with pytest.raises(TypeError, match="b: expected a jax array, as a is, got a numpy array"):
        _ext._convert(b, x, None)
    with pytest.raises(ValueError, match="at most 6 axes"):
        _ext._describe(b.broadcast_to((1,) * 4 + b.shape))
    with pytest.raises(TypeError, match="got float64"):
        _ext._describe(buffer_of(np.ones(3)))


# XLA's side by hand


def yoso_call(options, names=("q", "k", "v"), function="yoso_attention", takes_out=True):
    given = {"function": function, "names": list(names), "ranks": [1 if n == "seed" else 4 for n in names]}
    return json.dumps(given | {"batched": ["k", "q", "v"], "options": options, "takes_out": takes_out})


def arrays_of_a_call():
    q, k, v = (np.asarray(x) for x in small())
    return q, k, v, np.empty_like(q), np.empty(q.shape[:3], np.float32)


def test_a_call_by_hand(module):
    q, k, v, out, lse = arrays_of_a_call()
    seed = np.array([7, 1], np.uint32)
    xla = Xla([q, k, v, seed], [out, lse], yoso_call({"normalize": True}, ("q", "k", "v", "seed")))
    assert xla.run() is None and not xla.errors
    _, arguments = module.calls[0]
    addresses = [x.address for x in arguments if isinstance(x, _cuda.DeviceBuffer)]
    assert addresses == [x.ctypes.data for x in (q, k, v, out, lse)]
    given = arguments[3]["seed"]
    assert (given.dtype, given.shape, given.address) == (np.int64, (), seed.ctypes.data)
    assert equal((out, lse), subquad.yoso_attention(q, k, v, seed=7 + 2**32, return_lse=True))


def test_scratch_memory_is_xlas_and_given_back(monkeypatch):
    def uses_scratch(q, out):
        first, second = q.queue.allocate(1000), q.queue.allocate(24)
        other = q.queue.empty((3, 5), np.dtype(np.float16))
        assert len({first, second, other.address}) == 3 and q.queue.empty((0,), q.dtype).address == 0
        return (out,)

    monkeypatch.setitem(_ffi.FUNCTIONS, "yoso_attention", uses_scratch)
    q, *_ = arrays_of_a_call()
    xla = Xla([q], [np.empty_like(q)], yoso_call({}, ("q",)))
    assert xla.run() is None and sorted(xla.freed) == [24, 30, 1000]


@pytest.mark.parametrize("name", ["Stream_Get", "DeviceOrdinal_Get", "DeviceMemory_Allocate", "DeviceMemory_Free"])
def test_what_xla_refuses_is_the_error_of_the_call(monkeypatch, name):
    monkeypatch.setitem(_ffi.FUNCTIONS, "yoso_attention", lambda q, out: (q.queue.allocate(8), (out,))[1])
    q, *_ = arrays_of_a_call()
    xla = Xla([q], [np.empty_like(q)], yoso_call({}, ("q",)), fail=name)
    if name == "DeviceMemory_Free":
        xla.held = type("Any", (dict,), {"__bool__": lambda self: False})(xla.held)
    assert xla.run() == f"[subquad.jax] {name}: expected an answer of XLA, got not today" and not xla.errors


def test_errors_of_the_function_and_results_elsewhere(monkeypatch):
    q, *_ = arrays_of_a_call()

    def fails(q, out):
        q.queue.allocate(8)
        raise ValueError("[yoso_attention] a sentence")

    for function, words in (
        (fails, "[yoso_attention] a sentence"),
        (lambda q, out: (q,), "[yoso_attention] expected results in XLA's buffers, got other memory"),
        (lambda q, out: (_ for _ in ()).throw(KeyboardInterrupt()), "KeyboardInterrupt"),
    ):
        monkeypatch.setitem(_ffi.FUNCTIONS, "yoso_attention", function)
        assert Xla([q], [np.empty_like(q)], yoso_call({}, ("q",))).run() == words


def test_without_the_stand_in_the_error_names_the_device():
    """A build without kernels for the device, or kernels that it cannot reach, is an error of the call."""
    q, k, v, out, lse = arrays_of_a_call()
    message = Xla([q, k, v], [out, lse], yoso_call({"normalize": True, "hash_bits": 30})).run()
    assert message.startswith("[yoso_attention] hash_bits: expected ")
    if not subquad.cuda.is_built():
        message = Xla([q, k, v], [out, lse], yoso_call({"normalize": True})).run()
        assert message == "[yoso_attention] this build has no backend for cuda:3 arrays"


def test_structs_are_those_of_the_header():
    """Of the installed jaxlib: names and kinds of the fields, in their order."""
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    ours = {"Stream_Get": _cuda._Stream, "DeviceOrdinal_Get": _cuda._Ordinal, "DeviceMemory_Allocate": _cuda._Allocate}
    ours |= {"DeviceMemory_Free": _cuda._Free, "Error_GetMessage": _cuda._Message, "Error_Destroy": _cuda._Destroy}
    ours |= {"Error_Create": _ffi._Error}
    sizes = {"size_t": 8, "int32_t": 4, "XLA_FFI_Error_Code": 4}
    for name, kind in ours.items():
        assert name in _ffi.API_FUNCTIONS
        body = re.search(rf"struct XLA_FFI_{name}_Args {{(.*?)}};", header, re.S).group(1)
        fields = re.findall(r"^\s*(?:const )?(\w+)\s*(\*?)\s*\w+;", body, re.M)
        offset = 0
        for (word, star), (field, _) in zip(fields, kind._fields_, strict=True):
            size = 8 if star else sizes[word]
            offset = -(-offset // size) * size
            place = getattr(kind, field)
            assert (place.offset, place.size) == (offset, size), (name, field)
            offset += size


# All of jax, with the CPU in the place of the device


def put_in_place(monkeypatch, module):
    """Calls with values go through XLA, as they do on a device, and the handler for devices serves them."""
    for owner in (subquad.methods, subquad.hashing):
        monkeypatch.setattr(owner, "_ext", module)
    monkeypatch.setattr(_ffi, "TARGET", HOST_TARGET)
    monkeypatch.setattr(_ops, "_is_plain", lambda arrays: False)
    jax.clear_caches()


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    """A function compiled for the stand-in would be called again where it is gone."""
    yield
    jax.clear_caches()


@pytest.fixture
def as_device(monkeypatch):
    module = Module()
    put_in_place(monkeypatch, module)
    return module


def take_out(monkeypatch):
    monkeypatch.undo()
    jax.clear_caches()


OPTIONS = [dict(num_hashes=5, hash_bits=4), dict(num_hashes=3, normalize=False), dict(hash_bits=5, expectation=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_forward_and_gradients(options, wrap, as_device, monkeypatch):
    q, k, v = small()
    function = lambda q, k, v: sj.yoso_attention(q, k, v, **options)  # noqa: E731
    gradient = jax.grad(loss_of(function), (0, 1, 2))
    got = wrap(function)(q, k, v), wrap(gradient)(q, k, v)
    jax.block_until_ready(got)
    assert {name for name, _ in as_device.calls} == {"yoso_attention", "yoso_attention_bwd"}
    take_out(monkeypatch)
    assert equal(got, (function(q, k, v), gradient(q, k, v)))


@pytest.mark.parametrize("grad", ["exact", "lower_bound"])
def test_collision_attention(grad, as_device, monkeypatch):
    q, k, v = small()
    function = lambda q, k, v: sj.collision_attention(q, k, v, 5, grad=grad, is_causal=True)  # noqa: E731
    gradient = jax.jit(jax.value_and_grad(loss_of(function), (0, 1, 2)))
    got = jax.block_until_ready(gradient(q, k, v))
    assert [name for name, _ in as_device.calls] == ["collision_attention", "collision_attention_bwd"]
    take_out(monkeypatch)
    assert equal(got, gradient(q, k, v))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mapped", [*BATCHED[:6], ("q", "k", "v", "key_mask"), ("seed",), ("seed", "q")], ids=str)
def test_vmap_is_a_loop(mapped, batch, monkeypatch):
    """Of equal bits, in one call where strides can say so."""
    as_device = Module()

    def function(given):
        given = {n: x[:batch] if getattr(x, "ndim", 0) > 1 else x for n, x in given.items() if n != "planes"}
        return sj.yoso_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given, return_lse=True)

    transformed, args, expected = mapped_and_looped(function, mapped)
    jax.block_until_ready(expected)
    put_in_place(monkeypatch, as_device)
    got = jax.block_until_ready(jax.jit(transformed)(args))
    assert equal(got, expected)
    folds = "seed" not in mapped and (batch == 1 or set(mapped) == {"q", "k", "v", "key_mask"})
    assert len(as_device.calls) == (1 if folds else 3)


def test_vmap_of_gradients(as_device, monkeypatch):
    q, k, v = small()
    stacked = [jax.numpy.stack([x, x + 1]) for x in (q, k, v)]
    loss = lambda *qkv: (sj.yoso_attention(*qkv, num_hashes=4, seed=2) ** 2 * qkv[2]).sum()  # noqa: E731
    gradient = jax.vmap(jax.grad(loss, (0, 1, 2)))
    got = jax.block_until_ready(jax.jit(gradient)(*stacked))
    assert len(as_device.calls) == 2
    take_out(monkeypatch)
    assert equal(got, jax.jit(gradient)(*stacked))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_seeds_reach_the_kernel_as_64_bits(dtype, as_device, monkeypatch):
    q, k, v = small()
    info = np.iinfo(dtype)
    function = jax.jit(lambda seed: sj.yoso_attention(q, k, v, num_hashes=4, seed=seed))
    got = [jax.block_until_ready(function(jax.numpy.asarray(s, dtype))) for s in (info.min, 0, info.max)]
    take_out(monkeypatch)
    for seed, out in zip((info.min, 0, info.max), got, strict=True):
        assert equal(out, subquad.yoso_attention(*map(np.asarray, (q, k, v)), num_hashes=4, seed=int(seed)))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (1, 2, 0, 8)])
def test_empty_arrays(shape, as_device):
    x = jax.numpy.ones(shape)
    assert jax.jit(sj.yoso_attention)(x, x, x).shape == shape


def test_plain_functions_name_the_way_out():
    """For arrays on a GPU, which they do not take."""
    device = type("Device", (), {"platform": "gpu"})()
    fields = {"__module__": "jaxlib.fake", "shape": (1, 1, 2, 4), "devices": lambda self: {device}}
    x = type("ArrayImpl", (), fields)()
    with pytest.raises(TypeError, match=r"q: expected a jax array on the cpu, got one on gpu: use subquad\.jax$"):
        subquad.yoso_attention(x, x, x)


@pytest.mark.parametrize(("framework", "told"), [(None, 0), (1, -1), (99, 0)])
def test_the_version_told_is_one_that_xla_knows(framework, told):
    """That of the headers, or of a device's plugin where that is older."""
    here = _ffi._MINOR_VERSION
    metadata = _ffi._Metadata()
    extension = _ffi._Extension(type=1, metadata=ctypes.pointer(metadata))
    frame = _ffi.CallFrame(extension_start=ctypes.pointer(extension))
    if framework is not None:
        api = _ffi._Api()
        api.api_version.minor_version = here - 1 if framework == 1 else framework
        frame.api = ctypes.pointer(api)
    assert _cuda._on_cuda(ctypes.pointer(frame)) is None
    assert (metadata.api_version.major_version, metadata.api_version.minor_version) == (0, here + told)
