"""The picture of a pattern next to exact attention: what it says in words and pixels, and what it refuses."""

import subprocess
import sys

import numpy as np
import pytest

import subquad
from ref.patterns import block_entries
from ref.teacher_blocks import softmax_rows
from sparse_cases import masks, public, random_blocks

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

BATCH, HEADS, HEADS_KV, SEQ_Q, SEQ_K, DIM = 2, 6, 3, 20, 31, 8


def inputs(masked=False, causal=False):
    """q, k with NaN where masks hide, a pattern and the masks."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((BATCH, *shape)) for shape in ((HEADS, SEQ_Q, DIM), (HEADS_KV, SEQ_K, DIM)))
    keywords = masks(BATCH, SEQ_Q, SEQ_K, masked, causal)
    if masked:
        q[np.broadcast_to(~keywords["query_mask"][:, None], q.shape[:3])] = np.nan
        k[np.broadcast_to(~keywords["key_mask"][:, None], k.shape[:3])] = np.nan
    blocks = random_blocks(BATCH, HEADS, SEQ_Q, SEQ_K, 7, 4, **keywords)
    return q.astype(np.float32), k.astype(np.float32), blocks, keywords


def pictures(figure):
    """The arrays of the two panels of every head."""
    panels = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    return list(zip(panels[::2], panels[1::2], strict=True))


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_left_and_pattern_right(masked, causal):
    q, k, blocks, keywords = inputs(masked, causal)
    figure = subquad.attention_heatmap(public(blocks), q, k, heads=[5, 0], item=1, scale=0.7, **keywords)
    b, h, n, m = block_entries(blocks)
    full = {name: keywords.get(name) for name in ("key_mask", "query_mask", "is_causal")}
    exact, _ = softmax_rows(q, k, 0.7, **full, dtype=np.float64)
    words = titles(figure)
    for i, (head, (left, right)) in enumerate(zip((5, 0), pictures(figure), strict=True)):
        here = (b == 1) & (h == head)
        member = np.zeros((SEQ_Q, SEQ_K))
        member[n[here], m[here]] = 1
        np.testing.assert_array_equal(right, member)
        np.testing.assert_allclose(left**2, exact[1, head], atol=1e-6)
        rows = (exact[1, head].sum(axis=1) > 0).sum()
        assert words[2 * i] == f"head {head}: exact attention (square root)"
        share = (exact[1, head] * member).sum() / rows
        assert words[2 * i + 1] == f"{here.sum() / SEQ_Q:.1f} keys a query: {share:.0%} of it"


def test_everything_selected_is_all_of_it():
    q, k, _, _ = inputs()
    full = np.arange(BATCH * HEADS * SEQ_Q + 1) * SEQ_K
    keys = np.tile(np.arange(SEQ_K, dtype=np.int32), BATCH * HEADS * SEQ_Q)
    pattern = subquad.CsrPattern(full, keys, (BATCH, HEADS, SEQ_Q, SEQ_K))
    assert titles(subquad.attention_heatmap(pattern, q, k))[1::2] == ["31.0 keys a query: 100% of it"] * 4


def test_pixels_are_means():
    q, k, blocks, _ = inputs()
    whole = pictures(subquad.attention_heatmap(public(blocks), q, k, heads=[1]))[0]
    small = pictures(subquad.attention_heatmap(public(blocks), q, k, heads=[1], pixels=7))[0]
    cuts = [[i * n // 7 for i in range(8)] for n in (SEQ_Q, SEQ_K)]
    for coarse, fine, power in ((small[0], whole[0], 2), (small[1], whole[1], 1)):
        assert coarse.shape == (7, 7)
        for i in range(7):
            for j in range(7):
                area = fine[cuts[0][i] : cuts[0][i + 1], cuts[1][j] : cuts[1][j + 1]] ** power
                assert coarse[i, j] ** power == pytest.approx(area.mean(), abs=1e-12)


def test_it_can_be_saved_and_shows_no_window(tmp_path):
    q, k, blocks, _ = inputs()
    before = set(sys.modules)
    figure = subquad.attention_heatmap(public(blocks), q, k)
    assert len(figure.axes) == 8 and "matplotlib.pyplot" not in set(sys.modules) - before
    figure.savefig(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_of_what_sea_attention_returns():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 2, 40, 8)).astype(np.float32) for _ in range(3))
    probs = subquad.teacher_blocks(q, k, 8, is_causal=True)[0]
    _, pattern = subquad.sea_attention(q, k, v, probs, top_k=1e9, is_causal=True, return_pattern=True)
    figure = subquad.attention_heatmap(pattern, q, k, is_causal=True)
    assert titles(figure)[1::2] == ["20.5 keys a query: 100% of it"] * 2
    for _, right in pictures(figure):
        np.testing.assert_array_equal(right, np.tril(np.ones((40, 40))))


def test_every_framework(framework):
    q, k, blocks, keywords = inputs(True, True)
    given = {name: framework.make(x) if isinstance(x, np.ndarray) else x for name, x in keywords.items()}
    pattern = public(blocks, framework.make)
    figure = subquad.attention_heatmap(pattern, framework.make(q), framework.make(k), **given)
    assert titles(figure) == titles(subquad.attention_heatmap(public(blocks), q, k, **keywords))


def test_tensors_of_a_training_step():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q, k, blocks, _ = inputs()
    q, k = (torch.from_numpy(x).bfloat16().requires_grad_() for x in (q, k))
    exact = subquad.attention_heatmap(public(blocks), *(x.detach().float().numpy() for x in (q, k)))
    assert titles(subquad.attention_heatmap(public(blocks), q, k)) == titles(exact)


Q, K, BLOCKS, _ = inputs()
GOOD = dict(pattern=public(BLOCKS), q=Q, k=K)
SHAPE = BATCH, HEADS, SEQ_Q, SEQ_K
FOREIGN = subquad.CsrPattern(np.arange(241), np.full(240, 31, np.int32), SHAPE)
REFUSED = [
    (TypeError, "pattern: expected a BlockPattern or a CsrPattern, got ndarray", dict(pattern=np.ones(3))),
    (ValueError, "q: expected shape [2, 6, 20, 'D'] as the pattern's, got [2, 6, 21, 8]",
     dict(q=np.ones((2, 6, 21, 8)))),
    (ValueError, "k: expected shape [2, 'Hkv', 31, 8], H = 6 a multiple of Hkv, got [2, 4, 31, 8]",
     dict(k=np.ones((2, 4, 31, 8)))),
    (ValueError, "item: expected a value in [0, 2), got 2", dict(item=2)),
    (ValueError, "item: expected a value of at least 0, got -1", dict(item=-1)),
    (TypeError, "item: expected an integer, got float", dict(item=1.0)),
    (ValueError, "heads: expected some in [0, 6) of a matrix with elements, got [0, 6]", dict(heads=[0, 6])),
    (ValueError, "heads: expected some in [0, 6) of a matrix with elements, got []", dict(heads=[])),
    (TypeError, "heads: expected an integer, got str", dict(heads="01")),
    (TypeError, "heads: expected a sequence of integers or None, got int", dict(heads=1)),
    (ValueError, "scale: expected a finite number above 0, got -1", dict(scale=-1)),
    (TypeError, "scale: expected a number, got str", dict(scale="1")),
    (TypeError, "is_causal: expected True or False, got str", dict(is_causal="no")),
    (TypeError, "key_mask: expected dtype bool, got float64", dict(key_mask=np.ones((2, 31)))),
    (ValueError, "pixels: expected a value of at least 1, got 0", dict(pixels=0)),
    (ValueError, "key_mask: expected shape [2, 31], got [2, 20]", dict(key_mask=np.ones((2, 20), bool))),
    (ValueError, "query_mask: expected shape [2, 20], got [20]", dict(query_mask=np.ones(20, bool))),
    (ValueError, "indices: expected keys in [0, 31), got 31 at [0]", dict(pattern=FOREIGN)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), REFUSED, ids=[entry[1][:48] for entry in REFUSED])
def test_what_it_refuses(error, message, changes):
    with pytest.raises(error) as caught:
        subquad.attention_heatmap(**GOOD | changes)
    assert message in str(caught.value) and str(caught.value).startswith("["), str(caught.value)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing_to_draw(shape):
    batch, heads, seq_q, seq_k = shape
    pattern = subquad.CsrPattern(np.zeros(batch * heads * seq_q + 1, np.int32), np.zeros(0, np.int32), shape)
    with pytest.raises(ValueError, match=r"^\[attention_heatmap\] (item|heads): expected"):
        subquad.attention_heatmap(pattern, np.ones((batch, heads, seq_q, 8)), np.ones((batch, 1, seq_k, 8)))


def test_without_matplotlib():
    code = (
        "import sys, numpy as np; sys.modules['matplotlib'] = None; import subquad\n"
        "pattern = subquad.CsrPattern(np.zeros(2, 'i4'), np.zeros(0, 'i4'), (1, 1, 1, 1))\n"
        "subquad.attention_heatmap(pattern, np.ones((1, 1, 1, 1)), np.ones((1, 1, 1, 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: [attention_heatmap] matplotlib: expected to find it, got ")
    assert last.endswith("pip install subquad[plot]")
