"""Modules are found where they were built, installed or cached, or generated; damage is seen and repaired."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import tilemla
from cases import Case, make_inputs
from tilemla import env, fingerprint, generate, launch, loader, log, preloading, store
from tilemla.errors import ToolchainError
from tilemla.manifest import Requirements
from tilemla.spec import KernelSpec

SPEC = KernelSpec(arch="cpu", dtype="bfloat16")
OTHER = KernelSpec(arch="cpu", dtype="float16")
CASE = Case((100, 7), num_heads_q=2)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A store with a sound module of SPEC, built or copied from the cache."""
    directory = tmp_path_factory.mktemp("built")
    entry = loader.ensure_module(SPEC).entry
    shutil.copytree(entry.directory, directory / SPEC.name)
    return directory


@pytest.fixture(autouse=True)
def fresh_process_state(monkeypatch):
    """As if nothing had been loaded; what this process opened stays open."""
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(launch, "_kernels", {})
    monkeypatch.setattr(launch, "_modules", {})
    for name in env.NAMES:
        if name != "TILEMLA_CACHE_DIR":
            monkeypatch.delenv(name, raising=False)


@pytest.fixture
def empty_cache(built, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEMLA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cache(built, empty_cache):
    """The store, in a cache of this test's own, that holds the module."""
    directory = store.cache_store("cpu")
    store.make_private(directory)
    shutil.copytree(built / SPEC.name, directory / SPEC.name)
    return directory


@pytest.fixture
def no_child(monkeypatch):
    def refuse(spec, config, directory, on_step):
        raise AssertionError(f"a build of {spec.name} was started")

    monkeypatch.setattr(generate, "_run_child", refuse)


@pytest.fixture
def copying_child(built, monkeypatch):
    """In place of a build that takes seconds: puts the sound module where it was asked for, and counts."""
    builds = []

    def copy(spec, config, directory, on_step):
        on_step("copying")
        builds.append(spec)
        shutil.rmtree(directory / SPEC.name, ignore_errors=True)
        shutil.copytree(built / SPEC.name, directory / SPEC.name)

    monkeypatch.setattr(generate, "_run_child", copy)
    return builds


def decode():
    inputs = make_inputs(CASE)
    return tilemla.flash_mla_with_kvcache(
        inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, *tilemla.get_mla_metadata()
    )


def test_prebuilt_module_needs_no_build(built, empty_cache, no_child, monkeypatch):
    monkeypatch.setenv("TILEMLA_MODULE_PATH", os.pathsep.join([str(empty_cache / "nowhere"), str(built)]))
    monkeypatch.setenv("TILEMLA_BUILD", "never")
    assert loader.load_module(SPEC).library.parent == built / SPEC.name
    out, _ = decode()
    assert torch.isfinite(out).all()
    assert not empty_cache.exists()


def test_search_order(built, cache, no_child, tmp_path, monkeypatch):
    """Explicit directory, installed wheel, cache: each is taken once those before it are gone."""
    shutil.copytree(built, tmp_path / "wheel")
    monkeypatch.setattr("tilemla.wheel.installed_module_stores", lambda: [("a-wheel 1.0", tmp_path / "wheel")])
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(built))
    assert [place.kind for place in store.search_path("cpu")] == ["directory", "wheel", "cache"]
    assert loader.find_module(SPEC).entry.directory.parent == built
    monkeypatch.delenv("TILEMLA_MODULE_PATH")
    assert loader.find_module(SPEC).location == store.Location("wheel", tmp_path / "wheel", "a-wheel 1.0")
    shutil.rmtree(tmp_path / "wheel")
    assert loader.find_module(SPEC).location == store.Location("cache", cache, "cache")


def test_compilers_are_not_asked_where_a_module_is_found_before_the_cache(built, empty_cache, monkeypatch):
    def refuse(arch):
        raise AssertionError("a compiler was asked for its version")

    monkeypatch.setattr(fingerprint, "tool_versions", refuse)
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(built))
    assert loader.find_module(SPEC).entry.directory.parent == built


def test_scheduler_of_whatever_dtype_is_built(built, empty_cache, no_child, monkeypatch):
    """A server that ships one module must not need another for get_mla_metadata, whatever the first is for."""
    other = KernelSpec(arch="cpu", dtype="float16", page_block_size=16)
    monkeypatch.setattr(launch, "select_spec", lambda **_: other)
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(built))
    metadata, _ = tilemla.get_mla_metadata(torch.tensor([10], dtype=torch.int32), 2, 1)
    assert metadata.shape == (8, 8)


