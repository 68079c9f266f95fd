"""``tilemla list`` shows every module that is here, and what is wrong with it."""

import json
import os
from pathlib import Path

import pytest

from commands import tilemla
from fakes import make_entry
from tilemla.cli.output import format_size, tree_size
from tilemla.manifest import Requirements
from tilemla.spec import KernelSpec
from tilemla.store import cache_store

BF16 = KernelSpec(arch="cpu", dtype="bfloat16")
FP16 = KernelSpec(arch="cpu", dtype="float16")
SM90 = KernelSpec(arch="sm_90a", dtype="bfloat16")


pytestmark = pytest.mark.usefixtures("cache")


def listed(*options):
    """(exit status, rows by directory)"""
    done = tilemla("list", "--json", *options)
    return done.exit_code, {Path(row["directory"]): row for row in json.loads(done.stdout)["modules"]}


def damage(directory):
    (directory / f"{directory.name}.so").write_bytes(b"changed")
    return directory


def test_every_place_is_listed(store, old_store, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEMLA_MODULE_PATH", os.pathsep.join([str(tmp_path / "mine"), "/nowhere"]))
    monkeypatch.setattr("tilemla.wheel.installed_module_stores", lambda: [("a-wheel 1.0", tmp_path / "wheel")])
    expected = [
        (make_entry(tmp_path / "mine", BF16), "directory", "ok"),
        (make_entry(tmp_path / "mine", SM90), "directory", "ok"),
        (make_entry(tmp_path / "wheel", SM90), "wheel", "ok"),
        (make_entry(store, BF16), "cache", "ok"),
        (make_entry(old_store, FP16, version="0.0.9"), "cache", "stale"),
    ]
    status, rows = listed()
    assert status == 0
    assert [(directory, row["location"], row["state"]) for directory, row in rows.items()] == expected
    row = rows[store / BF16.name]
    assert row["manifest"]["spec"] == BF16.to_dict() and row["manifest"]["tools"]["tilelang"] == "0.1.15"
    assert row["library_bytes"] == (store / BF16.name / f"{BF16.name}.so").stat().st_size
    assert row["size_bytes"] == sum(path.stat().st_size for path in (store / BF16.name).iterdir())
    assert rows[old_store / FP16.name]["manifest"]["tilemla_version"] == "0.0.9"


def test_list_of_one_architecture(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(tmp_path / "mine"))
    make_entry(store, BF16)
    make_entry(tmp_path / "mine", SM90)
    assert list(listed("--arch", "cpu")[1]) == [store / BF16.name]
    assert list(listed("--arch", "sm_90a")[1]) == [tmp_path / "mine" / SM90.name]
    assert len(listed("--arch", "sm_90a", "--arch", "cpu")[1]) == 2


def test_list_tells_damage(store):
    sound, damaged = make_entry(store, BF16), damage(make_entry(store, FP16))
    status, rows = listed()
    assert status == 1
    assert rows[sound]["state"] == "ok"
    assert rows[damaged]["state"] == "damaged" and "expected sha256" in rows[damaged]["why"]
    done = tilemla("list")
    assert done.exit_code == 1 and "expected sha256" in done.stdout


def test_list_tells_a_module_under_a_wrong_name(store):
    wrong = make_entry(store, BF16).rename(store / FP16.name)
    for path in wrong.iterdir():
        path.rename(wrong / path.name.replace("bf16", "fp16"))
    manifest = wrong / f"{FP16.name}.json"
    manifest.write_text(manifest.read_text().replace(f'"{BF16.name}.so"', f'"{FP16.name}.so"'))
    status, rows = listed()
    assert status == 1 and rows[wrong]["state"] == "damaged"
    assert rows[wrong]["why"].endswith(f"expected a module for {FP16.name}, got one for {BF16.name}")


def test_list_tells_a_module_that_lacks_a_program(store):
    entry = make_entry(store, BF16)
    manifest = entry / f"{BF16.name}.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"programs": ["mla_decode"]}))
    assert listed()[1][entry]["why"].endswith(
        "lacks get_mla_metadata, get_batch_invariant_metadata, mla_decode_plain, merge_states"
    )


def test_list_tells_what_is_unmet(store):
    entry = make_entry(store, BF16, requires=Requirements(glibc="99.0"))
    status, rows = listed()
    assert status == 0
    assert rows[entry]["state"] == "unmet" and "glibc 99.0 or later is needed" in rows[entry]["why"]


def test_damage_of_another_version_is_its_own(old_store):
    entry = damage(make_entry(old_store, BF16))
    status, rows = listed()
    assert status == 0 and rows[entry]["state"] == "stale"


def test_nothing_to_list(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(tmp_path / "mine"))
    done = tilemla("list", "--arch", "cpu")
    assert done.exit_code == 0
    assert f"looked in {tmp_path / 'mine'} (TILEMLA_MODULE_PATH), {tmp_path / 'cache'} (cache)." in done.stdout
    assert "tilemla build --preset deepseek-v3 --arch cpu\n" in done.stdout
    done = tilemla("list", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["modules"] == []


def test_list_as_text(store, old_store):
    make_entry(store, BF16)
    make_entry(old_store, FP16)
    lines = tilemla("list").stdout.splitlines()
    assert lines[0] == f"{store} (cache)"
    assert any(line.split() == [BF16.name, *line.split()[1:-1], "ok"] for line in lines)
    assert any("g++ 12.2.0, tilelang 0.1.15" in line for line in lines)
    assert any("`tilemla clean --stale` removes it" in line for line in lines)


def test_list_says_what_is_wrong_with_a_variable(monkeypatch):
    monkeypatch.setenv("TILEMLA_BUILD", "maybe")
    done = tilemla("list")
    assert done.exit_code == 1 and "TILEMLA_BUILD must be one of auto, never, got 'maybe'" in done.stderr


def test_names_are_not_markup(tmp_path, monkeypatch):
    cache = tmp_path / "[bold]cache"
    monkeypatch.setenv("TILEMLA_CACHE_DIR", str(cache))
    make_entry(cache_store("cpu"), BF16)
    assert str(cache) in tilemla("list").stdout
    assert str(cache) in tilemla("clean", "--all", "--dry-run").stdout


def test_size_of_a_tree_counts_links_as_links(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(bytes(1000))
    (tmp_path / "big").write_bytes(bytes(1 << 20))
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "big").symlink_to(tmp_path / "big")
    links = len(str(tmp_path / "a")) + len(str(tmp_path / "big"))
    assert tree_size(tmp_path / "a") == 1000 + links
    assert tree_size(tmp_path / "gone") == 0


@pytest.mark.parametrize(
    "size_bytes, text",
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes_in_words(size_bytes, text):
    assert format_size(size_bytes) == text
