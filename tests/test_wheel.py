"""Wheels of modules: what is in them, that they serve where nothing can be built, and what cannot be packed."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import textwrap
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename
from packaging.version import Version

import tilemla
from environments import build_base_wheel, make_environment, requirements_of_wheel
from tilemla import wheel
from tilemla.errors import ToolchainError
from tilemla.loader import ensure_module
from tilemla.manifest import ManifestError, manifest_path, read_manifest
from tilemla.spec import KernelSpec
from tilemla.store import Entry
from tilemla.toolchain import find_cuda_toolkit

TESTS = Path(__file__).resolve().parent
CPU, CPU_FP16 = (KernelSpec(arch="cpu", dtype=dtype) for dtype in ("bfloat16", "float16"))
SM90 = KernelSpec(arch="sm_90a")


@pytest.fixture(scope="session")
def cpu_entry():
    return ensure_module(CPU).entry


@pytest.fixture(scope="session")
def cpu_wheel(cpu_entry, tmp_path_factory):
    return wheel.write_wheel([cpu_entry], tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def sm90_wheel(tmp_path_factory):
    try:
        find_cuda_toolkit()
    except ToolchainError:
        pytest.skip("needs nvcc")
    return wheel.write_wheel([ensure_module(SM90).entry], tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def server(cpu_wheel, tmp_path_factory):
    """A serving image: what the base wheel asks for, the base wheel, and the modules' wheel."""
    base = build_base_wheel(tmp_path_factory.mktemp("base"))
    environment = make_environment(tmp_path_factory.mktemp("server"), requirements_of_wheel(base))
    environment.install(base)
    environment.install(cpu_wheel)
    return environment


def write_manifest(fields, directory):
    """Laid out as `Manifest.to_json` does it."""
    path = manifest_path(directory, fields["name"])
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    return Entry(read_manifest(path), directory)


@pytest.fixture
def copy_of(cpu_entry, tmp_path):
    """A copy of the module to damage; its manifest's fields may be replaced."""

    def copy(folder="copy", spec=None, **fields):
        manifest = json.loads(cpu_entry.manifest.to_json()) | fields
        if spec is not None:
            manifest |= {"name": spec.name, "spec": spec.to_dict()}
        directory = tmp_path / folder / manifest["name"]
        shutil.copytree(cpu_entry.directory, directory)
        manifest_path(directory, cpu_entry.manifest.name).unlink()
        return write_manifest(manifest, directory)

    return copy


def test_decode_in_a_serving_image(server):
    """The real thing: no TileLang, no TVM, no compiler, generation off, and the results are right."""
    script = """
        import importlib, json, shutil, sys
        import torch
        import tilemla
        from tilemla import loader
        from tilemla.spec import KernelSpec

        sys.path.insert(0, sys.argv[1])
        from cases import Case, make_inputs
        from reference import check_result, check_schedule, reference_of

        def is_absent(name):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                return True
            return False

        absent = [name for name in ("tilelang", "tvm", "z3", "elftools") if is_absent(name)]
        programs = [name for name in ("g++", "c++", "clang++", "nvcc", "ptxas") if shutil.which(name)]
        for case in (Case((100, 700, 0, 64), num_heads_q=16), Case((300, 65), seq_len_q=2, num_heads_q=3, causal=True)):
            inputs = make_inputs(case)
            metadata, num_splits = tilemla.get_mla_metadata(inputs.cache_seqlens, case.seq_len_q * case.num_heads_q, 1)
            check_schedule(metadata.numpy(), num_splits.numpy(), inputs.cache_seqlens.numpy())
            out, lse = tilemla.flash_mla_with_kvcache(
                inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, metadata, num_splits,
                causal=case.causal,
            )
            check_result(out, lse, reference_of(inputs, causal=case.causal))
        spec = KernelSpec(arch="cpu")
        location = loader.find_module(spec).location
        print(json.dumps(dict(
            absent=absent, programs=programs, kind=location.kind, label=location.label, store=str(location.store),
            library=str(loader.load_module(spec).library), package_imported="tilemla_modules_cpu" in sys.modules,
        )))
    """
    found = server.run_script(textwrap.dedent(script), TESTS)
    assert found["absent"] == ["tilelang", "tvm", "z3", "elftools"]
    assert found["programs"] == [] and not found["package_imported"]
    store = server.site_packages / "tilemla_modules_cpu"
    assert (found["kind"], found["store"]) == ("wheel", str(store))
    assert re.fullmatch(r"tilemla-modules-cpu 0\.1\.0\+\w{1,8}", found["label"])
    assert found["library"] == str(store / CPU.name / f"{CPU.name}.so")
    assert not server.cache_dir.exists()


