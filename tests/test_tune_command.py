"""``tilemla tune``: what it plans, what it refuses, and a whole run on a CPU."""

import itertools
import json
import shutil

import pytest
import torch

from commands import tilemla
from tilemla import fingerprint
from tilemla.bench.cases import GridCase
from tilemla.bench.record import TimingMode
from tilemla.config import DEFAULT_CONFIG, KernelConfig
from tilemla.costs import ScheduleCosts, formula_costs
from tilemla.errors import ModuleNotBuiltError
from tilemla.launch import CPU_NUM_SMS
from tilemla.loader import ensure_module
from tilemla.manifest import manifest_path
from tilemla.spec import KernelSpec
from tilemla.tuning.session import TuneError, make_run, tune_kernel
from tilemla.tuning.table import log_path, read_table, table_path
from tilemla.tuning.trial import read_trials
from tilemla.tuning.variants import Variant, build_variants, find_variants

CPU = KernelSpec(arch="cpu")
FAST, OTHER = KernelConfig(short_piece=8), KernelConfig(splits_ahead=4)
DEVICE = torch.device("cpu")
CASE = GridCase(1, 512, 16, 1)
TINY = ["--arch", "cpu", "--match", "L256 h16k1 s1", "--rounds", "2", "--rep-ms", "1"]
TWO_COSTS = [
    "--param",
    "overhead=1",
    "--param",
    "combine_eighths=0,1023",
    "--param",
    "piece_64ths=0",
    "--param",
    "crowded_eighths=0",
]
UNCUT = ScheduleCosts(1, 1023, 0, 0)


@pytest.fixture(scope="module")
def entry():
    return ensure_module(CPU).entry


@pytest.fixture
def modules(entry, tmp_path):
    """A folder with the module of the default configuration."""
    shutil.copytree(entry.directory, tmp_path / "modules" / "default" / CPU.name)
    return tmp_path / "modules"


def test_the_plan_is_listed_and_nothing_is_done(tmp_path):
    done = tilemla("tune", "--arch", "sm_90a", "--dry-run", "--out-dir", str(tmp_path / "logs"))
    assert done.exit_code == 0
    for line in (
        "mla_decode_sm_90a_bf16_",
        "  default\n",
        "  splits_ahead4\n",
        "350 combinations",
        "tune: b1 L1024 h16k1",
    ):
        assert line in done.stdout
    assert not (tmp_path / "logs").exists()


def test_the_plan_as_json(tmp_path):
    words = ["--arch", "sm_90a", "--arch", "cpu", "--shapes", "imbalanced", "--param", "short_piece=8"]
    done = tilemla("tune", *words, "--arch", "sm_90a", "--dry-run", "--json")
    assert done.exit_code == 2 and "short_piece must be left at the default" in done.stderr
    done = tilemla(
        "tune", "--arch", "sm_90a", "--shapes", "imbalanced", "--param", "short_piece=8", "--dry-run", "--json"
    )
    [plan] = json.loads(done.stdout)["plans"]
    assert [KernelConfig.from_dict(fields).name for fields in plan["configs"]] == ["default", "short_piece8"]
    assert plan["costs"] == [] and plan["cases"] == ["b4 L4641,45118,1730,1696 h16k1 s4 causal bf16"]


