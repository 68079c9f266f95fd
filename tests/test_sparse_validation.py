"""Bad input of decode calls with indices: refused with the argument's name, what it must be and what it got."""

import dataclasses
import math

import pytest
import torch

import tilemla
from sparse_cases import List, SparseCase, make_sparse_inputs

CASE = SparseCase(
    batch_size=3, seq_len_q=2, has_sink=True, main=List(70, 3, 8, (70, 0, 5)), extra=List(9, 2, 4, (9, 0, 5))
)


def arguments_of(case):
    inputs = make_sparse_inputs(case)
    schedule, _ = tilemla.get_mla_metadata()
    return dict(
        q=inputs.q,
        k_cache=inputs.main.k_cache,
        block_table=None,
        cache_seqlens=None,
        head_dim_v=512,
        tile_scheduler_metadata=schedule,
        num_splits=None,
        softmax_scale=None,
        causal=False,
        is_fp8_kvcache=case.is_fp8,
        indices=inputs.main.indices,
        attn_sink=inputs.attn_sink,
        extra_k_cache=inputs.extra.k_cache,
        extra_indices_in_kvcache=inputs.extra.indices,
        topk_length=inputs.main.lengths,
        extra_topk_length=inputs.extra.lengths,
        window_size=(-1, -1),
    )


def widths(count):
    return lambda x: torch.zeros((*x.shape[:3], count), dtype=torch.uint8)


def without(tensor):
    return None


