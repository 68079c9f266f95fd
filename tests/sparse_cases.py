"""One decode case with indices: the tensors of a call, with every byte poisoned that no index names."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import tilemla
from reference import Reference, chosen_reference
from tilemla.kv_formats import FP8_LAYOUTS
from tilemla.spec import SUPPORTED_SPECS

HEAD_DIM_V = 512


@dataclasses.dataclass(frozen=True)
class List:
    """A paged cache and how many indices into it each query has; `lengths`, of each request, say how many count."""

    topk: int = 70
    num_pages: int = 5
    page_block_size: int = 64
    lengths: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class SparseCase:
    """Shapes and values of a call; equal cases make equal tensors."""

    batch_size: int = 2
    seq_len_q: int = 1
    num_heads_q: int = 16
    kv_format: str = "fp8_656"
    dtype: torch.dtype = torch.bfloat16
    head_dim_qk: int = 576
    main: List = List()
    extra: List | None = None
    has_sink: bool = False
    softmax_scale: float | None = None
    q_std: float = 1.0
    # What share of the indices names no token.
    invalid: float = 0.2
    # Bytes between pages, elements between rows of queries and indices.
    padding: int = 0
    seed: int = 0

    @property
    def is_fp8(self) -> bool:
        return self.kv_format != "dense"

    def __str__(self) -> str:
        lists = "_".join(
            f"k{each.topk}p{each.page_block_size}{'' if each.lengths is None else '-'.join(map(str, each.lengths))}"
            for each in (self.main, self.extra)
            if each is not None
        )
        return (
            f"b{self.batch_size}_s{self.seq_len_q}_h{self.num_heads_q}_{self.kv_format}_d{self.head_dim_qk}_{lists}"
            f"{'_sink' if self.has_sink else ''}{'_padded' if self.padding else ''}"
        )


@dataclasses.dataclass
class Chosen:
    """What a call gets of a list, and `tokens`, (num_tokens, head_dim_qk), what the cache holds in float32."""

    k_cache: torch.Tensor
    indices: torch.Tensor
    lengths: torch.Tensor | None
    tokens: torch.Tensor


@dataclasses.dataclass
class SparseInputs:
    q: torch.Tensor
    main: Chosen
    extra: Chosen | None
    attn_sink: torch.Tensor | None

    def to(self, device):
        return _move(self, device)


def _move(value, device):
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        # Strides are part of a case.
        whole = torch.empty(0, dtype=value.dtype, device=device)
        storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
        return whole.set_(storage.untyped_storage(), value.storage_offset(), value.shape, value.stride())
    if dataclasses.is_dataclass(value):
        return type(value)(*(_move(getattr(value, field.name), device) for field in dataclasses.fields(value)))
    return value


def make_sparse_inputs(case: SparseCase) -> SparseInputs:
    """CPU tensors of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch_size, case.seq_len_q, case.num_heads_q, case.head_dim_qk)
    q = _padded((torch.randn(shape, generator=generator) * case.q_std).to(case.dtype), case.padding)
    main = _make_list(case, case.main, generator)
    extra = None if case.extra is None else _make_list(case, case.extra, generator)
    attn_sink = None
    if case.has_sink:
        attn_sink = 2 * torch.randn(case.num_heads_q, generator=generator) + 3
        if case.num_heads_q > 2:
            attn_sink[:2] = torch.tensor([math.inf, -math.inf])
    return SparseInputs(q, main, extra, attn_sink)


def _make_list(case: SparseCase, chosen: List, generator) -> Chosen:
    num_tokens = chosen.num_pages * chosen.page_block_size
    indices = random_indices((case.batch_size, case.seq_len_q, chosen.topk), num_tokens, case.invalid, generator)
    if chosen.page_block_size > 1 and num_tokens and chosen.topk >= 4:  # the ends of pages, and one token twice
        page = chosen.page_block_size
        indices[..., :4] = torch.tensor([0, page - 1, num_tokens - page, num_tokens - page], dtype=torch.int32)
    lengths = None if chosen.lengths is None else torch.tensor(chosen.lengths, dtype=torch.int32)
    named = torch.zeros(num_tokens, dtype=torch.bool)
    for request in range(case.batch_size):
        counted = indices[request, :, : chosen.topk if lengths is None else max(int(lengths[request]), 0)].flatten()
        named[counted[(counted >= 0) & (counted < num_tokens)].long()] = True
    values = torch.randn((chosen.num_pages, chosen.page_block_size, 1, case.head_dim_qk), generator=generator)
    k_cache = poisoned_cache(values.to(case.dtype), case.kv_format, named, case.padding)
    tokens = k_cache if not case.is_fp8 else tilemla.dequantize_k_cache(k_cache, case.kv_format, torch.float32)
    return Chosen(k_cache, _padded(indices, case.padding), lengths, tokens.reshape(num_tokens, case.head_dim_qk))


def random_indices(shape, num_tokens, invalid, generator):
    """Indices of a cache of `num_tokens`; a share of them names no token."""
    indices = torch.randint(0, max(num_tokens, 1), shape, generator=generator, dtype=torch.int32)
    wrong = torch.tensor([-1, -(2**31), num_tokens, 2**31 - 1, 114514 + num_tokens], dtype=torch.int32)
    fillers = wrong[torch.randint(0, len(wrong), shape, generator=generator)]
    is_wrong = torch.rand(shape, generator=generator) < (invalid if num_tokens else 2.0)
    return torch.where(is_wrong, fillers, indices)


