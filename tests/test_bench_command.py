"""``tilemla bench`` as a user drives it: what it prints, draws, logs and refuses."""

import json
import os
import pty
import subprocess
import sys

import pytest
import torch

from bench_records import H100_LOG, assert_picture, run_bench
from tilemla.bench.cases import select_cases
from tilemla.bench.record import Record, read_log

TINY = ["--device", "cpu", "--cases", "cpu", "--match", "h16k1 s1", "--rounds", "2", "--rep-ms", "1"]
TINY_CASES = ["b2 L256 h16k1 s1 causal bf16", "b2 L~256 h16k1 s1 causal bf16"]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Two small cases, measured beside a peer that is our own kernels in a module of another name."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "own_mla.py").write_text(
        "from tilemla import get_mla_metadata, flash_mla_with_kvcache\n__version__ = '9.8'\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        files = {name: folder / f"run.{name}" for name in ("json", "log", "png")}
        outputs = [argument for name, path in files.items() for argument in (f"--{name}", path)]
        result = run_bench(*TINY, "--peer", "own_mla", *outputs)
    assert result.exit_code == 0, result.output
    return result, files


def test_table_shows_each_case_and_its_peer(tiny_run):
    result, _ = tiny_run
    lines = result.stdout.splitlines()
    assert lines[0].startswith("cpu, ") and "GB/s read" in lines[0] and "no flush, 2 rounds of 1 ms" in lines[0]
    header = next(line for line in lines if line.strip().startswith("case"))
    assert header.split() == ["case", "us", "TFLOPS", "GB/s", "floor/ours", "own_mla", "us", "/", "ours"]
    for case in TINY_CASES:
        [row] = [line for line in lines if line.strip().startswith(case)]
        time_us, tflops, bandwidth_gbs, floor, peer_us, ratio = map(float, row.strip().removeprefix(case).split())
        assert min(time_us, tflops, bandwidth_gbs, floor, peer_us) > 0
        assert 0.2 < ratio < 5  # they are the same kernels
    assert any(line.startswith("cpu: own_mla over ours: geometric mean ") for line in lines)


def test_progress_is_a_line_for_each_case(tiny_run):
    result, _ = tiny_run
    for number, case in enumerate(TINY_CASES, 1):
        assert f"{number}/2 {case}: " in result.stderr
        assert case in result.stdout


def test_json_document(tiny_run):
    _, files = tiny_run
    document = json.loads(files["json"].read_text())
    assert set(document) == {"records", "summaries", "missing_peers"}
    assert [Record.from_dict(fields).case for fields in document["records"]] == [
        case for _, case in select_cases(["cpu"], match="h16k1 s1")
    ]
    first = document["records"][0]
    assert set(first) >= set(json.loads(H100_LOG.read_text().splitlines()[0])), "a field of old logs is gone"
    assert first["versions"]["own_mla"] == "9.8"
    assert first["timing"] == {"flush": "none", "graph": False, "rounds": 2, "rep_ms": 1}
    assert first["spec"]["arch"] == first["gpu"] == "cpu"
    found = {(summary["quantity"], summary["peer"]): summary["num_cases"] for summary in document["summaries"]}
    assert found["peer/ours", "own_mla"] == 2


def test_log_holds_the_same_records(tiny_run):
    _, files = tiny_run
    lines = [json.loads(line) for line in files["log"].read_text().splitlines()]
    assert lines == json.loads(files["json"].read_text())["records"]


def test_png_is_a_picture(tiny_run):
    _, files = tiny_run
    assert_picture(files["png"])


def test_json_to_stdout_leaves_nothing_else_there():
    result = run_bench(*TINY, "--json", "-", "--dtype", "float16", "--match", "L256 h16k1 s1")
    assert result.exit_code == 0, result.output
    [record] = json.loads(result.stdout)["records"]
    assert record["spec"]["dtype"] == "float16"
    assert "floor/ours" in result.stderr


def test_auto_says_why_there_is_no_peer_on_a_cpu():
    result = run_bench(*TINY, "--match", "L256 h16k1 s1")
    assert result.exit_code == 0
    assert "peer flash_mla: none (runs on a GPU only)" in result.stderr
    assert "peers: there is none, so there are no ratios" in result.stderr
    assert "/ ours" not in result.stdout


def test_a_named_peer_must_be_there(monkeypatch, tmp_path):
    result = run_bench(*TINY, "--peer", "no_such_mla")
    assert result.exit_code == 1
    assert "peer no_such_mla cannot be timed: ModuleNotFoundError: No module named 'no_such_mla'" in result.stderr
    result = run_bench(*TINY, "--peer", "json")
    assert result.exit_code == 1
    assert "the module has no get_mla_metadata and no flash_mla_with_kvcache" in result.stderr


