"""Modules are found where they were built, cached, or generated in a child process; damage is seen and repaired."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

import tilemla
from cases import Case, make_inputs
from tilemla import env, launch, loader
from tilemla.manifest import manifest_path
from tilemla.spec import KernelSpec

SPEC = KernelSpec(arch="cpu", dtype="bfloat16")
CASE = Case((100, 7), num_heads_q=2)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A directory with a sound module of SPEC, built or copied from the cache."""
    manifest, library = loader.ensure_module(SPEC)
    directory = tmp_path_factory.mktemp("built")
    for name in (manifest.library, manifest_path(library.parent, SPEC.name).name):
        shutil.copy(library.parent / name, directory)
    return directory


@pytest.fixture(autouse=True)
def fresh_process_state(monkeypatch):
    """As if nothing had been loaded; what this process opened stays open."""
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(launch, "_kernels", {})
    monkeypatch.setattr(launch, "_metadata_kernels", {})
    monkeypatch.delenv("TILEMLA_MODULE_PATH", raising=False)
    monkeypatch.delenv("TILEMLA_DISABLE_BUILD", raising=False)


@pytest.fixture
def cache(built, tmp_path, monkeypatch):
    """A cache of this test's own that holds the module."""
    monkeypatch.setenv("TILEMLA_CACHE_DIR", str(tmp_path))
    directory = loader.cache_entry_dir()
    shutil.copytree(built, directory)
    return directory


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEMLA_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_child(monkeypatch):
    def refuse(spec, directory):
        raise AssertionError(f"a build of {spec.name} was started")

    monkeypatch.setattr(loader, "_run_build", refuse)


@pytest.fixture
def copying_child(built, monkeypatch):
    """In place of a build that takes seconds: puts the sound module where it was asked for, and counts."""
    builds = []

    def copy(spec, directory):
        builds.append(spec)
        shutil.copytree(built, directory, dirs_exist_ok=True)

    monkeypatch.setattr(loader, "_run_build", copy)
    return builds


def decode():
    inputs = make_inputs(CASE)
    return tilemla.flash_mla_with_kvcache(
        inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, *tilemla.get_mla_metadata()
    )


def test_prebuilt_module_needs_no_build(built, empty_cache, no_child, monkeypatch):
    monkeypatch.setenv("TILEMLA_MODULE_PATH", os.pathsep.join([str(empty_cache / "nowhere"), str(built)]))
    monkeypatch.setenv("TILEMLA_DISABLE_BUILD", "1")
    assert loader.load_module(SPEC).library.parent == built
    out, _ = decode()
    assert torch.isfinite(out).all()


def test_prebuilt_module_comes_before_the_cache(built, cache, no_child, monkeypatch):
    assert loader.find_module(SPEC)[1].parent == cache
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(built))
    assert loader.find_module(SPEC)[1].parent == built


def test_scheduler_of_whatever_dtype_is_built(built, empty_cache, no_child, monkeypatch):
    """A server that ships one dtype's module must not need the other's for get_mla_metadata."""
    monkeypatch.setattr(launch, "DTYPES", ("float16", "bfloat16"))
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(built))
    metadata, _ = tilemla.get_mla_metadata(torch.tensor([10], dtype=torch.int32), 2, 1)
    assert metadata.shape == (8, 8)


def test_module_is_opened_once(cache, no_child, monkeypatch):
    first = loader.load_module(SPEC)
    shutil.rmtree(cache)
    assert loader.load_module(SPEC) is first


def damage(directory, how):
    library, manifest = directory / f"{SPEC.name}.so", directory / f"{SPEC.name}.json"
    if how == "library changed":
        data = bytearray(library.read_bytes())
        data[len(data) // 2] ^= 1
        library.write_bytes(data)
    elif how == "library cut":
        library.write_bytes(library.read_bytes()[:1000])
    elif how == "library missing":
        library.unlink()
    elif how == "manifest not JSON":
        manifest.write_text("{")
    elif how == "manifest empty":
        manifest.write_text("")
    else:
        fields = json.loads(manifest.read_text())
        fields |= {
            "other spec": {"spec": KernelSpec(arch="cpu", dtype="float16").to_dict()},
            "program missing": {"programs": ["mla_decode"]},
            "other sources": {"source_key": "0" * 16},
            "library elsewhere": {"library": "../evil.so"},
        }[how]
        manifest.write_text(json.dumps(fields))


DAMAGE = ["library changed", "library cut", "library missing", "manifest not JSON", "manifest empty"]
DAMAGE += ["other spec", "program missing", "library elsewhere"]


@pytest.mark.parametrize("how", [*DAMAGE, "other sources"])
def test_damaged_cache_entry_is_rebuilt(cache, copying_child, how):
    damage(cache, how)
    leftover = cache / f"{SPEC.name}.mla_decode.cc"
    leftover.write_text("of the damaged entry")
    assert loader.find_module(SPEC) is None
    manifest, library = loader.ensure_module(SPEC)
    assert copying_child == [SPEC] and not leftover.exists()
    assert loader.find_module(SPEC) == (manifest, library)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_prebuilt_module_is_an_error(built, cache, no_child, tmp_path, monkeypatch, how):
    """It is neither replaced nor passed over in favour of another."""
    mine = tmp_path / "mine"
    shutil.copytree(built, mine)
    damage(mine, how)
    before = sorted(path.name for path in mine.iterdir())
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(mine))
    with pytest.raises(tilemla.ModuleNotBuiltError, match="TILEMLA_MODULE_PATH holds a damaged module: .*" + SPEC.name):
        decode()
    assert sorted(path.name for path in mine.iterdir()) == before


