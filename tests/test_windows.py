"""Sliding windows, attention sinks and the base of the log-sum-exp, as the kernels have them."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import Case, make_inputs
from kernel_calls import decode
from reference import check_result, reference_of
from tilemla.schedule import make_schedule

DTYPES = [torch.bfloat16, torch.float16]
CASE = Case(lengths=(700, 0, 64, 1, 1500), seq_len_q=3, num_heads_q=6, num_heads_k=2, seed=5)


def run(case, inputs, **options):
    return decode(inputs, causal=case.causal, softmax_scale=case.scale, window=case.window, **options)


def expect(case, inputs):
    return reference_of(inputs, causal=case.causal, softmax_scale=case.scale, window=case.window)


def same_bits(left, right):
    return torch.equal(left.view(torch.int16), right.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window", [(0, 0), (0, -1), (63, 1), (64, 0), (200, -1), (-1, 1), (100_000, 1), (2**30, 0)])
@pytest.mark.parametrize("num_sm_parts", [1, 40])
def test_window(device, dtype, causal, window, num_sm_parts):
    """What lies before the window is NaN, behind garbage in the block table, and the schedule knows nothing of it."""
    case = dataclasses.replace(CASE, dtype=dtype, causal=causal, window=window)
    inputs = make_inputs(case).to(device)
    result = run(case, inputs, num_sm_parts=num_sm_parts)
    check_result(result.out, result.lse, expect(case, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_of_more_queries_than_a_block_has_tokens(device, dtype):
    """Queries of one tile whose windows share no key."""
    case = Case(
        lengths=(500, 130, 3), seq_len_q=150, num_heads_q=2, causal=True, dtype=dtype, window=(20, -1), has_sink=True
    )
    inputs = make_inputs(case).to(device)
    result = run(case, inputs, num_sm_parts=12)
    check_result(result.out, result.lse, expect(case, inputs))


@given(
    left=st.sampled_from((0, 1, 63, 64, 65, 300, 2000)),
    seq_len_q=st.sampled_from((1, 2, 3)),
    num_sm_parts=st.sampled_from((1, 2, 7, 30)),
)
@settings(max_examples=20)
def test_schedule_that_knows_the_window(device, left, seq_len_q, num_sm_parts):
    """It covers the visible blocks alone, and the result is right; without a cut it is the same to the bit."""
    case = dataclasses.replace(CASE, seq_len_q=seq_len_q, window=(left, -1))
    inputs = make_inputs(case).to(device)
    schedule = make_schedule(inputs.cache_seqlens, num_sm_parts, 3 * seq_len_q, seq_len_q=seq_len_q, window_left=left)
    result = run(case, inputs, schedule=schedule)
    check_result(result.out, result.lse, expect(case, inputs))
    if schedule[1][-1] == case.batch_size:
        assert same_bits(result.out, run(case, inputs, num_sm_parts=1).out)


def test_window_as_long_as_the_cache_changes_nothing(device):
    inputs = make_inputs(CASE).to(device)
    everything = run(CASE, inputs)
    for window in ((1500 + 3, -1), (-1, 1500), (2**30, 2**30)):
        result = decode(inputs, softmax_scale=CASE.scale, window=window)
        assert same_bits(result.out, everything.out) and torch.equal(result.lse, everything.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_sm_parts", [1, 40])
def test_sink(device, dtype, num_sm_parts):
    """-inf changes no bit, +inf leaves nothing, and neither they nor what lies between touches the log-sum-exp."""
    case = dataclasses.replace(CASE, dtype=dtype)
    inputs = make_inputs(case).to(device)
    without = run(case, inputs, num_sm_parts=num_sm_parts)
    sink = torch.tensor([-math.inf, math.inf, -math.inf, 3.0, 0.0, -math.inf], device=device)
    result = run(case, dataclasses.replace(inputs, attn_sink=sink), num_sm_parts=num_sm_parts)
    assert torch.equal(result.lse, without.lse)
    untouched = sink == -math.inf
    assert same_bits(result.out[:, :, untouched], without.out[:, :, untouched])
    assert not result.out[:, :, 1].any()
    assert not same_bits(result.out[:, :, 3], without.out[:, :, 3])
    assert not result.out[1].any()  # no token
    check_result(result.out, result.lse, expect(case, dataclasses.replace(inputs, attn_sink=sink)))


@pytest.mark.parametrize("num_sm_parts", [1, 40])
def test_base_of_the_log_sum_exp(device, num_sm_parts):
    inputs = make_inputs(CASE).to(device)
    natural = run(CASE, inputs, num_sm_parts=num_sm_parts)
    base_2 = run(CASE, inputs, num_sm_parts=num_sm_parts, lse_scale=1.0)
    assert same_bits(natural.out, base_2.out)
    assert torch.equal(torch.isposinf(base_2.lse), torch.isposinf(natural.lse))
    torch.testing.assert_close(base_2.lse * math.log(2.0), natural.lse, rtol=1e-6, atol=1e-6)
