"""``tilemla doctor`` in processes of its own: with a driver, on a terminal, on a machine that has next to nothing."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from fakes import make_driver, make_entry
from tilemla import host, tuning_logs
from tilemla.spec import PRESETS

pytestmark = pytest.mark.usefixtures("serving_machine")


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A directory of the preset's modules, found first."""
    for spec in PRESETS["deepseek-v3"]:
        make_entry(tmp_path / "modules", spec)
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(tmp_path / "modules"))


def run_process(*words, **environment):
    return subprocess.run(
        [sys.executable, *words], env=os.environ | environment, capture_output=True, text=True, check=False, cwd="/"
    )


def test_real_process_with_a_gpu(modules, tmp_path):
    driver = make_driver(tmp_path / "driver")
    done = run_process("-m", "tilemla", "doctor", "--json", LD_LIBRARY_PATH=str(driver))
    findings = {
        finding["topic"]: finding for section in json.loads(done.stdout)["sections"] for finding in section["findings"]
    }
    assert findings["driver"]["text"] == "for CUDA 13.0"
    assert findings["GPU 1"]["text"].startswith("Fake GPU 1, compute capability 9.0, 131 SMs")
    # The torch of this environment may be one without CUDA, which is then the only problem.
    problems = [topic for topic, finding in findings.items() if finding["state"] == "problem"]
    assert problems == [] if done.returncode == 0 else ["torch"]
    done = run_process("-m", "tilemla", "doctor", LD_LIBRARY_PATH=str(driver), FAKE_INIT_ERROR="803")
    assert done.returncode == 1 and "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" in done.stdout and not done.stderr


def test_real_process_imports_nothing_heavy(modules):
    code = (
        "import atexit, sys; from tilemla.cli import main; "
        "atexit.register(lambda: print([name for name in ('torch', 'numpy', 'tvm_ffi', 'tilelang') "
        "if name in sys.modules])); main(['doctor'])"
    )
    done = run_process("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def bare_site(tmp_path):
    """Packages of a machine that only serves: no TileLang, and of torch and TVM-FFI no more than their metadata."""
    site = tmp_path / "site"
    site.mkdir()
    packages = ["click", "rich", "filelock", "platformdirs", "pygments", "markdown-it-py", "mdurl", "numpy"]
    for name in packages:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files if file.parts[0] != ".."}:
            (site / top).symlink_to(distribution.locate_file(top))
    for name in ("torch", "apache-tvm-ffi", "tilemla"):
        folder = site / f"{name.replace('-', '_')}-{importlib.metadata.version(name)}.dist-info"
        folder.mkdir()
        distribution = importlib.metadata.distribution(name)  # of a checkout, perhaps: a build's egg-info
        metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
        (folder / "METADATA").write_text(metadata)
    (site / "tilemla").mkdir()
    for part in [*Path(host.__file__).parent.iterdir(), Path(tuning_logs.__file__).parent]:
        (site / "tilemla" / part.name).symlink_to(part)
    return site


def test_bare_machine(modules, bare_site, tmp_path, monkeypatch):
    """No TileLang, no compiler, nothing on PATH: a machine that serves what was built elsewhere."""
    (tmp_path / "bin").mkdir()
    code = f"import sys; sys.path.append({str(bare_site)!r}); from tilemla.cli import main; main(['doctor'])"
    words = ("-S", "-c", code)
    done = run_process(*words, PATH=str(tmp_path / "bin"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tilelang: not installed" in done.stdout and "no C++ compiler was found" in done.stdout
    monkeypatch.delenv("TILEMLA_MODULE_PATH")
    done = run_process(*words, PATH=str(tmp_path / "bin"), TILEMLA_BUILD="auto")
    assert done.returncode == 1 and not done.stderr
    assert "pip install 'tilemla[codegen]'" in done.stdout and "pip install tilemla_modules_cpu-*.whl" in done.stdout


def test_on_a_terminal():
    """Coloured, and commands and paths are not broken into lines, however narrow it is: they are there to be copied."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 40, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color"}
    command = [sys.executable, "-m", "tilemla", "doctor"]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd="/")
    os.close(theirs)
    output = b""
    # Reading ends with an error when the child, and with it the last writer, is gone.
    with contextlib.suppress(OSError):
        while chunk := os.read(ours, 65536):
            output += chunk
    os.close(ours)
    assert child.wait() == 1
    assert b"\x1b[1;31mproblem" in output
    text = re.sub(r"\x1b\[[0-9;]*m", "", output.decode()).replace("\r\n", "\n")
    assert "\n          mend: tilemla build --preset deepseek-v3 --arch cpu\n" in text
