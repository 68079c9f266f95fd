"""Every bad input is refused with an exception that names the argument, and the process lives on."""

import dataclasses
import re

import pytest
import torch

import tilemla
from cases import Case, make_inputs
from tilemla import launch
from tilemla.select import select_spec
from tilemla.spec import SUPPORTED_SPECS, KernelSpec

CASE = Case(lengths=(130, 64, 0), num_heads_q=6, num_heads_k=2)


@pytest.fixture
def arguments(device):
    """Keyword arguments of a call that works, in the tuple form."""
    inputs = make_inputs(CASE).to(device)
    tile_scheduler_metadata, num_splits = tilemla.get_mla_metadata(inputs.cache_seqlens, 3, 2)
    return dict(
        q=inputs.q,
        k_cache=inputs.k_cache,
        block_table=inputs.block_table,
        cache_seqlens=inputs.cache_seqlens,
        head_dim_v=512,
        tile_scheduler_metadata=tile_scheduler_metadata,
        num_splits=num_splits,
        softmax_scale=None,
        causal=True,
    )


def every_other(tensor):
    """The same values with stride 2 in the last dimension."""
    wide = torch.zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=tensor.dtype, device=tensor.device)
    view = wide[..., ::2]
    view.copy_(tensor)
    return view


# What is changed, how, the exception, and words that its message must hold.
BAD = {
    "q not a tensor": ("q", lambda x: x.tolist(), TypeError, "q must be a torch.Tensor"),
    "q rank": ("q", lambda x: x[0], ValueError, "q must have 4 dimensions.*shape .1, 6, 576."),
    "q float32": ("q", lambda x: x.float(), TypeError, "k_cache must be torch.float32, as q, got a bfloat16"),
    "q strided": ("q", every_other, ValueError, "q must have stride 1 in its last dimension"),
    "q without queries": ("q", lambda x: x[:, :0], ValueError, "seq_len_q of at least 1"),
    "q heads": ("q", lambda x: x[:, :, :5], ValueError, "multiple of num_heads_k = 2, got .* .3, 1, 5, 576."),
    "q without heads": ("q", lambda x: x[:, :, :0], ValueError, "positive multiple of num_heads_k"),
    "q head dim": ("q", lambda x: x[..., :512], ValueError, "k_cache must have head_dim_qk = 512, as q"),
    "k_cache None": ("k_cache", lambda x: None, TypeError, "k_cache must be a torch.Tensor"),
    "k_cache rank": ("k_cache", lambda x: x[:, :, 0], ValueError, "k_cache must have 4 dimensions"),
    "k_cache dtype": ("k_cache", lambda x: x.half(), TypeError, "k_cache must be torch.bfloat16, as q, got a float16"),
    "k_cache strided": ("k_cache", every_other, ValueError, "k_cache must have stride 1"),
    "k_cache page size": ("k_cache", lambda x: x[:, :48], NotImplementedError, "page_block_size 1, .* or 256, got 48"),
    "k_cache without heads": ("k_cache", lambda x: x[:, :, :0], ValueError, "k_cache must have a positive"),
    "block_table None": ("block_table", lambda x: None, TypeError, "block_table must be a torch.Tensor"),
    "block_table rank": ("block_table", lambda x: x[0], ValueError, "block_table must have 2 dimensions"),
    "block_table dtype": ("block_table", lambda x: x.long(), TypeError, "block_table must be int32, got a int64"),
    "block_table batch": ("block_table", lambda x: x[:2], ValueError, "block_table must have batch_size = 3 rows"),
    "block_table strided": ("block_table", every_other, ValueError, "block_table must have stride 1"),
    "cache_seqlens None": ("cache_seqlens", lambda x: None, TypeError, "cache_seqlens must be a torch.Tensor"),
    "cache_seqlens rank": ("cache_seqlens", lambda x: x[None], ValueError, "cache_seqlens must have 1 dim"),
    "cache_seqlens dtype": ("cache_seqlens", lambda x: x.long(), TypeError, "cache_seqlens must be int32"),
    "cache_seqlens batch": ("cache_seqlens", lambda x: x[:2], ValueError, "cache_seqlens must have batch_size = 3"),
    "cache_seqlens strided": ("cache_seqlens", every_other, ValueError, "cache_seqlens must be contiguous"),
    "head_dim_v float": ("head_dim_v", lambda x: 512.0, TypeError, "head_dim_v must be an int, got float 512.0"),
    "head_dim_v zero": ("head_dim_v", lambda x: 0, ValueError, "head_dim_v must be at least 1, got 0"),
    "head_dim_v without kernel": ("head_dim_v", lambda x: 256, NotImplementedError, "head_dim_v must be 512, got 256"),
    "softmax_scale text": ("softmax_scale", lambda x: "1", TypeError, "softmax_scale must be a float or None"),
    "softmax_scale nan": (
        "softmax_scale",
        lambda x: float("nan"),
        ValueError,
        "softmax_scale must be finite and not .* got nan",
    ),
    "softmax_scale negative": ("softmax_scale", lambda x: -1.0, ValueError, "not negative, got -1.0"),
    "causal int": ("causal", lambda x: 1, TypeError, "causal must be a bool, got int 1"),
    "metadata None": ("tile_scheduler_metadata", lambda x: None, TypeError, "tile_scheduler_metadata must be"),
    "metadata rank": ("tile_scheduler_metadata", lambda x: x[0], ValueError, "tile_scheduler_metadata must have 2"),
    "metadata fields": ("tile_scheduler_metadata", lambda x: x[:, :7], ValueError, "shape .num_sm_parts, 8."),
    "metadata empty": ("tile_scheduler_metadata", lambda x: x[:0], ValueError, "at least one part"),
    "metadata dtype": ("tile_scheduler_metadata", lambda x: x.long(), TypeError, "must be int32, got a int64"),
    "metadata strided": ("tile_scheduler_metadata", every_other, ValueError, "metadata must be contiguous"),
    "num_splits list": ("num_splits", lambda x: x.tolist(), TypeError, "num_splits must be a torch.Tensor"),
    "num_splits other batch": ("num_splits", lambda x: x[:-1], ValueError, "batch_size . 1 = 4 .*another batch"),
    "num_splits dtype": ("num_splits", lambda x: x.float(), TypeError, "num_splits must be int32"),
    "num_splits strided": ("num_splits", every_other, ValueError, "num_splits must be contiguous"),
    "fp8 int": ("is_fp8_kvcache", lambda x: 1, TypeError, "is_fp8_kvcache must be a bool, got int 1"),
    "extra cache": (
        "extra_k_cache",
        lambda x: torch.zeros(6),
        ValueError,
        "extra_k_cache must be None without indices",
    ),
    "extra indices": ("extra_indices_in_kvcache", lambda x: 6, ValueError, "extra_indices_in_kvcache must be None"),
    "topk_length": ("topk_length", lambda x: torch.zeros(6), ValueError, "topk_length must be None without indices"),
    "extra_topk_length": ("extra_topk_length", lambda x: 6, ValueError, "extra_topk_length must be None"),
}

