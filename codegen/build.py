"""Build a module: spec or programs to a shared library, its manifest, and the sources kept beside it."""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tilelang.env
from tvm_ffi import libinfo

from tilemla import __version__
from tilemla.codegen.elf import requirements_of
from tilemla.codegen.errors import BuildError
from tilemla.codegen.launcher import make_launcher
from tilemla.codegen.lower import MAX_SMEM_BYTES, LoweredProgram, lower_program
from tilemla.codegen.ptxas import check_ptxas, parse_ptxas
from tilemla.config import DEFAULT_CONFIG, KernelConfig
from tilemla.fingerprint import source_fingerprint, tool_versions
from tilemla.manifest import KernelReport, Manifest, Requirements, manifest_path, sha256_of
from tilemla.spec import KernelSpec
from tilemla.store import Entry, building_prefix, entry_dir
from tilemla.toolchain import find_cuda_toolkit, find_cxx, run_tool

# A module exports its programs and needs libtvm_ffi, libc and libstdc++: nothing of CUDA, TileLang or torch.
_CXX_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections")
_LINK_FLAGS = ("-shared", "-s", "-Wl,-z,defs", "-Wl,-z,noexecstack", "-Wl,--gc-sections")
_EXPORTS = "{ global: __tvm_ffi_*; local: *; };\n"
# IEEE arithmetic stays: infinities and NaN carry meaning in the softmax.
_CPU_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-w")
# x86-64 modules hold each function twice, for any CPU and for those with AVX2; the launcher picks. The names of inline
# code are changed too: the linker merges equal names, and must not give AVX2 code to a CPU without it.
_AVX2_SUFFIX = "_avx2"
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-Dhalf_float=half_float_avx2", "-Dvec_type=vec_type_avx2")
_NVCC_FLAGS = ("-std=c++20", "-O3", "-w", "-Xcudafe", "--diag_suppress=177")


def build_module(
    spec: KernelSpec,
    store: str | Path,
    config: KernelConfig = DEFAULT_CONFIG,
    progress: Callable[[str], None] | None = None,
) -> Entry:
    """Generate the module of a spec as an entry of a store; replaces one that is there.

    Parameters
    ----------
    spec : KernelSpec
        What to build.
    store : str or Path
        The directory that gets the entry; made when missing.
    config : KernelConfig
        What the kernels are tuned by.
    progress : callable, optional
        Told each step in a few words.

    Returns
    -------
    Entry
        The module.

    Raises
    ------
    BuildError
        On a spec or configuration without a program, or a kernel that is not good enough.
    ToolchainError
        When a compiler is missing or fails.
    """
    reason = spec.why_invalid() or config.why_invalid(spec)
    if reason is not None:
        raise BuildError(f"there is no tile program for {spec.name}: {reason}")
    from tilemla.dsl import make_programs

    return build_programs(
        spec.name,
        make_programs(spec, config),
        spec.arch,
        store,
        dtype=spec.dtype,
        spec=spec.to_dict(),
        config=config.to_dict(),
        progress=progress,
    )


