"""Trials, their log, and what is chosen from it; the table, and who reads it."""

import dataclasses
import fcntl
import json
import multiprocessing
import shutil
import threading

import pytest
import torch

import tilemla
from test_packaging import run
from tilemla import fingerprint, schedule
from tilemla.bench.cases import GridCase
from tilemla.config import DEFAULT_CONFIG, KernelConfig
from tilemla.costs import ScheduleCosts, formula_costs
from tilemla.spec import SUPPORTED_SPECS, KernelSpec
from tilemla.tuning import chosen
from tilemla.tuning.choose import choose
from tilemla.tuning.measure import time_in_turn
from tilemla.tuning.table import Choice, Evidence, Table, TableError, gpu_slug, read_table, table_path, write_table
from tilemla.tuning.trial import Trial, append_trial, read_trials
from trials import DEEP, LATER, RUN, WHOLE, Clock, trial_of, turn_of
from tuned_tables import forget

FAST = KernelConfig(short_piece=8)
OTHER = KernelConfig(splits_ahead=4)
CHEAP = ScheduleCosts(1, 8, 0, 0)
EVIDENCE = Evidence("x", 1.2, 0.01, 1.1, 3, "1-3,7")
TABLE = Table(
    spec=KernelSpec(),
    gpu=RUN.gpu,
    log="h100.jsonl",
    date=RUN.date,
    versions=RUN.versions,
    config=FAST,
    config_evidence=EVIDENCE,
    costs={"part_tile/alone": Choice(CHEAP, EVIDENCE), "full_tile/some": Choice(None, EVIDENCE)},
)


# The log.


@pytest.mark.parametrize(
    "trial",
    [
        trial_of((10.0, 12.0, 11.0)),
        trial_of(
            (10.0,), GridCase.of_lengths((5, 15), 16, 4), stage="costs", role="again", costs=[CHEAP, (2, 2, 2, 2)]
        ),
        Trial(RUN, "config", "candidate", FAST, failure="ptxas: no\nregisters"),
    ],
)
def test_a_trial_comes_back_from_a_log_as_it_was(tmp_path, trial):
    append_trial(tmp_path / "a" / "log.jsonl", trial)
    assert read_trials(tmp_path / "a" / "log.jsonl") == [trial]


def test_older_lines_have_eighths_of_a_piece_and_no_cost_of_crowding():
    fields = trial_of((10.0,), costs=[CHEAP]).to_dict() | {"costs": [[5, 64, 2]]}
    assert Trial.from_dict(fields).costs == (ScheduleCosts(5, 64, 16, 0),)


def test_a_line_has_the_fields_that_are_promised(tmp_path):
    append_trial(tmp_path / "log.jsonl", trial_of((10.0, 12.0, 11.0)))
    fields = json.loads((tmp_path / "log.jsonl").read_text())
    assert fields["time_us"] == 11.0 and fields["config"] == DEFAULT_CONFIG.to_dict()
    assert fields["bandwidth_gbs"] == pytest.approx(DEEP.num_bytes / 11e3, rel=1e-5)
    assert fields["tflops"] == pytest.approx(DEEP.flop / 11e6, rel=1e-4)
    assert (fields["registers"], fields["spill_bytes"], fields["smem_bytes"]) == (168, 0, 231_424)
    assert fields["versions"] == RUN.versions and fields["date"] == RUN.date and fields["gpu"] == RUN.gpu


def append_many(path, first):
    for number in range(first, first + 20):
        append_trial(path, trial_of((float(number),)))


