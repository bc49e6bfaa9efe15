"""What checks the references: pairs one by one, numbers one by one, differences, scores."""

import math

import numpy as np


def problem(seed=0, batch=2, heads=4, heads_kv=2, seq_q=5, seq_k=7, dim=3, dim_v=4, masked=False, causal=False):
    """q, k, v, dout and the visibility keywords. Masked tokens hold NaN; some query sees no key."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(batch, heads, seq_q, dim)), rng.normal(size=(batch, heads_kv, seq_k, dim))
    v, dout = rng.normal(size=(batch, heads_kv, seq_k, dim_v)), rng.normal(size=(batch, heads, seq_q, dim_v))
    visibility = dict(is_causal=causal)
    if masked:
        key_mask, query_mask = rng.random((batch, seq_k)) < 0.6, rng.random((batch, seq_q)) < 0.6
        key_mask[0, : seq_k // 2 + 1], key_mask[1, 0], query_mask[0, 0] = False, False, True
        for x, mask in ((q, query_mask), (dout, query_mask), (k, key_mask), (v, key_mask)):
            x[np.broadcast_to(~mask[:, None], x.shape[:3])] = np.nan
        visibility.update(key_mask=key_mask, query_mask=query_mask)
    return q, k, v, dout, visibility


def sees(b, i, j, seq_q, seq_k, key_mask=None, query_mask=None, is_causal=False):
    kept = (key_mask is None or key_mask[b, j]) and (query_mask is None or query_mask[b, i])
    return kept and (not is_causal or j <= i + seq_k - seq_q)


def visible(q, k, visibility):
    """(b, query head, key head, i, j) of every pair that counts."""
    (batch, heads, seq_q), (heads_kv, seq_k) = q.shape[:3], k.shape[1:3]
    for b, h, i, j in np.ndindex(batch, heads, seq_q, seq_k):
        if sees(b, i, j, seq_q, seq_k, **visibility):
            yield b, h, h // (heads // heads_kv), i, j


def unit(x):
    return x / (np.linalg.norm(x) or 1)


def differences(f, x, step=1e-6):
    """The gradient of the scalar f() with respect to the array x that it reads, by central differences."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        value = x[index]
        x[index] = value + step
        above = f()
        x[index] = value - step
        gradient[index] = (above - f()) / (2 * step)
        x[index] = value
    return gradient


def z_scores(samples, expected):
    """samples [T, ...] -> (mean - expected) / standard error, 0 where nothing varies and the mean is right."""
    error = samples.std(axis=0, ddof=1) / math.sqrt(len(samples)) + 1e-12
    return (samples.mean(axis=0) - expected) / error


def scalar_philox(counter, key):
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def pairs_at(cosine, count, dim=64):
    a, b = np.random.default_rng(4).normal(size=(2, 1, count, dim))
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    b -= a * (a * b).sum(-1, keepdims=True)
    b /= np.linalg.norm(b, axis=-1, keepdims=True)
    return np.stack([a, cosine * a + math.sqrt(1 - cosine**2) * b], axis=2)  # [1, count, 2, dim]: a pair a head


def sampled_pairs(codes_t, codes_c, candidates, head, target, hash_bits, rule, num_samples, seed):
    """(candidate, weight) of one target: codes_t [R], codes_c [R, C]; `candidates` lists the visible ones in order."""
    num_hashes, key = len(codes_t), (seed % 2**32, seed >> 32)
    for r in range(num_hashes):
        code = int(codes_t[r])
        pools = [([c for c in candidates if codes_c[r, c] == code], 0, num_hashes)]
        if rule == "exact":
            flips = [[c for c in candidates if codes_c[r, c] == code ^ 1 << bit] for bit in range(hash_bits)]
            pools.append((sum(flips, []), 2**30, num_hashes * hash_bits))
        for pool, draw, divisor in pools:
            n, s = len(pool), num_samples
            start = scalar_philox((target, r // 4 + draw, head, 3), key)[r % 4] * n >> 32
            for t in range(min(n, s)):
                yield (pool[t], 1 / divisor) if n <= s else (pool[(start + t * n // s) % n], n / s / divisor)


def bucket_gradient_loops(dout, q, k, v, codes_q, codes_k, draws, visibility):
    """-> dqhat, dkhat, the sums before the normalisation. draws = (hash_bits, rule, num_samples, seed)."""
    tau, rule = draws[:2]
    dqhat, dkhat, pairs = np.zeros(q.shape), np.zeros(k.shape), list(visible(q, k, visibility))

    def term(weight, pair, row, column):
        b, h, g, i, j = pair
        x, factor = row @ column, weight * (dout[b, h, i] @ v[b, g, j])
        if rule == "lower_bound":
            return factor * tau / 2 * column
        return factor * tau / math.pi * (column - x * row) / math.sqrt(1 - x * x)

    for b, h in np.ndindex(q.shape[:2]):
        g = h * k.shape[1] // q.shape[1]
        mine = [pair[3:] for pair in pairs if pair[:2] == (b, h)]
        sides = codes_q[b, h], codes_k[b, g]
        for i in range(q.shape[2]):
            keys = [jj for ii, jj in mine if ii == i]
            for j, weight in sampled_pairs(sides[0][:, i], sides[1], keys, h, i, *draws):
                dqhat[b, h, i] += term(weight, (b, h, g, i, j), unit(q[b, h, i]), unit(k[b, g, j]))
        for j in range(k.shape[2]):
            queries = [ii for ii, jj in mine if jj == j]
            for i, weight in sampled_pairs(sides[1][:, j], sides[0], queries, 2**31 + h, j, *draws):
                dkhat[b, g, j] += term(weight, (b, h, g, i, j), unit(k[b, g, j]), unit(q[b, h, i]))
    return dqhat, dkhat


def collision_attention_loops(dout, q, k, v, tau, visibility):
    """-> out, and the lower bound's dqhat, dkhat (before the normalisation) and dv."""
    out, dqhat, dkhat, dv = (np.zeros(x.shape) for x in (dout, q, k, v))
    for b, h, g, i, j in visible(q, k, visibility):
        qhat, khat = unit(q[b, h, i]), unit(k[b, g, j])
        p, w = (1 - math.acos(qhat @ khat) / math.pi) ** tau, dout[b, h, i] @ v[b, g, j]
        out[b, h, i] += p * v[b, g, j]
        dv[b, g, j] += p * dout[b, h, i]
        dqhat[b, h, i] += w * p * tau / 2 * khat
        dkhat[b, g, j] += w * p * tau / 2 * qhat
    return out, dqhat, dkhat, dv