@pytest.mark.parametrize(
    "words, status, reason",
    [
        (["--build-only"], 2, "--build-only needs --modules"),
        (["--choose-only", "--dry-run"], 2, "--choose-only and --dry-run exclude each other"),
        (["--param", "speed=9"], 2, "NAME one of short_piece"),
        (["--param", "overhead=16"], 2, "overhead must be 0 to 15, got 16"),
        (["--match", "b7"], 2, "no case's name contains 'b7'; names are like 'b2 L256"),
        (["--head-dim-qk", "575"], 2, "575"),
        (["--choose-only", "--out-dir", "none-there"], 1, "no log of mla_decode_cpu_bf16_"),
        (["--rounds", "0"], 2, "--rounds"),
    ],
)
def test_what_is_refused(words, status, reason):
    done = tilemla("tune", "--arch", "cpu", *words)
    assert done.exit_code == status
    assert reason in " ".join(done.stderr.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_machine_without_a_gpu_is_told_what_it_can_do(tmp_path):
    done = tilemla("tune", "--arch", "sm_90a", "--out-dir", str(tmp_path / "logs"))
    assert done.exit_code == 1
    assert "sees none" in done.stderr and "--build-only --modules DIR" in done.stderr
    assert not (tmp_path / "logs").exists()


def test_a_folder_that_cannot_be_made_is_known_before_anything_is_built(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tilemla.cli.tune.build_variants", lambda *_: pytest.fail("built"))
    done = tilemla("tune", *TINY, "--out-dir", str(tmp_path / "file" / "logs"))
    assert done.exit_code == 1 and "--out-dir:" in done.stderr


def test_a_run_on_a_cpu(modules, tmp_path, monkeypatch):
    """With modules that were built before, as on a machine without a compiler; a second run adds to the log."""
    monkeypatch.setenv("TILEMLA_BUILD", "never")
    logs = tmp_path / "logs"
    words = ["tune", *TINY, *TWO_COSTS, "--modules", str(modules), "--out-dir", str(logs)]
    done = tilemla(*words)
    assert done.exit_code == 0, done.stderr
    assert "1/1 costs, b2 L256 h16k1 s1 causal bf16: default " in done.stderr
    assert "part_tile/some" in done.stdout and str(table_path(logs, CPU, "cpu")) in done.stdout
    trials = read_trials(log_path(logs, CPU, "cpu"))
    assert [trial.role for trial in trials] == ["default", *["candidate"] * (len(trials) - 2), "again"]
    assert all(trial.stage == "costs" and len(trial.times_us) == 2 and not trial.failure for trial in trials)
    tried = {each for trial in trials for each in trial.costs}
    assert {ScheduleCosts(1, 0, 0, 0), UNCUT} <= tried
    assert trials[0].run.versions["fingerprint"] == fingerprint.source_fingerprint()
    table = read_table(table_path(logs, CPU, "cpu"))
    assert table.spec == CPU and table.costs["part_tile/some"].evidence.num_cases == 1

    done = tilemla(*words, "--json")
    assert done.exit_code == 0
    again = read_trials(log_path(logs, CPU, "cpu"))
    assert again[: len(trials)] == trials and len(again) == 2 * len(trials)
    newest = read_table(table_path(logs, CPU, "cpu"))
    assert json.loads(done.stdout)["tables"] == [json.loads(newest.to_json())]

    table_path(logs, CPU, "cpu").unlink()
    (logs / CPU.name / "cpu.bench.jsonl").write_text("the benchmark's\n")
    done = tilemla("tune", "--arch", "cpu", "--choose-only", "--out-dir", str(logs))
    assert done.exit_code == 0, done.stderr
    assert read_table(table_path(logs, CPU, "cpu")) == newest


def test_a_bad_log_is_named(tmp_path):
    path = log_path(tmp_path, CPU, "cpu")
    path.parent.mkdir()
    path.write_text("{}\n")
    done = tilemla("tune", "--arch", "cpu", "--choose-only", "--out-dir", str(tmp_path))
    assert done.exit_code == 1 and f"{path}:1 is not a trial: KeyError: 'spec'" in " ".join(done.stderr.split())


def test_modules_that_are_missing_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEMLA_BUILD", "never")
    done = tilemla("tune", *TINY, "--modules", str(tmp_path / "m"), "--out-dir", str(tmp_path / "logs"))
    assert done.exit_code == 1 and f"not built: there is none in {tmp_path / 'm' / 'default'}" in done.stderr
    done = tilemla("tune", "--arch", "cpu", "--modules", str(tmp_path / "m"), "--build-only")
    assert done.exit_code == 1 and "TILEMLA_BUILD is never" in done.stderr


def test_a_build_that_fails_is_remembered_for_who_measures(tmp_path, monkeypatch):
    """What a compiler said comes out of the folder of modules, and a build that then works takes it away."""
    from tilemla import generate

    def fail(spec, config, store, on_step):
        raise ModuleNotBuiltError("ptxas: spills of 36 bytes")

    monkeypatch.setattr(generate, "_run_child", fail)
    variant = Variant(CPU, DEFAULT_CONFIG)
    [outcome] = build_variants([variant], tmp_path, 1)
    assert outcome.error == "ptxas: spills of 36 bytes"
    assert find_variants([variant], tmp_path).failures == {variant: "ptxas: spills of 36 bytes"}
    done = tilemla("tune", "--arch", "cpu", "--build-only", "--modules", str(tmp_path))
    assert done.exit_code == 1 and "spills of 36 bytes" in done.stderr and "0 of 1 modules are in" in done.stdout

    def build(spec, config, store, on_step):
        shutil.copytree(ensure_module(CPU).entry.directory, store / spec.name)

    monkeypatch.setattr(generate, "_run_child", build)
    [outcome] = build_variants([variant], tmp_path, 1)
    assert outcome.state == "built"
    assert find_variants([variant], tmp_path).failures == {}


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(fingerprint="0123"), r"made from other sources \(0123\) than are installed here"),
        (dict(config=FAST.to_dict()), "expected a module of .*'short_piece': 16.*, got one of .*'short_piece': 8"),
        (dict(sha256="0"), "expected sha256 0"),
    ],
)
def test_modules_that_are_not_what_they_should_be_are_refused(modules, changes, reason):
    folder = modules / "default" / CPU.name
    path = manifest_path(folder, CPU.name)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModuleNotBuiltError, match=reason):
        find_variants([Variant(CPU, DEFAULT_CONFIG)], modules)