def test_a_peer_that_imports_but_cannot_run_is_found_out_before_the_run(monkeypatch, tmp_path):
    text = "get_mla_metadata = lambda *a: (0, 0)\ndef flash_mla_with_kvcache(*a, **k): raise OSError('no driver')\n"
    (tmp_path / "broken_mla.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    result = run_bench(*TINY, "--peer", "broken_mla")
    assert result.exit_code == 1
    assert "peer broken_mla cannot be timed: OSError: no driver" in result.stderr


def test_a_peer_that_fails_in_a_case_is_named_below_the_table(monkeypatch, tmp_path):
    (tmp_path / "picky_mla.py").write_text(
        "import tilemla\nget_mla_metadata = tilemla.get_mla_metadata\n"
        "def flash_mla_with_kvcache(q, *rest, **named):\n"
        "    if q.shape[0] == 2: raise ValueError('no batch of 2')\n"
        "    return tilemla.flash_mla_with_kvcache(q, *rest, **named)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = run_bench(*TINY, "--match", "L256 h16k1 s1", "--peer", "picky_mla")
    assert result.exit_code == 0
    assert f"{TINY_CASES[0]}: no time of picky_mla: ValueError: no batch of 2" in result.stdout


@pytest.mark.parametrize(
    "arguments, exit_code, message",
    [
        (
            ["--cases", "cpu", "--device", "cpu", "--match", "b9"],
            1,
            "no case's name contains 'b9'; names are like 'b2 L256",
        ),
        (["--device", "cpu", "--graph"], 2, "--graph, --clean and --cases targets are about a GPU"),
        (["--device", "cpu", "--clean"], 2, "--graph, --clean and --cases targets are about a GPU"),
        (["--peer", "none", "--peer", "json"], 2, "stand alone, got none, json"),
        (["--cases", "huge"], 2, "'huge' is not one of"),
        (["--rounds", "0"], 2, "0 is not in the range"),
        (["--json", "/nowhere/at/all.json"], 2, "the folder /nowhere/at does not exist"),
        (["--from", "/nowhere.jsonl"], 2, "'/nowhere.jsonl' does not exist"),
        (["--from", H100_LOG, "--cases", "grid", "--rounds", "3"], 2, "it does not go with --cases, --rounds"),
        (["--from", H100_LOG, "--match", "b9"], 1, "nothing there fits --match 'b9'"),
        (["--from", H100_LOG, "--graph", "--clean"], 1, "nothing there fits --graph --clean; it holds "),
    ],
)
def test_refusals(arguments, exit_code, message):
    result = run_bench(*arguments)
    assert result.exit_code == exit_code
    assert message in " ".join(result.stderr.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said():
    result = run_bench("--device", "cuda")
    assert result.exit_code == 1
    assert "sees no GPU" in result.stderr and "--device cpu runs here" in result.stderr


def test_missing_matplotlib_is_said_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log = tmp_path / "log.jsonl"
    result = run_bench(*TINY, "--png", tmp_path / "a.png", "--log", log)
    assert result.exit_code == 1
    assert "pip install 'tilemla[bench]'" in result.stderr
    assert not log.exists()


def test_help_has_examples():
    result = run_bench("--help")
    assert result.exit_code == 0
    examples = result.stdout.partition("Examples:\n")[2]
    assert "  tilemla bench --from h100.jsonl --png roofline.png\n" in examples


def test_a_real_process_prints_the_table(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tilemla", "bench", *TINY, "--peer", "none", "--log", "run.jsonl"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert all(case in done.stdout for case in TINY_CASES)
    assert len(read_log(tmp_path / "run.jsonl")) == 2


def test_a_terminal_gets_a_bar():
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tilemla", "bench", *TINY, "--peer", "none"]
    child = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(theirs)
    shown = b""
    with child:
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # what a terminal says at its end
                break
            if not chunk:
                break
            shown += chunk
    os.close(ours)
    assert child.returncode == 0, shown.decode()
    assert b"0/2" in shown and "━".encode() in shown
    assert all(f"{number}/2 {case}: ".encode() in shown for number, case in enumerate(TINY_CASES, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [[], ["--graph"], ["--clean"]], ids=str)
def test_the_command_on_a_gpu(mode, tmp_path):
    png = tmp_path / "roof.png"
    result = run_bench(
        "--cases",
        "small",
        "--match",
        "b1 L1024 h16",
        "--rounds",
        "2",
        "--rep-ms",
        "10",
        "--peer",
        "none",
        *mode,
        "--png",
        png,
    )
    assert result.exit_code == 0, result.output
    assert "b1 L1024 h16k1 s1 causal bf16" in result.stdout
    assert_picture(png)
