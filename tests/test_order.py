"""Schedules that visit the requests in an order of their own: fewer cuts, and the same results."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_calls
import tilemla
from cases import Case, make_inputs
from reference import check_result, check_schedule, read_order, reference_of
from schedules import BLOCK_N, put_in_order, spread_schedule
from sparse_cases import List, SparseCase, decode_sparse, make_sparse_inputs, num_tokens_of, sparse_reference
from strategies import cases
from test_fp8 import check_e4m3, decode_e4m3, e4m3, quantised
from test_fp8 import decode as decode_bytes
from test_fp8 import reference as reference_of_bytes
from test_schedule import make_schedule
from tilemla.bench.cases import GridCase
from tilemla.costs import formula_costs
from tilemla.schedule import derive_num_splits

LENGTHS = (700, 0, 64, 1, 1500, 130, 0, 65, 900, 3, 257)
ORDER = [4, 1, 10, 0, 6, 3, 8, 2, 9, 7, 5]
ROWS = pytest.mark.parametrize(("num_heads_q", "seq_len_q"), [(16, 1), (20, 2), (128, 1)])


def in_order(lengths, device, num_sm_parts=7, order=ORDER):
    return tuple(torch.from_numpy(array).to(device) for array in spread_schedule(lengths, num_sm_parts, order))


def varied_lengths(batch_size):
    return GridCase(batch_size, 4096, 16, 1, is_varied=True).make_lengths()


@pytest.mark.parametrize(
    ("batch_size", "num_sm_parts", "most_cuts"), [(128, 132, 80), (128, 66, 25), (128, 33, 4), (200, 132, 60)]
)
def test_an_order_leaves_few_cuts(device, batch_size, num_sm_parts, most_cuts):
    """As they come, nearly every part but the last ends within a request."""
    lengths = varied_lengths(batch_size)
    metadata, num_splits = make_schedule(lengths, num_sm_parts, device, formula_costs(64, batch_size, num_sm_parts))
    check_schedule(metadata, num_splits, lengths, BLOCK_N)
    assert read_order(metadata, batch_size)[1] and num_splits[-1] - batch_size <= most_cuts


@pytest.mark.parametrize(("batch_size", "num_sm_parts"), [(257, 132), (133, 33), (65, 132), (1, 1)])
def test_requests_come_as_they_are_where_no_order_fits_or_helps(device, batch_size, num_sm_parts):
    lengths = varied_lengths(batch_size)
    metadata, num_splits = make_schedule(lengths, num_sm_parts, device, formula_costs(64, batch_size, num_sm_parts))
    check_schedule(metadata, num_splits, lengths, BLOCK_N)
    assert not read_order(metadata, batch_size)[1]


def test_equal_lengths_come_as_they_are(device):
    for batch_size, num_sm_parts in ((128, 132), (128, 66), (200, 132), (64, 33)):
        metadata, _ = make_schedule(
            [4096] * batch_size, num_sm_parts, device, formula_costs(64, batch_size, num_sm_parts)
        )
        assert not read_order(metadata, batch_size)[1]


@given(case=cases(), num_sm_parts=st.sampled_from((2, 3, 5, 8, 20)), data=st.data())
@settings(max_examples=60)
def test_any_order_is_right(device, case, num_sm_parts, data):
    order = data.draw(st.permutations(range(len(case.lengths))))
    inputs = make_inputs(case).to(device)
    options = dict(causal=case.causal, softmax_scale=case.scale, window=case.window)
    schedule = spread_schedule(case.lengths, num_sm_parts, order)
    result = kernel_calls.decode(inputs, schedule=schedule, **options)
    check_result(result.out, result.lse, reference_of(inputs, **options))


@ROWS
def test_dense(device, num_heads_q, seq_len_q):
    case = Case(LENGTHS, seq_len_q, num_heads_q, causal=True)
    inputs = make_inputs(case).to(device)
    arguments = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512)
    result = tilemla.flash_mla_with_kvcache(*arguments, *in_order(LENGTHS, device), causal=True)
    check_result(*result, reference_of(inputs, causal=True))


def test_as_many_requests_as_an_order_has_room_for(device):
    lengths = tuple(request % 131 for request in range(256))
    inputs = make_inputs(Case(lengths, 1, 4)).to(device)
    arguments = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512)
    result = tilemla.flash_mla_with_kvcache(*arguments, *in_order(lengths, device, 64, list(range(255, -1, -1))))
    check_result(*result, reference_of(inputs))


@ROWS
def test_bytes(device, num_heads_q, seq_len_q):
    case = Case(LENGTHS, seq_len_q, num_heads_q, causal=True, has_sink=True)
    inputs, held = quantised(case, device)
    result = decode_bytes(inputs, case, in_order(LENGTHS, device))
    check_result(*result, reference_of_bytes(inputs, case, held))


@ROWS
def test_e4m3(device, num_heads_q, seq_len_q):
    case = Case(LENGTHS, seq_len_q, num_heads_q, causal=True)
    inputs, (q, held) = e4m3(case, device, 0.5, 0.25)
    result = decode_e4m3(inputs, case, (0.5, 0.25), in_order(LENGTHS, device))
    check_e4m3(*result, reference_of_bytes(inputs, case, held, q))


def test_sparse_decode_takes_requests_as_they_come(device):
    """Its plans have no order, and a CPU, which looks, refuses one that has."""
    main = List(2048, 40, 64, tuple(range(2, 2002, 50)))
    case = SparseCase(batch_size=40, num_heads_q=64, kv_format="dense", head_dim_qk=576, main=main)
    inputs = make_sparse_inputs(case).to(device)
    planned, _ = tilemla.get_mla_metadata()
    check_result(*decode_sparse(case, inputs, (planned, None)), sparse_reference(case, inputs))
    lengths = torch.tensor(num_tokens_of(case), dtype=torch.int32, device=device)
    metadata, _ = tilemla.get_mla_metadata(lengths, 64, 1, 64, False, 2048)
    for schedule in (planned.tile_scheduler_metadata, metadata):
        assert not read_order(schedule.cpu().numpy(), 40)[1]
    if device.type == "cpu":
        with pytest.raises(ValueError, match="visits the requests in an order of its own, which calls with indices"):
            decode_sparse(case, inputs, in_order(num_tokens_of(case), device, 20, list(range(39, -1, -1))))


def test_what_others_write_beside_a_row_is_no_order(device):
    """FlashMLA leaves its eighth field as it is."""
    case = Case(LENGTHS, 1, 16)
    inputs = make_inputs(case).to(device)
    metadata, num_splits = (torch.from_numpy(array).to(device) for array in spread_schedule(LENGTHS, 7))
    arguments = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512)
    expected = tilemla.flash_mla_with_kvcache(*arguments, metadata, num_splits)
    metadata[:, 7] = 0x05030201
    for one, other in zip(tilemla.flash_mla_with_kvcache(*arguments, metadata, num_splits), expected, strict=True):
        assert torch.equal(one, other)


@given(
    lengths=st.lists(st.one_of(st.sampled_from((0, 64)), st.integers(0, 3000)), min_size=1, max_size=40),
    num_sm_parts=st.integers(10, 140),
    data=st.data(),
)
@settings(max_examples=60)
def test_derived_num_splits(lengths, num_sm_parts, data):
    metadata, num_splits = spread_schedule(lengths, num_sm_parts, data.draw(st.permutations(range(len(lengths)))))
    check_schedule(metadata, num_splits, lengths, BLOCK_N)
    derived = derive_num_splits(torch.from_numpy(metadata), len(lengths))
    assert derived.dtype is torch.int32
    np.testing.assert_array_equal(derived.numpy(), num_splits)


@pytest.mark.parametrize("order", [[0, 0, 1], [0, 3, 1], [2, 1, 0]], ids=["twice", "no request", "other lengths"])
def test_an_order_that_is_none_is_refused_on_a_cpu(order):
    lengths = (700, 64, 1)
    inputs = make_inputs(Case(lengths, 1, 16))
    metadata, num_splits = put_in_order(*spread_schedule(lengths, 3), [0, 1, 2])
    metadata[0, 7] = sum(request << 8 * place for place, request in enumerate(order))
    arguments = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512)
    with pytest.raises(ValueError, match="must be a schedule for these cache_seqlens"):
        tilemla.flash_mla_with_kvcache(*arguments, torch.from_numpy(metadata), torch.from_numpy(num_splits))