def test_processes_add_whole_lines_side_by_side(tmp_path):
    log = tmp_path / "log.jsonl"
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=append_many, args=(log, 100 * number)) for number in range(1, 4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    times = sorted(trial.times_us[0] for trial in read_trials(log))
    assert times == [100 * number + each for number in range(1, 4) for each in range(20)]


def test_a_line_waits_while_another_one_is_written(tmp_path):
    """Else the other could be taken for one that was never finished."""
    log = tmp_path / "log.jsonl"
    append_trial(log, trial_of((1.0,)))
    writer = threading.Thread(target=append_trial, args=(log, trial_of((2.0,))))
    with open(log, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.5)
        assert writer.is_alive() and len(read_trials(log)) == 1
    writer.join(60)
    assert [trial.times_us for trial in read_trials(log)] == [(1.0,), (2.0,)]


def test_a_line_that_was_never_finished_is_taken_away(tmp_path, caplog):
    log = tmp_path / "log.jsonl"
    append_trial(log, trial_of((1.0,)))
    whole = log.read_text()
    log.write_text(whole + whole[: len(whole) // 2])
    assert [trial.times_us for trial in read_trials(log)] == [(1.0,)]
    append_trial(log, trial_of((2.0,)))
    assert [trial.times_us for trial in read_trials(log)] == [(1.0,), (2.0,)]
    assert log.read_text().startswith(whole) and len(log.read_text().splitlines()) == 2
    assert "its last line was never finished and is taken away" in caplog.text


def test_a_last_line_without_its_end_is_kept(tmp_path):
    log = tmp_path / "log.jsonl"
    append_trial(log, trial_of((1.0,)))
    log.write_text(log.read_text().rstrip("\n"))
    append_trial(log, trial_of((2.0,)))
    assert [trial.times_us for trial in read_trials(log)] == [(1.0,), (2.0,)]


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(stage="third"), "no trial has stage 'third'"),
        (dict(config={"short_piece": "8"}), "config field short_piece must be int, got '8'"),
        (dict(shape=dict(DEEP=1)), "KeyError: 'total_tokens'"),
        (dict(costs=[[1]]), "TypeError"),
    ],
)
def test_a_line_that_is_no_trial_is_named(tmp_path, changes, reason):
    log = tmp_path / "log.jsonl"
    append_trial(log, trial_of((1.0,)))
    log.write_text(log.read_text() + json.dumps(trial_of((1.0,)).to_dict() | changes) + "\n")
    with pytest.raises(ValueError, match=rf"log.jsonl:2 is not a trial: .*{reason}"):
        read_trials(log)


def test_lines_of_other_configurations_can_be_read(tmp_path):
    """Constants come and go; a log stays."""
    fields = trial_of((1.0,), config=FAST).to_dict()
    del fields["config"]["splits_ahead"]
    (tmp_path / "log.jsonl").write_text(json.dumps(fields | {"config": fields["config"] | {"gone": 1}}) + "\n")
    assert read_trials(tmp_path / "log.jsonl") == [trial_of((1.0,), config=FAST)]


# Timing.


def decode_of(value):
    return lambda: (torch.full((2, 3), float(value)), None)


def test_candidates_are_timed_in_turn_between_the_default(tmp_path):
    default, first, second = calls = [decode_of(1) for _ in range(3)]
    clock = Clock(lambda call: float(calls.index(call)))
    timed = time_in_turn(default, [first, second], 3, clock)
    assert clock.timed == [default, first, second, default, default, second, first, default, *clock.timed[:4]]
    assert timed.default == timed.again == (0.0, 0.0, 0.0)
    assert timed.times_us == {0: (1.0,) * 3, 1: (2.0,) * 3} and timed.failures == {}


def test_a_candidate_that_fails_or_is_wrong_has_a_reason_and_no_time():
    def fails():
        raise RuntimeError("illegal address")

    timed = time_in_turn(decode_of(1), [fails, decode_of(-1), decode_of(1)], 2, Clock(lambda call: 5.0))
    assert set(timed.times_us) == {2}
    assert "illegal address" in timed.failures[0] and "differs from ours" in timed.failures[1]


# Choosing.


def test_what_is_faster_than_noise_is_chosen():
    trials = turn_of({FAST: (80.0,) * 3, OTHER: (95.0,) * 3}) + turn_of({FAST: (90.0,) * 3, OTHER: (99.0,) * 3}, WHOLE)
    table = choose(trials, "h100.jsonl")
    assert table.config == FAST
    evidence = table.config_evidence
    assert evidence.best == FAST.name and evidence.num_cases == 2
    assert evidence.over_default == pytest.approx((100 / 80 * 100 / 90) ** 0.5, abs=1e-4)
    assert evidence.worst == pytest.approx(100 / 90, abs=1e-4)
    assert evidence.margin == 0.01
    assert evidence.lines == "1-2,4-6,8"
    assert (table.versions, table.date, table.gpu, table.log) == (RUN.versions, RUN.date, RUN.gpu, "h100.jsonl")


