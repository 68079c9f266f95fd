"""`tilemla inspect` shows what a module is and what is inside it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tilemla.cli import main
from tilemla.disassembler import find_disassembler
from tilemla.errors import ToolchainError
from tilemla.loader import ensure_module
from tilemla.manifest import KernelReport, manifest_path
from tilemla.spec import SUPPORTED_SPECS, KernelSpec
from tilemla.toolchain import find_cuda_toolkit

CPU, SM90 = KernelSpec(arch="cpu"), KernelSpec(arch="sm_90a")
KERNELS = (
    KernelReport("get_mla_metadata_kernel", "get_mla_metadata", 32, 0, 0, 0, 0, 4096, 32),
    KernelReport("mla_decode_kernel", "mla_decode", 168, 0, 0, 0, 1024, 231424, 384),
    KernelReport("mla_decode_kernel_1", "mla_decode", 114, 4, 8, 16, 0, 0, 128),
)
TEXTS = {
    "get_mla_metadata.tir": "def get_mla_metadata():\n    pass\n",
    "get_mla_metadata.source": "__global__ void metadata();",  # no final newline
    "get_mla_metadata.ptx": ".version 9.0\n",
    "mla_decode.tir": "def mla_decode():\n    pass\n",
    "mla_decode.source": "__global__ void decode();\n",
    "mla_decode.ptx": ".version 9.0\n.target sm_90a\n",
}


@pytest.fixture(scope="session")
def cpu_entry():
    return ensure_module(CPU).entry


@pytest.fixture
def cpu_copy(cpu_entry, tmp_path):
    return Path(shutil.copytree(cpu_entry.directory, tmp_path / "store" / CPU.name))


@pytest.fixture
def sm90_copy(cpu_entry, tmp_path):
    """What a build for a GPU leaves, made without its compiler: known kernels and texts, and some library."""
    directory = tmp_path / "store" / SM90.name
    directory.mkdir(parents=True)
    library = f"{SM90.name}.so"
    shutil.copy(cpu_entry.library, directory / library)
    files = {role: f"{role}.txt" for role in TEXTS} | {
        "mla_decode.cubin": "d.cubin",
        "get_mla_metadata.cubin": "m.cubin",
    }
    for role, name in files.items():
        (directory / name).write_text(TEXTS.get(role, "machine code"))
    programs = ("get_mla_metadata", "mla_decode")
    fields = dict(name=SM90.name, spec=SM90.to_dict(), library=library, files=files, kernels=KERNELS, programs=programs)
    manifest = dataclasses.replace(cpu_entry.manifest, **fields)
    manifest_path(directory, SM90.name).write_text(manifest.to_json())
    return directory


@pytest.fixture(autouse=True)
def no_modules_elsewhere(monkeypatch):
    monkeypatch.delenv("TILEMLA_MODULE_PATH", raising=False)


def inspect(*words):
    """(exit status, stdout, stderr)"""
    done = CliRunner().invoke(main, ["inspect", *map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("how", ["folder", "library", "manifest", "store", "name", "relative"])
def test_ways_to_name_a_module(cpu_copy, monkeypatch, how):
    words = {
        "folder": cpu_copy,
        "library": cpu_copy / f"{CPU.name}.so",
        "manifest": cpu_copy / f"{CPU.name}.json",
        "store": cpu_copy.parent,  # it holds nothing else
        "name": CPU.name,
        "relative": ".",
    }
    if how == "name":
        monkeypatch.setenv("TILEMLA_MODULE_PATH", str(cpu_copy.parent))
    if how == "relative":
        monkeypatch.chdir(cpu_copy)
    status, out, err = inspect(words[how], "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["directory"] == str(cpu_copy)


def test_name_is_looked_for_in_every_cache_store(cpu_copy, tmp_path, monkeypatch):
    """Also in those that this version would not take."""
    monkeypatch.setenv("TILEMLA_CACHE_DIR", str(tmp_path / "cache"))
    other = tmp_path / "cache" / "0.0.9-cpu-tilelang0.1.9-0123456789abcdef" / CPU.name
    shutil.copytree(cpu_copy, other)
    status, out, _ = inspect(CPU.name, "--json")
    assert status == 0 and json.loads(out)["directory"] == str(other)


def test_copy_under_another_name(cpu_copy):
    """As of an entry that was set aside."""
    aside = cpu_copy.rename(cpu_copy.with_name(f".{CPU.name}.damaged-01234567"))
    assert inspect(aside)[0] == 0


def test_name_that_is_not_built(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEMLA_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(tmp_path / "modules"))
    status, out, err = inspect(SM90.name)
    assert (status, out) == (1, "")
    assert f"{SM90.name} is not built: `tilemla build {SM90.build_options}` builds it" in err
    assert str(tmp_path / "modules") in err


def test_name_that_is_no_spec():
    status, out, err = inspect("mla_decode_sm_80")
    assert (status, out) == (2, "")
    assert "there is no file, folder or spec 'mla_decode_sm_80'" in err
    assert all(spec.name in err for spec in SUPPORTED_SPECS)


def test_path_that_is_no_module(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    status, _, err = inspect(tmp_path / "notes.txt")
    assert status == 2 and "neither a module's .so, .json nor folder" in err
    (tmp_path / "notes.txt").unlink()
    status, _, err = inspect(tmp_path)
    assert status == 1 and "holds no module" in err


def test_store_of_several_modules(cpu_copy, sm90_copy):
    status, _, err = inspect(cpu_copy.parent)
    assert status == 2 and f"name one of them: {CPU.name}, {SM90.name}" in err


def test_summary(cpu_copy, cpu_entry):
    status, out, err = inspect(cpu_copy)
    assert (status, err) == (0, "")
    manifest = cpu_entry.manifest
    library = cpu_copy / manifest.library
    for expected in (CPU.name, str(library), f"{library.stat().st_size:,} bytes", f"{manifest.sha256}, matches"):
        assert expected in out
    assert f"glibc {manifest.requires.glibc}, GLIBCXX {manifest.requires.libstdcxx}" in out and "driver" not in out
    assert "dtype bfloat16" in out and all(f"{tool} {version}" in out for tool, version in manifest.tools.items())


def test_summary_of_a_gpu_module_ends_with_its_kernels(sm90_copy):
    _, out, _ = inspect(sm90_copy)
    assert rows_of(out)["kernel"] == [kernel.name for kernel in KERNELS]


def rows_of(text):
    """Rows of a table by their titles; columns are two spaces apart."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines() if line.strip()]
    return {title: cells for title, *cells in rows}


