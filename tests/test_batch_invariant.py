"""The schedule of batch-invariant calls: where a request is cut depends on its own length alone."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import Case, make_inputs
from kernel_calls import decode
from reference import check_result, check_schedule, reference_of
from tilemla.launch import module_for
from tilemla.schedule import make_batch_invariant_schedule

BLOCK_N = 64


def make_schedule(device, lengths, max_pieces, blocks_per_split, seq_len_q=1, window_left=-1):
    """Run the generated program on poisoned outputs."""
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    metadata = torch.full((len(lengths) * max_pieces, 8), -12345, dtype=torch.int32, device=device)
    num_splits = torch.full((len(lengths) + 1,), -12345, dtype=torch.int32, device=device)
    run = module_for(device, "a test").functions["get_batch_invariant_metadata"]
    run(cache_seqlens, metadata, num_splits, blocks_per_split, seq_len_q, window_left)
    return metadata.cpu().numpy(), num_splits.cpu().numpy()


def cuts_of(length, blocks_per_split, first):
    """Where a request must be cut: (first block, end) of its pieces."""
    end = -(-length // BLOCK_N)
    inner = [cut for cut in range(0, end, blocks_per_split) if first < cut < end]
    bounds = [first, *inner, end]
    return list(itertools.pairwise(bounds))


@given(
    lengths=st.lists(
        st.one_of(st.sampled_from((0, 1, 64, 65, 128, 129, 192)), st.integers(0, 20_000)), min_size=1, max_size=30
    ),
    blocks_per_split=st.sampled_from((1, 2, 3, 16, 1000)),
    seq_len_q=st.sampled_from((1, 3)),
    window_left=st.one_of(st.just(-1), st.sampled_from((0, 63, 64, 500)), st.integers(0, 20_000)),
    spare=st.integers(0, 2),
)
@settings(max_examples=100)
def test_cuts_depend_on_a_request_alone(device, lengths, blocks_per_split, seq_len_q, window_left, spare):
    first = [max(n - seq_len_q - window_left, 0) // BLOCK_N if window_left >= 0 else 0 for n in lengths]
    expected = [cuts_of(*request) for request in zip(lengths, [blocks_per_split] * len(lengths), first, strict=True)]
    max_pieces = max(map(len, expected)) + spare
    metadata, num_splits = make_schedule(device, lengths, max_pieces, blocks_per_split, seq_len_q, window_left)
    pieces = check_schedule(metadata, num_splits, lengths, BLOCK_N, first)
    assert [[(begin, end) for _, begin, end in of_request] for of_request in pieces] == expected
    parts = [part for of_request in pieces for part, _, _ in of_request]
    assert parts == list(range(len(parts)))  # each piece has a part, idle ones are last


def test_request_longer_than_its_caller_said(device):
    """A captured graph may be replayed with such: the last piece takes the rest."""
    metadata, num_splits = make_schedule(device, [64 * 100, 64 * 3], 2, 4)
    pieces = check_schedule(metadata, num_splits, [64 * 100, 64 * 3], BLOCK_N)
    assert [(begin, end) for _, begin, end in pieces[0]] == [(0, 4), (4, 100)]


@pytest.mark.parametrize("batch_size", [1, 1023, 1024, 1025, 5000, 65536])
def test_large_batch(device, batch_size):
    lengths = np.random.default_rng(batch_size).integers(0, 1000, batch_size)
    metadata, num_splits = make_schedule(device, lengths.tolist(), 4, 4)
    pieces = np.maximum(-(-lengths // 256), 1)
    np.testing.assert_array_equal(num_splits, np.concatenate([[0], np.cumsum(pieces)]))
    request = np.repeat(np.arange(batch_size), pieces)
    piece = np.arange(len(request)) - num_splits[request]
    end = np.minimum(4 * piece + 4, -(-lengths[request] // BLOCK_N))
    is_split = pieces[request] > 1
    expected = np.stack([request, request, 4 * piece, end, piece, is_split, is_split, 0 * piece], 1)
    np.testing.assert_array_equal(metadata[: len(request)], expected)
    idle = metadata[len(request) :]
    assert (idle == [batch_size, batch_size - 1, 0, 0, 0, 0, 0, 0]).all()


@pytest.mark.parametrize("window", [(-1, -1), (3000, 0)], ids=["whole", "window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_neighbours_change_no_bit(device, dtype, window):
    """A request alone, among others, and with room for longer ones."""
    case = Case(lengths=(64, 5000, 0, 2100, 7000), seq_len_q=2, num_heads_q=3, dtype=dtype, window=window, seed=9)
    inputs = make_inputs(case).to(device)

    def run(requests, max_tokens):
        of = type(inputs)(
            inputs.q[requests], inputs.k_cache, inputs.block_table[requests], inputs.cache_seqlens[requests]
        )
        schedule = make_batch_invariant_schedule(of.cache_seqlens, max_tokens, seq_len_q=2, window_left=window[0])
        return decode(of, window=window, schedule=schedule)

    batch = run([0, 1, 2, 3, 4], 7040)
    check_result(batch.out, batch.lse, reference_of(inputs, window=window))
    assert (batch.num_splits.diff() > 1).any()
    for requests, max_tokens in (([1], 5000), ([4, 1], 7000), ([3, 0, 1, 2], 100_000)):
        result = run(requests, max_tokens)
        assert torch.equal(result.out.view(torch.int16), batch.out[requests].view(torch.int16))
        assert torch.equal(result.lse.view(torch.int32), batch.lse[requests].view(torch.int32))


@pytest.mark.parametrize("pieces", [2, 9, 40])
def test_however_many_rows_are_merged(device, pieces):
    """A combine kernel for sm_90a shares a row between sixteen warps, four or one, by the rows that there are."""
    lengths = (64 * pieces, *[70] * 63)
    inputs = make_inputs(Case(lengths=lengths, num_heads_q=16)).to(device)

    def run(n):
        of = type(inputs)(inputs.q[:n], inputs.k_cache, inputs.block_table[:n], inputs.cache_seqlens[:n])
        return decode(of, schedule=make_schedule(device, lengths[:n], pieces, 1))

    batch = run(64)  # 1024 rows
    check_result(batch.out, batch.lse, reference_of(inputs))
    for n in (1, 20):
        result = run(n)
        assert torch.equal(result.out.view(torch.int16), batch.out[:n].view(torch.int16))
        assert torch.equal(result.lse.view(torch.int32), batch.lse[:n].view(torch.int32))
