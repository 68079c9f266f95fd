"""FlashMLA's calls against float64, and what must hold between calls, on every device of this machine."""

import contextlib
import dataclasses
import math
import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import strategies
import tilemla as flash_mla
from cases import Case, Inputs, make_inputs
from reference import check_result, reference_of
from schedules import spread_schedule
from tilemla import allocate, interface, schedule
from tilemla.schedule import num_sm_parts_for

DTYPES = (torch.bfloat16, torch.float16)
MIXED = Case(lengths=(300, 0, 64, 1, 1500), seq_len_q=2, num_heads_q=12, num_heads_k=2, causal=True)


def spread(num_sm_parts, device):
    """The schedule of MIXED that splits most."""
    return tuple(torch.from_numpy(array).to(device) for array in spread_schedule(MIXED.lengths, num_sm_parts))


def poisoned(function):
    def make(*args, **kwargs):
        tensor = function(*args, **kwargs)
        return tensor.fill_(math.nan if tensor.is_floating_point() else -12345)

    return make


@contextlib.contextmanager
def poisoned_memory():
    """While it lasts, memory that torch hands out is poisoned, and no plan remembers how to get it otherwise."""
    with contextlib.ExitStack() as stack:
        for name in ("empty", "empty_strided"):
            stack.enter_context(mock.patch.object(torch, name, poisoned(getattr(torch, name))))
        stack.enter_context(mock.patch.object(allocate, "_empty_strided_cuda", None))
        for module in (interface, schedule):
            stack.enter_context(mock.patch.object(module, "_plans", {}))
        yield


def decode(case, inputs, schedule=None, **changes):
    """Decode a case; every buffer that the call makes starts poisoned, so that nothing is left unwritten or made up."""
    if schedule is None:
        schedule = flash_mla.get_mla_metadata()
    options = dict(attn_sink=inputs.attn_sink, window_size=case.window)
    arguments = dict(softmax_scale=case.softmax_scale, causal=case.causal) | options | changes
    with poisoned_memory():
        return flash_mla.flash_mla_with_kvcache(
            inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, *schedule, **arguments
        )


def expect(case, inputs):
    return reference_of(inputs, causal=case.causal, softmax_scale=case.softmax_scale, window=case.window)


def check(case, inputs, schedule=None, **changes):
    out, lse = decode(case, inputs, schedule, **changes)
    assert out.dtype == case.dtype and out.is_contiguous()
    check_result(out, lse, expect(case, inputs))
    return out, lse


def same_bits(left, right):
    bits = {2: torch.int16, 4: torch.int32}
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a.view(bits[a.element_size()]), b.view(bits[b.element_size()])) for a, b in pairs)


@given(data=st.data())
def test_against_float64(device, data):
    limits = dict(max_batch=5, max_length=700, max_heads=64, max_rows=130)
    if device.type == "cuda":
        limits = dict(max_batch=40, max_length=5000, max_heads=128, max_rows=600, arch="sm_90a")
    case = data.draw(strategies.cases(**limits))
    inputs = make_inputs(case).to(device)
    schedule = None
    if data.draw(st.booleans(), "the tuple form, which knows no window"):
        rows = case.seq_len_q * case.num_heads_q // case.num_heads_k
        schedule = flash_mla.get_mla_metadata(inputs.cache_seqlens, rows, case.num_heads_k)
        schedule = schedule[: data.draw(st.sampled_from((1, 2)), "of how many tensors")]
    check(case, inputs, schedule, batch_invariant=data.draw(st.booleans(), "batch_invariant"))


