"""What comes out of nvcc: TMA, wgmma, the right target, and no spills. No GPU is needed, nvcc is."""

import re

import pytest
import tvm_ffi
from elftools.elf.elffile import ELFFile

from small_programs import make_spilling, make_tma_wgmma, make_two_kernels
from tilemla.codegen.build import build_module, build_programs
from tilemla.codegen.errors import BuildError
from tilemla.codegen.lower import lower_program
from tilemla.dsl import make_programs
from tilemla.dsl.append import make_append_program_cuda
from tilemla.errors import ToolchainError
from tilemla.spec import BENCHMARK_SPECS, SUPPORTED_SPECS, KernelSpec, select_specs
from tilemla.toolchain import find_cuda_toolkit

SMEM_LIMIT_BYTES = 227 * 1024
CODE_LIMIT_BYTES = 128 * 1024  # what a multiprocessor holds of instructions


def missing_nvcc():
    try:
        find_cuda_toolkit()
    except ToolchainError as error:
        return str(error)
    return None


pytestmark = pytest.mark.skipif(missing_nvcc() is not None, reason=f"needs nvcc: {missing_nvcc()}")


@pytest.fixture(scope="module")
def tma_wgmma(tmp_path_factory):
    return build_programs("scores", {"scores": make_tma_wgmma()}, "sm_90a", tmp_path_factory.mktemp("tma_wgmma"))


def text_of(entry, role):
    return (entry.directory / entry.manifest.files[role]).read_text()


def code_bytes_of(entry, program):
    with (entry.directory / entry.manifest.files[f"{program}.cubin"]).open("rb") as file:
        sections = ELFFile(file).iter_sections("SHT_PROGBITS")
        return sum(section.data_size for section in sections if section.name.startswith(".text"))


def check_ptx(text):
    assert re.search(r"^\.target sm_90a\s*$", text, re.MULTILINE)


def test_the_ptx_holds_tma_and_wgmma(tma_wgmma):
    ptx = text_of(tma_wgmma, "scores.ptx")
    check_ptx(ptx)
    assert re.search(r"cp\.async\.bulk\.tensor\.3d\.shared::(cta|cluster)\.global\.mbarrier", ptx)
    assert "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16" in ptx
    source = text_of(tma_wgmma, "scores.source")
    assert "tma_load" in source
    assert "wgmma" in source
    assert "@T.prim_func" in text_of(tma_wgmma, "scores.tir")


def test_registers_and_shared_memory_are_reported(tma_wgmma):
    manifest = tma_wgmma.manifest
    (kernel,) = manifest.kernels
    assert (kernel.name, kernel.program) == ("scores_kernel", "scores")
    assert 32 < kernel.registers <= 255  # the product alone holds 32
    assert kernel.smem_dynamic_bytes == 2 * 64 * 128 * 2
    assert (kernel.spill_store_bytes, kernel.spill_load_bytes, kernel.stack_bytes) == (0, 0, 0)
    assert kernel.threads == 128
    assert "nvcc" in manifest.tools and "nvcc" in manifest.flags
    assert manifest.requires.driver == manifest.tools["nvcc"].partition(".")[0] + ".0"


def test_the_launcher_encodes_what_the_host_ir_says(tma_wgmma):
    launcher = text_of(tma_wgmma, "launcher")
    maps = re.findall(r"encode_tensor_map<3>\(driver, &m_(\w+)_desc", launcher)
    assert sorted(maps) == ["kcache", "q"]
    assert "strides_bytes[3] = {INT64_C(2), (v_q_stride_row * INT64_C(2)), (v_q_stride_b * INT64_C(2))}" in launcher


def test_a_cuda_module_opens_without_a_gpu_and_refuses_cpu_tensors(tma_wgmma):
    import torch

    function = tvm_ffi.load_module(str(tma_wgmma.library)).get_function("scores")
    q = torch.zeros((1, 64, 128), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"argument q must be on cuda:0, got cpu"):
        function(q, q, torch.zeros((1, 1), dtype=torch.int32), torch.zeros((1, 64, 64)), 1.0)


