"""Bad inputs of the softmax family: each gives one clear sentence, before any work, in the grammar of the library."""

import re

import numpy as np
import pytest

import subquad

F = np.float32
METHODS = ["softmax_attention", "rfa_attention", "randomized_attention", "lara_attention", "eva_attention"]


def ones(*shape, dtype=F):
    return np.ones(shape, dtype)


QKV = dict(q=ones(2, 4, 5, 8), k=ones(2, 2, 6, 8), v=ones(2, 2, 6, 3))
MASK = np.ones((2, 5), bool)
WIDE = ones(2, 4, 5, 11)
LOCKED = ones(2, 4, 5, 3)
LOCKED.flags.writeable = False
OVERLAPPING = np.lib.stride_tricks.as_strided(np.ones(3, F), (2, 4, 5, 3), (0, 0, 0, 4), writeable=True)


def refuse(name, error, message, arguments):
    """The call raises that error in one sentence of the grammar, which names the function that was called."""
    with pytest.raises(error) as caught:
        getattr(subquad, name)(**arguments)
    text = str(caught.value)
    assert type(caught.value) is error and message in text and "\n" not in text, text
    if error is not subquad.UnsupportedError:
        assert re.match(rf"\[{name}\] [\w' ]+(\[\d\]|\.\w+)?: expected .+, got .+", text), text


def ids(table):
    return [f"{entry[0]} {entry[-2]}"[:64] if len(entry) == 4 else entry[-2][:48] for entry in table]


COMMON = [
    (TypeError, "q: expected an array (numpy, torch, cupy or jax), got list", dict(q=[[1.0]])),
    (TypeError, "q: expected an array (numpy, torch, cupy or jax), got NoneType", dict(q=None)),
    (TypeError, "k: expected an array", dict(k=3.0)),
    (TypeError, "got float64", dict(q=ones(2, 4, 5, 8, dtype=float))),
    (TypeError, "k: expected dtype float32, got float16", dict(k=ones(2, 2, 6, 8, dtype=np.float16))),
    (TypeError, "q: expected dtype float32 or float16 or bfloat16, got int32",
     {name: x.astype("i4") for name, x in QKV.items()}),
    (ValueError, "q: expected shape [B, H, N, D], got [4, 5, 8]", dict(q=ones(4, 5, 8))),
    (ValueError, "k: expected shape [B, Hkv, M, D]", dict(k=ones(2, 2, 6, 9))),
    (ValueError, "k: expected shape [B, Hkv, M, D]", dict(k=ones(3, 2, 6, 8))),
    (ValueError, "v: expected shape [B, Hkv, M, E]", dict(v=ones(2, 2, 7, 3))),
    (ValueError, "v: expected shape [B, Hkv, M, E]", dict(v=ones(2, 1, 6, 3))),
    (ValueError, "k: expected a number of heads that divides the 4 query heads, got 3",
     dict(k=ones(2, 3, 6, 8), v=ones(2, 3, 6, 3))),
    (ValueError, "of at least 1, got 0", dict(q=ones(2, 4, 5, 0), k=ones(2, 2, 6, 0))),
    (ValueError, "of at least 1, got 0", dict(v=ones(2, 2, 6, 0))),
    (ValueError, "q: expected a contiguous last axis", dict(q=ones(2, 4, 5, 16)[..., ::2])),
    (ValueError, "key_mask: expected shape [B, M] = [2, 6], got [2, 5]", dict(key_mask=MASK)),
    (TypeError, "key_mask: expected dtype bool, got float32", dict(key_mask=ones(2, 6))),
    (ValueError, "scale: expected a finite number above 0, got 0.0", dict(scale=0.0)),
    (ValueError, "scale: expected a finite number above 0, got nan", dict(scale=np.nan)),
    (TypeError, "scale: expected a number, got str", dict(scale="1")),
    (TypeError, "scale: expected a number, got bool", dict(scale=True)),
    (TypeError, "scale: expected a number, got ndarray", dict(scale=ones(2))),
    (ValueError, "out: expected shape [B, H, N, E] = [2, 4, 5, 3], got [2, 4, 5, 8]", dict(out=ones(2, 4, 5, 8))),
    (TypeError, "out: expected dtype float32, got float16", dict(out=ones(2, 4, 5, 3, dtype=np.float16))),
    (TypeError, "out: expected an array", dict(out=[1.0])),
    (ValueError, "out: expected an array that may be written, got a read-only one", dict(out=LOCKED)),
    (ValueError, "out: expected an output that shares no memory", dict(q=WIDE[..., :8], out=WIDE[..., 8:])),
    (ValueError, "out: expected an output whose elements have memory of their own", dict(out=OVERLAPPING)),
    (subquad.UnsupportedError, "512", dict(v=ones(2, 2, 6, 513))),
    (subquad.UnsupportedError, "512", dict(q=ones(2, 4, 5, 600), k=ones(2, 2, 6, 600))),
]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("error", "message", "changes"), COMMON, ids=ids(COMMON))
def test_what_every_method_refuses(name, error, message, changes):
    refuse(name, error, message, QKV | changes)


