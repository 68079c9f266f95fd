"""The regression gate: what falls behind its record fails, and a gate that checks nothing does not pass."""

import re
import sys

import pytest

from bench_records import CASE, H100_LOG, ROOT, context_of, record_of, run_bench
from tilemla.bench.cases import GridCase
from tilemla.bench.record import PeerTime, TimingMode, append_log

OTHER = GridCase(2, 256, 64, 1)
TINY = ["--device", "cpu", "--cases", "cpu", "--match", "L256 h16k1 s1", "--rounds", "1", "--rep-ms", "1"]
TINY_CASE = GridCase(2, 256, 16, 1)
TINY_CONTEXT = context_of(timing=TimingMode("none"))


def timed(ratio, case=CASE, peer="a", **changes):
    return record_of(case, peers=(PeerTime(peer, 100.0 * ratio, ratio),), **changes)


@pytest.fixture
def check(tmp_path):
    """Compare one list of measurements with another, by the command."""

    def run(recorded, measured, *options):
        paths = [tmp_path / "recorded.jsonl", tmp_path / "measured.jsonl"]
        for path, records in zip(paths, (recorded, measured), strict=True):
            path.write_text("")
            for record in records:
                append_log(path, record)
        return run_bench("--from", paths[1], "--check", paths[0], *options)

    return run


def rows_behind(result):
    """The lines of the table of what fell behind, in words."""
    _, header, table = result.stdout.partition("fell behind")
    return [line.split() for line in table.splitlines()[2:] if line.strip()] if header else []


@pytest.mark.parametrize("ratio", [1.25, 1.2, 1.3, 9.0])
def test_what_keeps_up_passes(check, ratio):
    result = check([timed(1.25), timed(2.0, OTHER)], [timed(ratio), timed(2.0, OTHER)])
    assert result.exit_code == 0, result.output
    assert "ratios to a peer compared: 2, none more than 5.0% lower than in " in result.stdout
    assert rows_behind(result) == []


def test_what_falls_behind_is_named(check):
    result = check([timed(1.25), timed(2.0, OTHER)], [timed(1.175), timed(2.0, OTHER)])
    assert result.exit_code == 1
    assert rows_behind(result) == [[*str(CASE).split(), "a", "1.250", "1.175", "-6.0%"]]
    assert "1 of 2 ratios to a peer failed or are more than 5.0% lower than in " in result.stderr


@pytest.mark.parametrize("tolerance, exit_code", [("0.07", 0), ("0.05", 1), ("0", 1)])
def test_tolerance_is_a_fraction_of_the_record(check, tolerance, exit_code):
    assert check([timed(1.25)], [timed(1.175)], "--check-tolerance", tolerance).exit_code == exit_code


def test_the_newest_line_of_a_case_counts(check):
    assert check([timed(2.0), timed(1.0)], [timed(1.0)]).exit_code == 0
    result = check([timed(1.0), timed(2.0)], [timed(1.0)])
    assert result.exit_code == 1
    assert rows_behind(result)[0][-3:] == ["2.000", "1.000", "-50.0%"]
    # A later line without the peer says nothing about the ratio to it.
    assert check([timed(2.0), record_of()], [timed(1.0)]).exit_code == 1


@pytest.mark.parametrize(
    "record",
    [
        timed(9.0, context=context_of(timing=TimingMode("clean"))),
        timed(9.0, context=context_of(timing=TimingMode(graph=True))),
        timed(9.0, context=context_of(gpu="NVIDIA H200")),
        timed(9.0, peer="b"),
        timed(9.0, OTHER),
    ],
    ids=["flush", "graph", "gpu", "peer", "case"],
)
def test_another_mode_device_peer_or_case_is_not_compared(check, record):
    assert check([timed(1.0), record], [timed(1.0)]).exit_code == 0
    result = check([record], [timed(1.0)])
    assert result.exit_code == 1
    assert "nothing can be compared" in result.stderr
    assert "has none of these cases on cpu (dirty flush, whole calls) beside a; it has cases on " in result.stderr


def test_rounds_do_not_tell_modes_apart(check):
    recorded = timed(2.0, context=context_of(timing=TimingMode(rounds=9, rep_ms=10)))
    assert check([recorded], [timed(1.0)]).exit_code == 1


@pytest.mark.parametrize("options", [["--graph"], ["--clean"]], ids=str)
def test_a_mode_has_its_own_record(check, options):
    mode = TimingMode("clean") if options == ["--clean"] else TimingMode(graph=True)
    recorded = [timed(2.0, context=context_of(timing=mode)), timed(1.0)]
    assert check(recorded, [timed(2.0, context=context_of(timing=mode))], *options).exit_code == 0
    assert check(recorded, [timed(1.0, context=context_of(timing=mode))], *options).exit_code == 1


def test_a_case_without_a_record_is_named_and_does_not_fail(check):
    third = GridCase(3, 256, 16, 1)
    result = check([timed(1.0)], [timed(1.0), timed(0.1, OTHER), record_of(third)])
    assert result.exit_code == 0, result.output
    assert f"{OTHER}: not compared: no record beside a" in result.stdout
    assert f"{third}: not compared: no peer was timed" in result.stdout
    assert f"{CASE}: not compared" not in result.stdout
    assert "ratios to a peer compared: 1, none" in result.stdout