def test_missing_module_in_a_serving_image(server):
    """The error names the spec, where it was looked for and the command that builds it."""
    script = f"from tilemla import loader, spec; loader.load_module(spec.{CPU_FP16!r})"
    done = server.run("-c", script)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"tilemla.errors.ModuleNotBuiltError: {CPU_FP16.name} is not built")
    assert "tilemla-modules-cpu" in last and f"tilemla build {CPU_FP16.build_options} " in last
    assert not server.cache_dir.exists()


def test_inspect_in_a_serving_image(server, cpu_entry):
    """A wheel carries what `inspect` shows."""
    done = server.run("-m", "tilemla", "inspect", CPU.name, "--source", "--program", "mla_decode")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (cpu_entry.directory / cpu_entry.manifest.files["mla_decode.source"]).read_text()


def test_damaged_module_in_a_wheel(server):
    """It is neither opened nor passed over, and the error says to install the wheel anew."""
    library = server.site_packages / "tilemla_modules_cpu" / CPU.name / f"{CPU.name}.so"
    sound = library.read_bytes()
    library.write_bytes(sound[:-1])
    try:
        done = server.run("-c", f"from tilemla import loader, spec; loader.load_module(spec.{CPU!r})")
    finally:
        library.write_bytes(sound)
    assert done.returncode == 1
    assert re.search(r"tilemla-modules-cpu 0\.1\.0\S+ holds a damaged module: .*install the wheel anew", done.stderr)


def test_sm90_module_opens_without_a_gpu(server, sm90_wheel):
    """Both architectures' wheels lie side by side, and inspecting needs no GPU."""
    server.install(sm90_wheel)
    script = f"""
        import json
        from tilemla import loader, spec, wheel
        module = loader.load_module(spec.{SM90!r})
        labels = [label.partition(" ")[0] for label, _ in wheel.installed_module_stores()]
        print(json.dumps(dict(library=str(module.library), labels=labels)))
    """
    found = server.run_script(textwrap.dedent(script))
    assert found["library"].startswith(str(server.site_packages / "tilemla_modules_sm_90a"))
    assert found["labels"] == ["tilemla-modules-cpu", "tilemla-modules-sm-90a"]
    done = server.run("-m", "tilemla", "inspect", SM90.name, "--resources")
    assert done.returncode == 0 and "mla_decode_kernel" in done.stdout, done.stderr


@pytest.mark.parametrize("fixture", ["cpu_wheel", "sm90_wheel"])
def test_wheel_is_valid(request, fixture):
    path = request.getfixturevalue(fixture)
    spec = CPU if fixture == "cpu_wheel" else SM90
    entry = ensure_module(spec).entry
    name, version, build, tags = parse_wheel_filename(path.name)
    assert (name, build) == (f"tilemla-modules-{spec.arch.replace('_', '-')}", ())
    assert version.public == tilemla.__version__ and len(version.local) <= 8
    glibc = entry.manifest.requires.glibc.replace(".", "_")
    assert [str(tag) for tag in tags] == [f"py3-none-manylinux_{glibc}_{os.uname().machine}"]
    assert path.stat().st_size < 1_000_000
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        dist_info = f"tilemla_modules_{spec.arch}-{version}.dist-info"
        check_record(archive, f"{dist_info}/RECORD")
        metadata = Metadata.from_email(archive.read(f"{dist_info}/METADATA"), validate=True)
        assert (metadata.name, metadata.version) == (name, version)
        assert [str(each) for each in metadata.requires_dist] == [f"tilemla=={tilemla.__version__}"]
        assert spec.name in metadata.description
        for name in ("LICENSE", "NOTICE"):
            assert archive.read(f"{dist_info}/licenses/{name}") == (TESTS.parent / name).read_bytes()
        assert f"Tag: {next(iter(tags))}\n".encode() in archive.read(f"{dist_info}/WHEEL")
        inside = {Path(each).name for each in archive.namelist() if f"/{spec.name}/" in each}
        assert inside == {path.name for path in entry.directory.iterdir()}


