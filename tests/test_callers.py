"""The call forms of those who call FlashMLA: vLLM, SGLang, upstream's own examples, in our own words."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_calls
import tilemla
from cases import Case, make_inputs
from reference import check_result, reference_of
from schedules import spread_schedule
from tilemla import given as given_schedule
from tilemla.launch import num_sms_of
from tilemla.schedule import derive_num_splits

CASE = Case(lengths=(300, 0, 64, 1, 1500), num_heads_q=16, causal=True, seed=4)
SPECULATIVE = dataclasses.replace(CASE, seq_len_q=2, num_heads_q=8)


def same_bits(left, right):
    bits = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(a.contiguous().view(bits[a.element_size()]), b.contiguous().view(bits[b.element_size()]))
        for a, b in zip(left, right, strict=True)
    )


def expect(case, inputs):
    return reference_of(inputs, causal=case.causal)


def spread(case, num_sm_parts, device):
    """The schedule that splits most, as tensors that get_mla_metadata did not make."""
    return tuple(torch.from_numpy(array).to(device) for array in spread_schedule(case.lengths, num_sm_parts))


def plain(case, inputs, schedule, **options):
    """The published tuple form."""
    return tilemla.flash_mla_with_kvcache(
        inputs.q,
        inputs.k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        512,
        *schedule,
        causal=case.causal,
        **options,
    )


# vLLM


class Vllm:
    """A decode step: planned once from lengths that lie on the device, run for each layer, all by keyword."""

    def __init__(self, case, inputs):
        self.inputs = inputs
        # (tokens, num_heads_q, head_dim), and a cache without a dimension for its one head.
        self.tokens = inputs.q.flatten(0, 1)
        self.cache = inputs.k_cache.squeeze(-2)
        self.scale = case.scale
        tokens_per_head = case.seq_len_q * case.num_heads_q // 1
        self.planned, _ = tilemla.get_mla_metadata(inputs.cache_seqlens, tokens_per_head, 1, is_fp8_kvcache=False)

    def layer(self):
        num_decodes = self.inputs.cache_seqlens.shape[0]
        out, lse = tilemla.flash_mla_with_kvcache(
            q=self.tokens.view(num_decodes, -1, *self.tokens.shape[1:]),
            k_cache=self.cache.unsqueeze(-2),
            block_table=self.inputs.block_table,
            cache_seqlens=self.inputs.cache_seqlens,
            head_dim_v=512,
            tile_scheduler_metadata=self.planned,
            softmax_scale=self.scale,
            causal=True,
            is_fp8_kvcache=False,
        )
        return out, lse

    def ask_for_batch_invariance(self):
        """By hand, in the order of older kernels: begin, begin_block, end, end_block, begin_split, and zeros."""
        device, batch_size = self.inputs.q.device, len(self.inputs.cache_seqlens)
        by_hand = torch.zeros((1, 8), dtype=torch.int32, device=device)
        by_hand[0, 2] = batch_size - 1
        by_hand[0, 3] = self.inputs.block_table.shape[-1] // 64
        no_splits = torch.zeros(batch_size + 1, dtype=torch.int32, device=device)
        self.planned.tile_scheduler_metadata, self.planned.num_splits = by_hand, no_splits


@pytest.mark.parametrize("case", [CASE, SPECULATIVE], ids=str)
@pytest.mark.parametrize("inference_mode", [False, True])
def test_vllm(device, case, inference_mode):
    inputs = make_inputs(case).to(device)
    with torch.inference_mode(inference_mode):
        step = Vllm(case, inputs)
        layers = [step.layer() for _ in range(3)]
    check_result(*layers[0], expect(case, inputs))
    assert all(same_bits(layer, layers[0]) for layer in layers)
    rows = case.seq_len_q * case.num_heads_q
    assert same_bits(layers[0], plain(case, inputs, tilemla.get_mla_metadata(inputs.cache_seqlens, rows, 1)))


@pytest.mark.parametrize("inference_mode", [False, True])
def test_num_splits_are_not_derived_for_every_layer(device, monkeypatch, inference_mode):
    """They hang on what get_mla_metadata returned."""

    def refuse(*_arguments):
        raise AssertionError("derived")

    monkeypatch.setattr(given_schedule, "derive_num_splits", refuse)
    with torch.inference_mode(inference_mode):
        Vllm(CASE, make_inputs(CASE).to(device)).layer()


@pytest.mark.parametrize("form", ["tensor", "object"])
def test_what_is_assigned_is_honoured(device, form):
    """As vLLM assigns the plan of another function: to a tensor or an object, before its first call or after it."""
    inputs = make_inputs(CASE).to(device)
    metadata, num_splits = spread(CASE, 8, device)
    expected = plain(CASE, inputs, (metadata, num_splits))
    uncut = plain(CASE, inputs, spread(CASE, 1, device)) if device.type == "cpu" else None
    step = Vllm(CASE, inputs)
    if form == "object":
        step.planned, _ = tilemla.get_mla_metadata()
    for is_used in (False, True):
        if is_used:
            step.planned = tilemla.get_mla_metadata()[0] if form == "object" else step.planned.clone()
            step.layer()
        step.planned.tile_scheduler_metadata = metadata
        step.planned.num_splits = num_splits
        for _ in range(2):
            assert same_bits(step.layer(), expected)
        # It is for no kind of call in particular.
        assert same_bits(plain(CASE, inputs, (step.planned,), window_size=(10**6, 0)), expected)
    assert uncut is None or not same_bits(uncut, expected)
    step.planned.num_splits = None  # left out here too
    assert same_bits(step.layer(), expected)
    step.planned.num_splits = num_splits[:-1]
    with pytest.raises(ValueError, match="num_splits must have at least batch_size . 1 = 6 elements"):
        step.layer()


@pytest.mark.parametrize("form", ["tensor", "object", "two tensors"])
@pytest.mark.parametrize("case", [CASE, SPECULATIVE, dataclasses.replace(CASE, lengths=(700,))], ids=str)
def test_batch_invariance_as_vllm_asks_for_it(device, form, case):
    """Detected: what is written by hand is no schedule in today's order, and says no more than that."""
    inputs = make_inputs(case).to(device)
    expected = plain(case, inputs, tilemla.get_mla_metadata(), batch_invariant=True)
    check_result(*expected, expect(case, inputs))
    step = Vllm(case, inputs)
    if form == "object":
        step.planned, _ = tilemla.get_mla_metadata()
    for _ in range(2):  # it is written anew for each layer
        step.ask_for_batch_invariance()
        if form == "two tensors":  # as before it was assigned
            by_hand = step.planned.tile_scheduler_metadata, step.planned.num_splits
            assert same_bits(plain(case, inputs, by_hand), expected)
        else:
            assert same_bits(step.layer(), expected)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("lengths", [(300, 0, 64), (500,)], ids=str)