CAUSAL = dict(is_causal=True)
FLAG = "expected True or False, got"
BARS = ones(2, 4, 3, 8), ones(2, 2, 3, 8)
CHUNKS = dict(window=2, chunk_size=2)
S, Z = ones(2, 2, 4, 3), ones(2, 2, 4)
PAST = (ones(2, 2, 1, 8), ones(2, 2, 1, 3), None, ones(2, 2, 1, 8), ones(2, 2, 1, 3), ones(2, 1))
DRAWS = dict(indices=np.zeros((2, 4, 1, 5), "i4"), noise=ones(2, 4, 1, 5, 8))


def past(**parts):
    """A state of EVA with some parts replaced."""
    names = ("k_tail", "v_tail", "mask_tail", "k_bar", "beta", "log_mass")
    return CHUNKS | CAUSAL | dict(state=tuple(parts.get(name, x) for name, x in zip(names, PAST, strict=True)))


OWN = [
    ("softmax_attention", ValueError, "key_bias: expected 1, Hkv = 2 or H = 4 heads, got 3",
     dict(key_bias=ones(2, 3, 6))),
    ("softmax_attention", ValueError, "key_bias: expected shape", dict(key_bias=ones(2, 4, 5))),
    ("softmax_attention", ValueError, "key_bias: expected shape", dict(key_bias=ones(2, 6))),
    ("softmax_attention", TypeError, "got float64", dict(key_bias=ones(2, 4, 6, dtype=float))),
    ("softmax_attention", TypeError, "window: expected None or a pair (left, right), got int", dict(window=3)),
    ("softmax_attention", TypeError, "window: expected None or a pair (left, right)", dict(window=(1,))),
    ("softmax_attention", TypeError, "window: expected an integer, got float", dict(window=(1.0, 2))),
    ("softmax_attention", ValueError, "expected a number of tokens, or -1 for no bound, got -2", dict(window=(-2, 1))),
    ("softmax_attention", TypeError, f"is_causal: {FLAG} int", dict(is_causal=1)),
    ("softmax_attention", TypeError, f"return_lse: {FLAG} str", dict(return_lse="yes")),
    ("rfa_attention", ValueError, 'features: expected "positive" or', dict(features="cosine")),
    ("rfa_attention", TypeError, 'features: expected "positive" or', dict(features=1)),
    ("rfa_attention", ValueError, "num_features: expected a value in [1,", dict(num_features=0)),
    ("rfa_attention", TypeError, "num_features: expected an integer, got float", dict(num_features=16.0)),
    ("rfa_attention", TypeError, "num_features: expected an integer, got bool", dict(num_features=True)),
    ("rfa_attention", ValueError, "projection: expected shape", dict(projection=ones(4, 9))),
    ("rfa_attention", ValueError, "projection: expected shape", dict(projection=ones(8))),
    ("rfa_attention", ValueError, "projection: expected a leading axis of 1 or Hkv = 2, got 3",
     dict(projection=ones(3, 4, 8))),
    ("rfa_attention", TypeError, "projection: expected dtype float32", dict(projection=ones(4, 8, dtype=np.float16))),
    ("rfa_attention", ValueError, "num_features: expected 4 as in projection, got 5",
     dict(projection=ones(4, 8), num_features=5)),
    ("rfa_attention", TypeError, f"orthogonal: {FLAG} int", dict(orthogonal=1)),
    ("rfa_attention", ValueError, "projection: expected none with features=",
     dict(features="elu", projection=ones(4, 8))),
    ("rfa_attention", ValueError, "scale: expected none with features=", dict(features="elu", scale=1.0)),
    ("rfa_attention", ValueError, "num_features: expected none with features=", dict(features="elu", num_features=7)),
    ("rfa_attention", ValueError, "gate: expected is_causal=True with it", dict(gate=ones(2, 2, 6))),
    ("rfa_attention", ValueError, "gate: expected shape [B, Hkv, M] = [2, 2, 6], got", CAUSAL | dict(gate=Z)),
    ("rfa_attention", ValueError, "gate: expected values in [0, 1], got 2", CAUSAL | dict(gate=2 * ones(2, 2, 6))),
    ("rfa_attention", ValueError, "gate: expected values in [0, 1]", CAUSAL | dict(gate=np.nan * ones(2, 2, 6))),
    ("rfa_attention", TypeError, "state: expected None or a tuple (S, z, shift), got int", dict(state=1)),
    ("rfa_attention", TypeError, "state: expected None or a tuple (S, z, shift), got 2 values", dict(state=(S, Z))),
    ("rfa_attention", TypeError, "state", CAUSAL | dict(state=(None, None, None))),
    ("rfa_attention", ValueError, "state: expected is_causal=True", dict(num_features=4, state=(S, Z, Z))),
    ("rfa_attention", TypeError, "shift: expected an array, got", CAUSAL | dict(num_features=4, state=(S, Z, None))),
    ("rfa_attention", ValueError, "shift: expected none",
     CAUSAL | dict(features="relu", num_features=4, state=(S, Z, Z))),
    ("rfa_attention", ValueError, "expected shape [B, Hkv, F] = [2, 2, 5], got",
     CAUSAL | dict(num_features=5, state=(ones(2, 2, 5, 3), Z, Z))),
    ("rfa_attention", ValueError, "return_state: expected is_causal=True", dict(return_state=True)),
    ("rfa_attention", TypeError, f"return_state: {FLAG} int", CAUSAL | dict(return_state=1)),
    ("rfa_attention", ValueError, "lse: expected positive or hyperbolic features", CAUSAL | dict(return_lse=True)),
    ("rfa_attention", TypeError, "seed: expected an integer or a 0-d int64 array, got float", dict(seed=1.5)),
    ("rfa_attention", ValueError, "seed: expected an integer in", dict(seed=2**64)),
    ("randomized_attention", ValueError, "num_samples: expected a value in [1,", dict(num_samples=0)),
    ("randomized_attention", TypeError, "num_samples: expected an integer, got float", dict(num_samples=1.0)),
    ("randomized_attention", ValueError, 'noise_std: expected "exact" or "published"', dict(noise_std="best")),
    ("randomized_attention", ValueError, "finite number above 0, got -1", dict(noise_std=-1)),
    ("randomized_attention", ValueError, "finite number above 0, got nan", dict(noise_std=np.nan)),
    ("randomized_attention", TypeError, "noise_std: expected a number, got NoneType", dict(noise_std=None)),
    ("randomized_attention", ValueError, "noise: expected indices and noise, or neither",
     dict(indices=DRAWS["indices"])),
    ("randomized_attention", ValueError, "indices: expected indices and noise, or neither",
     dict(noise=DRAWS["noise"])),
    ("randomized_attention", TypeError, "indices: expected dtype int32, got int64",
     DRAWS | dict(indices=np.zeros((2, 4, 1, 5), np.int64))),
    ("randomized_attention", ValueError, "indices: expected values in [-1, 6), got 6",
     DRAWS | dict(indices=DRAWS["indices"] + 6)),
    ("randomized_attention", ValueError, "indices: expected values in [-1, 6), got -2",
     DRAWS | dict(indices=DRAWS["indices"] - 2)),
    ("randomized_attention", ValueError, "noise: expected shape [B, H, S, N, D] = [2, 4, 1, 5, 8]",
     DRAWS | dict(noise=ones(2, 4, 2, 5, 8))),
    ("randomized_attention", ValueError, "num_samples: expected 1 as in indices, got 3", DRAWS | dict(num_samples=3)),
    ("randomized_attention", ValueError, 'grad: expected "pathwise" or "unbiased"', dict(grad="exact")),
    ("lara_attention", ValueError, "landmarks k_bar: expected shape",
     dict(landmarks=(BARS[0], ones(2, 2, 2, 8)))),
    ("lara_attention", TypeError, "landmarks q_bar: expected an array", dict(landmarks=(None, BARS[1]))),
    ("lara_attention", TypeError, "landmarks q_bar: expected an array", dict(landmarks=(None, None))),
    ("lara_attention", TypeError, "landmarks: expected None or a pair (q_bar, k_bar), got ndarray",
     dict(landmarks=BARS[0])),
    ("lara_attention", TypeError, "num_landmarks: expected an integer, got float", dict(num_landmarks=2.5)),
    ("lara_attention", ValueError, "noise: expected shape [B, H, J, D]", dict(landmarks=BARS, noise=ones(2, 4, 3, 7))),
    ("lara_attention", ValueError, "samples_per_landmark: expected 1 as in noise, got 2",
     dict(landmarks=BARS, noise=ones(2, 4, 3, 8), samples_per_landmark=2)),
    ("lara_attention", TypeError, "query_mask: expected dtype bool, got float32", dict(query_mask=ones(2, 5))),
    ("lara_attention", TypeError, "seed: expected an integer or a 0-d int64 array, got bool", dict(seed=True)),
    ("lara_attention", TypeError, f"return_lse: {FLAG} int", dict(return_lse=3)),
    ("eva_attention", ValueError, "window: expected a value in [1,", dict(window=0)),
    ("eva_attention", TypeError, "window: expected an integer, got float", dict(window=1.5)),
    ("eva_attention", TypeError, "chunk_size: expected an integer, got str", dict(chunk_size="x")),
    ("eva_attention", ValueError, "chunk_size: expected a divisor or a multiple of window = 6, got 4",
     dict(window=6, chunk_size=4)),
    ("eva_attention", ValueError, "chunk_size: expected a divisor or a multiple of window = 6, got 4",
     CAUSAL | dict(window=6, chunk_size=4, partition=False)),
    ("eva_attention", TypeError, f"partition: {FLAG} int", dict(partition=1)),
    ("eva_attention", TypeError, f"chunk_mass: {FLAG} NoneType", dict(chunk_mass=None)),
    ("eva_attention", TypeError, "landmarks: expected None or a pair (k_bar, mu), got 1 values",
     CHUNKS | dict(landmarks=(BARS[1],))),
    ("eva_attention", ValueError, "landmarks mu: expected shape [B, Hkv, C, D] = [2, 2, 3, 8]",
     CHUNKS | dict(landmarks=(BARS[1], ones(2, 2, 2, 8)))),
    ("eva_attention", ValueError, "noise: expected shape [B, Hkv, C, D] = [2, 2, 3, 8]",
     CHUNKS | dict(noise=ones(2, 2, 2, 8))),
    ("eva_attention", ValueError, "return_state: expected is_causal=True", dict(return_state=True)),
    ("eva_attention", TypeError, f"return_state: {FLAG} ndarray", CAUSAL | dict(return_state=ones(2))),
    ("eva_attention", TypeError, "state: expected None or a tuple (k_tail,", CAUSAL | dict(state=(1, 2))),
    ("eva_attention", ValueError, "state: expected is_causal=True", CHUNKS | dict(state=PAST)),
    ("eva_attention", ValueError, "state k_tail: expected [2, 2, T, 8] of float32, got None", past(k_tail=None)),
    ("eva_attention", ValueError, "state k_tail: expected [2, 2, T, 8] of float32, got [2, 2, 1, 8] of float16",
     past(k_tail=ones(2, 2, 1, 8, dtype=np.float16))),
    ("eva_attention", ValueError, "state: expected a v_tail and mask_tail of 1 tokens", past(v_tail=ones(2, 2, 2, 3))),
    ("eva_attention", TypeError, "state k_bar: expected an array", past(k_bar=None)),
    ("eva_attention", ValueError, "state k_bar: expected shape", past(k_bar=ones(2, 1, 1, 8))),
    ("eva_attention", ValueError, "state log_mass: expected shape [B, C] = [2, 1]", past(log_mass=ones(2, 2))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "error", "message", "changes"), OWN, ids=ids(OWN))
