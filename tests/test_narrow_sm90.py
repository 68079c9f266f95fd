"""What the sm_90a program for few rows over 656 bytes a token has: pages in turn, P for each scale."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilemla
from cases import Case, make_inputs
from reference import check_result
from strategies import lengths_of_request, windows
from test_fp8 import decode, quantised, reference, spread
from tilemla.interface import decode_checked
from tilemla.launch import kernels_for
from tilemla.options import Options
from tilemla.spec import NARROW_ROWS

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)


def check(case, num_sm_parts=None):
    inputs, held = quantised(case, DEVICE)
    schedule = None if num_sm_parts is None else spread(case, num_sm_parts, DEVICE)
    out, lse = decode(inputs, case, schedule)
    check_result(out, lse, reference(inputs, case, held))
    return out, lse


@st.composite
def narrow_cases(draw):
    seq_len_q = draw(st.sampled_from((1, 1, 2, 3, 4)))
    return Case(
        lengths=tuple(draw(st.lists(lengths_of_request(3000), min_size=1, max_size=9))),
        seq_len_q=seq_len_q,
        num_heads_q=draw(st.integers(1, NARROW_ROWS // seq_len_q)),
        causal=draw(st.booleans()),
        window=draw(windows(3000)),
        has_sink=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from((None, 0.1, 0.0))),
        q_std=draw(st.sampled_from((1.0, 8.0))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@given(case=narrow_cases(), num_sm_parts=st.sampled_from((None, 1, 7, 132)))
@settings(max_examples=60)
def test_any_case(case, num_sm_parts):
    check(case, num_sm_parts)


def test_which_program_it_is():
    kernels = kernels_for(DEVICE, torch.bfloat16, 576, 512, 64, "fp8_656")
    assert kernels.mla_decode_narrow is not None


@pytest.mark.parametrize("num_heads_q", range(1, NARROW_ROWS + 2))
@pytest.mark.parametrize("num_sm_parts", [1, 7])
def test_rows(num_heads_q, num_sm_parts):
    check(Case((200, 0, 130), 1, num_heads_q, causal=True), num_sm_parts)


@pytest.mark.parametrize("seq_len_q", [2, 3, 4, 16])
def test_queries(seq_len_q):
    check(Case((200, 1, 130, 64), seq_len_q, NARROW_ROWS // seq_len_q, causal=True), 3)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 255, 256, 257, 320, 1000, 5000])
@pytest.mark.parametrize("num_sm_parts", [1, 5, 132])
def test_blocks(length, num_sm_parts):
    """Turns of the ring, and last blocks of any length, with NaN behind them."""
    check(Case((length, length + 1, length), 1, 16), num_sm_parts)


def test_requests_follow_each_other_in_one_part():
    case = Case((0, 64, 65, 0, 0, 1, 200, 128, 0), 2, 8, causal=True)
    for num_sm_parts in (1, 3):
        out, lse = check(case, num_sm_parts)
        assert not out[0].any() and torch.isposinf(lse[0]).all()


def test_results_are_the_same_bit_for_bit():
    case = Case((1000, 3000, 64, 777) * 40, 1, 16, causal=True)
    inputs, _ = quantised(case, DEVICE)
    expected = decode(inputs, case)
    for _ in range(20):
        for one, other in zip(decode(inputs, case), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("before", [(), (64,), (100, 64), (64, 1, 300)])
def test_what_came_before_in_a_part_changes_nothing(before):
    """Either warpgroup may have a request's first page."""
    last = Case((777,), 1, 16)
    inputs, _ = quantised(last, DEVICE)
    expected = decode(inputs, last, spread(last, 1, DEVICE))
    case = Case((*before, 777), 1, 16)
    together, _ = quantised(case, DEVICE)
    pages = 13
    k_cache = torch.cat([together.k_cache.view(torch.uint8), inputs.k_cache.view(torch.uint8)])
    table = together.block_table.clone()
    table[-1, :pages] = inputs.block_table[0, :pages] + len(together.k_cache)
    q = torch.cat([together.q[:-1], inputs.q])
    changed = dataclasses.replace(together, q=q, k_cache=k_cache, block_table=table)
    out, lse = decode(changed, case, spread(case, 1, DEVICE))
    assert torch.equal(out[-1], expected[0][0]) and torch.equal(lse[-1], expected[1][0])


