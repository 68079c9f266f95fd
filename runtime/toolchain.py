"""Find the compilers and run them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from tilemla import env
from tilemla.errors import ToolchainError

_NO_NVCC = (
    "no nvcc was found, which GPU modules need: set CUDA_HOME to a CUDA toolkit (12.4 or later), put nvcc on PATH, "
    "or install the wheels nvidia-cuda-nvcc, nvidia-cuda-runtime and nvidia-cuda-cccl"
)
_NO_CXX = "no C++ compiler was found, which every module needs: install g++ or clang++, or set CXX"


@dataclasses.dataclass(frozen=True)
class CudaToolkit:
    """Where nvcc, ptxas and the CUDA headers are."""

    nvcc: Path
    ptxas: Path
    include_dirs: tuple[Path, ...]


def run_tool(command: Sequence[str | Path], cwd: Path, what: str) -> str:
    """Run a compiler and return what it printed, both streams together.

    Raises
    ------
    ToolchainError
        When it cannot be started or fails, with the command and its output.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise ToolchainError(f"{what}: {words[0]} cannot be started: {error}") from error
    if done.returncode != 0:
        raise ToolchainError(f"{what}: exit status {done.returncode} of: {' '.join(words)}\n{done.stdout.strip()}")
    return done.stdout


@functools.cache
def tool_version(tool: Path) -> str:
    """The line of ``tool --version`` that names the version."""
    lines = run_tool([tool, "--version"], Path.cwd(), f"{tool.name} --version").strip().splitlines()
    return next((line for line in lines if re.search(r"\bV\d+\.\d+", line)), lines[0] if lines else "unknown").strip()


def _site_packages() -> list[Path]:
    roots = {Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")}
    found = importlib.util.find_spec("nvidia")
    if found is not None and found.submodule_search_locations:
        roots |= {Path(location).parent for location in found.submodule_search_locations}
    return sorted(roots)


def _toolkit_candidates() -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """(nvcc, include folders), best first."""
    for home in env.cuda_homes():
        yield home / "bin" / "nvcc", ()
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path), ()
    yield Path("/usr/local/cuda/bin/nvcc"), ()
    for site in _site_packages():
        wheels = sorted((site / "nvidia").glob("cu[0-9]*"), reverse=True)
        for root in wheels:  # CUDA 13 wheels share one folder
            yield (
                root / "bin" / "nvcc",
                tuple(path for path in (root / "include", root / "include/cccl") if path.is_dir()),
            )
        root = site / "nvidia" / "cuda_nvcc"  # CUDA 12 wheels have one folder each
        includes = (root / "include", site / "nvidia/cuda_runtime/include", site / "nvidia/cuda_cccl/include")
        yield root / "bin" / "nvcc", tuple(path for path in includes if path.is_dir())


def _nvcc_top(nvcc: Path) -> Path | None:
    """The toolkit folder that nvcc itself reports; finds the real one behind a wrapper script."""
    try:
        text = run_tool([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], Path.cwd(), "nvcc --dryrun")
    except ToolchainError:
        return None
    match = re.search(r"^#\$ TOP=(.*)$", text, re.MULTILINE)
    return Path(match[1].strip()).resolve() if match else None


@functools.cache
def find_cuda_toolkit() -> CudaToolkit:
    """Find nvcc: ``$CUDA_HOME``, ``PATH``, ``/usr/local/cuda``, then the ``nvidia-cuda-nvcc`` wheel.

    Raises
    ------
    ToolchainError
        When there is none, or one without ``ptxas`` or ``cuda.h``; says what to do.
    """
    problems = []
    for nvcc, includes in _toolkit_candidates():
        if not nvcc.is_file() or not os.access(nvcc, os.X_OK):
            continue
        top = _nvcc_top(nvcc) or nvcc.parent.parent
        ptxas = next((path for path in (top / "bin/ptxas", nvcc.parent / "ptxas") if path.is_file()), None)
        include_dirs = includes or (top / "include",)
        if ptxas is None:
            problems.append(f"{nvcc} has no ptxas beside it")
        elif not any((folder / "cuda.h").is_file() for folder in include_dirs):
            problems.append(f"{nvcc} has no cuda.h in {', '.join(map(str, include_dirs)) or 'any include folder'}")
        else:
            return CudaToolkit(nvcc, ptxas, include_dirs)
    raise ToolchainError("; ".join([_NO_NVCC, *problems]))


@functools.cache
def find_cxx() -> Path:
    """Find the system's C++ compiler: ``$CXX``, else g++, c++ or clang++.

    Raises
    ------
    ToolchainError
        When there is none; says what to do.
    """
    for name in (env.cxx(), "g++", "c++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return Path(found)
    raise ToolchainError(_NO_CXX)
