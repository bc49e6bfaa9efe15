"""The error budget: a kernel may err `factor` times as much as the plain formula evaluated in the same precision.

Both errors are taken against float64, their maximum and their root mean square alike. The floor is one rounding of the
output, so that a plain result that happens to be exact does not leave a budget of zero.
"""

import numpy as np

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def round_to(x, dtype):
    """x rounded to float32, then to dtype (a name or a numpy type), nearest even; returned as float32."""
    x = np.asarray(x).astype(np.float32)
    name = dtype_name(dtype)
    if name == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    if name == "bfloat16":
        bits = x.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.where(np.isnan(x), bits | np.uint32(0x400000), rounded) & np.uint32(0xFFFF0000)
        return rounded.view(np.float32)
    assert name == "float32", name
    return x


def dtype_name(dtype):
    return dtype if isinstance(dtype, str) else np.dtype(dtype).name


def sum_floor(terms_abs_sum):
    """What the order of a float32 sum may cost: eps * sum |terms|, the largest over the outputs."""
    return EPS["float32"] * float(np.max(terms_abs_sum, initial=0.0))


def root_mean_square(x):
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def assert_budget(actual, exact64, plain, factor=2.0, floor=0.0, dtype=None, what="result"):
    """max and RMS of |actual - exact64| <= max(factor * the same of |plain - exact64|, one rounding + floor).

    plain   the caller's evaluation in the kernel's precision, rounded to the dtype of the output by round_to
    floor   absolute, added to the rounding; for a float32 sum that cancels: sum_floor(sum |terms|)
    dtype   of the output, where actual is held in a wider one
    NaN and infinities must be where exact64 has them. Where plain alone is not finite, it grants nothing.
    """
    eps = EPS[dtype_name(actual.dtype if dtype is None else dtype)]
    actual, exact, plain = (np.asarray(a).astype(np.float64) for a in (actual, exact64, plain))
    assert actual.shape == exact.shape == plain.shape, (
        f"{what}: shapes {actual.shape} (actual), {exact.shape} (exact), {plain.shape} (plain)"
    )
    finite = np.isfinite(exact)
    alike = np.where(finite, np.isfinite(actual), (actual == exact) | (np.isnan(actual) & np.isnan(exact)))
    if not alike.all():
        where = tuple(int(i) for i in np.argwhere(~alike)[0])
        raise AssertionError(
            f"{what}: {(~alike).sum()} of {alike.size} elements differ in being NaN or infinite, "
            f"first at {where}: got {actual[where]}, expected {exact[where]}"
        )
    error = np.zeros(exact.shape)
    error[finite] = np.abs(actual[finite] - exact[finite])
    usable = finite & np.isfinite(plain)
    plain_error = np.abs(plain[usable] - exact[usable])
    measures = {
        "max": (error.max(initial=0.0), plain_error.max(initial=0.0), np.abs(exact[finite]).max(initial=0.0)),
        "RMS": (root_mean_square(error[finite]), root_mean_square(plain_error), root_mean_square(exact[finite])),
    }
    for name, (have, granted, magnitude) in measures.items():
        budget = max(factor * granted, eps * magnitude + floor)
        if not have <= budget:
            where = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
            raise AssertionError(
                f"{what}: {name} error {have:.3e} > budget {budget:.3e} (plain formula {granted:.3e}, factor {factor}, "
                f"floor {eps * magnitude + floor:.3e}); worst at {where}: got {actual[where]!r}, "
                f"expected {exact[where]!r}, plain {plain[where]!r}; {(error > budget).sum()} of {error.size} exceed it"
            )


def redrawn_floor(plain, q, k, exact, gradients=None, draws=10):
    """Twice the largest error of the plain float32 formula `plain(q, k)` over other draws of its roundings: the same
    directions at other row lengths, with the dimensions in another order. On a handful of numbers one evaluation may be
    exact by luck, and near-parallel rows amplify one rounding to any size. `gradients` = positions of dq and dk in the
    results, which are turned back."""
    rng = np.random.default_rng(12345)
    exact = exact if isinstance(exact, tuple) else (exact,)
    floors = [0.0] * len(exact)
    for _ in range(draws):
        order = rng.permutation(q.shape[-1])
        lengths = [rng.uniform(1, 2, (*x.shape[:-1], 1)) for x in (q, k)]
        results = plain(*((x * length)[..., order] for x, length in zip((q, k), lengths, strict=True)))
        for i, (result, truth) in enumerate(
            zip(results if isinstance(results, tuple) else (results,), exact, strict=True)
        ):
            if gradients and i in gradients:
                result = result[..., np.argsort(order)] * lengths[gradients.index(i)]
            error = np.abs(result - truth)
            floors[i] = max(floors[i], 2 * float(error[np.isfinite(error)].max(initial=0)))
    return floors
