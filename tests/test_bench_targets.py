"""Targets beside results: the right cases, the right side of the bound."""

import dataclasses
import json

import pytest
from rich.console import Console

from bench_records import context_of, run_bench
from tilemla.bench.cases import GridCase
from tilemla.bench.jobs import plan_jobs
from tilemla.bench.record import PeerTime, Record, Reference, TimingMode, append_log
from tilemla.bench.targets import TARGETS, evaluate, make_target_table


def run_of(share, *, peers=1.4, second_peer=1.2):
    """The records of a run of the targets in which every case is at that share of the roof; 50 us at least."""
    context = context_of(gpu="H", read_bandwidth_gbs=3000.0, matmul_tflops=750.0)
    records = []
    for job in plan_jobs(["targets"]):
        case = job.case
        floor_us = max(case.num_bytes / 3e6, case.flop / 750e6, 40.0)
        records.append(
            Record(
                dataclasses.replace(context, timing=TimingMode(job.flush, job.graph)),
                case,
                floor_us / share,
                host_time_us=10.0,
                peers=(PeerTime("a", 1.0, peers), PeerTime("b", 1.0, second_peer)),
                case_list=job.case_list,
                read_only=Reference(case.page_bytes / 3e6 / 0.97, 0.995),
                even=Reference(1.0, 0.98) if job.with_even else None,
            )
        )
    return records


def by_what(results):
    return {(result.target.what, result.target.over): result for result in results}


def test_every_target_is_about_something_that_the_run_measures():
    results = evaluate(run_of(0.99))
    assert [result.num_cases for result in results] == [32, 32, 3, 3, 3, 1, 1, 1, 1, 1, 18, 18, 1, 1, 16, 18]
    assert [result.target.what for result in results if not result.is_reached] == ["b1 L1024 h16 in a graph: us"]
    assert all(result.value is None and result.is_reached is None for result in evaluate([]))


def test_a_slow_case_is_named():
    records = run_of(0.99)
    [index] = [
        number
        for number, record in enumerate(records)
        if str(record.case) == "b128 L8192 h32k1 s1 causal bf16" and record.context.timing.flush == "dirty"
    ]
    slow = dict(
        peers=(PeerTime("a", 1.0, 1.01), PeerTime("b", 1.0, 0.9)), read_only=Reference(500.0, 0.7), host_time_us=99.0
    )
    records[index] = dataclasses.replace(records[index], **slow)
    found = by_what(evaluate(records))
    least = found["grid: any peer / ours", "worst"]
    assert (least.value, least.is_reached, least.case) == (0.9, False, str(records[index].case))
    mean = found["grid: peer / ours", "geometric mean"]
    assert mean.value == pytest.approx((1.4**31 * 1.01) ** (1 / 32)) and mean.is_reached
    assert found["h16-h64 s1 L8192: read-only / ours", "worst"].value == 0.7
    assert found["h16-h64 s1 L8192: read-only, of read bandwidth", "worst"].is_reached is False
    # The other modes and lists are not touched.
    assert found["h16-h64 s1 L8192, clean: of read bandwidth", "worst"].is_reached
    assert found["batch 1-32: any peer / ours", "worst"].value == 1.2


@pytest.mark.parametrize("even, value, is_reached", [(0.98, 1 / 0.98, True), (0.9, 1 / 0.9, False)])
def test_varied_over_even_is_the_most(even, value, is_reached):
    records = run_of(0.99)
    records[1] = dataclasses.replace(records[1], even=Reference(1.0, even))
    result = by_what(evaluate(records))["varied / even", "worst"]
    assert (result.value, result.is_reached) == (pytest.approx(value), is_reached)


def test_a_run_without_peers_still_says_what_it_can():
    records = [dataclasses.replace(record, peers=()) for record in run_of(0.99)]
    open_ones = [result.target.what for result in evaluate(records) if result.value is None]
    assert len(open_ones) == 7 and all("peer / ours" in what for what in open_ones)


def test_table_puts_bound_beside_figure(capsys):
    Console(width=160).print(make_target_table(evaluate(run_of(0.93))))
    rows = capsys.readouterr().out.splitlines()
    [row] = [row for row in rows if "h128 s2 L8192: of matmul" in row]
    assert row.split("matmul")[1].split()[:4] == [">=", "0.940", "0.930", "1"]
    [row] = [row for row in rows if "imbalanced: us" in row]
    assert row.split("us")[1].split()[:2] == ["<=", "45.0"]
    assert len(TARGETS) + 1 == sum("=" in row for row in rows) + 1


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.jsonl"
    for record in run_of(0.99):
        append_log(path, record)
    return path


def test_a_log_is_shown_with_every_mode_and_its_targets(log, tmp_path):
    result = run_bench("--from", log, "--cases", "targets", "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    assert "batch 1-32: peer / ours, geometric mean" in result.stdout
    assert "whole calls, clean L2 flush" in result.stdout and "replays of a CUDA graph" in result.stdout
    document = json.loads((tmp_path / "a.json").read_text())
    assert len(document["records"]) == 62
    assert [target["is_reached"] for target in document["targets"]].count(False) == 1
    # Without the list, a log is shown in one mode.
    result = run_bench("--from", log, "--json", "-")
    assert len(json.loads(result.stdout)["records"]) == 55
    assert "targets" not in json.loads(result.stdout)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cases", "targets", "--graph"], "--cases targets has modes of its own"),
        (["--cases", "targets", "--clean"], "--cases targets has modes of its own"),
        (["--cases", "targets", "--device", "cpu"], "are about a GPU, and this runs on a CPU"),
    ],
)
def test_refusals(arguments, message):
    result = run_bench(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.gpu
def test_the_targets_on_a_gpu():
    result = run_bench(
        "--cases",
        "targets",
        "--match",
        "b1 L1024 h16",
        "--rounds",
        "1",
        "--rep-ms",
        "5",
        "--peer",
        "none",
        "--json",
        "-",
    )
    assert result.exit_code == 0, result.output
    eager, graph = json.loads(result.stdout)["records"]
    assert eager["shape"] == graph["shape"] and graph["timing"]["graph"]
    assert str(GridCase(1, 1024, 16, 1)) in result.stderr
    assert eager["read_only_us"] < eager["time_us"]
