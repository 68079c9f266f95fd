"""The benchmark of further kernels: what it times, that results are compared with what is right, and what is kept."""

import dataclasses
import sys
import types

import pytest
import torch

import tilemla
from bench_records import context_of, record_of, run_bench
from tilemla.bench.further import FurtherCase, further_cases
from tilemla.bench.further_calls import Exact, make_further_inputs, prepare_further
from tilemla.bench.jobs import plan_jobs
from tilemla.bench.peers import OURS, FlashMLA
from tilemla.bench.record import PeerTime, Record, TimingMode
from tilemla.bench.report import make_table
from tilemla.bench.run import measure
from tilemla.bench.timing import Timer

CPU = torch.device("cpu")
CASES = (
    FurtherCase("mla_decode", "dense_fp8", 2, 2, 3, 70),
    FurtherCase("mla_decode", "fp8_656", 2, 2, 3, 70),
    FurtherCase("mla_sparse_decode", "fp8_656", 2, 2, 3, 200, 70),
    FurtherCase("mla_sparse_decode", "fp8_584", 1, 1, 3, 200, 70),
    FurtherCase("mla_sparse_decode", "dense", 1, 2, 3, 200, 70),
    FurtherCase("mla_sparse_prefill", "dense", 1, 5, 3, 200, 70),
)
PREFILL = CASES[-1]


@pytest.fixture
def peer(monkeypatch):
    """A module with FlashMLA's API that is not ours by name, and whose functions a test may replace."""
    module = types.ModuleType("a_peer")
    for name in ("get_mla_metadata", "flash_mla_with_kvcache", "flash_mla_sparse_fwd"):
        setattr(module, name, getattr(tilemla, name))
    module.get_mla_metadata_dense_fp8 = tilemla.get_mla_metadata_dense_fp8
    module.flash_mla_with_kvcache_fp8 = tilemla.flash_mla_with_kvcache_fp8
    monkeypatch.setitem(sys.modules, "a_peer", module)
    return module


def measure_on_cpu(case, peers=()):
    timer = Timer(CPU, rep_ms=1)
    return measure(case, context_of(timing=TimingMode("none", rounds=2, rep_ms=1)), peers, timer, CPU, "further")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_is_timed_beside_a_peer_and_its_errors_are_found(case, peer):
    record = measure_on_cpu(case, [FlashMLA("a_peer", peer)])
    assert not record.failures
    [other] = record.peers
    assert record.time_us > 0 and other.time_us > 0
    assert 1e-5 < record.error < 6e-3
    assert other.error == record.error
    assert record.context.spec == case.spec("cpu")
    again = Record.from_dict(record.to_dict())
    assert (again.case, again.context.spec) == (case, record.context.spec)
    assert again.error == pytest.approx(record.error, abs=1e-7)
    assert again.peers[0].error == pytest.approx(record.error, abs=1e-7)


def test_a_wrong_answer_is_no_time(peer):
    def wrong(*arguments):
        out, max_logits, lse = tilemla.flash_mla_sparse_fwd(*arguments)
        return out.roll(1, dims=1), max_logits, lse

    peer.flash_mla_sparse_fwd = wrong
    record = measure_on_cpu(PREFILL, [FlashMLA("a_peer", peer)])
    assert not record.peers
    assert "differs from ours" in record.failures["a_peer"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_error_of_another_result_is_seen(case):
    inputs = make_further_inputs(case, CPU)
    out, _ = OURS.prepare_further(case, inputs)()
    exact = Exact(case, inputs)
    off = out.clone()
    off.view(-1)[5] += 1
    assert exact.error_of(off) > 20 * exact.error_of(out)


def test_a_peer_gets_the_descales_of_e4m3_where_it_wants_them(peer):
    """FlashMLA itself has no function of its own for e4m3."""
    given = {}

    def decode(*arguments, **keywords):
        given.update(keywords, schedule=arguments[5:7])
        return arguments

    del peer.get_mla_metadata_dense_fp8, peer.flash_mla_with_kvcache_fp8
    peer.flash_mla_with_kvcache = decode
    peer.get_mla_metadata = lambda *arguments: ("metadata", arguments[1:])
    inputs = make_further_inputs(CASES[0], CPU)
    prepare_further("a_peer", CASES[0], inputs)()
    assert given["schedule"] == ("metadata", (6, 1, 3, True))
    assert given["causal"] is True and "is_fp8_kvcache" not in given
    assert given["descale_q"].item() == given["descale_k"].item() == 1


@pytest.mark.parametrize(
    "case, name, flop, num_bytes",
    [
        (CASES[0], "e4m3 b2 L70 h3 s2 causal", 2 * 12 * 70 * 1088, 140 * 576 + 12 * (576 + 1024)),
        (CASES[1], "fp8_656 b2 L70 h3 s2 causal", 2 * 12 * 70 * 1088, 140 * 656 + 12 * (1152 + 1024)),
        (CASES[2], "sparse fp8_656 b2 s2 h3 topk70", 2 * 12 * 70 * 1088, 200 * 656 + 280 * 4 + 12 * (1152 + 1024)),
        (CASES[3], "sparse fp8_584 b1 s1 h3 topk70", 2 * 3 * 70 * 1024, 70 * 584 + 70 * 4 + 3 * (1024 + 1024)),
        (CASES[4], "sparse bf16 b1 s2 h3 topk70", 2 * 6 * 70 * 1088, 140 * 1152 + 140 * 4 + 6 * (1152 + 1024)),
        (PREFILL, "prefill bf16 s5 h3 topk70", 2 * 15 * 70 * 1088, 200 * 1152 + 350 * 4 + 15 * (1152 + 1024)),
    ],
    ids=str,
)
def test_flop_and_bytes_by_hand(case, name, flop, num_bytes):
    assert (str(case), case.flop, case.num_bytes) == (name, flop, num_bytes)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(kv_format="dense_fp8"), "kv_format of mla_sparse_decode must be one of dense, fp8_656, fp8_584"),
        (dict(dtype="float16"), "dtype must be bfloat16 for a fp8_656 cache, got 'float16'"),
        (dict(topk=0), "topk must be more than 0 for mla_sparse_decode, got 0"),
        (dict(kernel="mla_decode"), "topk must be 0 for mla_decode, got 70"),
    ],
)
def test_a_case_without_a_kernel_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(CASES[2], **changes)


def test_the_list_holds_what_is_asked_of_these_kernels():
    jobs = plan_jobs(["further"], match="sparse")
    assert all(job.case.kernel == "mla_sparse_decode" for job in jobs)
    assert {job.case.num_heads_q for job in jobs if job.case.batch_size == 128} == {64, 128}
    assert len({str(case) for case in further_cases()}) == len(list(further_cases()))
    with pytest.raises(ValueError, match="dtype must be bfloat16"):
        plan_jobs(["further"], dtype="float16")
    assert "--cases: dtype must be bfloat16" in run_bench("--cases", "further", "--dtype", "float16").output


def test_the_table_shows_errors_where_there_are_some():
    peers = (PeerTime("a_peer", 90.0, 0.9, error=0.0107), PeerTime("another", 80.0, 0.8))
    with_errors = record_of(case=PREFILL, error=0.0017, peers=peers)
    headers = [str(column.header) for column in make_table([with_errors]).columns]
    assert headers.count("error 1e-3") == 2
    cells = [list(column.cells) for column in make_table([with_errors]).columns]
    assert ["1.70"] in cells and ["10.70"] in cells
    assert "error 1e-3" not in [str(column.header) for column in make_table([record_of()]).columns]