def check_record(archive, record):
    """RECORD lists every file once, with its size and hash, itself without."""
    rows = list(csv.reader(io.StringIO(archive.read(record).decode())))
    assert sorted(row[0] for row in rows) == sorted(archive.namelist())
    for path, digest, size in rows:
        if path == record:
            assert (digest, size) == ("", "")
            continue
        data = archive.read(path)
        expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert (digest, size) == (f"sha256={expected}", str(len(data))), path


def test_permissions_and_times_are_fixed(cpu_wheel):
    with zipfile.ZipFile(cpu_wheel) as archive:
        for info in archive.infolist():
            assert (info.external_attr >> 16) & 0o777 == (0o755 if info.filename.endswith(".so") else 0o644)
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
    assert cpu_wheel.stat().st_mode & 0o777 == 0o644


def test_same_modules_make_the_same_bytes(cpu_entry, cpu_wheel, copy_of, tmp_path):
    """Whenever and from wherever they are packed, in whatever order."""
    first, second = copy_of("a"), copy_of("b", spec=CPU_FP16)
    os.utime(first.library, (1e9, 1e9))
    again = wheel.write_wheel([copy_of("c", spec=CPU_FP16), copy_of("d")], tmp_path / "again")
    other = wheel.write_wheel([first, second], tmp_path / "other")
    assert (again.name, again.read_bytes()) == (other.name, other.read_bytes())
    shutil.copytree(cpu_entry.directory, tmp_path / "same" / CPU.name)
    same = wheel.write_wheel([cpu_entry._replace(directory=tmp_path / "same" / CPU.name)], tmp_path)
    assert (same.name, same.read_bytes()) == (cpu_wheel.name, cpu_wheel.read_bytes())
    assert sorted(path.name for path in tmp_path.glob("*.whl")) == [same.name], "a file of the writer was left behind"


@pytest.mark.parametrize("file", ["launcher.cc", "library"])
def test_other_contents_are_another_version(cpu_wheel, copy_of, tmp_path, file):
    """Or a package manager would keep what it has."""
    entry = copy_of()
    path = entry.library if file == "library" else entry.directory / file
    path.write_bytes(path.read_bytes()[:-1] + b"\1")  # of the same size
    if file == "library":
        fields = json.loads(entry.manifest.to_json())
        entry = write_manifest(fields | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}, entry.directory)
    other = parse_wheel_filename(wheel.write_wheel([entry], tmp_path).name)[1]
    assert other != parse_wheel_filename(cpu_wheel.name)[1] and other.public == tilemla.__version__


@pytest.mark.parametrize(
    "built_by, digest, version",
    [
        ("0.1.0", "1a2b3c4d", "0.1.0+1a2b3c4d"),
        ("0.1.0", "00012345", "0.1.0+12345"),  # a local part that is all digits is a number
        ("0.2.0+local.1", "1a2b3c4d", "0.2.0+local.1.1a2b3c4d"),
    ],
)
def test_version_is_written_as_installers_write_it(built_by, digest, version):
    """File name, metadata and what is installed must agree."""
    assert wheel._version(built_by, digest) == version == str(Version(version))