@pytest.mark.parametrize(
    "trials",
    [
        pytest.param(turn_of({FAST: (99.5,) * 3}), id="less than a percent"),
        pytest.param(turn_of({FAST: (97.0,) * 3}, first=(110.0,) * 3), id="less than the default differs from itself"),
        pytest.param(
            turn_of({FAST: (95.0,) * 3}, first=(90.0, 110.0, 100.0), again=(110.0, 90.0, 100.0)),
            id="less than three standard errors",
        ),
        pytest.param(turn_of({FAST: (50.0,) * 3}) + turn_of({FAST: (103.0,) * 3}, WHOLE), id="slow in one case"),
        pytest.param(turn_of({FAST: (50.0,) * 3}) + turn_of({}, WHOLE), id="not timed in every case"),
        pytest.param(
            turn_of({FAST: (50.0,) * 3})[:-1] + turn_of({OTHER: (100.0,) * 3}, run=LATER), id="turn not finished"
        ),
    ],
)
def test_else_the_default_stays(trials):
    assert choose(trials, "log").config == DEFAULT_CONFIG


def test_a_round_that_was_disturbed_hides_nothing():
    first = (100.0, 300.0, 101.0, 100.0, 101.0)
    trials = turn_of({FAST: (90.0,) * 5}, first=first, again=(101.0, 100.0, 100.0, 101.0, 100.0))
    assert choose(trials, "log").config == FAST


def test_what_drifts_in_a_round_drifts_for_all():
    """Twice as slow in the second round, everything: ratios are of the same round."""
    drift = (1.0, 2.0, 1.0)
    times = {name: tuple(value * each for each in drift) for name, value in (("default", 100.0), ("fast", 80.0))}
    trials = turn_of({FAST: times["fast"]}, first=times["default"], again=times["default"])
    assert choose(trials, "log").config_evidence.over_default == 1.25


def test_classes_weigh_the_same_whatever_the_number_of_their_cases():
    many = [GridCase(1, length, 16, 1) for length in (1024, 2048, 4096, 8192)]
    trials = [trial for case in many for trial in turn_of({FAST: (100.0,) * 3}, case)]
    trials += turn_of({FAST: (81.0,) * 3}, WHOLE)
    assert choose(trials, "log").config_evidence.over_default == pytest.approx((100 / 81) ** 0.5, abs=1e-4)


def test_costs_are_chosen_for_each_class_by_itself():
    trials = turn_of({CHEAP: (80.0,) * 3}, stage="costs") + turn_of({CHEAP: (120.0,) * 3}, WHOLE, stage="costs")
    table = choose(trials, "log")
    assert table.chosen_costs == {"part_tile/alone": CHEAP}
    assert (
        table.costs["part_tile/whole"].evidence.best
        == "overhead 2, combine_eighths 20, piece_64ths 32, crowded_eighths 9"
    )
    assert table.costs["part_tile/whole"].evidence.over_default == 1.0
    assert table.config_evidence is None


def test_costs_that_lead_to_one_schedule_are_one_trial_and_the_nearest_is_chosen():
    default = formula_costs(16, 1, 132)
    near, far = default._replace(piece_64ths=3), ScheduleCosts(0, 0, 64, 0)
    first, _, again = turn_of({far: (80.0,) * 3}, stage="costs")
    trials = [first, trial_of((80.0,) * 3, stage="costs", costs=[far, near]), again]
    assert choose(trials, "log").chosen_costs == {"part_tile/alone": near}


def test_costs_count_that_were_measured_with_the_chosen_configuration():
    trials = turn_of({FAST: (80.0,) * 3})
    on_default = turn_of({CHEAP: (50.0,) * 3}, stage="costs")
    on_fast = turn_of({CHEAP: (50.0,) * 3}, stage="costs", config=FAST)
    assert choose(trials + on_default, "log").costs == {}
    assert choose(trials + on_fast, "log").chosen_costs == {"part_tile/alone": CHEAP}


