"""The benchmark: what it times, that its ratios are right, and that a peer is called as it wants to be."""

import dataclasses
import functools
import itertools
import json
import sys
import time

import pytest
import torch

from bench_records import H100_LOG, context_of, record_of
from tilemla.bench.cases import CASE_LISTS, GridCase, grid_cases, select_cases, small_cases
from tilemla.bench.inputs import make_inputs
from tilemla.bench.jobs import Job, plan_jobs
from tilemla.bench.peers import OURS, FlashMLA, find_peers
from tilemla.bench.record import PeerTime, Record, Reference, TimingMode
from tilemla.bench.run import measure
from tilemla.bench.timing import Timer

CPU = torch.device("cpu")


def test_lists_hold_the_cases_that_targets_are_set_for():
    grid, small = list(grid_cases()), list(small_cases())
    assert len(grid) == len(set(grid)) == 32
    assert {case.batch_size for case in grid} == {128}
    assert {(case.batch_size, case.mean_length, case.num_heads_q) for case in small} >= {
        (1, 1024, 16),
        (1, 8192, 128),
        (4, 8192, 16),
        (32, 1024, 16),
        (32, 65536, 128),
    }
    [imbalanced] = CASE_LISTS["imbalanced"]()
    assert imbalanced.make_lengths() == [4641, 45118, 1730, 1696]
    assert (imbalanced.num_heads_q, imbalanced.seq_len_q) == (16, 4)
    assert str(imbalanced) == "b4 L4641,45118,1730,1696 h16k1 s4 causal bf16"


def test_even_cases_hold_the_tokens_of_the_varied_ones():
    varied = [case for case in grid_cases() if case.is_varied]
    even = list(CASE_LISTS["even"]())
    assert [case.total_tokens for case in even] == [case.total_tokens for case in varied]
    assert all(max(case.lengths) - min(case.lengths) <= 1 for case in even)
    assert str(even[0]).startswith("b128 L4116-4117 ")


def test_flop_and_bytes_are_those_of_the_published_log():
    for line in H100_LOG.read_text().splitlines():
        fields = json.loads(line)
        case = Record.from_dict(fields).case
        assert (case.flop, case.num_bytes) == (fields["flop"], fields["num_bytes"])


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(batch_size=3), "lengths must have batch_size = 3 entries, got 2"),
        (dict(lengths=(-1, 21)), "lengths must be 0 or more, got -1"),
        (dict(mean_length=11), "mean_length must be the mean of lengths, 10, got 11"),
        (dict(is_varied=True), "must be False beside lengths"),
        (dict(has_zero_lengths=True), "must be False beside lengths"),
        (dict(dtype="float32"), "dtype must be one of bfloat16, float16, got 'float32'"),
    ],
)
def test_a_case_that_contradicts_itself_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(GridCase.of_lengths((5, 15), 16, 1), **changes)


def test_cases_are_selected_by_list_name_and_dtype():
    names = [str(case) for _, case in select_cases(["cpu"], match="h16k1 s1")]
    assert names == ["b2 L256 h16k1 s1 causal bf16", "b2 L~256 h16k1 s1 causal bf16"]
    [(name, case)] = select_cases(["imbalanced", "cpu"], dtype="float16", match="L4641")
    assert (name, case.dtype) == ("imbalanced", "float16")


