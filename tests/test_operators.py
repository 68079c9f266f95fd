"""torch.compile: the operators it sees, whole graphs without a break, and eager calls that go past the dispatcher."""

import dataclasses
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import tilemla
from cases import Case, make_inputs
from reference import check_result, reference_of

CASE = Case(lengths=(300, 0, 64, 1, 700), seq_len_q=2, num_heads_q=4, causal=True, has_sink=True, seed=2)
COPIED = dataclasses.replace(CASE, num_heads_q=6, num_heads_k=2)
OPTIONS = {
    "plain": {},
    "window": dict(window_size=(100, 0)),
    "sink": dict(attn_sink=True),
    "base": dict(lse_base="2"),
    "batch invariant": dict(batch_invariant=True),
}


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same_bits(left, right):
    bits = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(a.contiguous().view(bits[a.element_size()]), b.contiguous().view(bits[b.element_size()]))
        for a, b in zip(left, right, strict=True)
    )


def of(inputs, options):
    return options | (dict(attn_sink=inputs.attn_sink) if "attn_sink" in options else {})


def decode(inputs, *schedule, **options):
    return tilemla.flash_mla_with_kvcache(
        inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, *schedule, causal=True, **options
    )


def plan_and_decode(inputs, **options):
    rows = inputs.q.shape[1] * inputs.q.shape[2] // inputs.k_cache.shape[2]
    schedule = tilemla.get_mla_metadata(inputs.cache_seqlens, rows, inputs.k_cache.shape[2])
    return decode(inputs, *schedule, **options)


def plan_later_and_decode_twice(inputs, **options):
    """As a model of two layers."""
    schedule = tilemla.get_mla_metadata()
    out, _ = decode(inputs, *schedule, **options)
    changed = dataclasses.replace(inputs, q=torch.nn.functional.pad(out, (0, 64)))
    return *decode(changed, *schedule, **options), schedule[0].num_splits


