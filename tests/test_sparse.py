"""Decode with indices: every format against float64, whatever names no token poisoned, in whichever way it is split."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilemla
from reference import check_result, check_schedule
from schedules import spread_schedule
from sparse_cases import List, SparseCase, decode_sparse, make_sparse_inputs, num_tokens_of, sparse_reference
from tilemla.launch import num_sms_of

# Every format, and of dense caches every dtype and head dim in some module.
FORMATS = {
    "fp8_656": dict(kv_format="fp8_656", head_dim_qk=576),
    "fp8_584": dict(kv_format="fp8_584", head_dim_qk=512),
    "dense": dict(kv_format="dense", head_dim_qk=576),
    "dense fp16": dict(kv_format="dense", head_dim_qk=512, dtype=torch.float16),
}
by_format = pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))


def check(case, device, schedule=None, **options):
    inputs = make_sparse_inputs(case).to(device)
    out, lse = decode_sparse(case, inputs, schedule, **options)
    check_result(out, lse, sparse_reference(case, inputs))
    return out, lse


def spread(case, num_sm_parts, device):
    """As many splits as there can be."""
    return tuple(torch.from_numpy(array).to(device) for array in spread_schedule(num_tokens_of(case), num_sm_parts))


def lengths_of(topk, batch_size):
    counts = st.sampled_from(sorted({0, 1, min(63, topk), min(64, topk), min(65, topk), topk}))
    return st.one_of(st.none(), st.tuples(*[counts] * batch_size))


@st.composite
def lists(draw, batch_size):
    topk = draw(st.sampled_from((1, 5, 64, 70, 128, 200)))
    page_block_size, num_pages = draw(st.sampled_from(((64, 4), (1, 90), (2, 40), (61, 3), (576, 1))))
    return List(topk, num_pages, page_block_size, draw(lengths_of(topk, batch_size)))


@st.composite
def sparse_cases(draw):
    batch_size = draw(st.integers(1, 3))
    return SparseCase(
        batch_size=batch_size,
        seq_len_q=draw(st.integers(1, 3)),
        num_heads_q=draw(st.sampled_from((1, 3, 16, 17, 33))),
        **draw(st.sampled_from(list(FORMATS.values()))),
        main=draw(lists(batch_size)),
        extra=draw(st.one_of(st.none(), lists(batch_size))),
        has_sink=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from((None, None, 0.1, 0.01, 0.0))),
        q_std=draw(st.sampled_from((1.0, 0.1, 8.0))),
        invalid=draw(st.sampled_from((0.0, 0.2, 0.9, 1.0))),
        padding=draw(st.sampled_from((0, 16))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@given(case=sparse_cases(), num_sm_parts=st.sampled_from((0, 1, 3, 40)))
@settings(max_examples=120)
def test_any(case, num_sm_parts):
    device = torch.device("cpu")
    check(case, device, spread(case, num_sm_parts, device) if num_sm_parts else None)


LENGTHS = SparseCase(
    batch_size=4,
    seq_len_q=2,
    num_heads_q=20,
    main=List(200, 9, 13, (0, 200, 77, 64)),
    extra=List(70, 5, 9, (0, 3, 70, 64)),
)


@by_format
@pytest.mark.parametrize("num_sm_parts", [None, 1, 5, 40])
def test_lists_of_two_caches(device, form, num_sm_parts):
    """The second cache has other pages; the first request has nothing in either."""
    case = dataclasses.replace(LENGTHS, has_sink=True, **form)
    out, lse = check(case, device, None if num_sm_parts is None else spread(case, num_sm_parts, device))
    assert not out[0].any() and torch.isposinf(lse[0]).all()


@by_format
def test_how_it_is_split_changes_rounding_alone(device, form):
    case = dataclasses.replace(LENGTHS, **form)
    inputs = make_sparse_inputs(case).to(device)
    whole = decode_sparse(case, inputs, spread(case, 1, device))
    cut = decode_sparse(case, inputs, spread(case, 40, device))
    again = decode_sparse(case, inputs, spread(case, 40, device))
    assert torch.equal(cut[0], again[0]) and torch.equal(cut[1], again[1])
    torch.testing.assert_close(whole[0].float(), cut[0].float(), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(whole[1], cut[1], atol=1e-5, rtol=1e-5)


@by_format
@pytest.mark.parametrize("index", [-1, -(2**31), 2**31 - 1, None], ids=str)
def test_nothing_is_named(device, form, index):
    """All indices are of no token; None is the first one past the cache. Not a byte of the cache may count."""
    case = dataclasses.replace(LENGTHS, extra=None, main=List(70, 3, 5), has_sink=True, invalid=1.0, **form)
    inputs = make_sparse_inputs(case).to(device)
    inputs.main.indices.fill_(3 * 5 if index is None else index)
    out, lse = decode_sparse(case, inputs)
    assert not out.any() and torch.isposinf(lse).all()


@by_format
def test_a_token_counts_as_often_as_it_is_named(device, form):
    case = SparseCase(main=List(65, 2, 4), invalid=0.0, **form)
    inputs = make_sparse_inputs(case).to(device)
    indices = torch.full_like(inputs.main.indices, -1)
    indices[..., 0], indices[..., 1:] = 3, 7
    inputs.main.indices = indices
    twice = dataclasses.replace(inputs.main, indices=indices.clone())
    twice.indices[..., 40:] = -1
    _, lse = decode_sparse(case, inputs)
    check_result(*decode_sparse(case, inputs), sparse_reference(case, inputs))
    inputs.main = twice
    _, fewer = decode_sparse(case, inputs)
    assert bool((fewer < lse).all())


@by_format
@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=str)
def test_sinks_without_end(device, form, value):
    case = dataclasses.replace(LENGTHS, has_sink=True, **form)
    inputs = make_sparse_inputs(case).to(device)
    inputs.attn_sink.fill_(value)
    out, lse = decode_sparse(case, inputs)
    inputs.attn_sink = None
    without, same_lse = decode_sparse(case, inputs)
    assert torch.equal(lse, same_lse)
    if value < 0:
        assert torch.equal(out, without)
    else:
        assert not out.any() and without.any()


POWERS = (2.0**-126, 2.0**-20, 2.0**10)


@pytest.mark.parametrize(
    ("kv_format", "scale"),
    [
        *(("fp8_656", scale) for scale in (0.0, *POWERS, 2.0**60, 1.5, -2.0, math.inf, math.nan)),
        # e8m0: powers of two alone, from 2**-127 on.
        *(("fp8_584", scale) for scale in (2.0**-127, *POWERS, 2.0**60, math.nan)),
    ],
)
def test_scales(device, kv_format, scale):
    """The scale of a tile is used as it is."""
    if scale == 2.0**60 and device.type == "cuda":
        pytest.skip("score times scale minus maximum is one instruction there, and too exact for scores of 2**50")
    case = SparseCase(num_heads_q=3, main=List(5, 1, 6), invalid=0.0, q_std=2.0**-10, **FORMATS[kv_format])
    inputs = make_sparse_inputs(case).to(device)
    raw = inputs.main.k_cache.view(torch.uint8)
    if kv_format == "fp8_656":
        tile = slice(128, 256)
        raw[..., 516:520] = torch.tensor([scale]).view(torch.uint8).to(device)
    else:
        tile = slice(64, 128)
        raw.as_strided((6,), (8,), 6 * 576 + 1).fill_(255 if math.isnan(scale) else int(math.log2(scale)) + 127)
    if not math.isfinite(scale):
        # What is scaled is above 0 and what it meets below: an infinite scale leaves the other tiles, NaN does not.
        raw.as_strided((6, 64), (656 if kv_format == "fp8_656" else 576, 1), tile.start).fill_(0x38)
        inputs.q.fill_(-1)
    inputs.main.tokens = tilemla.dequantize_k_cache(inputs.main.k_cache, kv_format, torch.float32).flatten(0, 2)
    out, lse = decode_sparse(case, inputs)
    if math.isfinite(scale):
        check_result(out, lse, sparse_reference(case, inputs))
        if scale == 0.0:
            assert bool((out[..., tile] == 0).all())
    else:
        assert torch.isnan(out[..., tile] if math.isinf(scale) else out).all()


@pytest.mark.parametrize("kv_format", ["fp8_656", "fp8_584"])
def test_every_byte_of_e4m3(device, kv_format):
    """Each of the 256 in turn, alone in its token: what comes out is the value."""
    values = torch.arange(256, dtype=torch.uint8, device=device)
    case = SparseCase(256, 1, 1, main=List(1, 256, 1), invalid=0.0, **FORMATS[kv_format])
    inputs = make_sparse_inputs(case).to(device)
    inputs.main.indices = torch.arange(256, dtype=torch.int32, device=device).view(256, 1, 1)
    cache = tilemla.quantize_k_cache(torch.ones((256, 1, 1, case.head_dim_qk), device=device), kv_format)
    raw = cache.view(torch.uint8)
    raw[:, 0, 0, :448] = values[:, None]
    if kv_format == "fp8_656":
        raw[:, 0, 0, 512:528] = torch.ones(4, device=device).view(torch.uint8)
    else:
        raw[:, 0, 0, 576:583] = 127
    inputs.main.k_cache = cache
    inputs.q.zero_()
    out, _ = decode_sparse(case, inputs)
    expected = values.view(torch.float8_e4m3fn).bfloat16()
    is_nan = expected.isnan()
    assert torch.equal(out[:, 0, 0, :448].isnan(), is_nan[:, None].expand(256, 448))
    assert torch.equal(out[~is_nan, 0, 0, :448], expected[~is_nan][:, None].expand(-1, 448))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int8], ids=str)
def test_names_of_a_byte(device, dtype):
    inputs = make_sparse_inputs(LENGTHS).to(device)
    expected = decode_sparse(LENGTHS, inputs)
    inputs.main.k_cache = inputs.main.k_cache.view(dtype)
    for one, other in zip(decode_sparse(LENGTHS, inputs), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "changes",
    [
        dict(batch_size=0, main=List(5, 2, 3)),
        dict(main=List(0, 2, 3)),
        dict(main=List(70, 0, 3)),
        dict(main=List(70, 0, 3), extra=List(5, 2, 3)),
        dict(main=List(5, 2, 3), extra=List(0, 0, 1)),
    ],
    ids=["no request", "no index", "no page", "no page but in the second cache", "nothing in the second cache"],
)
@by_format
def test_there_may_be_nothing(device, form, changes):
    case = SparseCase(**(changes | form))
    out, lse = check(case, device)
    assert out.shape == (case.batch_size, 1, 16, 512) and lse.shape == (case.batch_size, 16, 1)


@pytest.mark.parametrize("lengths", [(-5, 70), (-(2**31), 2**31 - 1), (0, 71)])
def test_lengths_are_held_to_the_list(device, lengths):
    case = SparseCase(main=List(70, 5, 64, lengths))
    inputs = make_sparse_inputs(case).to(device)
    out, lse = decode_sparse(case, inputs)
    inputs.main.lengths = torch.tensor([0, 70], dtype=torch.int32, device=device)
    for one, other in zip(decode_sparse(case, inputs), (out, lse), strict=True):
        assert torch.equal(one, other)


# Schedules


def test_a_schedule_fills_itself_in_and_is_reused(device):
    inputs = make_sparse_inputs(LENGTHS).to(device)
    schedule = tilemla.get_mla_metadata()
    first = decode_sparse(LENGTHS, inputs, schedule)
    sched_meta = schedule[0]
    assert sched_meta.have_initialized and sched_meta.config.topk == 200 and sched_meta.config.extra_topk == 70
    parts = num_sms_of(device) // 2  # two queries, a tile of heads each
    assert sched_meta.tile_scheduler_metadata.shape == (parts, 8)
    tensors = (t.cpu().numpy() for t in (sched_meta.tile_scheduler_metadata, sched_meta.num_splits))
    check_schedule(*tensors, num_tokens_of(LENGTHS))
    made = sched_meta.tile_scheduler_metadata
    second = decode_sparse(LENGTHS, inputs, schedule)
    assert sched_meta.tile_scheduler_metadata is made
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    "changes",
    [
        dict(seq_len_q=1),
        dict(num_heads_q=21),
        dict(kv_format="dense"),
        dict(main=dataclasses.replace(LENGTHS.main, topk=264)),
        dict(main=dataclasses.replace(LENGTHS.main, page_block_size=14)),
        dict(extra=None),
        dict(extra=dataclasses.replace(LENGTHS.extra, topk=71)),
        dict(extra=dataclasses.replace(LENGTHS.extra, page_block_size=8)),
    ],
    ids=str,
)
def test_a_schedule_of_another_call_is_refused(device, changes):
    schedule = tilemla.get_mla_metadata()
    decode_sparse(LENGTHS, make_sparse_inputs(LENGTHS).to(device), schedule)
    other = dataclasses.replace(LENGTHS, **changes)
    with pytest.raises(ValueError, match="must be used for calls like the one that filled it in"):
        decode_sparse(other, make_sparse_inputs(other).to(device), schedule)


def test_a_schedule_of_other_lengths_is_refused():
    """On a CPU: to look at a GPU's schedule would be to wait for it."""
    schedule = tilemla.get_mla_metadata()
    inputs = make_sparse_inputs(LENGTHS)
    decode_sparse(LENGTHS, inputs, schedule)
    inputs.main.lengths[0] = 65
    with pytest.raises(ValueError, match="must be a schedule for these cache_seqlens"):
        decode_sparse(LENGTHS, inputs, schedule)


