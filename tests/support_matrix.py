"""The support matrix of the README, found by trying: `python tests/support_matrix.py --write` puts it there.

Every cell is a call with small arrays: a tick if it returns a result of the right framework, a dash if it raises
subquad.UnsupportedError, wants as many key heads as query heads, or the function has no such keyword.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import numpy as np

import subquad

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support matrix: tests/support_matrix.py --write -->", "<!-- end of support matrix -->"


def inputs(make, dtype="float32", heads_kv=4):
    rng = np.random.default_rng(0)
    shapes = ((1, 4, 6, 8), (1, heads_kv, 6, 8), (1, heads_kv, 6, 8))
    return [make(rng.standard_normal(s).astype(np.float32), dtype) for s in shapes]


def make_numpy(x, dtype):
    if dtype == "bfloat16":
        import ml_dtypes

        return x.astype(ml_dtypes.bfloat16)
    return x.astype(dtype)


def make_torch(x, dtype):
    import torch

    return torch.from_numpy(x).to(getattr(torch, dtype))


def make_jax(x, dtype):
    import jax

    return jax.numpy.asarray(x, dtype)


def like(q, x):
    """x in the framework of q."""
    make = {"torch": make_torch, "jax": make_jax, "jaxlib": make_jax}.get(type(q).__module__.split(".")[0], make_numpy)
    return make(x, x.dtype.name)


# How to call each attention: q, k, v and keywords to a result.
ATTENTIONS = {
    "softmax_attention": subquad.softmax_attention,
    "linear_attention": subquad.linear_attention,
    "rfa_attention (positive)": lambda q, k, v, **kw: subquad.rfa_attention(q, k, v, num_features=16, **kw),
    "randomized_attention": subquad.randomized_attention,
    "lara_attention": lambda q, k, v, **kw: subquad.lara_attention(q, k, v, num_landmarks=2, **kw),
    "eva_attention": lambda q, k, v, **kw: subquad.eva_attention(q, k, v, window=2, chunk_size=2, **kw),
    "yoso_attention": lambda q, k, v, **kw: subquad.yoso_attention(q, k, v, num_hashes=2, hash_bits=3, **kw),
    "yoso_attention (expectation)": lambda q, k, v, **kw: subquad.yoso_attention(
        q, k, v, hash_bits=3, expectation=True, **kw
    ),
    "collision_attention": lambda q, k, v, **kw: subquad.collision_attention(q, k, v, 3, **kw),
    "sparse_attention": lambda q, k, v, **kw: subquad.sparse_attention(q, k, v, like(q, KEYS), **kw),
    "sea_attention": lambda q, k, v, **kw: subquad.sea_attention(q, k, v, like(q, PROBS), **kw),
}
KEYS, PROBS = np.zeros((1, 4, 6, 3), np.int32), np.full((1, 4, 6, 4), 0.25, np.float32)


# What has CUDA kernels. They have run under the emulator; the word changes when they have run on a device.
CUDA = dict.fromkeys(("yoso_attention", "yoso_attention (expectation)", "collision_attention"), "emulated")


def works(call) -> bool:
    try:
        call()
        return True
    except (subquad.UnsupportedError, NotImplementedError):
        return False
    except (TypeError, ValueError) as error:
        if "unexpected keyword" in str(error) or "k: expected shape [B, H, M, D]" in str(error):
            return False
        raise


def cells(name: str, attention) -> list[bool | str]:
    function = getattr(subquad, name.split()[0])
    parameters = inspect.signature(function).parameters
    mask = np.ones((1, 6), bool)
    by_pattern = "by the pattern" if "pattern" in parameters else False
    q, k, v = inputs(make_numpy)
    return [
        *(works(lambda make=make: attention(*inputs(make))) for make in (make_numpy, make_torch, make_jax)),
        *(
            works(lambda dtype=dtype: attention(*inputs(make_numpy, dtype)))
            for dtype in ("float32", "float16", "bfloat16")
        ),
        by_pattern or works(lambda: attention(q, k, v, is_causal=True)),
        by_pattern or ("key_mask" in parameters and works(lambda: attention(q, k, v, key_mask=mask))),
        works(lambda: attention(*inputs(make_numpy, heads_kv=2))),
        hasattr(subquad, name.split()[0] + "_bwd"),
        *(hasattr(importlib.import_module(f"subquad.{part}"), name.split()[0]) for part in ("torch", "jax")),
    ]


def table() -> str:
    head = [
        "",
        "numpy",
        "torch",
        "jax",
        "f32",
        "f16",
        "bf16",
        "causal",
        "masks",
        "GQA",
        "backward",
        "torch autograd",
        "jax jit, grad, vmap",
        "CUDA",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, attention in ATTENTIONS.items():
        ticks = [cell if isinstance(cell, str) else "yes" if cell else "no" for cell in cells(name, attention)]
        lines.append("| " + " | ".join([f"`{name}`", *ticks, CUDA.get(name, "no")]) + " |")
    return "\n".join(lines)


def committed() -> str:
    return README.read_text().split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    if "--write" in sys.argv:
        text = README.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
    else:
        print(table())
