"""``tilemla doctor`` tells the truth about a machine, never falls over, and names the command that mends."""

import importlib.metadata
import json
import os

import pytest
from click.testing import CliRunner

from fakes import make_entry
from tilemla import fingerprint, host, toolchain
from tilemla.cli import main, probes
from tilemla.cli.doctor import Section, doctor
from tilemla.cli.probes import Finding
from tilemla.errors import ToolchainError
from tilemla.host import DriverError, Gpu
from tilemla.manifest import Requirements
from tilemla.spec import PRESETS
from tilemla.store import cache_store

CPU_SPECS = [spec for spec in PRESETS["deepseek-v3"] if spec.arch == "cpu"]
SM90_SPECS = [spec for spec in PRESETS["deepseek-v3"] if spec.arch == "sm_90a"]
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), sms=132, memory_bytes=80 << 30)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), sms=108, memory_bytes=80 << 30)
T4 = Gpu("Tesla T4", (7, 5), sms=40, memory_bytes=16 << 30)


@pytest.fixture(autouse=True)
def machine(serving_machine, monkeypatch):
    """A machine without a GPU."""
    with_gpus(monkeypatch)


def with_gpus(monkeypatch, *gpus, driver=""):
    monkeypatch.setattr(host, "list_gpus", lambda: list(gpus))
    monkeypatch.setattr(host, "driver_version", lambda: driver)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A directory of the preset's modules, found first."""
    for spec in PRESETS["deepseek-v3"]:
        make_entry(tmp_path / "modules", spec)
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(tmp_path / "modules"))
    return tmp_path / "modules"


def examine(*options):
    """(exit status, findings by topic, sections' states by title)"""
    done = CliRunner().invoke(doctor, ["--json", *options])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    fields = json.loads(done.stdout)
    assert fields["served"] is (done.exit_code == 0)
    findings = {
        finding["topic"]: Finding(**finding) for section in fields["sections"] for finding in section["findings"]
    }
    return done.exit_code, findings, {section["title"]: section["state"] for section in fields["sections"]}


def test_machine_that_can_serve(modules):
    status, findings, sections = examine()
    assert status == 0
    assert set(sections.values()) <= {"ok", "note"} and len(sections) == 7
    for spec in (*CPU_SPECS, *SM90_SPECS):
        assert findings[spec.name] == Finding(spec.name, "ok", f"{modules / spec.name} (TILEMLA_MODULE_PATH)")
    assert findings["glibc"].text == host.glibc_version()
    assert findings["torch"].text.startswith(importlib.metadata.version("torch"))
    assert findings["TILEMLA_BUILD"].text == "never"


def test_nothing_is_written(modules, tmp_path):
    examine()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["modules"]


def test_what_is_missing_is_named_with_the_command_that_mends():
    status, findings, sections = examine()
    assert status == 1 and sections["Modules of deepseek-v3"] == "problem"
    for spec in CPU_SPECS:
        assert findings[spec.name].state == "problem"
        assert findings[spec.name].text == "missing, and not generated on demand: TILEMLA_BUILD is never"
        assert findings[spec.name].mend == "tilemla build --preset deepseek-v3 --arch cpu"
    for spec in SM90_SPECS:
        assert findings[spec.name] == Finding(spec.name, "note", "missing, and not needed here")


def test_only_what_is_asked_for(tmp_path, monkeypatch):
    make_entry(tmp_path / "modules", CPU_SPECS[0])
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(tmp_path / "modules"))
    assert examine()[0] == 1
    status, findings, _ = examine("--dtype", CPU_SPECS[0].dtype)
    assert status == 0 and CPU_SPECS[1].name not in findings
    status, findings, _ = examine("--dtype", CPU_SPECS[1].dtype)
    assert status == 1
    assert findings[CPU_SPECS[1].name].mend.endswith(f"--arch cpu --dtype {CPU_SPECS[1].dtype}")


@pytest.fixture
def no_tools(monkeypatch):
    def missing():
        raise ToolchainError("no compiler was found: install one")

    monkeypatch.setattr(toolchain, "find_cxx", missing)
    monkeypatch.setattr(toolchain, "find_cuda_toolkit", missing)
    monkeypatch.setattr(fingerprint, "tool_versions", fingerprint.tool_versions.__wrapped__)


