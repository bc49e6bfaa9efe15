"""Array types made of ctypes: producers of DLPack with every choice that the protocol leaves open."""

import ctypes

CPU, CUDA = 1, 2
LEGACY, VERSIONED, EXCHANGE = b"dltensor", b"dltensor_versioned", b"dlpack_exchange_api"  # capsules do not copy names


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("rank", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


def _python(name, result, *arguments):
    # own function objects: those of ctypes.pythonapi are shared, and jax declares other argument types for some
    function = getattr(ctypes.PyDLL(None), name)
    function.restype, function.argtypes = result, arguments
    return function


_new_capsule = _python("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_is_valid = _python("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_pointer = _python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)


@Deleter
def _destroy_capsule(capsule):
    """What the protocol asks of a producer: an unconsumed capsule deletes its tensor."""
    for name, kind in ((LEGACY, Managed), (VERSIONED, ManagedVersioned)):
        if _is_valid(capsule, name):
            managed = kind.from_address(_pointer(capsule, name))
            managed.deleter(ctypes.addressof(managed))


def fill(tensor, array, *, device=(CPU, 0), strides=True, byte_offset=0, dtype=None, keep=None):
    """Describes a numpy array; `keep` collects the memory that the description points to."""
    codes = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
    extents = (ctypes.c_int64 * array.ndim)(*array.shape)
    steps = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
    keep += [extents, steps, array]
    tensor.data, tensor.byte_offset = array.ctypes.data - byte_offset, byte_offset
    tensor.device, tensor.rank = Device(*device), array.ndim
    tensor.code, tensor.bits, tensor.lanes = dtype or (codes[array.dtype.kind], array.itemsize * 8, 1)
    tensor.shape = ctypes.cast(extents, ctypes.POINTER(ctypes.c_int64))
    tensor.strides = ctypes.cast(steps, ctypes.POINTER(ctypes.c_int64)) if strides else None


class Producer:
    """An array type that speaks `__dlpack__`. `calls` holds the keywords of each export."""

    def __init__(self, array, *, versioned=True, major=1, flags=0, takes_version=True, device=(CPU, 0), **choices):
        self.array, self.versioned, self.major, self.flags = array, versioned, major, flags
        self.takes_version, self.device, self.choices = takes_version, device, choices
        self.calls, self.deletions, self.alive = [], [], []
        self.before_export = lambda: None

    @property
    def deleted(self):
        return len(self.deletions)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **keywords):
        self.calls.append(keywords)
        if "max_version" in keywords and not self.takes_version:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.before_export()

        delete = Deleter(self.deletions.append)
        managed = (ManagedVersioned if self.versioned else Managed)()
        managed.deleter = delete
        if self.versioned:
            managed.major, managed.minor, managed.flags = self.major, 0, self.flags
        fill(managed.tensor, self.array, device=self.device, keep=self.alive, **self.choices)
        self.alive += [managed, delete]
        destroy = ctypes.cast(_destroy_capsule, ctypes.c_void_p)
        return _new_capsule(ctypes.addressof(managed), VERSIONED if self.versioned else LEGACY, destroy)


Allocate = ctypes.PYFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
    ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p),
)
View = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))
CurrentStream = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))


class ExchangeApi(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", Allocate),
        ("export_managed", ctypes.c_void_p),
        ("import_managed", ctypes.c_void_p),
        ("view", View),
        ("current_stream", CurrentStream),
    ]


class Exchange:
    """An array type that offers the C exchange API, as version 1 behind a version 2 that nobody knows yet."""

    stream = 0xABC0
    memory = 0xDEF00
    deleted = 0
    refuse = b""

    def __init__(self, array, device=(CPU, 0)):
        self.array, self.device, self.alive = array, device, []

    def __dlpack__(self, **keywords):
        raise AssertionError("the exchange API comes first")


@View
def _view(exchange, out):
    fill(out.contents, exchange.array, device=exchange.device, keep=exchange.alive)
    return 0


@CurrentStream
def _current_stream(device_type, device_index, out):
    out[0] = Exchange.stream + device_index
    return 0


@Deleter
def _delete(address):
    Exchange.deleted += 1


@Allocate
def _allocate(prototype, out, error, set_error):
    if Exchange.refuse:
        set_error(error, b"MemoryError", Exchange.refuse)
        return -1
    assert Tensor.from_address(prototype).shape[0] == 256
    _allocated.tensor.data, _allocated.deleter = Exchange.memory, _delete
    out[0] = ctypes.addressof(_allocated)
    return 0


_allocated = ManagedVersioned()
_api = ExchangeApi(1, 3, None, _allocate, None, None, _view, _current_stream)
_newer_api = ExchangeApi(2, 0, ctypes.addressof(_api))
Exchange.__dlpack_c_exchange_api__ = _new_capsule(ctypes.addressof(_newer_api), EXCHANGE, None)
