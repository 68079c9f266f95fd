"""Find a disassembler of CUDA machine code and run it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tilemla import env
from tilemla.errors import ToolchainError
from tilemla.toolchain import find_cuda_toolkit, run_tool

# The first that is there is taken.
_OPTIONS = {"nvdisasm": ("-c",), "cuobjdump": ("-sass",)}
_SYSTEM_TOOLKIT = Path("/usr/local/cuda")


def disassemble(cubin: Path) -> str:
    """The machine code (SASS) of a cubin as text.

    Parameters
    ----------
    cubin : Path
        What ``ptxas`` wrote.

    Raises
    ------
    ToolchainError
        When there is no disassembler, with what to install, or when it fails, with what it printed.
    """
    tool, options = find_disassembler()
    return run_tool([tool, *options, cubin], cubin.parent, f"{cubin.name}: {tool.name}")


def find_disassembler() -> tuple[Path, tuple[str, ...]]:
    """``nvdisasm``, else ``cuobjdump``: from the CUDA toolkit that builds modules, ``PATH``, or NVIDIA's wheels.

    Returns
    -------
    (Path, tuple of str)
        The program, and its options.

    Raises
    ------
    ToolchainError
        When there is none; says what to install.
    """
    folders = [*_toolkit_folders(), *_wheel_folders()]
    for name, options in _OPTIONS.items():
        found = shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)
        if found:
            return Path(found), options
    raise ToolchainError(
        f"no {' and no '.join(_OPTIONS)} was found, one of which prints machine code: `pip install "
        "nvidia-cuda-nvdisasm`, or set CUDA_HOME to a CUDA toolkit that has one, or put one on PATH"
    )


def _toolkit_folders() -> Iterator[Path]:
    for home in env.cuda_homes():
        yield home / "bin"
    try:
        yield find_cuda_toolkit().ptxas.parent
    except ToolchainError:
        pass  # reading a module needs no compiler
    yield _SYSTEM_TOOLKIT / "bin"


def _wheel_folders() -> Iterator[Path]:
    found = importlib.util.find_spec("nvidia")
    for location in (found.submodule_search_locations or ()) if found is not None else ():
        # CUDA 13: nvidia/cu13/bin; CUDA 12: nvidia/cuda_nvdisasm/bin.
        yield from sorted(Path(location).glob("*/bin"), reverse=True)