def test_no_compiler(no_tools, monkeypatch):
    monkeypatch.setenv("TILEMLA_BUILD", "auto")
    status, findings, sections = examine()
    assert status == 1 and sections["Compilers, to generate modules"] == "note"
    assert "no compiler was found" in findings["C++"].text and findings["C++"].mend.startswith("apt-get install g++")
    assert findings["nvcc"].mend.startswith("pip install nvidia-cuda-nvcc ")
    assert findings["generating for cpu"].text.startswith("not possible: no compiler was found")
    missing = findings[CPU_SPECS[0].name]
    assert missing.text.startswith("missing, and not generated on demand: no compiler was found")
    assert missing.mend.splitlines() == [
        "tilemla build --preset deepseek-v3 --arch cpu --wheel  # where a compiler is",
        "pip install tilemla_modules_cpu-*.whl  # here",
    ]


def test_no_compiler_is_needed_where_modules_are(modules, no_tools):
    assert examine()[0] == 0


def test_what_would_be_generated(monkeypatch):
    monkeypatch.setenv("TILEMLA_BUILD", "auto")
    status, findings, _ = examine()
    assert status == 0
    finding = findings[CPU_SPECS[0].name]
    assert (finding.state, finding.mend) == ("note", "tilemla build --preset deepseek-v3 --arch cpu")
    assert finding.text == f"missing, the first call generates it into {cache_store('cpu')}"


def test_gpu_decides_what_is_needed(monkeypatch, tmp_path):
    with_gpus(monkeypatch, T4, H100, driver="13.0")
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(tmp_path / "modules"))
    for spec in CPU_SPECS:
        make_entry(tmp_path / "modules", spec)
    status, findings, _ = examine()
    assert status == 1 and findings[SM90_SPECS[0].name].state == "problem"
    assert findings["driver"].text == "for CUDA 13.0"
    assert findings["GPU 0"].state == "note" and "there are no kernels for it" in findings["GPU 0"].text
    assert findings["GPU 1"].text == (
        "NVIDIA H100 80GB HBM3, compute capability 9.0, 132 SMs, 80.0 GiB: sm_90a modules"
    )
    for spec in SM90_SPECS:
        make_entry(tmp_path / "gpu", spec)
    # A serving image ships what its GPUs run, and no more.
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(tmp_path / "gpu"))
    monkeypatch.setattr(importlib.metadata, "version", versions(torch="2.13.0"))
    status, findings, _ = examine()
    assert status == 0 and findings[CPU_SPECS[0].name].text == "missing, and not needed here"


def test_gpu_without_kernels_leaves_the_cpu(monkeypatch):
    with_gpus(monkeypatch, T4, driver="13.0")
    status, findings, _ = examine()
    assert status == 1
    assert findings[SM90_SPECS[0].name].state == "note" and findings[CPU_SPECS[0].name].state == "problem"


def test_gpu_whose_modules_are_untested(monkeypatch):
    with_gpus(monkeypatch, A100, driver="13.0")
    status, findings, _ = examine()
    assert status == 1 and findings["GPU 0"].text.endswith("sm_80 modules, which are untested on hardware")
    wanted = [spec for spec in PRESETS["deepseek-v3"] if spec.arch == "sm_80"]
    assert wanted and all(findings[spec.name].state != "ok" for spec in wanted)
    assert findings[SM90_SPECS[0].name].text == "missing, and not needed here"
    assert not any("sm_120" in topic for topic in findings if topic.startswith("mla_decode"))


def test_gpu_that_is_asked_for_and_missing(modules):
    status, findings, _ = examine("--arch", "sm_90a")
    assert status == 1 and findings["sm_90a"] == Finding("sm_90a", "problem", "no GPU here runs its modules")
    assert examine("--arch", "cpu")[0] == 0


def test_hidden_gpus(modules, monkeypatch):
    with_gpus(monkeypatch, driver="13.0")
    status, findings, _ = examine()
    assert status == 0 and "CUDA_VISIBLE_DEVICES" in findings["GPUs"].text