def test_what_a_method_refuses(name, error, message, changes):
    refuse(name, error, message, QKV | changes)
    if not any(key in changes for key in ("out", "return_lse", "return_state")) and "lse" not in message[:4]:
        refuse(f"{name}_bwd", error, message, dict(dout=ones(2, 4, 5, 3)) | QKV | changes)


LINEAR = dict(fq=ones(2, 4, 5, 7), fk=ones(2, 2, 6, 7), v=QKV["v"])
X = dict(x=ones(2, 4, 5, 8))
MAP = X | dict(projection=ones(6, 8))
PARTS = dict(out1=ones(2, 4, 5, 3), lse1=ones(2, 4, 5), out2=ones(2, 4, 5, 3), lse2=ones(2, 4, 5))
SAMPLE = dict(q=QKV["q"], k=QKV["k"])
PROPOSE = SAMPLE | DRAWS
MIX = dict(q_bar=BARS[0], k_bar=BARS[1])
WEIGH = dict(q=QKV["q"], q_bar=BARS[0], balance=ones(2, 4, 3))
PROJECT = dict(num_features=4, dim=8, seed=1)
OPERATORS = [
    ("linear_attention", TypeError, "fk: expected an array", LINEAR | dict(fk=None)),
    ("linear_attention", ValueError, "fk: expected shape [B, Hkv, M, F]", LINEAR | dict(fk=ones(2, 2, 6, 8))),
    ("linear_attention", TypeError, "fk: expected dtype float16", LINEAR | dict(fq=ones(2, 4, 5, 7, dtype="f2"))),
    ("linear_attention", ValueError, "fq: expected a value in [1,",
     LINEAR | dict(fq=ones(2, 4, 5, 0), fk=ones(2, 2, 6, 0))),
    ("linear_attention", ValueError, "v: expected a value in [1, 512], got 513", LINEAR | dict(v=ones(2, 2, 6, 513))),
    ("linear_attention", ValueError, "normalize: expected true with log_features or key_log_weight, got false",
     LINEAR | dict(normalize=False, log_features=True)),
    ("linear_attention", TypeError, f"normalize: {FLAG} int", LINEAR | dict(normalize=1)),
    ("linear_attention", TypeError, f"return_state: {FLAG} str", LINEAR | CAUSAL | dict(return_state="x")),
    ("linear_attention", ValueError, "return_state: expected is_causal=True", LINEAR | dict(return_state=True)),
    ("linear_attention", ValueError, "gate: expected none unless is_causal", LINEAR | dict(gate=ones(2, 2, 6))),
    ("linear_attention", ValueError, "gate: expected values in [0, 1], got 2",
     LINEAR | CAUSAL | dict(gate=2 * ones(2, 2, 6))),
    ("linear_attention", ValueError, "decay: expected values in [0, 1], got -1",
     LINEAR | CAUSAL | dict(decay=-ones(2))),
    ("linear_attention", ValueError, "decay: expected shape [Hkv] = [2] or [B, Hkv, M], got [3]",
     LINEAR | CAUSAL | dict(decay=ones(3))),
    ("linear_attention", ValueError, "decay: expected a gate or a decay, not both",
     LINEAR | CAUSAL | dict(gate=ones(2, 2, 6), decay=ones(2))),
    ("linear_attention", TypeError, "key_log_weight: expected dtype float32",
     LINEAR | dict(key_log_weight=ones(2, 2, 6, dtype="f2"))),
    ("linear_attention", TypeError, "state: expected None or a tuple (S, z, shift), got str", LINEAR | dict(state="S")),
    ("linear_attention", TypeError, "state: expected arrays", LINEAR | CAUSAL | dict(state=(None, Z, None))),
    ("linear_attention", ValueError, "state.shift: expected none without log_features and key_log_weight",
     LINEAR | CAUSAL | dict(state=(ones(2, 2, 7, 3), ones(2, 2, 7), ones(2, 2, 7)))),
    ("feature_map", TypeError, "projection: expected an array", X),
    ("feature_map", ValueError, "projection: expected shape [F, D] or [Hp, F, D], got [8]",
     MAP | dict(projection=ones(8))),
    ("feature_map", ValueError, "projection: expected a leading axis that divides H = 4, got 3",
     MAP | dict(projection=ones(3, 6, 8))),
    ("feature_map", ValueError, 'features: expected "positive" or', MAP | dict(features="cos")),
    ("feature_map", ValueError, "projection: expected none with elu features", MAP | dict(features="elu")),
    ("feature_map", ValueError, "scale: expected none with elu features", X | dict(features="elu", scale=1.0)),
    ("feature_map", ValueError, "log: expected False with other features", MAP | dict(features="trig", log=True)),
    ("feature_map", TypeError, f"log: {FLAG} int", MAP | dict(log=1)),
    ("feature_map", ValueError, "log_factor: expected none with other features than trig",
     MAP | dict(return_log_factor=True)),
    ("feature_map", TypeError, f"return_log_factor: {FLAG} int", MAP | dict(return_log_factor=3)),
    ("feature_map_bwd", TypeError, 'features: expected "positive" or',
     MAP | dict(dout=ones(2, 4, 5, 6), features=None)),
    ("segment_mean", ValueError, "num_segments: expected num_segments or segment_size, got neither", X),
    ("segment_mean", ValueError, "num_segments: expected num_segments or segment_size, got both",
     X | dict(num_segments=2, segment_size=2)),
    ("segment_mean", TypeError, "num_segments: expected an integer, got ndarray", X | dict(num_segments=ones(2))),
    ("segment_mean", ValueError, "num_segments: expected a value below 2^31, got", X | dict(num_segments=2**70)),
    ("segment_mean", ValueError, "segment_size: expected a value", X | dict(segment_size=0)),
    ("segment_mean", ValueError, "paired_mask: expected none together with segment_size",
     X | dict(segment_size=2, paired_mask=MASK)),
    ("segment_mean", TypeError, f"return_counts: {FLAG} int", X | dict(num_segments=2, return_counts=1)),
    ("segment_mean_bwd", TypeError, "seq: expected an integer, got ndarray",
     dict(dout=ones(2, 4, 2, 8), seq=ones(2, 2), num_segments=2)),
    ("merge_states", ValueError, "lse1: expected shape [B, H, N] = [2, 4, 5]", PARTS | dict(lse1=ones(2, 4, 6))),
    ("merge_states", TypeError, "out2: expected dtype float32", PARTS | dict(out2=ones(2, 4, 5, 3, dtype="f2"))),
    ("sum_arrays", ValueError, "terms: expected a sequence of 1 to 4 arrays, got 5", dict(terms=[X["x"]] * 5)),
    ("sum_arrays", ValueError, "factors: expected 2 of them", dict(terms=[X["x"]] * 2, factors=[1.0])),
    ("softmax_sample", ValueError, "num_samples: expected", SAMPLE | dict(num_samples=0)),
    ("softmax_sample", TypeError, "seed: expected an integer", SAMPLE | dict(seed=None)),
    ("sampled_proposals", ValueError, "indices: expected values in [-1, 6), got 6",
     PROPOSE | dict(indices=DRAWS["indices"] + 6)),
    ("mixture_proposals", ValueError, "noise: expected J a multiple of C = 3, got 4",
     MIX | dict(noise=ones(2, 4, 4, 8))),
    ("mixture_proposals", TypeError, "counts: expected dtype int32", MIX | dict(counts=np.ones((2, 3), np.int64))),
    ("mixture_weights", ValueError, "balance: expected J a multiple of C = 3, got 4",
     WEIGH | dict(balance=ones(2, 4, 4))),
    ("orthogonal_projection", TypeError, "num_features: expected an integer, got float",
     PROJECT | dict(num_features=4.0)),
    ("orthogonal_projection", ValueError, "dim: expected a value of at least 1, got 0", PROJECT | dict(dim=0)),
    ("orthogonal_projection", ValueError, 'kind: expected "haar" or', PROJECT | dict(kind="best")),
    ("orthogonal_projection", ValueError, "out: expected shape [4, 8], got [4, 9]", PROJECT | dict(out=ones(4, 9))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "error", "message", "arguments"), OPERATORS, ids=ids(OPERATORS))