def test_module_is_opened_once(cache, no_child):
    first = loader.load_module(SPEC)
    shutil.rmtree(cache)
    assert loader.load_module(SPEC) is first


def damage(directory, how):
    library, manifest = directory / SPEC.name / f"{SPEC.name}.so", directory / SPEC.name / f"{SPEC.name}.json"
    if how == "library changed":
        data = bytearray(library.read_bytes())
        data[len(data) // 2] ^= 1
        library.write_bytes(data)
    elif how == "library cut":
        library.write_bytes(library.read_bytes()[:1000])
    elif how == "library missing":
        library.unlink()
    elif how == "manifest missing":
        manifest.unlink()
    elif how == "manifest not JSON":
        manifest.write_text("{")
    elif how == "manifest empty":
        manifest.write_text("")
    else:
        fields = json.loads(manifest.read_text())
        fields |= {
            "other spec": {"spec": OTHER.to_dict()},
            "program missing": {"programs": ["mla_decode"]},
            "other sources": {"fingerprint": "0" * 16},
            "other tools": {"tools": {"tilelang": "0.0.1"}},
            "older format": {"format": 1},
            "library elsewhere": {"library": "../evil.so"},
        }[how]
        manifest.write_text(json.dumps(fields))


DAMAGE = ["library changed", "library cut", "library missing", "manifest missing", "manifest not JSON"]
DAMAGE += ["manifest empty", "other spec", "program missing", "older format", "library elsewhere"]


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_cache_entry_is_set_aside_and_rebuilt(cache, copying_child, caplog, how):
    damage(cache, how)
    assert loader.find_module(SPEC) is None
    caplog.clear()
    found = loader.ensure_module(SPEC, print)
    assert copying_child == [SPEC]
    assert loader.find_module(SPEC) == found
    (aside,) = cache.glob(f"{store.damaged_prefix(SPEC.name)}*")
    assert (aside / f"{SPEC.name}.so").exists() or how == "library missing"
    warning = "\n".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert f"damaged module set aside as {aside} and built anew: " in warning


@pytest.mark.parametrize("how", ["other sources", "other tools"])
def test_entry_of_other_sources_or_tools_is_made_anew(cache, copying_child, how):
    """It cannot get into this store by itself: its name says what made it. A directory of the user's can hold it."""
    damage(cache, how)
    entry, made = generate.generate_module(SPEC, cache, print)
    assert made and copying_child == [SPEC]
    assert generate.generate_module(SPEC, cache, print) == (entry, False)
    assert generate.generate_module(SPEC, cache, print, force=True) == (entry, True)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("place", ["TILEMLA_MODULE_PATH", "a-wheel 1.0"])
def test_damaged_prebuilt_module_is_an_error(built, cache, no_child, tmp_path, monkeypatch, place, how):
    """It is neither replaced nor passed over in favour of another."""
    mine = tmp_path / "mine"
    shutil.copytree(built, mine)
    damage(mine, how)
    before = sorted(mine.rglob("*"))
    if place == "TILEMLA_MODULE_PATH":
        monkeypatch.setenv("TILEMLA_MODULE_PATH", str(mine))
    else:
        monkeypatch.setattr("tilemla.wheel.installed_module_stores", lambda: [(place, mine)])
    with pytest.raises(tilemla.ModuleNotBuiltError, match=f"{place} holds a damaged module: .*{SPEC.name}.*; "):
        decode()
    assert sorted(mine.rglob("*")) == before


@pytest.mark.parametrize("how", ["other sources", "other tools"])
def test_prebuilt_module_of_other_sources_or_tools_is_welcome(built, empty_cache, no_child, tmp_path, monkeypatch, how):
    """Where modules are shipped without TileLang, the sources' fingerprint and the tools there are others."""
    mine = tmp_path / "mine"
    shutil.copytree(built, mine)
    damage(mine, how)
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(mine))
    assert loader.find_module(SPEC).entry.directory.parent == mine


def test_never_build(empty_cache, no_child, monkeypatch):
    monkeypatch.setenv("TILEMLA_BUILD", "never")
    with pytest.raises(tilemla.ModuleNotBuiltError) as caught:
        decode()
    message = str(caught.value)
    assert f"{SPEC.name} is not built and cannot be generated here: TILEMLA_BUILD is never" in message
    command = re.search(r"`(tilemla build .*) --out-dir DIR`", message)[1].split()
    from click.testing import CliRunner

    from tilemla.cli import main

    result = CliRunner().invoke(main, [*command[1:], "--dry-run", "--json"])
    assert [module["name"] for module in json.loads(result.stdout)["modules"]] == [SPEC.name]
    assert not empty_cache.exists()


