"""The module's second way in: the same numbers as by the first, and no call that the program would have to trust."""

import math

import pytest
import torch

from cases import Case, make_inputs
from kernel_calls import fold_heads, unfold_heads
from schedules import spread_schedule
from tilemla.launch import kernels_for

CPU = torch.device("cpu")
NUM_SM_PARTS = 3
CASES = [
    Case((300, 0, 70), num_heads_q=6),
    Case((300, 70), num_heads_q=6, num_heads_k=2),
    Case((300, 70), num_heads_q=6, seq_len_q=3),
    Case((300, 70), num_heads_q=1, seq_len_q=3),
    Case((300,), num_heads_q=4, num_heads_k=4, dtype=torch.float16),
]


def arguments_of(case):
    """Arguments of ``mla_decode_unfolded``, in order, by name; what it writes is NaN."""
    inputs = make_inputs(case)
    b, s_q, h_q, h_k = case.batch_size, case.seq_len_q, case.num_heads_q, case.num_heads_k
    metadata, num_splits = map(torch.from_numpy, spread_schedule(case.lengths, NUM_SM_PARTS))
    partials = (b + NUM_SM_PARTS, h_k, s_q * h_q // h_k)
    return dict(
        q=inputs.q,
        kcache=inputs.k_cache,
        block_table=inputs.block_table,
        cache_seqlens=inputs.cache_seqlens,
        tile_scheduler_metadata=metadata,
        num_splits=num_splits,
        out=torch.full((b, s_q, h_q, 512), math.nan, dtype=case.dtype),
        softmax_lse=torch.full((b, s_q, h_q), math.nan).transpose(1, 2),
        out_accum=torch.full((*partials, 512), math.nan),
        lse_accum_log2=torch.full(partials, math.nan),
        attn_sink=torch.zeros((h_k, 1)),
        softmax_scale_log2=0.06,
        lse_scale=math.log(2),
        seq_len_q=s_q,
        group_size=h_q // h_k,
        window_left=-1,
        window_right=0,
        has_sink=0,
    )


def kernels_of(case):
    return kernels_for(CPU, case.dtype, 576, 512, 64)


def plain(arguments):
    """Those of them that ``mla_decode_plain_unfolded`` takes."""
    return {name: arguments[name] for name in arguments if name not in ("attn_sink", "window_left", "has_sink")}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_by_the_plain_program(case):
    arguments = [arguments_of(case) for _ in range(3)]
    kernels_of(case).mla_decode_unfolded(*arguments[0].values())
    kernels_of(case).mla_decode_plain_unfolded(*plain(arguments[1]).values())
    arguments[2]["attn_sink"].fill_(1.0)
    kernels_of(case).mla_decode_unfolded(*(arguments[2] | {"has_sink": 1}).values())
    for name in ("out", "softmax_lse"):
        assert torch.equal(arguments[0][name], arguments[1][name])
    assert not torch.equal(arguments[0]["out"], arguments[2]["out"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits(case):
    arguments = arguments_of(case)
    kernels_of(case).mla_decode_unfolded(*arguments.values())
    folded = arguments | {"q": fold_heads(arguments["q"], case.num_heads_k)}
    for name in ("out", "softmax_lse"):
        value = arguments[name] if name == "out" else arguments[name].transpose(1, 2)[..., None]
        shape = fold_heads(value, case.num_heads_k).shape
        folded[name] = torch.full(shape if name == "out" else shape[:3], math.nan, dtype=value.dtype)
    kernels_of(case).mla_decode(*folded.values())
    assert torch.equal(arguments["out"], unfold_heads(folded["out"], case.seq_len_q))
    lse = unfold_heads(folded["softmax_lse"][..., None], case.seq_len_q)[..., 0].transpose(1, 2)
    assert torch.equal(arguments["softmax_lse"], lse)


def spread_out(tensor, axis):
    """The same numbers, with room between neighbours along an axis."""
    index = tuple(slice(None, None, 2) if i == axis else slice(None) for i in range(tensor.dim()))
    return tensor.repeat_interleave(2, dim=axis)[index]


@pytest.mark.parametrize(("case", "axis"), [(CASES[0], 0), (CASES[0], 2), (CASES[2], 2)], ids=str)
def test_strided_queries(case, axis):
    """Requests apart, heads apart: strides that the program has."""
    arguments, strided = arguments_of(case), arguments_of(case)
    strided["q"] = spread_out(strided["q"], axis)
    for call in (arguments, strided):
        kernels_of(case).mla_decode_unfolded(*call.values())
    assert torch.equal(arguments["out"], strided["out"])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(q=lambda x: x[0]), ValueError, "argument q must have 4 dimensions"),
        (dict(q=lambda x: None), TypeError, "argument q must be a tensor"),
        (dict(q=lambda x: spread_out(x, 1)), ValueError, r"argument q must have stride\[1\] = 3456"),
        (dict(q=lambda x: x.float()), TypeError, "argument q must have dtype bfloat16"),
        (dict(kcache=lambda x: x[:0]), ValueError, r"argument kcache must have shape\[0\] of at least 1"),
        (dict(kcache=lambda x: x.expand(-1, -1, 4, -1)), ValueError, r"argument kcache must have shape\[2\] = 6"),
        (dict(kcache=lambda x: x.expand(-1, -1, 2, -1)), ValueError, r"argument q must have shape\[1\] = 1 \(with sev"),
        (dict(block_table=lambda x: x[:, :0]), ValueError, r"argument block_table must have shape\[1\] = 1 or more"),
        (dict(block_table=lambda x: x[:1]), ValueError, r"argument block_table must have shape\[0\] = 2"),
        (dict(cache_seqlens=lambda x: x[:1]), ValueError, r"argument cache_seqlens must have shape\[0\] = 2"),
        (dict(num_splits=lambda x: x[:-1]), ValueError, r"argument num_splits must have shape\[0\] of at least 3"),
        (dict(out_accum=lambda x: x[:-1]), ValueError, r"argument out_accum must have shape\[0\] of at least 5"),
        (dict(out=lambda x: x[:1]), ValueError, r"argument out must have shape\[0\] = 2"),
        (dict(out=lambda x: x.view(2, 6, 3, 512)), ValueError, r"argument out must have shape\[1\] = 3"),
        (dict(out=lambda x: x[:, :, :5]), ValueError, r"argument out must have shape\[2\] = 6"),
        (dict(softmax_lse=lambda x: x.transpose(1, 2)), ValueError, r"argument softmax_lse must have shape\[2\] = 3"),
        (dict(softmax_lse=lambda x: x.contiguous()), ValueError, r"argument softmax_lse must have stride\[2\] = 18"),
        (dict(seq_len_q=lambda x: 1), ValueError, r"argument seq_len_q must be 3 \(from q.shape\[1\]\), got 1"),
        (dict(group_size=lambda x: 3), ValueError, "argument group_size must be 6"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refusals(changes, error, words):
    case = CASES[2]
    arguments = arguments_of(case)
    ((name, change),) = changes.items()
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=words):
        kernels_of(case).mla_decode_unfolded(*arguments.values())
    assert arguments["out"].isnan().all()


def test_the_number_of_arguments():
    with pytest.raises(TypeError, match="mla_decode_unfolded: expected 18 arguments, got 0"):
        kernels_of(CASES[0]).mla_decode_unfolded()
    with pytest.raises(TypeError, match="mla_decode_plain_unfolded: expected 15 arguments, got 0"):
        kernels_of(CASES[0]).mla_decode_plain_unfolded()