def test_a_schedule_of_one_part_is_none_of_that(device, lengths, monkeypatch):
    """Where values can be looked at."""

    def refuse(*_arguments, **_options):
        raise AssertionError("taken for a wish for batch invariance")

    monkeypatch.setattr("tilemla.interface.make_batch_invariant_schedule", refuse)
    case = dataclasses.replace(CASE, lengths=lengths)
    inputs = make_inputs(case)
    check_result(*plain(case, inputs, spread(case, 1, device)), expect(case, inputs))


# num_splits


def test_plans_within_graphs(monkeypatch):
    """One for each graph and its lengths, however many layers; without knowing the graph, one for each call."""
    made = []

    def make(*_arguments, **_options):
        made.append((torch.empty(8, 8), torch.empty(6)))
        return made[-1]

    monkeypatch.setattr(given_schedule, "make_schedule", make)
    lengths, other_lengths = torch.ones(5, dtype=torch.int32), torch.ones(5, dtype=torch.int32)
    config = given_schedule.ScheduleConfig(5, 1, 16, 1, 64, False, lengths.device, -1)
    planned = torch.empty(8, 8)

    def plan(graph, lengths=lengths, config=config):
        monkeypatch.setattr(given_schedule, "capture_id", lambda: graph)
        return given_schedule._make_in_graph(planned, lengths, config, 8)

    assert plan(7) is plan(7) is made[0]
    assert plan(8) is plan(8) is made[1]
    assert plan(8, other_lengths) is made[2]
    assert plan(8, other_lengths, config._replace(window_left=3)) is made[3]
    assert plan(None) is made[4] and plan(None) is made[5] and len(made) == 6