def poisoned_cache(values, kv_format, named, padding=0):
    """A cache of `values` (num_pages, page, 1, head_dim), with NaN wherever no named token is, pages apart."""
    num_pages, page_block_size = values.shape[:2]
    named = named.view(num_pages, page_block_size)
    if kv_format == "dense":
        values = values.clone()
        values[~named] = math.nan
        return _padded(values, padding, math.nan)
    layout = FP8_LAYOUTS[kv_format]
    quantized = tilemla.quantize_k_cache(values, kv_format)
    width = page_block_size * layout.bytes_per_token
    stride = quantized.stride(0) if padding == 0 and num_pages else width + padding
    pages = torch.full((num_pages * stride,), 0xFF, dtype=torch.uint8).as_strided((num_pages, width), (stride, 1))
    source = quantized.view(torch.uint8).as_strided((num_pages, width), (quantized.stride(0), 1))
    is_data = torch.zeros((num_pages, width), dtype=torch.bool)
    if layout.scales_apart:
        data = layout.bytes_per_token - layout.scale_bytes
        split = page_block_size * data
        is_data[:, :split] = named.repeat_interleave(data, dim=1)
        scales = named.repeat_interleave(layout.scale_bytes, dim=1)
        # The byte that pads a token's scales is nobody's.
        scales[:, layout.scale_bytes - 1 :: layout.scale_bytes] = False
        is_data[:, split:] = scales
    else:
        is_data[:] = named.repeat_interleave(layout.bytes_per_token, dim=1)
    pages[is_data] = source[is_data]
    shape = (num_pages, page_block_size, 1, layout.bytes_per_token)
    strides = (stride, layout.bytes_per_token, layout.bytes_per_token, 1)
    return pages.view(torch.float8_e4m3fn).as_strided(shape, strides)


def _padded(tensor, padding, filler=0):
    """The same values with more between them, but for the last dimension."""
    if not padding:
        return tensor
    shape = [size + 1 for size in tensor.shape[:-1]] + [tensor.shape[-1] + 8]
    whole = torch.full(shape, filler, dtype=tensor.dtype)
    view = whole[tuple(slice(size) for size in tensor.shape)]
    view.copy_(tensor)
    return view


def sparse_reference(case: SparseCase, inputs: SparseInputs) -> Reference:
    """What is right, in the shapes of a decode call's results."""
    batch_size, seq_len_q, num_heads_q, _ = inputs.q.shape
    lists = []
    for chosen in (inputs.main, inputs.extra):
        if chosen is not None:
            lengths = None if chosen.lengths is None else chosen.lengths.repeat_interleave(seq_len_q)
            lists.append((chosen.tokens, chosen.indices.flatten(0, 1), lengths))
    reference, _ = chosen_reference(
        inputs.q.flatten(0, 1), lists, softmax_scale=case.softmax_scale, attn_sink=inputs.attn_sink
    )
    by_query = (batch_size, seq_len_q, num_heads_q)
    return Reference(
        reference.out.view(*by_query, HEAD_DIM_V),
        reference.out_magnitude.view(*by_query, HEAD_DIM_V),
        reference.lse.view(by_query).transpose(1, 2),
        reference.score_magnitude.view(by_query).transpose(1, 2),
    )


def num_tokens_of(case: SparseCase) -> list[int]:
    """What the schedule takes for the lengths of the requests: 64 for each block of either list."""
    totals = [0] * case.batch_size
    for each in (case.main, case.extra):
        if each is not None:
            counts = each.lengths or (each.topk,) * case.batch_size
            totals = [
                total + -(-min(max(count, 0), each.topk) // 64) * 64
                for total, count in zip(totals, counts, strict=True)
            ]
    return totals


def require_kernel(device: torch.device, kernel: str, kv_format: str) -> None:
    """Skip a test on a GPU that there is no such kernel for yet."""
    arch = "sm_90a" if device.type == "cuda" else "cpu"
    if (arch, kernel, kv_format) not in {(spec.arch, spec.kernel, spec.kv_format) for spec in SUPPORTED_SPECS}:
        pytest.skip(f"there is no {kernel} of a {kv_format} cache for {arch}")


def decode_sparse(case: SparseCase, inputs: SparseInputs, schedule=None, **options):
    """The public call."""
    require_kernel(inputs.q.device, "mla_sparse_decode", case.kv_format)
    tile_scheduler_metadata, num_splits = schedule or tilemla.get_mla_metadata()
    extra = inputs.extra
    return tilemla.flash_mla_with_kvcache(
        inputs.q,
        inputs.main.k_cache,
        None,
        None,
        HEAD_DIM_V,
        tile_scheduler_metadata,
        num_splits,
        case.softmax_scale,
        False,
        case.is_fp8,
        inputs.main.indices,
        inputs.attn_sink,
        None if extra is None else extra.k_cache,
        None if extra is None else extra.indices,
        inputs.main.lengths,
        None if extra is None else extra.lengths,
        **options,
    )