@pytest.mark.parametrize("lengths", [(130, 0, 64), (1,)], ids=str)
def test_inputs_hold_nan_exactly_where_nothing_may_be_read(lengths, device):
    case = GridCase.of_lengths(lengths, 16, 2)
    inputs = make_inputs(case, device, poison=True)
    is_used = torch.zeros(inputs.k_cache.shape[:2], dtype=torch.bool, device=device)
    for request, length in enumerate(lengths):
        for token in range(length):
            is_used[inputs.block_table[request, token // 64], token % 64] = True
    assert int(is_used.sum()) == sum(lengths)
    assert torch.equal(inputs.k_cache.isnan().all(-1).squeeze(2), ~is_used)
    assert inputs.cache_seqlens.tolist() == list(lengths)
    clean = make_inputs(case, device, poison=False)
    assert torch.equal(clean.k_cache[is_used], inputs.k_cache[is_used])
    assert bool(clean.k_cache.isfinite().all())
    assert torch.equal(clean.q, inputs.q) and bool((clean.q != 0).any())


class ScriptedClock:
    """A clock whose timings were written before, and that remembers whom it was asked to time."""

    def __init__(self, times_us):
        self.times_us = {name: iter(times) for name, times in times_us.items()}
        self.order = []

    def ready(self, call):
        return call

    def time_us(self, call):
        name = call.__name__
        self.order.append(name)
        return next(self.times_us[name])

    def host_time_us(self, call):
        return {"tilemla": 40.0, "other": 30.0, "another": 20.0}[call.__name__]


class Named:
    """Our own kernels under a name, so that a clock can tell who is calling."""

    version = None

    def __init__(self, name, change=lambda out: out):
        self.name = name
        self.change = change

    def prepare(self, case, inputs):
        decode = OURS.prepare(case, inputs)

        def call():
            out, lse = decode()
            return self.change(out), lse

        call.__name__ = self.name
        return call


def test_ratios_are_medians_of_neighbouring_pairs(monkeypatch):
    monkeypatch.setattr("tilemla.bench.run.OURS", Named("tilemla"))
    clock = ScriptedClock({"tilemla": [10.0, 20.0, 40.0], "other": [20.0, 30.0, 100.0]})
    context = context_of(timing=TimingMode("none", rounds=3))
    record = measure(GridCase(2, 20, 16, 1), context, [Named("other")], clock, CPU, "some list")
    # Of the ratios 2, 1.5 and 2.5; the ratio of the medians would be 1.5.
    assert record.peers == (PeerTime("other", 30.0, 2.0, 30.0),)
    assert (record.time_us, record.host_time_us, record.case_list) == (20.0, 40.0, "some list")
    assert clock.order == ["tilemla", "other", "other", "tilemla", "other", "tilemla"]


def test_replays_of_a_graph_have_no_host_time(monkeypatch):
    monkeypatch.setattr("tilemla.bench.run.OURS", Named("tilemla"))
    clock = ScriptedClock({"tilemla": [10.0]})
    context = context_of(timing=TimingMode("dirty", graph=True, rounds=1))
    assert measure(GridCase(1, 20, 16, 1), context, [], clock, CPU).host_time_us is None


class FakeReader:
    """Reads nothing."""

    def prepare(self, case, inputs):
        def call():
            return None

        call.__name__ = "reader"
        return call


def test_references_are_timed_in_turn_with_ours(monkeypatch):
    ours = Named("tilemla")
    monkeypatch.setattr("tilemla.bench.run.OURS", ours)
    prepared = []
    monkeypatch.setattr(
        ours, "prepare", lambda case, inputs: prepared.append(case) or Named.prepare(ours, case, inputs)
    )
    clock = ScriptedClock({"tilemla": [10.0, 9.0, 18.0, 20.0], "reader": [8.0, 18.0], "other": [20.0, 60.0]})
    bound_by_memory = context_of(timing=TimingMode("none", rounds=2), matmul_tflops=1e6)
    case = GridCase(2, 100, 16, 1, is_varied=True)
    record = measure(case, bound_by_memory, [Named("other")], clock, CPU, reader=FakeReader(), with_even=True)
    # The even call is ours, too: 9 of the first round, 18 of the second.
    assert clock.order == ["tilemla", "reader", "tilemla", "other", "other", "tilemla", "reader", "tilemla"]
    assert record.time_us == 15.0
    assert record.read_only == Reference(13.0, pytest.approx((0.8 + 0.9) / 2))
    assert record.even == Reference(13.5, pytest.approx(0.9))
    assert record.peers == (PeerTime("other", 40.0, 2.5, 30.0),)
    [varied, even] = prepared
    assert (varied, even.total_tokens) == (case, case.total_tokens)
    assert max(even.lengths) - min(even.lengths) <= 1


def test_everyone_begins_a_round_and_ends_one_as_often(monkeypatch):
    monkeypatch.setattr("tilemla.bench.run.OURS", Named("tilemla"))
    names = ["tilemla", "other", "another"]
    rounds = 2 * len(names)
    clock = ScriptedClock({name: [10.0] * rounds for name in names})
    context = context_of(timing=TimingMode("none", rounds=rounds))
    measure(GridCase(2, 100, 16, 1), context, [Named("other"), Named("another")], clock, CPU)
    turns = {tuple(clock.order[at : at + len(names)]) for at in range(0, len(clock.order), len(names))}
    assert turns == set(itertools.permutations(names))


def test_what_arithmetic_bounds_is_not_compared_with_reading(monkeypatch):
    monkeypatch.setattr("tilemla.bench.run.OURS", Named("tilemla"))
    context = context_of(timing=TimingMode("none", rounds=1), matmul_tflops=1e-6)
    clock = ScriptedClock({"tilemla": [10.0]})
    assert measure(GridCase(2, 20, 16, 1), context, [], clock, CPU, reader=FakeReader()).read_only is None
    assert clock.order == ["tilemla"]


def test_planning_is_timed_of_those_who_plan(monkeypatch):
    class PlanningClock(ScriptedClock):
        def time_us(self, call):
            if isinstance(call, functools.partial):
                metadata, _ = call()
                assert metadata.shape == (8, 8)
                self.order.append("plan")
                return 7.0
            return 10.0

        def host_time_us(self, call):
            return None

    clock = PlanningClock({})
    context = context_of(timing=TimingMode("none", rounds=1))
    peers = [Named("without"), FlashMLA("alike", OURS.api)]
    record = measure(GridCase(2, 20, 16, 1), context, peers, clock, CPU, with_planning=True)
    assert clock.order == ["plan", "plan"]
    assert record.planning_us == 7.0
    assert [(peer.name, peer.planning_us) for peer in record.peers] == [("without", None), ("alike", 7.0)]


def test_targets_are_a_run_of_every_list_in_its_mode():
    jobs = plan_jobs(["targets"], dtype="float16")
    assert {job.case.dtype for job in jobs} == {"float16"}
    modes = {}
    for job in jobs:
        modes.setdefault((job.case_list, job.flush, job.graph), []).append(job)
    assert {key: len(found) for key, found in modes.items()} == {
        ("grid", "dirty", False): 32,
        ("grid", "clean", False): 6,
        ("long", "dirty", False): 1,
        ("small", "dirty", False): 18,
        ("imbalanced", "dirty", False): 1,
        ("planning", "dirty", False): 3,
        ("small", "dirty", True): 1,
    }
    assert all(
        job.with_even == (job.case.is_varied and job.case_list == "grid" and job.flush == "dirty") for job in jobs
    )
    assert [job.case.batch_size for job in jobs if job.with_planning] == [1, 128, 1024]
    assert {(job.case.num_heads_q, job.case.seq_len_q) for job in modes["grid", "clean", False]} == {
        (heads, 1) for heads in (16, 32, 64)
    }
    [graph] = modes["small", "dirty", True]
    assert str(graph.case) == "b1 L1024 h16k1 s1 causal fp16"


def test_jobs_of_a_list_have_the_mode_of_the_run():
    [job] = plan_jobs(["small", "cpu"], match="b32 L65536 h128", flush="clean", graph=True)
    assert job == Job("small", GridCase(32, 65536, 128, 1), "clean", graph=True)
    with pytest.raises(ValueError, match="stands alone, got grid, targets"):
        plan_jobs(["grid", "targets"])
    assert len(plan_jobs(["targets"], match="b1 L1024 h16k1")) == 2


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda out: out.flip(2), "differs from ours by a cosine difference of"),
        (lambda out: out * torch.nan, "differs from ours by a cosine difference of nan"),
        (lambda out: out[:, :, :1], "has shape (2, 1, 1, 512), ours (2, 1, 16, 512)"),
        (lambda out: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["wrong", "nan", "shape", "raises"],
)
def test_a_peer_that_fails_or_is_wrong_gets_a_reason_and_no_time(change, reason):
    context = context_of(timing=TimingMode("none", rounds=1))
    record = measure(GridCase(2, 20, 16, 1), context, [Named("other", change)], Timer(CPU, rep_ms=1), CPU)
    assert record.peers == ()
    assert record.time_us > 0
    assert reason in record.failures["other"]


def test_time_on_a_cpu_is_that_of_a_warm_call():
    pauses = itertools.chain([0.1], itertools.repeat(0.002))
    calls = itertools.count()

    def call():
        next(calls)
        time.sleep(next(pauses))

    # Were the first call timed, it would use up the 50 ms, and two more would end the timing.
    assert 2000 <= Timer(CPU, rep_ms=50).time_us(call) < 20000
    assert next(calls) > 3


def test_rates_and_floor_follow_from_the_time():
    record = record_of(time_us=100.0)
    assert record.tflops == pytest.approx(2 * 16 * 512 * (576 + 512) / 100 * 1e-6)
    assert record.bandwidth_gbs == pytest.approx(2 * (512 * 576 + 2 * 16 * (576 + 512)) / 100 * 1e-3)
    # 20 GB/s would take 32.975 us, 0.1 TFLOPS 178.26 us.
    assert record.floor_over_ours == pytest.approx(1.7826, rel=1e-3)
    assert record_of(context=context_of(matmul_tflops=100.0)).floor_over_ours == pytest.approx(0.3297, rel=1e-3)
    assert record_of(context=context_of(matmul_tflops=None)).floor_over_ours is None


def test_auto_says_why_peers_cannot_be_imported(monkeypatch):
    for name in ("flash_mla", "sgl_kernel", "flashinfer"):
        monkeypatch.setitem(sys.modules, name, None)
    # No kernel runs: what is asked is only whether the import fails, which comes first.
    peers = find_peers(("auto",), torch.device("cuda", 0), "bfloat16")
    assert peers.found == ()
    assert set(peers.missing) == {"flash_mla", "sgl_kernel.flash_mla", "flashinfer"}
    assert all(reason.startswith("ModuleNotFoundError: ") for reason in peers.missing.values())


FAKE_FLASHINFER = """
import torch

class BatchMLAPagedAttentionWrapper:
    def __init__(self, workspace, backend):
        assert workspace.numel() * workspace.element_size() == 2**27 and backend == "fa3"

    def plan(self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size,
             causal, sm_scale, q_data_type, kv_data_type):
        assert {each.dtype for each in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)} == {torch.int32}
        assert (head_dim_ckv, head_dim_kpe, page_size) == (512, 64, 64) and q_data_type == kv_data_type
        self.arguments = qo_indptr, kv_indptr, kv_indices, kv_len_arr, causal, sm_scale

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache, return_lse):
        assert return_lse
        qo_indptr, kv_indptr, kv_indices, kv_len_arr, causal, sm_scale = self.arguments
        out, lse = torch.empty_like(q_nope), torch.empty(q_nope.shape[:2])
        for request, length in enumerate(kv_len_arr.tolist()):
            rows = slice(qo_indptr[request], qo_indptr[request + 1])
            pages = kv_indices[kv_indptr[request] : kv_indptr[request + 1]].long()
            ckv, kpe = (cache[pages].flatten(0, 1)[:length].float() for cache in (ckv_cache, kpe_cache))
            scores = (q_nope[rows].float() @ ckv.T + q_pe[rows].float() @ kpe.T) * sm_scale
            if causal:
                hidden = torch.ones(scores.shape[0], length).tril(length - scores.shape[0]) == 0
                scores.masked_fill_(hidden[:, None], -torch.inf)
            out[rows] = (scores.softmax(-1) @ ckv).to(out.dtype)
            lse[rows] = scores.logsumexp(-1)
        return out, lse
"""


@pytest.fixture
def fake_flashinfer(monkeypatch, tmp_path):
    """FlashInfer's wrapper as it is documented, in torch."""
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer" / "__init__.py").write_text("__version__ = '0.6.3'\n")
    (tmp_path / "flashinfer" / "mla.py").write_text(FAKE_FLASHINFER)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("flashinfer", "flashinfer.mla"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("lengths, seq_len_q", [((130, 64, 65), 2), ((1,), 1)], ids=str)
def test_flashinfer_is_called_as_documented(fake_flashinfer, lengths, seq_len_q):
    [peer] = find_peers(("flashinfer",), CPU, "bfloat16").found
    assert (peer.name, peer.version) == ("flashinfer.fa3", "0.6.3")
    context = context_of(timing=TimingMode("none", rounds=1))
    case = GridCase.of_lengths(lengths, 16, seq_len_q)
    record = measure(case, context, [peer], Timer(CPU, rep_ms=1), CPU)
    assert record.failures == {}
    assert [each.name for each in record.peers] == ["flashinfer.fa3"]
    several_kv_heads = dataclasses.replace(case, num_heads_k=2)
    record = measure(several_kv_heads, context, [peer], Timer(CPU, rep_ms=1), CPU)
    assert record.failures == {"flashinfer.fa3": "ValueError: FlashInfer's wrapper serves one KV head, got 2"}


@pytest.mark.gpu
@pytest.mark.parametrize("num_mib", [16, 1024])
def test_timer_agrees_with_do_bench(num_mib):
    do_bench = pytest.importorskip("triton.testing").do_bench
    block = torch.randn(num_mib * 2**18, device="cuda")
    timer = Timer(torch.device("cuda", 0))
    ratios = [
        timer.time_us(block.max) / (do_bench(block.max, warmup=15, rep=60, return_mode="median") * 1e3)
        for _ in range(5)
    ]
    assert sorted(ratios)[2] == pytest.approx(1, abs=0.05)


@pytest.mark.gpu
def test_modes_on_a_gpu():
    device = torch.device("cuda", 0)
    inputs = make_inputs(GridCase(32, 4096, 16, 1), device, poison=False)
    call = OURS.prepare(GridCase(32, 4096, 16, 1), inputs)
    call()
    dirty, clean = (Timer(device, flush=flush).time_us(call) for flush in ("dirty", "clean"))
    assert 20 < clean < dirty * 1.02
    timer = Timer(device, graph=True)
    replay = timer.ready(call)
    assert timer.time_us(replay) == pytest.approx(dirty, rel=0.25)
    assert 1 < timer.host_time_us(call) < 500


@pytest.mark.gpu
def test_peers_on_a_gpu_compute_what_we_do():
    device = torch.device("cuda", 0)
    peers = find_peers(("auto",), device, "bfloat16")
    if not peers.found:
        pytest.skip(f"no peer: {peers.missing}")
    context = context_of(timing=TimingMode(rounds=1, rep_ms=5))
    for case in (GridCase(3, 300, 16, 2, is_varied=True), GridCase.of_lengths((4641, 64, 1), 128, 1)):
        record = measure(case, context, peers.found, Timer(device, rep_ms=5), device)
        assert record.failures == {}
        assert len(record.peers) == len(peers.found)