def test_the_newest_counts_and_other_versions_are_history():
    old = turn_of({FAST: (50.0,) * 3}, WHOLE, run=dataclasses.replace(RUN, versions={"tilemla": "old"}))
    graphs = dataclasses.replace(RUN, timing=dataclasses.replace(RUN.timing, graph=True))
    trials = old + turn_of({FAST: (50.0,) * 3}, WHOLE, run=graphs) + turn_of({FAST: (80.0,) * 3})
    assert choose(trials, "log").config_evidence.num_cases == 1
    trials += turn_of({FAST: (100.0,) * 3}, run=LATER)
    table = choose(trials, "log")
    assert table.config == DEFAULT_CONFIG and table.date == LATER.date


def test_failed_builds_are_kept_and_not_chosen():
    failed = Trial(RUN, "config", "candidate", OTHER, failure="spills")
    assert choose([failed, *turn_of({FAST: (80.0,) * 3})], "log").config == FAST
    with pytest.raises(ValueError, match=r"h100.jsonl: there is no trial with a time"):
        choose([failed], "h100.jsonl")


# The table.


def test_a_table_comes_back_from_its_file_as_it_was(tmp_path):
    path = table_path(tmp_path, TABLE.spec, TABLE.gpu)
    write_table(path, TABLE)
    assert read_table(path) == TABLE
    assert TABLE.chosen_costs == {"part_tile/alone": CHEAP}
    assert [each.name for each in path.parent.iterdir()] == ["h100.json"]


@pytest.mark.parametrize(
    "name, slug",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA H200", "h200"),
        ("cpu", "cpu"),
        ("h100", "h100"),
    ],
)
def test_files_are_called_by_product(name, slug):
    assert gpu_slug(name) == slug


def changed(**changes):
    return json.dumps(json.loads(TABLE.to_json()) | changes)


BAD_TABLES = [
    ("{", "not JSON"),
    ("[]", "a table must be an object, got list"),
    (changed(format=0), "expected table format 1, got 0"),
    (changed(speed=9), "a table has no field speed"),
    (changed(gpu=7), "gpu must be a string, got 7"),
    (changed(config={"speed": 9}), "config has no field 'speed'"),
    (changed(config=KernelConfig(splits_ahead=5).to_dict()), "config: splits_ahead must be one of .*, got 5"),
    (changed(spec={"arch": "sm_90a", "speed": 1}), "spec has no field 'speed'"),
    (changed(costs={"tiny": {}}), "a class must be one of part_tile/alone, .*, got 'tiny'"),
    (changed(costs={"part_tile/alone": {}}), "the field 'costs' is missing"),
    (
        changed(
            costs={
                "part_tile/alone": {
                    "costs": {"overhead": 99, "combine_eighths": 1, "piece_64ths": 1, "crowded_eighths": 1}
                }
            }
        ),
        "costs of part_tile/alone: overhead must be 0 to 15, got 99",
    ),
    (changed(costs={"part_tile/alone": {"costs": {"overhead": 1}, "evidence": {}}}), "costs must have the fields"),
    (changed(gpu="NVIDIA H200"), "it holds what was chosen for mla_decode_.* on NVIDIA H200"),
]


@pytest.mark.parametrize("text, reason", BAD_TABLES)
def test_a_file_that_is_no_table_is_named_and_never_passed_over(tuning_dir, text, reason):
    path = table_path(tuning_dir, KernelSpec(), RUN.gpu)
    path.parent.mkdir()
    path.write_text(text)
    for read in (
        lambda: read_table(path),
        lambda: chosen.select_config(KernelSpec()),
        lambda: chosen.chosen_costs("sm_90a", RUN.gpu),
        fingerprint.source_fingerprint,
    ):
        with pytest.raises(TableError, match=rf"{path}: .*{reason}"):
            read()


def test_a_folder_that_is_not_there_is_an_error(tuning_dir):
    shutil.rmtree(tuning_dir)
    with pytest.raises(TableError, match=f"TILEMLA_TUNING_DIR must be a folder of tables, got {tuning_dir}"):
        chosen.select_config(KernelSpec())


def put_table(folder, table):
    write_table(table_path(folder, table.spec, table.gpu), table)