class Sequence:
    """A clock that says one time after the other."""

    def __init__(self, *times_us):
        self.times_us = itertools.cycle(times_us)

    def ready(self, call):
        call()
        return call

    def time_us(self, call):
        return float(next(self.times_us))

    def host_time_us(self, call):
        return None


def session(entry, log, entries, clock, *, failures=(), costs=(), rounds=1):
    run = make_run(entry.manifest, DEVICE, TimingMode("none", rounds=rounds, rep_ms=1))
    told = []
    table = tune_kernel(run, entries, dict(failures), list(costs), [("cpu", CASE)], log, DEVICE, clock, told.append)
    return table, told


def test_a_session_chooses_a_configuration_then_costs_with_it(entry, tmp_path, monkeypatch):
    """One module stands for both configurations; the clock says that the second is faster, and so are the costs."""
    monkeypatch.setattr("tilemla.tuning.table._parse", lambda fields: pytest.fail("a table was read"))
    log = tmp_path / "cpu.jsonl"
    entries = {FAST: entry, DEFAULT_CONFIG: entry}
    costs = [UNCUT]
    table, told = session(
        entry, log, entries, Sequence(100, 80, 100, 70, 60, 70), failures={OTHER: "spills"}, costs=costs
    )
    assert table.config == FAST and table.config_evidence.best == "short_piece8"
    assert table.chosen_costs == {"part_tile/deep": costs[0]}
    failed, *trials = read_trials(log)
    assert (failed.config, failed.failure, failed.case, failed.times_us) == (OTHER, "spills", None, ())
    assert [trial.config for trial in trials] == [DEFAULT_CONFIG, FAST, DEFAULT_CONFIG, FAST, FAST, FAST]
    assert [trial.time_us for trial in trials] == [100, 80, 100, 70, 60, 70]
    assert [trial for turn in told for trial in turn] == trials


def test_a_session_needs_the_default_and_what_was_chosen_before(entry, tmp_path):
    log = tmp_path / "cpu.jsonl"
    with pytest.raises(TuneError, match="the default of mla_decode_cpu_bf16_.* is missing: spills"):
        session(entry, log, {FAST: entry}, Sequence(1), failures={DEFAULT_CONFIG: "spills"})
    session(entry, log, {DEFAULT_CONFIG: entry, FAST: entry}, Sequence(100, 80, 100))
    with pytest.raises(TuneError, match=r"chose the configuration short_piece8, .* add --param short_piece=8"):
        session(entry, log, {DEFAULT_CONFIG: entry}, Sequence(1), costs=[UNCUT])


def test_equal_schedules_are_timed_once(entry, tmp_path):
    log = tmp_path / "cpu.jsonl"
    formula = formula_costs(CASE.rows, CASE.batch_size, CPU_NUM_SMS)
    costs = [*(formula._replace(combine_eighths=formula.combine_eighths + more) for more in (1, 2, 3)), UNCUT]
    session(entry, log, {DEFAULT_CONFIG: entry}, Sequence(1), costs=costs)
    assert [len(trial.costs) for trial in read_trials(log)] == [4, 1, 4]


def test_variants_in_the_cache_are_known_to_its_commands(entry, store, monkeypatch):
    """They lie in stores of their own, which no call looks at."""
    folder = store.with_name(f"{store.name}+default")
    shutil.copytree(entry.directory, folder / CPU.name)
    assert set(find_variants([Variant(CPU, DEFAULT_CONFIG)], None).entries) == {Variant(CPU, DEFAULT_CONFIG)}
    assert str(folder) in tilemla("list").stdout
    done = tilemla("clean", "--stale", "--yes")
    assert done.exit_code == 0 and not (folder / CPU.name).exists()
