"""Correctness over FlashMLA's kinds of cases: ``python tests/test_flash_mla.py`` checks them all and counts.

On a GPU that is over a thousand cases against float64; on a CPU, the benchmark's small ones. Under pytest it checks the
small ones, and the large ones where there is a GPU. ``tilemla bench`` does the timing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from reference import check_result, reference_of
from schedules import spread_schedule
from tilemla.bench.cases import GridCase, cpu_cases, grid_cases, imbalanced_cases
from tilemla.bench.inputs import make_inputs
from tilemla.bench.peers import OURS

HEAD_COUNTS = ((1, 1), (3, 1), (9, 1), (16, 1), (63, 1), (64, 1), (126, 1), (128, 1), (6, 2), (9, 3), (64, 8))


def correctness_cases() -> Iterator[GridCase]:
    """Over 1,000 cases: batches, lengths fixed, varied and zero, head counts, queries, masks and dtypes."""
    shapes = itertools.product((1, 2, 6, 64, 128), (1, 2, 4), (20, 140, 4096), HEAD_COUNTS, (False, True))
    for seed, (batch_size, seq_len_q, mean_length, (num_heads_q, num_heads_k), causal) in enumerate(shapes):
        if batch_size * mean_length * num_heads_k > 128 * 4096:
            continue  # several KV heads and the longest lengths: the cache alone would be gigabytes
        for kind in ("fixed", "varied", "zero") if seed % 3 == 0 else (("fixed", "varied", "zero")[seed % 3],):
            yield GridCase(
                batch_size,
                mean_length,
                num_heads_q,
                seq_len_q,
                num_heads_k=num_heads_k,
                is_varied=kind != "fixed",
                has_zero_lengths=kind == "zero",
                causal=causal,
                dtype="float16" if seed % 4 == 3 else "bfloat16",
                seed=seed,
            )


def check(case: GridCase, device: torch.device) -> None:
    """Against float64, with inputs that hold NaN wherever nothing may be read.

    Twice for the same bits, and once more with the schedule that splits most.
    """
    inputs = make_inputs(case, device, poison=True)
    call = OURS.prepare(case, inputs)
    out, lse = call()
    again, lse_again = call()
    expected = reference_of(inputs, causal=case.causal)
    check_result(out, lse, expected)
    if not (torch.equal(out, again) and torch.equal(lse, lse_again)):
        raise AssertionError("the same inputs gave other bits")
    num_sm_parts = OURS.make_schedule(case, inputs)[0].shape[0]
    metadata, num_splits = map(torch.from_numpy, spread_schedule(case.make_lengths(), num_sm_parts))
    out, lse = OURS.prepare_with((metadata.to(device), num_splits.to(device)), case, inputs)()
    check_result(out, lse, expected)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    cases = [*correctness_cases(), *imbalanced_cases()] if device.type == "cuda" else list(cpu_cases())
    return 1 if run_checks(cases, device) else 0


@pytest.mark.parametrize("case", list(cpu_cases())[::3], ids=str)
def test_small_grid(case):
    check(case, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 2, 6, 64, 128])
def test_correctness_cases(batch_size):
    cases = [case for case in correctness_cases() if case.batch_size == batch_size]
    assert run_checks(cases, torch.device("cuda", 0)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(imbalanced_cases()), ids=str)
def test_imbalanced(case):
    check(case, torch.device("cuda", 0))


def test_there_are_a_thousand_cases():
    cases = list(correctness_cases())
    assert len(cases) >= 1000
    assert len(list(grid_cases())) == 32
    assert {case.batch_size for case in cases} == {1, 2, 6, 64, 128}


if __name__ == "__main__":
    sys.exit(main())