# Only where the host can look at values without waiting.
BAD_ON_CPU = {
    "negative length": ("cache_seqlens", lambda x: x - 1, ValueError, "must not be negative, got -1 for request 2"),
    "table too narrow": ("block_table", lambda x: x[:, :2], ValueError, r"at least 3 columns for .*\[0\] = 130"),
    "page past the cache": (
        "block_table",
        lambda x: torch.where(torch.arange(x.shape[1]) == 1, 10**6, x).int(),
        ValueError,
        r"block_table\[0, 1\] = 1000000",
    ),
    "page below the cache": (
        "block_table",
        lambda x: torch.where(torch.arange(x.shape[1]) == 0, -1, x).int(),
        ValueError,
        r"block_table\[0, 0\] = -1",
    ),
    "cache without pages": ("k_cache", lambda x: x[:0], ValueError, "block_table must hold page ids"),
    "other lengths": ("cache_seqlens", lambda x: x - (x > 64).int() * 66, ValueError, "made for other cache_seqlens"),
    "garbled metadata": ("tile_scheduler_metadata", lambda x: x + 1, ValueError, "made for other cache_seqlens"),
    "garbled splits": ("num_splits", lambda x: x + 1, ValueError, "made for other cache_seqlens"),
}


def decode_error(arguments, name, change, expected, words):
    changed = arguments | {name: change(arguments.get(name))}
    with pytest.raises(expected, match=words):
        tilemla.flash_mla_with_kvcache(**changed)
    tilemla.flash_mla_with_kvcache(**arguments)  # still works


@pytest.mark.parametrize("name, change, expected, words", BAD.values(), ids=BAD.keys())
def test_bad_argument(arguments, name, change, expected, words):
    decode_error(arguments, name, change, expected, words)


@pytest.mark.parametrize("name, change, expected, words", BAD_ON_CPU.values(), ids=BAD_ON_CPU.keys())
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_bad_value_on_cpu(arguments, name, change, expected, words):
    decode_error(arguments, name, change, expected, words)


def test_float32_has_no_kernel(arguments):
    arguments |= dict(q=arguments["q"].float(), k_cache=arguments["k_cache"].float())
    with pytest.raises(NotImplementedError, match="q must be bfloat16 or float16, got float32"):
        tilemla.flash_mla_with_kvcache(**arguments)


