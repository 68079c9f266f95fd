"""Wheels of built modules: writing one, and finding those that are installed.

The wheel of an architecture is a distribution of its own, ``tilemla-modules-sm-90a``, whose package holds a store and
no code. Its entry point in the group ``tilemla.modules`` tells where.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tilemla.manifest import Manifest, ManifestError, manifest_path, read_manifest, verify_library
from tilemla.spec import KernelSpec

if TYPE_CHECKING:
    from tilemla.store import Entry

ENTRY_POINT_GROUP = "tilemla.modules"
_MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of an ELF header
_OLDEST_GLIBC = "2.5"  # of the manylinux tags; no 64-bit x86 or Arm system that runs torch has an older one
# The oldest time that a zip file can hold: the same modules make the same bytes, whenever they are packed.
_TIMESTAMP = (1980, 1, 1, 0, 0, 0)
_LICENSES = ("LICENSE", "NOTICE")


def installed_module_stores() -> list[tuple[str, Path]]:
    """The stores of the module wheels that are installed. No package is imported for it.

    Returns
    -------
    list of (str, Path)
        Distribution and version, such as ``"tilemla-modules-sm-90a 0.1.0+1a2b3c4d"``, and its store, by label.
    """
    stores = []
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        distribution = entry_point.dist
        if distribution is not None:
            store = Path(str(distribution.locate_file(entry_point.module.replace(".", "/"))))
            stores.append((f"{distribution.metadata['Name']} {distribution.version}", store))
    return sorted(stores)


def write_wheel(entries: Sequence[Entry], out_dir: str | Path) -> Path:
    """Pack built modules of one architecture into a wheel.

    Its version ends in a hash of what it holds, so that a package manager sees other modules as another version. Its
    tag names the glibc that all its modules need. No tag can name the C++ library or the driver: these are checked
    where a module is loaded.

    Parameters
    ----------
    entries : sequence of Entry
        The modules, in any order, built by one version of tilemla.
    out_dir : str or Path
        Where the wheel goes; made when missing.

    Returns
    -------
    Path
        The wheel. The same entries always give the same bytes.

    Raises
    ------
    ValueError
        Without entries, or when their architectures, versions or machines differ.
    ManifestError
        When a module is damaged or lacks a file.
    """
    if not entries:
        raise ValueError("a wheel needs at least one module, got none; build some first, with `tilemla build`")
    entries = sorted(entries, key=lambda entry: entry.manifest.name)
    contents = {entry.manifest.name: _read_files(entry) for entry in entries}
    if len(contents) < len(entries):
        names = [entry.manifest.name for entry in entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"a wheel holds a module once, got twice: {', '.join(twice)}")
    manifests = [entry.manifest for entry in entries]
    arch = _the_one("architecture", (_spec_of(manifest).arch for manifest in manifests))
    built_by = _the_one("version of tilemla", (manifest.tilemla_version for manifest in manifests))
    machine = _the_one(
        "machine", (_machine_of(contents[manifest.name][manifest.library], manifest.name) for manifest in manifests)
    )
    package = f"tilemla_modules_{arch}"
    version = _version(built_by, _digest_of(contents))
    glibc = _greatest([_OLDEST_GLIBC, *(manifest.requires.glibc for manifest in manifests)])
    tag = f"py3-none-manylinux_{glibc.replace('.', '_')}_{machine}"
    dist_info = f"{package}-{version}.dist-info"
    files = {f"{package}/__init__.py": f'"""Built modules of tilemla for {arch}."""\n'.encode()}
    for name, parts in contents.items():
        files |= {f"{package}/{name}/{file}": data for file, data in parts.items()}
    files |= {
        f"{dist_info}/METADATA": _metadata(package, version, built_by, manifests).encode(),
        f"{dist_info}/WHEEL": _wheel_file(tag).encode(),
        f"{dist_info}/entry_points.txt": f"[{ENTRY_POINT_GROUP}]\n{arch} = {package}\n".encode(),
    }
    files |= {f"{dist_info}/licenses/{name}": _license(name).encode() for name in _LICENSES}
    files[f"{dist_info}/RECORD"] = _record(files, f"{dist_info}/RECORD").encode()
    return _install(_zip(files), Path(out_dir) / f"{package}-{version}-{tag}.whl")


def _read_files(entry: Entry) -> dict[str, bytes]:
    """Every file of a module by name, as it lies on disk, checked."""
    path = manifest_path(entry.directory, entry.manifest.name)
    anew = f"build it anew, with `tilemla build`: {entry.directory}"
    if read_manifest(path) != entry.manifest:
        raise ManifestError(f"{path}: changed since it was checked; {anew}")
    verify_library(entry.manifest, entry.directory)
    names = (entry.manifest.library, path.name, *sorted(entry.manifest.files.values()))
    files = {}
    for name in names:
        if Path(name).name != name:
            raise ManifestError(f"{path}: files must be plain names, got {name!r}; {anew}")
        try:
            files[name] = (entry.directory / name).read_bytes()
        except OSError as error:
            raise ManifestError(f"{path}: names {name}, which cannot be read ({error}); {anew}") from error
    return files


def _spec_of(manifest: Manifest) -> KernelSpec:
    spec = KernelSpec.from_dict(manifest.spec)
    if spec.name != manifest.name:
        raise ValueError(f"{manifest.name}: expected the name of its spec, {spec.name}; build the module anew")
    return spec


def _the_one(what: str, values: Iterable[str]) -> str:
    found = sorted(set(values))
    if len(found) > 1:
        raise ValueError(f"a wheel holds modules of one {what}, got {', '.join(found)}; write one wheel for each")
    return found[0]


def _machine_of(library: bytes, name: str) -> str:
    """The processor that a library is for; its own word counts, not the machine that packs it."""
    number = int.from_bytes(library[18:20], "big" if library[5:6] == b"\x02" else "little")
    if library[:4] != b"\x7fELF" or number not in _MACHINES:
        raise ValueError(f"{name}: a wheel holds libraries for {' or '.join(_MACHINES.values())}, got something else")
    return _MACHINES[number]


def _digest_of(contents: Mapping[str, Mapping[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, files in contents.items():
        for file, data in files.items():
            digest.update(f"{name}/{file} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()[:8]


def _version(built_by: str, digest: str) -> str:
    from packaging.version import Version

    # Version writes it as installers do, who drop leading zeros of a part that is all digits.
    return str(Version(f"{built_by}{'.' if '+' in built_by else '+'}{digest}"))


def _greatest(versions: Iterable[str]) -> str:
    from packaging.version import Version

    return max((version for version in versions if version), key=Version, default="")


def _metadata(package: str, version: str, built_by: str, manifests: Sequence[Manifest]) -> str:
    from packaging.utils import canonicalize_name

    arch = manifests[0].spec["arch"]
    fields = (
        ("Metadata-Version", "2.4"),
        ("Name", canonicalize_name(package)),
        ("Version", version),
        ("Summary", f"Built modules of tilemla for {arch}: MLA decode without a compiler"),
        ("License-Expression", "Apache-2.0"),
        *(("License-File", name) for name in _LICENSES),
        ("Classifier", "Operating System :: POSIX :: Linux"),
        ("Requires-Python", ">=3.10"),
        ("Requires-Dist", f"tilemla=={built_by}"),
        ("Description-Content-Type", "text/markdown"),
    )
    head = "".join(f"{name}: {value}\n" for name, value in fields)
    modules = "".join(f"- `{manifest.name}`\n" for manifest in manifests)
    return f"{head}\nModules that tilemla {built_by} finds when this is installed beside it:\n\n{modules}"


def _wheel_file(tag: str) -> str:
    return f"Wheel-Version: 1.0\nGenerator: tilemla\nRoot-Is-Purelib: false\nTag: {tag}\n"


def _license(name: str) -> str:
    # In a checkout, a build's egg-info without licences may come before what is installed.
    for distribution in importlib.metadata.distributions(name="tilemla"):
        text = distribution.read_text(f"licenses/{name}")
        if text is not None:
            return text
    raise ValueError(f"the installed tilemla has no {name}, which a wheel must carry; install tilemla anew")


def _record(files: Mapping[str, bytes], own_path: str) -> str:
    """The list of a wheel's files with their hashes; paths hold neither commas nor quotes, so CSV needs no quoting."""
    lines = []
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(data)}\n")
    return "".join([*lines, f"{own_path},,\n"])


# PEP 427 asks for a zip file in which RECORD lists the rest. The package `wheel` is a command and no library, and its
# writer stamps RECORD with the clock.
def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            info = zipfile.ZipInfo(path, _TIMESTAMP)
            info.create_system = 3  # Unix, whose permissions follow
            info.external_attr = (0o100755 if path.endswith(".so") else 0o100644) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return buffer.getvalue()


def _install(data: bytes, target: Path) -> Path:
    """Put the finished wheel in place at once: nobody sees half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    staged = Path(name)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.chmod(0o644)  # what mkstemp makes is for this user's eyes only
        staged.replace(target)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return target
