"""``tilemla clean`` removes what was asked for and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commands import tilemla
from fakes import make_entry
from tilemla.cli.output import format_size, tree_size
from tilemla.spec import KernelSpec
from tilemla.store import building_prefix, lock_path, set_aside

BF16 = KernelSpec(arch="cpu", dtype="bfloat16")
FP16 = KernelSpec(arch="cpu", dtype="float16")
SM90 = KernelSpec(arch="sm_90a", dtype="bfloat16")
DAY = 86400


pytestmark = pytest.mark.usefixtures("cache")


def damage(directory):
    (directory / f"{directory.name}.so").write_bytes(b"changed")
    return directory


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def unfinished(store, spec):
    """What a build that was killed leaves: its folder, and a lock that nobody holds."""
    folder = store / f"{building_prefix(spec.name)}x1y2"
    folder.mkdir()
    (folder / "mla_decode.cu").write_text("half of")
    lock_path(store, spec.name).touch()
    return folder


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--yes"],
        ["--dry-run"],
        ["--all", "--stale"],
        ["--all", "--older-than", "1d"],
        ["--older-than", "1"],
        ["--older-than", "1 year"],
        ["--older-than", "-1d"],
        ["--older-than", ""],
    ],
)
def test_clean_has_to_be_told_what(store, words):
    entry = make_entry(store, BF16)
    done = tilemla("clean", *words)
    assert done.exit_code == 2 and "Usage: " in done.stderr
    assert entry.exists()


def test_clean_without_a_cache(cache):
    done = tilemla("clean", "--all", "--yes")
    assert (done.exit_code, done.stdout) == (0, f"Nothing to remove: there is no {cache}.\n")
    cache.mkdir()
    done = tilemla("clean", "--all", "--yes")
    assert (done.exit_code, done.stdout) == (0, f"Nothing to remove in {cache}.\n")


def test_clean_asks_first(store):
    entry = make_entry(store, BF16)
    for answer in ("n\n", "", "\n"):
        done = tilemla("clean", "--all", answer=answer)
        assert done.exit_code == 1 and "Remove them? [y/N]" in done.stderr
        assert BF16.name in done.stdout and "1 in all, " in done.stdout
        assert entry.exists()
    done = tilemla("clean", "--all", answer="y\n")
    assert done.exit_code == 0 and not entry.exists()


def test_dry_run_removes_nothing(store, cache):
    make_entry(store, BF16)
    unfinished(store, FP16)
    before = tree(cache)
    done = tilemla("clean", "--all", "--dry-run")
    assert done.exit_code == 0 and "2 in all, " in done.stdout and "Removed" not in done.stdout
    assert tree(cache) == before


def test_clean_by_age(store):
    old, new = make_entry(store, BF16, age_s=8 * DAY), make_entry(store, FP16, age_s=6 * DAY)
    left = unfinished(store, BF16)
    os.utime(left, (1, 1))
    assert "Nothing to remove" in tilemla("clean", "--older-than", "2w", "--yes").stdout
    assert "Nothing to remove" in tilemla("clean", "--older-than", "8d", "--stale", "--yes").stdout
    size_bytes = tree_size(old)
    done = tilemla("clean", "--older-than", "1w", "--yes")
    assert f"Removed 1, freed {format_size(size_bytes)}." in done.stdout
    assert not old.exists() and new.exists() and left.exists()
    assert "Removed 1" in tilemla("clean", "--older-than", "143h", "--yes").stdout
    assert not new.exists()


def test_clean_what_is_stale(store, old_store):
    mine, other, left = make_entry(store, BF16), make_entry(old_store, BF16), unfinished(old_store, FP16)
    done = tilemla("clean", "--stale", "--yes")
    assert "Removed 2" in done.stdout
    assert mine.exists() and not other.exists() and not left.exists() and not old_store.exists()


def test_clean_one_version(store, old_store):
    mine, other = make_entry(store, BF16), make_entry(old_store, BF16)
    assert "Nothing to remove" in tilemla("clean", "--version", "0.0", "--yes").stdout
    assert "Removed 1" in tilemla("clean", "--version", "0.0.9", "--yes").stdout
    assert mine.exists() and not other.exists()


def test_options_narrow_each_other(store, old_store):
    new, old = make_entry(old_store, BF16, age_s=0), make_entry(old_store, FP16, age_s=40 * DAY)
    mine = make_entry(store, FP16, age_s=40 * DAY)
    tilemla("clean", "--stale", "--older-than", "30d", "--yes")
    assert new.exists() and not old.exists() and mine.exists()


def test_clean_damage(store, old_store):
    sound, damaged = make_entry(store, BF16), damage(make_entry(store, FP16))
    aside = set_aside(make_entry(store, SM90))
    left = unfinished(store, BF16)
    other = damage(make_entry(old_store, BF16))
    done = tilemla("clean", "--damaged", "--yes")
    assert done.exit_code == 0 and "Removed 3" in done.stdout
    assert sound.exists() and not damaged.exists() and not aside.exists() and not left.exists()
    # Another version's manifests may have a format that this one cannot read: that is no damage.
    assert other.exists()


def test_clean_all_leaves_nothing_of_ours(store, old_store, cache):
    make_entry(store, BF16)
    damage(make_entry(store, FP16))
    set_aside(make_entry(old_store, BF16))
    unfinished(old_store, FP16)
    done = tilemla("clean", "--all", "--yes")
    assert done.exit_code == 0 and "Removed 4" in done.stdout
    assert tree(cache) == []


def test_clean_leaves_alone_what_is_not_ours(store, cache):
    make_entry(store, BF16)
    for path in (cache / "notes.txt", cache / "other" / "file", cache / "1.0-cpu-x-nothex" / "file", store / "README"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (store / "not_a_module").mkdir()
    (store / ".mla_decode_x.lock.d").mkdir()
    expected = set(tree(cache)) - {str(path.relative_to(cache)) for path in (store / BF16.name).rglob("*")}
    expected -= {str((store / BF16.name).relative_to(cache))}
    done = tilemla("clean", "--all", "--yes")
    assert done.exit_code == 0 and "Removed 1" in done.stdout
    assert set(tree(cache)) - {str(lock_path(store, BF16.name).relative_to(cache))} == expected
    for path in (cache / "notes.txt", cache / "other", cache / "1.0-cpu-x-nothex", store / "README"):
        assert f"left alone, unknown to tilemla: {path}\n" in done.stderr


def test_foreign_file_keeps_its_store(store):
    make_entry(store, BF16)
    (store / "README").write_text("mine")
    assert "Removed 1" in tilemla("clean", "--all", "--yes").stdout
    assert (store / "README").read_text() == "mine"


def test_many_foreign_files_are_counted(cache):
    cache.mkdir()
    for i in range(13):
        (cache / f"note{i}").touch()
    lines = tilemla("clean", "--all", "--yes").stderr.splitlines()
    assert len(lines) == 11 and lines[-1].endswith(": 3 more")


def test_clean_follows_no_link(store, old_store, cache, tmp_path):
    """Not to a store, not to an entry, not from inside an entry."""
    outside = tmp_path / "outside"
    precious = make_entry(outside, BF16)
    (cache / "0.0.8-cpu-tilelang0.1.13-g++12-0123456789abcdef").symlink_to(outside)
    (old_store / BF16.name).symlink_to(precious)
    (old_store / f".{FP16.name}.building-abc").symlink_to(outside)
    entry = make_entry(store, BF16)
    (entry / "link").symlink_to(outside)
    (entry / "linked.so").symlink_to(precious / f"{BF16.name}.so")
    before = tree(outside)
    done = tilemla("clean", "--all", "--yes")
    assert done.exit_code == 0 and "Removed 1" in done.stdout
    assert not entry.exists() and tree(outside) == before
    assert (old_store / BF16.name).is_symlink() and done.stderr.count("left alone, unknown to tilemla") == 3


def test_other_places_are_never_touched(store, tmp_path, monkeypatch):
    mine = damage(make_entry(tmp_path / "mine", BF16, age_s=100 * DAY))
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(tmp_path / "mine"))
    monkeypatch.setattr("tilemla.wheel.installed_module_stores", lambda: [("a-wheel 1.0", tmp_path / "wheel")])
    wheel = make_entry(tmp_path / "wheel", FP16, age_s=100 * DAY)
    make_entry(store, BF16)
    assert "Removed 1" in tilemla("clean", "--all", "--yes").stdout
    assert mine.exists() and wheel.exists()


def test_cache_that_others_can_write_to_is_refused(store, cache):
    """Somebody else could put a link in the way of what is removed."""
    entry = make_entry(store, BF16)
    cache.chmod(0o777)
    done = tilemla("clean", "--all", "--yes")
    assert done.exit_code == 1 and f"chmod go-w {cache}" in done.stderr
    assert entry.exists()


_HOLDER = """
import sys, filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Hold a lock in a process of its own until the test ends."""
    holders = []

    def start(path):
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        holders.append(holder)
        assert holder.stdout.readline() == "held\n"
        return holder

    yield start
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_what_is_being_built_is_left_alone(store, hold):
    building = unfinished(store, BF16)
    entry = make_entry(store, BF16)
    other = make_entry(store, FP16)
    holder = hold(lock_path(store, BF16.name))
    done = tilemla("clean", "--all", "--yes")
    assert done.exit_code == 0 and "Removed 1" in done.stdout
    assert building.exists() and entry.exists() and lock_path(store, BF16.name).exists() and not other.exists()
    for path in (building, entry):
        assert f"left alone, another process is building it: {path}\n" in done.stderr
        assert path.name not in done.stdout
    # The kernel gives the lock of a killed process back.
    holder.kill()
    holder.wait()
    assert "Removed 2" in tilemla("clean", "--all", "--yes").stdout
    assert not store.exists()


def test_build_that_begins_while_the_question_waits(store, hold, monkeypatch):
    entry = make_entry(store, BF16)

    def confirm(*args, **kwargs):
        hold(lock_path(store, BF16.name))
        return True

    monkeypatch.setattr("click.confirm", confirm)
    done = tilemla("clean", "--all")
    assert done.exit_code == 0 and "Removed 0, freed 0 bytes." in done.stdout
    assert entry.exists() and "another process is building it" in done.stderr


def test_module_that_is_replaced_while_the_question_waits(store, monkeypatch):
    entry = damage(make_entry(store, BF16))

    def confirm(*args, **kwargs):
        shutil.move(entry, store / "elsewhere")
        make_entry(store, BF16)
        return True

    monkeypatch.setattr("click.confirm", confirm)
    done = tilemla("clean", "--damaged")
    assert done.exit_code == 0 and "it was changed meanwhile" in done.stderr
    assert (entry / f"{BF16.name}.json").exists()


def test_module_is_gone_at_once_or_not_at_all(store, monkeypatch):
    """When removing stops half-way, what is left does not look like a module, and the next run removes it."""
    entry = make_entry(store, BF16)

    def full_stop(path, *args, **kwargs):
        (Path(path) / f"{BF16.name}.so").unlink()
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", full_stop)
        done = tilemla("clean", "--all", "--yes")
    assert done.exit_code == 1 and "cannot be removed" in done.stderr and "stopped" in done.stderr
    assert not entry.exists() and "No modules were found" in tilemla("list").stdout
    assert "Removed 1" in tilemla("clean", "--damaged", "--yes").stdout
    assert not store.exists()


def test_real_processes(store, cache, tmp_path):
    """As a user: list, clean at a prompt without a terminal, clean, list."""
    make_entry(store, BF16)

    def run(*words):
        command = [sys.executable, "-m", "tilemla", *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, stdin=subprocess.DEVNULL
        )

    done = run("list")
    assert done.returncode == 0 and BF16.name in done.stdout and not done.stderr
    done = run("clean", "--all")
    assert done.returncode == 1 and "Aborted!" in done.stderr and (store / BF16.name).exists()
    done = run("clean", "--all", "-y")
    assert done.returncode == 0 and tree(cache) == []
    done = run("list")
    assert done.returncode == 0 and "No modules were found" in done.stdout
    assert run("clean").returncode == 2
