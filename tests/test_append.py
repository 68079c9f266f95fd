"""Appending tokens to caches of bytes: the bits of ``quantize_k_cache``, where they belong and nowhere else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilemla
from sparse_cases import require_kernel
from tilemla.kv_formats import FP8_LAYOUTS

FORMATS = sorted(FP8_LAYOUTS)


def empty_cache(kv_format, num_blocks, page_block_size, device, padding=0):
    """Pages of 0xA5, which quantising never leaves as they are."""
    require_kernel(device, "mla_sparse_decode", kv_format)
    width = FP8_LAYOUTS[kv_format].bytes_per_token
    stride = FP8_LAYOUTS[kv_format].bytes_per_page(page_block_size) + padding
    whole = torch.full((num_blocks * stride,), 0xA5, dtype=torch.uint8, device=device)
    return whole, whole.as_strided((num_blocks, page_block_size, 1, width), (stride, width, width, 1))


def slots_of(whole, kv_format, num_blocks, page_block_size):
    """The bytes of each slot, (slots, bytes of a token), scales last where they lie apart."""
    layout = FP8_LAYOUTS[kv_format]
    pages = whole.view(num_blocks, -1)[:, : page_block_size * layout.bytes_per_token]
    split = page_block_size * layout.bytes_apart
    data = pages[:, :split].reshape(num_blocks * page_block_size, -1)
    return torch.cat([data, pages[:, split:].reshape(len(data), -1)], 1)


def check(kv_format, latent, slots, num_blocks, page_block_size, padding=0):
    device = latent.device
    whole, k_cache = empty_cache(kv_format, num_blocks, page_block_size, device, padding)
    tilemla.append_k_cache(latent, k_cache, torch.tensor(slots, dtype=torch.int64, device=device))
    expected = torch.full((num_blocks * page_block_size, FP8_LAYOUTS[kv_format].bytes_per_token), 0xA5)
    for token, slot in zip(latent, slots, strict=True):
        if 0 <= slot < len(expected):
            page = tilemla.quantize_k_cache(token.view(1, 1, 1, -1).cpu(), kv_format).view(torch.uint8)
            expected[slot] = page.flatten()
    assert torch.equal(slots_of(whole, kv_format, num_blocks, page_block_size).cpu(), expected.to(torch.uint8))
    between = whole.view(num_blocks, -1)[:, page_block_size * FP8_LAYOUTS[kv_format].bytes_per_token :]
    assert bool((between == 0xA5).all())


@given(
    kv_format=st.sampled_from(FORMATS),
    page=st.sampled_from([(3, 1), (2, 5), (1, 64), (2, 64)]),
    exponent=st.integers(-40, 100),
    spread=st.sampled_from([0, 1, 6]),
    order=st.randoms(use_true_random=False),
    padding=st.sampled_from([0, 7]),
    seed=st.integers(0, 9999),
)
def test_any(kv_format, page, exponent, spread, order, padding, seed):
    num_blocks, page_block_size = page
    generator = torch.Generator().manual_seed(seed)
    slots = order.sample(range(num_blocks * page_block_size), min(4, num_blocks * page_block_size))
    slots += [-1, num_blocks * page_block_size, -(2**63), 2**63 - 1]
    order.shuffle(slots)
    shape = (len(slots), FP8_LAYOUTS[kv_format].head_dim)
    powers = torch.exp2(exponent + spread * torch.randn(shape, generator=generator))
    latent = (torch.randn(shape, generator=generator) * powers).bfloat16()
    check(kv_format, latent, slots, num_blocks, page_block_size, padding)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_every_value_at_the_least_scale(device, kv_format):
    """Every bfloat16 up to 448 * 2**-13, of both signs: each e4m3 with its ties, denormals and zeros."""
    layout = FP8_LAYOUTS[kv_format]
    bits = torch.arange(0x3D60 + 1, dtype=torch.int32)  # 448 * 2**-13
    values = torch.cat([bits, bits | 0x8000]).to(torch.uint16).view(torch.bfloat16)
    num_tokens = -(-len(values) // layout.head_dim_nope)
    latent = torch.zeros((num_tokens, layout.head_dim), dtype=torch.bfloat16)
    filled = torch.zeros(num_tokens * layout.head_dim_nope, dtype=torch.bfloat16)
    filled[: len(values)] = values
    latent[:, : layout.head_dim_nope] = filled.view(num_tokens, -1)
    check(kv_format, latent.to(device), list(range(num_tokens)), num_tokens, 1)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("kv_format", FORMATS)
def test_what_is_not_finite_stays_within_its_tile(device, kv_format, value):
    layout = FP8_LAYOUTS[kv_format]
    latent = torch.randn((1, layout.head_dim), device=device).bfloat16()
    latent[0, layout.tile + 3] = value
    whole, k_cache = empty_cache(kv_format, 1, 2, device)
    tilemla.append_k_cache(latent, k_cache, torch.tensor([1], device=device))
    got = slots_of(whole, kv_format, 1, 2)[1].cpu()
    expected = tilemla.quantize_k_cache(latent.view(1, 1, 1, -1).cpu(), kv_format).view(torch.uint8).flatten()
    is_nan = (expected[: layout.head_dim_nope] & 0x7F) == 0x7F  # of either sign, which says nothing
    assert torch.equal((got[: layout.head_dim_nope] & 0x7F) == 0x7F, is_nan) and is_nan.sum() == layout.tile
    expected[: layout.head_dim_nope][is_nan] = got[: layout.head_dim_nope][is_nan]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_rows_apart_and_names_of_a_byte(device, kv_format):
    layout = FP8_LAYOUTS[kv_format]
    pad = 3 if device.type == "cpu" else 8
    latent = torch.randn((6, layout.head_dim + pad), device=device).bfloat16()[::2, : layout.head_dim]
    if pad == 8:
        with pytest.raises(ValueError, match="latent must start at a multiple of 16 bytes"):
            check(kv_format, latent.new_zeros((3, layout.head_dim + 3))[:, 1 : layout.head_dim + 1], [5, 0, 3], 2, 3)
    check(kv_format, latent, [5, 0, 3], 2, 3)
    for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        _, k_cache = empty_cache(kv_format, 2, 3, device)
        tilemla.append_k_cache(latent, k_cache.view(dtype), torch.tensor([5, 0, 3], device=device))
        expected = tilemla.dequantize_k_cache(tilemla.quantize_k_cache(latent.view(3, 1, 1, -1), kv_format), kv_format)
        got = tilemla.dequantize_k_cache(k_cache, kv_format).view(6, -1)
        assert torch.equal(got[[5, 0, 3]], expected.view(3, -1))


@pytest.mark.parametrize("kv_format", FORMATS)
def test_what_was_appended_is_attended_to(device, kv_format):
    layout = FP8_LAYOUTS[kv_format]
    latent = torch.randn((3, layout.head_dim), device=device).bfloat16()
    _, k_cache = empty_cache(kv_format, 2, 3, device)
    k_cache.view(torch.uint8).fill_(255)
    tilemla.append_k_cache(latent, k_cache, torch.tensor([4, 1, 2], device=device))
    q = torch.zeros((3, 1, 1, layout.head_dim), dtype=torch.bfloat16, device=device)
    indices = torch.tensor([4, 1, 2], dtype=torch.int32, device=device).view(3, 1, 1)
    schedule = tilemla.get_mla_metadata()
    out, _ = tilemla.flash_mla_with_kvcache(
        q, k_cache, None, None, 512, *schedule, is_fp8_kvcache=True, indices=indices
    )
    torch.testing.assert_close(out[:, 0, 0].float(), latent[:, :512].float(), rtol=2.0**-4, atol=1e-2)


@pytest.mark.parametrize("count", [0, 3])
def test_there_may_be_nothing(device, count):
    latent = torch.zeros((count, 576), dtype=torch.bfloat16, device=device)
    slots = torch.zeros(count, dtype=torch.int64, device=device)
    tilemla.append_k_cache(latent, empty_cache("fp8_656", 0, 4, device)[1], slots)


BAD = {
    "latent rank": ("latent", lambda x: x[0], ValueError, "latent must have 2 dimensions .num_tokens, head_dim"),
    "latent width": ("latent", lambda x: x[:, :500], ValueError, "latent must have 512 or 576 elements a token, got"),
    "latent dtype": ("latent", lambda x: x.half(), NotImplementedError, "latent must be bfloat16, got a float16"),
    "latent strided": ("latent", lambda x: torch.stack([x, x], -1)[..., 0], ValueError, "latent must have stride 1"),
    "other format": (
        "latent",
        lambda x: x[:, :512],
        ValueError,
        "k_cache must have 584 bytes a token, .* 512 elements",
    ),
    "k_cache rank": ("k_cache", lambda x: x[0], ValueError, "k_cache must have 4 dimensions"),
    "k_cache dtype": ("k_cache", lambda x: x.half(), TypeError, "k_cache must be one of float8_e4m3fn, uint8, int8"),
    "k_cache heads": ("k_cache", lambda x: x.expand(-1, -1, 2, -1), ValueError, "k_cache must have num_heads_k = 1"),
    "k_cache strided": ("k_cache", lambda x: x[:, ::2], ValueError, "k_cache must hold the bytes of a page one after"),
    "k_cache overlaps": ("k_cache", lambda x: x[:1].expand(2, -1, -1, -1), ValueError, "pages that do not overlap"),
    "k_cache device": ("k_cache", lambda x: x.to("meta"), ValueError, "k_cache must be on cpu, as latent"),
    "slots dtype": ("slot_mapping", lambda x: x.int(), TypeError, "slot_mapping must be int64, got a int32"),
    "slots count": ("slot_mapping", lambda x: x[:1], ValueError, "slot_mapping must have num_tokens = 2 elements"),
    "slots rank": ("slot_mapping", lambda x: x[None], ValueError, "slot_mapping must have 1 dimensions"),
    "slots device": ("slot_mapping", lambda x: x.to("meta"), ValueError, "slot_mapping must be on cpu, as latent"),
    "slots strided": ("slot_mapping", lambda x: x.repeat(2)[::2], ValueError, "slot_mapping must be contiguous"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name):
    _, k_cache = empty_cache("fp8_656", 2, 4, torch.device("cpu"))
    arguments = dict(latent=torch.zeros((2, 576)).bfloat16(), k_cache=k_cache, slot_mapping=torch.tensor([1, 2]))
    tilemla.append_k_cache(**arguments)
    changed, change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        tilemla.append_k_cache(**(arguments | {changed: change(arguments[changed])}))
