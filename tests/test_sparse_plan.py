"""The short way of calls with indices and over fp8 caches that are like one before: same results, same errors."""

import dataclasses

import pytest
import torch

import tilemla
from cases import Case
from schedules import spread_schedule
from sparse_cases import List, SparseCase, decode_sparse, make_sparse_inputs, num_tokens_of
from test_fp8 import decode, decode_e4m3, e4m3, quantised
from tilemla import fp8, interface, sparse

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
CASES = {
    "bytes": SparseCase(3, 2, 16, main=List(500, 9)),
    "pair of tiles": SparseCase(3, 1, 128, main=List(300, 9, lengths=(300, 0, 64))),
    "two caches": SparseCase(2, 2, 64, main=List(200, 9), extra=List(70, 3, lengths=(70, 1)), has_sink=True),
    "584": SparseCase(2, 1, 64, "fp8_584", head_dim_qk=512, main=List(200, 9)),
    "dense": SparseCase(2, 2, 65, "dense", main=List(200, 9), padding=8),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
TABLE = Case((300, 0, 64, 1000), seq_len_q=2, num_heads_q=20, causal=True, has_sink=True)


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setattr(interface, "_plans", {})
    monkeypatch.setattr(sparse, "_plans", {})


@pytest.fixture
def only_plans(monkeypatch):
    """From the moment it is called, a call that does not take the short way fails."""

    def begin():
        def refuse(*_arguments, **_keywords):
            raise AssertionError("the call took the long way")

        for module, name in ((sparse, "check_queries"), (fp8, "check_queries"), (fp8, "check_decode_arguments")):
            monkeypatch.setattr(module, name, refuse)

    return begin


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@by_case
def test_same_bits_as_the_long_way(case, only_plans):
    inputs, others = (
        make_sparse_inputs(case).to(DEVICE),
        make_sparse_inputs(dataclasses.replace(case, seed=1)).to(DEVICE),
    )
    schedule = tilemla.get_mla_metadata()
    expected = decode_sparse(case, inputs, schedule)
    expected_others = decode_sparse(case, others, tilemla.get_mla_metadata())
    assert len(sparse._plans) == 1
    only_plans()
    for _ in range(3):
        results = decode_sparse(case, inputs, schedule)
        assert same(results, expected)
        for result, long in zip(results, expected, strict=True):
            assert (result.shape, result.stride(), result.dtype) == (long.shape, long.stride(), long.dtype)
    # Lengths of a list decide on the schedule.
    if case.main.lengths is None and case.extra is None:
        assert same(decode_sparse(case, others, schedule), expected_others)


@by_case
def test_results_in_place(case, only_plans):
    inputs = make_sparse_inputs(case).to(DEVICE)
    schedule = tilemla.get_mla_metadata()
    expected = decode_sparse(case, inputs, schedule)
    out, lse = (torch.full_like(result, 77) for result in expected)
    only_plans()
    results = decode_sparse(case, inputs, schedule, out=out, softmax_lse=lse)
    assert results[0] is out and results[1] is lse and same(results, expected)


def test_a_plan_is_for_one_kind_of_call(only_plans):
    case = CASES["bytes"]
    inputs = make_sparse_inputs(case).to(DEVICE)
    schedule = tilemla.get_mla_metadata()
    natural = decode_sparse(case, inputs, schedule)
    base_2 = decode_sparse(case, inputs, schedule, lse_base="2")
    doubled = decode_sparse(dataclasses.replace(case, softmax_scale=0.5), inputs, schedule)
    fewer = dataclasses.replace(inputs, main=dataclasses.replace(inputs.main, indices=inputs.main.indices[..., :64]))
    short = decode_sparse(case, fewer)
    assert len(sparse._plans) == 4
    only_plans()
    assert same(decode_sparse(case, inputs, schedule), natural)
    assert same(decode_sparse(case, inputs, schedule, lse_base="2"), base_2)
    assert same(decode_sparse(dataclasses.replace(case, softmax_scale=0.5), inputs, schedule), doubled)
    assert not torch.equal(natural[1], base_2[1]) and not torch.equal(natural[1], doubled[1])
    with pytest.raises(AssertionError, match="the long way"):  # a schedule of its own has yet to be made
        decode_sparse(case, fewer)
    assert not torch.equal(short[0], natural[0])


def test_a_larger_schedule_takes_the_long_way():
    case = CASES["bytes"]
    inputs = make_sparse_inputs(case).to(DEVICE)
    few, many = (
        tuple(torch.from_numpy(array).to(DEVICE) for array in spread_schedule(num_tokens_of(case), parts))
        for parts in (2, 9)
    )
    first = decode_sparse(case, inputs, few)
    several = decode_sparse(case, inputs, many)
    torch.testing.assert_close(several[1], first[1])
    ((plan, _),) = sparse._plans.values()
    assert plan.num_sm_parts == 9


def every_second(tensor):
    """The same values, apart in the last dimension."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


BAD = {
    "indices dtype": ("indices", lambda x: x.long(), TypeError, "indices must be int32"),
    "indices device": ("indices", lambda x: x.cpu(), ValueError, "indices must be on cuda:0"),
    "indices stride": (
        "indices",
        every_second,
        ValueError,
        "indices must have stride 1",
    ),
    "cache device": ("k_cache", lambda x: x.cpu(), ValueError, "k_cache must be on cuda:0"),
    "lengths": ("topk_length", lambda x: x.long(), TypeError, "topk_length must be int32"),
    "q stride": ("q", every_second, ValueError, "q must have stride 1"),
    "sink": ("attn_sink", lambda x: x.double(), TypeError, "attn_sink must be float32"),
    "metadata": ("tile_scheduler_metadata", lambda x: x.long(), TypeError, "tile_scheduler_metadata must be int32"),
    "splits": ("num_splits", lambda x: x[:-1], ValueError, "num_splits must"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_those_of_the_long_way(name):
    case = SparseCase(3, 2, 64, main=List(200, 9, lengths=(200, 64, 7)), has_sink=True)
    inputs = make_sparse_inputs(case).to(DEVICE)
    metadata, num_splits = tilemla.get_mla_metadata(inputs.main.lengths, 2 * 64, 1, 64, True, 200)
    arguments = dict(
        q=inputs.q,
        k_cache=inputs.main.k_cache,
        block_table=None,
        cache_seqlens=None,
        head_dim_v=512,
        tile_scheduler_metadata=metadata,
        num_splits=num_splits,
        is_fp8_kvcache=True,
        indices=inputs.main.indices,
        topk_length=inputs.main.lengths,
        attn_sink=inputs.attn_sink,
    )
    expected = tilemla.flash_mla_with_kvcache(**arguments)
    changed, change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        tilemla.flash_mla_with_kvcache(**(arguments | {changed: change(arguments[changed])}))
    assert same(tilemla.flash_mla_with_kvcache(**arguments), expected)


def test_bytes_behind_a_table(only_plans):
    inputs, _ = quantised(TABLE, DEVICE)
    schedule = tilemla.get_mla_metadata()
    expected = decode(inputs, TABLE, schedule)
    only_plans()
    assert same(decode(inputs, TABLE, schedule), expected)
    with pytest.raises(AssertionError, match="the long way"):
        decode(dataclasses.replace(inputs, k_cache=inputs.k_cache[:, :, :, :640]), TABLE, schedule)


def test_e4m3_with_other_scales(only_plans):
    case = dataclasses.replace(TABLE, has_sink=False)
    inputs, _ = e4m3(case, DEVICE, 0.5, 0.25)
    schedule = tilemla.get_mla_metadata()
    scales = ((0.5, 0.25), (1.0, 0.25), (None, None))
    expected = [decode_e4m3(inputs, case, each, schedule) for each in scales]
    only_plans()
    for each, result in zip(scales, expected, strict=True):
        assert same(decode_e4m3(inputs, case, each, schedule), result)
    assert not torch.equal(expected[0][0], expected[1][0]) and not torch.equal(expected[0][0], expected[2][0])