@given(
    lengths=st.lists(st.one_of(st.sampled_from((0, 1, 64, 65)), st.integers(0, 3000)), min_size=1, max_size=20),
    num_sm_parts=st.integers(1, 140),
    stale_batch=st.integers(0, 40),
)
@settings(max_examples=60)
def test_derived_num_splits(lengths, num_sm_parts, stale_batch):
    """With idle parts of this batch and of another one behind it."""
    metadata, num_splits = spread_schedule(lengths, num_sm_parts)
    stale = np.tile(np.array([[stale_batch, stale_batch - 1, 0, 0, 0, 0, 0, 0]], dtype=np.int32), (3, 1))
    derived = derive_num_splits(torch.from_numpy(np.concatenate([metadata, stale])), len(lengths))
    assert derived.dtype is torch.int32
    np.testing.assert_array_equal(derived.numpy(), num_splits)


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("through", ["tensor", "view"])
def test_num_splits_of_a_schedule_that_was_written_to(device, inference_mode, through):
    """A buffer that get_mla_metadata once returned, for another batch: what came with it then is out of date."""
    inputs = make_inputs(CASE).to(device)
    metadata, num_splits = spread(CASE, num_sms_of(device), device)
    expected = plain(CASE, inputs, (metadata, num_splits))
    with torch.inference_mode(inference_mode):
        buffer, stale = tilemla.get_mla_metadata(torch.ones_like(inputs.cache_seqlens), 16, 1)
        for _ in range(2):
            (buffer if through == "tensor" else buffer[:]).copy_(metadata)
            assert not torch.equal(stale, num_splits)
            assert same_bits(plain(CASE, inputs, (buffer,)), expected)
            assert same_bits(plain(CASE, inputs, (buffer, None)), expected)


def test_num_splits_alone_are_not_enough(device):
    inputs = make_inputs(CASE).to(device)
    with pytest.raises(TypeError, match="tile_scheduler_metadata must be a torch.Tensor .* got NoneType"):
        plain(CASE, inputs, (None, torch.zeros(6, dtype=torch.int32, device=device)))
    with pytest.raises(TypeError, match="tile_scheduler_metadata must be a torch.Tensor .* got NoneType"):
        plain(CASE, inputs, (None, None))
    with pytest.raises(TypeError, match="tile_scheduler_metadata must be int32"):
        plain(CASE, inputs, (torch.zeros(8, 8, device=device),))


# SGLang