def test_a_configuration_is_found_by_kernel_or_by_the_first_of_its_architecture(tuning_dir):
    assert chosen.select_config(KernelSpec()) == DEFAULT_CONFIG
    before = fingerprint.source_fingerprint()
    forget()
    put_table(tuning_dir, TABLE)
    put_table(tuning_dir, dataclasses.replace(TABLE, spec=KernelSpec(dtype="float16"), config=OTHER))
    assert chosen.select_config(KernelSpec()) == FAST
    assert chosen.select_config(KernelSpec(dtype="float16")) == OTHER
    assert chosen.select_config(KernelSpec(kernel="read_pages")) == DEFAULT_CONFIG
    for spec in SUPPORTED_SPECS:
        expected = {"bfloat16": FAST, "float16": OTHER}[spec.dtype] if spec.page_block_size == 64 else FAST
        if (spec.kernel, spec.arch, spec.head_dim_qk) == ("mla_decode", "sm_90a", 576):
            assert chosen.select_config(spec) == expected
        if spec.arch == "cpu":
            assert chosen.select_config(spec) == DEFAULT_CONFIG
    assert fingerprint.source_fingerprint() != before, "modules of another configuration are other modules"


def test_costs_do_not_change_the_fingerprint(tuning_dir):
    put_table(tuning_dir, dataclasses.replace(TABLE, config=DEFAULT_CONFIG, costs={}))
    before = fingerprint.source_fingerprint()
    forget()
    put_table(tuning_dir, dataclasses.replace(TABLE, config=DEFAULT_CONFIG))
    assert fingerprint.source_fingerprint() == before


def test_costs_are_those_of_the_gpu(tuning_dir):
    put_table(tuning_dir, TABLE)
    assert chosen.chosen_costs("sm_90a", RUN.gpu) == {"part_tile/alone": CHEAP}
    assert chosen.chosen_costs("sm_90a", "NVIDIA H200") == {}
    assert chosen.chosen_costs("cpu", "cpu") == {}


def test_a_call_is_scheduled_by_the_table(tuning_dir):
    """On a CPU, which counts as 8 SMs, one long request: cut where cutting is cheap, whole where it is dear."""
    lengths = torch.tensor([64 * 8], dtype=torch.int32)

    def pieces():
        forget()
        return int(tilemla.get_mla_metadata(lengths, 16, 1)[1][1])

    table = dataclasses.replace(TABLE, spec=KernelSpec(arch="cpu"), gpu="cpu", log="cpu.jsonl", config=DEFAULT_CONFIG)
    found = {}
    for combine_eighths in (0, 1023):
        costs = {"part_tile/deep": Choice(ScheduleCosts(1, combine_eighths, 0, 0), EVIDENCE)}
        put_table(tuning_dir, dataclasses.replace(table, costs=costs))
        found[combine_eighths] = pieces()
    assert found == {0: 8, 1023: 1}


def test_costs_are_looked_up_once_for_a_kind_of_call(tuning_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(schedule, "chosen_costs", lambda *key: asked.append(key) or {})
    for batch_size in (3, 3, 4, 3):
        lengths = torch.ones(batch_size, dtype=torch.int32)
        tilemla.get_mla_metadata(lengths, 16, 1)
    assert asked == [("cpu", "cpu")] * 2


# What is committed.


def committed():
    return sorted(chosen.tuning_folder().glob("*/*.json"))


def test_committed_tables_are_what_their_logs_say():
    for path in committed():
        table = read_table(path)
        log = path.with_name(table.log)
        assert choose(read_trials(log), log.name) == table
        assert path == table_path(path.parent.parent, table.spec, table.gpu)


def test_tables_are_installed_and_read_without_torch(monkeypatch):
    monkeypatch.delenv("TILEMLA_TUNING_DIR", raising=False)
    found = run(
        "import sys; from tilemla.tuning.chosen import select_config, chosen_costs; "
        "from tilemla.spec import KernelSpec; from tilemla.tuning.choose import choose; "
        "select_config(KernelSpec()); chosen_costs('sm_90a', 'NVIDIA H100 80GB HBM3'); "
        "print([name for name in ('torch', 'numpy', 'tvm_ffi', 'tilelang') if name in sys.modules])"
    )
    assert found == "[]"