def test_the_newest_glibc_decides(copy_of, tmp_path):
    """2.9 is older than 2.34, though not as text."""
    needs = [dict(glibc=glibc, libstdcxx="3.4.21", driver="") for glibc in ("2.9", "2.34")]
    entries = [copy_of("a", requires=needs[0]), copy_of("b", spec=CPU_FP16, requires=needs[1])]
    assert "-manylinux_2_34_" in wheel.write_wheel(entries, tmp_path / "both").name
    assert "-manylinux_2_9_" in wheel.write_wheel(entries[:1], tmp_path / "one").name


def test_no_modules(tmp_path):
    with pytest.raises(ValueError, match="at least one module, got none; build some first, with `tilemla build`"):
        wheel.write_wheel([], tmp_path)


def test_mixed_architectures(copy_of, tmp_path):
    with pytest.raises(ValueError, match="modules of one architecture, got cpu, sm_90a; write one wheel for each"):
        wheel.write_wheel([copy_of(), copy_of("other", spec=SM90)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mixed_versions(copy_of, tmp_path):
    entries = [copy_of(), copy_of("other", spec=CPU_FP16, tilemla_version="0.0.9")]
    with pytest.raises(ValueError, match=r"one version of tilemla, got 0\.0\.9, 0\.1\.0"):
        wheel.write_wheel(entries, tmp_path / "out")


def test_module_twice(copy_of, tmp_path):
    with pytest.raises(ValueError, match=f"a module once, got twice: {CPU.name}"):
        wheel.write_wheel([copy_of("a"), copy_of("b")], tmp_path / "out")


@pytest.mark.parametrize("damage", ["library", "manifest", "file missing", "file elsewhere", "name", "not ELF"])
def test_damaged_module_is_not_packed(copy_of, tmp_path, damage):
    entry = copy_of()
    if damage == "library":
        entry.library.write_bytes(entry.library.read_bytes()[:-1])
        expected = "expected sha256"
    elif damage == "manifest":
        manifest_path(entry.directory, CPU.name).write_text("{}")
        expected = "expected manifest format"
    elif damage == "file missing":
        (entry.directory / "launcher.cc").unlink()
        expected = "names launcher.cc, which cannot be read .*; build it anew"
    elif damage == "file elsewhere":
        entry = copy_of("elsewhere", files={"launcher": "../../launcher.cc"})
        expected = "files must be plain names, got '../../launcher.cc'"
    elif damage == "name":
        entry = copy_of("renamed", name=CPU_FP16.name)
        expected = f"expected the name of its spec, {CPU.name}"
    else:
        entry = copy_of("text", sha256=hashlib.sha256(b"text").hexdigest())
        entry.library.write_bytes(b"text")
        expected = "libraries for x86_64 or aarch64, got something else"
    with pytest.raises(ManifestError if damage not in ("name", "not ELF") else ValueError, match=expected):
        wheel.write_wheel([entry], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_no_half_a_wheel(copy_of, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wheel.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        wheel.write_wheel([copy_of()], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_uninstalling_leaves_nothing(cpu_wheel, tmp_path):
    environment = make_environment(tmp_path / "bare")
    fake_base(environment)
    before = environment.listing()
    environment.install(cpu_wheel)
    assert len(environment.listing()) > len(before)
    environment.uninstall("tilemla-modules-cpu")
    assert environment.listing() == before


def test_wheel_asks_for_the_tilemla_that_made_it(cpu_wheel, tmp_path):
    """Another version may call its modules in another way."""
    environment = make_environment(tmp_path / "bare")
    with pytest.raises(AssertionError, match=r"tilemla==0\.1\.0"):
        environment.install(cpu_wheel)


def fake_base(environment):
    """Metadata alone: enough for an installer."""
    folder = environment.site_packages / f"tilemla-{tilemla.__version__}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tilemla\nVersion: {tilemla.__version__}\n")


def test_no_wheels_installed(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert wheel.installed_module_stores() == []
