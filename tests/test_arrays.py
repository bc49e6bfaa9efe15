"""The array border: what is taken is seen in place, what is not is refused with one sentence that names the fix."""

import ctypes

import numpy as np
import pytest

from border_checks import BASE, F, describe, refused, require, same_memory, unaligned
from subquad import _ext

# Numpy


NUMPY_DTYPES = ["float32", "float16", "int64", "int32", "uint16", "uint8", "bool", "longlong", "intc"]


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_numpy_dtypes(dtype):
    same_memory(np.ones((2, 3), dtype))
    assert describe(np.ones((2, 3), dtype), True)[0] == np.dtype(dtype).name


def test_numpy_bfloat16():
    ml_dtypes = require("ml_dtypes")
    same_memory(np.ones((2, 3), ml_dtypes.bfloat16))
    same_memory(np.ones((2, 6), ml_dtypes.bfloat16)[:, ::-2])
    assert describe(np.ones(3, ml_dtypes.bfloat16), True)[0] == "bfloat16"


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int4", "float8_e8m0fnu"])
def test_other_ml_dtypes_are_refused(dtype):
    refused(TypeError, f"got {dtype}", np.zeros(3, getattr(require("ml_dtypes"), dtype)))


VIEWS = {
    "transposed": BASE.transpose(0, 2, 1, 3),
    "sliced": BASE[:, 1:, ::2, 1:4],
    "negative strides": BASE[::-1, :, ::-1, ::-2],
    "broadcast": np.broadcast_to(BASE[:, :1], (2, 7, 4, 5)),
    "new axes": BASE[0, None, :, None],
    "one element": BASE[1:, 1:2, 2:3, 4:],
    "rank 0": np.array(3, F),
    "rank 6": BASE[None, None],
    "no elements": BASE[:, :0],
    "no elements and rank 1": np.empty(0, F),
    "fortran order": np.asfortranarray(BASE),
    "read-only": np.frombuffer(bytes(8), F),
}


@pytest.mark.parametrize("name", VIEWS)
def test_numpy_views(name):
    same_memory(VIEWS[name])


def test_numpy_subclasses_that_are_plain(tmp_path):
    class Named(np.ndarray):
        name = "x"

    np.save(tmp_path / "x.npy", BASE)
    for x in (np.load(tmp_path / "x.npy", mmap_mode="r"), BASE.view(Named), np.asmatrix(BASE[0, 0])):
        assert type(x) is not np.ndarray
        same_memory(x)
    refused(ValueError, "read-only", np.load(tmp_path / "x.npy", mmap_mode="r"), writable=True)


class Quantity(np.ndarray):
    def __array_ufunc__(self, *args, **keywords):
        return NotImplemented


NUMPY_REFUSED = {
    "float64": (TypeError, r"got float64 \(refused: cast to float32\)", np.ones(3)),
    "int8": (TypeError, "got int8", np.ones(3, np.int8)),
    "uint32": (TypeError, "got uint32", np.ones(3, np.uint32)),
    "complex": (TypeError, "got complex64", np.ones(3, np.complex64)),
    "text": (TypeError, "got <U1", np.array(["a"])),
    "dates": (TypeError, "got datetime64", np.array(["2020"], "M8[s]")),
    "objects": (TypeError, "got object", np.array([None])),
    "records": (TypeError, r"got \[\('a', '<f4'\)\]", np.zeros(3, [("a", "f4")])),
    "big-endian": (TypeError, "big-endian data: pass a native copy", np.ones(3, ">f4")),
    "unaligned data": (ValueError, "an unaligned address: pass a copy", unaligned("f4")),
    "a field of packed records": (ValueError, "strides of whole elements", np.zeros(3, "f4,u1")["f0"]),
    "rank 7": (ValueError, "expected at most 6 axes, got 7", BASE[None, None, None]),
    "a mask of its own": (TypeError, "MaskedArray: pass its .data, and the mask as key_mask", np.ma.ones(3, F)),
    "another ufunc": (TypeError, "Quantity, which changes what operations do", np.ones(3, F).view(Quantity)),
}