@pytest.mark.parametrize(
    "num_heads_q, num_heads_k", [(1, 1), (3, 1), (9, 1), (63, 1), (126, 1), (6, 2), (9, 3), (8, 8)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_counts(device, seed, num_heads_q, num_heads_k, dtype):
    case = Case((100, 65), num_heads_q=num_heads_q, num_heads_k=num_heads_k, dtype=dtype, seed=seed)
    check(case, make_inputs(case).to(device))


@pytest.mark.parametrize("seq_len_q", [1, 2, 4, 7])
def test_causal_mask_ends_with_the_cache(device, seed, seq_len_q):
    """Lengths below, at and above seq_len_q: the first queries of a short request see no token at all."""
    lengths = (0, 1, seq_len_q - 1, seq_len_q, seq_len_q + 1, 64, 65, 64 + seq_len_q - 1)
    case = Case(lengths, seq_len_q=seq_len_q, num_heads_q=5, causal=True, seed=seed)
    out, lse = check(case, make_inputs(case).to(device))
    assert torch.isposinf(lse[0]).all() and not out[0].any()


def test_mask_of_one_query_changes_nothing(device, seed):
    case = Case((100, 3, 0), seed=seed)
    inputs = make_inputs(case).to(device)
    assert same_bits(decode(case, inputs, causal=True), decode(case, inputs, causal=False))


def test_default_scale(device, seed):
    case = Case((100,), seed=seed)
    inputs = make_inputs(case).to(device)
    assert same_bits(decode(case, inputs), decode(case, inputs, softmax_scale=576**-0.5))


def test_long_sequences_are_split(device, seed):
    case = Case((4000, 10, 2500), num_heads_q=2, seed=seed)
    inputs = make_inputs(case).to(device)
    schedule = flash_mla.get_mla_metadata(inputs.cache_seqlens, 2, 1)
    splits = schedule[1].diff().tolist()
    assert splits[0] > 1 and splits[1] == 1 and splits[2] > 1
    check(case, inputs, schedule)


# Properties


@settings(max_examples=15)
@given(order=st.randoms(use_true_random=False))
def test_where_pages_lie_changes_no_bit(device, order):
    inputs = make_inputs(MIXED).to(device)
    num_blocks = inputs.k_cache.shape[0]
    to = list(range(num_blocks))
    order.shuffle(to)
    moved_to = torch.tensor(to, dtype=torch.int32, device=device)
    moved = dataclasses.replace(inputs, k_cache=torch.empty_like(inputs.k_cache))
    moved.k_cache[moved_to.long()] = inputs.k_cache
    used = (inputs.block_table >= 0) & (inputs.block_table < num_blocks)
    moved.block_table = torch.where(used, moved_to[inputs.block_table.clamp(0, num_blocks - 1).long()], -1).int()
    assert same_bits(decode(MIXED, inputs), decode(MIXED, moved))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, math.inf, -math.inf])
def test_what_lies_in_unused_slots_changes_no_bit(device, value):
    inputs = make_inputs(MIXED).to(device)
    filled = dataclasses.replace(inputs, k_cache=inputs.k_cache.nan_to_num(nan=value))
    assert same_bits(decode(MIXED, inputs), decode(MIXED, filled))


@pytest.mark.parametrize("unused_page_id", [-1, -(2**31), 0, 2147480000, 2**31 - 1])
def test_unused_table_entries_change_no_bit(device, unused_page_id):
    expected = decode(MIXED, make_inputs(MIXED).to(device))
    case = dataclasses.replace(MIXED, unused_page_id=unused_page_id)
    assert same_bits(decode(case, make_inputs(case).to(device)), expected)


def test_same_call_gives_the_same_bits(device):
    inputs = make_inputs(MIXED).to(device)
    first = decode(MIXED, inputs)
    assert all(same_bits(decode(MIXED, inputs), first) for _ in range(3))


def test_batch_is_its_requests_one_by_one(device):
    inputs = make_inputs(MIXED).to(device)
    reference = expect(MIXED, inputs)
    alone = [
        decode(
            MIXED,
            Inputs(
                inputs.q[request : request + 1],
                inputs.k_cache,
                inputs.block_table[request : request + 1],
                inputs.cache_seqlens[request : request + 1],
            ),
        )
        for request in range(MIXED.batch_size)
    ]
    check_result(torch.cat([out for out, _ in alone]), torch.cat([lse for _, lse in alone]), reference)


@settings(max_examples=20)
@given(num_sm_parts=st.integers(1, 140))
def test_splitting_changes_only_rounding(device, num_sm_parts):
    """A schedule of any number of parts gives the result; one part splits nothing."""
    inputs = make_inputs(MIXED).to(device)
    check(MIXED, inputs, spread(num_sm_parts, device))


# The two forms of the schedule


def test_both_forms_give_the_same_bits(device):
    inputs = make_inputs(MIXED).to(device)
    tokens = MIXED.seq_len_q * MIXED.num_heads_q // MIXED.num_heads_k
    metadata, num_splits = flash_mla.get_mla_metadata(inputs.cache_seqlens, tokens, MIXED.num_heads_k)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata.shape[1:] == (8,) and num_splits.shape == (MIXED.batch_size + 1,)
    sched_meta, nothing = flash_mla.get_mla_metadata()
    assert nothing is None and not sched_meta.have_initialized
    first = decode(MIXED, inputs, (sched_meta, None))
    assert sched_meta.have_initialized
    assert torch.equal(sched_meta.tile_scheduler_metadata, metadata)
    filled = sched_meta.tile_scheduler_metadata
    again = decode(MIXED, inputs, (sched_meta, None))
    assert sched_meta.tile_scheduler_metadata is filled
    assert same_bits(first, again) and same_bits(first, decode(MIXED, inputs, (metadata, num_splits)))


