"""The array border and DLPack: the choices that the protocol leaves to producers, the arrays of one call, ownership."""

import sys
import threading
import types

import numpy as np
import pytest

from border_checks import BASE, F, describe, refused, require, same_memory, unaligned
from dlpack_producers import CUDA, Exchange, Producer
from subquad import _ext

# Any other producer of DLPack


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("takes_version", [True, False])
@pytest.mark.parametrize(
    "x", [BASE.transpose(0, 2, 1, 3), np.ones((0, 3), F), np.array(2)], ids=["views", "empty", "0-d"]
)
def test_both_kinds_of_capsules(x, versioned, takes_version):
    producer = Producer(x, versioned=versioned, takes_version=takes_version)
    same_memory(x, producer)
    assert producer.deleted == 1
    assert producer.calls[0] == {"max_version": (1, 3)} and producer.calls[1:] == ([] if takes_version else [{}])


def test_choices_of_producers():
    x = np.ones((2, 3), F)
    same_memory(x, Producer(x, versioned=False, strides=False))
    same_memory(x, Producer(x, byte_offset=64))
    same_memory(x, Producer(x, device=(3, 0)))  # pinned host memory
    read_only, copied = Producer(x, flags=1), Producer(x, flags=2)
    same_memory(x, read_only)
    refused(ValueError, "read-only", read_only, writable=True)
    refused(ValueError, "an exported copy", copied, writable=True)
    refused(TypeError, "expected DLPack version 1, got version 2", Producer(x, major=2))
    refused(TypeError, "got an unknown dtype", Producer(x, dtype=(2, 32, 4)))
    refused(TypeError, "got one on device", Producer(x, device=(10, 0)))
    refused(ValueError, "unaligned", Producer(unaligned("f4")))
    assert read_only.deleted == 2 and copied.deleted == 1


def test_errors_of_producers():
    class Broken(Producer):
        def __dlpack__(self, **keywords):
            raise self.array

    refused(TypeError, "BufferError: not now", Broken(BufferError("not now\nand a long story")))
    refused(TypeError, "TypeError: what", Broken(TypeError("what")))
    with pytest.raises(KeyboardInterrupt):
        describe(Broken(KeyboardInterrupt()))
    Broken.__dlpack__ = lambda self, **keywords: "no capsule"
    refused(TypeError, "a DLPack capsule from __dlpack__, got str", Broken(None))


def test_cuda_needs_a_framework_whose_stream_is_known():
    x = np.ones(3, F)
    refused(TypeError, "expected a torch or cupy array on a CUDA device, got a dlpack", Producer(x, device=(CUDA, 0)))
    for base in (Producer, Exchange):
        jax_like = type("ArrayImpl", (base,), {"__module__": "jaxlib.fake"})
        refused(_ext.UnsupportedError, "got a jax array: use subquad.jax", jax_like(x, device=(CUDA, 0)))


class CupyDevice:
    """Which device of cupy is current; 0 where none was entered."""

    entered = []

    def __init__(self, index):
        self.index = index

    def __enter__(self):
        self.entered.append(self.index)

    def __exit__(self, *exception):
        self.entered.pop()


def cupy_array(monkeypatch, alloc):
    """An array on device 1 of a cupy whose current device is 0 and whose current streams differ by device."""
    current_stream = lambda: types.SimpleNamespace(ptr=0x77 + (CupyDevice.entered or [0])[-1])  # noqa: E731
    cuda = types.SimpleNamespace(Device=CupyDevice, alloc=alloc, get_current_stream=current_stream)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    return type("ndarray", (Producer,), {"__module__": "cupy"})(np.ones(3, F), device=(CUDA, 1))


def test_cupy_stream_and_memory(monkeypatch):
    freed = []

    class Memory:
        ptr = 0x1100

        def __del__(self):
            freed.append(self.ptr)

    def alloc(size):
        assert CupyDevice.entered == [1] and size == 256
        return Memory()

    x = cupy_array(monkeypatch, alloc)
    assert _ext._resources(x, 256) == ("cuda:1", 0x78, 1, 0x1100)
    assert x.calls == [{"stream": -1, "max_version": (1, 3)}]
    assert freed == [0x1100] and not CupyDevice.entered


def test_a_failing_allocation_leaves_the_device_of_cupy(monkeypatch):
    def alloc(size):
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError, match="out of memory"):
        _ext._resources(cupy_array(monkeypatch, alloc), 256)
    assert not CupyDevice.entered


@pytest.mark.parametrize("kind", [CUDA, 13], ids=["device", "managed"])
def test_torch_without_the_exchange_api(monkeypatch, kind):
    class Tensor(Producer):
        requires_grad = False

        def is_neg(self):
            return False

    def empty(size, *, dtype, device):
        assert (size, dtype, device) == (256, "uint8", "cuda:1")
        return types.SimpleNamespace(data_ptr=lambda: 0x1200)

    fake = types.SimpleNamespace(Tensor=Tensor, nn=types.SimpleNamespace(Parameter=None), empty=empty, uint8="uint8")
    fake.cuda = types.SimpleNamespace(current_stream=lambda index: types.SimpleNamespace(cuda_stream=0x90 + index))
    monkeypatch.setitem(sys.modules, "torch", fake)
    x = Tensor(np.ones(3, F), device=(kind, 1))
    assert _ext._resources(x, 256) == ("cuda:1", 0x91, 1, 0x1200)
    assert x.calls == [{"stream": -1, "max_version": (1, 3)}]
    assert _ext._seed(Tensor(np.array(9), device=(kind, 1)), x) == (0, True)


