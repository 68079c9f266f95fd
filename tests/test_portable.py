"""Modules for GPUs that results were not compared on: what comes out of nvcc, and the same text run on an H100."""

import dataclasses
import re

import pytest
import torch

from cases import Case, make_inputs
from kernel_calls import decode
from reference import check_result, reference_of
from test_lowering import missing_nvcc, text_of
from tilemla import launch
from tilemla.codegen.build import build_module, build_programs
from tilemla.codegen.lower import MAX_SMEM_BYTES
from tilemla.dsl import make_programs
from tilemla.launch import Kernels
from tilemla.loader import open_module
from tilemla.spec import ARCHS, TESTED_ARCHS, KernelSpec

pytestmark = pytest.mark.skipif(missing_nvcc() is not None, reason=f"needs nvcc: {missing_nvcc()}")

slow = pytest.mark.slow

UNTESTED_ARCHS = [arch for arch in ARCHS if arch not in TESTED_ARCHS]


def test_every_architecture_has_a_tile():
    from tilemla.dsl.decode_mma import TILES

    assert set(TILES) == set(UNTESTED_ARCHS)


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim_qk", "page_block_size"),
    [
        ("sm_80", "bfloat16", 576, 64),
        pytest.param("sm_80", "float16", 576, 1, marks=slow),
        pytest.param("sm_80", "float16", 512, 16, marks=slow),
        pytest.param("sm_89", "float16", 576, 64, marks=slow),
        pytest.param("sm_89", "bfloat16", 576, 16, marks=slow),
        pytest.param("sm_89", "bfloat16", 512, 1, marks=slow),
        pytest.param("sm_100", "bfloat16", 576, 64, marks=slow),
        pytest.param("sm_100", "float16", 576, 1, marks=slow),
        pytest.param("sm_100", "bfloat16", 512, 256, marks=slow),
        ("sm_120", "float16", 576, 64),
        pytest.param("sm_120", "bfloat16", 576, 16, marks=slow),
        ("sm_120", "bfloat16", 512, 1),
    ],
)
def test_module(arch, dtype, head_dim_qk, page_block_size, tmp_path):
    spec = KernelSpec(arch=arch, dtype=dtype, head_dim_qk=head_dim_qk, page_block_size=page_block_size)
    entry = build_module(spec, tmp_path)
    ptx = text_of(entry, "mla_decode.ptx")
    for text in (ptx, text_of(entry, "get_mla_metadata.ptx")):
        assert re.search(rf"^\.target {arch}\s*$", text, re.MULTILINE)
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" in ptx
    assert "cp.async.cg.shared.global" in ptx
    # what these chips lack, or what is specific to one of them
    assert not re.search(r"wgmma|tcgen05|cp\.async\.bulk|griddepcontrol|setmaxnreg", ptx)
    # rows of q and of the cache are read 16 bytes at a time, whatever their strides, by both decode programs
    assert text_of(entry, "launcher").count(".expect_aligned_rows(8)") == 4
    decode_kernel, combine_kernel = (kernel for kernel in entry.manifest.kernels if kernel.program == "mla_decode")
    assert MAX_SMEM_BYTES[arch] // 2 < decode_kernel.smem_bytes <= MAX_SMEM_BYTES[arch]
    for kernel in (decode_kernel, combine_kernel):
        assert (kernel.spill_store_bytes, kernel.spill_load_bytes, kernel.stack_bytes) == (0, 0, 0)
        assert kernel.registers * kernel.threads <= 65536
    assert all(callable(function) for function in open_module(entry).functions.values())


ON_SM90 = [
    *(KernelSpec(arch=arch) for arch in UNTESTED_ARCHS),
    KernelSpec(arch="sm_80", page_block_size=1, head_dim_qk=512),
    KernelSpec(arch="sm_120", page_block_size=256),
]


@pytest.fixture(scope="module", params=ON_SM90, ids=lambda spec: spec.name)
def on_sm90(request, tmp_path_factory):
    """The module of another architecture, its text lowered and compiled for compute capability 9.0."""
    spec = request.param
    entry = build_programs(spec.name, make_programs(spec), "sm_90", tmp_path_factory.mktemp("sm_90"))
    module = open_module(entry)
    return Kernels.of(spec, module, torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=(1, 0, 64, 65, 1000)),
        Case(lengths=(3, 700, 0, 129), seq_len_q=3, num_heads_q=24, causal=True),
        Case(lengths=(4000,), num_heads_q=128, seq_len_q=2, causal=True),
        Case(lengths=(31, 33, 320), num_heads_q=8, num_heads_k=2, q_std=10.0),
        Case(lengths=(2, 700, 0, 129), seq_len_q=3, num_heads_q=24, window=(100, 1), has_sink=True),
        Case(lengths=(1000, 64, 31), num_heads_q=8, num_heads_k=2, seq_len_q=5, window=(0, -1), has_sink=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_sm_parts", [1, 8, 40])
def test_text_on_hopper(on_sm90, case, num_sm_parts, monkeypatch):
    device, spec = torch.device("cuda", 0), on_sm90.spec
    case = dataclasses.replace(case, page_block_size=spec.page_block_size, head_dim_qk=spec.head_dim_qk)
    key = (device, case.dtype, spec.head_dim_qk, spec.head_dim_v, spec.page_block_size, "dense")
    monkeypatch.setitem(launch._kernels, key, on_sm90)
    inputs = make_inputs(case).to(device)
    options = dict(causal=case.causal, window=case.window)
    result = decode(inputs, num_sm_parts=num_sm_parts, **options)
    check_result(result.out, result.lse, reference_of(inputs, **options))
    again = decode(inputs, num_sm_parts=num_sm_parts, **options)
    assert torch.equal(result.out, again.out) and torch.equal(result.lse, again.lse)
