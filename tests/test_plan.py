"""The short way of a call on a GPU that is like one before: same results, same errors, nothing shared wrongly."""

import dataclasses
import threading

import pytest
import torch

import tilemla
from cases import Case, make_inputs
from reference import check_result, reference_of
from tilemla import allocate, interface, plan, schedule, workspace

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
# Long enough that every request is split: results pass through the workspace.
SPLIT = Case((3000, 700), num_heads_q=16)
CASES = [
    SPLIT,
    Case((3000, 0, 65), num_heads_q=6, num_heads_k=2),
    Case((900,), num_heads_q=9, seq_len_q=2),
    Case((100, 7), num_heads_q=1, seq_len_q=3),
]
COPIED = Case((3000, 0, 65), num_heads_q=6, num_heads_k=2, seq_len_q=3)


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    """Begin without plans and scratch memory; results start poisoned on the short way too."""
    fast = allocate.allocator_for(DEVICE)

    def poisoned(shape, strides, dtype):
        tensor = fast(shape, strides, dtype)
        tensor.data.fill_(-12345)  # past autograd, whose count of writes says whether a schedule is as it was made
        return tensor

    monkeypatch.setattr(allocate, "_empty_strided_cuda", poisoned)
    monkeypatch.setattr(interface, "_plans", {})
    monkeypatch.setattr(schedule, "_plans", {})
    monkeypatch.setattr(workspace, "_workspaces", {})


@pytest.fixture
def only_plans(monkeypatch):
    """From the moment it is called, a call that does not take the short way fails."""

    def begin():
        def refuse(*_arguments):
            raise AssertionError("the call took the long way")

        monkeypatch.setattr(interface, "check_and_decode", refuse)
        monkeypatch.setattr(schedule, "check_cache_seqlens", refuse)

    return begin


def count_workspaces():
    return sum(len(by_stream) for by_stream in workspace._workspaces.values())


def decode(inputs, schedule=None, **changes):
    rows = inputs.q.shape[1] * inputs.q.shape[2] // inputs.k_cache.shape[2]
    if schedule is None:
        schedule = tilemla.get_mla_metadata(inputs.cache_seqlens, rows, inputs.k_cache.shape[2])
    arguments = dict(
        q=inputs.q,
        k_cache=inputs.k_cache,
        block_table=inputs.block_table,
        cache_seqlens=inputs.cache_seqlens,
        head_dim_v=512,
        tile_scheduler_metadata=schedule[0],
        num_splits=schedule[1],
        causal=True,
    )
    return tilemla.flash_mla_with_kvcache(**(arguments | changes))


def on_gpu(case, seed=0):
    return make_inputs(dataclasses.replace(case, seed=seed)).to(DEVICE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_as_the_long_way(case, only_plans):
    first, second = on_gpu(case), on_gpu(case, seed=1)
    expected = [decode(inputs) for inputs in (first, second)]
    assert len(interface._plans) == 1
    only_plans()
    for inputs, (out, lse) in zip((first, second), expected, strict=True):
        again, lse_again = decode(inputs)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)
        assert (
            again.data_ptr() != out.data_ptr() and again.stride() == out.stride() and lse_again.stride() == lse.stride()
        )
        check_result(again, lse_again, reference_of(inputs, causal=True))


def test_schedule_that_fills_itself_in(only_plans):
    inputs = on_gpu(SPLIT)
    schedule = tilemla.get_mla_metadata()
    out, _ = decode(inputs, schedule)  # fills it in
    decode(inputs, schedule)
    only_plans()
    assert torch.equal(decode(inputs, schedule)[0], out)


