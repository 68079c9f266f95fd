"""How long a call takes: all of it, with L2 flushed before, as a median; and the ceilings of a device."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch

Call = Callable[[], object]
Flush = Literal["dirty", "clean", "none"]

# Several times the L2 of any GPU, and what triton.testing.do_bench takes.
FLUSH_BYTES = 256 * 2**20
_ESTIMATE_CALLS = 5
_MIN_CPU_CALLS = 3
_WARMUP_SHARE = 4  # of the measuring time
_CEILING_REP_MS = 200
_HOST_BLOCKS, _HOST_CALLS = 10, 20  # few enough calls that the launch queue never fills
_CAPTURE_WARMUP_CALLS = 3


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a device can do.

    Parameters
    ----------
    read_bandwidth_gbs : float
        GB/s of a maximum over a block of memory.
    matmul_tflops : float
        TFLOPS of a large matrix product.
    """

    read_bandwidth_gbs: float
    matmul_tflops: float


class Timer:
    """A clock for calls on one device.

    On a GPU a timing is what ``triton.testing.do_bench(return_mode="median")`` measures: between two events on the
    stream, around each call, after L2 was flushed; the host's work counts as far as it is not hidden behind the flush.
    On a CPU it is wall-clock time, without a flush.

    Parameters
    ----------
    device : torch.device
        Where the calls run.
    rep_ms : int
        Milliseconds of one timing; a quarter of it comes on top to warm up.
    flush : "dirty", "clean" or "none"
        How L2 is flushed; always ``"none"`` on a CPU. ``"dirty"`` fills a buffer, as do_bench does, and leaves lines
        that are written back during the call under test: some 10 us on an H100. ``"clean"`` reads the buffer instead.
    graph : bool
        Time the replay of a CUDA graph that holds one call.
    """

    def __init__(self, device: torch.device, *, rep_ms: int = 60, flush: Flush = "dirty", graph: bool = False) -> None:
        self.device = device
        self.rep_ms = rep_ms
        self._on_gpu = device.type == "cuda"
        self.flush: Flush = flush if self._on_gpu else "none"
        self.graph = graph
        if self._on_gpu:
            self._buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def ready(self, call: Call) -> Call:
        """What stands for ``call`` in a timing: itself, or the replay of a graph that it was captured in."""
        if not self.graph:
            return call
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_CAPTURE_WARMUP_CALLS):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
        return graph.replay

    def time_us(self, call: Call) -> float:
        """Median time of a call in microseconds."""
        if not self._on_gpu:
            return self._time_on_cpu(call)
        with torch.cuda.device(self.device):
            return self._time_on_gpu(call)

    def host_time_us(self, call: Call) -> float | None:
        """Microseconds that a call keeps the host busy, of calls enqueued one after the other; None on a CPU.

        The least of several blocks of calls: whatever else a host does meanwhile only adds to it.
        """
        if not self._on_gpu:
            return None
        times_us = []
        for _ in range(_HOST_BLOCKS):
            call()
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            for _ in range(_HOST_CALLS):
                call()
            times_us.append((time.perf_counter() - begin) / _HOST_CALLS * 1e6)
        torch.cuda.synchronize(self.device)
        return min(times_us)

    def _time_on_cpu(self, call: Call) -> float:
        call()
        times: list[float] = []
        while len(times) < _MIN_CPU_CALLS or sum(times) < self.rep_ms * 1e-3:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times) * 1e6

    def _flush(self) -> None:
        if self.flush == "dirty":
            self._buffer.zero_()
        elif self.flush == "clean":
            self._buffer.max()

    def _time_on_gpu(self, call: Call) -> float:
        def event() -> torch.cuda.Event:
            return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

        call()
        torch.cuda.synchronize()
        begin, end = event(), event()
        begin.record()
        for _ in range(_ESTIMATE_CALLS):
            self._flush()
            call()
        end.record()
        torch.cuda.synchronize()
        estimate_ms = begin.elapsed_time(end) / _ESTIMATE_CALLS
        count = max(1, int(self.rep_ms / estimate_ms))
        for _ in range(max(1, count // _WARMUP_SHARE)):
            call()
        pairs = [(event(), event()) for _ in range(count)]
        for begin, end in pairs:
            self._flush()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times_ms: list[float] = [begin.elapsed_time(end) for begin, end in pairs]
        return statistics.median(times_ms) * 1e3


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure read bandwidth and matrix product rate of a device, now: both move with temperature and power.

    On a GPU a maximum over 2 GiB and an 8192^3 product in bfloat16; on a CPU 256 MiB and 1024^3 in float32, in which
    its kernels compute.
    """
    on_gpu = device.type == "cuda"
    block_bytes, size = (2**31, 8192) if on_gpu else (2**28, 1024)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    timer = Timer(device, rep_ms=_CEILING_REP_MS)
    block = torch.randn(block_bytes // 4, device=device)
    bandwidth_gbs = block_bytes / timer.time_us(block.max) * 1e-3
    del block
    left, right = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))
    return Ceilings(bandwidth_gbs, 2 * size**3 / timer.time_us(lambda: left @ right) * 1e-6)