def test_what_other_tools_made_serves_where_nothing_can_be_made(cache, no_child, monkeypatch):
    """An image whose cache was filled where a compiler was."""
    elsewhere = cache.with_name(cache.name.replace("tilelang", "tilelang9.9-"))
    cache.rename(elsewhere)
    assert loader.find_module(SPEC) is None

    def no_tools(arch):
        raise ToolchainError("no C++ compiler was found")

    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "tool_versions", no_tools)
        assert loader.find_module(SPEC).entry.directory.parent == elsewhere
        assert loader.find_module(OTHER) is None
        with pytest.raises(tilemla.ModuleNotBuiltError, match="cannot be generated here: no C.. compiler was found"):
            loader.ensure_module(OTHER)
    monkeypatch.setenv("TILEMLA_BUILD", "never")
    assert loader.find_module(SPEC).entry.directory.parent == elsewhere
    monkeypatch.setattr(fingerprint, "source_fingerprint", lambda: "0" * 16)
    assert loader.find_module(SPEC) is None, "other sources may call it with other arguments"


@pytest.mark.parametrize("value, expected", [("auto", True), ("never", False), ("", True), (" Never ", False)])
def test_build_setting(monkeypatch, value, expected):
    monkeypatch.setenv("TILEMLA_BUILD", value)
    assert env.build_allowed() is expected


@pytest.mark.parametrize("name, read", [("TILEMLA_BUILD", env.build_allowed), ("TILEMLA_LOG", env.log_level)])
def test_setting_that_is_none_of_the_choices(monkeypatch, name, read):
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'maybe'"):
        read()


