"""What the sm_90a kernel over e4m3 has that the CPU's has not: a ring of pages, values in registers, O transposed."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilemla
from cases import Case
from strategies import head_counts, lengths_of_request
from test_fp8 import check_e4m3, decode_e4m3, e4m3, reference, spread
from tilemla.interface import decode_checked
from tilemla.launch import kernels_for
from tilemla.options import Options

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
DESCALES = (0.5, 0.25)


def check(case, num_sm_parts=None, descales=DESCALES):
    inputs, (q, held) = e4m3(case, DEVICE, *descales)
    schedule = None if num_sm_parts is None else spread(case, num_sm_parts, DEVICE)
    out, lse = decode_e4m3(inputs, case, descales, schedule)
    check_e4m3(out, lse, reference(inputs, case, held, q))
    return out, lse


@st.composite
def large_cases(draw):
    num_heads_q, num_heads_k = draw(head_counts(384))
    seq_len_q = draw(st.sampled_from([count for count in (1, 2, 3, 4) if count * num_heads_q <= 600]))
    return Case(
        lengths=tuple(draw(st.lists(lengths_of_request(3000), min_size=1, max_size=9))),
        seq_len_q=seq_len_q,
        num_heads_q=num_heads_q,
        num_heads_k=num_heads_k,
        causal=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from((None, 0.1, 0.0))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@given(case=large_cases(), num_sm_parts=st.sampled_from((None, 1, 7, 132)))
@settings(max_examples=40)
def test_any_case(case, num_sm_parts):
    check(case, num_sm_parts)


@pytest.mark.parametrize("num_heads_q", [1, 15, 16, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("num_sm_parts", [1, 7])
def test_tiles_of_rows(num_heads_q, num_sm_parts):
    check(Case((200, 0, 130), 2, num_heads_q, causal=True), num_sm_parts)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 255, 256, 257, 320, 1000, 5000])
def test_blocks(length):
    """Turns of the ring, and last blocks of any length, with NaN behind them."""
    check(Case((length, length + 1, length), 1, 64), 5)


def test_requests_follow_each_other_in_one_part():
    case = Case((0, 64, 65, 0, 0, 1, 200, 128, 0), 2, 64, causal=True)
    for num_sm_parts in (1, 3):
        out, lse = check(case, num_sm_parts)
        assert not out[0].any() and torch.isposinf(lse[0]).all()


def test_results_are_the_same_bit_for_bit():
    case = Case((1000, 3000, 64, 777) * 8, 2, 128, causal=True)
    inputs, _ = e4m3(case, DEVICE, *DESCALES)
    expected = decode_e4m3(inputs, case, DESCALES)
    for _ in range(20):
        for one, other in zip(decode_e4m3(inputs, case, DESCALES), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_nan_that_is_seen(byte):
    """It is not taken for the number that its bits would be."""
    case = Case((130, 130), 1, 16)
    inputs, _ = e4m3(case, DEVICE, *DESCALES)
    inputs.k_cache.view(torch.uint8)[int(inputs.block_table[0, 2]), 1, 0, 300] = byte
    out, _ = decode_e4m3(inputs, case, DESCALES)
    assert out[0].isnan().all()
    assert torch.equal(out[1], decode_e4m3(inputs, case, DESCALES)[0][1]) and not out[1].isnan().any()


@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (63, -1), (64, 1), (130, 0)])
@pytest.mark.parametrize("has_sink", [False, True])
def test_windows_and_sinks(window, has_sink):
    """The program knows them, though no public function passes them on."""
    case = Case((300, 0, 64, 1000), 3, 48, window=window, has_sink=has_sink)
    inputs, (q, held) = e4m3(case, DEVICE, *DESCALES)
    out, lse = decode_checked(
        kernels_for(DEVICE, torch.bfloat16, 576, 512, 64, "dense_fp8"),
        inputs.q.view(torch.uint8),
        inputs.k_cache.view(torch.uint8),
        inputs.block_table,
        inputs.cache_seqlens,
        512,
        *tilemla.get_mla_metadata(),
        None,
        False,
        inputs.attn_sink,
        None,
        None,
        Options(window, math.log(2.0), has_sink),
        out_dtype=torch.bfloat16,
        scales=tuple(torch.tensor([value], device=DEVICE) for value in DESCALES),
    )
    check_e4m3(out, lse, reference(inputs, case, held, q))


@pytest.mark.parametrize("name", ["q", "k_cache"])
def test_a_stride_that_tma_cannot_take(name):
    inputs, _ = e4m3(Case((64,)), DEVICE, *DESCALES)
    tensor = getattr(inputs, name)
    wide = torch.zeros((*tensor.shape[:3], 584), dtype=torch.uint8, device=DEVICE)[..., :576]
    wide.copy_(tensor.view(torch.uint8))
    changed = dataclasses.replace(inputs, **{name: wide.view(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=f"{name} must have strides that are positive multiples of 16 elements"):
        decode_e4m3(changed, Case((64,)), DESCALES)
