"""The published benchmark: ``python tests/test_flash_mla.py`` checks and times FlashMLA's grid.

On a GPU it checks over a thousand cases against float64, then times the 32 cases of the grid, beside FlashMLA where one
is importable. On a CPU it does the same over a small grid. Under pytest it checks the small grid, and the large one
where there is a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest

import tilemla
from cases import HEAD_DIM_QK, HEAD_DIM_V
from flash_mla_cases import (
    GridCase,
    GridInputs,
    benchmark_grid,
    correctness_cases,
    make_grid_inputs,
    small_grid,
)
from reference import check_result, reference_of
from tilemla.loader import load_module
from tilemla.spec import KernelSpec

PEERS = ("flash_mla", "sgl_kernel.flash_mla")
BYTES_PER_ELEMENT = 2


def schedule_for(api, case: GridCase, inputs: GridInputs):
    """The scheduling arguments of an implementation of FlashMLA's API, in its tuple form."""
    tokens_per_head_k = case.seq_len_q * case.num_heads_q // case.num_heads_k
    return api.get_mla_metadata(inputs.cache_seqlens, tokens_per_head_k, case.num_heads_k)


def call(api, case: GridCase, inputs: GridInputs, schedule):
    return api.flash_mla_with_kvcache(
        inputs.q,
        inputs.k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        HEAD_DIM_V,
        *schedule,
        causal=case.causal,
    )


def check(case: GridCase, device: torch.device) -> None:
    """Against float64, twice for the same bits, with inputs that hold NaN wherever nothing may be read."""
    inputs = make_grid_inputs(case, device)
    schedule = schedule_for(tilemla, case, inputs)
    out, lse = call(tilemla, case, inputs, schedule)
    again, lse_again = call(tilemla, case, inputs, schedule)
    check_result(out, lse, reference_of(inputs, causal=case.causal))
    if not (torch.equal(out, again) and torch.equal(lse, lse_again)):
        raise AssertionError("the same inputs gave other bits")


def flop_of(case: GridCase, inputs: GridInputs) -> int:
    return 2 * case.seq_len_q * case.num_heads_q * sum(inputs.lengths) * (HEAD_DIM_QK + HEAD_DIM_V)


def bytes_of(case: GridCase, inputs: GridInputs) -> int:
    queries = case.batch_size * case.seq_len_q * case.num_heads_q
    elements = case.num_heads_k * sum(inputs.lengths) * HEAD_DIM_QK + queries * (HEAD_DIM_QK + HEAD_DIM_V)
    return BYTES_PER_ELEMENT * elements


def find_peer():
    """An importable FlashMLA, or None and why there is none."""
    reasons = []
    for name in PEERS:
        try:
            return importlib.import_module(name), name
        except Exception as error:  # a peer that is there but does not load is as good as none, and says why
            reasons.append(f"{name}: {error}")
    return None, "; ".join(reasons)


def time_us(function: Callable[[], object], device: torch.device, rep_ms: int) -> float:
    """Median time of a call, in microseconds; on a GPU with L2 flushed before each."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(function, warmup=rep_ms // 4, rep=rep_ms, return_mode="median") * 1e3
    function()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def measure_ceilings(device: torch.device) -> tuple[float, float]:
    """Read bandwidth (GB/s, a max over 2 GiB) and matrix product rate (TFLOPS, 8192^3 in bf16) of this device, now."""
    block = torch.randn(2**29, device=device)
    bandwidth_gbs = 2 * 2**30 / time_us(block.max, device, 200) * 1e-3
    del block
    left, right = (torch.randn((8192, 8192), dtype=torch.bfloat16, device=device) for _ in range(2))
    tflops = 2 * 8192**3 / time_us(lambda: left @ right, device, 200) * 1e-6
    return bandwidth_gbs, tflops


def run_checks(cases: list[GridCase], device: torch.device) -> int:
    failures = 0
    begin = time.perf_counter()
    for case in cases:
        try:
            check(case, device)
        except AssertionError as error:
            failures += 1
            print(f"FAIL {case}: {error}", flush=True)
    print(f"correctness: {len(cases) - failures} of {len(cases)} cases pass ({time.perf_counter() - begin:.0f} s)")
    return failures


def measure(case: GridCase, device: torch.device, peer, rounds: int, rep_ms: int) -> dict[str, float]:
    """Our time and rates, and the peer's, in turn; a ratio is the median of the ratios of neighbouring timings."""
    inputs = make_grid_inputs(case, device, poison=False)
    ours = functools.partial(call, tilemla, case, inputs, schedule_for(tilemla, case, inputs))
    theirs = functools.partial(call, peer, case, inputs, schedule_for(peer, case, inputs)) if peer else None
    times, peer_times = [], []
    for _ in range(rounds):
        times.append(time_us(ours, device, rep_ms))
        if theirs:
            peer_times.append(time_us(theirs, device, rep_ms))
    us = statistics.median(times)
    flop, num_bytes = flop_of(case, inputs), bytes_of(case, inputs)
    result = dict(time_us=us, tflops=flop / us * 1e-6, bandwidth_gbs=num_bytes / us * 1e-3)
    result |= dict(flop=flop, num_bytes=num_bytes)
    if theirs:
        ratio = statistics.median(b / a for a, b in zip(times, peer_times, strict=True))
        result |= dict(peer_time_us=statistics.median(peer_times), peer_over_ours=ratio)
    return result