def build_programs(
    name: str,
    programs: Mapping[str, Any],
    arch: str,
    store: str | Path,
    *,
    dtype: str | None = None,
    spec: dict[str, Any] | None = None,
    config: dict[str, int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Entry:
    """Build a module of any tile programs.

    Parameters
    ----------
    name : str
        Stem of the module's files.
    programs : mapping of str to Program
        Exported name to program (``func``, ``pass_config``).
    arch : str
        ``"cpu"`` or a CUDA architecture, see `lower_program`.
    store : str or Path
        The directory that gets the entry; made when missing.
    dtype : str, optional
        Storage dtype, see `make_launcher`.
    spec, config : dict, optional
        Recorded in the manifest.
    progress : callable, optional
        Told each step in a few words.

    Returns
    -------
    Entry
        The module.

    Raises
    ------
    BuildError
        When a step fails; the store is as it was.
    ToolchainError
        When a compiler is missing or fails.
    """
    if not programs:
        raise BuildError(f"{name}: a module needs at least one program")
    store = Path(store)
    store.mkdir(parents=True, exist_ok=True)
    say = progress or (lambda _step: None)
    fingerprint = source_fingerprint()
    cuda = arch != "cpu"
    with tempfile.TemporaryDirectory(prefix=building_prefix(name), dir=store) as folder:
        work = Path(folder)
        say("lowering")
        lowered = tuple(lower_program(program, source, arch) for program, source in programs.items())
        files: dict[str, str] = {}
        kernels: list[KernelReport] = []
        objects: list[str] = []
        for program in lowered:
            say(f"compiling {program.name}")
            files[f"{program.name}.tir"] = f"{program.name}.tir"
            (work / files[f"{program.name}.tir"]).write_text(programs[program.name].func.script(), encoding="utf-8")
            if cuda:
                kernels += _compile_cuda(name, program, work, files)
            else:
                objects += _compile_cpu(name, program, work, files)
        say("linking")
        cubins = {program.name: files[f"{program.name}.cubin"] for program in lowered if cuda}
        launcher = work / "launcher.cc"
        text = make_launcher(lowered, cubins, dtype, None if cuda or not _is_x86_64() else _AVX2_SUFFIX)
        launcher.write_text(text, encoding="utf-8")
        files["launcher"] = launcher.name
        library = f"{name}.so"
        _link(launcher, objects, work, library, cuda=cuda)
        tools = tool_versions(arch)
        glibc, libstdcxx = requirements_of(work / library)
        manifest = Manifest(
            name=name,
            spec=spec or {},
            config=config or {},
            library=library,
            sha256=sha256_of(work / library),
            fingerprint=fingerprint,
            programs=tuple(programs),
            files=files,
            kernels=tuple(kernels),
            tools=tools,
            flags=_flags(lowered, cuda=cuda),
            requires=Requirements(glibc, libstdcxx, _least_driver(tools["nvcc"]) if cuda else ""),
            tilemla_version=__version__,
        )
        _install(manifest, work, entry_dir(store, name))
    return Entry(manifest, entry_dir(store, name))


def _flags(lowered: tuple[LoweredProgram, ...], *, cuda: bool) -> dict[str, list[str]]:
    flags = {"c++": [*_CXX_FLAGS, *(() if cuda else _CPU_FLAGS)], "linker": list(_LINK_FLAGS)}
    if cuda:
        flags["nvcc"] = list(_NVCC_FLAGS)
        flags |= {f"nvcc {program.name}": ["--use_fast_math"] for program in lowered if program.fast_math}
        flags |= {f"ptxas {program.name}": list(program.ptxas_flags) for program in lowered if program.ptxas_flags}
    elif _is_x86_64():
        flags["c++ avx2"] = list(_AVX2_FLAGS)
    return flags


def _least_driver(nvcc: str) -> str:
    """CUDA version that a driver must have at least: machine code runs on any driver of the toolkit's major version."""
    # https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
    return f"{nvcc.partition('.')[0]}.0"


def _compile_cuda(name: str, program: LoweredProgram, work: Path, files: dict[str, str]) -> list[KernelReport]:
    toolkit = find_cuda_toolkit()
    stem = f"{name}: {program.name}"
    source, ptx, cubin = (f"{program.name}.{suffix}" for suffix in ("cu", "ptx", "cubin"))
    (work / source).write_text(program.source, encoding="utf-8")
    includes = [f"-I{tilelang.env.TILELANG_TEMPLATE_PATH}", f"-I{tilelang.env.CUTLASS_INCLUDE_DIR}"]
    includes += [f"-I{folder}" for folder in toolkit.include_dirs]
    virtual = program.arch.replace("sm_", "compute_")
    fast_math = ["--use_fast_math"] if program.fast_math else []
    frontend: list[str | Path] = [toolkit.nvcc, *_NVCC_FLAGS, *fast_math, f"-arch={virtual}", "-ccbin", find_cxx()]
    run_tool([*frontend, *includes, "-ptx", source, "-o", ptx], work, f"{stem}: nvcc")
    report = run_tool(
        [toolkit.ptxas, "-v", f"-arch={program.arch}", *program.ptxas_flags, ptx, "-o", cubin], work, f"{stem}: ptxas"
    )
    files |= {f"{program.name}.source": source, f"{program.name}.ptx": ptx, f"{program.name}.cubin": cubin}
    usages, losses = parse_ptxas(report)
    check_ptxas(stem, usages, losses)
    return _kernel_reports(program, {usage.name: usage for usage in usages})


def _kernel_reports(program: LoweredProgram, usages: Mapping[str, Any]) -> list[KernelReport]:
    reports = []
    for launch in program.launches:
        usage = usages.get(launch.name)
        if usage is None:
            raise BuildError(f"{program.name}: ptxas reported nothing about the kernel {launch.name}")
        report = KernelReport(
            name=launch.name,
            program=program.name,
            registers=usage.registers,
            spill_store_bytes=usage.spill_store_bytes,
            spill_load_bytes=usage.spill_load_bytes,
            stack_bytes=usage.stack_bytes,
            smem_static_bytes=usage.smem_bytes,
            smem_dynamic_bytes=launch.dynamic_smem_bytes,
            threads=math.prod(int(extent) for extent in launch.block),
        )
        limit = MAX_SMEM_BYTES[program.arch]
        if report.smem_bytes > limit:
            raise BuildError(
                f"{program.name}: kernel {launch.name} needs {report.smem_bytes} bytes of shared memory, "
                f"more than the {limit} of {program.arch}"
            )
        reports.append(report)
    return reports


def _is_x86_64() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _compile_cpu(name: str, program: LoweredProgram, work: Path, files: dict[str, str]) -> list[str]:
    # The C that TileLang emits for this target includes C++ headers.
    source = f"{program.name}.cc"
    (work / source).write_text(program.source, encoding="utf-8")
    files[f"{program.name}.source"] = source
    command: list[str | Path] = [find_cxx(), *_CXX_FLAGS, *_CPU_FLAGS, f"-I{tilelang.env.TILELANG_TEMPLATE_PATH}"]
    variants: dict[str, list[str]] = {"": []}
    if _is_x86_64():
        renames = [f"-D{launch.name}={launch.name}{_AVX2_SUFFIX}" for launch in program.launches]
        variants[_AVX2_SUFFIX] = [*_AVX2_FLAGS, *renames]
    for suffix, flags in variants.items():
        run_tool(
            [*command, *flags, "-c", source, "-o", f"{program.name}{suffix}.o"], work, f"{name}: {source}: C++ compiler"
        )
    return [f"{program.name}{suffix}.o" for suffix in variants]


def _link(launcher: Path, objects: list[str], work: Path, library: str, *, cuda: bool) -> None:
    includes = [libinfo.find_include_path(), libinfo.find_dlpack_include_path()]
    if cuda:
        includes += map(str, find_cuda_toolkit().include_dirs)
    (work / "exports.map").write_text(_EXPORTS, encoding="utf-8")
    ffi_library = Path(libinfo.find_libtvm_ffi())
    compiler: list[str | Path] = [find_cxx(), *_CXX_FLAGS, *(f"-isystem{folder}" for folder in includes)]
    linker = [*_LINK_FLAGS, "-Wl,--version-script=exports.map", f"-L{ffi_library.parent}", "-ltvm_ffi", "-ldl"]
    run_tool([*compiler, launcher.name, *objects, *linker, "-o", library], work, f"{library}: C++ compiler")


def _install(manifest: Manifest, work: Path, target: Path) -> None:
    """Put the finished files where they belong by renaming their folder: an entry is there whole or not at all."""
    names = [*manifest.files.values(), manifest.library, manifest_path(work, manifest.name).name]
    with tempfile.TemporaryDirectory(prefix=building_prefix(manifest.name), dir=target.parent) as folder:
        made, replaced = Path(folder) / "made", Path(folder) / "replaced"
        made.mkdir(mode=0o755)
        manifest_path(work, manifest.name).write_text(manifest.to_json(), encoding="utf-8")
        for name in names:
            (work / name).chmod(0o755 if name == manifest.library else 0o644)
            (work / name).rename(made / name)
            _flush(made / name)
        _flush(made)
        if target.exists():
            target.rename(replaced)
        made.rename(target)
        _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