@pytest.mark.parametrize("name", NUMPY_REFUSED)
def test_numpy_refused(name):
    error, words, array = NUMPY_REFUSED[name]
    refused(error, words, array)


@pytest.mark.parametrize("what", [[1.0], (1.0,), 1.0, "x", b"x", memoryview(b"x"), F(1), {}, np.ndarray, object()])
def test_what_is_no_array(what):
    refused(TypeError, rf"expected an array \(numpy, torch, cupy or jax\), got {type(what).__name__}", what)


def test_none_is_an_argument_that_was_not_given():
    assert describe(None)[:2] == ("none", ())
    refused(TypeError, "got NoneType", None, writable=True)


@pytest.mark.parametrize("name", ["read-only", "broadcast"])
def test_read_only_outputs_are_refused(name):
    refused(ValueError, "an array that may be written, got a read-only one: pass a copy", VIEWS[name], writable=True)


# Torch


TORCH_DTYPES = ["float32", "float16", "bfloat16", "int64", "int32", "uint16", "uint8", "bool"]


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_torch_dtypes(dtype):
    torch = require("torch")
    x = torch.ones(2, 3, dtype=getattr(torch, dtype))
    assert describe(x) == (dtype, (2, 3), (3, 1), "cpu", x.data_ptr())
    assert describe(x, True) == describe(x)


def test_torch_views():
    torch = require("torch")
    base = torch.arange(120.0).reshape(2, 3, 4, 5)
    wide = base[:, :1].expand(2, 7, 4, 5)
    for x in (base.transpose(1, 2), base[:, 1:, ::2, 3], wide, torch.tensor(3.0), base[None, None]):
        assert describe(x) == ("float32", tuple(x.shape), x.stride(), "cpu", x.data_ptr())
    assert describe(base[:, :0]) == ("float32", (2, 0, 4, 5), (0, 0, 0, 0), "cpu", 0)


def torch_wrapped(transform):
    """Calls the border on the tensor that a torch.func transform passes to its function."""
    torch = require("torch")
    x = torch.ones(2, 3)
    inner = lambda t: (describe(t), t.sum())[1]  # noqa: E731
    return {
        "vmap": lambda: torch.func.vmap(inner)(x),
        "grad": lambda: torch.func.grad(inner)(x),
        "jvp": lambda: torch.func.jvp(inner, (x,), (x,)),
        "functionalize": lambda: torch.func.functionalize(inner)(x),
    }[transform]()


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize"])
def test_torch_func_is_refused(transform):
    require("torch")
    words = r"^\[describe\] array: expected .*(use subquad\.torch|forward-mode)"
    with pytest.raises((TypeError, RuntimeError), match=words):
        torch_wrapped(transform)


def test_torch_gradients_are_not_dropped():
    torch = require("torch")
    x, parameter = torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.ones(3))
    for t in (x, parameter, x * 2):
        refused(RuntimeError, r"requires_grad=True in grad mode: use subquad\.torch", t)
        refused(RuntimeError, "requires_grad=True", t, writable=True)
        with torch.no_grad():
            assert describe(t)[4] == t.data_ptr()
        with torch.inference_mode():
            assert describe(t)[4] == t.data_ptr()
        assert describe(t.detach())[4] == t.data_ptr()
    with torch.autograd.forward_ad.dual_level():
        assert describe(torch.ones(3))[0] == "float32"
        refused(RuntimeError, "forward-mode", torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3)))


def test_torch_views_that_do_not_hold_their_values():
    torch = require("torch")
    z = torch.view_as_complex(torch.ones(3, 2))
    refused(ValueError, r"call \.resolve_neg\(\)", z.conj().imag)
    assert describe(z.conj().imag.resolve_neg())[0] == "float32"
    refused(TypeError, r"complex.*: pass .*\.resolve_conj\(\)", z.conj())


