"""The measurements of the CUDA backend, as far as they can be tested without a device: on a fake one, whose arrays are
the CPU's and whose times are made up."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import subquad

torch = pytest.importorskip("torch", reason="torch is not installed")
ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "cuda.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.append(str(ROOT))

from bench import cuda, cuda_checks, cuda_device, cuda_model, cuda_operators  # noqa: E402
from bench.timing import Pair, Spread  # noqa: E402

SHRINK = 128


class FakeDevice:
    """Runs every call once; ours takes 1 ms for 1024 / SHRINK tokens, exact attention ten times as long."""

    kind, l2 = "cpu", 1 << 16

    def __init__(self):
        self.torch, self.name, self.copy_bandwidth, self.matrix_rate = torch, "fake", 4e12, 8e14
        self.rounds, self.freed = [], 0
        self.runner = SimpleNamespace(how="graph", why="")

    def describe(self):
        return "a fake device"

    def state(self):
        return "idle"

    def measure_ceilings(self, budget):
        return {"copy GB/s": 4000.0}

    def measure_launches(self, budget):
        return {"in a graph us": 1.5}

    def run(self, calls):
        self.rounds.append(len(calls))
        results = [call() for call in calls]
        first = results[0][0] if isinstance(results[0], (tuple, list)) else results[0]
        seq = first.shape[2 if first.is_floating_point() else 3]  # codes are [B, H, R, N]
        return 1e-3 * seq * SHRINK / 1024

    def timed(self, calls, budget, graph=True):
        t = self.run(calls)
        return Spread(t, 0.9 * t, 1.2 * t), self.runner

    def paired(self, ours, theirs, budget, graph=True):
        t = self.run(ours)
        self.run(theirs)
        return Pair(Spread(t, 0.9 * t, 1.2 * t), Spread(10 * t, 9 * t, 12 * t), Spread(10, 9, 11)), self.runner

    def count_kernels(self, call):
        call()
        return 5, "graph"

    def synchronize(self):
        pass

    def free(self):
        self.freed += 1


@pytest.fixture
def bench():
    return cuda.CudaBench(FakeDevice(), budget=300, batch=2, heads=2, shrink=SHRINK)


def by_name(bench):
    return {line["name"]: line for line in bench.lines}


def test_a_whole_run(bench, capsys):
    cuda.measure(bench, None)
    lines = by_name(bench)
    assert not bench.failures
    for hashes, bits in ((16, 8), (32, 9)):
        for seq in (8, 32, 128, 512):
            line = lines[f"forward ({hashes}, {bits}) N={seq}"]
            assert line["value"] == 10 and line["error"] < 5e-3 and 0 < line["of_expectation"] < 5
            assert line["ms"] == pytest.approx(seq / 8) and line["sdpa_ms"] == pytest.approx(10 * seq / 8)
            assert line["iqr_ms"] == pytest.approx(0.3 * seq / 8) and line["how"] == "graph"
        assert lines[f"forward ({hashes}, {bits}) time N=512 / N=128"]["value"] == pytest.approx(4)
    targets = {
        "forward (16, 8) N=32": (1, True),
        "forward (16, 8) N=128": (6, True),
        "forward (16, 8) N=512": (20, False),
        "forward (32, 9) N=512": (10, True),
        "forward (16, 8) time N=512 / N=128": (4.6, True),
        "kernels of yoso_attention (16, 8) N=256": (5, True),
        "kernels of yoso_attention (16, 8) N=512": (5, True),
        "expectation (8) N=32: time / SDPA's": (2.5, True),
        "expectation (8) N=128: time / SDPA's": (2.5, True),
        "forward + backward sampled N=128": (4, True),
    }
    for name, (target, met) in targets.items():
        assert (lines[name]["target"], lines[name]["met"]) == (target, met), name
    assert lines["forward (16, 8) N=128, equal tokens: time / random's"]["value"] == 10
    text = capsys.readouterr().out
    assert "forward (16, 8) N=512" in text and "MISSED" in text and "NO FIGURE" not in text
    assert bench.device.freed > 20


def test_every_operator_has_a_line_with_its_ceilings(bench):
    cuda.each_operator(bench)
    lines = by_name(bench)
    assert len(lines) == len(cuda_model.OPERATORS) and not bench.failures
    for name in cuda_model.OPERATORS:
        seq = 32 if name.startswith("collision") else 128
        line = lines[f"{name} N={seq}"]
        work = cuda_model.OPERATORS[name](cuda_model.Case(rows=4, seq=seq))
        seconds = seq / 8 * 1e-3
        assert line["value"] == pytest.approx(seconds * 1e3) and line["unit"] == "ms"
        assert line["GB/s"] == pytest.approx(work.bytes / seconds / 1e9)
        assert line["of_copy"] == pytest.approx(work.bytes / seconds / 4e12)
        assert line["model_ms"] == pytest.approx(work.seconds * 1e3)
        assert line["error"] <= 1e-2
        assert ("TFLOP/s" in line) == (work.operations > 0)


@pytest.mark.parametrize("fault", [lambda x: x * 1.05, lambda x: x.roll(1, 2), lambda x: x * float("nan")])
def test_wrong_results_have_no_figure(bench, monkeypatch, capsys, fault):
    right = subquad.yoso_attention
    monkeypatch.setattr(subquad, "yoso_attention", lambda *a, **k: fault(right(*a, **k)))
    cuda.forward(bench)
    cuda.expectation(bench)
    cuda.growth(bench)
    assert len(bench.failures) == 10 and not bench.device.rounds
    assert all(line["value"] is None and line["met"] is False for line in bench.lines)
    assert "NO FIGURE: its error is" in capsys.readouterr().out


def test_wrong_gradients_and_codes_have_no_figure(bench, monkeypatch):
    monkeypatch.setattr(cuda, "training_error", lambda *a: 0.03)
    right, calls = subquad.lsh_hash, []

    def flipped(*arrays, **keywords):
        """One bit of one code in a hundred, in every other call."""
        codes = right(*arrays, **keywords)
        calls.append(codes)
        if len(calls) % 2:
            codes.view(torch.int16)[..., ::100] ^= 1
        return codes

    monkeypatch.setattr(subquad, "lsh_hash", flipped)
    cuda.training(bench)
    for operator in [*cuda_operators.operators(bench)][1:3]:
        cuda.operator_line(bench, operator.name, operator)
    assert len(bench.failures) == 5


def test_an_error_in_one_figure_leaves_the_others(bench, monkeypatch, capsys):
    def fail(*args, **keywords):
        raise NotImplementedError("[bucket_sort] no kernel")

    monkeypatch.setattr(subquad, "bucket_sort", fail)
    cuda.each_operator(bench)
    assert bench.failures == ["bucket_sort N=128"]
    assert "NO FIGURE: NotImplementedError: [bucket_sort] no kernel" in capsys.readouterr().out
    assert sum(line["value"] is not None for line in bench.lines) == len(cuda_model.OPERATORS) - 1


def test_a_used_up_budget_leaves_figures_out(bench, capsys):
    bench.deadline = 0
    cuda.measure(bench, None)
    assert not bench.device.rounds and not bench.failures
    assert capsys.readouterr().out.count("left out: the budget is used up") == 8 + 2 + 1 + 10 + 2 + 3


def test_inputs_leave_the_cache(bench):
    bench.device.l2 = 1 << 20
    for seq in (8, 128, 512, 4096):
        sets = bench.sets(seq)
        size = 3 * 2 * 2 * 2 * seq * 64
        assert len(sets) * size >= 2 << 20 or len(sets) == 16
        assert len(sets) == 1 or (len(sets) - 1) * size < 2 << 20
        assert len({x.data_ptr() for arrays in sets for x in arrays}) == 3 * len(sets)


# The reference of the checks


def test_the_reference_is_that_of_the_cpu():
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, 300, 64, generator=generator) for _ in range(3))
    rows = cuda_checks.rows_of(300, torch)
    out = subquad.yoso_attention(q, k, v, num_hashes=32, hash_bits=9, seed=7)
    error, estimate = cuda_checks.forward_error(torch, out, q, k, v, 32, 9, 7)
    assert error < 1e-6 and 0.05 < estimate < 5
    assert cuda_checks.forward_error(torch, out, q, k, v, 32, 9, 8)[0] > 0.1
    sums = subquad.yoso_attention(q, k, v, num_hashes=32, hash_bits=9, seed=7, normalize=False)
    expected = cuda_checks.sampled_rows(torch, q, k, v, 32, 9, 7, rows)
    assert cuda_checks.relative_error(sums[0, 0][rows], expected) < 1e-6
    out = subquad.yoso_attention(q, k, v, expectation=True, hash_bits=9)
    assert cuda_checks.expectation_error(torch, out, q, k, v, 9) < 1e-5


def test_not_a_number_is_never_right():
    nan = torch.full((4,), float("nan"))
    assert cuda_checks.relative_error(nan, torch.ones(4)) == float("inf")
    assert cuda_checks.relative_error(torch.ones(4), torch.zeros(4)) == 2


# Runs of calls


class FakeCuda:
    """The parts of torch.cuda that a Runner needs: a call takes a fixed time, graphs replay what they have caught."""

    def __init__(self, fails=False):
        self.now, self.log, self.fails, self.streams = 0.0, [], fails, []
        outer = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = outer.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        class CUDAGraph:
            def replay(self):
                outer.now += self.seconds
                outer.log.append("replay")

        self.cuda = SimpleNamespace(
            Event=Event, CUDAGraph=CUDAGraph, graph=self.graph, synchronize=lambda: None,
            set_stream=self.streams.append, default_stream=lambda: "default",
        )  # fmt: skip

    @contextmanager
    def graph(self, graph):
        before = self.now
        yield
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        graph.seconds, self.now = (self.now - before) / 2, before

    def call(self, seconds):
        def run():
            self.now += seconds
            self.log.append("call")

        return run


def test_a_runner_replays_a_graph_of_enough_calls():
    fake = FakeCuda()
    runner = cuda_device.Runner(fake, [fake.call(1e-4), fake.call(3e-4)])
    assert runner.how == "graph" and len(runner.calls) == 6  # 3 rounds take at least a millisecond
    fake.log.clear()
    assert runner.seconds() == pytest.approx(1e-4)  # a call takes 2e-4 in the mean, half of it in a graph
    assert fake.log == ["replay"]
    assert len(cuda_device.Runner(fake, [fake.call(1e-7)] * 3).calls) <= 200
    assert len(cuda_device.Runner(fake, [fake.call(1.0)]).calls) == 1


def test_a_runner_falls_back_to_events():
    fake = FakeCuda(fails=True)
    runner = cuda_device.Runner(fake, [fake.call(1e-3)])
    assert (runner.how, runner.why) == ("events", "operation not permitted when stream is capturing")
    assert fake.streams == ["default"] and runner.seconds() == pytest.approx(1e-3)
    assert cuda_device.Runner(FakeCuda(), [fake.call(1e-3)], graph=False).how == "events"


class FakeDriver:
    """A graph at 0xA000 with nodes of these kinds."""

    kinds = (0, 1, 0, 2, 0)

    def __init__(self, status=0):
        self.status = status

    def cuGraphGetNodes(self, graph, nodes, count):
        assert graph.value == 0xA000
        if nodes is None:
            count._obj.value = len(self.kinds)
        else:
            nodes[:] = [0xB000 + i for i in range(len(self.kinds))]
        return self.status

    def cuGraphNodeGetType(self, node, kind):
        kind._obj.value = self.kinds[node.value - 0xB000]
        return 0


@pytest.mark.parametrize("status, expected", [(0, (3, "graph")), (1, (7, "profiler"))])
def test_kernels_are_counted(monkeypatch, status, expected):
    """By the nodes of a graph, and where the driver does not tell them by the profiler."""
    fake = FakeCuda()
    fake.cuda.CUDAGraph = lambda keep_graph: SimpleNamespace(raw_cuda_graph=lambda: 0xA000)
    device = object.__new__(cuda_device.CudaDevice)
    device.torch = fake
    monkeypatch.setattr(cuda_device.ctypes, "CDLL", lambda name: FakeDriver(status))
    monkeypatch.setattr(device, "_profiled", lambda call: 7)
    assert device.count_kernels(fake.call(1e-6)) == expected
    assert fake.streams == (["default"] if status else [])


def test_samples_come_in_turn():
    seen = []

    def run():
        seen.append(len(seen))
        return float(seen[-1]), -float(seen[-1])

    a, b = cuda_device.sample(run, budget=0)
    assert a == [1, 2, 3, 4, 5] and b == [-1, -2, -3, -4, -5]


# Command line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_what_is_missing():
    with pytest.raises(SystemExit, match="sees no CUDA device.*--model"):
        cuda.main([])


def test_what_is_missing_is_told_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status = dict(is_built=lambda: False, is_available=lambda: False, why_none=lambda: "no driver")
    monkeypatch.setattr(subquad, "cuda", SimpleNamespace(**status), raising=False)
    with pytest.raises(SystemExit, match="no CUDA kernels.*SUBQUAD_CUDA=ON"):
        cuda_device.open_device()
    monkeypatch.setattr(subquad.cuda, "is_built", lambda: True)
    with pytest.raises(SystemExit, match="sees no CUDA device: no driver"):
        cuda_device.open_device()


def test_lines_are_written_even_if_the_device_is_lost(monkeypatch, tmp_path):
    device = FakeDevice()
    monkeypatch.setattr(cuda, "open_device", lambda: device)
    monkeypatch.setattr(cuda.CudaBench, "__init__", small(cuda.CudaBench.__init__))

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    def fail(*args, **keywords):
        device.synchronize = device.free = lost
        raise RuntimeError("launch failed")

    monkeypatch.setattr(cuda, "expectation", fail)
    monkeypatch.setitem(cuda.PARTS, "expectation", lambda bench: cuda.each_operator(bench))
    monkeypatch.setattr(subquad, "bucket_gradient", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cuda.main(["--only", "expectation", "--json", str(tmp_path / "lines.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert lines[-1]["name"] == "bucket_gradient N=128" and lines[-1]["why"] == "RuntimeError: launch failed"
    assert {"machine", "commit", "value", "met"} <= set(lines[0])


def small(init):
    return lambda self, device, budget: init(self, device, budget, batch=1, heads=2, shrink=SHRINK)
