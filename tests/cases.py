"""One table of shapes, dtypes and seeds for all tests, and the arrays that go with them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """Sizes of one attention call in the letters of the API, and the keywords that every attention takes."""

    name: str
    batch: int = 2
    heads: int = 2
    heads_kv: int = 2
    seq_q: int = 20
    seq_k: int = 20
    dim: int = 16
    dim_v: int = 16
    causal: bool = False
    masked: bool = False

    def __str__(self):
        return self.name


CASES = [
    Case("plain"),
    Case("tails", seq_q=37, seq_k=51, dim=33, dim_v=17),
    Case("one_token", seq_q=1, seq_k=1),
    Case("one_query", seq_q=1, seq_k=40),
    Case("one_key", seq_q=40, seq_k=1),
    Case("dims_of_one", dim=1, dim_v=1),
    Case("dims_3_7", dim=3, dim_v=7),
    Case("dims_8_9", dim=8, dim_v=9),
    Case("dims_15_31", dim=15, dim_v=31),
    Case("dims_65_33", dim=65, dim_v=33),
    Case("wide", batch=1, heads=1, heads_kv=1, dim=200, dim_v=130),
    Case("grouped", heads=6, heads_kv=2, seq_q=33, seq_k=19),
    Case("one_kv_head", heads=3, heads_kv=1),
    Case("masked", masked=True, seq_q=40, seq_k=33),
    Case("masked_grouped", masked=True, heads=4, heads_kv=2),
    Case("causal", causal=True, seq_q=40, seq_k=40),
    Case("causal_decode", causal=True, seq_q=5, seq_k=40),
    Case("causal_blind_rows", causal=True, seq_q=40, seq_k=23),
    Case("causal_masked_grouped", causal=True, masked=True, heads=4, heads_kv=2, seq_q=31, seq_k=47),
    Case("longer", batch=1, seq_q=150, seq_k=170, dim=64, dim_v=64),
]

DTYPES = ["float32", "float16", "bfloat16"]


def as_dtype(x, dtype):
    """x rounded to a storage dtype, as a numpy array of it (bfloat16 by ml_dtypes)."""
    if dtype == "bfloat16":
        import ml_dtypes

        return x.astype(ml_dtypes.bfloat16)
    return x.astype(dtype)


def arrays(case, seed=0, dtype="float32"):
    """q, k, v and the mask keywords of a case. Queries are near some keys, so that collisions matter; masked keys and
    values hold NaN and infinities, masked queries NaN."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((case.batch, case.heads, case.seq_q, case.dim))
    k = rng.standard_normal((case.batch, case.heads_kv, case.seq_k, case.dim))
    v = rng.standard_normal((case.batch, case.heads_kv, case.seq_k, case.dim_v))
    near = rng.integers(0, case.seq_k, case.seq_q)
    q += 1.5 * np.repeat(k, case.heads // case.heads_kv, axis=1)[:, :, near]
    keywords = dict(is_causal=case.causal)
    if case.masked:
        keep_k = rng.random((case.batch, case.seq_k)) < 0.7
        keep_q = rng.random((case.batch, case.seq_q)) < 0.8
        keep_k[-1] &= np.arange(case.seq_k) < case.seq_k // 2
        k[np.broadcast_to(~keep_k[:, None, :], k.shape[:3])] = np.nan
        v[np.broadcast_to(~keep_k[:, None, :], v.shape[:3])] = np.inf
        q[np.broadcast_to(~keep_q[:, None, :], q.shape[:3])] = np.nan
        keywords.update(key_mask=keep_k, query_mask=keep_q)
    return *(as_dtype(x, dtype) for x in (q, k, v)), keywords


def strided(x):
    """The same values with holes between rows and swapped outer axes: [B, H, N, D] as a view of [B, N, H, D + 3]."""
    base = np.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 3), 7, x.dtype)
    view = base[..., : x.shape[3]].transpose(0, 2, 1, 3)
    view[...] = x
    return view
