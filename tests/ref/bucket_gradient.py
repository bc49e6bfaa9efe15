"""The gradient of collision attention with respect to q and k, from a sample of the pairs that share a bucket.

With g = dout, w_ij = <g_i, v_j> and a sampled weight W_ij:

    lower_bound:  dqhat_i = (tau / 2) sum_j W_ij w_ij khat_j,   W_ij = (1/R) sum_r [sampled, Hamming distance 0] weight
    exact:        dqhat_i = sum_j W_ij w_ij (tau / pi) t_ij,    W_ij = lower_bound's
                            + (1/(R tau)) sum_r [sampled, Hamming distance 1] weight
    dq_i = (dqhat_i - qhat_i <qhat_i, dqhat_i>) / ||q_i||

and the same for dk with the roles exchanged. Row i of hash r takes at most `num_samples` of its n candidates, in the
order of the buckets: all with weight 1 if n <= S = num_samples, else those at (start + (t n) div S) mod n for t < S,
with weight n / S. A uniform start makes every candidate equally likely, hence the estimate unbiased.

Source: Zeng et al., ICML 2021 for the lower bound. The exact rule is ours: equal codes have probability u^tau and one
differing bit tau u^(tau-1) (1 - u), so W_ij estimates u^tau + u^(tau-1) (1 - u) = u^(tau-1).
"""

import numpy as np

from .collision_attention import cosines, tangent_sum
from .l2_normalize import l2_normalize, l2_normalize_bwd
from .pairs import clear_masked, repeat_heads, sum_groups, visible_pairs, weighted_sum
from .philox import PAIR_STREAM, words_at

NO_CANDIDATE = 255
KEY_HEADS = 2**31  # first counter of the heads when the targets are keys
FLIP_DRAWS = 4 * 2**30  # first draw of the buckets one bit away; a counter holds four draws


def sample(group, words, num_samples):
    """group [B, H, T, C]: the candidate's place in the order (ties by index), NO_CANDIDATE if it is none.

    words [H, T] -> weights [B, H, T, C].
    """
    weights = np.zeros(group.shape)
    if group.shape[-1] == 0:
        return weights
    order = np.argsort(group, axis=-1, kind="stable")
    n = (group != NO_CANDIDATE).sum(axis=-1, keepdims=True)
    start = (words[..., None].astype(np.int64) * n) >> 32
    t = np.arange(num_samples)
    crowded = n > num_samples
    index = np.where(crowded, (start + t * n // num_samples) % np.maximum(n, 1), t)
    taken = t < n
    columns = np.take_along_axis(order, np.minimum(index, group.shape[-1] - 1), axis=-1)
    batch, head, row, _ = np.nonzero(taken)
    weight = np.where(crowded, n / num_samples, 1)[batch, head, row, 0]
    weights[batch, head, row, columns[taken]] = weight
    return weights


def pair_weights(codes_t, codes_c, seen, first_head, hash_bits, rule, num_samples, seed):
    """Targets codes_t [B, H, R, T], candidates codes_c [B, H, R, C], seen [B, 1, T, C] -> W [B, H, T, C]."""
    batch, heads, num_hashes, targets = codes_t.shape
    head, row = first_head + np.arange(heads)[:, None], np.arange(targets)
    weights = np.zeros((batch, heads, targets, codes_c.shape[-1]))
    for r in range(num_hashes):
        differing = codes_t[:, :, r, :, None].astype(np.int64) ^ codes_c[:, :, r, None, :].astype(np.int64)
        equal = np.where(seen & (differing == 0), 0, NO_CANDIDATE).astype(np.uint8)
        weights += sample(equal, words_at(head, row, r, seed, PAIR_STREAM), num_samples) / num_hashes
        if rule == "exact":
            flipped = np.full_like(equal, NO_CANDIDATE)
            for bit in range(hash_bits):
                flipped[seen & (differing == 1 << bit)] = bit
            words = words_at(head, row, FLIP_DRAWS + r, seed, PAIR_STREAM)
            weights += sample(flipped, words, num_samples) / (num_hashes * hash_bits)
    return weights


def bucket_gradient(
    dout, q, k, v, codes_q, codes_k, hash_bits, *, rule, num_samples, seed,
    key_mask=None, query_mask=None, is_causal=False, dtype=np.float64,
):  # fmt: skip
    """-> dq [B, H, N, D], dk [B, Hkv, M, D] of the raw q and k. rule: "lower_bound" | "exact"."""
    assert rule in ("lower_bound", "exact")
    heads, heads_kv, tau = q.shape[1], k.shape[1], dtype(hash_bits)
    seen = visible_pairs(q.shape[0], q.shape[2], k.shape[2], key_mask, query_mask, is_causal)
    qhat, q_lse = l2_normalize(clear_masked(q, query_mask, dtype), dtype)
    khat, k_lse = l2_normalize(clear_masked(k, key_mask, dtype), dtype)
    khat_h, v_h = repeat_heads(khat, heads), repeat_heads(clear_masked(v, key_mask, dtype), heads)
    w = np.where(seen, clear_masked(dout, query_mask, dtype) @ v_h.swapaxes(-1, -2), dtype(0))

    codes_h, seen_t, w_t = repeat_heads(codes_k, heads), seen.swapaxes(-1, -2), w.swapaxes(-1, -2)
    weights_q = pair_weights(codes_q, codes_h, seen, 0, hash_bits, rule, num_samples, seed).astype(dtype)
    weights_k = pair_weights(codes_h, codes_q, seen_t, KEY_HEADS, hash_bits, rule, num_samples, seed).astype(dtype)
    if rule == "lower_bound":
        dqhat = weighted_sum(weights_q * w * (tau / 2), khat_h)
        dkhat = weighted_sum(weights_k * w_t * (tau / 2), qhat)
    else:
        x = cosines(qhat, khat_h, seen)
        dqhat = tangent_sum(weights_q * w * (tau / dtype(np.pi)), x, qhat, khat_h)
        dkhat = tangent_sum(weights_k * w_t * (tau / dtype(np.pi)), x.swapaxes(-1, -2), khat_h, qhat)
    dq = l2_normalize_bwd(dqhat, qhat, q_lse, dtype)
    dk = l2_normalize_bwd(sum_groups(dkhat, heads_kv), khat, k_lse, dtype)
    return dq, dk
