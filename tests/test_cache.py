"""The cache under stress: many processes, kills, full and read-only disks, other versions, folders that others share.

The processes, the kills and the disks are real.
"""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from processes import processes_in, wait_until_gone
from tilemla import generate, loader, store
from tilemla.errors import ModuleBuildError, ModuleNotBuiltError
from tilemla.spec import KernelSpec

SPEC = KernelSpec(arch="cpu", dtype="bfloat16")
LOAD = f"import tilemla.loader as l\nfrom tilemla.spec import KernelSpec\nprint(l.load_module({SPEC!r}).library)"
TIMEOUT_S = 300


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    for name in ("TILEMLA_MODULE_PATH", "TILEMLA_BUILD", "TILEMLA_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TILEMLA_LOG", "info")
    monkeypatch.setattr(loader, "_loaded", {})
    use_cache(monkeypatch, tmp_path / "cache")


def use_cache(monkeypatch, directory):
    monkeypatch.setenv("TILEMLA_CACHE_DIR", str(directory))


@pytest.fixture(scope="session")
def built():
    """A sound entry of SPEC, from the cache that all tests share."""
    return loader.ensure_module(SPEC).entry


def start(script=LOAD, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def finish(process):
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, stdout, stderr


def wait_for_step(process, step):
    seen = []
    for line in process.stderr:
        seen.append(line)
        if step in line:
            return
    raise AssertionError(f"no step {step!r} in {seen}")


def test_sixteen_processes_build_once():
    processes = [start() for _ in range(16)]
    results = [finish(process) for process in processes]
    entry = store.entry_dir(store.cache_store("cpu"), SPEC.name)
    for status, stdout, stderr in results:
        assert status == 0, stderr
        assert stdout == f"{entry / SPEC.name}.so\n"
    assert sum(f"{SPEC.name}: linking" in stderr for _, _, stderr in results) == 1
    waited = [stderr for _, _, stderr in results if "waiting for another process that makes it" in stderr]
    assert waited and all(f"{SPEC.name}: found in {entry}" in stderr for stderr in waited)
    assert sorted(path.name for path in entry.parent.iterdir()) == [f".{SPEC.name}.lock", SPEC.name]


def test_asker_killed_half_way():
    """Its build ends with it, nothing that looks like a module is left, and the next one starts at once."""
    directory = store.cache_store("cpu")
    process = start()
    wait_for_step(process, "compiling mla_decode")
    assert processes_in(directory)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until_gone(directory)
    assert loader.find_module(SPEC) is None
    assert list(directory.glob(f"{store.building_prefix(SPEC.name)}*")), "nothing was killed half-way"
    status, _, stderr = finish(start())
    assert status == 0 and "removing what a build that was killed left" in stderr
    assert sorted(path.name for path in directory.iterdir()) == [f".{SPEC.name}.lock", SPEC.name]


def test_build_killed_half_way():
    directory = store.cache_store("cpu")
    process = start()
    wait_for_step(process, "compiling mla_decode")
    (child,) = [pid for pid in processes_in(directory) if parent_of(pid) == process.pid]
    os.kill(child, signal.SIGKILL)
    status, _, stderr = finish(process)
    assert status == 1
    assert f"generating {SPEC.name} failed: `python -m tilemla.codegen` was killed by SIGKILL" in stderr
    wait_until_gone(directory)
    assert loader.find_module(SPEC) is None


def parent_of(pid):
    try:
        return int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    except OSError:  # it has ended
        return None


def test_interrupt_ends_the_build():
    directory = store.cache_store("cpu")
    process = start()
    wait_for_step(process, "compiling mla_decode")
    process.send_signal(signal.SIGINT)
    status, _, stderr = finish(process)
    assert status != 0 and "KeyboardInterrupt" in stderr
    wait_until_gone(directory)


@pytest.fixture
def mount(tmp_path):
    """Mounts a small file system of its own; skips where that is not allowed."""
    mounted = []

    def make(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"cannot mount: {error}")
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("size", ["64k", "120k"])
def test_full_disk(mount, monkeypatch, size):
    """Full while TileLang's output is written, and full while a compiler writes."""
    disk = mount(size)
    use_cache(monkeypatch, disk / "cache")
    with pytest.raises(ModuleBuildError, match="No space left on device"):
        loader.ensure_module(SPEC, print)
    assert loader.find_module(SPEC) is None
    assert [path.name for path in store.cache_store("cpu").iterdir()] == [f".{SPEC.name}.lock"]


def test_disk_without_room_for_a_folder(mount, monkeypatch):
    use_cache(monkeypatch, mount("1m,nr_inodes=2") / "cache")
    with pytest.raises(
        ModuleNotBuiltError, match="cannot be written .*No space left on device.*; set TILEMLA_CACHE_DIR"
    ):
        loader.ensure_module(SPEC, print)


def test_read_only_cache_serves_what_it_holds(built, mount, monkeypatch):
    disk = mount("8m")
    use_cache(monkeypatch, disk)
    shutil.copytree(built.directory, store.cache_store("cpu") / SPEC.name)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert loader.ensure_module(SPEC).entry.directory == store.cache_store("cpu") / SPEC.name
    other = KernelSpec(arch="cpu", dtype="float16")
    with pytest.raises(
        ModuleNotBuiltError, match=f"{other.name} is not built and .* cannot be written .*Read-only file system"
    ):
        loader.ensure_module(other)


def test_read_only_cache_with_a_damaged_module(built, mount, monkeypatch):
    disk = mount("8m")
    use_cache(monkeypatch, disk)
    entry = store.cache_store("cpu") / SPEC.name
    shutil.copytree(built.directory, entry)
    (entry / f"{SPEC.name}.so").write_bytes(b"cut")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ModuleNotBuiltError, match="cannot be written .*Read-only file system"):
        loader.ensure_module(SPEC, print)