def test_each_peer_is_compared_with_its_own_record(check):
    both = record_of(peers=(PeerTime("a", 100.0, 1.0), PeerTime("b", 300.0, 3.0)))
    assert check([both], [timed(1.0)]).exit_code == 0
    assert check([timed(1.0)], [both]).exit_code == 0
    result = check([both], [record_of(peers=(PeerTime("a", 100.0, 1.0), PeerTime("b", 200.0, 2.0)))])
    assert result.exit_code == 1
    assert [row[-4:] for row in rows_behind(result)] == [["b", "3.000", "2.000", "-33.3%"]]


def test_a_peer_that_fails_where_it_once_ran_is_behind(check):
    failed = record_of(failures={"a": "differs from ours by a cosine difference of nan"})
    result = check([timed(1.0), timed(1.0, OTHER)], [failed, timed(1.0, OTHER)], "--check-tolerance", "0.9")
    assert result.exit_code == 1
    assert rows_behind(result) == [[*str(CASE).split(), "a", "1.000", "failed", "-"]]
    assert f"{CASE}: no time of a: differs from ours" in result.stdout


@pytest.mark.parametrize(
    "recorded, measured, message",
    [
        (
            [],
            [timed(1.0)],
            "has none of these cases on cpu (dirty flush, whole calls) beside a; it has no ratio to a peer",
        ),
        ([record_of()], [timed(1.0)], "it has no ratio to a peer"),
        ([timed(1.0)], [record_of()], "beside no peer; it has cases on cpu (dirty flush, whole calls) beside a"),
    ],
    ids=["empty record", "record without a peer", "run without a peer"],
)
def test_a_gate_that_checks_nothing_does_not_pass(check, recorded, measured, message):
    result = check(recorded, measured)
    assert result.exit_code == 1
    assert message in result.stderr


def test_json_on_stdout_stays_alone_there(check):
    result = check([timed(2.0)], [timed(1.0)], "--json", "-")
    assert result.exit_code == 1
    assert result.stdout.startswith("{") and result.stdout.endswith("}\n")
    assert "fell behind" in result.stderr


def test_a_damaged_record_is_named(check, tmp_path):
    (tmp_path / "damaged.jsonl").write_text("{\n")
    result = run_bench("--from", H100_LOG, "--check", tmp_path / "damaged.jsonl")
    assert result.exit_code == 1
    assert "damaged.jsonl:1 is not a measurement" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--check-tolerance", "0.1"], "--check-tolerance is about --check, which was not given"),
        (["--check", H100_LOG, "--peer", "none"], "does not go with --peer none"),
        (["--check", H100_LOG, "--check-tolerance", "5"], "5.0 is not in the range"),
        (["--check", "/nowhere.jsonl"], "'/nowhere.jsonl' does not exist"),
    ],
)
def test_refusals(arguments, message):
    result = run_bench(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.fixture
def own_peer(monkeypatch, tmp_path):
    """A peer that is our own kernels under another name."""
    text = "from tilemla import get_mla_metadata, flash_mla_with_kvcache\n"
    (tmp_path / "gate_mla.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "gate_mla"
    sys.modules.pop("gate_mla", None)


@pytest.mark.parametrize("recorded, exit_code", [(0.01, 0), (100.0, 1)])
def test_a_run_is_checked_against_the_log_as_it_was(own_peer, tmp_path, recorded, exit_code):
    log = tmp_path / "log.jsonl"
    append_log(log, timed(recorded, TINY_CASE, own_peer, context=TINY_CONTEXT))
    result = run_bench(*TINY, "--peer", own_peer, "--check", log, "--log", log)
    assert result.exit_code == exit_code, result.output
    assert len(rows_behind(result)) == exit_code
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize("options", [[], ["--peer", "gate_mla"]], ids=["no peer", "peer without a record"])
def test_nothing_is_measured_where_nothing_can_be_compared(own_peer, tmp_path, options):
    log, written = tmp_path / "log.jsonl", tmp_path / "written.jsonl"
    append_log(log, timed(1.0, TINY_CASE, "another", context=TINY_CONTEXT))
    result = run_bench(*TINY, *options, "--check", log, "--log", written)
    assert result.exit_code == 1
    assert "nothing can be compared" in result.stderr and "beside another" in result.stderr
    assert not written.exists()


def test_the_record_holds_every_list_that_the_makefile_checks():
    makefile = (ROOT / "Makefile").read_text()
    [record] = re.findall(r"^BENCH_RECORD := (.*)$", makefile, re.MULTILINE)
    assert ROOT / record == H100_LOG
    [recipe] = re.findall(r"^bench-check:.*\n\t@(.*)$", makefile, re.MULTILINE)
    assert "--check $(BENCH_RECORD)" in recipe
    result = run_bench("--from", H100_LOG, "--check", H100_LOG)
    assert result.exit_code == 0, result.output
    assert re.search("ratios to a peer compared: [1-9][0-9]*, none more", result.stdout)
    checked = set(re.findall(r"--cases (\w+)", recipe))
    assert checked and checked <= set(re.findall(r"^(\w+): sgl_kernel", result.stdout, re.MULTILINE))
