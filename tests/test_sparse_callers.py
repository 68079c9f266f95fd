"""Calls with indices as the callers of FlashMLA make them."""

import shutil
import sys

import pytest
import torch

import tilemla
from reference import check_result, chosen_reference
from sparse_cases import List, SparseCase, decode_sparse, make_sparse_inputs, require_kernel, sparse_reference
from tilemla import launch, loader
from tilemla.loader import ensure_module
from tilemla.spec import KernelSpec

# What a server has: pages of 64, as many heads as a GPU of eight gets.
CASE = SparseCase(batch_size=3, seq_len_q=2, num_heads_q=16, main=List(topk=192, num_pages=6, page_block_size=64))


@pytest.fixture
def inputs(device):
    require_kernel(device, "mla_sparse_decode", CASE.kv_format)
    return make_sparse_inputs(CASE).to(device)


def test_vllm(inputs):
    """A plan from a call with arguments, num_splits left out, bytes with a dimension added, a table of nothing."""
    device = inputs.q.device
    lengths = torch.tensor([1000, 5, 300], dtype=torch.int32, device=device)
    scheduler_metadata, num_splits = tilemla.get_mla_metadata(
        cache_seqlens=lengths,
        num_q_tokens_per_head_k=2 * 16,
        topk=192,
        num_heads_q=16,
        num_heads_k=1,
        is_fp8_kvcache=True,
    )
    pages = inputs.main.k_cache.view(torch.uint8).squeeze(2)
    for splits in (num_splits, None):
        out, lse = tilemla.flash_mla_with_kvcache(
            q=inputs.q,
            k_cache=pages.unsqueeze(-2),
            block_table=torch.empty((3, 1), dtype=torch.int32, device=device),
            head_dim_v=512,
            cache_seqlens=lengths,
            tile_scheduler_metadata=scheduler_metadata,
            num_splits=splits,
            is_fp8_kvcache=True,
            indices=inputs.main.indices,
            softmax_scale=576**-0.5,
        )
        check_result(out, lse, sparse_reference(CASE, inputs))


def test_vllm_assigns_what_it_kept(inputs):
    device = inputs.q.device
    lengths = torch.ones(3, dtype=torch.int32, device=device)
    kept = tilemla.get_mla_metadata(lengths, 2 * 16, 1, 16, True, 192)
    sched_meta, _ = tilemla.get_mla_metadata()
    sched_meta.tile_scheduler_metadata, sched_meta.num_splits = kept
    inputs.main.lengths = torch.tensor([192, 3, 0], dtype=torch.int32, device=device)
    out, lse = tilemla.flash_mla_with_kvcache(
        inputs.q,
        inputs.main.k_cache,
        None,
        None,
        512,
        sched_meta,
        None,
        None,
        False,
        True,
        inputs.main.indices,
        topk_length=inputs.main.lengths,
    )
    check_result(out, lse, sparse_reference(CASE, inputs))
    assert sched_meta.tile_scheduler_metadata is kept[0]


def test_sglang(inputs):
    """A plan copied into buffers made for a larger batch, a cache viewed as pages, a table without columns."""
    device = inputs.q.device
    lengths = torch.tensor([700, 1, 64], dtype=torch.int32, device=device)
    planned = tilemla.get_mla_metadata(lengths, 2 * 16, 1, num_heads_q=16, is_fp8_kvcache=True, topk=192)
    metadata = torch.full((132, 8), 77, dtype=torch.int32, device=device)
    splits = torch.full((65,), 77, dtype=torch.int32, device=device)
    metadata[: len(planned[0])].copy_(planned[0])
    splits[:4].copy_(planned[1])
    out, lse = tilemla.flash_mla_with_kvcache(
        q=inputs.q,
        k_cache=inputs.main.k_cache.reshape(-1, 656).view(-1, 64, 1, 656),
        block_table=torch.empty((3, 0), dtype=torch.int32, device=device),
        cache_seqlens=lengths,
        head_dim_v=512,
        tile_scheduler_metadata=metadata[: len(planned[0])],
        num_splits=splits[:4],
        softmax_scale=576**-0.5,
        is_fp8_kvcache=True,
        indices=inputs.main.indices,
    )
    check_result(out, lse, sparse_reference(CASE, inputs))


