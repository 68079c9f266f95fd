"""What ``tilemla doctor`` looks at: each probe yields what it finds, good or bad, and changes nothing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tilemla import __version__, env, host
from tilemla.cli.output import format_size, tree_size
from tilemla.errors import ModuleNotBuiltError, ToolchainError
from tilemla.select import arch_of
from tilemla.spec import ARCHS, PRESETS, TESTED_ARCHS, KernelSpec

State = Literal["ok", "note", "problem"]
# A set of modules is some MB, and generating one needs room for what the compilers leave meanwhile.
_LITTLE_SPACE_BYTES = 100 << 20


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found about one thing.

    Parameters
    ----------
    topic : str
        What was looked at.
    state : str
        ``"ok"``, ``"note"`` for what is worth knowing, ``"problem"`` for what keeps the preset from being served.
    text : str
        What was found.
    mend : str
        Commands that mend it, one a line; empty when there is nothing to mend, or no command that does.
    """

    topic: str
    state: State
    text: str
    mend: str = ""


def _requirements(extra: str) -> Iterator[tuple[str, str]]:
    """(distribution, versions) that tilemla asks for: always, or for an extra."""
    for line in importlib.metadata.requires("tilemla") or ():
        wanted, _, marker = line.partition(";")
        match = re.match(r"\s*([\w.-]+)\s*(?:\[[^]]*\])?\s*\(?([^()]*)\)?", wanted)
        of_extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", marker)
        if match and match[1] != "tilemla" and (of_extra[1] if of_extra else "") == extra:
            yield match[1], match[2].strip()


def _fits(version: str, versions: str) -> bool:
    """Whether a version is in a range such as ``">=0.1.11,<0.1.13"``, by its numbers."""
    here = host.version_numbers(version)
    checks = {
        "==": lambda bound: here == bound,
        "!=": lambda bound: here != bound,
        ">=": lambda bound: here >= bound,
        "<=": lambda bound: here <= bound,
        "<": lambda bound: here < bound,
        ">": lambda bound: here > bound,
    }
    bounds = re.findall(r"([=!<>]=|[<>])\s*([\w.+!-]+)", versions)
    return all(checks[operator](host.version_numbers(bound)) for operator, bound in bounds)