def test_resources(sm90_copy):
    status, out, err = inspect(sm90_copy, "--resources")
    assert (status, err) == (0, "")
    assert rows_of(out) == {
        "kernel": ["get_mla_metadata_kernel", "mla_decode_kernel", "mla_decode_kernel_1"],
        "program": ["get_mla_metadata", "mla_decode", "mla_decode"],
        "threads per CTA": ["32", "384", "128"],
        "registers per thread": ["32", "168", "114"],
        "static smem bytes": ["0", "1,024", "0"],
        "dynamic smem bytes": ["4,096", "231,424", "0"],
        "spill store bytes": ["0", "0", "4"],
        "spill load bytes": ["0", "0", "8"],
        "stack bytes": ["0", "0", "16"],
        "CTAs per SM": ["32", "1", "4"],
        "warps per SM": ["32 of 64", "12 of 64", "16 of 64"],
        "limited by": ["CTAs", "registers, shared memory", "registers"],
    }
    assert rows_of(inspect(sm90_copy, "--resources", "--program", "get_mla_metadata")[1])["registers per thread"] == [
        "32"
    ]


@pytest.mark.parametrize(
    "flag, role", [("--tir", "tir"), ("--cuda", "source"), ("--source", "source"), ("--ptx", "ptx")]
)
@pytest.mark.parametrize("program", ["get_mla_metadata", "mla_decode"])
def test_text_is_printed_as_it_is(sm90_copy, flag, role, program):
    """Nothing is added to one text but the newline that ends it."""
    status, out, err = inspect(sm90_copy, flag, "--program", program)
    text = TEXTS[f"{program}.{role}"]
    assert (status, out, err) == (0, text if text.endswith("\n") else text + "\n", "")


