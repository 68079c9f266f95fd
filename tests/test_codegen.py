"""Launchers, manifests and compilers, on small programs that need no GPU."""

import dataclasses

import pytest
import torch
import tvm_ffi

from small_programs import make_row_sum
from tilemla import __version__, fingerprint, toolchain
from tilemla.codegen import build, ptxas
from tilemla.codegen.build import build_programs
from tilemla.codegen.errors import BuildError
from tilemla.errors import ToolchainError
from tilemla.manifest import ManifestError, manifest_path, read_manifest, verify_library
from tilemla.spec import KernelSpec

PTXAS_REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'combine_kernel' for 'sm_90a'
ptxas info    : Function properties for combine_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 416 bytes cmem[0]
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ill formed \
pipeline stage in the function 'decode_kernel'
ptxas info    : Compiling entry function 'decode_kernel' for 'sm_90a'
ptxas info    : Function properties for decode_kernel
    48 bytes stack frame, 52 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 48 bytes cumulative stack size, 1024 bytes smem
"""


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def row_sum(request, tmp_path_factory):
    """(dtype, entry) of a CPU module."""
    folder = tmp_path_factory.mktemp("row_sum")
    entry = build_programs("row_sum", {"row_sum": make_row_sum(request.param)}, "cpu", folder, dtype=request.param)
    return getattr(torch, request.param), entry


def function_of(entry):
    return tvm_ffi.load_module(str(entry.library)).get_function("row_sum")


def good_arguments(dtype):
    wide = torch.randn((5, 40)).to(dtype)
    return [wide[:, :33], torch.arange(6, dtype=torch.int32), torch.full((5,), torch.nan), 0.5, 0]


def test_a_launcher_passes_shapes_strides_and_scalars(row_sum):
    dtype, entry = row_sum
    function = function_of(entry)
    for negate in (0, 1):
        arguments = good_arguments(dtype)
        arguments[-1] = negate
        function(*arguments)
        expected = (arguments[0].double().sum(1) + torch.arange(1, 6)) * (-0.5 if negate else 0.5)
        torch.testing.assert_close(arguments[2].double(), expected, atol=1e-5, rtol=1e-5)


def test_an_empty_batch_is_not_an_error(row_sum):
    dtype, entry = row_sum
    function = function_of(entry)
    function(torch.empty((0, 33), dtype=dtype), torch.zeros(1, dtype=torch.int32), torch.empty(0), 1.0, 0)


@pytest.mark.parametrize(
    ("index", "value", "error", "words"),
    [
        (0, lambda x: x[0], ValueError, ["x", "2 dimensions", "(33,)"]),
        (0, lambda x: x.float(), TypeError, ["x", "must have dtype", "float32"]),
        (0, lambda x: x.T.contiguous().T, ValueError, ["x", "stride[1] = 1", "(1, 5)"]),
        (0, lambda _: None, TypeError, ["x", "a tensor", "None"]),
        (1, lambda x: x[:5], ValueError, ["offsets", "shape[0] = 6", "b + 1", "(5,)"]),
        (1, lambda x: x.long(), TypeError, ["offsets", "int32", "int64"]),
        (2, lambda x: x[:4], ValueError, ["out", "shape[0] = 5", "x.shape[0]", "(4,)"]),
        (2, lambda x: x.repeat(2)[::2], ValueError, ["out", "stride[0] = 1", "(2,)"]),
        (3, lambda _: "half", TypeError, ["scale", "a number"]),
        (4, lambda _: 0.5, TypeError, ["negate", "an integer", "float"]),
        (4, lambda _: 1 << 40, ValueError, ["negate", "32 bits", str(1 << 40)]),
    ],
)
def test_a_bad_argument_is_named_with_what_was_expected_and_received(row_sum, index, value, error, words):
    dtype, entry = row_sum
    function = function_of(entry)
    arguments = good_arguments(dtype)
    arguments[index] = value(arguments[index])
    with pytest.raises(error) as caught:
        function(*arguments)
    for word in ["row_sum", *words]:
        assert word in str(caught.value)
    assert arguments[2] is None or bool(arguments[2].isnan().all()), "the kernel ran in spite of the error"


def test_a_missing_argument_is_refused(row_sum):
    dtype, entry = row_sum
    function = function_of(entry)
    with pytest.raises(TypeError, match="expected 5 arguments, got 4"):
        function(*good_arguments(dtype)[:4])


def test_a_manifest_survives_a_round_trip_and_describes_the_library(row_sum):
    _, (manifest, folder) = row_sum
    assert read_manifest(manifest_path(folder, "row_sum")) == manifest
    assert verify_library(manifest, folder) == folder / "row_sum.so"
    assert manifest.fingerprint == fingerprint.source_fingerprint()
    assert manifest.tilemla_version == __version__
    assert manifest.tools == fingerprint.tool_versions("cpu")
    assert {"tilelang", "apache-tvm-ffi"} < set(manifest.tools)
    assert manifest.requires.glibc.startswith("2.") and manifest.requires.libstdcxx.startswith("3.4")
    assert manifest.requires.driver == ""
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [manifest.library, "row_sum.json", *manifest.files.values()]
    )
    assert "T.prim_func" in (folder / manifest.files["row_sum.tir"]).read_text()


def test_an_entry_is_for_its_owner_to_write(row_sum):
    folder = row_sum[1].directory
    assert all(path.stat().st_mode & 0o022 == 0 for path in (folder, *folder.iterdir()))
    assert [path.name for path in folder.parent.iterdir()] == ["row_sum"], "work in progress was left"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 3}', '{"format": 99}', "not json"])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(ManifestError, match="m.json"):
        read_manifest(path)


def test_a_library_outside_the_directory_is_refused(row_sum):
    _, (manifest, folder) = row_sum
    with pytest.raises(ManifestError, match="plain file name"):
        verify_library(dataclasses.replace(manifest, library="../row_sum.so"), folder)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_build_leaves_the_old_module_alone(tmp_path, monkeypatch):
    build_programs("row_sum", {"row_sum": make_row_sum()}, "cpu", tmp_path)
    before = contents(tmp_path)

    def fail(*_arguments):
        raise BuildError("no")

    monkeypatch.setattr(build, "make_launcher", fail)
    with pytest.raises(BuildError, match="no"):
        build_programs("row_sum", {"row_sum": make_row_sum("bfloat16")}, "cpu", tmp_path)
    assert contents(tmp_path) == before


def test_the_same_sources_give_the_same_bytes_and_replace_what_is_there(tmp_path):
    first = build_programs("row_sum", {"row_sum": make_row_sum()}, "cpu", tmp_path)
    before = contents(tmp_path)
    first.library.write_bytes(b"something else")
    build_programs("row_sum", {"row_sum": make_row_sum()}, "cpu", tmp_path)
    assert contents(tmp_path) == before


def test_ptxas_reports_are_read():
    usages, losses = ptxas.parse_ptxas(PTXAS_REPORT)
    combine, decode = usages
    assert (combine.name, combine.registers, combine.stack_bytes, combine.smem_bytes) == ("combine_kernel", 40, 0, 0)
    assert (decode.name, decode.registers, decode.smem_bytes) == ("decode_kernel", 168, 1024)
    assert (decode.stack_bytes, decode.spill_store_bytes, decode.spill_load_bytes) == (48, 52, 60)
    assert len(losses) == 1
    assert "C7510" in losses[0]


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (PTXAS_REPORT, ["decode_kernel", "52 bytes stored", "60 loaded", "48 bytes", "C7510"]),
        ("ptxas info : (C7512) Potential Performance Loss: wgmma.mma_async ... in 'f'", ["C7512"]),
        ("ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored", ["C7508"]),
        ("ptxas warning : (C7602) something", ["C7602"]),
    ],
)
def test_a_kernel_that_is_not_good_enough_fails_the_build(report, words):
    with pytest.raises(BuildError) as caught:
        ptxas.check_ptxas("module", *ptxas.parse_ptxas(report))
    for word in words:
        assert word in str(caught.value)


def test_a_missing_compiler_says_what_to_do(monkeypatch):
    monkeypatch.setattr(toolchain, "_toolkit_candidates", lambda: iter(()))
    monkeypatch.setattr(toolchain.shutil, "which", lambda _name: None)
    with pytest.raises(ToolchainError, match=r"CUDA_HOME.*nvidia-cuda-nvcc"):
        toolchain.find_cuda_toolkit.__wrapped__()
    with pytest.raises(ToolchainError, match=r"g\+\+.*CXX"):
        toolchain.find_cxx.__wrapped__()


def test_an_incomplete_toolkit_says_what_is_missing(tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(toolchain, "_toolkit_candidates", lambda: iter([(nvcc, ())]))
    with pytest.raises(ToolchainError, match=r"no nvcc was found.*has no ptxas beside it"):
        toolchain.find_cuda_toolkit.__wrapped__()
    (tmp_path / "bin" / "ptxas").touch()
    with pytest.raises(ToolchainError, match=r"has no cuda\.h in"):
        toolchain.find_cuda_toolkit.__wrapped__()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda.h").touch()
    assert toolchain.find_cuda_toolkit.__wrapped__().include_dirs == (tmp_path / "include",)


def test_a_spec_without_a_program_is_refused(tmp_path):
    with pytest.raises(BuildError, match="page_block_size must be one of 1, .*, got 48"):
        build.build_module(KernelSpec(page_block_size=48), tmp_path)
