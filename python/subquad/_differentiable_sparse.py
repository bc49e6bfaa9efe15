"""The table of differentiable functions, continued: sparse attention and SEA."""

from __future__ import annotations

from typing import Any

import subquad

from ._arrays import Call
from ._differentiable import _MASKS, _QKV, _with
from ._function import Extents, Function, Given
from .patterns import BlockPattern, CsrPattern, enter_pattern
from .sea import CAUSAL_WEIGHTS, WEIGHTS
from .sparse import cap_of

_PATTERN = {
    "indices": "B Hi N S | Z", "log_weights": "B Hi N S | Z", "indptr": "R", "bits": "B H N K8", "visible": "B N",
    "positions": "B M",
}  # fmt: skip
_WEIGHTS = dict.fromkeys((*WEIGHTS, *CAUSAL_WEIGHTS), "")
_STATE = {"s": "B H m V", "z": "B H m", "rows1": "B C 4 w", "rows2": "B C 4 w", "count": "B"}

# The arrays of a pattern and its other fields: the leaves and the structure of a tree of arrays.
PATTERN_FIELDS: dict[Any, tuple[list[str], list[str]]] = {
    CsrPattern: (["indptr", "indices", "log_weights"], ["shape"]),
    BlockPattern: (["bits", "visible", "positions"], ["K", "block_cap", "num_keys"]),
}


class _Unconverted(Call):
    """A call whose arrays stay as they are: the adapter converts them itself."""

    def __init__(self, op: str):
        self.op = op

    def keywords(self, keywords: dict[str, Any], *arrays: str) -> dict[str, Any]:
        return keywords


def flat_pattern(op: str, pattern: Any, q: Any, k: Any) -> Given:
    """A pattern of any form in the names of the table."""
    has_axes = getattr(q, "ndim", 0) == getattr(k, "ndim", 0) == 4
    parts = enter_pattern(_Unconverted(op), pattern, (*q.shape[:3], k.shape[2]) if has_axes else None)
    return {"columns": parts.pop("K"), **parts}


def _pattern_of(given: Given) -> Any:
    """Takes the parts of a pattern out of a call and puts them together again."""
    parts = {name: given.pop(name, None) for name in _PATTERN}
    columns, cap = given.pop("columns"), given.pop("block_cap")
    if parts["bits"] is not None:
        return BlockPattern(parts["bits"], columns, parts["visible"], cap, parts["positions"])
    if parts["indptr"] is not None:
        q, k = given["q"], given["k"]
        # Arrays of a wrong rank are the plain function's to refuse.
        shape = (*q.shape[:3], k.shape[2]) if q.ndim == k.ndim == 4 else (0, 0, 0, 0)
        return CsrPattern(parts["indptr"], parts["indices"], shape, parts["log_weights"])
    return parts["indices"] if parts["log_weights"] is None else (parts["indices"], parts["log_weights"])


def _sparse_attention(**given: Any) -> Any:
    pattern = _pattern_of(given)
    return subquad.sparse_attention(pattern=pattern, return_lse=True, **given)


def _sparse_attention_bwd(**given: Any) -> Any:
    pattern = _pattern_of(given)
    return subquad.sparse_attention_bwd(pattern=pattern, **given)


def _sea_attention(**given: Any) -> Any:
    out, lse, pattern = subquad.sea_attention(return_lse=True, return_pattern=True, **given)
    # Not a view: results of a torch operator must not share memory.
    positions = pattern.visible[:, :0] + 0 if pattern.positions is None else pattern.positions
    return out, lse, pattern.bits, pattern.visible, positions


def sea_results(results: Any, given: Given, return_lse: bool, return_pattern: bool) -> Any:
    """What sea_attention returns, from all results of a call."""
    out, lse, bits, visible, positions = results
    shown: list[Any] = [out, lse] if return_lse else [out]
    if return_pattern:
        columns, num_keys = given["probs"].shape[3], given["k"].shape[2]
        positions = None if given["key_mask"] is None else positions
        cap = cap_of(given["block_cap"], given["top_k"])
        shown.append(BlockPattern(bits, columns, visible, cap, positions, num_keys))
    return shown[0] if len(shown) == 1 else tuple(shown)