def test_arrays_of_one_call_on_two_devices():
    x = np.ones(3, F)
    with pytest.raises(TypeError, match="b: expected an array on cuda:0, where a is, got one on cuda:1"):
        _ext._convert(Exchange(x, device=(CUDA, 0)), Exchange(x, device=(CUDA, 1)), None)
    with pytest.raises(TypeError, match="b: expected an array on cpu, where a is, got one on cuda:1"):
        _ext._convert(Exchange(x), Exchange(x, device=(CUDA, 1)), None)
    with pytest.raises(TypeError, match="seed: expected an array on cuda:1, where array is, got one on cuda:0"):
        _ext._seed(Exchange(np.array(9), device=(CUDA, 0)), Exchange(x, device=(CUDA, 1)))


def test_exchange_api():
    x = BASE.transpose(0, 2, 1, 3)
    same_memory(x, Exchange(x))
    on_cuda = Exchange(x, device=(CUDA, 2))
    assert _ext._resources(on_cuda, 256) == ("cuda:2", Exchange.stream + 2, 1, Exchange.memory)
    assert Exchange.deleted == 1
    Exchange.refuse = b"out of memory"
    with pytest.raises(RuntimeError, match=r"\[resources\] workspace: expected 256 bytes on cuda:2, got out of memory"):
        _ext._resources(on_cuda, 256)
    Exchange.refuse = b""
    with pytest.raises(TypeError, match="b: expected an array on cuda:2, where a is, got one on cpu"):
        _ext._convert(on_cuda, Exchange(x), None)


# One call


def test_one_framework_in_a_call():
    torch = require("torch")
    with pytest.raises(TypeError, match=r"^\[convert\] b: expected a numpy array, as a is, got a torch array$"):
        _ext._convert(BASE, torch.ones(3), None)
    with pytest.raises(TypeError, match=r"^\[convert\] out: expected a torch array, as a is, got a numpy array$"):
        _ext._convert_out(torch.ones(3), np.ones(3, F))
    _ext._convert(torch.ones(3), torch.nn.Parameter(torch.ones(3), requires_grad=False), None)


def test_queue_and_workspace_on_the_cpu():
    device, stream, threads, address = _ext._resources(BASE, 1000)
    assert (device, stream) == ("cpu", 0) and threads >= 1 and address % 64 == 0 and address
    assert _ext._resources(BASE)[3] == 0
    assert _ext._resources(None)[0] == "cpu"


@pytest.mark.parametrize("value", [0, 1, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, np.int64(-5), np.uint8(200)])
def test_integer_seeds(value):
    assert _ext._seed(value) == (int(value) % 2**64, False)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, 10**30])
def test_seeds_out_of_range(value):
    with pytest.raises(ValueError, match=rf"^\[seed_of\] seed: expected an integer in \[-2\^63, 2\^64\), got {value}$"):
        _ext._seed(value)


def test_array_seeds():
    assert _ext._seed(np.array(-7)) == (2**64 - 7, False)
    for value in (True, np.True_, 1.0, "1", None, F(1), [1]):
        with pytest.raises(TypeError, match=r"^\[seed_of\] seed: expected an integer or a 0-d int64 array, got "):
            _ext._seed(value)
    with pytest.raises(TypeError, match="got an array of another dtype"):
        _ext._seed(np.array(1, np.int32))
    with pytest.raises(ValueError, match="got an array of rank 1"):
        _ext._seed(np.array([1]))
    assert _ext._seed(Producer(np.array(9)), BASE) == (9, False)
    on_cuda = Exchange(np.array(9), device=(CUDA, 2))
    assert _ext._seed(on_cuda, Exchange(np.ones(3, F), device=(CUDA, 2))) == (0, True)
    with pytest.raises(TypeError, match="seed: expected a numpy array, as array is"):
        _ext._seed(on_cuda, BASE)


# Ownership


def test_references_are_given_back():
    x = np.ones(3, F)
    arrays = [x, Producer(x), Exchange(x), np.ones(3), np.ma.ones(3, F), np.ones(3, ">f4"), 2.5]
    arrays += [m.ones(3) for m in map(sys.modules.get, ("torch", "jax.numpy")) if m]
    for x in arrays:
        for writable in (False, True):
            before = sys.getrefcount(x), sys.getrefcount(type(x))
            for _ in range(100):
                try:
                    describe(x, writable)
                except (TypeError, ValueError):
                    pass
            after = sys.getrefcount(x), sys.getrefcount(type(x))
            # one for our table of types, a few for caches of the frameworks; a leak would be 100
            assert after[0] == before[0] and after[1] - before[1] < 50, type(x)


def test_memory_is_held_until_the_call_ends():
    first, second = Producer(np.ones(3, F)), Producer(np.ones(3, F))
    second.before_export = lambda: seen.append(first.deleted)
    seen = []
    _ext._convert(first, second, None)
    assert seen == [0] and (first.deleted, second.deleted) == (1, 1)
    broken = Producer(np.ones(3, F), major=2)
    with pytest.raises(TypeError, match="DLPack version 1"):
        _ext._convert(first, second, broken)
    assert (first.deleted, second.deleted, broken.deleted) == (2, 2, 1)


def test_calls_from_several_threads():
    makers = [lambda n: np.ones((n, 3), F)]
    if "torch" in sys.modules:
        makers.append(lambda n: sys.modules["torch"].ones(n, 3))
    makers.append(lambda n: Producer(np.ones((n, 3), F)))
    failures = []

    def work(index):
        for n in range(1, 300):
            x = makers[(index + n) % len(makers)](n)
            if describe(x)[1:3] != ((n, 3), (3, 1)):
                failures.append((index, n))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