@pytest.mark.filterwarnings("ignore")
def test_torch_tensors_without_plain_memory():
    torch = require("torch")
    x = torch.ones(2, 3)
    fake = pytest.importorskip("torch._subclasses.fake_tensor", reason="no fake tensors")

    class Tagged(torch.Tensor):
        pass

    refused(TypeError, "FakeTensor, which has no data: use subquad.torch", fake.FakeTensorMode().from_tensor(x))
    refused(TypeError, "Tagged, a subclass: use subquad.torch, or pass the plain tensor", x.as_subclass(Tagged))
    refused(TypeError, "a meta tensor", x.to("meta"))
    refused(TypeError, r"torch.sparse_coo: call \.to_dense\(\)", x.to_sparse())
    refused(TypeError, r"torch.sparse_csr: call \.to_dense\(\)", x.to_sparse_csr())
    refused(TypeError, r"quantized tensor: call \.dequantize\(\)", torch.quantize_per_tensor(x, 0.1, 0, torch.qint8))
    refused(TypeError, "nested tensor: pad it", torch.nested.nested_tensor([x[0, :2], x[1]]))
    x.untyped_storage().resize_(0)
    refused(TypeError, "without data", x)


@pytest.mark.parametrize("dtype", ["float64", "int8", "int16", "complex64", "float8_e4m3fn"])
def test_torch_dtypes_that_are_refused(dtype):
    torch = require("torch")
    refused(TypeError, f"got torch.{dtype}", torch.zeros(3, dtype=getattr(torch, dtype)))


def test_torch_rank_7():
    refused(ValueError, "at most 6 axes", require("torch").ones([1] * 7))


@pytest.mark.cuda
def test_torch_on_cuda():
    torch = require("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x, stream = torch.ones(2, 3, device="cuda"), torch.cuda.Stream()
    assert describe(x) == ("float32", (2, 3), (3, 1), f"cuda:{x.device.index}", x.data_ptr())
    with torch.cuda.stream(stream):
        device, handle, _, scratch = _ext._resources(x, 1 << 20)
    assert (device, handle) == (f"cuda:{x.device.index}", stream.cuda_stream) and scratch
    assert _ext._seed(torch.tensor(5, device="cuda"), x) == (0, True)
    with pytest.raises(TypeError, match=r"b: expected an array on cuda:\d+, where a is, got one on cpu"):
        _ext._convert(x, torch.ones(3), None)


# Jax


def test_jax_arrays():
    jax = require("jax")
    for dtype in ("float32", "float16", "bfloat16", "int32", "uint8", "bool"):
        x = jax.numpy.ones((2, 3), dtype)
        assert describe(x) == (dtype, (2, 3), (3, 1), "cpu", x.unsafe_buffer_pointer())
    assert describe(jax.numpy.ones((0, 3)))[1:] == ((0, 3), (0, 0), "cpu", 0)
    refused(TypeError, "a jax array, which is immutable: pass a numpy array", jax.numpy.ones(3), writable=True)
    refused(TypeError, "got int8", jax.numpy.ones(3, "int8"))
    deleted = jax.numpy.ones(3)
    deleted.delete()
    refused(TypeError, "deleted", deleted)


def test_jax_results_are_awaited():
    jax = require("jax")
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda i, y: jax.numpy.tanh(y @ y) + 1, x))
    x = jax.numpy.ones((500, 500))
    expected = np.asarray(slow(x))
    pending = slow(x)
    address = describe(pending)[4]
    seen = np.frombuffer(ctypes.string_at(address, expected.nbytes), F).reshape(expected.shape)
    assert np.array_equal(seen, expected)


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
def test_jax_tracers_are_refused(transform):
    jax = require("jax")
    with pytest.raises(TypeError, match=r"^\[describe\] array: expected .*tracer.*: use subquad\.jax"):
        getattr(jax, transform)(lambda x: (describe(x), x.sum())[1])(jax.numpy.ones((2, 3)))


def test_numpy_outputs_for_jax_inputs():
    x = require("jax").numpy.ones(3)
    _ext._convert_out(x, np.ones(3, F))
    with pytest.raises(TypeError, match="b: expected a jax array, as a is, got a numpy array"):
        _ext._convert(x, np.ones(3, F), None)


def test_autograd_sees_that_out_was_overwritten():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import subquad

    x = torch.ones(1, 1, 4, 8)
    saved = torch.ones(1, 1, 4, 8)
    weight = torch.ones(1, requires_grad=True)
    product = (weight * saved).sum()
    subquad.yoso_attention(x, x, x, out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
