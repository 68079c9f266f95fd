"""``python -m tilemla.demo``: generate modules, decode a paged batch, compare with float64."""

from __future__ import annotations

import math
import statistics
import sys
import time

import torch

from tilemla import flash_mla_with_kvcache, get_mla_metadata
from tilemla.generate import run_side_by_side
from tilemla.loader import ensure_module
from tilemla.progress import show_progress
from tilemla.spec import KernelSpec, select_specs
from tilemla.store import Entry

LENGTHS = (1, 63, 64, 700, 0, 4100, 129, 2900)
NUM_HEADS_Q, NUM_HEADS_K, SEQ_LEN_Q = 16, 1, 2
HEAD_DIM_QK, HEAD_DIM_V, PAGE_BLOCK_SIZE = 576, 512, 64
SPARE_PAGES = 7
# FlashMLA's bounds for `out`: absolute, or relative; and for the cosine difference.
OUT_ABS, OUT_REL, COSINE = 8e-4, 2.01 / 128, 5e-6
LSE_ABS, LSE_REL = 1e-6, 8.01 / 65536
_TIMED_CALLS = 5


def make_batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of very different lengths: shuffled pages, NaN in unused slots and pages, garbage in unused entries."""
    generator = torch.Generator().manual_seed(0)
    num_pages = [-(-length // PAGE_BLOCK_SIZE) for length in LENGTHS]
    num_blocks = sum(num_pages) + SPARE_PAGES
    q = torch.randn((len(LENGTHS), SEQ_LEN_Q, NUM_HEADS_Q, HEAD_DIM_QK), generator=generator).to(dtype)
    k_cache = torch.full((num_blocks, PAGE_BLOCK_SIZE, NUM_HEADS_K, HEAD_DIM_QK), math.nan, dtype=dtype)
    block_table = torch.full((len(LENGTHS), max(num_pages) + 1), 2147480000, dtype=torch.int32)
    pages = iter(torch.randperm(num_blocks, generator=generator).tolist())
    for request, length in enumerate(LENGTHS):
        for column in range(num_pages[request]):
            page, used = next(pages), min(length - column * PAGE_BLOCK_SIZE, PAGE_BLOCK_SIZE)
            block_table[request, column] = page
            k_cache[page, :used] = torch.randn((used, NUM_HEADS_K, HEAD_DIM_QK), generator=generator).to(dtype)
    return q, k_cache, block_table, torch.tensor(LENGTHS, dtype=torch.int32)


def attend_float64(
    q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal decode in float64 by walking ``block_table``: ``out`` and ``softmax_lse``."""
    batch_size, seq_len_q, num_heads_q, head_dim_qk = q.shape
    out = torch.zeros((batch_size, seq_len_q, num_heads_q, HEAD_DIM_V), dtype=torch.float64)
    softmax_lse = torch.full((batch_size, num_heads_q, seq_len_q), math.inf, dtype=torch.float64)
    for request, length in enumerate(cache_seqlens.tolist()):
        pages = block_table[request, : -(-length // PAGE_BLOCK_SIZE)].long()
        keys = k_cache[pages].reshape(-1, head_dim_qk)[:length].double()
        for query in range(seq_len_q):
            visible = keys[: max(length - seq_len_q + query + 1, 0)]
            if len(visible):
                scores = q[request, query].double() @ visible.T * head_dim_qk**-0.5
                softmax_lse[request, :, query] = scores.logsumexp(-1)
                out[request, query] = scores.softmax(-1) @ visible[:, :HEAD_DIM_V]
    return out, softmax_lse


def decode_and_compare(device: torch.device, dtype: torch.dtype) -> bool:
    """Decode the batch on a device, print errors and time, and tell whether the errors are within bounds."""
    batch = make_batch(dtype)
    expected_out, expected_lse = attend_float64(*batch)
    q, k_cache, block_table, cache_seqlens = (tensor.to(device) for tensor in batch)
    schedule = get_mla_metadata(cache_seqlens, SEQ_LEN_Q * NUM_HEADS_Q // NUM_HEADS_K, NUM_HEADS_K)
    num_splits = schedule[1].diff().tolist()

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        result = flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, HEAD_DIM_V, *schedule, causal=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    out, lse = (tensor.cpu().double() for tensor in call())
    times_us = []
    for _ in range(_TIMED_CALLS):
        began = time.perf_counter()
        call()
        times_us.append((time.perf_counter() - began) * 1e6)

    print(f"\n{str(dtype).removeprefix('torch.')} on {device}: {statistics.median(times_us):,.0f} us a call")
    print(f"{'request':>9}{'tokens':>9}{'splits':>9}{'out error':>13}{'cosine diff':>13}{'lse error':>13}")
    all_right = True
    for request, length in enumerate(LENGTHS):
        right, row = compare(out[request], expected_out[request], lse[request], expected_lse[request])
        all_right &= right
        print(f"{request:>9}{length:>9}{num_splits[request]:>9}{row}{'' if right else '  WRONG'}")
    return all_right


def compare(
    out: torch.Tensor, expected_out: torch.Tensor, lse: torch.Tensor, expected_lse: torch.Tensor
) -> tuple[bool, str]:
    """Whether a request's result is within bounds, and its errors as text."""
    out_error = (out - expected_out).abs()
    norms = float((out * out + expected_out * expected_out).sum())
    cosine = 1 - 2 * float((out * expected_out).sum()) / norms if norms else 0.0
    seen = torch.isfinite(expected_lse)
    lse_error = (lse[seen] - expected_lse[seen]).abs()
    right = (
        bool(((out_error <= OUT_ABS) | (out_error <= OUT_REL * expected_out.abs())).all())
        and abs(cosine) < COSINE
        and torch.equal(torch.isposinf(lse), torch.isposinf(expected_lse))
        and bool(((lse_error <= LSE_ABS) | (lse_error <= LSE_REL * expected_lse[seen].abs())).all())
    )
    largest_lse_error = float(lse_error.max()) if len(lse_error) else 0.0
    return right, f"{float(out_error.max()):>13.1e}{abs(cosine):>13.1e}{largest_lse_error:>13.1e}"


def report_module(entry: Entry) -> None:
    """Say what a module is and, for each kernel, what it uses."""
    print(f"  {entry.library.name}")
    for kernel in entry.manifest.kernels:
        spills = kernel.spill_store_bytes + kernel.spill_load_bytes
        print(
            f"    {kernel.name}: {kernel.registers} registers, {spills} bytes spilled, "
            f"{kernel.smem_bytes:,} bytes of shared memory"
        )


def build_all() -> tuple[dict[str, list[Entry]], dict[str, str]]:
    """Find or generate every module: those that are there, and what went wrong, by architecture."""
    with show_progress() as progress:

        def make(spec: KernelSpec) -> tuple[Entry, bool]:
            return ensure_module(spec, lambda step: progress.step(spec.name, step)).entry, True

        outcomes = run_side_by_side(
            select_specs(presets=("deepseek-v3",)),
            make,
            on_done=lambda outcome: progress.done(
                outcome.item.name, "failed" if outcome.error else f"ready after {outcome.seconds:.1f} s"
            ),
        )
    built: dict[str, list[Entry]] = {}
    problems: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.entry is not None:
            built.setdefault(outcome.item.arch, []).append(outcome.entry)
        elif outcome.error is not None:
            problems[outcome.item.arch] = outcome.error
    return built, problems


def main() -> int:
    """Run the demo; the exit status is 0 when everything that could run was right."""
    tokens = f"{sum(LENGTHS):,} tokens in {len(LENGTHS)} requests, {SEQ_LEN_Q} queries of {NUM_HEADS_Q} heads each"
    print(f"MLA decode: {tokens}, shuffled pages of {PAGE_BLOCK_SIZE}, NaN in unused slots", flush=True)
    failed = False
    built, problems = build_all()
    devices = [torch.device("cpu")] if "cpu" in built else []
    if "sm_90a" in built and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    for device in devices:
        for dtype in (torch.bfloat16, torch.float16):
            failed |= not decode_and_compare(device, dtype)

    for arch, modules in built.items():
        print(f"\n{arch} modules in {modules[0].directory.parent}:")
        for entry in modules:
            report_module(entry)
    for arch, problem in problems.items():
        if arch == "sm_90a" and "no nvcc was found" in problem:
            print("\nsm_90a modules were not built: there is no nvcc here")
        else:
            failed = True
            print(f"\n{arch} modules were not built: {problem}", file=sys.stderr)
    print("\n" + ("Something is wrong, see above." if failed else "Everything agrees with float64."))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
