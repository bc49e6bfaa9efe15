"""YOSO on a CUDA device against torch's flash attention: speed with the error next to it, every operator against the
ceilings of the device and against its model. A figure whose check fails is not printed."""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable

import subquad
from bench import cuda_checks as checks
from bench import cuda_model as model
from bench import machine
from bench.cuda_device import open_device
from bench.cuda_operators import operators
from bench.report import Bench, summary, write_json
from bench.timing import Pair

SEED = 1
FORWARD_TARGETS = {(16, 8): {4096: 1.0, 16384: 6.0, 65536: 20.0}, (32, 9): {4096: 0.5, 16384: 3.0, 65536: 10.0}}
COMPARISONS = 60  # about as many shares of the budget as there are things to time


class CudaBench(Bench):
    """Lines, as everywhere; inputs that together are larger than the L2; figures only of what is right."""

    def __init__(self, device, budget: float, batch: int = 8, heads: int = 12, shrink: int = 1):
        super().__init__(min(3.0, budget / COMPARISONS), 0)
        self.device, self.batch, self.heads, self.shrink = device, batch, heads, shrink
        self.deadline = time.monotonic() + budget
        self.forward_ms: dict[tuple[int, int, int], float] = {}
        self.failures: list[str] = []
        self.json: str | None = None

    def seq(self, length: int) -> int:
        return length // self.shrink

    def case(self, seq: int, **more) -> model.Case:
        return model.Case(rows=self.batch * self.heads, seq=seq, **more)

    def sets(self, seq: int, arrays: int = 3, grad: bool = False) -> list[list]:
        """As many sets of arrays [B, H, N, 64] in bfloat16 as it takes to leave the L2 twice, at least one."""
        torch, shape = self.torch, (self.batch, self.heads, seq, 64)
        count = max(1, min(16, math.ceil(2 * self.device.l2 / (2 * arrays * math.prod(shape)))))
        generator = torch.Generator(self.device.kind).manual_seed(0)
        keywords = dict(device=self.device.kind, dtype=torch.bfloat16)
        make = lambda: torch.randn(shape, generator=generator, **keywords).requires_grad_(grad)  # noqa: E731
        return [[make() for _ in range(arrays)] for _ in range(count)]

    def sdpa(self, q, k, v, **keywords):
        """Exact attention, with its flash kernels and no others."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().sdpa(q, k, v, **keywords)

    def save(self) -> None:
        """After every figure, since the device, or the time on it, may be lost before the next."""
        if self.json:
            write_json(self.json, self.lines, {"machine": self.device.name, "commit": commit()})

    def fail(self, name: str, why: str) -> None:
        self.failures.append(name)
        self.lines.append({"name": name, "value": None, "unit": "", "target": None, "met": False, "why": why})
        print(f"{name:44} NO FIGURE: {why}", flush=True)

    def is_right(self, name: str, error: float, limit: float = checks.LIMIT) -> bool:
        if error <= limit:
            return True
        self.fail(name, f"its error is {error:.3g}, above {limit:g}")
        return False

    def figure(self, name: str, line: Callable, *arguments) -> None:
        """One figure, by line(self, name, *arguments): left out when the time is used up, and no reason to stop when it
        fails."""
        if time.monotonic() >= self.deadline:
            print(f"{name:44} left out: the budget is used up", flush=True)
            return
        try:
            line(self, name, *arguments)
        except Exception as error:
            self.fail(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}")
            self.device.synchronize()  # raises, and so ends the run, if the device is lost
        finally:
            self.save()
            self.device.free()

    def yoso(self, arrays, **keywords):
        return lambda: subquad.yoso_attention(*arrays, seed=SEED, **keywords)

    def compare(self, name, ours, theirs, flops, target, seconds, graph=True, below=False, **more) -> Pair:
        """A line of a ratio, exact attention's time to ours or, where `below` a target, the other way round. `flops`
        are those of exact attention, `seconds` is the model's time of ours."""
        pair, runner = self.device.paired(ours, theirs, self.budget, graph)
        ms = pair.ours.median * 1e3
        figures = {"ms": ms, "iqr_ms": pair.ours.iqr * 1e3, "sdpa_ms": pair.theirs.median * 1e3}
        figures["sdpa_TFLOP/s"] = flops / pair.theirs.median / 1e12
        figures |= {"model_ms": seconds * 1e3, "of_model": seconds / pair.ours.median} | more
        ratio = 1 / pair.ratio.median if below else pair.ratio.median
        self.report(name, ratio, target, below=below, **figures, how=runner.how)
        if runner.why:
            print(f"    not captured in a graph: {runner.why}", flush=True)
        return pair


