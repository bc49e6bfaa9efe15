"""Attention by equal codes.

    out[b,h,i] = scale * sum_r sum_{j visible, codes_k[r,j] == codes_q[r,i]} v[b,h,j]

Source: Zeng et al., ICML 2021 (the sampled form; there scale = 1 / num_hashes). Heads are grouped, masks and the causal
order are ours.
"""

import numpy as np

from .pairs import clear_masked, repeat_heads, sum_groups, visible_pairs, weighted_sum


def equal_codes(codes_q, codes_k, r):
    return codes_q[:, :, r, :, None] == codes_k[:, :, r, None, :]


def bucket_attention(
    codes_q, codes_k, v, *, scale=1.0, key_mask=None, query_mask=None, is_causal=False, dtype=np.float64
):
    """codes_q [B, H, R, N], codes_k [B, Hkv, R, M], v [B, Hkv, M, E] -> [B, H, N, E]."""
    batch, heads, num_hashes, seq_q = codes_q.shape
    seen = visible_pairs(batch, seq_q, codes_k.shape[-1], key_mask, query_mask, is_causal)
    codes_k = repeat_heads(codes_k, heads)
    v = repeat_heads(clear_masked(v, key_mask, dtype), heads)
    out = np.zeros((batch, heads, seq_q, v.shape[-1]), dtype)
    for r in range(num_hashes):
        out += weighted_sum(equal_codes(codes_q, codes_k, r) & seen, v)
    return dtype(scale) * out


def bucket_attention_bwd(
    dout, codes_q, codes_k, *, scale=1.0, key_mask=None, query_mask=None, is_causal=False, dtype=np.float64
):
    """dv[b,g,j] = scale * sum_{h in group g} sum_r sum_{i sees j, code equal} dout[b,h,i] -> [B, Hkv, M, E]."""
    batch, heads, num_hashes, seq_q = codes_q.shape
    heads_kv, seq_k = codes_k.shape[1], codes_k.shape[-1]
    seen = visible_pairs(batch, seq_q, seq_k, key_mask, query_mask, is_causal)
    codes_k = repeat_heads(codes_k, heads)
    dout = clear_masked(dout, query_mask, dtype)
    dv = np.zeros((batch, heads, seq_k, dout.shape[-1]), dtype)
    for r in range(num_hashes):
        dv += weighted_sum((equal_codes(codes_q, codes_k, r) & seen).swapaxes(-1, -2), dout)
    return dtype(scale) * sum_groups(dv, heads_kv)
