"""The kernel that only reads: that it reads each page of a call once, and how fast."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilemla.bench.cases import GridCase
from tilemla.bench.inputs import make_inputs
from tilemla.bench.reading import PageReader, find_reader, spread_pages
from tilemla.bench.timing import Timer, measure_ceilings
from tilemla.spec import BENCHMARK_SPECS, SUPPORTED_SPECS, KernelSpec, select_specs

LONG = GridCase(128, 8192, 16, 1)


def walk(row, lengths):
    """The pages of a part, in the order of the kernel's walk."""
    begin, end_inclusive, begin_page, end_page, *rest = row
    assert rest == [0, 0, 0, 0]
    for request in range(begin, end_inclusive + 1):
        first = begin_page if request == begin else 0
        end = end_page if request == end_inclusive else -(-lengths[request] // 64)
        yield from ((request, page) for page in range(first, end))


@given(st.lists(st.integers(0, 700), min_size=0, max_size=20), st.integers(1, 40))
def test_each_page_is_in_one_part_and_parts_are_even(lengths, num_parts):
    rows = spread_pages(lengths, num_parts)
    parts = [list(walk(row, lengths)) for row in rows]
    assert len(parts) == num_parts
    every = [(request, page) for request, length in enumerate(lengths) for page in range(-(-length // 64))]
    assert [page for part in parts for page in part] == every
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(arch="cpu"), "read_pages of a dense cache has no program but for sm_90a, got arch 'cpu'"),
        (dict(page_block_size=16), "page_block_size must be 64 for read_pages, got 16"),
        (
            dict(kernel="write_pages"),
            "kernel must be one of mla_decode, mla_sparse_decode, mla_sparse_prefill, read_pages, got 'write_pages'",
        ),
    ],
)
def test_a_spec_without_a_program_says_why(changes, reason):
    assert KernelSpec(**(dict(kernel="read_pages") | changes)).why_invalid() == reason


def test_it_is_built_only_when_it_is_asked_for():
    kernels = {"mla_decode", "mla_sparse_decode", "mla_sparse_prefill"}
    assert {spec.kernel for spec in select_specs()} == {spec.kernel for spec in SUPPORTED_SPECS} == kernels
    assert tuple(select_specs(kernels=("read_pages",))) == BENCHMARK_SPECS
    assert all(spec.why_invalid() is None for spec in BENCHMARK_SPECS)
    names = [spec.name for spec in SUPPORTED_SPECS + BENCHMARK_SPECS]
    assert len(set(names)) == len(names)


def test_a_cpu_has_none():
    assert find_reader(torch.device("cpu"), "bfloat16") == "there is no kernel that only reads for cpu and bfloat16"


def test_a_missing_module_names_the_command_that_builds_it(serving_machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    reason = find_reader(torch.device("cuda", 0), "float16")
    assert reason.startswith(f"{BENCHMARK_SPECS[1].name} is not built and cannot be generated here: TILEMLA_BUILD")
    [command] = re.findall(r"`tilemla (build [^`]*) --out-dir DIR`", reason)
    assert "--kernel read_pages --arch sm_90a --dtype float16" in command


@pytest.fixture(scope="module")
def gpu():
    return torch.device("cuda", 0)


def time_us(case, inputs, flush="clean"):
    device = inputs.q.device
    return Timer(device, rep_ms=20, flush=flush).time_us(PageReader(device, case.dtype).prepare(case, inputs))


@pytest.mark.gpu
def test_it_runs_near_the_read_bandwidth(gpu):
    bandwidth_gbs = measure_ceilings(gpu).read_bandwidth_gbs
    inputs = make_inputs(LONG, gpu, poison=False)
    shares = {
        flush: LONG.page_bytes / time_us(LONG, inputs, flush) * 1e-3 / bandwidth_gbs for flush in ("dirty", "clean")
    }
    assert 0.94 < shares["dirty"] < shares["clean"] < 1.05


@pytest.mark.gpu
def test_it_follows_the_lengths_and_the_table(gpu):
    inputs = make_inputs(LONG, gpu, poison=False)
    whole = time_us(LONG, inputs)
    half = dataclasses.replace(LONG, mean_length=4096)
    halved = dataclasses.replace(
        inputs, cache_seqlens=inputs.cache_seqlens // 2, lengths=[length // 2 for length in inputs.lengths]
    )
    assert time_us(half, halved) == pytest.approx(whole / 2, rel=0.1)
    # One page for all: it comes from L2, which no 1.2 GB do.
    one_page = dataclasses.replace(inputs, block_table=torch.zeros_like(inputs.block_table))
    assert time_us(LONG, one_page) < 0.7 * whole


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lengths", [(0, 1, 64, 65, 0, 1000, 0), (0,), (9000,)], ids=str)
@pytest.mark.parametrize("num_heads_k", [1, 2, 200])
def test_odd_batches_are_read(gpu, dtype, lengths, num_heads_k):
    case = dataclasses.replace(GridCase.of_lengths(lengths, 400, 1), num_heads_k=num_heads_k, dtype=dtype)
    inputs = make_inputs(case, gpu, poison=True)
    before = inputs.k_cache.clone()
    PageReader(gpu, dtype).prepare(case, inputs)()
    torch.cuda.synchronize()
    assert torch.equal(before.view(torch.int16), inputs.k_cache.view(torch.int16))