def test_plans_with_arguments(device):
    """As vLLM plans: for all of topk, before the lists' lengths are known."""
    case = dataclasses.replace(LENGTHS, extra=None)
    inputs = make_sparse_inputs(case).to(device)
    lengths = torch.tensor([5, 0, 10000, 7], dtype=torch.int32, device=device)
    metadata, splits = tilemla.get_mla_metadata(lengths, 2 * 20, 1, 20, True, 200)
    assert metadata.shape == (num_sms_of(device) // 2, 8)
    check_schedule(metadata.cpu().numpy(), splits.cpu().numpy(), [256] * 4)
    expected = sparse_reference(case, inputs)
    check_result(*decode_sparse(case, inputs, (metadata, splits)), expected)
    check_result(*decode_sparse(case, inputs, (metadata, None)), expected)
    by_tokens, _ = tilemla.get_mla_metadata(lengths, 2 * 20, 1, topk=200)
    assert by_tokens.shape == (num_sms_of(device), 8)
    with pytest.raises(ValueError, match="num_heads_q must be a multiple .* got 21"):
        tilemla.get_mla_metadata(lengths, 2 * 20, 1, 21, True, 200)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="must be a schedule for these"):
            decode_sparse(case, inputs, tilemla.get_mla_metadata(lengths, 2 * 20, 1, 20, True, 100))