def _why_unfit(name: str, versions: str) -> tuple[str, str | None]:
    """The version of a distribution, and what is wrong with it."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "", "not installed"
    return version, None if _fits(version, versions) else f"{version} is here, {versions} is needed"


def probe_packages(*, needs_gpu: bool) -> Iterator[Finding]:
    """Python, and whether what tilemla asks for is installed, in versions that fit."""
    yield Finding("python", "ok", f"{sys.version.split()[0]} ({sys.executable})")
    yield Finding("tilemla", "ok", f"{__version__} ({Path(__file__).resolve().parent.parent})")
    for name, versions in _requirements(""):
        version, reason = _why_unfit(name, versions)
        if reason is not None:
            yield Finding(name, "problem", reason, f"pip install '{name}{versions}'")
        elif name == "torch" and needs_gpu and version.endswith("+cpu"):
            yield Finding(
                name, "problem", f"{version} cannot use the GPU", "pip uninstall -y torch && pip install torch"
            )
        else:
            yield Finding(name, "ok", f"{version} ({versions})" if versions else version)
    checked = {name: _why_unfit(name, versions) for name, versions in _requirements("codegen")}
    unfit = [f"{name}: {reason}" for name, (_, reason) in checked.items() if reason is not None]
    if unfit:
        text = f"cannot generate modules: {'; '.join(unfit)}"
        yield Finding("tilemla[codegen]", "note", text, "pip install 'tilemla[codegen]'")
    else:
        yield Finding(
            "tilemla[codegen]", "ok", ", ".join(f"{name} {version}" for name, (version, _) in checked.items())
        )


def probe_gpus(gpus: list[host.Gpu]) -> Iterator[Finding]:
    """The driver and the GPUs, which are put into ``gpus``."""
    version = host.driver_version()
    if version:
        yield Finding("driver", "ok", f"for CUDA {version}")
    else:
        yield Finding("driver", "note", "no NVIDIA driver (libcuda.so.1): tensors on the CPU only")
    try:
        gpus += host.list_gpus()
    except host.DriverError as error:
        yield Finding("GPUs", "problem", str(error), "nvidia-smi  # tells more; a new driver wants a restart")
        return
    if version and not gpus:
        yield Finding("GPUs", "note", "none is visible; CUDA_VISIBLE_DEVICES or the container's settings may hide them")
    for index, gpu in enumerate(gpus):
        arch = arch_of("cuda", gpu.capability)
        capability = ".".join(map(str, gpu.capability))
        text = f"{gpu.name}, compute capability {capability}, {gpu.sms} SMs, {format_size(gpu.memory_bytes)}: "
        text += f"{arch} modules" if arch else "there are no kernels for it, tensors there are refused"
        text += "" if arch is None or arch in TESTED_ARCHS else ", which are untested on hardware"
        yield Finding(f"GPU {index}", "ok" if arch else "note", text)


def probe_compilers() -> Iterator[Finding]:
    """What generates modules. A machine that serves built ones needs none of it."""
    from tilemla import toolchain
    from tilemla.store import why_cannot_generate

    try:
        cxx = toolchain.find_cxx()
        yield Finding("C++", "ok", f"{cxx} ({toolchain.tool_version(cxx)})")
    except ToolchainError as error:
        yield Finding("C++", "note", str(error), "apt-get install g++  # or as your distribution has it")
    try:
        toolkit = toolchain.find_cuda_toolkit()
        for tool in (toolkit.nvcc, toolkit.ptxas):
            yield Finding(tool.name, "ok", f"{tool} ({toolchain.tool_version(tool)})")
    except ToolchainError as error:
        mend = "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl"
        yield Finding("nvcc", "note", str(error), mend)
    for archs in ([arch for arch in ARCHS if arch != "cpu"], ["cpu"]):
        reason = why_cannot_generate(archs[0])
        text = "possible" if reason is None else f"not possible: {reason}"
        yield Finding(f"generating for {', '.join(archs)}", "ok" if reason is None else "note", text)


def probe_libraries() -> Iterator[Finding]:
    """What every module links to."""
    glibc, libstdcxx = host.glibc_version(), host.libstdcxx_version()
    yield Finding("glibc", "ok" if glibc else "note", glibc or "the C library is another one; modules need glibc")
    if libstdcxx:
        yield Finding("libstdc++", "ok", f"GLIBCXX_{libstdcxx}")
    else:
        yield Finding("libstdc++", "note", "no libstdc++.so.6, which modules need", "apt-get install libstdc++6")


def _nearest(path: Path) -> Path:
    """The path itself or the first of its parents that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _why_cache_unusable() -> str | None:
    """Why no module can be put into the cache or taken from it."""
    from tilemla.store import check_private

    cache = env.cache_dir()
    try:
        check_private(cache)
    except ModuleNotBuiltError as error:
        return str(error)
    folder = _nearest(cache)
    if not folder.is_dir():
        return f"{folder} is not a directory; set TILEMLA_CACHE_DIR"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"this user cannot write to {folder}; set TILEMLA_CACHE_DIR"
    return None


def probe_cache() -> Iterator[Finding]:
    """The cache directory and who may write there."""
    cache = env.cache_dir()
    folder = _nearest(cache)
    if folder == cache:
        found = cache.stat()
        owner = "this user" if found.st_uid == os.geteuid() else f"user {found.st_uid}"
        yield Finding("path", "ok", f"{cache} (of {owner}, mode {found.st_mode & 0o7777:04o})")
        yield Finding("in use", "ok", format_size(tree_size(cache)))
    else:
        yield Finding("path", "ok", f"{cache}, which is made when it is needed")
    free_bytes = shutil.disk_usage(folder).free
    few = free_bytes < _LITTLE_SPACE_BYTES
    yield Finding("free", "note" if few else "ok", format_size(free_bytes), "tilemla clean --stale" if few else "")
    reason = _why_cache_unusable()
    if reason is None:
        yield Finding("access", "ok", "this user can write, others cannot")
    else:
        chmod = re.search(r"`(chmod [^`]+)`", reason)
        yield Finding("access", "note", reason, chmod[1] if chmod else "export TILEMLA_CACHE_DIR=$HOME/tilemla-cache")


