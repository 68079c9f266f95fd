"""Appending new tokens to a paged cache in one of FlashMLA's formats of bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from tilemla import sparse_operators  # noqa: F401  # torch.ops.tilemla
from tilemla.kv_formats import FP8_LAYOUTS
from tilemla.launch import module_of_kind
from tilemla.sparse_validate import FP8_FORMATS, check_byte_cache, check_one_head, pages_of
from tilemla.spec import HEAD_DIMS
from tilemla.streams import on_device
from tilemla.validate import TMA_ALIGNMENT_BYTES, TMA_ALIGNMENT_ELEMENTS, check_tensor, describe

_HEAD_DIMS_V = dict(HEAD_DIMS)


def append_k_cache(latent: torch.Tensor, k_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Quantise tokens and write them into a paged cache, in place; to the bits that ``quantize_k_cache`` makes.

    Parameters
    ----------
    latent : Tensor, (num_tokens, head_dim), bfloat16
        Keys: 576 elements for a cache of 656 bytes a token, 512 for one of 584. The last 64 are kept in bfloat16. Of
        any stride between tokens; on a GPU, address and stride must be multiples of 16 bytes.
    k_cache : Tensor, (num_blocks, page_block_size, 1, bytes of a token), float8_e4m3fn, uint8 or int8
        As ``quantize_k_cache`` returns it, pages any distance apart.
    slot_mapping : Tensor, (num_tokens,), int64
        Where each token goes, ``page * page_block_size + offset``. Tokens whose slot is negative or past the cache are
        left out. What lies in a slot that is given twice is either of the two, or a mixture.

    Raises
    ------
    TypeError, ValueError
        On an argument that does not fit, naming it, what it must be and what it got.
    NotImplementedError
        When there is no kernel for the device or dtype, or it cannot be built (``ModuleNotBuiltError``).
    """
    if is_dynamo_compiling():
        torch.ops.tilemla.append_k_cache(latent, k_cache, slot_mapping)
        return
    check_tensor("latent", latent, 2, "(num_tokens, head_dim)")
    num_tokens, head_dim = latent.shape
    if head_dim not in FP8_FORMATS:
        known = " or ".join(map(str, sorted(FP8_FORMATS)))
        raise ValueError(f"latent must have {known} elements a token, got {describe(latent)}")
    if latent.dtype is not torch.bfloat16:
        raise NotImplementedError(f"latent must be bfloat16, got {describe(latent)}")
    if latent.stride(1) != 1:
        raise ValueError(f"latent must have stride 1 in its last dimension, got strides {latent.stride()}")
    is_aligned = not latent.data_ptr() % TMA_ALIGNMENT_BYTES
    if latent.is_cuda and not (is_aligned and (num_tokens < 2 or not latent.stride(0) % TMA_ALIGNMENT_ELEMENTS)):
        raise ValueError(
            f"latent must start at a multiple of {TMA_ALIGNMENT_BYTES} bytes, with strides that are multiples of "
            f"{TMA_ALIGNMENT_ELEMENTS} elements, got "
            f"address {latent.data_ptr():#x} and strides {latent.stride()}; make it contiguous or pad its rows"
        )
    kv_format = FP8_FORMATS[head_dim]
    check_one_head("k_cache", k_cache, latent.device, "latent")
    check_byte_cache("k_cache", k_cache, kv_format, f"latent has {FP8_LAYOUTS[kv_format].head_dim} elements a token")
    _check_slots(slot_mapping, num_tokens, latent.device)
    module = module_of_kind(
        latent.device,
        "append_k_cache",
        kernel="mla_sparse_decode",
        kv_format=kv_format,
        dtype=latent.dtype,
        head_dim_qk=head_dim,
        head_dim_v=_HEAD_DIMS_V[head_dim],
    )
    if not num_tokens or not k_cache.shape[0]:
        return
    pages = pages_of("k_cache", k_cache.detach())
    with on_device(latent.device):
        module.functions["append_kv"](latent.detach(), slot_mapping, pages, k_cache.shape[1])


def _check_slots(slot_mapping: Any, num_tokens: int, device: torch.device) -> None:
    check_tensor("slot_mapping", slot_mapping, 1, "(num_tokens,)")
    if slot_mapping.dtype is not torch.int64:
        raise TypeError(f"slot_mapping must be int64, got {describe(slot_mapping)}")
    if slot_mapping.device != device:
        raise ValueError(f"slot_mapping must be on {device}, as latent, got {describe(slot_mapping)}")
    if slot_mapping.shape[0] != num_tokens:
        raise ValueError(f"slot_mapping must have num_tokens = {num_tokens} elements, got {describe(slot_mapping)}")
    if not slot_mapping.is_contiguous():
        raise ValueError(f"slot_mapping must be contiguous, got stride {slot_mapping.stride()}")