def test_plans_agree(device):
    """What the first call plans for lists that all count is what a plan with arguments is: here one that cuts."""
    case = dataclasses.replace(LENGTHS, batch_size=1, seq_len_q=1, num_heads_q=64, main=List(512, 9), extra=None)
    inputs = make_sparse_inputs(case).to(device)
    planned, _ = tilemla.get_mla_metadata()
    check_result(*decode_sparse(case, inputs, (planned, None)), sparse_reference(case, inputs))
    lengths = torch.zeros(case.batch_size, dtype=torch.int32, device=device)
    rows = case.seq_len_q * case.num_heads_q
    metadata, splits = tilemla.get_mla_metadata(lengths, rows, 1, case.num_heads_q, True, 512)
    assert splits[1] > 1
    assert torch.equal(planned.tile_scheduler_metadata, metadata) and torch.equal(planned.num_splits, splits)


@by_format
def test_batch_invariance(device, form):
    """A request's bits do not depend on its neighbours, nor on the schedule that is given."""
    case = dataclasses.replace(LENGTHS, main=List(1500, 9, 13), extra=None, batch_size=3, **form)
    inputs = make_sparse_inputs(case).to(device)
    together = decode_sparse(case, inputs, (None, None), batch_invariant=True)
    check_result(*together, sparse_reference(case, inputs))
    inputs.q, inputs.main.indices = inputs.q[1:2], inputs.main.indices[1:2]
    alone = decode_sparse(dataclasses.replace(case, batch_size=1), inputs, batch_invariant=True)
    assert torch.equal(alone[0], together[0][1:2]) and torch.equal(alone[1], together[1][1:2])


