"""The manifest beside a generated module: what it was built from, with what, and what came out.

Standard library only: the loader reads manifests in processes that never import TileLang.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

# Raise it when the layout of a manifest, the exported functions or their parameters change: a module that was built
# ahead by another version is then refused instead of being called with the wrong arguments.
MANIFEST_FORMAT = 7


class ManifestError(ValueError):
    """A manifest that cannot be read, or a library that is not the one its manifest describes."""


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What ``ptxas`` reported about one kernel.

    Parameters
    ----------
    name : str
        Symbol of the kernel in the cubin.
    program : str
        Name of the program (the exported function) that launches it.
    registers : int
        Registers of one thread.
    spill_store_bytes, spill_load_bytes, stack_bytes : int
        Bytes of one thread's spills and stack frame; a module that has any is not built.
    smem_static_bytes, smem_dynamic_bytes : int
        Shared memory of one CTA, declared in the kernel and asked for at launch.
    threads : int
        Threads of one CTA.
    """

    name: str
    program: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    smem_static_bytes: int
    smem_dynamic_bytes: int
    threads: int

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one CTA in bytes, static and dynamic."""
        return self.smem_static_bytes + self.smem_dynamic_bytes


@dataclasses.dataclass(frozen=True)
class Requirements:
    """The least versions that a machine must have to run a module; an empty string asks for nothing.

    Parameters
    ----------
    glibc : str
        Version of the C library, such as ``"2.34"``.
    libstdcxx : str
        Greatest ``GLIBCXX`` symbol version of the C++ library, such as ``"3.4.21"``.
    driver : str
        CUDA version that the driver supports, as ``nvidia-smi`` shows it, such as ``"13.0"``.
    """

    glibc: str = ""
    libstdcxx: str = ""
    driver: str = ""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """One generated module.

    Parameters
    ----------
    name : str
        The spec's name; the stem of every file of the module.
    spec : dict
        ``KernelSpec.to_dict()`` of the spec that the module serves.
    config : dict
        ``KernelConfig.to_dict()`` of what its kernels are tuned by.
    library : str
        File name of the shared library, beside the manifest.
    sha256 : str
        Hash of the library's bytes, as 64 hexadecimal digits.
    fingerprint : str
        ``source_fingerprint()`` of the sources that the module was generated from.
    programs : tuple of str
        Names of the TVM-FFI functions that the library exports.
    files : dict of str to str
        File names of what is kept beside the library, by role: ``launcher`` and, for each program, ``<program>.tir``
        (the tile program), ``<program>.source`` and, for a GPU, ``<program>.ptx`` and ``<program>.cubin``.
    kernels : tuple of KernelReport
        One report per device kernel; empty for a CPU module.
    tools : dict of str to str
        ``tool_versions(arch)`` of the machine that built it.
    flags : dict of str to list of str
        Options that the compilers were given, by tool.
    requires : Requirements
        What a machine must have to run it.
    tilemla_version : str
        Version of this package that built it.
    format : int
        Version of this layout and of the calling convention of the exported functions.
    """

    name: str
    spec: dict[str, Any]
    config: dict[str, int]
    library: str
    sha256: str
    fingerprint: str
    programs: tuple[str, ...]
    files: dict[str, str]
    kernels: tuple[KernelReport, ...]
    tools: dict[str, str]
    flags: dict[str, list[str]]
    requires: Requirements
    tilemla_version: str
    format: int = MANIFEST_FORMAT

    def to_json(self) -> str:
        """The manifest as indented JSON with a final newline."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "manifest") -> Manifest:
        """Parse what ``to_json`` wrote.

        Raises
        ------
        ManifestError
            On text that is not a manifest of this format; ``where`` names it in the message.
        """
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict) or fields.get("format") != MANIFEST_FORMAT:
                got = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
                raise ManifestError(
                    f"{where}: expected manifest format {MANIFEST_FORMAT}, got {got!r}: this tilemla does not read it, "
                    "build the module anew"
                )
            fields["programs"] = tuple(fields["programs"])
            fields["kernels"] = tuple(KernelReport(**kernel) for kernel in fields["kernels"])
            fields["requires"] = Requirements(**fields["requires"])
            return cls(**fields)
        except ManifestError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ManifestError(f"{where}: not a module manifest ({error})") from error


def manifest_path(directory: str | Path, name: str) -> Path:
    """Path of the manifest of the module called ``name`` in ``directory``."""
    return Path(directory) / f"{name}.json"


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest file.

    Raises
    ------
    ManifestError
        When the file is missing, unreadable or not a manifest.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read ({error})") from error
    return Manifest.from_json(text, where=str(path))


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify_library(manifest: Manifest, directory: str | Path) -> Path:
    """Check the library of a module against its manifest.

    Parameters
    ----------
    manifest : Manifest
        The manifest that was read.
    directory : str or Path
        The directory that holds manifest and library.

    Returns
    -------
    Path
        The library, safe to open.

    Raises
    ------
    ManifestError
        When the library is missing, lies outside the directory, or has another hash than the manifest says.
    """
    if Path(manifest.library).name != manifest.library:
        raise ManifestError(f"{manifest.name}: library must be a plain file name, got {manifest.library!r}")
    library = Path(directory) / manifest.library
    try:
        received = sha256_of(library)
    except OSError as error:
        raise ManifestError(f"{library}: cannot be read ({error})") from error
    if received != manifest.sha256:
        raise ManifestError(f"{library}: expected sha256 {manifest.sha256}, got {received}; the file was changed")
    return library
