"""Modules for GPUs that results were not compared on: what comes out of nvcc, and the same text run on an H100."""

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


def test_every_architecture_has_a_tile():
    from tilemla.dsl.decode_mma import TILES

    assert set(TILES) == set(ARCHS) - set(TESTED_ARCHS)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("sm_80", "bfloat16"),
        pytest.param("sm_89", "float16", marks=slow),
        pytest.param("sm_100", "bfloat16", marks=slow),
        ("sm_120", "float16"),
    ],
)
def test_module(arch, dtype, tmp_path):
    entry = build_module(KernelSpec(arch=arch, dtype=dtype), tmp_path)
    ptx = text_of(entry, "mla_decode.ptx")
    for text in (ptx, text_of(entry, "get_mla_metadata.ptx")):
        assert re.search(rf"^\.target {arch}\s*$", text, re.MULTILINE)
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" in ptx
    assert "cp.async.cg.shared.global" in ptx
    # what these chips lack, or what is specific to one of them
    assert not re.search(r"wgmma|tcgen05|cp\.async\.bulk|griddepcontrol|setmaxnreg", ptx)
    # rows of q and of the cache are read 16 bytes at a time, whatever their strides
    assert text_of(entry, "launcher").count(".expect_aligned_rows(8)") == 2
    decode_kernel, combine_kernel = (kernel for kernel in entry.manifest.kernels if kernel.program == "mla_decode")
    assert MAX_SMEM_BYTES[arch] // 2 < decode_kernel.smem_bytes <= MAX_SMEM_BYTES[arch]
    for kernel in (decode_kernel, combine_kernel):
        assert (kernel.spill_store_bytes, kernel.spill_load_bytes, kernel.stack_bytes) == (0, 0, 0)
        assert kernel.registers * kernel.threads <= 65536
    assert all(callable(function) for function in open_module(entry).functions.values())


@pytest.fixture(scope="module", params=[arch for arch in ARCHS if arch not in TESTED_ARCHS])
def on_sm90(request, tmp_path_factory):
    """The module of another architecture, its text lowered and compiled for compute capability 9.0."""
    spec = KernelSpec(arch=request.param)
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
    ],
    ids=str,
)
@pytest.mark.parametrize("num_sm_parts", [1, 8, 40])
def test_text_on_hopper(on_sm90, case, num_sm_parts, monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setitem(launch._kernels, (device, case.dtype, 576, 512, 64), on_sm90)
    inputs = make_inputs(case).to(device)
    result = decode(inputs, causal=case.causal, num_sm_parts=num_sm_parts)
    check_result(result.out, result.lse, reference_of(inputs, causal=case.causal))
    again = decode(inputs, causal=case.causal, num_sm_parts=num_sm_parts)
    assert torch.equal(result.out, again.out) and torch.equal(result.lse, again.lse)
