"""What the machine is: asked without initialising CUDA, compared by numbers, and told in words that help."""

import ast
import ctypes
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fakes import compile_library, make_driver
from tilemla import host
from tilemla.host import DriverError, Gpu, version_numbers, why_unmet
from tilemla.manifest import Requirements


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return make_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def with_driver(driver, monkeypatch):
    """Child processes find the fake driver; one that this process opened stays what it is."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))


def ask(code, library_path=None):
    """What a fresh process prints."""
    environment = dict(os.environ) if library_path is None else os.environ | {"LD_LIBRARY_PATH": str(library_path)}
    code = f"import ctypes, os, sys; from tilemla import host; {code}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_glibc_version():
    libc = ctypes.CDLL(None)
    libc.gnu_get_libc_version.restype = ctypes.c_char_p
    assert host.glibc_version() == libc.gnu_get_libc_version().decode()


def test_other_c_library(monkeypatch):
    def confstr(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", confstr)
    assert host.glibc_version() == ""


def make_libstdcxx(folder, *versions):
    """A libstdc++.so.6 that defines these symbol versions."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "versions.map"
    script.write_text("".join(f"{version} {{ global: f{i}; }};\n" for i, version in enumerate(versions)))
    source = "".join(f"int f{i}() {{ return 0; }}\n" for i in range(len(versions)))
    return compile_library(folder, "libstdc++.so.6", source, f"-Wl,--version-script,{script}")


def test_libstdcxx_version_is_the_greatest_number(tmp_path):
    folder = make_libstdcxx(tmp_path, "GLIBCXX_3.4", "GLIBCXX_3.4.9", "GLIBCXX_3.4.11", "CXXABI_1.3.15")
    assert ask("print(host.libstdcxx_version())", folder) == "3.4.11"


def test_loaded_libstdcxx_counts(tmp_path):
    """A process that loaded one keeps it, whatever the search path would give."""
    folder = make_libstdcxx(tmp_path / "a", "GLIBCXX_3.4.9")
    other = make_libstdcxx(tmp_path / "b", "GLIBCXX_3.4.7")
    loaded = f"ctypes.CDLL({str(other / 'libstdc++.so.6')!r}); print(host.libstdcxx_version())"
    assert ask(loaded, folder) == "3.4.7"


def test_libstdcxx_that_was_replaced_under_the_process(tmp_path):
    folder = make_libstdcxx(tmp_path / "a", "GLIBCXX_3.4.9")
    (folder / "libstdc++.so.6").rename(folder / "libstdc++.so.6.0.9")
    (folder / "libstdc++.so.6").symlink_to("libstdc++.so.6.0.9")
    newer = make_libstdcxx(tmp_path / "b", "GLIBCXX_3.4.9", "GLIBCXX_3.4.10")
    upgrade = (
        "ctypes.CDLL('libstdc++.so.6'); "
        f"os.unlink({str(folder / 'libstdc++.so.6')!r}); os.unlink({str(folder / 'libstdc++.so.6.0.9')!r}); "
        f"os.rename({str(newer / 'libstdc++.so.6')!r}, {str(folder / 'libstdc++.so.6')!r}); "
        "print(host.libstdcxx_version())"
    )
    assert ask(upgrade, folder) == "3.4.10"


def test_no_libstdcxx(monkeypatch):
    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert host.libstdcxx_version.__wrapped__() == ""


@pytest.mark.parametrize(
    "number, version", [("13000", "13.0"), ("12040", "12.4"), ("12080", "12.8"), ("13010", "13.1")]
)
def test_driver_version(with_driver, monkeypatch, tmp_path, number, version):
    monkeypatch.setenv("FAKE_VERSION", number)
    monkeypatch.setenv("FAKE_MARK", str(tmp_path / "mark"))
    assert ask("print(host.driver_version())") == version
    assert not (tmp_path / "mark").exists(), "CUDA was initialised"