def run_grid(cases: list[GridCase], device: torch.device, rounds: int, rep_ms: int, log: Path | None) -> None:
    """A line per case: time, rates, the peer's time, the ratio to the peer and to the floor."""
    peer, peer_name = find_peer()
    print(f"peer: {peer_name}" if peer else f"peer: none ({peer_name})")
    ceilings = None
    versions = {name: importlib.metadata.version(name) for name in ("tilemla", "torch")}
    context = dict(
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        versions=versions | {"cuda": torch.version.cuda},
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        peer=peer_name if peer else None,
    )
    if device.type == "cuda":
        ceilings = measure_ceilings(device)
        context |= dict(read_bandwidth_gbs=round(ceilings[0]), matmul_tflops=round(ceilings[1]))
        print(f"{context['gpu']}: {ceilings[0]:.0f} GB/s read, {ceilings[1]:.0f} TFLOPS bf16 8192^3")
    print(f"{'case':36} {'us':>9} {'TFLOPS':>7} {'GB/s':>6} {'peer us':>9} {'peer/ours':>9} {'floor/ours':>10}")
    for case in cases:
        result = measure(case, device, peer, rounds, rep_ms)
        line = f"{case!s:36} {result['time_us']:9.1f} {result['tflops']:7.1f} {result['bandwidth_gbs']:6.0f}"
        if peer:
            line += f" {result['peer_time_us']:9.1f} {result['peer_over_ours']:9.3f}"
        else:
            line += f" {'-':>9} {'-':>9}"
        if ceilings:
            floor_us = max(result["num_bytes"] / ceilings[0] * 1e-3, result["flop"] / ceilings[1] * 1e-6)
            result["floor_over_ours"] = floor_us / result["time_us"]
            line += f" {result['floor_over_ours']:10.3f}"
        print(line, flush=True)
        if log:
            spec = KernelSpec(
                arch="sm_90a" if device.type == "cuda" else "cpu", dtype=str(case.dtype).removeprefix("torch.")
            )
            shape = dataclasses.asdict(case) | dict(total_tokens=sum(case.make_lengths()))
            del shape["dtype"]  # the spec has it
            record = dict(spec=spec.to_dict(), shape=shape) | {key: round(value, 4) for key, value in result.items()}
            record |= context
            record["versions"] = context["versions"] | {"source_key": load_module(spec).manifest.source_key}
            with log.open("a") as lines:
                lines.write(json.dumps(record) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-check", action="store_true", help="time only")
    parser.add_argument("--no-bench", action="store_true", help="check only")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of timings, ours and the peer's in turn")
    parser.add_argument("--rep-ms", type=int, default=60, help="milliseconds of one timing")
    parser.add_argument("--log", type=Path, help="a JSONL file to add a record per case to")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    failures = 0
    if not arguments.no_check:
        failures = run_checks(list(correctness_cases() if on_gpu else small_grid()), device)
    if not arguments.no_bench:
        cases = list(benchmark_grid() if on_gpu else small_grid())
        run_grid(cases, device, arguments.rounds, arguments.rep_ms, arguments.log)
    return 1 if failures else 0


@pytest.mark.parametrize("case", list(small_grid())[::3], ids=str)
def test_small_grid(case):
    check(case, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 2, 6, 64, 128])
def test_correctness_cases(batch_size):
    cases = [case for case in correctness_cases() if case.batch_size == batch_size]
    assert run_checks(cases, torch.device("cuda", 0)) == 0


def test_there_are_a_thousand_cases():
    cases = list(correctness_cases())
    assert len(cases) >= 1000
    assert len(list(benchmark_grid())) == 32
    assert {case.batch_size for case in cases} == {1, 2, 6, 64, 128}


if __name__ == "__main__":
    sys.exit(main())
