"""Moving the arrays of a test to a device and back, with the CPU as the device."""

import numpy as np
import pytest

import device_arrays
import subquad
from cases import as_dtype, strided

torch = pytest.importorskip("torch", reason="torch is not installed")

BASE = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
VIEWS = {
    "contiguous": BASE,
    "transposed": BASE.transpose(0, 2, 1, 3),
    "with holes": strided(BASE),
    "broadcast": np.broadcast_to(BASE[:, :1], (2, 7, 4, 5)),
    "off a vector": BASE[:, 1:, 2:, 1:],
    "0-d": np.array(7, np.int64),
    "mask": BASE[0, 0] > 7,
    "codes": BASE.astype(np.uint16)[:, ::2],
    "empty": BASE[:, :0],
}


@pytest.mark.parametrize("name", VIEWS)
def test_values_strides_and_alignment_are_kept(name):
    x = VIEWS[name]
    there = device_arrays.to_device(x, "cpu")
    assert there.data_ptr() != x.ctypes.data or not x.size
    np.testing.assert_array_equal(device_arrays.from_device(there), x)
    if x.size:
        assert list(there.stride()) == [step // x.itemsize for step in x.strides]
        assert there.storage_offset() * x.itemsize == x.ctypes.data % 16


def test_negative_strides_become_a_copy_and_bfloat16_stays():
    x = BASE[:, ::-1]
    np.testing.assert_array_equal(device_arrays.to_device(x, "cpu").numpy(), x)
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    for shape in ((3, 4), (3, 0)):
        narrow = as_dtype(BASE[0, :, : shape[1], 0], "bfloat16")
        there = device_arrays.to_device(narrow, "cpu")
        back = device_arrays.from_device(there)
        assert there.dtype == torch.bfloat16 and back.dtype == narrow.dtype and back.tobytes() == narrow.tobytes()


@pytest.fixture
def seen(monkeypatch):
    """The types that l2_normalize and yoso_attention see behind the wrappers."""
    types = []
    for name in ("l2_normalize", "yoso_attention"):
        plain = getattr(subquad, name)

        def spy(*arguments, plain=plain, **keywords):
            types.append({type(x).__module__ for x in [*arguments, *keywords.values()] if hasattr(x, "shape")})
            return plain(*arguments, **keywords)

        monkeypatch.setattr(subquad, name, spy)
    device_arrays.install(monkeypatch, "cpu")
    return types


def test_calls_run_on_tensors_and_give_numpy(seen):
    x = np.random.default_rng(0).standard_normal((2, 2, 9, 16)).astype(np.float32)
    keep = np.arange(18).reshape(2, 9) % 3 > 0
    options = dict(num_hashes=3, hash_bits=4, key_mask=keep, seed=np.array(5), return_lse=True)
    out, lse = subquad.yoso_attention(x, x, strided(x), **options)
    assert seen == [{"torch"}] and type(out) is type(lse) is np.ndarray
    options |= dict(key_mask=torch.from_numpy(keep), seed=5)
    expected, log = subquad.yoso_attention(*(torch.from_numpy(x) for _ in range(3)), **options)
    np.testing.assert_array_equal(out, expected.numpy())
    np.testing.assert_array_equal(lse, log.numpy())


def test_outputs_are_written_back(seen):
    x = np.random.default_rng(0).standard_normal((2, 2, 9, 16)).astype(np.float32)
    expected = subquad.l2_normalize(x)
    for out in (strided(np.full_like(x, np.nan)), np.full_like(x, np.nan)[:, ::-1]):
        assert subquad.l2_normalize(x, out=out) is out
        np.testing.assert_array_equal(out, expected)
    assert subquad.l2_normalize(x, out=x) is x
    np.testing.assert_array_equal(x, expected)


def test_what_is_written_between_the_elements_comes_back():
    def scribble(*, out):
        out.as_strided((7,), (1,)).fill_(3)
        return out

    base = np.zeros((3, 4), np.float32)
    device_arrays.on_device(scribble, "cpu")(out=base[:2, :3])
    assert base.ravel().tolist() == [3] * 7 + [0] * 5


def test_draws_take_place_on_the_device(seen):
    for draw in (subquad.random_uniform, subquad.random_normal, subquad.random_signs):
        drawn = draw((2, 3, 4), seed=1)
        assert type(drawn) is np.ndarray and drawn.shape == (2, 3, 4) and drawn.dtype == np.float32
        np.testing.assert_array_equal(drawn, draw((2, 3, 4), seed=np.array(1), out=np.empty((2, 3, 4), np.float32)))
    assert subquad.random_signs(7, seed=1).shape == (7,)


def test_results_elsewhere_are_seen():
    x = np.ones((1, 1, 2, 4), np.float32)
    escaped = device_arrays.on_device(lambda x: x.to("meta"), "cpu")
    with pytest.raises(AssertionError, match="the result is on meta, not on cpu"):
        escaped(x)
