"""``tilemla build`` as a user runs it: real processes, a pseudo-terminal, a compiler that fails."""

import dataclasses
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from processes import wait_until_gone
from tilemla import __version__, fingerprint
from tilemla.cli import main
from tilemla.spec import BENCHMARK_SPECS, DTYPES, PRESETS, SUPPORTED_SPECS, TESTED_ARCHS, KernelSpec, select_specs

SPEC = KernelSpec(arch="cpu", dtype="bfloat16")
OTHER = KernelSpec(arch="cpu", dtype="float16")
BYTES_584 = KernelSpec(arch="cpu", kv_format="fp8_584", head_dim_qk=512, page_block_size=0, kernel="mla_sparse_decode")
ALL_PRESETS = {spec for specs in PRESETS.values() for spec in specs}
# The two modules above are all that these build.
ONE_PRESET = ("--preset", "deepseek-v3", "--arch", "cpu")
TIMEOUT_S = 300


def command(*arguments):
    return [sys.executable, "-m", "tilemla", *arguments]


def run(*arguments, **environment):
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        env=os.environ | environment,
    )


def invoke(*arguments):
    return CliRunner().invoke(main, arguments)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("TILEMLA_MODULE_PATH", "TILEMLA_BUILD", "TILEMLA_PRELOAD", "TILEMLA_LOG"):
        monkeypatch.delenv(name, raising=False)


def test_version_and_help():
    assert invoke("--version").stdout == f"tilemla {__version__}\n"
    for name in ("bench", "build", "clean", "doctor", "inspect", "list", "tune"):
        result = invoke(name, "--help")
        assert result.exit_code == 0 and "Examples:" in result.stdout
        assert name in invoke("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "sm_70"], ["sm_70", "sm_80", "sm_90a"]),
        (["--preset", "deepseek-v9"], ["deepseek-v9", "deepseek-v3"]),
        (["--head-dim-qk", "575"], ["575", "576"]),
        (["--page-block-size", "7"], ["7", "64"]),
        (["--kernel", "read_page"], ["read_page", "mla_decode", "read_pages"]),
        (["--kernel", "read_pages", "--preset", "deepseek-v3"], ["no module fits all of these options"]),
        (["--jobs", "-1"], ["-1"]),
        (["--colour"], ["No such option"]),
    ],
)
def test_bad_usage(arguments, words):
    result = invoke("build", *arguments)
    assert result.exit_code == 2
    assert all(word in result.output for word in words)


def test_unknown_command():
    assert invoke("bulid").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "specs"),
    [
        ([], [spec for spec in SUPPORTED_SPECS if spec in ALL_PRESETS and spec.arch in TESTED_ARCHS]),
        (["--preset", "deepseek-v3.2", "--arch", "cpu"], [s for s in PRESETS["deepseek-v3.2"] if s.arch == "cpu"]),
        (["--kernel", "mla_sparse_decode", "--kv-format", "fp8_584", "--arch", "cpu"], [BYTES_584]),
        (["--preset", "deepseek-v3"], [spec for spec in PRESETS["deepseek-v3"] if spec.arch in TESTED_ARCHS]),
        (["--arch", "sm_120", "--dtype", "float16"], [KernelSpec(arch="sm_120", dtype="float16")]),
        (["--preset", "deepseek-v3", "--arch", "cpu"], [SPEC, OTHER]),
        (["--kernel", "mla_decode", "--arch", "cpu"], [SPEC, OTHER]),
        (["--kernel", "read_pages"], BENCHMARK_SPECS),
        (
            ["--kernel", "read_pages", "--kernel", "mla_decode"],
            [*select_specs(kernels=["mla_decode"]), *BENCHMARK_SPECS],
        ),
        (["--arch", "cpu", "--arch", "sm_90a", "--dtype", "float16"], select_specs(dtypes=["float16"])),
        (
            ["--head-dim-qk", "576", "--page-block-size", "64", "--arch", "cpu", "--dtype", "bfloat16"],
            [dataclasses.replace(SPEC, kv_format=kv_format) for kv_format in ("dense", "dense_fp8", "fp8_656")],
        ),
        (SPEC.build_options.split(), [SPEC]),
        (BYTES_584.build_options.split(), [BYTES_584]),
        (
            ["--kv-format", "dense"],
            [spec for spec in SUPPORTED_SPECS if spec.arch in TESTED_ARCHS and spec.kv_format == "dense"],
        ),
        (
            ["--page-block-size", "16", "--arch", "cpu", "--dtype", "bfloat16"],
            [dataclasses.replace(SPEC, head_dim_qk=qk, page_block_size=16) for qk in (576, 512)],
        ),
        (["--preset", "deepseek-v3", "--head-dim-qk", "576", "--arch", "cpu"], [SPEC, OTHER]),
    ],
)
def test_selection(tmp_path, arguments, specs):
    result = invoke("build", *arguments, "--out-dir", str(tmp_path / "new"), "--dry-run", "--json")
    assert result.exit_code == 0
    assert [row["spec"] for row in json.loads(result.stdout)["modules"]] == [spec.to_dict() for spec in specs]
    assert not (tmp_path / "new").exists()


