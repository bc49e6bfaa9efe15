"""The CUDA device that is measured: what it is, its ceilings, and times by CUDA graphs."""

from __future__ import annotations

import ctypes
import gc
import math
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable

import subquad
from bench.timing import Pair, Spread

Call = Callable[[], object]
KERNEL_NODE = 0  # CU_GRAPH_NODE_TYPE_KERNEL


def open_device():
    """The first CUDA device of torch.
    @raises SystemExit with what is missing."""
    hint = "(python -m bench cuda --model needs none)"
    try:
        import torch
    except ImportError:
        raise SystemExit(f"bench: torch is not installed; it is what is compared with {hint}") from None
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        raise SystemExit(f"bench: torch {torch.__version__}, {built}, sees no CUDA device {hint}")
    if not subquad.cuda.is_built():
        raise SystemExit(f"bench: this subquad has no CUDA kernels: build it with SUBQUAD_CUDA=ON {hint}")
    if not subquad.cuda.is_available():
        raise SystemExit(f"bench: subquad sees no CUDA device: {subquad.cuda.why_none()} {hint}")
    return CudaDevice(torch)


class Runner:
    """Some calls in a row, in a CUDA graph if they can be captured; `seconds` is the time of one call."""

    def __init__(self, torch, calls: list[Call], graph: bool = True, at_least: float = 1e-3):
        self.torch, self.calls, self.graph, self.why = torch, calls, None, ""
        for call in calls:
            call()
        torch.cuda.synchronize()
        estimate = min(self._events(self._loop) for _ in range(2))
        repeats = max(1, min(200 // len(calls), math.ceil(at_least / max(estimate, 1e-7))))
        self.calls = calls * repeats
        if graph:
            self._capture(len(calls))

    @property
    def how(self) -> str:
        return "graph" if self.graph else "events"

    def _loop(self) -> None:
        for call in self.calls:
            call()

    def _capture(self, alive: int) -> None:
        """Results live as long as those of a whole round of inputs, so that they take turns in memory too."""
        torch, graph = self.torch, self.torch.cuda.CUDAGraph()
        try:
            results: deque = deque(maxlen=alive)
            with torch.cuda.graph(graph):
                for call in self.calls:
                    results.append(call())
            results.clear()
            self.graph = graph
            self.seconds()
        except RuntimeError as error:
            # A capture that failed leaves its stream behind.
            torch.cuda.set_stream(torch.cuda.default_stream())
            torch.cuda.synchronize()
            self.graph, self.why = None, str(error).splitlines()[0]

    def _events(self, run: Call) -> float:
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def seconds(self) -> float:
        return self._events(self.graph.replay if self.graph else self._loop) / len(self.calls)


class CudaDevice:
    kind = "cuda"

    def __init__(self, torch):
        self.torch = torch
        properties = torch.cuda.get_device_properties(0)
        self.name, self.multiprocessors = properties.name, properties.multi_processor_count
        self.capability = f"{properties.major}.{properties.minor}"
        self.memory, self.l2 = properties.total_memory, getattr(properties, "L2_cache_size", 0) or 50 << 20
        self.copy_bandwidth = self.matrix_rate = math.nan

    def describe(self) -> str:
        return (
            f"{self.name}, {self.multiprocessors} multiprocessors, capability {self.capability}, "
            f"{self.memory / 2**30:.0f} GiB, L2 {self.l2 >> 20} MiB; torch {self.torch.__version__}"
        )

    def state(self) -> str:
        """Clocks, power and temperature as nvidia-smi sees them now; empty without it."""
        tool = shutil.which("nvidia-smi")
        if not tool:
            return ""
        fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
        command = [tool, f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"]
        result = subprocess.run(command, capture_output=True, text=True)
        return f"{fields}: {(result.stdout or result.stderr).strip()}"

    # Time

    def runner(self, calls: list[Call], graph: bool = True) -> Runner:
        return Runner(self.torch, calls, graph)

    def timed(self, calls: list[Call], budget: float, graph: bool = True) -> tuple[Spread, Runner]:
        runner = self.runner(calls, graph)
        return Spread.of(sample(lambda: (runner.seconds(),), budget)[0]), runner

    def paired(self, ours: list[Call], theirs: list[Call], budget: float, graph: bool = True) -> tuple[Pair, Runner]:
        """The two in turn, as bench.timing does on the CPU."""
        a, b = self.runner(ours, graph), self.runner(theirs, graph)
        x, y = sample(lambda: (a.seconds(), b.seconds()), budget)
        return Pair(Spread.of(x), Spread.of(y), Spread.of([t / s for s, t in zip(x, y, strict=True)])), a

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        self.torch.cuda.empty_cache()

    # Ceilings

    def measure_ceilings(self, budget: float) -> dict[str, float]:
        self.copy_bandwidth, self.matrix_rate = self._copy_bandwidth(budget), self._matrix_rate(budget)
        self.free()
        return {"copy GB/s": self.copy_bandwidth / 1e9, "matrix TFLOP/s": self.matrix_rate / 1e12}

    def _copy_bandwidth(self, budget: float) -> float:
        size = min(2 << 30, self.memory // 16)
        a, b = (self.torch.empty(size, dtype=self.torch.uint8, device=self.kind).random_() for _ in range(2))
        return 2 * size / self.timed([lambda: a.copy_(b)], budget)[0].median

    def _matrix_rate(self, budget: float, n: int = 8192) -> float:
        a, b = (self.torch.randn(n, n, device=self.kind, dtype=self.torch.bfloat16) for _ in range(2))
        return 2 * n**3 / self.timed([lambda: a @ b], budget)[0].median

    def measure_launches(self, budget: float) -> dict[str, float]:
        """Microseconds from one small kernel to the next: started one by one, and in a graph."""
        x = self.torch.zeros(32, device=self.kind)
        add = [lambda: x.add_(1)] * 100
        found = {"eager us": self.timed(add, budget, graph=False)[0].median * 1e6}
        return found | {"in a graph us": self.timed(add, budget)[0].median * 1e6}

    # Kernels of a call

    def count_kernels(self, call: Call) -> tuple[int, str]:
        """How many kernels a call launches, and who says so: the driver of a captured graph, or the profiler."""
        call()
        self.synchronize()
        try:
            return self._nodes(call), "graph"
        except (RuntimeError, OSError, AttributeError, TypeError):
            self.torch.cuda.set_stream(self.torch.cuda.default_stream())
            self.synchronize()
            return self._profiled(call), "profiler"

    def _nodes(self, call: Call) -> int:
        graph = self.torch.cuda.CUDAGraph(keep_graph=True)
        with self.torch.cuda.graph(graph):
            call()
        driver, raw = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph())
        count = ctypes.c_size_t(0)
        if driver.cuGraphGetNodes(raw, None, ctypes.byref(count)):
            raise RuntimeError("the driver does not tell the nodes of a graph")
        nodes = (ctypes.c_void_p * count.value)()
        if count.value and driver.cuGraphGetNodes(raw, nodes, ctypes.byref(count)):
            raise RuntimeError("the driver does not tell the nodes of a graph")
        kinds = []
        for node in nodes:
            kind = ctypes.c_int(-1)
            if driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)):
                raise RuntimeError("the driver does not tell the type of a node")
            kinds.append(kind.value)
        return kinds.count(KERNEL_NODE)

    def _profiled(self, call: Call) -> int:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            call()
            self.synchronize()
        on_device = [e.name for e in found.events() if "CUDA" in str(e.device_type)]
        return sum(not name.startswith(("Memcpy", "Memset", "Activity")) for name in on_device)


def sample(run: Callable[[], tuple[float, ...]], budget: float, at_least: int = 5) -> list[list[float]]:
    """Columns of repeated measurements that take about `budget` seconds together, after one for warming up."""
    run()
    rows: list[tuple[float, ...]] = []
    start = time.perf_counter()
    while len(rows) < at_least or time.perf_counter() - start < budget:
        rows.append(run())
    return [list(column) for column in zip(*rows, strict=True)]