def test_schedule_in_larger_buffers(device):
    """As SGLang does it for CUDA graphs: a padded tail of num_splits and idle parts change no bit."""
    inputs = make_inputs(MIXED).to(device)
    metadata, num_splits = spread(3, device)
    idle = torch.tensor([[MIXED.batch_size, MIXED.batch_size - 1, 0, 0, 0, 0, 0, 0]], dtype=torch.int32, device=device)
    padded = torch.cat([num_splits, torch.full((7,), -12345, dtype=torch.int32, device=device)])
    expected = decode(MIXED, inputs, (metadata, num_splits))
    assert same_bits(decode(MIXED, inputs, (torch.cat([metadata, idle, idle]), padded)), expected)


def test_num_sm_parts():
    assert num_sm_parts_for(132, 16, 1) == 132
    assert num_sm_parts_for(132, 64, 1) == 132
    assert num_sm_parts_for(132, 65, 1) == 66
    assert num_sm_parts_for(132, 256, 1) == 33
    assert num_sm_parts_for(132, 16, 8) == 16
    assert num_sm_parts_for(8, 1000, 3) == 1
    metadata, _ = flash_mla.get_mla_metadata(torch.zeros(2, dtype=torch.int32), 128, 2)
    assert metadata.shape == (2, 8)


def test_intermediate_signature_of_upstream():
    lengths = torch.tensor([10, 20], dtype=torch.int32)
    metadata, _ = flash_mla.get_mla_metadata(
        cache_seqlens=lengths,
        num_q_tokens_per_head_k=128,
        num_heads_k=1,
        num_heads_q=128,
        is_fp8_kvcache=False,
        topk=None,
    )
    assert torch.equal(metadata, flash_mla.get_mla_metadata(lengths, 128, 1)[0])


def test_upstream_keywords(device):
    case = Case((100,))
    inputs = make_inputs(case).to(device)
    sched_meta, num_splits = flash_mla.get_mla_metadata()
    result = flash_mla.flash_mla_with_kvcache(
        q=inputs.q,
        k_cache=inputs.k_cache,
        block_table=inputs.block_table,
        cache_seqlens=inputs.cache_seqlens,
        head_dim_v=512,
        tile_scheduler_metadata=sched_meta,
        num_splits=num_splits,
        softmax_scale=None,
        causal=False,
        is_fp8_kvcache=False,
        indices=None,
        attn_sink=None,
        extra_k_cache=None,
        extra_indices_in_kvcache=None,
        topk_length=None,
        extra_topk_length=None,
    )
    assert same_bits(result, decode(case, inputs))


# Edges


@pytest.mark.parametrize("tuple_form", [True, False])
def test_batch_of_nothing(device, tuple_form):
    case = Case((), seq_len_q=2, num_heads_q=6, num_heads_k=2)
    inputs = make_inputs(case).to(device)
    schedule = flash_mla.get_mla_metadata(inputs.cache_seqlens, 6, 2) if tuple_form else None
    out, lse = decode(case, inputs, schedule)
    assert out.shape == (0, 2, 6, 512) and out.dtype == case.dtype and lse.shape == (0, 6, 2)


@pytest.mark.parametrize("spare_columns", [0, 2])
@pytest.mark.parametrize("spare_pages", [0, 2])
def test_requests_without_tokens(device, spare_columns, spare_pages):
    case = Case((0, 0, 0), seq_len_q=2, num_heads_q=3, spare_columns=spare_columns, spare_pages=spare_pages)
    out, lse = check(case, make_inputs(case).to(device))
    assert not out.any() and torch.isposinf(lse).all()