def test_several_texts_are_told_apart_by_comments(sm90_copy):
    _, out, _ = inspect(sm90_copy, "--tir", "--ptx")
    assert out == (
        f"# ---- get_mla_metadata: tile program ----\n{TEXTS['get_mla_metadata.tir']}"
        f"# ---- mla_decode: tile program ----\n{TEXTS['mla_decode.tir']}"
        f"// ---- get_mla_metadata: PTX ----\n{TEXTS['get_mla_metadata.ptx']}"
        f"// ---- mla_decode: PTX ----\n{TEXTS['mla_decode.ptx']}"
    )


def test_source_of_a_cpu_module(cpu_copy):
    _, out, _ = inspect(cpu_copy, "--source", "--program", "mla_decode")
    assert out == (cpu_copy / "mla_decode.cc").read_text() and "mla_decode" in out
    _, out, _ = inspect(cpu_copy, "--tir")
    assert "@T.prim_func" in out


@pytest.mark.parametrize(
    "flag, what", [("--ptx", "no PTX"), ("--sass", "no machine code"), ("--resources", "no kernels")]
)
def test_cpu_module_has_none(cpu_copy, flag, what):
    status, out, err = inspect(cpu_copy, flag)
    assert (status, out) == (1, "") and f"{CPU.name} is for the CPU and has {what}" in err


def test_copy_without_sources(sm90_copy):
    (sm90_copy / "mla_decode.ptx.txt").unlink()
    status, out, err = inspect(sm90_copy, "--ptx")
    assert (status, out) == (1, "") and "mla_decode.ptx.txt is missing: this copy of the module" in err


def test_file_outside_the_module(sm90_copy):
    """A manifest must not make `inspect` read elsewhere."""
    path = manifest_path(sm90_copy, SM90.name)
    path.write_text(path.read_text().replace('"mla_decode.ptx.txt"', '"../secret"'))
    (sm90_copy.parent / "secret").write_text("secret")
    status, out, err = inspect(sm90_copy, "--ptx", "--program", "mla_decode")
    assert (status, out) == (1, "") and "its manifest names '../secret'" in err


@pytest.mark.parametrize("flags", [(), ("--source",), ("--resources",), ("--json",)])
@pytest.mark.parametrize("damage", ["library cut", "library missing", "manifest", "arch"])
def test_damaged_module(sm90_copy, damage, flags):
    library, path = sm90_copy / f"{SM90.name}.so", manifest_path(sm90_copy, SM90.name)
    if damage == "library cut":
        library.write_bytes(library.read_bytes()[:1000])
        expected = "expected sha256"
    elif damage == "library missing":
        library.unlink()
        expected = "cannot be read"
    elif damage == "manifest":
        path.write_text("{")
        expected = "not a module manifest"
    else:
        path.write_text(path.read_text().replace('"arch": "sm_90a"', '"arch": "sm_70"'))
        expected = "expected a spec for one of sm_90a, cpu, "
    status, out, err = inspect(sm90_copy, *flags)
    assert status == 1 and err.startswith("Error: damaged module: ") and expected in err
    if flags == ("--json",) and damage.startswith("library"):
        assert json.loads(out)["sha256_matches"] is False and expected in json.loads(out)["damage"]
    else:
        assert out == ""


def test_json(sm90_copy):
    status, out, err = inspect(sm90_copy, "--json")
    document = json.loads(out)
    assert (status, err) == (0, "")
    assert document["manifest"] == json.loads(manifest_path(sm90_copy, SM90.name).read_text())
    assert (document["sha256_matches"], document["damage"]) == (True, None)
    assert document["library_bytes"] == (sm90_copy / f"{SM90.name}.so").stat().st_size
    assert document["occupancy"]["mla_decode_kernel"] == {
        "ctas_per_sm": 1,
        "warps_per_sm": 12,
        "max_warps_per_sm": 64,
        "limited_by": ["registers", "shared memory"],
    }


