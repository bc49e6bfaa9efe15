"""What the measured CUDA calls must give: float64 for some rows of the first head, and the CPU's operators."""

from __future__ import annotations

import math

import subquad

ROWS = 64
SIGNS_STREAM = 2
# 16-bit results are off by 2^-9 of themselves at most, and their sums are float32.
LIMIT, GRADIENT_LIMIT = 6e-3, 2e-2


def relative_error(found, expected) -> float:
    found, expected = (x.detach().cpu().double() for x in (found, expected))
    length = float(expected.norm())
    error = float((found - expected).norm()) / length if length else float(found.norm())
    return error if math.isfinite(error) else math.inf


def first_head(*arrays):
    """[1, 1, N, D] of each, on the CPU."""
    return [x[:1, :1].detach().cpu() for x in arrays]


def rows_of(seq: int, torch):
    """Rows to look at, spread over the sequence, with the first and the last."""
    return torch.linspace(0, seq - 1, min(ROWS, seq)).round().long()


def head_codes(torch, x, hashes: int, bits: int, seed: int):
    """Codes of the first head by the CPU's kernel: [R, N]. Hadamard codes are the same bits everywhere."""
    dim = max(64, 1 << (x.shape[-1] - 1).bit_length())
    parts = -(-hashes * bits // dim)
    signs = subquad.random_signs(
        [1, 3 * parts, dim], seed=seed, stream=SIGNS_STREAM, out=torch.empty(1, 3 * parts, dim)
    )
    codes = subquad.lsh_hash(x.float(), signs=signs.view(1, 3, parts, dim), num_hashes=hashes, hash_bits=bits)
    return codes[0, 0].to(torch.int32)


def sampled_rows(torch, q, k, v, hashes: int, bits: int, seed: int, rows):
    """The rows of the un-normalised sum in float64, from equal codes."""
    codes_q, codes_k = (head_codes(torch, x, hashes, bits, seed) for x in (q, k))
    weights = torch.zeros(len(rows), k.shape[2], dtype=torch.float64)
    for of_queries, of_keys in zip(codes_q[:, rows], codes_k, strict=True):
        weights += of_queries[:, None] == of_keys[None]
    return weights / hashes @ v[0, 0].double()


def expected_rows(torch, q, k, v, bits: int, rows):
    """The rows of what the sum estimates, in float64."""
    unit = [x[0, 0].double() / x[0, 0].double().norm(dim=-1, keepdim=True) for x in (q, k)]
    cosines = (unit[0][rows] @ unit[1].T).clamp(-1, 1)
    return (1 - torch.arccos(cosines) / math.pi) ** bits @ v[0, 0].double()


def normalized(rows):
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-300)


def forward_error(torch, out, q, k, v, hashes: int, bits: int, seed: int) -> tuple[float, float]:
    """Of the result of a sampled call, and of its sum as an estimate of the expectation."""
    out, q, k, v = first_head(out, q, k, v)
    rows = rows_of(q.shape[2], torch)
    sums = sampled_rows(torch, q, k, v, hashes, bits, seed, rows)
    estimate = relative_error(sums, expected_rows(torch, q, k, v, bits, rows))
    return relative_error(out[0, 0][rows], normalized(sums)), estimate


def expectation_error(torch, out, q, k, v, bits: int) -> float:
    out, q, k, v = first_head(out, q, k, v)
    rows = rows_of(q.shape[2], torch)
    return relative_error(out[0, 0][rows], normalized(expected_rows(torch, q, k, v, bits, rows)))


def against_cpu(found, expected) -> float:
    """The largest error of the results of a call, whose first heads are compared with those of the CPU. Of integers
    the share that differs."""
    found, expected = ([x] if not isinstance(x, (tuple, list)) else list(x) for x in (found, expected))
    errors = []
    for ours, theirs in zip(found, expected, strict=True):
        ours = ours[:1, :1].detach().cpu()
        if ours.is_floating_point():
            errors.append(relative_error(ours, theirs))
        else:
            errors.append(float((ours.int() != theirs.int()).double().mean()))
    return max(errors)
