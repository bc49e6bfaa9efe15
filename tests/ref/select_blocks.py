"""Grouped choice of columns: each group takes as many of its largest probabilities as its budget says.

rhe = round half to even of the exact rational, n = keys that the row sees, r(n) = max(1, rhe(k K / n)):

    code   query rhe(k K / n)   row_heads rhe(H k K / n)   head rhe(k K)             batch rhe(H k K)
    paper  query r(n)           row_heads H r(n)           head sum_{n > 0} r(n)     batch H times that

clamped to [1, candidates], 0 without candidates: all columns of rows with n > 0 (skip_dead: those of width > 0).
Source: Lee et al., ICLR 2024, section 3.2 and its code, in exact integers and with a total order (topk_select).
"""

import math

import numpy as np

from .block_map import start
from .patterns import Blocks, pack
from .topk_select import by_group, from_group, largest
from .visible_keys import visible_counts, visible_keys


def nearest_even(numerator, denominator):
    """The integer nearest to the quotient, the even one of two."""
    low, rest = divmod(numerator, denominator)
    return low + (2 * rest > denominator or (2 * rest == denominator and low % 2 == 1))


def group_budget(k, heads, num_columns, counts, group, budget):
    """Before the clamp; counts: n of the rows of the group (one row for query and row_heads)."""
    counts = [int(n) for n in counts if n > 0]
    times = heads if group in ("row_heads", "batch") else 1
    numerator, denominator = k.as_integer_ratio()
    if not counts:
        return 0
    if budget == "paper":
        return times * sum(max(1, nearest_even(numerator * num_columns, denominator * n)) for n in counts)
    if group in ("query", "row_heads"):
        denominator *= counts[0]
    return nearest_even(numerator * times * num_columns, denominator)


def select_blocks(
    probs, *, top_k=64, group="row_heads", num_keys=None, key_mask=None, query_mask=None, is_causal=False,
    budget="code", block_cap=None, skip_dead=False,
):  # fmt: skip
    """probs [B, H, N, K] -> Blocks."""
    batch, heads, seq_q, num_columns = probs.shape
    if num_keys is None:
        num_keys = seq_q if key_mask is None else np.shape(key_mask)[1]
    visible = visible_counts(key_mask, query_mask, batch, seq_q, num_keys, is_causal)
    widths = np.diff(start(np.arange(num_columns + 1), visible[..., None].astype(np.int64), num_columns), axis=-1)
    candidates = (visible[..., None] > 0) & (widths >= (1 if skip_dead else 0))
    candidates = by_group(np.broadcast_to(candidates[:, None], probs.shape), group)
    values, selected = by_group(np.asarray(probs), group), np.zeros(candidates.shape, bool)
    for row in np.ndindex(*values.shape[:-1]):
        rows = visible[row[0]] if group in ("head", "batch") else visible[row[0], row[-1:]]
        wanted = group_budget(top_k, heads, num_columns, rows, group, budget)
        count = min(max(wanted, 1), int(candidates[row].sum()))
        selected[row][largest(values[row], candidates[row], count)] = True
    cap = math.ceil(top_k) if block_cap is None else block_cap
    bits = pack(from_group(selected, group, probs.shape))
    sizes = dict(batch=batch, num_queries=seq_q, num_keys=num_keys)
    positions = None if key_mask is None else visible_keys(key_mask, **sizes)[1]
    return Blocks(bits, num_columns, visible, cap, positions, num_keys)