@pytest.mark.parametrize("case", [MIXED, dataclasses.replace(MIXED, num_heads_k=1)], ids=str)
def test_strided_inputs(device, case):
    """Slices of larger tensors, as an engine has them: a q of 576 in rows of 640, pages of every layer side by side."""
    inputs = make_inputs(case).to(device)
    expected = decode(case, inputs)

    def slice_of(shape, index, tensor):
        larger = torch.full(shape, -7, dtype=tensor.dtype, device=device)
        larger[index] = tensor
        view = larger[index]
        assert not view.is_contiguous()
        return view

    b, s_q, h_q, d = inputs.q.shape
    num_blocks, page, h_k, _ = inputs.k_cache.shape
    rows, columns = inputs.block_table.shape
    everything = slice(None)
    for q in (
        slice_of((b, s_q, h_q, d + 64), (..., slice(d)), inputs.q),
        slice_of((b, s_q, h_q + 1, d), (everything, everything, slice(h_q)), inputs.q),
        slice_of((b, s_q + 1, h_q, d), (everything, slice(s_q)), inputs.q),
        inputs.q.transpose(0, 1).contiguous().transpose(0, 1),
        inputs.q.transpose(1, 2).contiguous().transpose(1, 2),
        inputs.q.clone().requires_grad_(),
    ):
        assert same_bits(decode(case, dataclasses.replace(inputs, q=q)), expected)
    for k_cache in (
        slice_of((num_blocks, 3, page, h_k, d), (everything, 1), inputs.k_cache),
        slice_of((num_blocks, page, h_k, d + 64), (..., slice(d)), inputs.k_cache),
        inputs.k_cache.transpose(1, 2).contiguous().transpose(1, 2),
        inputs.k_cache.clone().requires_grad_(),
    ):
        assert same_bits(decode(case, dataclasses.replace(inputs, k_cache=k_cache)), expected)
    block_table = slice_of((rows, columns + 5), (everything, slice(columns)), inputs.block_table)
    assert same_bits(decode(case, dataclasses.replace(inputs, block_table=block_table)), expected)


def test_stride_of_a_single_page_or_head_says_nothing(device):
    case = Case((60,), num_heads_q=2, spare_pages=0)
    inputs = make_inputs(case).to(device)
    odd = inputs.k_cache.as_strided((1, 64, 1, 576), (3, 576, 5, 1))
    assert same_bits(decode(case, dataclasses.replace(inputs, k_cache=odd)), decode(case, inputs))


def test_expanded_query(device):
    """One query for every request and head: strides of 0, which the copy engine of a GPU does not know."""
    case = Case((100, 65), num_heads_q=4)
    inputs = make_inputs(case).to(device)
    inputs.q = inputs.q[:1, :, :1].expand(2, 1, 4, 576)
    if device.type == "cpu":
        check(case, inputs)
    else:
        with pytest.raises(ValueError, match="q must have strides that are positive multiples of 8 elements"):
            decode(case, inputs)


def test_queries_at_any_address(device):
    """On a GPU they must lie where its copy engine can read them; none are copied there unasked."""
    case = Case((100, 65), num_heads_q=4)
    inputs = make_inputs(case).to(device)
    expected = decode(case, inputs)
    wide = torch.zeros((2, 1, 4, 577), dtype=case.dtype, device=device)
    shifted = torch.zeros(inputs.q.numel() + 1, dtype=case.dtype, device=device)[1:].view(inputs.q.shape)
    for q, words in (
        (wide[..., :576], r"q must have strides that are positive multiples of 8 elements \(16 bytes\), got"),
        (shifted, "q must start at a multiple of 16 bytes, got address"),
    ):
        q.copy_(inputs.q)
        for _ in range(2):
            if device.type == "cpu":
                assert same_bits(decode(case, dataclasses.replace(inputs, q=q)), expected)
            else:
                with pytest.raises(ValueError, match=words):
                    decode(case, dataclasses.replace(inputs, q=q))