def test_broken_driver(modules, monkeypatch):
    def broken():
        raise DriverError("the NVIDIA driver's cuInit failed with error 803")

    with_gpus(monkeypatch, driver="13.0")
    monkeypatch.setattr(host, "list_gpus", broken)
    status, findings, _ = examine()
    assert status == 1
    assert findings["GPUs"].state == "problem" and "error 803" in findings["GPUs"].text


@pytest.mark.parametrize(
    "requires, driver, message",
    [
        (Requirements(glibc="99.0"), "", "glibc 99.0 or later is needed, here is "),
        (Requirements(libstdcxx="3.4.999"), "", "GLIBCXX 3.4.999 or later is needed, here is "),
        (Requirements(driver="13.0"), "12.4", "a driver for CUDA 13.0 or later is needed, here is 12.4"),
    ],
)
def test_unmet_requirement(modules, tmp_path, monkeypatch, requires, driver, message):
    with_gpus(monkeypatch, driver=driver)
    make_entry(tmp_path / "first", CPU_SPECS[0], requires=requires)
    monkeypatch.setenv("TILEMLA_MODULE_PATH", os.pathsep.join([str(tmp_path / "first"), str(modules)]))
    status, findings, _ = examine()
    assert status == 1
    assert findings[CPU_SPECS[0].name].state == "problem" and message in findings[CPU_SPECS[0].name].text
    assert findings[CPU_SPECS[1].name].state == "ok"


def test_damaged_module(modules):
    (modules / CPU_SPECS[0].name / f"{CPU_SPECS[0].name}.so").write_text("changed")
    (modules / SM90_SPECS[0].name / f"{SM90_SPECS[0].name}.so").write_text("changed")
    status, findings, _ = examine()
    assert status == 1
    assert findings[CPU_SPECS[0].name].state == "problem" and "expected sha256" in findings[CPU_SPECS[0].name].text
    assert findings[SM90_SPECS[0].name].state == "note"
    assert findings[SM90_SPECS[0].name].text.startswith("not needed here; TILEMLA_MODULE_PATH holds a damaged module")


def test_cache_that_others_can_write_to(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for spec in CPU_SPECS:
        make_entry(cache_store("cpu"), spec)
    assert examine()[0] == 0
    cache.chmod(0o777)
    status, findings, sections = examine()
    assert status == 1 and sections["Cache"] == "note"
    assert "mode 0777" in findings["path"].text
    assert findings["access"].mend == f"chmod go-w {cache}"
    assert findings[CPU_SPECS[0].name].state == "problem" and "others can write to" in findings[CPU_SPECS[0].name].text


def test_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TILEMLA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("TILEMLA_BUILD", "auto")
    status, findings, _ = examine()
    assert status == 1 and findings["access"].state == "note"
    assert str(tmp_path / "file") in findings[CPU_SPECS[0].name].text


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("TILEMLA_BUILD", "maybe", "TILEMLA_BUILD must be one of auto, never, got 'maybe'"),
        ("TILEMLA_LOG", "loud", "TILEMLA_LOG must be one of debug, info, warning, error, got 'loud'"),
        ("TILEMLA_PRELOAD", "gpt-2", "TILEMLA_PRELOAD must be one of deepseek-v3, deepseek-v3.2, got 'gpt-2'"),
    ],
)
def test_variable_that_makes_no_sense(modules, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    status, findings, _ = examine()
    assert status == 1 and findings[name] == Finding(name, "problem", message, f"unset {name}")


def test_variables_in_force(modules, monkeypatch):
    monkeypatch.setenv("TILEMLA_MODULE_PATH", os.pathsep.join(["/nowhere", str(modules)]))
    monkeypatch.setenv("CXX", "clang++")
    status, findings, sections = examine()
    assert status == 0 and sections["Environment"] == "note"
    assert findings["CXX"].text == "clang++"
    assert findings["TILEMLA_MODULE_PATH"].text == "/nowhere is not a directory: nothing is found there"


def versions(**installed):
    """``importlib.metadata.version`` of a machine that has these; None is not installed."""
    real = importlib.metadata.version

    def version(name):
        found = installed.get(name.replace("-", "_"), "as here")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name) if found == "as here" else found

    return version


