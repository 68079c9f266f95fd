"""Measurements that were never taken, and the benchmark's command, for tests of what becomes of them."""

import dataclasses
from pathlib import Path

from click.testing import CliRunner

from tilemla.bench.cases import GridCase
from tilemla.bench.record import Record, RunContext
from tilemla.cli.bench import bench
from tilemla.spec import KernelSpec

ROOT = Path(__file__).resolve().parent.parent
H100_LOG = ROOT / "tuning_logs" / "mla_decode_sm_90a_bf16_dense_d576_v512_p64_m64" / "h100.bench.jsonl"


def run_bench(*arguments):
    return CliRunner().invoke(bench, [str(argument) for argument in arguments])


def context_of(**changes):
    context = RunContext(KernelSpec(arch="cpu"), "cpu", {"tilemla": "0"}, "2026-01-01T00:00:00+00:00", 20.0, 0.1)
    return dataclasses.replace(context, **changes)


CASE = GridCase(2, 256, 16, 1)


def record_of(case=CASE, time_us=100.0, **changes):
    return dataclasses.replace(Record(context_of(), case, time_us), **changes)


def assert_picture(path):
    from matplotlib.image import imread

    pixels = imread(path)
    height, width, _ = pixels.shape
    assert 1000 <= width <= 3000 and 600 <= height <= 2000
    assert len({pixel.tobytes() for row in pixels[::7] for pixel in row[::7]}) > 20