class Copies(TorchDispatchMode):
    """Counts operations that may copy a tensor."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, _types, arguments=(), named=None):
        if any(word in str(function) for word in ("clone", "copy", "contiguous")):
            self.seen.append(str(function))
        return function(*arguments, **(named or {}))


CACHES = {
    "pages in rows of layers": lambda n, h: ((n, 3, 64, h, 576), (slice(None), 1)),
    "tokens in rows of layers": lambda n, h: ((n, 64, 5, h, 576), (slice(None), slice(None), 2)),
    "padded tokens": lambda n, h: ((n, 64, h, 640), (..., slice(576))),
    "padded pages": lambda n, h: ((n, 80, h, 576), (slice(None), slice(8, 72))),
    "every other page": lambda n, h: ((2 * n, 64, h, 576), (slice(None, None, 2),)),
}


@pytest.mark.parametrize("num_heads_k", [1, 2])
@pytest.mark.parametrize("place", [*CACHES, "tokens before pages", "heads before tokens"])
def test_strided_caches_are_read_where_they_are(device, place, num_heads_k):
    """Any stride of pages, tokens and heads, and queries in rows of a larger tensor, without a copy of anything."""
    case = Case((300, 0, 65, 700), num_heads_q=4, num_heads_k=num_heads_k)
    inputs = make_inputs(case).to(device)
    schedule = flash_mla.get_mla_metadata(inputs.cache_seqlens, 4 // num_heads_k, num_heads_k)
    expected = decode(case, inputs, schedule)
    num_blocks = inputs.k_cache.shape[0]
    if place in CACHES:
        shape, index = CACHES[place](num_blocks, num_heads_k)
        k_cache = torch.full(shape, math.nan, dtype=case.dtype, device=device)[index]
        k_cache.copy_(inputs.k_cache)
    else:
        order = (1, 0) if place == "tokens before pages" else (2, 1)
        k_cache = inputs.k_cache.transpose(*order).contiguous().transpose(*order)
    assert k_cache.shape == inputs.k_cache.shape
    assert not k_cache.is_contiguous() or (place, num_heads_k) == ("heads before tokens", 1)
    q = torch.full((4, 1, 6, 1024), math.nan, dtype=case.dtype, device=device)[:, :, 1:5, 64:640]
    q.copy_(inputs.q)
    strided = dataclasses.replace(inputs, q=q, k_cache=k_cache)
    with Copies() as copies:
        result = flash_mla.flash_mla_with_kvcache(q, k_cache, inputs.block_table, inputs.cache_seqlens, 512, *schedule)
    assert not copies.seen
    assert same_bits(result, expected) and same_bits(decode(case, strided, schedule), expected)


def test_pages_beyond_32_bit_offsets(device):
    """An element offset of 2**31 and more. Memory that is not touched costs nothing on a CPU, but must be there."""
    if device.type == "cpu" and os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 2**33:
        pytest.skip("needs 8 GiB of memory")
    case = Case((100,), num_heads_q=2, spare_pages=0)
    inputs = make_inputs(case)
    num_blocks = 2**31 // (64 * 576) + 10
    k_cache = torch.empty((num_blocks, 64, 1, 576), dtype=case.dtype, device=device)
    first = num_blocks - inputs.k_cache.shape[0]
    k_cache[first:] = inputs.k_cache.to(device)
    moved = dataclasses.replace(inputs, block_table=torch.where(inputs.block_table < 2, inputs.block_table + first, -1))
    inputs, moved = inputs.to(device), dataclasses.replace(moved.to(device), k_cache=k_cache)
    assert same_bits(decode(case, moved), decode(case, inputs))


@pytest.mark.gpu
def test_cuda_graph():
    """A captured call replays on new values in the same tensors, schedule included."""
    device = torch.device("cuda", 0)
    case = dataclasses.replace(MIXED, spare_columns=40)
    inputs = make_inputs(case).to(device)
    decode(case, inputs)  # loads the module
    graph = torch.cuda.CUDAGraph()
    sched_meta, _ = flash_mla.get_mla_metadata()
    arguments = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, sched_meta, None)
    with torch.cuda.graph(graph):
        out, lse = flash_mla.flash_mla_with_kvcache(*arguments, causal=case.causal)
    for lengths in (case.lengths, (1, 2, 63, 1000, 90)):
        changed = dataclasses.replace(case, lengths=lengths, spare_columns=0)
        fresh = make_inputs(changed).to(device)
        inputs.cache_seqlens.copy_(fresh.cache_seqlens)
        inputs.q.copy_(fresh.q)
        columns = fresh.block_table.shape[1]
        inputs.block_table[:, :columns] = fresh.block_table
        num_blocks = min(fresh.k_cache.shape[0], inputs.k_cache.shape[0])
        inputs.k_cache[:num_blocks] = fresh.k_cache[:num_blocks]
        graph.replay()
        check_result(out, lse, expect(changed, inputs))


@pytest.mark.gpu
def test_side_stream():
    """The launch goes to torch's current stream: behind work that is queued there, with nothing else in between."""
    device = torch.device("cuda", 0)
    inputs = make_inputs(MIXED).to(device)
    expected = decode(MIXED, inputs)
    later = dataclasses.replace(inputs, q=torch.zeros_like(inputs.q))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        later.q.copy_(inputs.q)
        result = decode(MIXED, later)
        torch.cuda.current_stream().synchronize()
    assert same_bits(result, expected)