# Results


def test_results_in_place(device):
    inputs = make_sparse_inputs(LENGTHS).to(device)
    expected = decode_sparse(LENGTHS, inputs)
    out = torch.full((4, 2, 20, 512), math.nan, dtype=torch.bfloat16, device=device)
    for lse in (torch.full((4, 20, 2), math.nan, device=device), torch.full((4, 2, 20), math.nan).mT.to(device)):
        results = decode_sparse(LENGTHS, inputs, out=out, softmax_lse=lse)
        assert results[0] is out and results[1] is lse
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert expected[1].stride() == (40, 1, 20)


def test_base_of_the_logarithm(device):
    inputs = make_sparse_inputs(LENGTHS).to(device)
    _, natural = decode_sparse(LENGTHS, inputs)
    _, base_2 = decode_sparse(LENGTHS, inputs, lse_base="2")
    torch.testing.assert_close(base_2 * math.log(2.0), natural)


def test_there_is_no_backward_pass(device):
    inputs = make_sparse_inputs(dataclasses.replace(LENGTHS, kv_format="dense")).to(device)
    inputs.q.requires_grad_()
    inputs.main.k_cache.requires_grad_()
    out, lse = decode_sparse(dataclasses.replace(LENGTHS, kv_format="dense"), inputs)
    assert not out.requires_grad and not lse.requires_grad


def test_inference_mode(device):
    inputs = make_sparse_inputs(LENGTHS).to(device)
    with torch.inference_mode():
        inside = decode_sparse(LENGTHS, inputs)
    outside = decode_sparse(LENGTHS, inputs)
    assert torch.equal(inside[0], outside[0]) and torch.equal(inside[1], outside[1])