def test_driver_that_does_not_say(with_driver, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_VERSION_ERROR", "34")  # CUDA_ERROR_STUB_LIBRARY
    assert ask("print(repr(host.driver_version()))") == "''"
    no_driver = compile_library(tmp_path, "libcuda.so.1", "int something_else() { return 0; }")
    assert ask("print(repr(host.driver_version()))", no_driver) == "''"


def test_no_driver(monkeypatch):
    monkeypatch.setattr(host, "_open_driver", lambda: None)
    assert host.driver_version.__wrapped__() == ""


@pytest.mark.parametrize(
    "version, numbers",
    [
        ("2.36", (2, 36)),
        ("2.13.0+cpu", (2, 13)),
        ("3.4.9", (3, 4, 9)),
        ("13", (13,)),
        ("13.0", (13,)),
        ("", ()),
        ("x", ()),
    ],
)
def test_version_numbers(version, numbers):
    assert version_numbers(version) == numbers


HERE = {"glibc_version": "2.36", "libstdcxx_version": "3.4.30", "driver_version": "12.8"}


@pytest.fixture
def here(monkeypatch):
    for name, version in HERE.items():
        monkeypatch.setattr(host, name, lambda version=version: version)


@pytest.mark.parametrize(
    "requires",
    [
        Requirements(),
        Requirements(glibc="2.36", libstdcxx="3.4.30", driver="12.8"),
        # By text, each of these would be greater.
        Requirements(glibc="2.4", libstdcxx="3.4.9", driver="12.8"),
        Requirements(driver="9.2"),
    ],
)
def test_met(here, requires):
    assert why_unmet(requires) is None


@pytest.mark.parametrize(
    "requires, message",
    [
        (
            Requirements(glibc="2.38"),
            "glibc 2.38 or later is needed, here is 2.36: build the module on a distribution as old",
        ),
        (
            Requirements(libstdcxx="3.4.32"),
            r"libstdc\+\+ with GLIBCXX 3.4.32 or later is needed, here is 3.4.30: install",
        ),
        (
            Requirements(driver="13.0"),
            "a driver for CUDA 13.0 or later is needed, here is 12.8: upgrade the NVIDIA driver",
        ),
    ],
)
def test_unmet(here, requires, message):
    reason = why_unmet(requires)
    assert re.match(message, reason)


def test_all_that_is_unmet_is_named(here):
    reason = why_unmet(Requirements(glibc="3.0", libstdcxx="3.5", driver="14.0"))
    assert reason.count(" or later is needed, here is ") == 3


def test_missing_driver_is_not_unmet(here, monkeypatch):
    """A module can be opened for a look where there is no GPU."""
    monkeypatch.setattr(host, "driver_version", lambda: "")
    assert why_unmet(Requirements(driver="13.0")) is None


def test_missing_library_is_unmet(here, monkeypatch):
    monkeypatch.setattr(host, "libstdcxx_version", lambda: "")
    monkeypatch.setattr(host, "glibc_version", lambda: "")
    assert "GLIBCXX 3.4.21 or later is needed, here is none" in why_unmet(Requirements(libstdcxx="3.4.21"))
    assert "glibc 2.17 or later is needed, here is none" in why_unmet(Requirements(glibc="2.17"))


def test_what_is_not_required_is_not_asked_for(monkeypatch):
    def refuse():
        raise AssertionError("asked")

    for name in HERE:
        monkeypatch.setattr(host, name, refuse)
    assert why_unmet(Requirements()) is None


def test_gpus_are_asked_for_in_a_child(with_driver, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert host.list_gpus() == [
        Gpu("Fake GPU 0", (9, 0), sms=132, memory_bytes=80 << 30),
        Gpu("Fake GPU 1", (9, 0), sms=131, memory_bytes=80 << 30),
    ]
    pid, visible = (tmp_path / "mark").read_text().split()
    assert int(pid) != os.getpid() and visible == "1,0"


def test_no_gpu(with_driver, monkeypatch):
    monkeypatch.setenv("FAKE_INIT_ERROR", "100")  # CUDA_ERROR_NO_DEVICE
    assert host.list_gpus() == []


def test_broken_driver(with_driver, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_INIT_ERROR", "803")
    with pytest.raises(
        DriverError, match="cuInit failed with error 803: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, system has"
    ):
        host.list_gpus()
    monkeypatch.setenv("FAKE_INIT_ERROR", "12345")
    with pytest.raises(DriverError, match="error 12345: unknown"):
        host.list_gpus()
    no_driver = compile_library(tmp_path, "libcuda.so.1", "int something_else() { return 0; }")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(no_driver))
    with pytest.raises(DriverError, match="undefined symbol: cuInit"):
        host.list_gpus()


def test_driver_that_crashes(with_driver, monkeypatch):
    monkeypatch.setenv("FAKE_CRASH", "1")
    with pytest.raises(DriverError, match="asking the NVIDIA driver for its GPUs ended with signal SIGABRT"):
        host.list_gpus()


def test_driver_that_hangs(with_driver, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_HANG", "1")
    monkeypatch.setenv("FAKE_MARK", str(tmp_path / "mark"))
    began = time.perf_counter()
    with pytest.raises(DriverError, match="did not answer within 2 s"):
        host.list_gpus(timeout_s=2)
    assert time.perf_counter() - began < 20
    status = Path("/proc", (tmp_path / "mark").read_text().split()[0], "status")
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.perf_counter() - began < 20, "the child hangs on"
        time.sleep(0.05)


def test_no_interpreter(monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(DriverError, match="no Python interpreter"):
        host.list_gpus()


@pytest.mark.gpu
def test_real_gpus():
    found = host.list_gpus()
    assert len(found) == torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(0)
    assert found[0].name == properties.name and found[0].sms == properties.multi_processor_count
    assert found[0].capability == torch.cuda.get_device_capability(0)
    assert found[0].memory_bytes >= properties.total_memory
    assert version_numbers(host.driver_version()) >= version_numbers(torch.version.cuda)[:1]


def test_runs_as_a_script_with_the_standard_library_alone():
    """The child that asks for the GPUs has neither tilemla nor anything that is installed."""
    tree = ast.parse(Path(host.__file__).read_text())
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(name.partition(".")[0] in sys.stdlib_module_names for name in names)