def forward(bench: CudaBench) -> None:
    for (hashes, bits), wanted in FORWARD_TARGETS.items():
        for length in model.LENGTHS:
            seq = bench.seq(length)
            name = f"forward ({hashes}, {bits}) N={seq}"
            bench.figure(name, forward_line, bench.case(seq, hashes=hashes, bits=bits), wanted.get(length))


def forward_line(bench: CudaBench, name: str, case: model.Case, target: float | None) -> None:
    sets, options = bench.sets(case.seq), dict(num_hashes=case.hashes, hash_bits=case.bits)
    ours = [bench.yoso(x, **options) for x in sets]
    error, estimate = checks.forward_error(bench.torch, ours[0](), *sets[0], case.hashes, case.bits, SEED)
    if bench.is_right(name, error):
        more, theirs = {"error": error, "of_expectation": estimate}, [lambda x=x: bench.sdpa(*x) for x in sets]
        pair = bench.compare(name, ours, theirs, model.flash_flops(case), target, model.forward_seconds(case), **more)
        bench.forward_ms[case.hashes, case.bits, case.seq] = pair.ours.median * 1e3


def growth(bench: CudaBench) -> None:
    """From the figures of the forward pass."""
    short, long = bench.seq(16384), bench.seq(65536)
    for hashes, bits in FORWARD_TARGETS:
        few, many = (bench.forward_ms.get((hashes, bits, n)) for n in (short, long))
        if few and many:
            bench.report(f"forward ({hashes}, {bits}) time N={long} / N={short}", many / few, 4.6, below=True, ms=many)


def skew(bench: CudaBench) -> None:
    """One token repeated: every hash has a single bucket."""
    seq = bench.seq(16384)
    bench.figure(f"forward (16, 8) N={seq}, equal tokens: time / random's", skew_line, seq)


def skew_line(bench: CudaBench, name: str, seq: int) -> None:
    sets = bench.sets(seq)
    equal = [[x[:, :, :1].repeat(1, 1, seq, 1) for x in arrays[:2]] + arrays[2:] for arrays in sets]
    one, other = ([bench.yoso(x, num_hashes=16, hash_bits=8) for x in y] for y in (sets, equal))
    pair, runner = bench.device.paired(one, other, bench.budget)
    bench.report(name, pair.ratio.median, None, ms=pair.theirs.median * 1e3, how=runner.how)


def kernels(bench: CudaBench) -> None:
    """What a short call costs are its launches."""
    for seq in (256, 512):
        bench.figure(f"kernels of yoso_attention (16, 8) N={seq}", kernels_line, seq)


def kernels_line(bench: CudaBench, name: str, seq: int) -> None:
    call = bench.yoso(bench.sets(seq)[0], num_hashes=16, hash_bits=8)
    count, source = bench.device.count_kernels(call)
    bench.report(name, count, 5, unit="", below=True, counted_by=source)


def expectation(bench: CudaBench) -> None:
    for length in (4096, 16384):
        seq = bench.seq(length)
        bench.figure(f"expectation (8) N={seq}: time / SDPA's", expectation_line, bench.case(seq))


def expectation_line(bench: CudaBench, name: str, case: model.Case) -> None:
    sets = bench.sets(case.seq)
    ours = [bench.yoso(x, expectation=True, hash_bits=8) for x in sets]
    error = checks.expectation_error(bench.torch, ours[0](), *sets[0], 8)
    if bench.is_right(name, error):
        theirs, seconds = [lambda x=x: bench.sdpa(*x) for x in sets], model.expectation_seconds(case)
        bench.compare(name, ours, theirs, model.flash_flops(case), 2.5, seconds, below=True, error=error)


def training(bench: CudaBench) -> None:
    from subquad import torch as sqt

    seq = bench.seq(16384)
    case, sampled = bench.case(seq), dict(num_hashes=16, hash_bits=8, seed=SEED)
    for rule, keywords, target, seconds in (
        ("sampled", sampled, 4.0, model.training_seconds(case)),
        ("sampled_exact", sampled | {"grad": "sampled_exact"}, None, model.training_seconds(case)),
        ("expectation", dict(expectation=True, hash_bits=8), None, model.expectation_training_seconds(case)),
    ):
        attention = functools.partial(sqt.yoso_attention, **keywords)
        bench.figure(f"forward + backward {rule} N={seq}", training_line, case, attention, target, seconds)