def probe_environment() -> Iterator[Finding]:
    """The environment variables that are set, and whether they make sense."""
    wrong = {}
    for name, read in (("TILEMLA_BUILD", env.build_allowed), ("TILEMLA_LOG", env.log_level)):
        try:
            read()
        except ValueError as error:  # as in every call that needs a module
            wrong[name] = str(error)
    for name, value in env.in_force().items():
        if name == "TILEMLA_PRELOAD" and value.strip() and value.strip() not in PRESETS:
            wrong[name] = f"{name} must be one of {', '.join(PRESETS)}, got {value!r}"
        if name in wrong:
            yield Finding(name, "problem", wrong[name], f"unset {name}")
        else:
            yield Finding(name, "ok", value)
    if not env.in_force():
        yield Finding("TILEMLA_*", "ok", "none is set")
    for folder in env.module_path():
        if not folder.is_dir():
            yield Finding("TILEMLA_MODULE_PATH", "note", f"{folder} is not a directory: nothing is found there")
    for home in env.cuda_homes():
        yield Finding("CUDA_HOME, CUDA_PATH", "ok", str(home))
    if env.cxx():
        yield Finding("CXX", "ok", str(env.cxx()))


def probe_modules(
    specs: Sequence[KernelSpec], needed: set[str], gpu_archs: set[str], options: str
) -> Iterator[Finding]:
    """Which module a call would take for each spec.

    Parameters
    ----------
    specs : sequence of KernelSpec
        What to look for.
    needed : set of str
        Architectures whose modules must be there; the others are looked for too.
    gpu_archs : set of str
        Architectures that the GPUs run.
    options : str
        Of the ``tilemla build`` that builds the specs, with ``{arch}`` in place of the architecture.
    """
    for arch in sorted(needed - gpu_archs - {"cpu"}):
        yield Finding(arch, "problem", "no GPU here runs its modules")
    for spec in specs:
        try:
            finding = _probe_module(spec, options.format(arch=spec.arch), needed=spec.arch in needed)
        except (ModuleNotBuiltError, ToolchainError, OSError) as error:
            finding = Finding(spec.name, "problem", str(error))
        if finding.state == "problem" and spec.arch not in needed:
            finding = dataclasses.replace(finding, state="note", text=f"not needed here; {finding.text}")
        yield finding


def _probe_module(spec: KernelSpec, options: str, *, needed: bool) -> Finding:
    """What a call that needs this module would do; nothing is generated."""
    from tilemla.fingerprint import why_not_generated
    from tilemla.loader import find_module
    from tilemla.store import cache_store, why_cannot_generate

    found = find_module(spec)
    if found is not None:
        unmet = host.why_unmet(found.entry.manifest.requires)
        where = f"{found.entry.directory} ({found.location.label})"
        return (
            Finding(spec.name, "problem", f"{where} does not run: {unmet}")
            if unmet
            else Finding(spec.name, "ok", where)
        )
    if not needed:
        return Finding(spec.name, "note", "missing, and not needed here")
    mend = f"tilemla build {options}"
    if why_not_generated(spec.arch) is not None:
        mend += f" --wheel  # where a compiler is\npip install tilemla_modules_{spec.arch}-*.whl  # here"
    reason = why_cannot_generate(spec.arch) or _why_cache_unusable()
    if reason is not None:
        return Finding(spec.name, "problem", f"missing, and not generated on demand: {reason}", mend)
    return Finding(spec.name, "note", f"missing, the first call generates it into {cache_store(spec.arch)}", mend)