def test_a_spill_fails_the_build(tmp_path):
    with pytest.raises(BuildError, match=r"spill_kernel: spills of [1-9]\d* bytes stored and [1-9]\d* loaded"):
        build_programs("spilling", {"spill": make_spilling()}, "sm_90a", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("waits", [True, False])
def test_only_a_kernel_that_waits_is_launched_early(tmp_path, waits):
    entry = build_programs("two", {"two": make_two_kernels(waits)}, "sm_90a", tmp_path)
    assert [kernel.name for kernel in entry.manifest.kernels] == ["two_kernel", "two_kernel_1"]
    launcher = text_of(entry, "launcher")
    launches = re.findall(r"kernel\((\d)\).*?, (true|false),\s+params_\d\)", launcher, re.DOTALL)
    assert launches == [("0", "false"), ("1", "true" if waits else "false")]
    assert ("griddepcontrol.wait" in text_of(entry, "two.ptx")) == waits


PRESET_SPECS = select_specs(kernels=("mla_decode",), archs=("sm_90a",))
# Of what else there is, one whose page is a part of a block and that has no rope columns.
OTHER_SPEC = KernelSpec(head_dim_qk=512, page_block_size=16)
SLOW_SPECS = [
    pytest.param(spec, marks=pytest.mark.slow)
    for spec in SUPPORTED_SPECS
    if (spec.arch, spec.kernel) == ("sm_90a", "mla_decode") and spec not in (*PRESET_SPECS, OTHER_SPEC)
]


@pytest.mark.parametrize("spec", [*PRESET_SPECS, OTHER_SPEC, *SLOW_SPECS], ids=lambda spec: spec.name)
def test_every_sm_90a_module_is_tma_and_wgmma_without_a_spill(spec, tmp_path):
    entry = build_module(spec, tmp_path)
    ptx = text_of(entry, "mla_decode.ptx")
    check_ptx(ptx)
    check_ptx(text_of(entry, "get_mla_metadata.ptx"))
    assert re.search(r"cp\.async\.bulk\.tensor\.4d\.shared::(cta|cluster)\.global\.mbarrier", ptx)
    is_e4m3 = spec.kv_format == "dense_fp8"
    kind = "f16" if is_e4m3 else {"bfloat16": "bf16", "float16": "f16"}[spec.dtype]
    assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.{kind}\.{kind}", ptx)
    # Scores are products of the bytes, and values are widened on the way from ldmatrix to wgmma.
    for instruction in (
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    ):
        assert (instruction in ptx) == is_e4m3
    assert ("cvt.rn.f16x2.e4m3x2" in ptx) == (spec.kv_format != "dense")
    if is_e4m3:  # two boxes of an item, each with a map of its own
        maps = re.findall(r"encode_tensor_map<4>\(driver, &m_(\w+),", text_of(entry, "launcher"))
        assert len(set(maps[:5])) == 5 and sum(name.startswith("kcache") for name in maps[:5]) == 2
    assert entry.manifest.kernels
    for kernel in entry.manifest.kernels:
        assert (kernel.spill_store_bytes, kernel.spill_load_bytes, kernel.stack_bytes) == (0, 0, 0)
        assert 0 < kernel.registers <= 255
        assert kernel.smem_bytes <= SMEM_LIMIT_BYTES
    # The decode and the combine kernel stay where they are: a short call takes 8% longer when one evicts the other.
    # They do not yet over bytes that are converted, and where 64 pages of a token each make up a block.
    if spec.kv_format != "fp8_656" and spec.page_block_size > 1:
        for program in ("mla_decode", "mla_decode_plain"):
            assert 32 * 1024 < code_bytes_of(entry, program) < CODE_LIMIT_BYTES
    module = tvm_ffi.load_module(str(entry.library))
    for program in ("get_mla_metadata", "mla_decode"):
        assert module.get_function(program) is not None


# Of the modules for tokens that are named by index, those that DeepSeek-V3.2 needs.
SPARSE_BUILT = {("fp8_656", 576, "bfloat16"), ("dense", 576, "bfloat16")}
SPARSE_SPECS = [
    spec
    if (spec.kv_format, spec.head_dim_qk, spec.dtype) in SPARSE_BUILT
    else pytest.param(spec, marks=pytest.mark.slow)
    for spec in SUPPORTED_SPECS
    if spec.arch == "sm_90a" and spec.kernel.startswith("mla_sparse")
]


@pytest.mark.parametrize("spec", SPARSE_SPECS, ids=lambda spec: spec.name)
def test_every_sparse_sm_90a_module_gathers_and_multiplies_without_a_spill(spec, tmp_path):
    programs = {name: program for name, program in make_programs(spec).items() if name.startswith(spec.kernel)}
    is_fp8 = spec.kv_format != "dense"
    assert list(programs) == [spec.kernel, *(["mla_sparse_decode_paired"] if is_fp8 else [])]
    entry = build_programs(spec.name, programs, spec.arch, tmp_path, dtype=spec.dtype, spec=spec.to_dict())
    kind = {"bfloat16": "bf16", "float16": "f16"}[spec.dtype]
    for name in programs:
        ptx = text_of(entry, f"{name}.ptx")
        check_ptx(ptx)
        for columns in (64, 128):
            assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n{columns}k16\.f32\.{kind}\.{kind}", ptx)
        assert "cp.async.cg.shared.global" in ptx
        # A block's rows are converted where there is something to convert, and by a pair once for both.
        assert ("cvt.rn.f16x2.e4m3x2" in ptx) == is_fp8
        for instruction in ("cp.async.bulk.shared::cluster.shared::cta", "st.async.weak.shared::cluster"):
            assert (instruction in ptx) == name.endswith("paired")
    for kernel in entry.manifest.kernels:
        assert (kernel.spill_store_bytes, kernel.spill_load_bytes, kernel.stack_bytes) == (0, 0, 0)
        assert kernel.smem_bytes <= SMEM_LIMIT_BYTES
    # Warpgroups take turns where nothing is converted alone.
    shape = (512, 128) if is_fp8 else (384, 168)
    assert (entry.manifest.kernels[0].threads, entry.manifest.kernels[0].registers) == shape


def test_few_rows_over_bytes_are_multiplied_from_registers(tmp_path):
    spec = KernelSpec(kv_format="fp8_656")
    programs = {"mla_decode_narrow": make_programs(spec)["mla_decode_narrow"]}
    entry = build_programs("narrow", programs, "sm_90a", tmp_path, dtype="bfloat16", spec=spec.to_dict())
    ptx = text_of(entry, "mla_decode_narrow.ptx")
    check_ptx(ptx)
    # Pages come as they are; what is stored to shared memory is Q, P and outputs.
    assert "cp.async.bulk.shared::cluster.global.mbarrier" in ptx and "cp.async.bulk.tensor" not in ptx
    for kind in ("f16.f16", "bf16.bf16"):
        assert f"wgmma.mma_async.sync.aligned.m64n16k16.f32.{kind}" in ptx
    for instruction in ("ldmatrix.sync.aligned.m8n8.x4.trans", "stmatrix.sync.aligned.m8n8.x4.trans"):
        assert instruction in ptx
    kernel = entry.manifest.kernels[0]
    assert (kernel.spill_store_bytes, kernel.spill_load_bytes, kernel.stack_bytes) == (0, 0, 0)
    assert (kernel.threads, kernel.registers) == (384, 168) and kernel.smem_bytes <= SMEM_LIMIT_BYTES


@pytest.mark.parametrize(("kv_format", "head_dim_qk"), [("fp8_656", 576), ("fp8_584", 512)])
def test_appending_is_a_warp_for_a_tile(kv_format, head_dim_qk, tmp_path):
    spec = KernelSpec(kv_format=kv_format, head_dim_qk=head_dim_qk, page_block_size=0, kernel="mla_sparse_decode")
    programs = {"append_kv": make_append_program_cuda(spec)}
    entry = build_programs("append", programs, "sm_90a", tmp_path, dtype="bfloat16")
    [kernel] = entry.manifest.kernels
    assert (kernel.threads, kernel.spill_store_bytes, kernel.spill_load_bytes, kernel.stack_bytes) == (128, 0, 0, 0)
    ptx = text_of(entry, "append_kv.ptx")
    check_ptx(ptx)
    # The largest magnitude of a tile in five exchanges, once or unrolled; warps do not wait for each other.
    assert len(re.findall(r"shfl\.sync\.bfly", ptx)) in (5, 10) and "bar.sync" not in ptx


@pytest.mark.parametrize("spec", BENCHMARK_SPECS, ids=lambda spec: spec.name)
def test_reading_pages_is_tma_and_nothing_else(spec, tmp_path):
    entry = build_module(spec, tmp_path)
    assert entry.manifest.programs == ("read_pages",)
    [kernel] = entry.manifest.kernels
    assert (kernel.threads, kernel.spill_store_bytes, kernel.spill_load_bytes, kernel.stack_bytes) == (32, 0, 0, 0)
    # Three pages are in flight; two CTAs do not fit on an SM.
    assert kernel.smem_dynamic_bytes == 3 * 64 * 576 * 2
    ptx = text_of(entry, "read_pages.ptx")
    check_ptx(ptx)
    # All nine boxes of a page, each written once in the text.
    assert len(re.findall(r"cp\.async\.bulk\.tensor\.4d\.shared::(?:cta|cluster)\.global\.mbarrier", ptx)) == 9
    assert "wgmma" not in ptx and not re.search(r"\b(ld\.shared|st\.global|fma|ex2)\b", ptx)


def test_pages_are_read_through_the_tensor_map_of_decode():
    maps = []
    for kernel in ("read_pages", "mla_decode"):
        program = make_programs(KernelSpec(kernel=kernel))[kernel]
        lowered = lower_program(kernel, program, "sm_90a")
        [tensor_map] = (each for each in lowered.tensor_maps if each.data_name == "kcache")
        maps.append(str(tensor_map))
    assert "box=(64, 64, 1, 1)" in maps[0]
    assert maps[0] == maps[1]
