"""The parts of the command line, in this process: arguments, files, the search for a crossing, references, measures."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from cli_process import random_arrays
from ref.collision_attention import collision_attention
from subquad import cli
from subquad.cli import console, crossover, inputs, measure, methods, reference

# arguments and files


def test_mistakes_in_arguments(capsys):
    for arguments, words in [
        (["compare", "--seq", "0"], "argument --seq: expected an integer of at least 1, got '0'"),
        (["compare", "--seq", "many"], "argument --seq: expected an integer of at least 1, got 'many'"),
        (["compare", "--seq", "2049"], "--seq: the built-in sample is too short: expected 1..2048, got 2049"),
        (["compare", "--repeats", "-1"], "argument --repeats: expected an integer of at least 1, got '-1'"),
        (["compare", "--threads", "0"], "argument --threads: expected an integer in 1..1024, got '0'"),
        (["compare", "--seed", "1.5"], "argument --seed: expected an integer, got '1.5'"),
        (["compare", "--dtype", "float64"], "argument --dtype: invalid choice"),
        (["compare", "--rows", "yoso-16x8,softmax"], "unknown row 'softmax': expected sdpa, exact, rfa-64, "),
        (["compare", "--rows", "yoso-16x25"], "unknown row 'yoso-16x25'"),
        (["compare", "--rows", "eva-6x4"], "unknown row 'eva-6x4'"),
        (["compare", "--rows", "lara-0"], "unknown row 'lara-0'"),
        (["compare", "--rows", "rfa-relu-8"], "unknown row 'rfa-relu-8'"),
        (["compare", "--rows", "ra-1025"], "unknown row 'ra-1025'"),
        (["compare", "--rows", "sea-64"], "unknown row 'sea-64'"),
        (["compare", "--rows", "sea-65537x1"], "unknown row 'sea-65537x1'"),
        (["compare", "--rows", "sea-64x0"], "unknown row 'sea-64x0'"),
        (["compare", "--rows", "topk-2147483648"], "unknown row 'topk-2147483648'"),
        (["crossover", "--rows", "topk-0"], "unknown row 'topk-0'"),
        (["compare", "--rows", ""], "unknown row ''"),
        (["compare", "--input", "nowhere.npz"], "--input: no such file: nowhere.npz"),
        (["crossover", "--min", "9", "--max", "8"], "--min: expected at most --max = 8, got 9"),
        (["crossover", "--rows", "yoso-16x8,,lara-9"], "unknown row ''"),
        (["crossover", "--dim", "513"], "argument --dim: expected an integer in 1..512, got '513'"),
        (["compute"], "invalid choice: 'compute'"),
        (["info", "--colour"], "unrecognized arguments: --colour"),
    ]:
        assert cli.main(arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert out == "" and words in err.splitlines()[-1], (arguments, err)


def edited(name, change):
    """The random arrays with one of them changed, as keywords of savez."""
    arrays = random_arrays(heads_kv=4)
    arrays[name] = change(arrays[name])
    return arrays


def with_nan(x):
    x = x.copy()
    x[0, 0, 0, :2] = np.nan, np.inf
    return x


BAD_FILES = {
    "no batch": (
        edited("q", lambda x: x[0]),
        r"^q: expected shape \[B, H, N, D\], got \[4, 40, 8\]: add .* q\[None\]$",
    ),
    "two axes": (edited("k", lambda x: x[0, 0]), r"^k: expected shape \[B, Hkv, M, D\], got \[40, 8\]$"),
    "batch": (
        edited("k", lambda x: x[:1]),
        r"^k: expected shape .* = \[2, a divisor of 4, M, 8\], got \[1, 4, 40, 8\]$",
    ),
    "heads": (edited("k", lambda x: x[:, :3]), r"^k: expected shape .*, got \[2, 3, 40, 8\]$"),
    "dim": (edited("q", lambda x: x[..., :7]), r"^k: expected shape .* = \[2, a divisor of 4, M, 7\], got"),
    "keys": (edited("v", lambda x: x[:, :, :39]), r"^v: expected shape .* = \[2, 4, 40, E\], got \[2, 4, 39, 12\]$"),
    "empty": (edited("v", lambda x: x[..., :0]), r"^v: expected at least one element, got shape \[2, 4, 40, 0\]$"),
    "wide": (edited("q", lambda x: np.zeros((2, 4, 1, 513), np.float32)), r"^q: expected a last axis of 1\.\.512, got"),
    "nan": (edited("v", with_nan), r"^v: expected finite values, got 2 NaN or infinite of 3840 as float32$"),
    "float64": (edited("q", lambda x: x.astype(float)), r"^q: .*, got float64: convert it with --dtype float32$"),
    "integers": (edited("q", lambda x: x.astype(int)), r"^q: expected float32, float16, bfloat16, got int64$"),
    "mixed": (
        edited("q", lambda x: x.astype(np.float16)),
        r"^expected one dtype for .* q float16, k float32, v float32",
    ),
    "objects": (edited("q", lambda x: np.array([None])), r"cannot read .*: expected an \.npz archive of plain arrays$"),
    "names": ({"q": np.ones(2), "keys": np.ones(2)}, r"expected arrays q, k, v in .*, got no k, v \(found: keys, q\)$"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_arrays_that_cannot_be_used(tmp_path, case, capsys):
    arrays, pattern = BAD_FILES[case]
    np.savez(tmp_path / "qkv.npz", **arrays)
    assert cli.main(["compare", "--input", str(tmp_path / "qkv.npz")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.search(pattern, err.removeprefix("subquad compare: error: ").rstrip("\n")), err


def test_overflow_in_a_conversion_is_refused(tmp_path):
    np.savez(tmp_path / "qkv.npz", **edited("q", lambda x: x * 1e6))
    with pytest.raises(console.UserError, match=r"^q: expected finite values, got \d+ NaN or infinite .* as float16$"):
        inputs.load_inputs(str(tmp_path / "qkv.npz"), None, "float16")


def test_seq_of_a_file(tmp_path):
    np.savez(tmp_path / "qkv.npz", **random_arrays(seq_k=41))
    with pytest.raises(console.UserError, match=r"^--seq: expected as many keys as queries, got 40 and 41$"):
        inputs.load_inputs(str(tmp_path / "qkv.npz"), 8, None)
    np.savez(tmp_path / "qkv.npz", **random_arrays())
    with pytest.raises(console.UserError, match=r"^--seq: expected 1\.\.40, the tokens in the file, got 41$"):
        inputs.load_inputs(str(tmp_path / "qkv.npz"), 41, None)
    assert inputs.load_inputs(str(tmp_path / "qkv.npz"), 8, "float16").k.shape == (2, 2, 8, 8)


def test_bfloat16_in_npz_says_what_to_do(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    np.savez(tmp_path / "qkv.npz", **random_arrays(ml_dtypes.bfloat16))
    with pytest.raises(console.UserError, match=r"^q: .*\.npz does not keep bfloat16; store float32 and give --dtype"):
        inputs.load_inputs(str(tmp_path / "qkv.npz"), None, None)


@pytest.mark.parametrize("name", ["qkv.npz", "qkv.safetensors", "qkv.csv"])
def test_files_that_cannot_be_read(tmp_path, name):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    (tmp_path / name).write_text("q,k,v\n")
    with pytest.raises(
        console.UserError, match=r"^--input: (cannot read|expected a \.npz or \.safetensors file) .*qkv"
    ):
        inputs.load_inputs(str(tmp_path / name), None, None)


def test_truncated_npz(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", **random_arrays())
    whole = bytearray((tmp_path / "whole.npz").read_bytes())
    whole[200:1200] = bytes(1000)
    (tmp_path / "qkv.npz").write_bytes(whole)
    with pytest.raises(
        console.UserError, match=r"^--input: cannot read .*: expected an \.npz archive of plain arrays$"
    ):
        inputs.load_inputs(str(tmp_path / "qkv.npz"), None, None)


@pytest.mark.parametrize(
    "path, words",
    [
        ("nowhere/out.png", "--plot: no such folder: nowhere"),
        ("out.xyz", "--plot: expected a file name that ends in .png or another format of matplotlib, got 'out.xyz'"),
        ("folder.png", "--plot: cannot write folder.png"),
    ],
)
def test_bad_plot_paths(monkeypatch, tmp_path, capsys, path, words):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "--plot", path]) == 2
    assert capsys.readouterr().err == f"subquad compare: error: {words}\n"


# the search for a crossing


@pytest.mark.parametrize(
    "low, high, faster, expected",
    [
        (64, 8192, lambda n: n >= 1000, ("crossed", 1024)),
        (64, 8192, lambda n: n >= 1100, ("crossed", 1152)),
        (64, 8192, lambda n: True, ("always", 64)),
        (64, 8192, lambda n: n > 8192, ("never", None)),
        (64, 100, lambda n: n >= 100, ("crossed", 100)),
        (64, 64, lambda n: True, ("always", 64)),
        (64, 64, lambda n: False, ("never", None)),
        (64, 8192, lambda n: n == 128 or n >= 4096, ("crossed", 4096)),
    ],
)
def test_crossover_search(low, high, faster, expected):
    def at(n):
        return crossover.Point(n, 1.0, 1.0, 2.0 if faster(n) else 0.5)

    status, n, points = crossover.search(at, low, high)
    assert status == expected[0] and all(low <= p <= high for p in points)
    assert n == expected[1] or (n is not None and expected[1] is not None and abs(n - expected[1]) <= expected[1] / 16)
    if status == "crossed":
        assert points[n].ratio > 1
        assert any(p < n <= p + max(16, n // 16) and points[p].ratio < 1 for p in points)


# rows, references and measures


def test_references_are_the_formulas():
    arrays = random_arrays(np.float64, seq_k=300)
    q, k, v = (arrays[name] for name in "qkv")
    keys, values = (np.repeat(x, 2, axis=1) for x in (k, v))
    weights = np.exp(q @ keys.swapaxes(-1, -2) / np.sqrt(8))
    exact = weights / weights.sum(axis=-1, keepdims=True) @ values
    rows = np.array([0, 7, 39])
    np.testing.assert_allclose(reference.softmax_attention(q, k, v), exact, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(reference.softmax_attention(q, k, v, rows), exact[:, :, rows], rtol=1e-12, atol=1e-13)
    assert reference.softmax_attention(*(x.astype(np.float32) for x in (q, k, v))).dtype == np.float64
    k[0, 0, 3] = 0  # a zero key is at right angles to every query
    expected = collision_attention(q, k, v, 5)[:, :, rows]
    np.testing.assert_allclose(reference.yoso_expectation(q, k, v, 5, rows), expected, rtol=1e-12, atol=1e-13)


def test_references_go_over_blocks(monkeypatch):
    arrays = random_arrays(np.float64)
    whole = reference.softmax_attention(*arrays.values())
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 40 * 8 * 7)  # seven queries a block, and one left
    np.testing.assert_allclose(reference.softmax_attention(*arrays.values()), whole, rtol=1e-13)


def test_errors_are_what_they_say():
    expected = np.array([[3.0, 4.0], [0.0, 2.0]])
    assert measure.relative_error(expected, expected) == 0
    assert measure.relative_error(expected * 1.5, expected) == pytest.approx(0.5)
    assert measure.mean_cosine(expected * [[2.0], [-1.0]], expected) == pytest.approx(0)
    assert measure.mean_cosine(expected * [[1.0], [0.0]], expected) == pytest.approx(0.5)
    assert measure.some_rows(5, 8).tolist() == [0, 1, 2, 3, 4]
    assert measure.some_rows(1001, 5).tolist() == [0, 250, 500, 750, 1000]
    assert measure.quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert measure.quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)


def test_calls_take_turns():
    seen = []
    times = measure.in_turn([lambda: seen.append("a"), lambda: seen.append("b")], 3, lambda turn: seen.append(turn))
    assert seen == [0, "a", "b", 1, "a", "b", 2, "a", "b", 3, "a", "b"]
    assert [len(spent) for spent in times] == [3, 3]


def test_peak_memory_sees_what_is_freed_again(tmp_path):
    code = (
        "import json, numpy as np; from subquad.cli.measure import peak_bytes; "
        "print(json.dumps([peak_bytes(lambda: np.ones(8 << 20).sum()), peak_bytes(lambda: np.ones(1 << 10).sum())]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, check=True)
    large, small = json.loads(done.stdout)
    if large is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 64 << 20 <= large + (1 << 20) and large < 70 << 20
    assert small < 2 << 20


def test_rows_have_names_of_their_own():
    assert len({row.name for row in methods.ROWS}) == len(methods.ROWS)
    for row in methods.ROWS:
        assert methods.find_row(row.name) is row and row.name in methods.names()
    made = methods.find_row("yoso-48x10")
    assert (made.name, made.label, made.target.label) == ("yoso-48x10", "YOSO, 10 bits, 48 hashes", "YOSO-E, 10 bits")
    assert methods.find_row("yoso-1x3").budget == "1 hash"
    for name, label in {
        "rfa-1": "RFA positive, 1 feature",
        "rfa-trig-32": "RFA trig, 32 pairs",
        "rfa-hyperbolic-5": "RFA hyperbolic, 5 pairs",
        "ra-9": "RA, 9 samples",
        "lara-7": "LARA, 7 landmarks",
        "eva-12x4": "EVA, window 12, chunk 4",
        "eva-4x12": "EVA, window 4, chunk 12",
        "sea-12x5": "SEA (oracle), 12 columns, 5 keys",
        "sea-1x1": "SEA (oracle), 1 column, 1 key",
        "topk-7": "top-k (oracle), 7 keys",
        "topk-1": "top-k (oracle), 1 key",
    }.items():
        made = methods.find_row(name)
        assert (made.name, made.label, made.target) == (name, label, methods.SOFTMAX)
    assert methods.split_names("lara-7, ra-1,lara-07") == ["lara-7", "ra-1"]
    assert set(methods.LINEAR) <= {row.name for row in methods.ROWS if not row.quadratic}


@pytest.mark.parametrize("name", [row.name for row in methods.ROWS])
def test_every_row_runs(name):
    row = methods.find_row(name)
    if row.needs is not None and importlib.util.find_spec(row.needs) is None:
        pytest.skip(f"{row.needs} is not installed")
    arrays = random_arrays()
    q, k, v = arrays.values()
    for out in (row.run(q, k, v, 3), row.estimate(q, k, v, 3)):
        assert out.shape == (2, 4, 40, 12) and out.dtype == np.float32 and np.isfinite(out).all()
    error = measure.relative_error(row.estimate(q, k, v, 3), row.target.compute(q, k, v, np.arange(40)))
    assert error < (5 if row.budget else 1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_with_an_oracle(dtype):
    """More keys, less error; all keys, exact: also with shared key heads and more keys than queries."""
    q, k, v = random_arrays(dtype, seq_k=50).values()
    exact = reference.softmax_attention(q, k, v)
    for names in (["topk-1", "topk-5", "topk-49", "topk-50"], ["sea-8x2", "sea-8x30", "sea-8x51", "sea-64x50"]):
        rows = [methods.find_row(name) for name in names]
        assert all(row.prepare is not None and not row.quadratic for row in rows)
        errors = [measure.relative_error(row.run(q, k, v, 0), exact) for row in rows]
        assert errors[0] > errors[1] > errors[-1] and errors[-1] < (1e-5 if dtype == np.float32 else 2e-3), errors
        np.testing.assert_array_equal(rows[1].run(q, k, v, 0), rows[1].run(q, k, v, 1))


def test_an_oracle_is_asked_once_per_input():
    asked = []
    oracle = methods._Oracle(lambda q, k: asked.append(q) or len(asked))
    a, b = np.ones(2), np.ones(2)
    assert [oracle(a, a), oracle(a, a), oracle(a, b), oracle(a, b), oracle(b, b), oracle(a, a)] == [1, 1, 2, 2, 3, 4]
    row = methods.topk(3)
    q, k, v = random_arrays().values()
    assert row.prepare(q, k) is row.prepare(q, k)


def test_the_largest_logits_a_few_queries_at_a_time():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2, 9, 3), np.float32), rng.standard_normal((2, 1, 2**20, 3), np.float32)
    found = methods._largest(q, k, 5)  # four queries at a time
    assert found.shape == (2, 2, 9, 5) and found.dtype == np.int32
    for b, h, n in ((0, 0, 0), (1, 1, 3), (0, 1, 4), (1, 0, 8)):
        logits = k[b, 0].astype(np.float64) @ q[b, h, n]
        np.testing.assert_array_equal(found[b, h, n], np.sort(np.argsort(-logits)[:5]))


def test_what_grows_as_exact_attention_does_is_not_searched():
    ns = []

    def at(n):
        ns.append(n)
        return crossover.Point(n, 1.0, 2.0, 0.5)

    status, n, points = crossover.ratios(at, 48, 100000)
    assert (status, n) == ("quadratic", None) and list(points) == ns == [48, 96, 192, 384, 768, 1536, 2048]
    assert list(crossover.ratios(at, 4096, 8192)[2]) == [4096]