def test_prebuilt_module_of_other_sources_is_welcome(built, empty_cache, no_child, tmp_path, monkeypatch):
    """Where modules are shipped without TileLang, the key of the sources there is another."""
    mine = tmp_path / "mine"
    shutil.copytree(built, mine)
    damage(mine, "other sources")
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(mine))
    assert loader.find_module(SPEC)[1].parent == mine


def test_build_disabled(empty_cache, no_child, monkeypatch):
    monkeypatch.setenv("TILEMLA_DISABLE_BUILD", "1")
    with pytest.raises(tilemla.ModuleNotBuiltError, match=f"{SPEC.name} is not built and TILEMLA_DISABLE_BUILD is set"):
        decode()
    with pytest.raises(NotImplementedError, match="tilemla build --arch cpu --dtype bfloat16 --out DIR"):
        decode()


@pytest.mark.parametrize("value, expected", [("1", True), ("true", True), ("0", False), ("", False), (" No ", False)])
def test_flag(monkeypatch, value, expected):
    monkeypatch.setenv("TILEMLA_DISABLE_BUILD", value)
    assert env.build_disabled() is expected


def test_flag_that_is_neither(monkeypatch):
    monkeypatch.setenv("TILEMLA_DISABLE_BUILD", "maybe")
    with pytest.raises(ValueError, match="TILEMLA_DISABLE_BUILD must be 1 or 0, got 'maybe'"):
        env.build_disabled()


def test_cache_that_cannot_be_written(tmp_path, no_child, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TILEMLA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(tilemla.ModuleNotBuiltError, match="cannot be written .*; set TILEMLA_CACHE_DIR"):
        decode()


def test_spec_without_program(no_child):
    with pytest.raises(NotImplementedError, match="page_block_size must be 64, got 32"):
        loader.ensure_module(KernelSpec(arch="cpu", page_block_size=32))


def test_build_in_a_child_with_progress_on_stderr(empty_cache):
    """The real thing, once, in a process that never imported TileLang: nor does it by building."""
    script = """
        import sys, torch, tilemla
        metadata, num_splits = tilemla.get_mla_metadata(torch.tensor([10], dtype=torch.int32), 16, 1)
        print(num_splits.tolist(), [name for name in ("tilelang", "tvm", "z3") if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout == "[0, 1] []\n"
    assert f"tilemla: generating {SPEC.name}" in done.stderr and f"{SPEC.name}: linking" in done.stderr
    assert loader.find_module(SPEC) is not None


def test_no_compiler(empty_cache, tmp_path, monkeypatch):
    """The child's last words come with the exception, and nothing is left that looks like a module."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(tilemla.ModuleBuildError, match="(?s)exited with 1; its last .*no C.. compiler was found"):
        decode()
    assert loader.find_module(SPEC) is None
    assert not list(empty_cache.rglob("*.so")) and not list(empty_cache.rglob("*.json"))


def test_child_that_leaves_nothing(empty_cache, monkeypatch):
    monkeypatch.setattr(loader, "_run_build", lambda spec, directory: None)
    with pytest.raises(tilemla.ModuleBuildError, match=f"generating {SPEC.name} left no module in"):
        decode()


def test_child_that_leaves_damage(built, cache, monkeypatch):
    def build(spec, directory):
        shutil.copytree(built, directory, dirs_exist_ok=True)
        damage(directory, "library changed")

    damage(cache, "library cut")
    monkeypatch.setattr(loader, "_run_build", build)
    with pytest.raises(tilemla.ModuleBuildError, match="left a module that does not check: .* expected sha256"):
        decode()


def test_processes_build_once(empty_cache, built, tmp_path):
    """Three processes want the module at once: one builds it, the others wait and find it."""
    script = textwrap.dedent(
        """
        import pathlib, shutil, sys, time
        from tilemla import loader
        from tilemla.spec import KernelSpec

        def build(spec, directory):
            with open(sys.argv[2], "a") as log:
                log.write("build\\n")
            time.sleep(1)
            shutil.copytree(sys.argv[1], directory, dirs_exist_ok=True)

        loader._run_build = build
        loader.load_module(KernelSpec(arch="cpu", dtype="bfloat16"))
        """
    )
    log = tmp_path / "log"
    command = [sys.executable, "-c", script, str(built), str(log)]
    children = [subprocess.Popen(command) for _ in range(3)]
    assert [child.wait(timeout=120) for child in children] == [0, 0, 0]
    assert log.read_text() == "build\n"
