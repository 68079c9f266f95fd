"""torch.compile of calls with indices and of appending: whole graphs, and torch's own checks of the operators."""

import dataclasses

import pytest
import torch

import tilemla
from sparse_cases import List, SparseCase, decode_sparse, make_sparse_inputs, require_kernel

CASE = SparseCase(
    batch_size=3, seq_len_q=2, has_sink=True, main=List(70, 3, 8, (70, 0, 5)), extra=List(9, 2, 4, (9, 0, 5))
)


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def inputs(device):
    require_kernel(device, "mla_sparse_decode", CASE.kv_format)
    return make_sparse_inputs(CASE).to(device)


def compile_whole(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def decode(inputs, schedule, **options):
    return tilemla.flash_mla_with_kvcache(
        inputs.q,
        inputs.main.k_cache,
        None,
        None,
        512,
        *schedule,
        None,
        False,
        True,
        inputs.main.indices,
        inputs.attn_sink,
        inputs.extra.k_cache,
        inputs.extra.indices,
        inputs.main.lengths,
        inputs.extra.lengths,
        **options,
    )


def plan_and_decode(inputs, **options):
    return decode(inputs, tilemla.get_mla_metadata(), **options)


def same(left, right):
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("options", [{}, dict(lse_base="2"), dict(batch_invariant=True)], ids=str)
def test_decode(inputs, options):
    assert same(compile_whole(plan_and_decode)(inputs, **options), plan_and_decode(inputs, **options))


def test_a_plan_with_arguments(inputs):
    def plan(lengths):
        return tilemla.get_mla_metadata(lengths, 2 * 16, 1, 16, True, 70)

    assert same(compile_whole(plan)(inputs.main.lengths), plan(inputs.main.lengths))


def test_decode_in_place(inputs):
    expected = plan_and_decode(inputs)
    for name, like in (("out", expected[0]), ("softmax_lse", expected[1])):
        given = torch.full_like(like, torch.nan)
        assert same(compile_whole(plan_and_decode)(inputs, **{name: given}), expected)
        assert torch.equal(given, like)


def test_a_schedule_that_a_graph_filled_in(inputs):
    schedule = tilemla.get_mla_metadata()
    first = compile_whole(decode)(inputs, schedule)
    assert schedule[0].have_initialized and schedule[0].config.topk == 70
    assert same(decode(inputs, schedule), first)
    fewer = dataclasses.replace(inputs.main, indices=inputs.main.indices[..., :64])
    with pytest.raises(Exception, match="calls like the one that filled it in|Observed exception"):
        compile_whole(decode)(dataclasses.replace(inputs, main=fewer), schedule)


def test_errors_of_a_compiled_call(inputs):
    wrong = dataclasses.replace(inputs, main=dataclasses.replace(inputs.main, indices=inputs.main.indices.long()))
    with pytest.raises(Exception, match="indices must be int32"):
        compile_whole(plan_and_decode)(wrong)


def prefill(device):
    require_kernel(device, "mla_sparse_prefill", "dense")
    q = torch.randn((3, 5, 576), device=device).bfloat16()
    kv = torch.randn((40, 1, 576), device=device).bfloat16()
    return q, kv, torch.randint(-2, 42, (3, 1, 70), dtype=torch.int32, device=device), 0.05


def test_prefill(device):
    arguments = prefill(device)
    assert same(compile_whole(tilemla.flash_mla_sparse_fwd)(*arguments), tilemla.flash_mla_sparse_fwd(*arguments))


def appending(device):
    require_kernel(device, "mla_sparse_decode", "fp8_656")
    latent = torch.randn((3, 576), device=device).bfloat16()
    k_cache = torch.zeros((2, 4, 1, 656), dtype=torch.uint8, device=device)
    return latent, k_cache, torch.tensor([7, -1, 2], device=device)


def test_append(device):
    latent, k_cache, slots = appending(device)
    other = k_cache.clone()
    tilemla.append_k_cache(latent, k_cache, slots)
    compile_whole(tilemla.append_k_cache)(latent, other, slots)
    assert k_cache.any() and torch.equal(k_cache, other)


def test_opcheck(inputs):
    ops, device = torch.ops.tilemla, inputs.q.device
    lists = (inputs.main.lengths, inputs.extra.indices, inputs.extra.lengths)
    torch.library.opcheck(ops.get_mla_metadata_of_indices.default, (inputs.main.indices, 16, *lists))
    decode_arguments = (
        inputs.q,
        inputs.main.k_cache.view(torch.uint8),
        512,
        *ops.get_mla_metadata_of_indices(inputs.main.indices, 16, *lists),
        None,
        True,
        inputs.main.indices,
        inputs.attn_sink,
        inputs.extra.k_cache.view(torch.uint8),
        inputs.extra.indices,
        inputs.main.lengths,
        inputs.extra.lengths,
        "e",
        False,
    )
    torch.library.opcheck(ops.flash_mla_with_indices.default, decode_arguments)
    out, lse = decode_sparse(CASE, inputs)
    results = (torch.zeros_like(out), torch.zeros_like(lse))
    torch.library.opcheck(ops.flash_mla_with_indices_out.default, (*decode_arguments, *results))
    torch.library.opcheck(ops.append_k_cache.default, appending(device))
    torch.library.opcheck(ops.flash_mla_sparse_fwd.default, (*prefill(device), 512, None, None))