def test_two_versions_side_by_side(built, tmp_path):
    """Another version of the sources makes a store of its own, and neither takes or touches the other's."""
    root = Path(__file__).resolve().parent.parent
    package = tmp_path / "newer" / "tilemla"
    shutil.copytree(root / "runtime", package)
    for room in ("dsl", "codegen", "tuning_logs"):
        shutil.copytree(root / room, package / room)
    with open(package / "dsl" / "schedule.py", "a") as file:
        file.write("# newer\n")
    mine = store.cache_store("cpu")
    store.make_private(mine)
    shutil.copytree(built.directory, mine / SPEC.name)
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    status, stdout, stderr = finish(start(PYTHONPATH=str(package.parent)))
    assert status == 0, stderr
    assert "generating into" in stderr
    theirs = Path(stdout.strip()).parent.parent
    assert theirs.parent == mine.parent and theirs != mine
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("*")} == before
    assert finish(start())[1] == f"{mine / SPEC.name / SPEC.name}.so\n"
    assert finish(start(PYTHONPATH=str(package.parent)))[1] == stdout


@pytest.fixture
def private_cache(built, tmp_path):
    """The cache with a module; returns the paths whose modes count."""
    entry = store.cache_store("cpu") / SPEC.name
    store.make_private(entry.parent)
    shutil.copytree(built.directory, entry)
    return {
        "cache": tmp_path / "cache",
        "store": entry.parent,
        "entry": entry,
        "library": entry / f"{SPEC.name}.so",
        "manifest": entry / f"{SPEC.name}.json",
    }


@pytest.mark.parametrize("who", ["group", "others"])
@pytest.mark.parametrize("what", ["cache", "store", "entry", "library", "manifest"])
def test_what_others_can_write_is_refused(private_cache, what, who):
    path = private_cache[what]
    assert loader.find_module(SPEC) is not None
    path.chmod(stat.S_IMODE(path.stat().st_mode) | {"group": 0o020, "others": 0o002}[who])
    with pytest.raises(
        ModuleNotBuiltError, match=rf"{re.escape(str(path))} is refused .*others can write to .*`chmod go-w "
    ):
        loader.ensure_module(SPEC)
    path.chmod(0o755)
    assert loader.find_module(SPEC) is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give files away")
@pytest.mark.parametrize("what", ["cache", "store", "entry", "library", "manifest"])
def test_what_belongs_to_another_user_is_refused(private_cache, what):
    os.chown(private_cache[what], 12345, -1)
    with pytest.raises(
        ModuleNotBuiltError, match=f"{re.escape(str(private_cache[what]))} is refused .*belongs to user 12345"
    ):
        loader.ensure_module(SPEC)


def test_cache_that_others_can_replace_is_refused(tmp_path, private_cache):
    tmp_path.chmod(0o777)
    with pytest.raises(ModuleNotBuiltError, match=f"others can write to {tmp_path} "):
        loader.ensure_module(SPEC)
    tmp_path.chmod(0o1777)  # as /tmp: others may add, not replace
    assert loader.find_module(SPEC) is not None


def test_a_shared_cache_is_not_written_either(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(ModuleNotBuiltError, match="is refused"):
        loader.ensure_module(SPEC)
    assert not list((tmp_path / "cache").iterdir())


def test_what_is_made_is_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        generate.make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o755