def test_what_an_operator_refuses(name, error, message, arguments):
    refuse(name, error, message, arguments)


@pytest.mark.parametrize("name", METHODS)
def test_backward_passes_refuse_what_does_not_fit(name):
    for dout, error, message in [
        (ones(2, 4, 5, 8), ValueError, "dout: expected shape [B, H, N, E] = [2, 4, 5, 3], got [2, 4, 5, 8]"),
        (ones(2, 4, 5, 3, dtype=np.float16), TypeError, "dout: expected dtype float32, got float16"),
        (None, TypeError, "dout: expected an array"),
    ]:
        refuse(f"{name}_bwd", error, message, dict(dout=dout) | QKV)
    if name != "randomized_attention":
        saved = dict(dout=ones(2, 4, 5, 3), out=ones(2, 4, 5, 3), lse=ones(2, 4, 6))
        refuse(f"{name}_bwd", ValueError, "lse: expected shape [B, H, N] = [2, 4, 5], got", saved | QKV)


@pytest.mark.parametrize("name", METHODS)
def test_frameworks_do_not_mix(name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    other = "expected an array of the same framework as q"
    refuse(name, TypeError, f"k: {other}", QKV | dict(k=torch.ones(2, 2, 6, 8)))
    refuse(name, TypeError, f"key_mask: {other}", QKV | dict(key_mask=torch.ones(2, 6, dtype=torch.bool)))
    refuse(name, TypeError, f"out: {other}", QKV | dict(out=torch.ones(2, 4, 5, 3)))


@pytest.mark.parametrize("name", METHODS)
def test_tensors_of_other_devices_and_with_gradients(name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {key: torch.from_numpy(x) for key, x in QKV.items()}
    with pytest.raises((TypeError, subquad.UnsupportedError), match=rf"^\[{name}\] q: "):
        getattr(subquad, name)(**tensors | dict(q=torch.ones(2, 4, 5, 8, device="meta")))
    tensors["k"].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"^\[{name}\] k: .*subquad\.torch"):
        getattr(subquad, name)(**tensors)
    with torch.no_grad():
        assert getattr(subquad, name)(**tensors).shape == (2, 4, 5, 3)


@pytest.mark.parametrize("name", METHODS)
def test_jax_outputs_and_tracers_are_refused(name):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    x = jax.numpy.ones((1, 2, 5, 8))
    refuse(name, TypeError, "out: expected None for jax arrays", dict(q=x, k=x, v=x, out=x))
    with pytest.raises(TypeError, match=r"use subquad\.jax"):
        jax.jit(lambda a: getattr(subquad, name)(a, a, a))(x)


@pytest.mark.parametrize(("name", "error", "message", "changes"), OWN, ids=ids(OWN))
def test_a_failed_call_leaves_out_alone(name, error, message, changes):
    out = np.full((2, 4, 5, 3), 7, F)
    with pytest.raises(error):
        getattr(subquad, name)(**QKV | changes | dict(out=out))
    assert (out == 7).all()
