"""Random feature attention at the level of its features: out_n = phi(q_n)^T S_t / phi(q_n)^T z_t.

The exponents of positive and hyperbolic features, and |k~|^2 / 2 of trig ones, stay logarithms until a row's largest is
subtracted, which cancels in the ratio. Source: Peng et al., ICLR 2021; Choromanski et al., ICLR 2021.
"""

import numpy as np

from .feature_map import feature_map, feature_map_bwd
from .linear_attention import linear_attention, linear_attention_bwd
from .pairs import clear_masked


def feature_maps(q, k, features, projection, scale, dtype):
    """-> fq, fk and the keywords that tell linear_attention how to read them."""
    keywords = dict(projection=projection, features=features, scale=scale, dtype=dtype)
    if features == "trig":
        fk, log_factor = feature_map(k, return_log_factor=True, **keywords)
        return feature_map(q, **keywords), fk, dict(key_log_weight=log_factor)
    log = features in ("positive", "hyperbolic")
    return *(feature_map(x, log=log, **keywords) for x in (q, k)), dict(log_features=log)


def rfa_attention(
    q, k, v, *, features="positive", projection=None, scale=None, key_mask=None, is_causal=False, gate=None, state=None,
    return_state=False, dtype=np.float64,
):  # fmt: skip
    """q [B, H, N, D], k, v [B, Hkv, M, .], projection [F, D] or [Hkv, F, D] -> [B, H, N, E] (, state)."""
    fq, fk, reading = feature_maps(q, clear_masked(k, key_mask, dtype), features, projection, scale, dtype)
    keywords = dict(key_mask=key_mask, is_causal=is_causal, gate=gate, state=state, return_state=return_state)
    return linear_attention(fq, fk, v, **reading, **keywords, dtype=dtype)


def rfa_attention_bwd(
    dout, q, k, v, *, features="positive", projection=None, scale=None, key_mask=None, is_causal=False, gate=None,
    state=None, dtype=np.float64,
):  # fmt: skip
    """-> dq, dk, dv [, dprojection if there is one] [, dgate]."""
    k = clear_masked(k, key_mask, dtype)
    fq, fk, reading = feature_maps(q, k, features, projection, scale, dtype)
    keywords = dict(key_mask=key_mask, is_causal=is_causal, gate=gate, state=state)
    dfq, dfk, dv, *rest = linear_attention_bwd(dout, fq, fk, v, **reading, **keywords, dtype=dtype)
    back = dict(projection=projection, features=features, scale=scale, log=reading.get("log_features", False))
    if features == "elu":
        gradients = [feature_map_bwd(g, x, features="elu", dtype=dtype) for g, x in ((dfq, q), (dfk, k))]
        return *gradients, dv, *rest
    dlog_factor = rest.pop(0) if features == "trig" else None
    dq, from_q = feature_map_bwd(dfq, q, **back, dtype=dtype)
    dk, from_k = feature_map_bwd(dfk, k, **back, dlog_factor=dlog_factor, dtype=dtype)
    return dq, dk, dv, from_q + from_k, *rest