@pytest.mark.parametrize(
    "installed, text",
    [(None, "not installed"), ("0.1.13", "0.1.13 is here, "), ("0.1.9", "0.1.9 is here, ")],
)
def test_package_that_does_not_fit(modules, monkeypatch, installed, text):
    monkeypatch.setattr(importlib.metadata, "version", versions(apache_tvm_ffi=installed))
    status, findings, sections = examine()
    assert status == 1 and sections["Python and packages"] == "problem"
    assert findings["apache-tvm-ffi"].text.startswith(text)
    assert findings["apache-tvm-ffi"].mend.startswith("pip install 'apache-tvm-ffi") and "<0.1.13" in (
        findings["apache-tvm-ffi"].mend
    )


def test_no_tilelang(modules, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", versions(tilelang=None))
    status, findings, _ = examine()
    assert status == 0
    assert (
        findings["tilemla[codegen]"].state == "note" and "tilelang: not installed" in findings["tilemla[codegen]"].text
    )
    assert findings["tilemla[codegen]"].mend == "pip install 'tilemla[codegen]'"


def test_torch_without_cuda_beside_a_gpu(modules, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", versions(torch="2.13.0+cpu"))
    assert examine()[0] == 0
    with_gpus(monkeypatch, H100, driver="13.0")
    status, findings, _ = examine()
    assert status == 1 and findings["torch"].text == "2.13.0+cpu cannot use the GPU"


@pytest.mark.parametrize(
    "version, versions, fits",
    [
        ("0.1.12", ">=0.1.11,<0.1.13", True),
        ("0.1.13", "<0.1.13,>=0.1.11", False),
        ("0.1.9", ">=0.1.11", False),
        ("2.13.0+cpu", ">=2.6", True),
        ("2.6", ">=2.6.0", True),
        ("0.1.15", "==0.1.15", True),
        ("0.1.16", "==0.1.15", False),
        ("1.0", "!=1.0", False),
        ("1.1", "<=1.0", False),
        ("1.0", ">1.0", False),
        ("7", "", True),
    ],
)
def test_ranges(version, versions, fits):
    assert probes._fits(version, versions) is fits


@pytest.mark.parametrize(
    "probe", ["probe_packages", "probe_gpus", "probe_compilers", "probe_libraries", "probe_cache", "probe_environment"]
)
def test_probe_that_falls_over_is_a_finding(modules, monkeypatch, probe):
    def fall(*args, **kwargs):
        yield Finding("before", "ok", "")
        raise RuntimeError("unheard of")

    monkeypatch.setattr(probes, probe, fall)
    status, findings, sections = examine()
    assert status == 1 and len(sections) == 7
    assert findings["before"].state == "ok"
    assert findings["error"].text == "RuntimeError: unheard of"
    assert findings[CPU_SPECS[0].name].state == "ok"


def test_section_is_as_bad_as_its_worst():
    ok, note, problem = (Finding(state, state, "") for state in ("ok", "note", "problem"))
    assert Section("", ()).state == Section("", (ok,)).state == "ok"
    assert Section("", (ok, note, ok)).state == "note"
    assert Section("", (problem, note)).state == "problem"


def test_text(monkeypatch):
    """Brackets are not markup, and a command that mends several things comes once."""
    monkeypatch.setattr(importlib.metadata, "version", versions(tilelang=None))
    lines = CliRunner().invoke(doctor).stdout.splitlines()
    assert "          mend: pip install 'tilemla[codegen]'" in lines
    assert sum("tilemla build --preset deepseek-v3 --arch cpu" in line for line in lines) == 1
    assert lines[-1] == "deepseek-v3 cannot be served here."
    assert "Modules of deepseek-v3: problem" in lines


def test_help_and_bad_usage():
    done = CliRunner().invoke(main, ["doctor", "--help"])
    assert done.exit_code == 0 and "Examples:\n    tilemla doctor\n" in done.stdout
    done = CliRunner().invoke(main, ["doctor", "--preset", "gpt-2"])
    assert done.exit_code == 2 and "deepseek-v3" in done.stderr
