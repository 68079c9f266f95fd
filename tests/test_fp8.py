"""Decode through a block table over fp8 caches: 656 bytes a token, and e4m3 with one scale; against float64."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilemla
from cases import Case, make_inputs
from reference import check_result, decode_reference
from schedules import spread_schedule
from sparse_cases import require_kernel
from strategies import head_counts, lengths_of_request, windows


def quantised(case, device):
    """Inputs with a cache of 656 bytes a token, NaN wherever nothing may be read, and what that cache holds."""
    require_kernel(device, "mla_decode", "fp8_656")
    inputs = make_inputs(case).to(device)
    k_cache = tilemla.quantize_k_cache(inputs.k_cache, "fp8_656")
    # A slot that is not used has no scale and no rope either: bytes of NaN.
    unused = inputs.k_cache.isnan().all(-1)
    k_cache.view(torch.uint8)[unused] = 0xFF
    held = tilemla.dequantize_k_cache(k_cache, "fp8_656", torch.float32)
    return dataclasses.replace(inputs, k_cache=k_cache), held


def decode(inputs, case, schedule=None, **options):
    return tilemla.flash_mla_with_kvcache(
        inputs.q,
        inputs.k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        512,
        *(schedule or tilemla.get_mla_metadata()),
        case.softmax_scale,
        case.causal,
        True,
        attn_sink=inputs.attn_sink,
        window_size=case.window,
        **options,
    )


def reference(inputs, case, k_cache, q=None):
    return decode_reference(
        inputs.q if q is None else q,
        k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        causal=case.causal,
        softmax_scale=case.softmax_scale,
        window_size=case.window,
        attn_sink=inputs.attn_sink,
    )


def spread(case, num_sm_parts, device):
    return tuple(torch.from_numpy(array).to(device) for array in spread_schedule(case.lengths, num_sm_parts))


@st.composite
def byte_cases(draw):
    num_heads_q, _ = draw(head_counts(40))
    seq_len_q = draw(st.sampled_from([count for count in (1, 2, 3) if count * num_heads_q <= 80]))
    return Case(
        lengths=tuple(draw(st.lists(lengths_of_request(400), min_size=1, max_size=4))),
        seq_len_q=seq_len_q,
        num_heads_q=num_heads_q,
        causal=draw(st.booleans()),
        window=draw(windows(400)),
        has_sink=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from((None, 0.1, 0.0))),
        q_std=draw(st.sampled_from((1.0, 8.0))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@given(case=byte_cases(), num_sm_parts=st.sampled_from((0, 1, 40)))
@settings(max_examples=40)
def test_any_cache_of_bytes(case, num_sm_parts):
    device = torch.device("cpu")
    inputs, held = quantised(case, device)
    # A schedule that knows of no window covers what lies before it, too.
    schedule = spread(case, num_sm_parts, device) if num_sm_parts else None
    check_result(*decode(inputs, case, schedule), reference(inputs, case, held))


BYTES = Case(lengths=(300, 0, 64, 130), seq_len_q=2, num_heads_q=20, causal=True)


def test_pages_of_bytes_may_lie_apart(device):
    inputs, held = quantised(BYTES, device)
    apart = torch.full((len(inputs.k_cache), 64 * 656 + 48), 255, dtype=torch.uint8, device=device)
    moved = apart[:, : 64 * 656].view(-1, 64, 1, 656)
    moved.copy_(inputs.k_cache.view(torch.uint8))
    for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        result = decode(dataclasses.replace(inputs, k_cache=moved.view(dtype)), BYTES)
        check_result(*result, reference(inputs, BYTES, held))


@pytest.mark.usefixtures("tuning_dir")
def test_plans_agree(device):
    """The first call plans as a plan with arguments does: as pays for FP8, and not as pays for 16 bits."""
    case = Case((640, 100) if device.type == "cpu" else (320, 300), 1, 64)  # of 8 parts, and of 132
    inputs, held = quantised(case, device)
    planned, _ = tilemla.get_mla_metadata()
    check_result(*decode(inputs, case, (planned, None)), reference(inputs, case, held))
    metadata, splits = tilemla.get_mla_metadata(inputs.cache_seqlens, 64, 1, 64, True)
    assert torch.equal(planned.tile_scheduler_metadata, metadata) and torch.equal(planned.num_splits, splits)
    assert torch.equal(tilemla.get_mla_metadata_dense_fp8(inputs.cache_seqlens, 64, 1)[1], splits)
    assert not torch.equal(tilemla.get_mla_metadata(inputs.cache_seqlens, 64, 1)[1], splits)


def test_options_of_a_cache_of_bytes(device):
    inputs, _ = quantised(BYTES, device)
    expected = decode(inputs, BYTES)
    out, lse = torch.full_like(expected[0], math.nan), torch.full((4, 20, 2), math.nan, device=device)
    results = decode(inputs, BYTES, out=out, softmax_lse=lse, lse_base="2")
    assert results[0] is out and results[1] is lse and torch.equal(out, expected[0])
    torch.testing.assert_close(lse * math.log(2.0), expected[1])
    together = decode(inputs, BYTES, (None, None), batch_invariant=True)
    torch.testing.assert_close(together[0].float(), expected[0].float(), atol=2e-2, rtol=2e-2)


BAD_BYTES = {
    "q dtype": ("q", lambda x: x.half(), NotImplementedError, "q must be bfloat16, got float16"),
    "q head dim": ("q", lambda x: x[..., :512], NotImplementedError, "q must have head dim 576 .* indices are None"),
    "k_cache width": ("k_cache", lambda x: x[..., :576], ValueError, "k_cache must have 656 bytes a token"),
    "k_cache dtype": ("k_cache", lambda x: x.half(), TypeError, "k_cache must be one of float8_e4m3fn, uint8, int8"),
    "k_cache heads": ("k_cache", lambda x: x.expand(-1, -1, 2, -1), ValueError, "k_cache must have num_heads_k = 1"),
    "k_cache strided": ("k_cache", lambda x: x[:, ::2], ValueError, "k_cache must hold the bytes of a page one after"),
    "page": ("k_cache", lambda x: x.reshape(-1, 32, 1, 656), NotImplementedError, "page_block_size 64, got 32"),
    "block_table": ("block_table", lambda x: x.long(), TypeError, "block_table must be int32"),
    "no table": ("block_table", lambda x: None, TypeError, "block_table must be a torch.Tensor"),
    "page id": ("block_table", lambda x: x + 1000, ValueError, "block_table must hold page ids from 0"),
    "lengths": ("cache_seqlens", lambda x: x[:2], ValueError, "cache_seqlens must have batch_size = 4"),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_refusals_of_bytes(name):
    inputs, _ = quantised(BYTES, torch.device("cpu"))
    changed, change, error, message = BAD_BYTES[name]
    with pytest.raises(error, match=message):
        decode(dataclasses.replace(inputs, **{changed: change(getattr(inputs, changed))}), BYTES)


# e4m3 with one scale


def e4m3(case, device, descale_q, descale_k):
    """Inputs in e4m3, and what they stand for: queries and cache in float32."""
    require_kernel(device, "mla_decode", "dense_fp8")
    inputs = make_inputs(case).to(device)
    q = (inputs.q.float() / descale_q).clamp(-448, 448).to(torch.float8_e4m3fn)
    # Rounded on the way, values that were too large for the dtype would become NaN.
    k_cache = (inputs.k_cache.float() / descale_k).clamp(-448, 448).to(torch.float8_e4m3fn)
    held = q.float() * descale_q, k_cache.float() * descale_k
    return dataclasses.replace(inputs, q=q, k_cache=k_cache), held


def check_e4m3(out, lse, expected):
    """A GPU's tensor cores keep 14 bits of a sum of products of e4m3, each time that they add to it."""
    check_result(out, lse, expected, score_roundoff=2.0**-12 if out.is_cuda else 0.0)