def test_cache_below_a_file(tmp_path, no_child, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TILEMLA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(tilemla.ModuleNotBuiltError, match="Not a directory.*; set TILEMLA_CACHE_DIR"):
        decode()


def test_spec_without_program(no_child):
    with pytest.raises(NotImplementedError, match="page_block_size must be one of 1, .*, got 48"):
        loader.ensure_module(KernelSpec(arch="cpu", page_block_size=48))


@pytest.mark.parametrize("needs", [dict(glibc="9.1"), dict(libstdcxx="3.4.999"), dict(driver="99.0")], ids=str)
def test_module_that_needs_a_newer_machine_is_not_opened(built, no_child, monkeypatch, needs):
    monkeypatch.setattr("tilemla.host.driver_version", lambda: "12.4")
    manifest, directory = store.read_entry(SPEC, built)
    entry = store.Entry(manifest.__class__(**(vars(manifest) | {"requires": Requirements(**needs)})), directory)
    with pytest.raises(
        tilemla.ModuleNotBuiltError, match=f"does not run on this machine: .*{next(iter(needs.values()))}"
    ):
        loader.open_module(entry)


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
    assert f"tilemla: {SPEC.name}: linking" in done.stderr and f"{SPEC.name}: generated into" in done.stderr
    assert loader.find_module(SPEC) is not None


def test_log_says_which_was_taken_and_why(cache, tmp_path):
    script = f"import tilemla.loader as l; from tilemla.spec import KernelSpec; l.load_module({SPEC!r})"
    environment = os.environ | {"TILEMLA_LOG": "info", "TILEMLA_MODULE_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300, env=environment
    )
    assert done.stderr.splitlines() == [
        f"tilemla: INFO: {SPEC.name}: not in {tmp_path} (TILEMLA_MODULE_PATH)",
        f"tilemla: INFO: {SPEC.name}: taken from {cache / SPEC.name} (cache)",
    ]
    quiet = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert quiet.stderr == ""


def test_no_compiler(empty_cache, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    for cached in (fingerprint.tool_versions, fingerprint.toolchain.find_cxx):
        monkeypatch.setattr(*_owner_of(cached), cached.__wrapped__)
    with pytest.raises(tilemla.ModuleNotBuiltError, match=r"no C\+\+ compiler was found.*install g\+\+"):
        decode()
    assert not empty_cache.exists()


def _owner_of(function):
    return sys.modules[function.__module__], function.__name__


def test_child_that_leaves_nothing(empty_cache, monkeypatch):
    monkeypatch.setattr(generate, "_run_child", lambda spec, config, directory, on_step: None)
    with pytest.raises(tilemla.ModuleBuildError, match=f"generating {SPEC.name} left no module in"):
        decode()


def test_child_that_leaves_damage(built, empty_cache, monkeypatch):
    def build(spec, config, directory, on_step):
        shutil.copytree(built / spec.name, directory / spec.name)
        damage(directory, "library changed")

    monkeypatch.setattr(generate, "_run_child", build)
    with pytest.raises(tilemla.ModuleBuildError, match="left a module that does not check: .* expected sha256"):
        decode()


def test_import_has_no_side_effects(empty_cache):
    run_python("import tilemla", stderr="")
    assert not empty_cache.exists()


def run_python(script, *, stderr=None, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    if stderr is not None:
        assert done.stderr == stderr
    return done.stdout


OPENED = "import tilemla.loader as l; print(*(spec.name for spec in l.loaded_specs()))"


@pytest.mark.parametrize("how", ["module", "variable", "call"])
def test_preload(tmp_path, how):
    """Both modules of the model are open after the import."""
    for spec in (SPEC, OTHER):
        shutil.copytree(loader.ensure_module(spec).entry.directory, tmp_path / "all" / spec.name)
    environment = dict(TILEMLA_MODULE_PATH=str(tmp_path / "all"), TILEMLA_BUILD="never", CUDA_VISIBLE_DEVICES="")
    first = {
        "module": "import tilemla.preload",
        "variable": "import tilemla",
        "call": "import tilemla; tilemla.preload_modules('deepseek-v3')",
    }[how]
    if how == "variable":
        environment["TILEMLA_PRELOAD"] = "deepseek-v3"
    opened = run_python(f"{first}\n{OPENED}", stderr="", **environment).split()
    assert sorted(opened) == sorted([SPEC.name, OTHER.name])


def test_preload_at_import_generates_what_is_missing(empty_cache):
    """While the package is still being imported: a thread that imported a part of it would wait forever."""
    opened = run_python(f"import tilemla\n{OPENED}", TILEMLA_PRELOAD="deepseek-v3", CUDA_VISIBLE_DEVICES="").split()
    assert sorted(opened) == sorted([SPEC.name, OTHER.name])


def test_preload_of_what_is_missing_names_it(empty_cache, monkeypatch):
    monkeypatch.setenv("TILEMLA_BUILD", "never")
    with pytest.raises(
        tilemla.ModuleNotBuiltError, match=f"(?s)2 of 2 modules.*{SPEC.name}.*{OTHER.name}.*tilemla build"
    ):
        preloading.preload_modules("deepseek-v3", archs=["cpu"])


def test_preload_generates_what_is_missing(cache, copying_child, capsys):
    assert preloading.preload_modules("deepseek-v3", archs=["cpu"], dtypes=["bfloat16"]) == [SPEC]
    assert copying_child == [] and capsys.readouterr().err == ""
    shutil.rmtree(cache)
    loader._loaded.clear()
    assert preloading.preload_modules("deepseek-v3", archs=["cpu"], dtypes=["bfloat16"]) == [SPEC]
    assert copying_child == [SPEC] and f"{SPEC.name}: loaded after" in capsys.readouterr().err


def test_preload_generates_side_by_side(empty_cache, monkeypatch):
    """Each build waits until the other one runs, too."""
    both = threading.Barrier(2, timeout=60)
    run_child = generate._run_child

    def run(spec, config, directory, on_step):
        both.wait()
        run_child(spec, config, directory, on_step)

    monkeypatch.setattr(generate, "_run_child", run)
    assert preloading.preload_modules("deepseek-v3", archs=["cpu"], jobs=2) == [SPEC, OTHER]
    assert set(loader.loaded_specs()) == {SPEC, OTHER}


def test_preload_of_an_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of deepseek-v3, deepseek-v3.2, got 'deepseek-v9'"):
        preloading.preload_modules("deepseek-v9")


def test_own_commands_do_not_preload(empty_cache):
    """Where preloading fails, `tilemla doctor` is what one wants to run."""
    environment = os.environ | {"TILEMLA_PRELOAD": "deepseek-v3", "TILEMLA_BUILD": "never"}
    for command in ("tilemla", "tilemla.codegen"):
        done = subprocess.run(
            [sys.executable, "-m", command, "--version"], capture_output=True, text=True, check=False, env=environment
        )
        assert "ModuleNotBuiltError" not in done.stderr, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", "import tilemla"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1 and "ModuleNotBuiltError" in done.stderr


@pytest.fixture(autouse=True)
def fresh_logger():
    yield
    log.logger.cache_clear()
