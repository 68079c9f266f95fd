"""Build a module: spec or programs to a shared library, its manifest, and the sources kept beside it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tilelang.env
from tvm_ffi import libinfo

from tilemla.codegen.errors import BuildError
from tilemla.codegen.launcher import make_launcher
from tilemla.codegen.lower import MAX_SMEM_BYTES, LoweredProgram, lower_program
from tilemla.codegen.ptxas import check_ptxas, parse_ptxas
from tilemla.codegen.toolchain import find_cuda_toolkit, find_cxx, run_tool, tool_version
from tilemla.manifest import KernelReport, Manifest, manifest_path, sha256_of
from tilemla.source_key import source_key
from tilemla.spec import KernelSpec

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


def build_module(spec: KernelSpec, out_dir: str | Path, progress: Callable[[str], None] | None = None) -> Manifest:
    """Generate the module of a spec.

    Parameters
    ----------
    spec : KernelSpec
        What to build.
    out_dir : str or Path
        Where the module goes; made when missing.
    progress : callable, optional
        Told each step in a few words.

    Returns
    -------
    Manifest
        The manifest that was written beside the library.

    Raises
    ------
    BuildError
        On a spec without a program, a missing compiler, or a kernel that is not good enough.
    """
    reason = spec.why_invalid()
    if reason is not None:
        raise BuildError(f"there is no tile program for {spec.name}: {reason}")
    from tilemla.dsl import make_programs

    return build_programs(
        spec.name,
        make_programs(spec),
        spec.arch,
        out_dir,
        dtype=spec.dtype,
        spec=spec.to_dict(),
        progress=progress,
    )


def build_programs(
    name: str,
    programs: Mapping[str, Any],
    arch: str,
    out_dir: str | Path,
    *,
    dtype: str | None = None,
    spec: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Build a module of any tile programs.

    Parameters
    ----------
    name : str
        Stem of the module's files.
    programs : mapping of str to Program
        Exported name to program (``func``, ``pass_config``).
    arch : str
        ``"sm_90a"`` or ``"cpu"``.
    out_dir : str or Path
        Where the module goes; made when missing.
    dtype : str, optional
        Storage dtype, see `make_launcher`.
    spec : dict, optional
        Recorded in the manifest.
    progress : callable, optional
        Told each step in a few words.

    Returns
    -------
    Manifest
        The manifest that was written beside the library.

    Raises
    ------
    BuildError
        When a step fails; nothing is left behind in ``out_dir``.
    """
    if not programs:
        raise BuildError(f"{name}: a module needs at least one program")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    say = progress or (lambda _step: None)
    key = source_key()
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=out_dir) as folder:
        work = Path(folder)
        say("lowering")
        lowered = tuple(lower_program(program, source, arch) for program, source in programs.items())
        files: dict[str, str] = {}
        kernels: list[KernelReport] = []
        objects: list[str] = []
        for program in lowered:
            say(f"compiling {program.name}")
            if arch == "cpu":
                objects += _compile_cpu(name, program, work, files)
            else:
                kernels += _compile_cuda(name, program, work, files)
        say("linking")
        cubins = {program.name: files[f"{program.name}.cubin"] for program in lowered if arch != "cpu"}
        launcher = work / f"{name}_launcher.cc"
        text = make_launcher(lowered, cubins, dtype, _AVX2_SUFFIX if arch == "cpu" and _is_x86_64() else None)
        launcher.write_text(text, encoding="utf-8")
        files["launcher"] = launcher.name
        library = f"{name}.so"
        _link(launcher, objects, work, library, cuda=arch != "cpu")
        manifest = Manifest(
            name=name,
            spec=spec or {},
            library=library,
            sha256=sha256_of(work / library),
            source_key=key,
            programs=tuple(programs),
            files=files,
            kernels=tuple(kernels),
            tools=_tool_versions(cuda=arch != "cpu"),
        )
        _install(manifest, work, out_dir)
    return manifest


def _compile_cuda(name: str, program: LoweredProgram, work: Path, files: dict[str, str]) -> list[KernelReport]:
    toolkit = find_cuda_toolkit()
    stem = f"{name}.{program.name}"
    source, ptx, cubin = (f"{stem}.{suffix}" for suffix in ("cu", "ptx", "cubin"))
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
    source = f"{name}.{program.name}.cc"
    (work / source).write_text(program.source, encoding="utf-8")
    files[f"{program.name}.source"] = source
    command: list[str | Path] = [find_cxx(), *_CXX_FLAGS, *_CPU_FLAGS, f"-I{tilelang.env.TILELANG_TEMPLATE_PATH}"]
    variants: dict[str, list[str]] = {"": []}
    if _is_x86_64():
        renames = [f"-D{launch.name}={launch.name}{_AVX2_SUFFIX}" for launch in program.launches]
        variants[_AVX2_SUFFIX] = [*_AVX2_FLAGS, *renames]
    for suffix, flags in variants.items():
        run_tool([*command, *flags, "-c", source, "-o", f"{program.name}{suffix}.o"], work, f"{source}: C++ compiler")
    return [f"{program.name}{suffix}.o" for suffix in variants]


def _link(launcher: Path, objects: list[str], work: Path, library: str, *, cuda: bool) -> None:
    includes = [libinfo.find_include_path(), libinfo.find_dlpack_include_path()]
    if cuda:
        includes += map(str, find_cuda_toolkit().include_dirs)
    (work / "exports.map").write_text(_EXPORTS, encoding="utf-8")
    ffi_library = Path(libinfo.find_libtvm_ffi())
    compiler: list[str | Path] = [find_cxx(), *_CXX_FLAGS, *(f"-isystem{folder}" for folder in includes)]
    linker = [*_LINK_FLAGS, "-Wl,--version-script=exports.map", f"-L{ffi_library.parent}", "-ltvm_ffi", "-ldl"]
    run_tool([*compiler, launcher.name, *objects, *linker, "-o", library], work, f"{launcher.name}: C++ compiler")


def _tool_versions(*, cuda: bool) -> dict[str, str]:
    tools = {name: importlib.metadata.version(name) for name in ("tilelang", "apache-tvm-ffi")}
    tools |= {"python": platform.python_version(), "cxx": tool_version(find_cxx())}
    if cuda:
        toolkit = find_cuda_toolkit()
        tools |= {"nvcc": tool_version(toolkit.nvcc), "ptxas": tool_version(toolkit.ptxas)}
    return tools


def _install(manifest: Manifest, work: Path, out_dir: Path) -> None:
    """Move the finished files into place, the manifest last: a module without one is not there."""
    target = manifest_path(out_dir, manifest.name)
    staged = work / target.name
    staged.write_text(manifest.to_json(), encoding="utf-8")
    names = [*manifest.files.values(), manifest.library]
    for name in [*names, staged.name]:
        with open(work / name, "rb") as file:
            os.fsync(file.fileno())
    target.unlink(missing_ok=True)
    for name in names:
        (work / name).replace(out_dir / name)
    staged.replace(target)
    descriptor = os.open(out_dir, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