def decode_e4m3(inputs, case, descales, schedule=None):
    device = inputs.q.device
    return tilemla.flash_mla_with_kvcache_fp8(
        inputs.q,
        inputs.k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        512,
        *(schedule or tilemla.get_mla_metadata()),
        case.softmax_scale,
        case.causal,
        *(None if value is None else torch.tensor([value], device=device) for value in descales),
    )


@st.composite
def e4m3_cases(draw):
    num_heads_q, num_heads_k = draw(head_counts(40))
    seq_len_q = draw(st.sampled_from([count for count in (1, 2, 3) if count * num_heads_q <= 80]))
    return Case(
        lengths=tuple(draw(st.lists(lengths_of_request(400), min_size=1, max_size=4))),
        seq_len_q=seq_len_q,
        num_heads_q=num_heads_q,
        num_heads_k=num_heads_k,
        causal=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from((None, 0.1, 0.0))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@given(
    case=e4m3_cases(),
    descale_q=st.sampled_from((1.0, 0.25, 3.7)),
    descale_k=st.sampled_from((1.0, 0.01, 1.3)),
    num_sm_parts=st.sampled_from((0, 1, 40)),
)
@settings(max_examples=40)
def test_any_cache_of_e4m3(case, descale_q, descale_k, num_sm_parts):
    device = torch.device("cpu")
    inputs, (q, held) = e4m3(case, device, descale_q, descale_k)
    schedule = spread(case, num_sm_parts, device) if num_sm_parts else None
    out, lse = decode_e4m3(inputs, case, (descale_q, descale_k), schedule)
    assert out.dtype == torch.bfloat16
    check_e4m3(out, lse, reference(inputs, case, held, q))


E4M3 = Case(lengths=(300, 0, 64, 130), seq_len_q=2, num_heads_q=20, causal=True)


def test_scales_are_1_by_default(device):
    inputs, (q, held) = e4m3(E4M3, device, 1.0, 1.0)
    out, lse = decode_e4m3(inputs, E4M3, (None, None))
    check_e4m3(out, lse, reference(inputs, E4M3, held, q))


@pytest.mark.parametrize("descales", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_scales_of_0(device, descales):
    """Every score is 0: the mean of the values, which are 0 themselves where the cache's scale is."""
    inputs, _ = e4m3(E4M3, device, 1.0, 1.0)
    out, lse = decode_e4m3(inputs, E4M3, descales)
    q, held = inputs.q.float() * descales[0], inputs.k_cache.float() * descales[1]
    check_e4m3(out, lse, reference(inputs, E4M3, held, q))
    assert out[0].any() == bool(descales[1])


@pytest.mark.usefixtures("tuning_dir")
def test_as_vllm_calls(device):
    inputs, (q, held) = e4m3(E4M3, device, 0.5, 0.25)
    schedule = tilemla.get_mla_metadata_dense_fp8(inputs.cache_seqlens, 2 * 20, 1)
    of_fp8 = tilemla.get_mla_metadata(inputs.cache_seqlens, 2 * 20, 1, is_fp8_kvcache=True)
    for one, other in zip(schedule, of_fp8, strict=True):
        assert torch.equal(one, other)
    out, lse = tilemla.flash_mla_with_kvcache_fp8(
        q=inputs.q,
        k_cache=inputs.k_cache,
        block_table=inputs.block_table,
        cache_seqlens=inputs.cache_seqlens,
        head_dim_v=512,
        tile_scheduler_metadata=schedule[0],
        num_splits=schedule[1],
        softmax_scale=576**-0.5,
        causal=True,
        descale_q=torch.tensor([0.5], device=device),
        descale_k=torch.tensor([0.25], device=device),
    )
    check_e4m3(out, lse, reference(inputs, E4M3, held, q))


BAD_E4M3 = {
    "q dtype": ("q", lambda x: x.to(torch.bfloat16), TypeError, "k_cache must be torch.bfloat16, as q, got a float8"),
    "k_cache dtype": ("k_cache", lambda x: x.view(torch.uint8), TypeError, "k_cache must be torch.float8_e4m3fn, as q"),
    "head dim": ("k_cache", lambda x: x[..., :512], ValueError, "k_cache must have head_dim_qk = 576, as q"),
    "page": ("k_cache", lambda x: x.reshape(-1, 32, 1, 576), NotImplementedError, "page_block_size 64, got 32"),
    "descale_q dtype": ("descale_q", lambda x: x.double(), TypeError, "descale_q must be float32, got a float64"),
    "descale_q rank": ("descale_q", lambda x: x[0], ValueError, "descale_q must have 1 dimensions"),
    "descale_k shape": (
        "descale_k",
        lambda x: x.repeat(2),
        ValueError,
        r"descale_k must have one element, shape \(1,\)",
    ),
    "descale_k device": ("descale_k", lambda x: x.to("meta"), ValueError, "descale_k must be on cpu, as q"),
    "descale_k float": ("descale_k", lambda x: 1.0, TypeError, "descale_k must be a torch.Tensor"),
}


@pytest.mark.parametrize("name", BAD_E4M3)
def test_refusals_of_e4m3(name):
    inputs, _ = e4m3(E4M3, torch.device("cpu"), 1.0, 1.0)
    arguments = dict(
        q=inputs.q,
        k_cache=inputs.k_cache,
        block_table=inputs.block_table,
        cache_seqlens=inputs.cache_seqlens,
        head_dim_v=512,
        tile_scheduler_metadata=tilemla.get_mla_metadata()[0],
        descale_q=torch.ones(1),
        descale_k=torch.ones(1),
    )
    changed, change, error, message = BAD_E4M3[name]
    with pytest.raises(error, match=message):
        tilemla.flash_mla_with_kvcache_fp8(**(arguments | {changed: change(arguments[changed])}))


def test_queries_of_another_dtype():
    inputs = make_inputs(E4M3)
    with pytest.raises(TypeError, match="q must be float8_e4m3fn, got a bfloat16"):
        decode_e4m3(inputs, E4M3, (None, None))