BAD = {
    "q rank": ("q", lambda x: x[0], ValueError, "q must have 4 dimensions"),
    "q strided": ("q", lambda x: x.mT.contiguous().mT, ValueError, "q must have stride 1 in its last dimension"),
    "q without queries": ("q", lambda x: x[:, :0], ValueError, "q must have seq_len_q of at least 1"),
    "q without heads": ("q", lambda x: x[:, :, :0], ValueError, "q must have num_heads_q of at least 1"),
    "q dtype": ("q", lambda x: x.half(), NotImplementedError, "q must be bfloat16, got float16"),
    "q head dim": ("q", lambda x: x[..., :500], NotImplementedError, "q must have head dim 512 or 576 .* True, got"),
    "q of another format": (
        "q",
        lambda x: x[..., :512],
        ValueError,
        "k_cache must have 584 bytes a token, .* 512, got",
    ),
    "k_cache None": ("k_cache", without, ValueError, "k_cache must be given beside indices, got None"),
    "k_cache rank": ("k_cache", lambda x: x[:, :, 0], ValueError, "k_cache must have 4 dimensions"),
    "k_cache heads": ("k_cache", lambda x: x.expand(-1, -1, 2, -1), ValueError, "k_cache must have num_heads_k = 1"),
    "k_cache width": ("k_cache", widths(576), ValueError, r"k_cache must have 656 bytes a token, .*, got .*576"),
    "k_cache of 584": ("k_cache", widths(584), ValueError, r"k_cache must have 656 bytes a token, .*quantize_k_cache"),
    "k_cache dtype": (
        "k_cache",
        lambda x: x.bfloat16(),
        TypeError,
        "k_cache must be one of float8_e4m3fn, uint8, int8",
    ),
    "k_cache device": ("k_cache", lambda x: x.to("meta"), ValueError, "k_cache must be on cpu, as q, got"),
    "k_cache page": ("k_cache", lambda x: x[:, :0], ValueError, "k_cache must have a positive page_block_size"),
    "k_cache strided": ("k_cache", lambda x: x[:, ::2], ValueError, "k_cache must hold the bytes of a page one after"),
    "k_cache overlaps": (
        "k_cache",
        lambda x: x[:1].expand(3, -1, -1, -1),
        ValueError,
        "k_cache must have pages that do not overlap",
    ),
    "k_cache of elements": (
        "is_fp8_kvcache",
        lambda x: False,
        TypeError,
        "k_cache must be torch.bfloat16, as q, .*; is_fp8_kvcache=True is for caches of bytes",
    ),
    "is_fp8_kvcache int": ("is_fp8_kvcache", lambda x: 1, TypeError, "is_fp8_kvcache must be a bool, got int 1"),
    "indices list": (
        "indices",
        lambda x: x.tolist(),
        TypeError,
        "indices must be a torch.Tensor .batch_size, seq_len_q",
    ),
    "indices rank": ("indices", lambda x: x[0], ValueError, "indices must have 3 dimensions"),
    "indices dtype": ("indices", lambda x: x.long(), TypeError, "indices must be int32, got a int64"),
    "indices batch": (
        "indices",
        lambda x: x[:2],
        ValueError,
        r"indices must have shape .* = \(3, 2, 'any'\), got .*2, 2, 70",
    ),
    "indices queries": (
        "indices",
        lambda x: x[:, :1],
        ValueError,
        r"indices must have shape .* = \(3, 2, 'any'\), got",
    ),
    "indices strided": ("indices", lambda x: x[..., ::2], ValueError, "indices must have stride 1 in its last"),
    "indices device": ("indices", lambda x: x.to("meta"), ValueError, "indices must be on cpu, as q, got"),
    "topk_length dtype": ("topk_length", lambda x: x.long(), TypeError, "topk_length must be int32, got a int64"),
    "topk_length rank": (
        "topk_length",
        lambda x: x[:, None],
        ValueError,
        "topk_length must have 1 dimensions batch_size",
    ),
    "topk_length batch": ("topk_length", lambda x: x[:2], ValueError, "topk_length must have batch_size = 3 elements"),
    "topk_length strided": (
        "topk_length",
        lambda x: x.repeat_interleave(2)[::2],
        ValueError,
        "topk_length must be contig",
    ),
    "causal": ("causal", lambda x: True, ValueError, "causal must be False beside indices, .*, got True"),
    "causal int": ("causal", lambda x: 0, TypeError, "causal must be a bool, got int 0"),
    "window": (
        "window_size",
        lambda x: (5, -1),
        ValueError,
        r"window_size must be \(-1, -1\) beside .*, got \(5, -1\)",
    ),
    "softmax_scale": ("softmax_scale", lambda x: -1.0, ValueError, "softmax_scale must be finite and not negative"),
    "softmax_scale text": ("softmax_scale", lambda x: "1", TypeError, "softmax_scale must be a float or None"),
    "head_dim_v": ("head_dim_v", lambda x: 256, NotImplementedError, "head_dim_v must be 512, got 256"),
    "head_dim_v float": ("head_dim_v", lambda x: 512.0, TypeError, "head_dim_v must be an int"),
    "attn_sink": ("attn_sink", lambda x: x[:3], ValueError, "attn_sink must have num_heads_q = 16 elements"),
    "extra cache alone": (
        "extra_indices_in_kvcache",
        without,
        ValueError,
        "extra_indices_in_kvcache must be given beside extra_k_cache",
    ),
    "extra indices alone": (
        "extra_k_cache",
        without,
        ValueError,
        "extra_k_cache must be given beside extra_indices_in_k",
    ),
    "extra width": ("extra_k_cache", widths(576), ValueError, "extra_k_cache must have 656 bytes a token"),
    "extra indices dtype": (
        "extra_indices_in_kvcache",
        lambda x: x.long(),
        TypeError,
        "extra_indices_in_kvcache must be int32",
    ),
    "extra lengths": ("extra_topk_length", lambda x: x[:2], ValueError, "extra_topk_length must have batch_size = 3"),
    "metadata None": (
        "tile_scheduler_metadata",
        without,
        TypeError,
        "tile_scheduler_metadata must be what get_mla_meta",
    ),
    "num_splits": (
        "num_splits",
        lambda x: 5,
        ValueError,
        "num_splits must be None beside a FlashMLASchedMeta, got int",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name):
    arguments = arguments_of(CASE)
    tilemla.flash_mla_with_kvcache(**arguments)
    changed, change, error, message = BAD[name]
    arguments = arguments_of(CASE) | {changed: change(arguments[changed])}
    with pytest.raises(error, match=message):
        tilemla.flash_mla_with_kvcache(**arguments)


def test_lengths_of_no_second_cache():
    arguments = arguments_of(CASE) | dict(extra_k_cache=None, extra_indices_in_kvcache=None)
    with pytest.raises(ValueError, match="extra_topk_length must be None without extra_k_cache"):
        tilemla.flash_mla_with_kvcache(**arguments)


DENSE_BAD = {
    "k_cache dtype": ("k_cache", lambda x: x.half(), TypeError, "k_cache must be torch.bfloat16, as q, got a float16"),
    "k_cache width": ("k_cache", lambda x: x[..., :512], ValueError, "k_cache must have head_dim_qk = 576, as q"),
    "k_cache strided": (
        "k_cache",
        lambda x: torch.stack([x, x], -1)[..., 0],
        ValueError,
        "k_cache must have stride 1",
    ),
    "k_cache of bytes": (
        "is_fp8_kvcache",
        lambda x: True,
        TypeError,
        "k_cache must be one of float8_e4m3fn, .* got a bfloat16",
    ),
}


@pytest.mark.parametrize("name", DENSE_BAD)
def test_refusals_of_dense_caches(name):
    case = dataclasses.replace(CASE, kv_format="dense")
    changed, change, error, message = DENSE_BAD[name]
    arguments = arguments_of(case)
    arguments = arguments | {changed: change(arguments[changed])}
    with pytest.raises(error, match=message):
        tilemla.flash_mla_with_kvcache(**arguments)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scales_that_are_no_number(scale):
    with pytest.raises(ValueError, match=f"softmax_scale must be finite and not negative, got {scale}"):
        tilemla.flash_mla_with_kvcache(**(arguments_of(CASE) | dict(softmax_scale=scale)))