def test_head_dim_without_kernel(arguments):
    arguments |= dict(q=arguments["q"][..., :504], k_cache=arguments["k_cache"][..., :504])
    with pytest.raises(NotImplementedError, match="q must have head dim 576 or 512, got 504"):
        tilemla.flash_mla_with_kvcache(**arguments)


@pytest.mark.parametrize("name", ["k_cache", "block_table", "cache_seqlens", "tile_scheduler_metadata", "num_splits"])
def test_other_device(arguments, name):
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on .*, as q, got .* on meta"):
        tilemla.flash_mla_with_kvcache(**arguments)


def test_device_without_kernels(arguments):
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = value.to("meta")
    with pytest.raises(NotImplementedError, match="q must be on a CPU or on a GPU .* got a meta device"):
        tilemla.flash_mla_with_kvcache(**arguments)


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (8, 7), (11, 0)])
def test_gpu_without_kernels(capability):
    with pytest.raises(NotImplementedError, match=rf"got a cuda device of compute capability {capability[0]}\."):
        select_spec(
            device_type="cuda",
            capability=capability,
            dtype="bfloat16",
            head_dim_qk=576,
            head_dim_v=512,
            page_block_size=64,
        )


CAPABILITIES = {"cpu": None, "sm_80": (8, 0), "sm_89": (8, 9), "sm_90a": (9, 0), "sm_100": (10, 3), "sm_120": (12, 1)}


@pytest.mark.parametrize("spec", SUPPORTED_SPECS, ids=lambda spec: spec.name)
def test_every_spec_is_selected_by_its_own_arguments(spec):
    capability = CAPABILITIES[spec.arch]
    chosen = select_spec(
        device_type="cuda" if capability else "cpu",
        capability=capability,
        dtype=spec.dtype,
        head_dim_qk=spec.head_dim_qk,
        head_dim_v=spec.head_dim_v,
        page_block_size=spec.page_block_size,
        kernel=spec.kernel,
        kv_format=spec.kv_format,
    )
    assert chosen == spec


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(head_dim_qk=512), "no kernel for these arguments: q must have head dim 576, got 512"),
        (dict(dtype="float16"), "no kernel for these arguments: q must be bfloat16, got float16"),
        (
            dict(device_type="cuda", capability=(8, 0)),
            "sparse decode of an fp8 cache of 656 bytes a token on sm_80; there is for .*cpu",
        ),
    ],
)
def test_calls_that_no_sparse_kernel_serves(changes, message):
    call = dict(device_type="cpu", capability=None, dtype="bfloat16", head_dim_qk=576, head_dim_v=512)
    call |= dict(page_block_size=0, kernel="mla_sparse_decode", kv_format="fp8_656")
    assert select_spec(**call).kv_format == "fp8_656"
    with pytest.raises(NotImplementedError, match=message):
        select_spec(**(call | changes))


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(kv_format="fp8"), "kv_format must be one of dense, dense_fp8, fp8_656, fp8_584, got 'fp8'"),
        (dict(kv_format="dense_fp8"), "kv_format of mla_sparse_decode must be one of dense, fp8_656, .* 'dense_fp8'"),
        (dict(arch="sm_80"), "mla_sparse_decode of a fp8_656 cache has no program but for .*cpu, got arch 'sm_80'"),
        (dict(dtype="float16"), "dtype must be bfloat16 for a fp8_656 cache, got 'float16'"),
        (dict(head_dim_qk=512), r"must be \(576, 512\) for a fp8_656 cache, got \(512, 512\)"),
        (dict(page_block_size=64), "page_block_size must be 0 for mla_sparse_decode, got 64"),
        (dict(block_m=64), "block_m must be 16 on cpu, got 64"),
    ],
)
def test_why_a_spec_has_no_program(changes, reason):
    spec = KernelSpec(arch="cpu", kv_format="fp8_656", page_block_size=0, kernel="mla_sparse_decode")
    assert spec.why_invalid() is None
    assert re.search(reason, dataclasses.replace(spec, **({"block_m": 0} | changes)).why_invalid())


@pytest.mark.gpu
def test_cache_that_tma_cannot_read():
    device = torch.device("cuda", 0)
    inputs = make_inputs(dataclasses.replace(CASE, num_heads_k=1)).to(device)
    wide = torch.zeros((*inputs.k_cache.shape[:3], 577), dtype=inputs.k_cache.dtype, device=device)
    sched_meta, _ = tilemla.get_mla_metadata()
    for view, words in ((wide[..., :576], "multiples of 8 elements"), (wide[..., 1:], "multiple of 16 bytes")):
        with pytest.raises(ValueError, match=words):
            tilemla.flash_mla_with_kvcache(
                inputs.q, view, inputs.block_table, inputs.cache_seqlens, 512, sched_meta, None
            )