@pytest.mark.parametrize(
    "flags", [("--json", "--ptx"), ("--json", "--resources"), ("--program", "combine"), ("--frob",)]
)
def test_bad_usage(sm90_copy, flags):
    status, out, _ = inspect(sm90_copy, *flags)
    assert (status, out) == (2, "")


@pytest.fixture
def no_disassembler(monkeypatch, tmp_path):
    """A machine without a CUDA toolkit, whose PATH is one empty folder."""

    def refuse():
        raise ToolchainError("no nvcc")

    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr("tilemla.disassembler.find_cuda_toolkit", refuse)
    monkeypatch.setattr("tilemla.disassembler._SYSTEM_TOOLKIT", tmp_path / "no-cuda")
    monkeypatch.setattr("tilemla.disassembler.importlib.util.find_spec", lambda name: None)
    return tmp_path


def fake_tool(path, status=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "{path.name} $*"\nexit {status}\n')
    path.chmod(0o755)


def test_no_disassembler(sm90_copy, no_disassembler):
    status, out, err = inspect(sm90_copy, "--sass")
    assert (status, out) == (1, "")
    assert "no nvdisasm and no cuobjdump was found" in err and "`pip install nvidia-cuda-nvdisasm`" in err


@pytest.mark.parametrize("place", ["bin", "cuda/bin"])
@pytest.mark.parametrize("tool, options", [("nvdisasm", "-c"), ("cuobjdump", "-sass")])
def test_disassembler_is_given_the_cubin(sm90_copy, no_disassembler, place, tool, options):
    fake_tool(no_disassembler / place / tool)
    status, out, err = inspect(sm90_copy, "--sass", "--program", "mla_decode")
    assert (status, out, err) == (0, f"{tool} {options} {sm90_copy / 'd.cubin'}\n", "")


def test_disassembler_in_a_wheel(sm90_copy, no_disassembler, monkeypatch):
    """NVIDIA's wheels share the namespace package `nvidia`."""
    fake_tool(no_disassembler / "nvidia" / "cu13" / "bin" / "nvdisasm")

    class Spec:
        submodule_search_locations = (str(no_disassembler / "nvidia"),)

    monkeypatch.setattr("tilemla.disassembler.importlib.util.find_spec", {"nvidia": Spec}.get)
    assert inspect(sm90_copy, "--sass", "--program", "mla_decode")[1].startswith("nvdisasm -c ")


def test_disassembler_that_fails(sm90_copy, no_disassembler):
    fake_tool(no_disassembler / "bin" / "nvdisasm", status=3)
    status, out, err = inspect(sm90_copy, "--sass")
    assert (status, out) == (1, "") and "nvdisasm: exit status 3" in err


def test_real_gpu_module():
    """The compiler's own texts and, where a disassembler is, its machine code."""
    try:
        find_cuda_toolkit()
    except ToolchainError:
        pytest.skip("needs nvcc")
    directory = ensure_module(SM90).entry.directory
    for flag, expected in (("--tir", "@T.prim_func"), ("--cuda", "__global__"), ("--ptx", ".target sm_90a")):
        status, out, err = inspect(directory, flag, "--program", "mla_decode")
        assert status == 0 and expected in out, err
    rows = rows_of(inspect(directory, "--resources")[1])
    assert rows["warps per SM"][rows["kernel"].index("mla_decode_kernel")] == "12 of 64" and set(
        rows["spill store bytes"]
    ) == {"0"}
    try:
        find_disassembler()
    except ToolchainError:
        pytest.skip("needs nvdisasm or cuobjdump")
    assert "HGMMA" in inspect(directory, "--sass", "--program", "mla_decode")[1]


def test_command_as_it_is_started(cpu_copy):
    """A pipe gets plain text of any width; a reader that leaves early is no error to speak of."""
    command = [sys.executable, "-m", "tilemla", "inspect", str(cpu_copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "20"})
    assert str(cpu_copy / f"{CPU.name}.so") in done.stdout and "\x1b" not in done.stdout
    with subprocess.Popen([*command, "--source"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        child.stdout.close()
        assert "Traceback" not in child.stderr.read()