def scales_of(inputs):
    return inputs.k_cache.view(torch.uint8)[..., 512:528].view(torch.float32)


@pytest.mark.parametrize("spread_of_scales", [1e-30, 1e-4, 1e4])
def test_odd_scales(spread_of_scales):
    """Of neighbouring tokens and pieces, and far from those that a quantised cache has."""
    case = Case((300, 64, 1000), 1, 16, softmax_scale=0.02)
    inputs, _ = quantised(case, DEVICE)
    scales = scales_of(inputs)
    generator = torch.Generator(device=DEVICE).manual_seed(3)
    factors = spread_of_scales ** torch.rand(scales.shape, generator=generator, device=DEVICE)
    if spread_of_scales > 1:
        factors = factors / spread_of_scales * 4
    scales.copy_(scales * factors)
    held = tilemla.dequantize_k_cache(inputs.k_cache, "fp8_656", torch.float32)
    check_result(*decode(inputs, case), reference(inputs, case, held))


@pytest.mark.parametrize("what", ["byte", "scale", "rope"])
def test_a_nan_that_is_seen(what):
    """It reaches every output of its request, and no other's."""
    case = Case((130, 130), 1, 16)
    inputs, _ = quantised(case, DEVICE)
    expected = decode(inputs, case)
    token = inputs.k_cache.view(torch.uint8)[int(inputs.block_table[0, 2]), 1, 0]
    if what == "byte":
        token[300] = 0x7F
    elif what == "scale":
        token[516:520] = 0xFF
    else:
        token[528:530] = 0xFF
    out, _ = decode(inputs, case)
    assert out[0].isnan().all()
    assert torch.equal(out[1], expected[0][1]) and not out[1].isnan().any()


@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (63, -1), (64, 1), (130, 0)])
@pytest.mark.parametrize("has_sink", [False, True])
def test_windows_and_sinks(window, has_sink):
    case = Case((300, 0, 64, 1000), 3, 5, window=window, has_sink=has_sink)
    for num_sm_parts in (1, 4):
        check(case, num_sm_parts)


@pytest.mark.parametrize("num_heads_k", [2, 3])
def test_several_kv_heads(num_heads_k):
    """The program knows them, though no public function does with this cache: tokens then do not follow each other."""
    case = Case((300, 0, 64, 1000), 1, 5 * num_heads_k, num_heads_k=num_heads_k)
    inputs = make_inputs(case).to(DEVICE)
    heads = [tilemla.quantize_k_cache(head.contiguous(), "fp8_656") for head in inputs.k_cache.split(1, 2)]
    for head in heads:
        head.view(torch.uint8)[inputs.k_cache.isnan().all(-1)[:, :, :1]] = 0xFF
    held = torch.cat([tilemla.dequantize_k_cache(head, "fp8_656", torch.float32) for head in heads], 2)
    out, lse = decode_checked(
        kernels_for(DEVICE, torch.bfloat16, 576, 512, 64, "fp8_656"),
        inputs.q,
        torch.cat([head.view(torch.uint8) for head in heads], 2),
        inputs.block_table,
        inputs.cache_seqlens,
        512,
        *tilemla.get_mla_metadata(),
        None,
        False,
        None,
        None,
        None,
        Options((-1, -1), math.log(2.0), False),
    )
    check_result(out, lse, reference(inputs, case, held))


def test_pages_and_tokens_that_lie_apart():
    case = Case((300, 0, 64, 130), 2, 8, causal=True)
    inputs, held = quantised(case, DEVICE)
    apart = torch.full((len(inputs.k_cache), 64 * 656 + 48), 255, dtype=torch.uint8, device=DEVICE)
    moved = apart[:, : 64 * 656].view(-1, 64, 1, 656)
    moved.copy_(inputs.k_cache.view(torch.uint8))
    check_result(*decode(dataclasses.replace(inputs, k_cache=moved), case), reference(inputs, case, held))