def training_line(bench: CudaBench, name: str, case: model.Case, attention: Callable, target, seconds) -> None:
    sets = bench.sets(case.seq, arrays=4, grad=True)
    error = training_error(bench, attention, *sets[0])
    step = lambda f, q, k, v, dout: bench.torch.autograd.grad(f(q, k, v), (q, k, v), dout.detach())  # noqa: E731
    if bench.is_right(name, error, checks.GRADIENT_LIMIT):
        ours, theirs = ([lambda x=x, f=f: step(f, *x) for x in sets] for f in (attention, bench.sdpa))
        flops = model.flash_flops(case, backward=True)
        bench.compare(name, ours, theirs, flops, target, seconds, graph=False, error=error)


def training_error(bench: CudaBench, attention: Callable, q, k, v, dout) -> float:
    """Of the gradients of the first head, against those of the CPU with the same seed and dtype."""
    grad = bench.torch.autograd.grad
    ours = grad(attention(q, k, v), (q, k, v), dout.detach())
    head = [x.requires_grad_() for x in checks.first_head(q, k, v)]
    return checks.against_cpu(ours, grad(attention(*head), head, *checks.first_head(dout)))


def each_operator(bench: CudaBench) -> None:
    for operator in operators(bench):
        bench.figure(f"{operator.name} N={operator.seq}", operator_line, operator)


def operator_line(bench: CudaBench, name: str, operator) -> None:
    sets = operator.make()
    head = checks.first_head(*sets[0])
    error = checks.against_cpu(operator.call(*sets[0]), operator.call(*head))
    if not bench.is_right(name, error, operator.limit):
        return
    spread, runner = bench.device.timed([lambda x=x: operator.call(*x) for x in sets], bench.budget)
    work, seconds = model.OPERATORS[operator.name](bench.case(operator.seq)), spread.median
    figures = {"iqr_ms": spread.iqr * 1e3, "model_ms": work.seconds * 1e3, "of_model": work.seconds / seconds}
    figures |= {"model_by": work.bound, "GB/s": work.bytes / seconds / 1e9}
    figures["of_copy"] = work.bytes / seconds / bench.device.copy_bandwidth
    if work.operations:
        rate = work.operations / seconds
        figures |= {"TFLOP/s": rate / 1e12, "of_matrix": rate / bench.device.matrix_rate}
    bench.report(name, seconds * 1e3, None, unit="ms", **figures, error=error, how=runner.how)


@functools.cache
def commit() -> str:
    try:
        return machine.commit()
    except OSError:  # no git
        return "unknown"


PARTS = {
    "forward": forward,
    "growth": growth,
    "kernels": kernels,
    "skew": skew,
    "operators": each_operator,
    "expectation": expectation,
    "training": training,
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench cuda", description=__doc__)
    parser.add_argument("--model", action="store_true", help="print what the model predicts and measure nothing")
    parser.add_argument("--json", metavar="FILE", help="also write the lines as JSON, one object a line")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for all of it, about (300)")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part; may be given again")
    return parser.parse_args(argv)


def measure(bench: CudaBench, only: list[str] | None) -> None:
    device = bench.device
    print(f"{device.describe()}, commit {commit()}\nbefore: {device.state()}")
    ceilings = device.measure_ceilings(bench.budget / 2) | device.measure_launches(bench.budget / 4)
    print(f"after: {device.state()}")
    print(", ".join(f"{name} {value:.4g}" for name, value in ceilings.items()), flush=True)
    for name, value in ceilings.items():
        bench.lines.append({"name": name, "value": value, "unit": "", "target": None, "met": None})
    print(f"B={bench.batch}, H={bench.heads}, D=64, bfloat16, medians of pairs with SDPA (flash)")
    for part, body in PARTS.items():
        if only is None or part in only or (part == "forward" and "growth" in only):
            body(bench)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.model:
        print(*model.table(), sep="\n")
        return 0
    bench = CudaBench(open_device(), args.budget)
    bench.json = args.json
    measure(bench, args.only)
    bench.save()
    print(summary(bench.lines))
    return 1 if bench.failures else 0