def test_sglang_prefill(device):
    """Over a cache of single tokens, with a table of them for each query."""
    require_kernel(device, "mla_sparse_prefill", "dense")
    cache = torch.randn((100, 1, 576), device=device).bfloat16()
    q = torch.randn((5, 32, 576), device=device).bfloat16()
    page_table_1 = torch.randint(-1, 100, (5, 64), dtype=torch.int32, device=device)
    out, max_logits, lse = tilemla.flash_mla_sparse_fwd(
        q=q, kv=cache, indices=page_table_1.unsqueeze(1), sm_scale=576**-0.5, d_v=512
    )
    reference, top = chosen_reference(q, [(cache[:, 0], page_table_1, None)])
    check_result(out, lse, reference)
    torch.testing.assert_close(max_logits.double(), top, rtol=1e-4, atol=1e-5)


def test_upstream_by_position_through_the_alias(inputs, monkeypatch):
    """As upstream's own tests of sparse decoding call it."""
    for name in ("flash_mla", "flash_mla.flash_mla_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    tilemla.alias_flash_mla()
    import flash_mla

    sink = torch.randn(16, device=inputs.q.device)
    metadata, nothing = flash_mla.get_mla_metadata()
    inputs.attn_sink = sink
    for _ in range(2):
        out, lse = flash_mla.flash_mla_with_kvcache(
            inputs.q,
            inputs.main.k_cache,
            None,
            None,
            512,
            metadata,
            nothing,
            576**-0.5,
            False,
            True,
            inputs.main.indices,
            sink,
            None,
            None,
            None,
            None,
        )
        check_result(out, lse, sparse_reference(CASE, inputs))


BYTES = KernelSpec(arch="cpu", kv_format="fp8_656", page_block_size=0, kernel="mla_sparse_decode")


@pytest.fixture(scope="module")
def built():
    """The folder of the module that these calls need."""
    return ensure_module(BYTES).entry.directory


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_one_module_serves_what_it_can_plan(built, serving_machine, inputs, monkeypatch, tmp_path):
    """Where nothing is generated and no module for dense decode is built."""
    shutil.copytree(built, tmp_path / "modules" / built.name)
    monkeypatch.setenv("TILEMLA_MODULE_PATH", str(tmp_path / "modules"))
    for owner, name in ((launch, "_kernels"), (launch, "_modules"), (launch, "_of_kind"), (loader, "_loaded")):
        monkeypatch.setattr(owner, name, {})
    lengths = torch.ones(3, dtype=torch.int32)
    expected = sparse_reference(CASE, inputs)
    for schedule in (tilemla.get_mla_metadata(lengths, 2 * 16, 1, 16, True, 192), tilemla.get_mla_metadata()):
        check_result(*decode_sparse(CASE, inputs, schedule), expected)
    check_result(*decode_sparse(CASE, inputs, (None, None), batch_invariant=True), expected)
    assert loader.loaded_specs() == (BYTES,)
    with pytest.raises(NotImplementedError, match="--kernel mla_decode --arch cpu --dtype bfloat16 --kv-format dense"):
        k_cache = torch.zeros((1, 64, 1, 576), dtype=torch.bfloat16)
        table = torch.zeros((3, 1), dtype=torch.int32)
        tilemla.flash_mla_with_kvcache(inputs.q, k_cache, table, lengths, 512, tilemla.get_mla_metadata()[0])


@pytest.mark.gpu
def test_cuda_graph(inputs):
    """Captured once; replayed with other queries, other indices and another cache."""
    if inputs.q.device.type == "cpu":
        pytest.skip("graphs are of a GPU")
    metadata, _ = tilemla.get_mla_metadata()

    def decode():
        return tilemla.flash_mla_with_kvcache(
            inputs.q, inputs.main.k_cache, None, None, 512, metadata, None, None, False, True, inputs.main.indices
        )

    decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode()
    other = make_sparse_inputs(SparseCase(**(vars(CASE) | dict(seed=5)))).to(inputs.q.device)
    inputs.q.copy_(other.q)
    inputs.main.indices.copy_(other.main.indices)
    inputs.main.k_cache.view(torch.uint8).copy_(other.main.k_cache.view(torch.uint8))
    graph.replay()
    torch.cuda.synchronize()
    check_result(out, lse, sparse_reference(CASE, other))
