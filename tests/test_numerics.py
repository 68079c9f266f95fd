"""What the kernels compute, against float64 and against themselves."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import HEAD_DIM_V, PAGE_BLOCK_SIZE, Case, Inputs, make_inputs
from kernel_calls import decode
from reference import check_result, reference_of
from strategies import cases

DTYPES = [torch.bfloat16, torch.float16]
parts = st.sampled_from((1, 2, 3, 5, 8, 20))


def run(case, inputs, **options):
    return decode(inputs, causal=case.causal, softmax_scale=case.scale, window=case.window, **options)


def expect(case, inputs):
    return reference_of(inputs, causal=case.causal, softmax_scale=case.scale, window=case.window)


def bits(result):
    return result.out.view(torch.int16), result.lse.view(torch.int32)


def assert_same_bits(actual, expected):
    for left, right in zip(bits(actual), bits(expected), strict=True):
        assert torch.equal(left, right)


def used_slots(case, inputs):
    """Bool (num_blocks, page_block_size): the slots that hold tokens."""
    used = torch.zeros(inputs.k_cache.shape[:2], dtype=torch.bool)
    for request, length in enumerate(case.lengths):
        for column in case.pages(request):
            used[inputs.block_table[request, column], : length - column * case.page_block_size] = True
    return used


@given(case=cases(), num_sm_parts=parts)
@settings(max_examples=100)
def test_decode_is_right(device, case, num_sm_parts):
    """Every element is written, and right; nothing that is poisoned gets in."""
    inputs = make_inputs(case).to(device)
    result = run(case, inputs, num_sm_parts=num_sm_parts)
    check_result(result.out, result.lse, expect(case, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_more_queries_than_tokens(device, dtype, causal):
    """Whole tiles of rows see no key, in requests that are split and in ones that are not."""
    case = Case(
        lengths=(130, 3, 0, 256), seq_len_q=150, num_heads_q=2, causal=causal, dtype=dtype, unused_page_id=-1, seed=5
    )
    inputs = make_inputs(case).to(device)
    result = run(case, inputs, num_sm_parts=12)
    assert (result.num_splits.diff() > 1).any()
    check_result(result.out, result.lse, expect(case, inputs))
    assert torch.isposinf(result.lse).any()


@given(case=cases(), num_sm_parts=parts, data=st.data())
@settings(max_examples=25)
def test_order_of_pages_changes_nothing(device, case, num_sm_parts, data):
    inputs = make_inputs(case)
    num_blocks = inputs.k_cache.shape[0]
    order = torch.tensor(data.draw(st.permutations(range(num_blocks))), dtype=torch.int64)
    new_index = torch.empty_like(order)
    new_index[order] = torch.arange(num_blocks)
    table = inputs.block_table.clone()
    is_used = (table >= 0) & (table < num_blocks)
    table[is_used] = new_index[table[is_used].long()].int()
    permuted = dataclasses.replace(inputs, k_cache=inputs.k_cache[order], block_table=table)
    assert_same_bits(
        run(case, permuted.to(device), num_sm_parts=num_sm_parts),
        run(case, inputs.to(device), num_sm_parts=num_sm_parts),
    )


@given(case=cases(), num_sm_parts=parts, value=st.sampled_from((0.0, 1.0, float("inf"), float("-inf"), 1e4)))
@settings(max_examples=25)
def test_unused_slots_and_entries_change_nothing(device, case, num_sm_parts, value):
    inputs = make_inputs(case)
    other = dataclasses.replace(inputs, k_cache=inputs.k_cache.clone(), block_table=inputs.block_table.clone())
    other.k_cache[~used_slots(case, inputs)] = value
    other.block_table[inputs.block_table == case.unused_page_id] = 0
    assert_same_bits(
        run(case, other.to(device), num_sm_parts=num_sm_parts),
        run(case, inputs.to(device), num_sm_parts=num_sm_parts),
    )


@given(case=cases(max_batch=4), num_sm_parts=parts)
@settings(max_examples=25)
def test_batch_equals_its_requests(device, case, num_sm_parts):
    inputs = make_inputs(case).to(device)
    reference = expect(case, inputs)
    batch = run(case, inputs, num_sm_parts=num_sm_parts)
    check_result(batch.out, batch.lse, reference)
    alone = [
        run(
            case,
            dataclasses.replace(
                inputs,
                q=inputs.q[i : i + 1],
                block_table=inputs.block_table[i : i + 1],
                cache_seqlens=inputs.cache_seqlens[i : i + 1],
            ),
            num_sm_parts=num_sm_parts,
        )
        for i in range(case.batch_size)
    ]
    out, lse = torch.cat([result.out for result in alone]), torch.cat([result.lse for result in alone])
    # The batch, within tolerance of the requests: their results stand in for the right ones.
    check_result(batch.out, batch.lse, dataclasses.replace(reference, out=out.double(), lse=lse.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_splitting_changes_rounding_alone(device, dtype, causal):
    case = Case(lengths=(1500, 64, 700), seq_len_q=2, num_heads_q=10, num_heads_k=2, causal=causal, dtype=dtype, seed=7)
    inputs = make_inputs(case).to(device)
    reference = expect(case, inputs)
    whole = run(case, inputs, num_sm_parts=1)
    assert whole.num_splits.tolist() == [0, 1, 2, 3]
    check_result(whole.out, whole.lse, reference)
    same = dataclasses.replace(reference, out=whole.out.double(), lse=whole.lse.double())
    for num_sm_parts in (3, 5, 9, 40):
        split = run(case, inputs, num_sm_parts=num_sm_parts)
        assert split.num_splits[-1] > 3
        check_result(split.out, split.lse, same)


@given(case=cases(max_batch=3, max_length=300), num_sm_parts=parts)
@settings(max_examples=20)
def test_causal_query_is_a_shorter_request(device, case, num_sm_parts):
    """Query i of a causal call sees what a call of its own would, over the tokens up to it."""
    case = dataclasses.replace(case, causal=True, window=(-1, -1))
    inputs = make_inputs(case).to(device)
    reference = expect(case, inputs)
    result = run(case, inputs, num_sm_parts=num_sm_parts)
    for i in range(case.seq_len_q):
        lengths = (inputs.cache_seqlens - (case.seq_len_q - 1 - i)).clamp(min=0)
        one = dataclasses.replace(inputs, q=inputs.q[:, i : i + 1].contiguous(), cache_seqlens=lengths)
        alone = decode(one, softmax_scale=case.scale, num_sm_parts=num_sm_parts)
        check_result(
            result.out[:, i : i + 1],
            result.lse[:, :, i : i + 1],
            dataclasses.replace(
                reference,
                out=alone.out.double(),
                out_magnitude=reference.out_magnitude[:, i : i + 1],
                lse=alone.lse.double(),
                score_magnitude=reference.score_magnitude[:, :, i : i + 1],
            ),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_nothing(device, dtype):
    """A cache whose tokens, pages and heads lie apart, and a slice of a wider block table."""
    case = Case(lengths=(200, 64, 0), num_heads_q=6, num_heads_k=2, dtype=dtype, seed=11)
    inputs = make_inputs(case).to(device)
    num_blocks, page_block_size, num_heads_k, head_dim = inputs.k_cache.shape
    apart = torch.full((num_blocks + 1, page_block_size + 1, num_heads_k + 1, head_dim + 64), float("nan"))
    apart = apart.to(device, dtype)
    cache = apart[1:, 1:, 1:, 64:]
    cache.copy_(inputs.k_cache)
    wide = torch.full((case.batch_size, inputs.block_table.shape[1] + 5), -1, dtype=torch.int32, device=device)
    table = wide[:, 2 : 2 + inputs.block_table.shape[1]]
    table.copy_(inputs.block_table)
    strided = dataclasses.replace(inputs, k_cache=cache, block_table=table)
    assert_same_bits(run(case, strided), run(case, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_returns_its_value(device, dtype):
    """With one token the output is its value, bit for bit: storage is read and written without a change."""
    case = Case(lengths=(1,), num_heads_q=3, dtype=dtype, spare_pages=0)
    inputs = make_inputs(case).to(device)
    result = run(case, inputs)
    value = inputs.k_cache[inputs.block_table[0, 0].item(), 0, 0, :HEAD_DIM_V]
    assert torch.equal(result.out, value.expand_as(result.out))


def values_that_add(dtype):
    """Every value of a 16-bit dtype whose double is finite in float32."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.float().abs() < 2.0**127]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_is_rounded_to_nearest_even(dtype):
    """The mean of two tokens, exact in float32: ties and subnormals too, as torch rounds them."""
    values = values_that_add(dtype)
    # Halves of a unit in the last place come from neighbours, quarters from a neighbour of twice the exponent.
    ordered = values.float().sort().values.to(dtype)
    pairs = torch.cat([torch.stack([ordered[:-shift], ordered[shift:]]) for shift in (1, 2, 3, 127, 129)], dim=1)
    count = -(-pairs.shape[1] // HEAD_DIM_V)
    padded = torch.zeros((2, count * HEAD_DIM_V), dtype=dtype)
    padded[:, : pairs.shape[1]] = pairs
    k_cache = torch.zeros((count, PAGE_BLOCK_SIZE, 1, 576), dtype=dtype)
    k_cache[:, :2, 0, :HEAD_DIM_V] = padded.view(2, count, HEAD_DIM_V).transpose(0, 1)
    inputs = Inputs(
        torch.zeros((count, 1, 1, 576), dtype=dtype),
        k_cache,
        torch.arange(count, dtype=torch.int32)[:, None],
        torch.full((count,), 2, dtype=torch.int32),
    )
    expected = ((padded[0].double() + padded[1].double()) / 2).float().to(dtype)
    result = decode(inputs)
    # A zero may come with either sign.
    assert torch.equal(result.out.flatten().float(), expected.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_is_not_hidden(device, dtype):
    """NaN in tokens that are used shows in the output of their request, and of none that comes after it."""
    case = Case(lengths=(64, 36), dtype=dtype, seed=3)
    inputs = make_inputs(case)
    # In the slots that the next request does not use: a tile must not keep them.
    inputs.k_cache[inputs.block_table[0, 0], 36:] = float("nan")
    result = run(case, inputs.to(device), num_sm_parts=1)
    assert torch.isnan(result.out[0]).all()
    assert not torch.isnan(result.out[1]).any()
    assert not torch.isnan(result.lse[1]).any()


@pytest.mark.parametrize("what", ["out", "lse", "nan", "inf"])
def test_checker_sees_a_wrong_result(what):
    case = Case(lengths=(100, 0), seed=3)
    inputs = make_inputs(case)
    reference = expect(case, inputs)
    out, lse = reference.out.to(case.dtype), reference.lse.float()
    check_result(out, lse, reference)
    if what == "out":
        out[0, 0, 3, 5] += 0.05
    elif what == "lse":
        lse[0, 3, 0] *= 1.001
    elif what == "nan":
        out[1, 0, 0, 0] = float("nan")
    else:
        lse[1, 0, 0] = 0.0
    with pytest.raises(AssertionError):
        check_result(out, lse, reference)