def test_narrower_block_table_and_strided_queries(only_plans):
    inputs = on_gpu(SPLIT)
    out, _ = decode(inputs)
    only_plans()
    width = -(-max(SPLIT.lengths) // 64)
    wide = torch.zeros((2, 1, 16, 2 * 576), dtype=inputs.q.dtype, device=DEVICE)
    wide[..., :576] = inputs.q
    assert torch.equal(decode(inputs, block_table=inputs.block_table[:, :width], q=wide[..., :576])[0], out)


def test_heads_that_strides_cannot_fold():
    """Several KV heads and several queries; queries whose heads lie apart: no plan is kept, or it does not serve."""
    for _ in range(2):
        inputs = on_gpu(COPIED)
        check_result(*decode(inputs), reference_of(inputs, causal=True))
    assert not interface._plans
    inputs = on_gpu(CASES[2])
    out, lse = decode(inputs)
    for _ in range(2):
        again, lse_again = decode(inputs, q=inputs.q.transpose(1, 2).contiguous().transpose(1, 2))
        assert torch.equal(out, again) and torch.equal(lse, lse_again)


def test_the_same_address_with_another_shape(only_plans):
    """Memory is used again: what was seen at an address before says nothing about the next tensor there."""
    first, second = on_gpu(SPLIT), on_gpu(SPLIT, seed=1)
    expected = [decode(inputs)[0] for inputs in (first, second)]
    k_cache = torch.cat([first.k_cache] * 2)
    only_plans()
    q = torch.zeros((2, 1, 32, 576), dtype=first.q.dtype, device=DEVICE)
    shuffle = torch.randperm(len(k_cache), device=DEVICE)
    for inputs, right in zip((first, second), expected, strict=True):
        packed, spread = q.view(-1)[: inputs.q.numel()].view(inputs.q.shape), q[:, :, ::2]
        k_cache[: len(inputs.k_cache)] = inputs.k_cache
        for view in (packed, spread):
            view.copy_(inputs.q)
            for cache in (k_cache, k_cache[: len(inputs.k_cache)]):
                assert torch.equal(decode(inputs, q=view, k_cache=cache)[0], right)
        moved = torch.empty_like(k_cache)
        moved[shuffle] = k_cache
        table = inputs.block_table.clone()
        valid = (table >= 0) & (table < len(shuffle))
        table[valid] = shuffle[table[valid].long()].int()
        assert torch.equal(decode(inputs, k_cache=moved, block_table=table)[0], right)


def test_schedules_are_not_mixed_up(only_plans):
    """A larger schedule than the plan was made for, one for another batch, and one that is too short."""
    inputs = on_gpu(SPLIT)
    metadata, num_splits = tilemla.get_mla_metadata(inputs.cache_seqlens, 16, 1)
    out, _ = decode(inputs, (metadata, num_splits))
    idle = torch.zeros_like(metadata)
    idle[:, 0] = len(SPLIT.lengths)
    idle[:, 1] = len(SPLIT.lengths) - 1
    padded = torch.cat([metadata, idle, idle, idle])
    for _ in range(2):
        assert torch.equal(decode(inputs, (padded, num_splits))[0], out)
    with pytest.raises(ValueError, match="num_splits must have at least"):
        decode(inputs, (metadata, num_splits[:-1]))
    only_plans()
    assert torch.equal(decode(inputs, (metadata, torch.cat([num_splits, num_splits])))[0], out)


def test_a_schedule_that_filled_itself_in_serves_only_its_kind():
    inputs = on_gpu(CASES[2])
    filled = tilemla.get_mla_metadata()
    decode(inputs, filled)
    decode(inputs, causal=False)
    with pytest.raises(ValueError, match="tile_scheduler_metadata must be used for calls like"):
        decode(inputs, filled, causal=False)


def test_metadata_by_the_short_way(only_plans):
    lengths = torch.tensor([3000, 0, 65], dtype=torch.int32, device=DEVICE)
    expected = [tilemla.get_mla_metadata(one, 16, 1) for one in (lengths, lengths.flip(0))]
    with pytest.raises(TypeError, match="cache_seqlens must be int32"):
        tilemla.get_mla_metadata(lengths.long(), 16, 1)
    with pytest.raises(ValueError, match="cache_seqlens must be contiguous"):
        tilemla.get_mla_metadata(lengths.repeat_interleave(2)[::2], 16, 1)
    with pytest.raises(TypeError, match="num_heads_k must be an int"):
        tilemla.get_mla_metadata(lengths, 16, 1.0)
    only_plans()
    for one, schedule_of in zip((lengths, lengths.flip(0)), expected, strict=True):
        again = tilemla.get_mla_metadata(one, 16, 1)
        assert all(torch.equal(a, b) for a, b in zip(again, schedule_of, strict=True))


def test_table_without_columns():
    inputs = on_gpu(SPLIT)
    decode(inputs)
    out, lse = decode(
        inputs, block_table=inputs.block_table[:, :0], cache_seqlens=torch.zeros_like(inputs.cache_seqlens)
    )
    assert not out.any() and torch.isposinf(lse).all()


def test_queries_that_tma_cannot_read_are_refused_all_the_same():
    inputs = on_gpu(SPLIT)
    decode(inputs)
    shifted = torch.empty(inputs.q.numel() + 1, dtype=inputs.q.dtype, device=DEVICE)[1:].view(inputs.q.shape)
    with pytest.raises(ValueError, match="q must start at a multiple of 16 bytes"):
        decode(inputs, q=shifted)


def test_options_by_the_short_way(only_plans):
    """Each option has a plan of its own, and results in place need none."""
    inputs = on_gpu(SPLIT)
    sink = torch.linspace(-3, 3, 16, device=DEVICE)
    asked = [{}, dict(attn_sink=sink), dict(window_size=(900, 0)), dict(lse_base="2")]
    expected = [decode(inputs, **options) for options in asked]
    assert len(interface._plans) == len(asked)
    schedule = tilemla.get_mla_metadata()
    decode(inputs, schedule, window_size=(900, 0))
    alone, _ = tilemla.get_mla_metadata(inputs.cache_seqlens, 16, 1)
    only_plans()
    for options, (out, lse) in zip(asked, expected, strict=True):
        into = torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)
        for given in ({}, dict(out=into[0]), dict(out=into[0], softmax_lse=into[1])):
            again = decode(inputs, **options, **given)
            assert torch.equal(again[0], out) and torch.equal(again[1], lse)
        assert again[0] is into[0] and again[1] is into[1]
        assert torch.equal(decode(inputs, (alone, None), **options)[0], out)
    assert torch.equal(decode(inputs, (alone, None))[0], expected[0][0])
    check_result(*decode(inputs, schedule, window_size=(900, 0)), reference_of(inputs, causal=True, window=(900, 0)))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(block_table=lambda x: x.long()), TypeError, "block_table must be int32"),
        (dict(cache_seqlens=lambda x: x.cpu()), ValueError, "cache_seqlens must be on cuda:0"),
        (dict(cache_seqlens=lambda x: x.repeat_interleave(2)[::2]), ValueError, "cache_seqlens must be contiguous"),
        (dict(block_table=lambda x: x.T.contiguous().T), ValueError, "block_table must have stride 1"),
        (dict(k_cache=lambda x: x.half()), TypeError, "k_cache must be torch.bfloat16"),
        (dict(num_splits=lambda x: x.float()), TypeError, "num_splits must be int32"),
        (
            dict(tile_scheduler_metadata=lambda x: x.T.contiguous().T),
            ValueError,
            "tile_scheduler_metadata must be cont",
        ),
        (dict(causal=lambda x: 1), TypeError, "causal must be a bool"),
        (dict(head_dim_v=lambda x: 512.0), TypeError, "head_dim_v must be an int"),
        (dict(softmax_scale=lambda x: -1.0), ValueError, "softmax_scale must be finite and not negative"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_the_same_errors(changes, error, words):
    inputs = on_gpu(SPLIT)
    schedule = tilemla.get_mla_metadata(inputs.cache_seqlens, 16, 1)
    for _ in range(2):
        decode(inputs, schedule)
    ((name, change),) = changes.items()
    values = dict(zip(("tile_scheduler_metadata", "num_splits"), schedule, strict=True), causal=True, head_dim_v=512)
    value = change(values[name] if name in values else getattr(inputs, name, None))
    with pytest.raises(error, match=words):
        decode(inputs, schedule, **{name: value})


def test_gradients_are_not_followed():
    inputs = on_gpu(SPLIT)
    out, _ = decode(inputs)
    again, _ = decode(inputs, q=inputs.q.clone().requires_grad_(), k_cache=inputs.k_cache.clone().requires_grad_())
    assert torch.equal(again, out) and not again.requires_grad


def test_workspaces_are_kept_for_each_stream_and_given_back():
    inputs = on_gpu(SPLIT)
    for _ in range(3):
        decode(inputs)
    assert count_workspaces() == 1
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decode(inputs)
    assert count_workspaces() == 2
    torch.cuda.synchronize()
    workspace.release_workspaces()
    assert count_workspaces() == 0
    decode(inputs)
    assert count_workspaces() == 1


def test_streams_do_not_disturb_each_other():
    inputs = [on_gpu(SPLIT, seed) for seed in range(2)]
    expected = [decode(one)[0] for one in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    schedules = [tilemla.get_mla_metadata(one.cache_seqlens, 16, 1) for one in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for one, stream, pair in zip(inputs, streams, schedules, strict=True):
            with torch.cuda.stream(stream):
                results.append(decode(one, pair)[0])
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_threads_on_one_stream():
    inputs = [on_gpu(SPLIT, seed) for seed in range(4)]
    expected = [decode(one)[0] for one in inputs]
    wrong = []

    def work(one, right):
        schedule = tilemla.get_mla_metadata(one.cache_seqlens, 16, 1)
        for _ in range(100):
            out, _ = decode(one, schedule)
            if not torch.equal(out, right):
                wrong.append(one)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_graph_has_memory_of_its_own():
    """Replays beside eager calls on another stream, both through split requests."""
    captured, eager = on_gpu(SPLIT), on_gpu(SPLIT, seed=1)
    schedules = [tilemla.get_mla_metadata(one.cache_seqlens, 16, 1) for one in (captured, eager)]
    expected = [decode(one, schedule)[0] for one, schedule in zip((captured, eager), schedules, strict=True)]
    torch.cuda.synchronize()
    before = count_workspaces()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = decode(captured, schedules[0])
    assert count_workspaces() == before
    side = torch.cuda.Stream()
    for _ in range(50):
        out.fill_(torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            graph.replay()
        result, _ = decode(eager, schedules[1])
        torch.cuda.synchronize()
        assert torch.equal(out, expected[0]) and torch.equal(result, expected[1])


def test_plans_are_not_kept_without_bound(monkeypatch):
    monkeypatch.setattr(plan, "MAX_PLANS", 2)
    for batch_size in (1, 2, 3, 4):
        decode(on_gpu(Case((100,) * batch_size, num_heads_q=4)))
        assert len(interface._plans) <= 2 and len(schedule._plans) <= 2
