"""The table of differentiable functions: what every adapter with automatic differentiation has to know of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import subquad

from ._function import Extents, Function, Given

_QKV = {"q": "B H N D", "k": "B Hkv M D", "v": "B Hkv M E"}
_KEY_MASK = {"key_mask": "B M"}
_MASKS = {"key_mask": "B M", "query_mask": "B N"}
_FEATURES = {"positive": 1, "trig": 2, "hyperbolic": 2, "relu": 1}
_STATE = {"state_s": "B Hkv F' E", "state_z": "B Hkv F'", "state_shift": "B Hkv F'"}
_OUT_LSE = {"out": "B H N E", "lse": "B H N"}
_NEW_STATE = {"new_s": "B Hkv F' E", "new_z": "B Hkv F'", "new_shift": "B Hkv F'"}


def _yoso_attention(**given: Any) -> Any:
    return subquad.yoso_attention(**given, return_lse=given["normalize"])


def _collision_attention(*, grad: str, **given: Any) -> Any:
    """`grad` concerns the backward pass alone, but a wrong one is an error at once."""
    if grad not in ("exact", "lower_bound"):
        raise ValueError(f'[collision_attention] grad: expected "exact" or "lower_bound", got {grad!r}')
    return subquad.collision_attention(**given)


def _with_window(f: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    def call(*, window: Any = None, **given: Any) -> Any:
        return f(**given, window=None if window is None else tuple(window), **more)

    return call


def _segment_mean_bwd(*, x: Any, **given: Any) -> Any:
    return subquad.segment_mean_bwd(seq=x.shape[2], **given)


def _num_segments(extents: Extents, given: Given) -> Extents:
    size = given.get("segment_size")
    return {"C": given.get("num_segments") if not size else (extents["N"] + size - 1) // size}


def _is_trig(given: Given) -> bool:
    return given["features"] == "trig"


def _feature_map(**given: Any) -> Any:
    return subquad.feature_map(**given, return_log_factor=_is_trig(given))


def _num_features(extents: Extents, given: Given) -> Extents:
    rows = extents["F"] if given.get("projection") is not None else given.get("num_features", 0)
    features = given["features"]
    return {"F'": extents["D"] if features == "elu" else rows * _FEATURES.get(features, 1)}


def _linear_absent(given: Given) -> tuple[str, ...]:
    return () if given["log_features"] or given.get("key_log_weight") is not None else ("new_shift",)


def _with(f: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    return lambda **given: f(**given, **more)


def _rfa_has_lse(given: Given) -> bool:
    return given["features"] in ("positive", "hyperbolic") and not given["is_causal"]


def _rfa_attention(**given: Any) -> Any:
    return subquad.rfa_attention(**given, return_lse=_rfa_has_lse(given))


YOSO_ATTENTION = Function(
    name="yoso_attention",
    arrays=_QKV,
    cast=tuple(_QKV),
    constants=_MASKS | {"planes": "", "signs": ""},
    results=_OUT_LSE,
    absent=lambda given: () if given["normalize"] else ("lse",),
    last_needs=("normalize=True", ("normalize",)),
    saved=("out", "lse"),
    forward=_yoso_attention,
    backward=subquad.yoso_attention_bwd,
)

COLLISION_ATTENTION = Function(
    name="collision_attention",
    arrays=_QKV,
    cast=tuple(_QKV),
    constants=_MASKS,
    forward=_collision_attention,
    backward=subquad.collision_attention_bwd,
)

SOFTMAX_ATTENTION = Function(
    name="softmax_attention",
    arrays=_QKV,
    cast=tuple(_QKV),
    optional={"key_bias": "B Hbias M"},
    constants=_KEY_MASK,
    results=_OUT_LSE,
    differentiable=("out", "lse"),
    saved=("out", "lse"),
    forward=_with_window(subquad.softmax_attention, return_lse=True),
    backward=_with_window(subquad.softmax_attention_bwd),
)

MERGE_STATES = Function(
    name="merge_states",
    arrays={"out1": "B H N E", "lse1": "B H N", "out2": "B H N E", "lse2": "B H N"},
    results=_OUT_LSE,
    differentiable=("out", "lse"),
    takes_out=False,
    forward=subquad.merge_states,
    backward=subquad.merge_states_bwd,
)

SEGMENT_MEAN = Function(
    name="segment_mean",
    arrays={"x": "B H N D"},
    constants={"mask": "B N", "paired_mask": "B N2"},
    results={"out": "B H C D", "counts": "B C"},
    dtypes={"counts": "int32"},
    extents=_num_segments,
    forward=_with(subquad.segment_mean, return_counts=True),
    backward=_segment_mean_bwd,
)

FEATURE_MAP = Function(
    name="feature_map",
    arrays={"x": "B H N D"},
    optional={"projection": "F D | Hp F D"},
    constants={"mask": "B N"},
    dtypes={"out": lambda given: "float32" if given["log"] else "x"},
    results={"out": "B H N F'", "log_factor": "B H N"},
    extents=_num_features,
    absent=lambda given: () if _is_trig(given) else ("log_factor",),
    last_needs=("features='trig'", ("features",)),
    differentiable=("out", "log_factor"),
    forward=_feature_map,
    backward=subquad.feature_map_bwd,
)

LINEAR_ATTENTION = Function(
    name="linear_attention",
    arrays={"fq": "B H N F'", "fk": "B Hkv M F'", "v": "B Hkv M E"},
    optional={"key_log_weight": "B Hkv M", "gate": "B Hkv M", "decay": "Hkv | B Hkv M"},
    constants=_KEY_MASK,
    dtypes={"out": "v"},
    forward=subquad.linear_attention,
    backward=subquad.linear_attention_bwd,
)

LINEAR_ATTENTION_STATE = Function(
    name="linear_attention_state",
    arrays=LINEAR_ATTENTION.arrays,
    constants=LINEAR_ATTENTION.constants | LINEAR_ATTENTION.optional | _STATE,
    groups={"state": tuple(_STATE)},
    results={"out": "B H N E", **_NEW_STATE},
    absent=_linear_absent,
    dtypes={"out": "v"},
    forward=_with(subquad.linear_attention, return_state=True),
)

RFA_ATTENTION = Function(
    name="rfa_attention",
    arrays=_QKV,
    cast=tuple(_QKV),
    optional={"projection": "F D | Hkv F D", "gate": "B Hkv M"},
    constants=_KEY_MASK,
    results=_OUT_LSE,
    absent=lambda given: () if _rfa_has_lse(given) else ("lse",),
    last_needs=("features='positive' or 'hyperbolic' and is_causal=False", ("features", "is_causal")),
    saved=("out", "lse"),
    forward=_rfa_attention,
    backward=subquad.rfa_attention_bwd,
)

RFA_ATTENTION_STATE = Function(
    name="rfa_attention_state",
    arrays=_QKV,
    cast=tuple(_QKV),
    constants=_KEY_MASK | RFA_ATTENTION.optional | _STATE,
    groups={"state": tuple(_STATE)},
    results={"out": "B H N E", **_NEW_STATE},
    extents=_num_features,
    absent=lambda given: ("new_shift",) if given["features"] in ("relu", "elu") else (),
    forward=_with(subquad.rfa_attention, return_state=True),
)

RANDOMIZED_ATTENTION = Function(
    name="randomized_attention",
    arrays=_QKV,
    cast=tuple(_QKV),
    constants={"indices": "B H S N", "noise": "B H S N D"} | _KEY_MASK,
    forward=subquad.randomized_attention,
    backward=subquad.randomized_attention_bwd,
)

LARA_ATTENTION = Function(
    name="lara_attention",
    arrays=_QKV,
    cast=tuple(_QKV),
    optional={"q_bar": "B H C D", "k_bar": "B Hkv C D"},
    constants={"noise": "B H J D"} | _MASKS,
    groups={"landmarks": ("q_bar", "k_bar")},
    lengths=("noise",),
    results=_OUT_LSE,
    saved=("out", "lse"),
    forward=_with(subquad.lara_attention, return_lse=True),
    backward=subquad.lara_attention_bwd,
)

EVA_ATTENTION = Function(
    name="eva_attention",
    arrays=_QKV,
    cast=tuple(_QKV),
    optional={"k_bar": "B Hkv C D", "mu": "B Hkv C D"},
    constants={"noise": "B Hkv C D"} | _KEY_MASK,
    groups={"landmarks": ("k_bar", "mu")},
    lengths=("k_bar", "noise"),
    results=_OUT_LSE,
    saved=("out", "lse"),
    forward=_with(subquad.eva_attention, return_lse=True),
    backward=subquad.eva_attention_bwd,
)


def _eva_state_extents(extents: Extents, given: Given) -> Extents:
    """Tokens behind the last multiple of the longer of window and chunk, and the chunks before it."""
    known = given.get("k_tail") is not None
    tokens = extents["M"] + (extents["T"] if known else 0)
    tail = tokens % max(given["window"], given["chunk_size"])
    return {"T'": tail, "C'": (extents["P"] if known else 0) + (tokens - tail) // given["chunk_size"]}


def _eva_absent(given: Given) -> tuple[str, ...]:
    masked = given.get("key_mask") is not None or given.get("mask_tail") is not None
    return () if masked else ("new_mask_tail",)


_EVA_STATE = {
    "k_tail": "B Hkv T D", "v_tail": "B Hkv T E", "mask_tail": "B T",
    "past_k_bar": "B Hkv P D", "past_beta": "B Hkv P E", "past_log_mass": "B P",
}  # fmt: skip

EVA_ATTENTION_STATE = Function(
    name="eva_attention_state",
    arrays=_QKV,
    cast=tuple(_QKV),
    constants=EVA_ATTENTION.constants | EVA_ATTENTION.optional | _EVA_STATE,
    groups=EVA_ATTENTION.groups | {"state": tuple(_EVA_STATE)},
    lengths=EVA_ATTENTION.lengths,
    results=_OUT_LSE | {f"new_{name}": axes.replace("T", "T'").replace("P", "C'") for name, axes in _EVA_STATE.items()},
    dtypes={"new_k_tail": "k", "new_v_tail": "v", "new_mask_tail": "bool"},
    absent=_eva_absent,
    extents=_eva_state_extents,
    forward=_with(subquad.eva_attention, return_lse=True, return_state=True),
)