class Sglang:
    """Fixed buffers, as large as a CUDA graph may ever need, into which the plan of each batch is copied."""

    def __init__(self, device, max_batch_size, max_pages, num_heads_q):
        self.num_heads_q = num_heads_q
        self.table = torch.full((max_batch_size, max_pages), -1, dtype=torch.int32, device=device)
        ones = torch.ones(max_batch_size, dtype=torch.int32, device=device)
        self.metadata, self.num_splits = tilemla.get_mla_metadata(ones, num_heads_q, 1)
        assert self.metadata.shape == (num_sms_of(device), 8) and self.num_splits.shape == (max_batch_size + 1,)

    def plan(self, lengths, table):
        batch_size, pages = len(lengths), -(-int(lengths.max()) // 64)
        metadata, num_splits = tilemla.get_mla_metadata(lengths.to(torch.int32), self.num_heads_q, 1)
        self.table[:batch_size, :pages].copy_(table[:, :pages])
        self.metadata.copy_(metadata)
        self.num_splits[: batch_size + 1].copy_(num_splits)
        return self.metadata, self.num_splits[: batch_size + 1], self.table[:batch_size, :pages]

    def decode(self, planned, inputs, lengths, scale):
        metadata, num_splits, table = planned
        out, _ = tilemla.flash_mla_with_kvcache(
            q=inputs.q.flatten(1).view(len(lengths), -1, self.num_heads_q, 576),
            k_cache=inputs.k_cache.flatten(0, 1).view(-1, 64, 1, 576),
            block_table=table,
            cache_seqlens=lengths.to(torch.int32),
            head_dim_v=512,
            tile_scheduler_metadata=metadata,
            num_splits=num_splits,
            softmax_scale=scale,
            causal=True,
        )
        return out.view(-1, self.num_heads_q * 512)


def test_sglang(device):
    """Batches of several sizes through the same buffers, the largest first, so that they hold what is out of date."""
    engine = Sglang(device, 7, 60, 16)
    for lengths in ((1500, 20, 3000, 64, 1, 700, 128), (300, 0, 64, 1), (2000,), (65, 1000)):
        case = dataclasses.replace(CASE, lengths=lengths, unused_page_id=-1)
        inputs = make_inputs(case).to(device)
        on_device = inputs.cache_seqlens.long()
        planned = engine.plan(on_device, inputs.block_table)
        assert planned[2].stride() == (60, 1)
        out = engine.decode(planned, inputs, on_device, case.scale)
        expected = expect(case, inputs)
        check_result(out.view(len(lengths), 1, 16, 512), expected.lse.float(), expected)


def test_table_that_begins_anywhere(device):
    """Sliced in both dimensions, from a column that no alignment holds for."""
    inputs = make_inputs(CASE).to(device)
    expected = plain(CASE, inputs, tilemla.get_mla_metadata())
    rows, columns = inputs.block_table.shape
    for row, column in ((0, 1), (1, 3), (2, 0)):
        pool = torch.full((rows + 3, columns + 5), -1, dtype=torch.int32, device=device)
        pool[row : row + rows, column : column + columns] = inputs.block_table
        table = pool[row : row + rows, column : column + columns]
        for _ in range(2):
            assert same_bits(
                plain(CASE, dataclasses.replace(inputs, block_table=table), tilemla.get_mla_metadata()), expected
            )


@pytest.mark.parametrize("width", [1, 3])
def test_lengths_beyond_the_width_of_a_captured_table(device, width):
    """Kernels go on at the row's stride, as a replay needs it: the public call on a CPU refuses such tables."""
    inputs = make_inputs(CASE).to(device)
    expected = kernel_calls.decode(inputs, causal=True)
    narrow = dataclasses.replace(inputs, block_table=inputs.block_table[:, :width])
    result = kernel_calls.decode(narrow, causal=True)
    assert same_bits((result.out, result.lse), (expected.out, expected.lse))
    check_result(result.out, result.lse, expect(CASE, inputs))


# Upstream


def test_object_of_upstream(device):
    inputs = make_inputs(CASE).to(device)
    sched_meta, nothing = tilemla.get_mla_metadata()
    assert nothing is None and type(sched_meta) is tilemla.FlashMLASchedMeta
    fields = ("have_initialized", "config", "tile_scheduler_metadata", "num_splits")
    assert [getattr(sched_meta, field) for field in fields] == [False, None, None, None]
    plain(CASE, inputs, (sched_meta, nothing))
    assert sched_meta.have_initialized and sched_meta.config.batch_size == 5
    assert sched_meta.num_splits.shape == (6,)
    assert "have_initialized=True" in repr(sched_meta) and "batch_size=5" in repr(sched_meta)
    assert tilemla.FlashMLASchedMeta(True, None, 1, 2).num_splits == 2


@pytest.mark.parametrize("arguments", [(16, 1), (16, 1, 16), (16, 1, 16, False), (16, 1, 16, False, None)])
def test_metadata_by_position(device, arguments):
    lengths = torch.tensor([100, 2000], dtype=torch.int32, device=device)
    expected = tilemla.get_mla_metadata(lengths, 16, 1)
    for one, other in zip(tilemla.get_mla_metadata(lengths, *arguments), expected, strict=True):
        assert torch.equal(one, other)


# Sizes


@pytest.mark.parametrize("num_heads_k", [1, 8])
def test_very_large_batch(device, num_heads_k):
    """65,536 requests of 1,024 queries: as many rows as no tile holds, more requests than shared memory."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 3, 65536).astype(np.int32)
    on_device = torch.from_numpy(lengths).to(device)
    metadata, num_splits = tilemla.get_mla_metadata(on_device, 1024 * 128 // num_heads_k, num_heads_k)
    assert metadata.shape == (1, 8)
    assert metadata.tolist() == [[0, 65535, 0, -(-int(lengths[-1]) // 64), 0, 0, 0, 0]]
    assert torch.equal(num_splits.cpu(), torch.arange(65537, dtype=torch.int32))
    assert torch.equal(derive_num_splits(metadata, 65536), num_splits)


def test_many_requests_and_many_queries(device):
    many = Case(tuple(i % 3 for i in range(65536)), num_heads_q=1, spare_columns=0, seed=1)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((65536, 1, 1, 576), generator=generator).to(many.dtype).to(device)
    k_cache = torch.randn((4, 64, 1, 576), generator=generator).to(many.dtype).to(device)
    table = torch.randint(0, 4, (65536, 1), generator=generator).int().to(device)
    lengths = torch.tensor(many.lengths, dtype=torch.int32, device=device)
    out, lse = tilemla.flash_mla_with_kvcache(q, k_cache, table, lengths, 512, *tilemla.get_mla_metadata(lengths, 1, 1))
    checked = torch.tensor([0, 1, 2, 1023, 1024, 32768, 40001, 65534, 65535], device=device)
    sample = dataclasses.replace(
        make_inputs(Case((1,))),
        q=q[checked],
        k_cache=k_cache,
        block_table=table[checked],
        cache_seqlens=lengths[checked],
    )
    check_result(out[checked], lse[checked], reference_of(sample))
    assert not out[::3].any() and torch.isposinf(lse[::3]).all()


def test_many_queries(device):
    case = Case((1500, 100), seq_len_q=1024, num_heads_q=1, causal=True)
    inputs = make_inputs(case).to(device)
    check_result(*plain(case, inputs, tilemla.get_mla_metadata(inputs.cache_seqlens, 1024, 1)), expect(case, inputs))