def _sea_extents(extents: Extents, given: Given) -> Extents:
    return {"K8": (extents["K"] + 7) // 8, "M'": 0 if given.get("key_mask") is None else extents["M"]}


def _divergence_bwd(*, dsse: Any = None, **given: Any) -> Any:
    return subquad.attention_divergence_bwd(dsse=dsse, **given)


def _expand_values_bwd(*, dout: Any, x: Any, num_keys: int, **given: Any) -> Any:
    return subquad.block_sum(dout, x.shape[3], **given)


def _block_sum_bwd(*, dout: Any, y: Any, num_columns: int, **given: Any) -> Any:
    return subquad.expand_values(dout, y.shape[3], **given)


def _sea_estimate(**given: Any) -> Any:
    weights = {name: given.pop(name, None) for name in _WEIGHTS}
    return subquad.sea_estimate(weights={n: x for n, x in weights.items() if x is not None}, **given)


def _estimate_extents(extents: Extents, given: Given) -> Extents:
    """K from what every kind of decoder has; arrays of a wrong rank are the plain function's to refuse."""
    columns = given.get("norm_weight" if given["is_causal"] else "row_bias")
    count = columns.shape[0] if columns is not None and columns.ndim else 0
    count = count if given["is_causal"] else count // 2
    features = 0 if given.get("projection") is None else given["projection"].shape[0]
    return {"K": count, "m": features, "V": 2 * extents["D"], "C": 2 * extents["H"], "w": count // 4}


SPARSE_ATTENTION = Function(
    name="sparse_attention",
    arrays=_QKV,
    cast=tuple(_QKV),
    optional={"row_scale": "B H N"},
    constants=_PATTERN,
    products=("indptr",),
    fills={"indices": -1},
    results={"out": "B H N E", "lse": "B H N"},
    differentiable=("out", "lse"),
    forward=_sparse_attention,
    backward=_sparse_attention_bwd,
)

SEA_ATTENTION = Function(
    name="sea_attention",
    arrays={"q": "B H N D", "k": "B H M D", "v": "B H M E", "probs": "B H N K"},
    cast=("q", "k", "v", "context"),
    optional={"row_scale": "B H N", "mix": "B H N", "context": "B H 1 E | B H N E"},
    constants=_MASKS,
    results={"out": "B H N E", "lse": "B H N", "bits": "B H N K8", "visible": "B N", "positions": "B M'"},
    dtypes={"bits": "uint8", "visible": "int32", "positions": "int32"},
    extents=_sea_extents,
    differentiable=("out", "lse"),
    forward=_sea_attention,
    backward=subquad.sea_attention_bwd,
)

RUNNING_MEAN = Function(
    name="running_mean",
    arrays={"v": "B H M E"},
    constants={"key_mask": "B M"},
    extents=lambda extents, given: {"N": extents["M"]},
    sizes={"num_queries": "N"},
    forward=subquad.running_mean,
    backward=subquad.running_mean_bwd,
)

RUNNING_MEAN_STATE = Function(
    name="running_mean_state",
    arrays=RUNNING_MEAN.arrays,
    constants=RUNNING_MEAN.constants | {"state_sum": "B H E", "state_count": "B"},
    groups={"state": ("state_sum", "state_count")},
    results=RUNNING_MEAN.results | {"new_sum": "B H E", "new_count": "B"},
    dtypes={"new_count": "int32"},
    extents=RUNNING_MEAN.extents,
    sizes=RUNNING_MEAN.sizes,
    forward=_with(subquad.running_mean, return_state=True),
)

BLOCK_POOL = Function(
    name="block_pool",
    arrays={"v": "B H M E", "probs": "B H N K"},
    constants=_MASKS,
    results={"out": "B H 1 E"},
    forward=subquad.block_pool,
    backward=subquad.block_pool_bwd,
)

EXPAND_VALUES = Function(
    name="expand_values",
    arrays={"x": "B H N K"},
    constants=_MASKS,
    results={"out": "B H N M"},
    sizes={"num_keys": "M"},
    takes_out=False,
    forward=subquad.expand_values,
    backward=_expand_values_bwd,
)

BLOCK_SUM = Function(
    name="block_sum",
    arrays={"y": "B H N M"},
    constants=_MASKS,
    results={"out": "B H N K"},
    sizes={"num_columns": "K"},
    takes_out=False,
    forward=subquad.block_sum,
    backward=_block_sum_bwd,
)

ATTENTION_DIVERGENCE = Function(
    name="attention_divergence",
    arrays={"q": "B H N D", "k": "B Hkv M D"},
    cast=("q", "k", "q_teacher", "k_teacher"),
    constants={"q_teacher": "B H N Dt", "k_teacher": "B Ht M Dt"} | _MASKS,
    results={"kl": "B H N", "sse": "B H N"},
    differentiable=("kl", "sse"),
    takes_out=False,
    forward=subquad.attention_divergence,
    backward=_divergence_bwd,
)

TEACHER_BLOCKS = Function(
    name="teacher_blocks",
    arrays={"q": "B H N D", "k": "B Hkv M D"},
    cast=("q", "k"),
    constants=_MASKS,
    results={"masses": "B H N K", "sum_squares": "B H N", "sum_plogp": "B H N"},
    sizes={"num_columns": "K"},
    differentiable=(),
    takes_out=False,
    forward=subquad.teacher_blocks,
)

SEA_ESTIMATE = Function(
    name="sea_estimate",
    arrays={"q": "B H N D", "k": "B H N D", "v": "B H N D"},
    constants=_WEIGHTS | {"key_mask": "B N"},
    results={"probs": "B H N K", "row_scale": "B H N", "mix": "B H N"},
    extents=_estimate_extents,
    differentiable=("probs", "row_scale", "mix"),
    takes_out=False,
    forward=_sea_estimate,
    no_gradient="stop it there (detach, stop_gradient); subquad.torch.SeaAttention trains the weights",
)

SEA_ESTIMATE_STATE = Function(
    name="sea_estimate_state",
    arrays=SEA_ESTIMATE.arrays,
    constants=SEA_ESTIMATE.constants | {f"state_{name}": axes for name, axes in _STATE.items()},
    groups={"state": tuple(f"state_{name}" for name in _STATE)},
    results=SEA_ESTIMATE.results | {f"new_{name}": axes for name, axes in _STATE.items()},
    dtypes={"new_count": "int32"},
    extents=_estimate_extents,
    differentiable=("probs", "row_scale", "mix"),
    takes_out=False,
    forward=_with(_sea_estimate, return_state=True),
    no_gradient=SEA_ESTIMATE.no_gradient,
)