@pytest.mark.gpu
def test_first_call_inside_a_capture_is_refused(monkeypatch):
    inputs = make_inputs(CASE).to(torch.device("cuda", 0))
    monkeypatch.setattr(launch, "_kernels", {})
    sched_meta, _ = tilemla.get_mla_metadata()
    with (
        pytest.raises(RuntimeError, match="first time inside a CUDA graph capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        tilemla.flash_mla_with_kvcache(
            inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, sched_meta, None
        )


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(lengths=(130, 64)), "batch_size=3"),
        (dict(seq_len_q=2), "seq_len_q=1"),
        (dict(num_heads_q=4), "num_heads_q=6"),
        (dict(num_heads_k=1), "num_heads_k=2"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_sched_meta_of_another_call(device, changes, words):
    sched_meta, _ = tilemla.get_mla_metadata()
    for case, fits in ((CASE, True), (dataclasses.replace(CASE, **changes), False), (CASE, True)):
        inputs = make_inputs(case).to(device)
        call = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, sched_meta, None)
        if fits:
            tilemla.flash_mla_with_kvcache(*call)
        else:
            with pytest.raises(ValueError, match=f"calls like the one that filled it in, .*{words}"):
                tilemla.flash_mla_with_kvcache(*call)


def test_sched_meta_of_another_mask(device):
    inputs = make_inputs(dataclasses.replace(CASE, seq_len_q=2)).to(device)
    sched_meta, _ = tilemla.get_mla_metadata()
    call = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, sched_meta, None, None)
    tilemla.flash_mla_with_kvcache(*call, True)
    with pytest.raises(ValueError, match=r"causal=True.*; got .*causal=False"):
        tilemla.flash_mla_with_kvcache(*call, False)


def test_sched_meta_beside_num_splits(arguments):
    arguments["tile_scheduler_metadata"] = tilemla.FlashMLASchedMeta()
    with pytest.raises(ValueError, match="num_splits must be None beside a FlashMLASchedMeta, got Tensor"):
        tilemla.flash_mla_with_kvcache(**arguments)


@pytest.mark.parametrize(
    "positional, expected, words",
    [
        (([1, 2], 16, 1), TypeError, "cache_seqlens must be a torch.Tensor"),
        ((None, 16, 1), TypeError, "cache_seqlens must be a torch.Tensor"),
        ((torch.zeros(2), 16, 1), TypeError, "cache_seqlens must be int32, got a float32"),
        ((torch.zeros(2, 1, dtype=torch.int32), 16, 1), ValueError, "cache_seqlens must have 1 dimensions"),
        ((torch.zeros(4, dtype=torch.int32)[::2], 16, 1), ValueError, "cache_seqlens must be contiguous"),
        ((-torch.ones(2, dtype=torch.int32), 16, 1), ValueError, "cache_seqlens must not be negative"),
        ((torch.zeros(2, dtype=torch.int32), 0, 1), ValueError, "num_q_tokens_per_head_k must be at least 1, got 0"),
        ((torch.zeros(2, dtype=torch.int32), 16.0, 1), TypeError, "num_q_tokens_per_head_k must be an int"),
        ((torch.zeros(2, dtype=torch.int32), 16, 0), ValueError, "num_heads_k must be at least 1, got 0"),
        ((torch.zeros(2, dtype=torch.int32), 16), TypeError, "num_heads_k must be an int, got NoneType"),
        ((torch.zeros(2, dtype=torch.int32), 16, 1, 16, True, 64.0), TypeError, "topk must be an int, got float 64.0"),
        ((torch.zeros(2, dtype=torch.int32), 16, 1, 16, True, -1), ValueError, "topk must be at least 0, got -1"),
        ((torch.zeros(2, dtype=torch.int32), 16, 1, 0, True, 64), ValueError, "num_heads_q must be at least 1, got 0"),
        ((torch.zeros(2), 16, 1, 16, True, 64), TypeError, "cache_seqlens must be int32"),
        ((None, 16, 1, 16, True, 64), TypeError, "cache_seqlens must be a torch.Tensor"),
        ((torch.zeros(2, dtype=torch.int32, device="meta"), 16, 1), NotImplementedError, "got a meta device"),
    ],
)
def test_bad_metadata_argument(positional, expected, words):
    with pytest.raises(expected, match=words):
        tilemla.get_mla_metadata(*positional)