def compile_whole(function, **options):
    return torch.compile(function, fullgraph=True, **({"backend": "aot_eager"} | options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("function", [plan_and_decode, plan_later_and_decode_twice])
def test_whole_graphs(device, function, options):
    inputs = make_inputs(CASE).to(device)
    options = of(inputs, options)
    if options.get("batch_invariant") and function is plan_later_and_decode_twice:
        pytest.skip("a schedule that is ignored is not filled in")
    assert same_bits(compile_whole(function)(inputs, **options), function(inputs, **options))


@pytest.mark.parametrize("case", [CASE, COPIED], ids=str)
def test_compiled_by_inductor_for_batches_of_any_size(device, case):
    """One graph, with what surrounds the call in it."""
    has_compiler = any(map(shutil.which, ("cc", "gcc", "clang")))  # inductor needs one, on a GPU too
    graphs = CompileCounterWithBackend("inductor" if has_compiler else "aot_eager")

    def layer(q, k_cache, block_table, cache_seqlens):
        rows = q.shape[1] * q.shape[2] // k_cache.shape[2]
        schedule = tilemla.get_mla_metadata(cache_seqlens, rows, k_cache.shape[2])
        out, lse = tilemla.flash_mla_with_kvcache(q * 0.5, k_cache, block_table, cache_seqlens, 512, *schedule)
        return out.float() + 1, lse + 1

    compiled = compile_whole(layer, backend=graphs, dynamic=True)
    for lengths in ((300, 0, 64, 1, 700), (65, 1000, 3), (100, 1)):
        inputs = make_inputs(dataclasses.replace(case, lengths=lengths, has_sink=False)).to(device)
        out, lse = compiled(inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
        expected = reference_of(dataclasses.replace(inputs, q=inputs.q * 0.5))
        check_result((out - 1).to(case.dtype), lse - 1, expected)
    assert graphs.frame_count == 1


def test_results_in_place(device):
    inputs = make_inputs(CASE).to(device)
    expected = plan_and_decode(inputs)
    compiled = compile_whole(plan_and_decode)
    for names in (("out", "softmax_lse"), ("out",), ("softmax_lse",)):
        given = {name: torch.full_like(expected[("out", "softmax_lse").index(name)], torch.nan) for name in names}
        result = compiled(inputs, **given)
        assert same_bits(result, expected)
        for name, tensor in given.items():
            assert same_bits([tensor], [expected[("out", "softmax_lse").index(name)]])


def test_a_schedule_that_a_graph_filled_in(device):
    """It is as one that an eager call filled in: for calls like that one, compiled or not."""
    inputs = make_inputs(CASE).to(device)
    compiled = compile_whole(decode)
    schedule = tilemla.get_mla_metadata()
    first = compiled(inputs, *schedule, window_size=(100, 0))
    assert schedule[0].have_initialized and schedule[0].config.window_left == 100
    assert same_bits(decode(inputs, *schedule, window_size=(100, 0)), first)
    with pytest.raises(ValueError, match="calls like the one that filled it in"):
        decode(inputs, *schedule)
    assert same_bits(compiled(inputs, *schedule, window_size=(100, 0)), first)
    with pytest.raises(Exception, match="calls like the one that filled it in|Observed exception"):
        compiled(inputs, *schedule, window_size=(101, 0))


def test_num_splits_left_out(device):
    inputs = make_inputs(CASE).to(device)
    metadata, num_splits = tilemla.get_mla_metadata(inputs.cache_seqlens, 8, 1)
    expected = decode(inputs, metadata, num_splits)
    assert same_bits(compile_whole(decode)(inputs, metadata), expected)


def make_states(device, shape=(3, 2, 5, 512)):
    generator = torch.Generator().manual_seed(1)
    states = []
    for _ in range(2):
        out = torch.randn(shape, generator=generator).bfloat16()
        lse = torch.randn(shape[:3], generator=generator).transpose(1, 2)
        states += [out.to(device), lse.to(device)]
    return states


@pytest.mark.parametrize("base", ["e", "2"])
def test_merge_states(device, base):
    def merge(*states):
        return tilemla.merge_states(*states, lse_base=base)

    states = make_states(device)
    assert same_bits(compile_whole(merge)(*states), merge(*states))


OPERATOR_CALLS = (
    "metadata",
    "metadata of a window",
    "decode",
    "decode with options",
    "decode of copies",
    "decode in place",
    "merge",
)


def operator_calls(device):
    inputs = make_inputs(CASE).to(device)
    copied = make_inputs(COPIED).to(device)
    ops = torch.ops.tilemla
    metadata, num_splits = tilemla.get_mla_metadata(inputs.cache_seqlens, 8, 1)
    tensors = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512)
    plain = (*tensors, metadata, num_splits, None, True, None, -1, -1, "e", False)
    all_options = (*tensors, metadata, None, 0.1, False, inputs.attn_sink, 100, 1, "2", True)
    tensors = (copied.q, copied.k_cache, copied.block_table, copied.cache_seqlens, 512)
    out, lse = torch.ops.tilemla.flash_mla_with_kvcache(*plain)
    return {
        "metadata": (ops.get_mla_metadata, (inputs.cache_seqlens, 8, 1)),
        "metadata of a window": (ops.get_mla_metadata, (inputs.cache_seqlens, 8, 1, 2, 100)),
        "decode": (ops.flash_mla_with_kvcache, plain),
        "decode with options": (ops.flash_mla_with_kvcache, all_options),
        "decode of copies": (ops.flash_mla_with_kvcache, (*tensors, None, None, None, True, None, -1, -1, "e", True)),
        "decode in place": (ops.flash_mla_with_kvcache_out, (*plain, torch.zeros_like(out), torch.zeros_like(lse))),
        "merge": (ops.merge_states, (*make_states(device), "e")),
    }


@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_opcheck(device, name):
    """torch's own checks: the schema, fake tensors that look like real ones, tracing."""
    operator, arguments = operator_calls(device)[name]
    torch.library.opcheck(operator.default, arguments)


def test_errors_of_a_compiled_call(device):
    """They come from the same checks, when the graph runs, or when it is traced."""
    inputs = make_inputs(CASE).to(device)
    narrow = dataclasses.replace(inputs, block_table=inputs.block_table.long())
    with pytest.raises(Exception, match="block_table must be int32"):
        compile_whole(plan_and_decode)(narrow)
    with pytest.raises(Exception, match="is_fp8_kvcache must be left at the default"):
        compile_whole(plan_and_decode)(inputs, is_fp8_kvcache=True)


def test_eager_calls_do_not_pass_the_dispatcher(device):
    """What torch is asked for in between is memory, and on a CPU the values that are checked there."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, _types, arguments=(), named=None):
            seen.append(str(function))
            return function(*arguments, **(named or {}))

    inputs = make_inputs(CASE).to(device)
    plan_and_decode(inputs)
    with Watch():
        plan_and_decode(inputs)
        tilemla.merge_states(*make_states(device))
    assert seen and not [name for name in seen if name.startswith("tilemla")]
