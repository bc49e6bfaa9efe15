"""Budgets of operators from their references: what the plain float32 formula errs on the inputs and next to them."""

import numpy as np

from tolerance import assert_budget, round_to


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def neighbour(x, rng):
    """x times 1 + 2^-8 u: one evaluation in float32 may be exact by luck, several are not."""
    x = np.asarray(x)
    if x.dtype.kind in "biu" or rng is None:
        return x
    wide = x.astype(np.float64)
    return (wide * (1 + 2.0**-8 * rng.uniform(-1, 1, x.shape))).astype(np.float32).astype(np.float64)


class Expected:
    """Results of a reference in float64, and for each the largest errors that float32 makes in a few draws."""

    def __init__(self, reference, inputs, keywords=None, draws=5):
        keywords = keywords or {}
        self.exact = self.errors = None
        for draw in range(draws):
            rng = np.random.default_rng(draw) if draw else None
            moved = [None if x is None else neighbour(x, rng) for x in inputs]
            wide = [x if x is None or x.dtype.kind in "biu" else x.astype(np.float64) for x in moved]
            exact = as_tuple(reference(*wide, **keywords))
            plain = as_tuple(reference(*wide, **keywords, dtype=np.float32))
            with np.errstate(invalid="ignore"):
                errors = [None if e is None else np.abs(p - e) for p, e in zip(plain, exact, strict=True)]
            errors = [None if e is None else np.where(np.isfinite(e), e, 0) for e in errors]
            if draw == 0:
                self.exact, self.errors = exact, errors
            self.errors = [e if e is None else np.maximum(e, f) for e, f in zip(self.errors, errors, strict=True)]

    def check(self, got, what="result", dtypes="float32", floors=0.0, factor=2.0):
        """got within its budget; dtypes: that of each result, or of all; floors: absolute, of each result or of all."""
        got = as_tuple(got)
        assert len(got) == len(self.exact), what
        dtypes = [dtypes] * len(got) if isinstance(dtypes, str) else dtypes
        floors = [floors] * len(got) if isinstance(floors, float) else floors
        for i, (actual, exact, error) in enumerate(zip(got, self.exact, self.errors, strict=True)):
            if exact is None:
                assert actual is None, f"{what} [{i}]"
                continue
            assert np.asarray(actual).dtype.name in (dtypes[i], "float32"), f"{what} [{i}]"
            finite = np.where(np.isfinite(exact), exact, 0)
            rounded = np.abs(round_to(finite, dtypes[i]) - finite)
            plain = np.where(np.isfinite(exact), exact + error + rounded, exact)
            name = f"{what} [{i}]"
            assert_budget(actual, exact, plain, factor, floor=floors[i], dtype=dtypes[i], what=name)


def within(framework, function, inputs, keywords):
    """function(*inputs, **keywords) on arrays of the framework, its results as a tuple of numpy arrays."""
    made = {name: make(framework, x) for name, x in keywords.items()}
    results = as_tuple(function(*(make(framework, x) for x in inputs), **made))
    return tuple(None if x is None else framework.read(x) for x in results)


def make(framework, x):
    if isinstance(x, tuple):
        return tuple(make(framework, part) for part in x)
    return framework.make(x) if isinstance(x, np.ndarray) else x


def without_queries(q, k, v, masks):
    """A case for operators that have no query mask: finite queries, and the other masks."""
    q = np.nan_to_num(np.asarray(q, np.float32), nan=0.5).astype(q.dtype)
    return q, k, v, {name: mask for name, mask in masks.items() if name != "query_mask"}
