"""What a shared library asks of the machine that opens it, read from its ELF headers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

from tilemla.codegen.errors import BuildError

_NUMBERED = re.compile(r"(GLIBC|GLIBCXX|CXXABI)_(\d+(?:\.\d+)*)")
# CXXABI versions are counted apart from GLIBCXX's but come with the same releases of libstdc++, so that one number
# tells both. They are not implied by a library's own GLIBCXX versions: GCC 14 calls __cxa_call_terminate, which is
# CXXABI_1.3.15, wherever noexcept may be broken. Source: libstdc++'s manual, "Symbol versioning on the libstdc++.so
# binary".
_GLIBCXX_OF_CXXABI = {
    "1.3": "3.4",
    "1.3.1": "3.4.4",
    "1.3.2": "3.4.10",
    "1.3.3": "3.4.11",
    "1.3.4": "3.4.14",
    "1.3.5": "3.4.15",
    "1.3.6": "3.4.17",
    "1.3.7": "3.4.18",
    "1.3.8": "3.4.20",
    "1.3.9": "3.4.21",
    "1.3.10": "3.4.22",
    "1.3.11": "3.4.23",
    "1.3.12": "3.4.26",
    "1.3.13": "3.4.29",
    "1.3.14": "3.4.31",
    "1.3.15": "3.4.33",
    "1.3.16": "3.4.34",
}
# Features of the dynamic loader that are named, not numbered.
_GLIBC_OF_FEATURE = {"GLIBC_ABI_DT_RELR": "2.36"}


def requirements_of(library: Path) -> tuple[str, str]:
    """The least C and C++ libraries that have every symbol version that a library was linked against.

    Parameters
    ----------
    library : Path
        A shared library.

    Returns
    -------
    glibc : str
        Such as ``"2.34"``; ``""`` when no symbol of glibc is needed.
    libstdcxx : str
        A ``GLIBCXX`` version such as ``"3.4.21"``; ``""`` when no symbol of libstdc++ is needed.

    Raises
    ------
    BuildError
        When it is no ELF file, or needs a version of glibc or libstdc++ that is not known here.
    """
    glibc, libstdcxx = [], []
    for version in _needed_versions(library):
        if version in _GLIBC_OF_FEATURE:
            glibc.append(_GLIBC_OF_FEATURE[version])
        elif match := _NUMBERED.fullmatch(version):
            if match[1] == "GLIBC":
                glibc.append(match[2])
            elif match[1] == "GLIBCXX":
                libstdcxx.append(match[2])
            else:
                libstdcxx.append(_glibcxx_of_cxxabi(library, match[2]))
        elif version.startswith(("GLIBC", "CXXABI")):
            raise BuildError(f"{library}: needs {version}, and which glibc or libstdc++ has it is not known")
    return _greatest(glibc), _greatest(libstdcxx)


def needed_libraries(library: Path) -> tuple[str, ...]:
    """Names of the libraries that the dynamic loader opens with this one (``DT_NEEDED``), in its order.

    Raises
    ------
    BuildError
        When it is no ELF file.
    """
    with open(library, "rb") as file:
        section = _open(library, file).get_section_by_name(".dynamic")
        tags = section.iter_tags("DT_NEEDED") if isinstance(section, DynamicSection) else ()
        # The tag's name is an attribute that elftools sets by its kind, so its type says nothing of it.
        return tuple(str(getattr(tag, "needed")) for tag in tags)  # noqa: B009


def _open(library: Path, file: IO[bytes]) -> ELFFile:
    try:
        return ELFFile(file)
    except ELFError as error:
        raise BuildError(f"{library}: not an ELF file ({error})") from error


def _needed_versions(library: Path) -> Iterator[str]:
    """Symbol versions that the library needs of others, such as ``GLIBC_2.34``."""
    with open(library, "rb") as file:
        section = _open(library, file).get_section_by_name(".gnu.version_r")
        if isinstance(section, GNUVerNeedSection):
            for _needed, versions in section.iter_versions():
                for version in versions:
                    yield version.name


def _glibcxx_of_cxxabi(library: Path, version: str) -> str:
    try:
        return _GLIBCXX_OF_CXXABI[version]
    except KeyError:
        raise BuildError(
            f"{library}: needs CXXABI_{version}, and which libstdc++ has it is not known: "
            "build with an older compiler (set CXX)"
        ) from None


def _greatest(versions: list[str]) -> str:
    return max(versions, key=lambda version: tuple(map(int, version.split("."))), default="")
