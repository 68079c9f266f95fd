"""Windows, sinks, results in place, the base of the log-sum-exp and batch invariance, asked for in a public call."""

import dataclasses
import math

import pytest
import torch

import tilemla
from cases import Case, make_inputs
from reference import check_result, check_schedule, reference_of
from tilemla.launch import Kernels
from tilemla.options import UNLIMITED, Options, Traits
from tilemla.plan import DecodePlan
from tilemla.spec import KernelSpec

# Queries and heads that strides fold, and those that are copied.
FOLDED = Case(lengths=(700, 0, 65, 1), seq_len_q=3, num_heads_q=4, seed=6)
COPIED = Case(lengths=(700, 0, 64, 130), seq_len_q=3, num_heads_q=6, num_heads_k=2, seed=5)
CASES = [FOLDED, COPIED]


def decode(case, inputs, schedule=None, **options):
    schedule = schedule or tilemla.get_mla_metadata()
    return tilemla.flash_mla_with_kvcache(
        inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, *schedule, None, case.causal, **options
    )


def tuple_form(case, inputs):
    rows = case.seq_len_q * case.num_heads_q // case.num_heads_k
    return tilemla.get_mla_metadata(inputs.cache_seqlens, rows, case.num_heads_k)


def same_bits(left, right):
    bits = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(a.contiguous().view(bits[a.element_size()]), b.contiguous().view(bits[b.element_size()]))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("window", [(0, 0), (63, 1), (64, -1), (200, 5), (-1, 1), [10, 0], (10**12, 10**12)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_window(device, case, window, causal):
    """Pages before the window are not in the table, whether or not the schedule knows of the window."""
    case = dataclasses.replace(case, window=tuple(window), causal=causal)
    inputs = make_inputs(case).to(device)
    expected = reference_of(inputs, causal=causal, window=case.window)
    for schedule in (None, tuple_form(case, inputs)):
        check_result(*decode(case, inputs, schedule, window_size=window), expected)


def test_a_schedule_that_fills_itself_in_covers_the_window_alone(device):
    case = Case(lengths=(5000, 0, 65, 3000), num_heads_q=4, window=(100, -1))
    inputs = make_inputs(case).to(device)
    schedule = tilemla.get_mla_metadata()
    decode(case, inputs, schedule, window_size=case.window)
    tensors = (t.cpu().numpy() for t in (schedule[0].tile_scheduler_metadata, schedule[0].num_splits))
    check_schedule(*tensors, case.lengths, first_blocks=[max(n - 101, 0) // 64 for n in case.lengths])


@pytest.mark.parametrize(("first", "then"), [((100, 0), UNLIMITED), (UNLIMITED, (100, 0)), ((100, 0), (101, 0))])
def test_a_schedule_for_another_window_is_refused(device, first, then):
    """One that covers less than the call sees would leave tokens out."""
    inputs = make_inputs(FOLDED).to(device)
    schedule = tilemla.get_mla_metadata()
    for _ in range(2):  # the second call is like one that was checked
        decode(FOLDED, inputs, schedule, window_size=first)
        decode(FOLDED, inputs, schedule, window_size=(first[0], 1))  # how far it goes to the right changes no block
        with pytest.raises(ValueError, match=f"calls like the one .*window_left={first[0]}.* got .*_left={then[0]}"):
            decode(FOLDED, inputs, schedule, window_size=then)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_schedule_of_another_window_in_the_tuple_form(device):
    """Where values can be looked at, it is refused too."""
    inputs = make_inputs(FOLDED).to(device)
    schedule = tilemla.get_mla_metadata()
    decode(FOLDED, inputs, schedule, window_size=(100, 0))
    with pytest.raises(ValueError, match="made for other cache_seqlens, or another window"):
        decode(FOLDED, inputs, (schedule[0].tile_scheduler_metadata, schedule[0].num_splits))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sink(device, case):
    case = dataclasses.replace(case, has_sink=True)
    inputs = make_inputs(case).to(device)
    assert {math.inf, -math.inf} <= set(inputs.attn_sink.tolist())
    without = decode(case, inputs)
    out, lse = decode(case, inputs, attn_sink=inputs.attn_sink)
    check_result(out, lse, reference_of(inputs))
    assert same_bits([lse], without[1:])
    untouched = inputs.attn_sink == -math.inf
    assert same_bits([out[:, :, untouched]], [without[0][:, :, untouched]])
    again = decode(case, inputs, attn_sink=inputs.attn_sink.clone().requires_grad_())
    assert same_bits(again, (out, lse))


def test_calls_with_and_without_options_are_not_mixed_up(device):
    """The same tensors, and one option after the other: what a call before asked for changes nothing."""
    case = dataclasses.replace(FOLDED, has_sink=True)
    inputs = make_inputs(case).to(device)
    asked = [
        {},
        dict(attn_sink=inputs.attn_sink),
        dict(window_size=(100, 1)),
        dict(window_size=(100, -1)),
        dict(lse_base="2"),
        dict(window_size=(100, -1), lse_base="2", attn_sink=inputs.attn_sink),
    ]
    first = [decode(case, inputs, **options) for options in asked]
    for one, other in ((0, 1), (0, 2), (2, 3), (0, 4), (3, 5)):
        assert not same_bits(first[one], first[other])
    for options, expected in zip(asked, first, strict=True):
        assert same_bits(decode(case, inputs, **options), expected)
    assert same_bits(decode(case, inputs, window_size=(-1, -1), lse_base="e", batch_invariant=False), first[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_base_of_the_log_sum_exp(device, case):
    inputs = make_inputs(case).to(device)
    out, lse = decode(case, inputs)
    out_2, lse_2 = decode(case, inputs, lse_base="2")
    assert same_bits([out], [out_2])
    assert torch.equal(torch.isposinf(lse_2), torch.isposinf(lse)) and torch.isposinf(lse_2).any()
    torch.testing.assert_close(lse_2 * math.log(2.0), lse, rtol=1e-6, atol=1e-6)


def poisoned_like(tensor, *, contiguous=False):
    made = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if contiguous else torch.empty_like(tensor)
    )
    return made.fill_(math.nan)


@pytest.mark.parametrize("case", [*CASES, dataclasses.replace(FOLDED, seq_len_q=1)], ids=str)
@pytest.mark.parametrize("contiguous", [False, True])
def test_results_in_place(device, case, contiguous):
    """Both, or one alone; twice, so that the second call is like one that was checked."""
    inputs = make_inputs(case).to(device)
    expected = decode(case, inputs)
    for _ in range(2):
        given = dict(out=poisoned_like(expected[0]), softmax_lse=poisoned_like(expected[1], contiguous=contiguous))
        out, lse = decode(case, inputs, **given)
        assert out is given["out"] and lse is given["softmax_lse"]
        assert same_bits((out, lse), expected)
        for name, index in (("out", 0), ("softmax_lse", 1)):
            given[name].fill_(math.nan)
            result = decode(case, inputs, **{name: given[name]})
            assert result[index] is given[name] and result[1 - index] is not given[("softmax_lse", "out")[index]]
            assert same_bits(result, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_that_require_a_gradient(device, case):
    """As with queries and caches, nothing is recorded: there is no backward pass."""
    inputs = make_inputs(case).to(device)
    expected = decode(case, inputs)
    for _ in range(2):
        out = poisoned_like(expected[0]).requires_grad_()
        lse = poisoned_like(expected[1], contiguous=True).requires_grad_()
        assert same_bits(decode(case, inputs, out=out, softmax_lse=lse), expected)
        assert out.grad_fn is None and lse.grad_fn is None


def test_results_in_a_slice_of_a_larger_buffer(device):
    """As engines pad batches; what lies beside is left alone."""
    inputs = make_inputs(FOLDED).to(device)
    expected = decode(FOLDED, inputs)
    larger = torch.full((FOLDED.batch_size + 2, *expected[0].shape[1:]), 7.0, dtype=FOLDED.dtype, device=device)
    out, lse = decode(FOLDED, inputs, out=larger[1:-1])
    assert same_bits((out, lse), expected) and (larger[0] == 7).all() and (larger[-1] == 7).all()


WRONG = {
    "out list": (dict(out=lambda out: [1]), TypeError, "out must be a torch.Tensor"),
    "out dtype": (dict(out=lambda out: out.float()), TypeError, "out must be torch.bfloat16, got a float32"),
    "out shape": (
        dict(out=lambda out: out[:, :, :3]),
        ValueError,
        r"out must have shape .*head_dim_v\) = \(4, 3, 4, 512",
    ),
    "out rank": (dict(out=lambda out: out[0]), ValueError, "out must have 4 dimensions"),
    "out device": (dict(out=lambda out: out.to("meta")), ValueError, "out must be on .*, as q, got .* on meta"),
    "out strides": (
        dict(out=lambda out: out.transpose(0, 2).contiguous().transpose(0, 2)),
        ValueError,
        "out must be contiguous, got strides",
    ),
    "lse dtype": (
        dict(softmax_lse=lambda lse: lse.double()),
        TypeError,
        "softmax_lse must be torch.float32, got a float64",
    ),
    "lse shape": (
        dict(softmax_lse=lambda lse: lse.transpose(1, 2)),
        ValueError,
        r"softmax_lse must have shape \(batch_size, num_heads_q, seq_len_q\) = \(4, 4, 3\)",
    ),
    "lse strides": (
        dict(softmax_lse=lambda lse: lse.transpose(0, 2).contiguous().transpose(0, 2)),
        ValueError,
        "softmax_lse must be contiguous, or the transpose",
    ),
    "sink list": (dict(attn_sink=lambda _: [0.0] * 4), TypeError, "attn_sink must be a torch.Tensor"),
    "sink dtype": (
        dict(attn_sink=lambda lse: lse[0, :, 0].half()),
        TypeError,
        "attn_sink must be float32, got a float16",
    ),
    "sink heads": (
        dict(attn_sink=lambda lse: lse[0, :3, 0].clone()),
        ValueError,
        "attn_sink must have num_heads_q = 4",
    ),
    "sink strides": (
        dict(attn_sink=lambda lse: lse.new_zeros(8)[::2]),
        ValueError,
        "attn_sink must be contiguous, got stride",
    ),
    "sink device": (dict(attn_sink=lambda lse: lse[0, :, 0].to("meta")), ValueError, "attn_sink must be on .*, as q"),
    "window int": (dict(window_size=lambda _: 100), TypeError, r"window_size must be \(left, right\), .* got int 100"),
    "window of three": (dict(window_size=lambda _: (1, 2, 3)), ValueError, "got 3 elements"),
    "window float": (dict(window_size=lambda _: (1.0, 2)), TypeError, r"got \(1.0, 2\)"),
    "window below": (dict(window_size=lambda _: (-2, 0)), ValueError, r"-1 \(no limit\) or more, got \(-2, 0\)"),
    "base": (dict(lse_base=lambda _: "10"), ValueError, "lse_base must be 'e' or '2', got '10'"),
    "base int": (dict(lse_base=lambda _: 2), TypeError, "lse_base must be a str"),
    "batch_invariant int": (dict(batch_invariant=lambda _: 1), TypeError, "batch_invariant must be a bool, got int 1"),
}


@pytest.mark.parametrize(("change", "error", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(device, change, error, words):
    """Twice: also where a call like it, with a sound argument, was checked before."""
    inputs = make_inputs(FOLDED).to(device)
    out, lse = decode(FOLDED, inputs)
    sound = dict(out=out, softmax_lse=lse, attn_sink=lse[0, :, 0].clone())
    ((name, of),) = change.items()
    like = {"out": out}.get(name, lse)
    for _ in range(2):
        if name in sound:
            decode(FOLDED, inputs, **{name: sound[name]})
        with pytest.raises(error, match=words):
            decode(FOLDED, inputs, **{name: of(like.clone())})


def test_keywords_are_no_positions():
    """Behind upstream's arguments there may be more of upstream's one day."""
    inputs = make_inputs(FOLDED)
    arguments = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, *tilemla.get_mla_metadata())
    with pytest.raises(TypeError, match="positional argument"):
        tilemla.flash_mla_with_kvcache(*arguments, None, False, False, *[None] * 6, torch.empty(1))


@pytest.mark.parametrize("window", [UNLIMITED, (1500, 0)], ids=str)
def test_neighbours_change_no_bit(device, window):
    """Whatever the schedule that is given, and however wide the table is."""
    case = Case((64, 2500, 0, 1100, 3000), seq_len_q=2, num_heads_q=3, window=window, spare_columns=3, seed=9)
    inputs = make_inputs(case).to(device)

    def run(requests, schedule, width=None):
        tensors = (t[requests] for t in (inputs.block_table[:, :width], inputs.cache_seqlens))
        return tilemla.flash_mla_with_kvcache(
            inputs.q[requests],
            inputs.k_cache,
            *tensors,
            512,
            *schedule,
            window_size=window,
            batch_invariant=True,
        )

    garbage = torch.full((3, 8), -7, dtype=torch.int32, device=device)
    out, lse = run([0, 1, 2, 3, 4], (garbage, garbage[0]))
    check_result(out, lse, reference_of(inputs, window=window))
    unused = tilemla.get_mla_metadata()
    for requests, schedule, width in (([1], unused, 40), ([4, 1], (None,), None), ([3, 0, 1, 2], ("what", 3), None)):
        assert same_bits(run(requests, schedule, width), (out[requests], lse[requests]))
    assert not unused[0].have_initialized
    plain, _ = decode(case, inputs, window_size=window)
    assert not same_bits([plain], [out])  # requests are cut elsewhere


def test_batch_invariance_of_nothing(device):
    inputs = make_inputs(Case(())).to(device)
    out, lse = decode(Case(()), inputs, batch_invariant=True)
    assert out.shape == (0, 1, 16, 512) and lse.shape == (0, 16, 1)


@pytest.mark.parametrize(
    ("window", "causal", "seq_len_q", "expected"),
    [
        ((-1, -1), False, 3, (-1, -1)),
        ((-1, -1), True, 3, (-1, 0)),
        ((-1, -1), True, 1, (-1, -1)),
        ((5, 1), True, 3, (5, 0)),
        ((5, 1), False, 3, (5, 1)),
        ((5, 2), False, 3, (5, -1)),
        ((2**30, 0), False, 2, (2**30, 0)),
        ((2**30 + 1, 0), False, 2, (-1, 0)),
    ],
)
def test_windows_as_kernels_take_them(window, causal, seq_len_q, expected):
    assert Traits.of(Options(window), causal, seq_len_q)[:2] == expected


@pytest.mark.parametrize(
    ("rows", "options", "program"),
    [
        (16, {}, "mla_decode_plain"),
        (128, dict(causal=True), "mla_decode_plain"),
        (129, {}, "mla_decode"),
        (16, dict(window_size=(100, -1)), "mla_decode"),
        (16, dict(window_size=(-1, 0), seq_len_q=2), "mla_decode_plain"),
        (16, dict(has_sink=True), "mla_decode"),
        (16, dict(has_sink=True, seq_len_q=2, num_heads_k=2), "mla_decode"),
        (16, dict(seq_len_q=2, num_heads_k=2), "mla_decode_plain"),
        # Of a module that has a program for few rows.
        (16, dict(has_narrow=True), "mla_decode_narrow"),
        (16, dict(has_narrow=True, has_sink=True, seq_len_q=2), "mla_decode_narrow"),
        (16, dict(has_narrow=True, seq_len_q=2, num_heads_k=2), "mla_decode_narrow"),
        (17, dict(has_narrow=True), "mla_decode_plain"),
        (17, dict(has_narrow=True, has_sink=True), "mla_decode"),
    ],
)
def test_which_program_serves_a_call(rows, options, program):
    """It gets as many arguments as it takes."""
    options = dict(options)
    calls = []
    programs = ("mla_decode", "mla_decode_plain", *(("mla_decode_narrow",) if options.pop("has_narrow", False) else ()))
    functions = {
        name: lambda *arguments, name=name: calls.append((name.removesuffix("_unfolded"), len(arguments)))
        for name in (*programs, *(f"{name}_unfolded" for name in programs))
    }
    kernels = Kernels(KernelSpec(arch="cpu"), 8, **functions, get_mla_metadata=lambda: None)
    seq_len_q, num_heads_k = options.pop("seq_len_q", 1), options.pop("num_heads_k", 1)
    traits = Traits.of(
        Options(options.pop("window_size", UNLIMITED), has_sink=options.pop("has_sink", False)),
        options.pop("causal", False),
        seq_len_q,
    )
    q = torch.zeros((1, seq_len_q, rows * num_heads_k // seq_len_q, 576), dtype=torch.bfloat16)
    plan = DecodePlan(
        kernels, q, num_heads_k=num_heads_k, head_dim_v=512, num_sm_parts=1, softmax_scale=None, traits=traits
    )
    cache = torch.zeros((1, 64, num_heads_k, 576), dtype=torch.bfloat16)
    sink = torch.zeros(q.shape[2])
    plan.run(q, cache, *[torch.zeros(1)] * 4, attn_sink=sink if traits.has_sink else None)
    assert calls == [(program, 15 if program.endswith("plain") else 18)]
