"""What the CUDA kernels should take on an H200, from what they move and do: no GPU is needed to read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

MULTIPROCESSORS, CLOCK = 132, 1.75e9
RATES = {  # per second, of what a kernel can reach rather than of the data sheet
    "DRAM": 4.3e12,  # bytes, read plus written
    "L2": 5.5e12,  # bytes
    "matrix": 620e12,  # operations of mma.sync with 16-bit operands
    "issue": MULTIPROCESSORS * 4 * CLOCK,  # instructions of a warp
    "shared": MULTIPROCESSORS * CLOCK,  # wavefronts of 128 bytes
    "MUFU": MULTIPROCESSORS * 4 * CLOCK / 2,  # instructions of a warp
}
FLASH = {"forward": 330e12, "backward": 290e12}  # operations per second of flash attention with D = 64 in torch
LAUNCH = 2e-6  # seconds from one kernel of a graph to the next
PAIRS_LIMIT = 512 * 512
LENGTHS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class Work:
    """Of one kernel, or of several that follow each other: `before` are the others. Instructions are a warp's."""

    dram: float = 0
    l2: float = 0
    flops: float = 0
    instructions: float = 0
    wavefronts: float = 0
    mufu: float = 0
    kernels: int = 1
    before: tuple[Work, ...] = ()

    def __add__(self, after: Work) -> Work:
        return replace(after, before=(*self.before, replace(self, before=()), *after.before))

    def terms(self) -> dict[str, float]:
        amounts = (self.dram, self.l2, self.flops, self.instructions, self.wavefronts, self.mufu)
        return {name: amount / RATES[name] for name, amount in zip(RATES, amounts, strict=True)}

    @property
    def parts(self) -> list[Work]:
        return [*self.before, replace(self, before=())]

    @property
    def bound(self) -> str:
        """The slowest unit of the slowest part."""
        terms = max(self.parts, key=lambda part: part.own_seconds).terms()
        return max(terms, key=terms.__getitem__)

    @property
    def own_seconds(self) -> float:
        return max(self.terms().values()) + self.kernels * LAUNCH

    @property
    def seconds(self) -> float:
        """The slowest of the units, part by part, and the launches."""
        return sum(part.own_seconds for part in self.parts)

    @property
    def bytes(self) -> float:
        """Least traffic of DRAM."""
        return sum(part.dram for part in self.parts)

    @property
    def operations(self) -> float:
        """Of the tensor cores."""
        return sum(part.flops for part in self.parts)


@dataclass(frozen=True)
class Case:
    """B * H rows of attention over `seq` tokens, D = E = dim, 16-bit elements."""

    rows: int = 96
    seq: int = 16384
    dim: int = 64
    hashes: int = 16
    bits: int = 8
    size: int = 2  # bytes of an element

    @property
    def tokens(self) -> int:
        return self.rows * self.seq

    @property
    def pairs(self) -> int:
        return self.rows * self.seq**2

    @property
    def code_size(self) -> int:
        return 2 if self.bits <= 16 else 4


def random_signs(c: Case) -> Work:
    """A thread makes the four numbers of a counter with about 75 instructions."""
    numbers = c.rows * 3 * transforms(c) * max(64, c.dim)
    return Work(dram=4 * numbers, instructions=numbers / 4 / 32 * 75)