def test_build_then_resume(tmp_path):
    """The first one is built, then it is up to date and only the second is."""
    done = run("build", *ONE_PRESET, "--dtype", "bfloat16", "--out-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(rf"{SPEC.name} +built", done.stdout) and str(tmp_path) in done.stdout
    assert f"tilemla: {SPEC.name}: compiling mla_decode" in done.stderr
    before = (tmp_path / SPEC.name / f"{SPEC.name}.so").stat().st_mtime_ns
    done = run("build", *ONE_PRESET, "--out-dir", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["modules"]
    assert (first["name"], first["state"]) == (SPEC.name, "present")
    assert (second["name"], second["state"]) == (OTHER.name, "built")
    assert second["library_bytes"] == (tmp_path / OTHER.name / f"{OTHER.name}.so").stat().st_size
    assert (tmp_path / SPEC.name / f"{SPEC.name}.so").stat().st_mtime_ns == before


@pytest.fixture
def failing_compiler(tmp_path):
    """A C++ compiler that fails for modules of float16."""
    from tilemla.toolchain import find_cxx

    script = tmp_path / "failing-c++"
    script.write_text(
        f'#!/bin/sh\ncase "$PWD" in *{OTHER.name}*) echo "mla_decode.cc:1:1: error: a bad day" >&2; exit 1;; esac\n'
        f'exec {find_cxx()} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def test_a_failure_does_not_stop_the_others(tmp_path, failing_compiler):
    out = tmp_path / "out"
    done = run("build", *ONE_PRESET, "--out-dir", str(out), "--jobs", "1", "--json", CXX=failing_compiler)
    assert done.returncode == 1
    states = {row["name"]: row for row in json.loads(done.stdout)["modules"]}
    assert states[SPEC.name]["state"] == "built" and states[OTHER.name]["state"] == "failed"
    assert "error: a bad day" in states[OTHER.name]["error"]
    assert "error: a bad day" in done.stderr and "1 of 2 modules failed" in done.stderr
    assert (out / SPEC.name).is_dir() and not (out / OTHER.name).exists()


def test_no_wheel_of_a_failure(tmp_path, failing_compiler):
    arguments = [*ONE_PRESET, "--dtype", "float16", "--wheel", "--out-dir", str(tmp_path / "dist")]
    done = run("build", *arguments, CXX=failing_compiler, TILEMLA_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 1 and "no wheel was made" in done.stderr
    assert not (tmp_path / "dist").exists()


def test_wheel(tmp_path):
    """From the modules in the cache, one wheel an architecture."""
    result = run("build", *ONE_PRESET, "--wheel", "--out-dir", str(tmp_path / "dist"), "--json")
    assert result.returncode == 0, result.stderr
    (wheel,) = json.loads(result.stdout)["wheels"]
    assert [str(path) for path in (tmp_path / "dist").iterdir()] == [wheel]
    assert re.fullmatch(r"tilemla_modules_cpu-.*\.whl", Path(wheel).name)


def test_without_tilelang(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "tool_versions", fingerprint.tool_versions.__wrapped__)
    monkeypatch.setattr(fingerprint, "_version", lambda name: "absent")
    result = invoke("build", *ONE_PRESET)
    assert result.exit_code == 1
    assert "not installed: tilelang, apache-tvm-ffi; pip install 'tilemla[codegen]'" in result.output


def on_terminal(arguments, *, interrupt_at=None):
    """Run with stderr on a pseudo-terminal: exit status, stdout and what the terminal got."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "160"},
    )
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            seen += chunk
        if interrupt_at is not None and interrupt_at in seen:
            process.send_signal(signal.SIGINT)
            interrupt_at = None
    stdout, _ = process.communicate(timeout=60)
    os.close(ours)
    return process.returncode, stdout, seen.decode()


def test_live_progress_on_a_terminal(tmp_path):
    status, stdout, screen = on_terminal(["build", *ONE_PRESET, "--dtype", "bfloat16", "--out-dir", str(tmp_path)])
    assert status == 0
    assert "\x1b[?25l" in screen and "\x1b[?25h" in screen, "the cursor is hidden while the display is live, then shown"
    for step in ("loading TileLang", "lowering", "compiling mla_decode", "linking", "built in"):
        assert step in screen
    assert re.search(r"[⠁-⣿]", screen), "a spinner turns"
    assert "✓" in screen.splitlines()[-1] or "✓" in screen
    assert "\x1b" not in stdout and SPEC.name in stdout


def test_interrupt(tmp_path):
    status, _, screen = on_terminal(
        ["build", *ONE_PRESET, "--out-dir", str(tmp_path)], interrupt_at=b"compiling mla_decode"
    )
    assert status == 1 and "Aborted!" in screen and "Traceback" not in screen
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    wait_until_gone(tmp_path)


def test_presets_are_supported():
    for specs in PRESETS.values():
        assert specs and set(specs) <= set(SUPPORTED_SPECS)
        assert {spec.dtype for spec in specs} == set(DTYPES)
