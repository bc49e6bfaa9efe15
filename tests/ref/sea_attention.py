"""SEA: softmax attention over the blocks that an estimate selects, mixed with a context that costs nothing.

    out_n = mix_n row_scale_n sum_e p_e v_e + (1 - mix_n) context_n

Entries e by select_blocks(probs); context: running_mean (causal) or block_pool, unless given. No gradient through the
selection. A masked query gives 0. Source: Lee et al., ICLR 2024, sections 3.2 and 3.3.
"""

import numpy as np

from .block_pool import block_pool, block_pool_bwd
from .pairs import clear_masked
from .running_mean import running_mean, running_mean_bwd
from .select_blocks import select_blocks
from .sparse_attention import sparse_attention, sparse_attention_bwd


def select(probs, k, top_k, group, key_mask, query_mask, is_causal, budget, block_cap):
    return select_blocks(
        probs, top_k=top_k, group=group, num_keys=k.shape[2], key_mask=key_mask, query_mask=query_mask,
        is_causal=is_causal, budget=budget, block_cap=block_cap,
    )  # fmt: skip


def default_context(q, v, probs, key_mask, query_mask, is_causal, dtype):
    if is_causal:
        return running_mean(v, num_queries=q.shape[2], key_mask=key_mask, dtype=dtype)
    return block_pool(v, probs, key_mask=key_mask, query_mask=query_mask, dtype=dtype)


def sea_attention(
    q, k, v, probs, *, top_k=64, group="row_heads", scale=None, row_scale=None, mix=None, context=None, key_mask=None,
    query_mask=None, is_causal=False, budget="code", block_cap=None, return_lse=False, return_pattern=False,
    dtype=np.float64,
):  # fmt: skip
    """q [B, H, N, D], k [B, H, M, D], v [B, H, M, E], probs [B, H, N, K] -> out [, lse] [, Blocks]."""
    blocks = select(probs, k, top_k, group, key_mask, query_mask, is_causal, budget, block_cap)
    out, lse = sparse_attention(
        q, k, v, blocks, scale=scale, row_scale=clean(row_scale, query_mask), return_lse=True, dtype=dtype
    )
    if mix is not None:
        m = np.asarray(clean(mix, query_mask)).astype(dtype)[..., None]
        if context is None:
            context = default_context(q, v, probs, key_mask, query_mask, is_causal, dtype)
        context = np.asarray(context).astype(dtype)
        out = clear_masked(m * out + (dtype(1) - m) * context, query_mask, dtype)
    results = [out] + [lse] * return_lse + [blocks] * return_pattern
    return tuple(results) if len(results) > 1 else out


def clean(rows, query_mask):
    """[B, H, N] with 0 for the masked queries."""
    if rows is None or query_mask is None:
        return rows
    return np.where(np.asarray(query_mask, bool)[:, None], rows, 0)


def sea_attention_bwd(
    dout, q, k, v, probs, *, top_k=64, group="row_heads", scale=None, row_scale=None, mix=None, context=None,
    key_mask=None, query_mask=None, is_causal=False, budget="code", block_cap=None, dlse=None,
    out=None, lse=None, dtype=np.float64,
):  # fmt: skip
    """-> dq, dk, dv, dprobs [, drow_scale] [, dmix] [, dcontext].

    dmix_n = <dout_n, C_n - context_n>, C the sparse part with its row_scale; dcontext_n = (1 - mix_n) dout_n.
    """
    blocks = select(probs, k, top_k, group, key_mask, query_mask, is_causal, budget, block_cap)
    dout, scales = clear_masked(dout, query_mask, dtype), clean(row_scale, query_mask)
    keywords = dict(scale=scale, row_scale=scales, dtype=dtype)
    dprobs = np.zeros(probs.shape, dtype)
    if mix is None:
        dq, dk, dv, *more = sparse_attention_bwd(dout, q, k, v, blocks, dlse=dlse, **keywords)
        return dq, dk, dv, dprobs, *more
    m = np.asarray(clean(mix, query_mask)).astype(dtype)[..., None]
    sparse = sparse_attention(q, k, v, blocks, **keywords)
    dq, dk, dv, *more = sparse_attention_bwd(m * dout, q, k, v, blocks, dlse=dlse, **keywords)
    given = context is not None
    if not given:
        context = default_context(q, v, probs, key_mask, query_mask, is_causal, dtype)
    context = clear_masked(context, query_mask if np.shape(context)[2] == q.shape[2] else None, dtype)
    dmix, dcontext = (dout * (sparse - context)).sum(axis=-1), (dtype(1) - m) * dout
    if np.shape(context)[2] == 1 and q.shape[2] != 1:
        dcontext = dcontext.sum(axis=2, keepdims=True)
    if given:
        return dq, dk, dv, dprobs, *more, dmix, dcontext
    if is_causal:
        extra = running_mean_bwd(dcontext, v, num_queries=q.shape[2], key_mask=key_mask, dtype=dtype)
    else:
        extra, dprobs = block_pool_bwd(dcontext, v, probs, key_mask=key_mask, query_mask=query_mask, dtype=dtype)
    return dq, dk, dv + extra, dprobs, *more, dmix