def transforms(c: Case) -> int:
    return -(-c.hashes * c.bits // max(64, c.dim))


def l2_normalize(c: Case, size_in: int | None = None) -> Work:
    """A team of 8 lanes owns a row of 64 columns: a quarter of a warp's 250 instructions, most of them for places."""
    moved = c.tokens * c.dim * ((size_in or c.size) + c.size)
    return Work(dram=moved, instructions=c.tokens * 62 * max(1, c.dim / 64))


def l2_normalize_bwd(c: Case) -> Work:
    """Reads the rows and their gradients, writes float32."""
    return l2_normalize(c, c.size + 4)


def lsh_hash(c: Case) -> Work:
    """A thread holds a token. For every 64 bits 1152 fused additions, 64 signs and 64 shifts, the factors from shared
    memory; the rows pass through it, and codes are cut from words. Four fifths of the issue slots are used."""
    per_transform = 1280 * c.dim / 64
    return Work(
        dram=c.tokens * (c.dim * c.size + c.hashes * c.code_size),
        instructions=c.tokens / 32 * (transforms(c) * per_transform + 900 + 15 * c.hashes) / 0.8,
        wavefronts=c.tokens * (7 * transforms(c) + 3) * c.dim / 64,
    )


def lsh_hash_gaussian(c: Case) -> Work:
    """Rows as one 16-bit part (what 16-bit elements need), planes as two; signs become words, words codes."""
    columns = c.hashes * c.bits
    return Work(
        dram=c.tokens * (c.dim * c.size + c.hashes * c.code_size),
        flops=2 * 2 * c.tokens * c.dim * columns,
        instructions=c.tokens * (22 + (14 + 25 + 12) * columns / 288),
        wavefronts=c.tokens * columns * 2 * c.dim / 16 / 128,
    )


def bucket_sort(c: Case) -> Work:
    """Counting passes over digits of 8 bits, 70 instructions and 12 wavefronts for 32 codes; one block of 1024 threads
    on a multiprocessor gets half of its issue slots. Codes are read once and the order is written once."""
    entries, passes = c.tokens * c.hashes, -(-c.bits // 8)
    return Work(
        dram=entries * (c.code_size + 4) + c.rows * c.hashes * 4 * 2**c.bits,
        instructions=entries / 32 * 70 * passes / 0.5,
        wavefronts=entries / 32 * 12 * passes,
    )


def bucket_pairs(c: Case) -> Work:
    """2.4 instructions of a warp compare a target with 32 sources by one hash, 15 add a row that counts. Nine tenths of
    the issue slots are used."""
    counting = c.pairs * (1 - (1 - 2.0**-c.bits) ** c.hashes)
    return Work(
        dram=c.tokens * (2 * c.dim * c.size + 2 * c.hashes * c.code_size),
        instructions=(c.pairs / 32 * c.hashes * 2.4 + counting * 15 * c.dim / 64) / 0.9,
    )


def build_tables(c: Case) -> Work:
    """A token, a hash and 64 columns: 2.7 wavefronts, 15 instructions for the row, and for lists and buckets 14 for
    every 256 buckets. A block reads the rows once for as many hashes as have 512 buckets together, at most 4."""
    entries, buckets = c.tokens * c.hashes * c.dim / 64, 2**c.bits
    tables = c.rows * c.hashes * 2**c.bits * 4 * c.dim
    return Work(
        dram=c.tokens * c.dim * c.size + c.tokens * c.hashes * c.code_size + tables,
        l2=c.tokens * c.dim * c.size * c.hashes * max(128, buckets) / 512 + tables,
        instructions=(15 + 14 * buckets / 256) * entries,
        wavefronts=2.7 * entries,
    )


def gather_tables(c: Case) -> Work:
    """For a target, a hash and 64 columns 2.1 wavefronts and 3.5 instructions, and a fifth for the copies: blocks of
    up to 1536 targets copy the tables of their hashes."""
    entries = c.tokens * c.hashes * c.dim / 64
    tables = c.rows * c.hashes * 2**c.bits * 4 * c.dim
    return Work(
        dram=4 * c.tokens * c.dim + c.tokens * c.hashes * c.code_size + tables,
        l2=tables * -(-c.seq // 1536) + c.tokens * c.hashes * c.code_size,
        instructions=1.2 * 3.5 * entries,
        wavefronts=1.2 * 2.1 * entries,
    )


def bucket_attention(c: Case) -> Work:
    return bucket_pairs(c) if c.seq**2 <= PAIRS_LIMIT else build_tables(c) + gather_tables(c)


def bucket_segments(c: Case) -> Work:
    """Causal: sorted sources, the sums of segments of eight places and their running sums, and per target and hash
    a search of its bucket and of its bound, 3.5 rows on average and the running sum before them."""
    entries, row = c.tokens * c.hashes, c.dim * c.size
    rows = 3.5 if c.seq >= 8 << c.bits else 1.0
    prepare = Work(dram=entries * 4, l2=entries * (row + 16 + 1.5 * c.dim), instructions=entries * 6, kernels=2)
    gather = Work(
        dram=2 * c.tokens * c.dim * c.size,
        l2=entries * (200 + rows * row + 4 * c.dim),
        instructions=entries * (20 + 4 * rows),
    )
    return bucket_sort(c) + prepare + gather


def bucket_gradient(c: Case, samples: int = 4, size_dout: int | None = None) -> Work:
    """`samples` pairs for every row and hash on both sides: two rows of the other side and about 70 bytes from L2, 16
    instructions for the sums and 10 for the picks."""
    side = c.tokens * c.hashes * samples
    row, row_dout = c.dim * c.size, c.dim * (size_dout or c.size)
    pairs = Work(
        dram=c.tokens * (5 * row + row_dout),
        l2=side * (2 * row + 70) + side * (row + row_dout + 70),
        instructions=2 * side * (15.5 * c.dim / 64 + 10.3),
        wavefronts=2 * side * 3,
        kernels=4,
    )
    return bucket_sort(c) + bucket_sort(c) + pairs


def split_rows(c: Case, arrays: int) -> Work:
    """Rows by their lengths, as parts for the tensor cores."""
    return Work(dram=arrays * c.tokens * c.dim * 2 * c.size, instructions=arrays * c.tokens * 60, kernels=arrays)


def collision_pass(c: Case, products: int, rows: int, clocks: float) -> Work:
    """`products` of tensor cores for every pair, blocks of `rows` that read all columns, and the clocks of instructions
    of a multiprocessor for a pair, four fifths of whose issue slots are used."""
    return Work(
        dram=4 * c.tokens * c.dim * c.size,
        l2=c.pairs / rows * 2 * c.dim * c.size,
        flops=2 * products * c.pairs * c.dim,
        instructions=clocks / 0.8 * 4 * c.pairs,
        mufu=c.pairs / 32,
    )


def collision_attention(c: Case) -> Work:
    return split_rows(c, 3) + collision_pass(c, 2, 96, 0.26)


def collision_attention_bwd(c: Case) -> Work:
    """The pass over rows (dq) and the one over columns (dk, dv) both form the weights."""
    finish = Work(dram=2 * c.tokens * c.dim * (4 + 2 * c.size), instructions=2 * c.tokens * 200, kernels=2)
    return split_rows(c, 4) + collision_pass(c, 3, 128, 0.40) + collision_pass(c, 4, 64, 0.44) + finish


OPERATORS = {
    "l2_normalize": l2_normalize,
    "lsh_hash hadamard": lsh_hash,
    "lsh_hash gaussian": lsh_hash_gaussian,
    "bucket_sort": bucket_sort,
    "bucket_attention": bucket_attention,
    "bucket_attention causal": bucket_segments,
    "bucket_attention_bwd": bucket_attention,
    "bucket_gradient": bucket_gradient,
    "collision_attention": collision_attention,
    "collision_attention_bwd": collision_attention_bwd,
}


def forward_seconds(c: Case) -> float:
    """yoso_attention: signs, queries, keys, the sum in float32, its rows over their lengths."""
    parts = (random_signs(c), lsh_hash(c), lsh_hash(c), bucket_attention(c), l2_normalize(c, 4))
    return sum(part.seconds for part in parts)


def expectation_seconds(c: Case) -> float:
    return collision_attention(c).seconds + l2_normalize(c, 4).seconds


def training_seconds(c: Case) -> float:
    """Forward; hashes again, the gradient through the lengths, the transposed sum, the pairs."""
    hashes, gradient = (random_signs(c), lsh_hash(c), lsh_hash(c)), bucket_gradient(c, size_dout=4)
    parts = (*hashes, l2_normalize_bwd(c), bucket_attention(c), gradient)
    return forward_seconds(c) + sum(part.seconds for part in parts)


def expectation_training_seconds(c: Case) -> float:
    """The backward pass begins with the saved result and its lengths."""
    return expectation_seconds(c) + (l2_normalize_bwd(c) + collision_attention_bwd(c)).seconds


def flash_flops(c: Case, backward: bool = False) -> float:
    """Exact attention: two products forward, five backward."""
    return (14 if backward else 4) * c.pairs * c.dim


def flash_seconds(c: Case, backward: bool = False) -> float:
    """At least what q, k, v and the result take to move."""
    forward = max(flash_flops(c) / FLASH["forward"], 4 * c.tokens * c.dim * c.size / RATES["DRAM"]) + LAUNCH
    more = flash_flops(c, True) - flash_flops(c)
    return forward + (more / FLASH["backward"] + 2 * LAUNCH if backward else 0)


def table() -> Iterator[str]:
    yield "predicted milliseconds on an H200: B * H = 96, D = 64, bfloat16; SDPA = exact attention by torch"
    yield f"{'':32}" + "".join(f"{'N=' + str(n):>10}" for n in LENGTHS)
    wholes = {"SDPA forward": flash_seconds, "SDPA forward + backward": lambda c: flash_seconds(c, True)}
    wholes |= {"expectation (8) forward": expectation_seconds}
    for name, seconds in wholes.items():
        yield row(name, [seconds(Case(seq=n)) for n in LENGTHS])
    for hashes, bits in ((16, 8), (32, 9)):
        cases = [Case(seq=n, hashes=hashes, bits=bits) for n in LENGTHS]
        yield row(f"yoso ({hashes}, {bits}) forward", [forward_seconds(c) for c in cases])
        yield row(f"yoso ({hashes}, {bits}) forward + backward", [training_seconds(c) for c in cases])
        speedups = [flash_seconds(c) / forward_seconds(c) for c in cases]
        yield f"{'  SDPA forward / yoso forward':32}" + "".join(f"{ratio:9.1f}x" for ratio in speedups)
        for name, work in OPERATORS.items():
            yield row(f"  {name}", [work(c).seconds for c in cases]) + f"  by {work(cases[2]).bound}"


def row(name: str, seconds: list[float]) -> str:
    return f"{name:32}" + "".join(f"{1e3 * s:10.3f}" for s in seconds)
