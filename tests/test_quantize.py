"""FP8 caches: round trips, the least scale, and where FlashMLA's kernels look for each byte."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilemla
from tilemla.kv_formats import FP8_LAYOUTS

FORMATS = sorted(FP8_LAYOUTS)
# Half of the distance between e4m3's neighbours, over the smaller of them.
E4M3_RELATIVE_ERROR = 2.0**-4
E4M3_LEAST = 2.0**-9


def random_cache(kv_format, num_blocks=2, page_block_size=3, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_blocks, page_block_size, 1, FP8_LAYOUTS[kv_format].head_dim)
    return torch.randn(shape, generator=generator).to(dtype)


def tiles_of(k_cache, kv_format):
    layout = FP8_LAYOUTS[kv_format]
    return k_cache[..., : layout.head_dim_nope].double().unflatten(-1, (layout.num_tiles, layout.tile))


@given(
    kv_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    page_block_size=st.sampled_from([1, 2, 64]),
    num_blocks=st.integers(0, 3),
    exponent=st.integers(-30, 12),
    seed=st.integers(0, 99),
)
def test_round_trip(kv_format, dtype, page_block_size, num_blocks, exponent, seed):
    layout = FP8_LAYOUTS[kv_format]
    k_cache = random_cache(kv_format, num_blocks, page_block_size, dtype, seed) * 2.0**exponent
    quantized = tilemla.quantize_k_cache(k_cache, kv_format)
    assert quantized.dtype == torch.float8_e4m3fn
    assert quantized.shape == (num_blocks, page_block_size, 1, layout.bytes_per_token)
    back = tilemla.dequantize_k_cache(quantized, kv_format, torch.float32)
    rope = k_cache[..., layout.head_dim_nope :]
    assert torch.equal(back[..., layout.head_dim_nope :], rope.to(torch.bfloat16).float())
    tiles = tiles_of(k_cache, kv_format)
    scale = torch.exp2(torch.ceil(torch.log2((tiles.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-4))))
    bound = torch.maximum(tiles.abs() * E4M3_RELATIVE_ERROR, scale * E4M3_LEAST / 2)
    assert bool(((tiles_of(back, kv_format) - tiles).abs() <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize("kv_format", FORMATS)
def test_what_is_quantized_already_is_kept(kv_format):
    once = tilemla.dequantize_k_cache(tilemla.quantize_k_cache(random_cache(kv_format), kv_format), kv_format)
    assert torch.equal(tilemla.dequantize_k_cache(tilemla.quantize_k_cache(once, kv_format), kv_format), once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_results_are_rounded_once(kv_format, dtype):
    quantized = tilemla.quantize_k_cache(random_cache(kv_format), kv_format)
    exact = tilemla.dequantize_k_cache(quantized, kv_format, torch.float32)
    assert torch.equal(tilemla.dequantize_k_cache(quantized, kv_format, dtype), exact.to(dtype))


@pytest.mark.parametrize(
    "largest, scale",
    [(448.0, 1.0), (449.0, 2.0), (0.0, 2.0**-13), (1e-6, 2.0**-13), (3e38, 2.0**120), (224.0, 0.5), (225.0, 1.0)],
)
@pytest.mark.parametrize("kv_format", FORMATS)
def test_scales_are_the_least_powers_of_two(kv_format, largest, scale):
    layout = FP8_LAYOUTS[kv_format]
    k_cache = torch.zeros((1, 1, 1, layout.head_dim))
    k_cache[..., layout.tile + 5] = -largest
    quantized = tilemla.quantize_k_cache(k_cache, kv_format)
    raw = bytes(quantized.flatten().view(torch.uint8).tolist())
    if kv_format == "fp8_656":
        scales = np.frombuffer(raw[512:528], np.float32).tolist()
    else:
        scales = [2.0 ** (byte - 127) for byte in raw[576:583]]
    assert scales == [2.0**-13, scale] + [2.0**-13] * (layout.num_tiles - 2)
    value = torch.tensor([raw[layout.tile + 5]], dtype=torch.uint8).view(torch.float8_e4m3fn).double().item()
    assert value * scale == pytest.approx(-largest, rel=E4M3_RELATIVE_ERROR, abs=2.0**-13 * E4M3_LEAST)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_what_is_not_finite_stays_within_its_tile(kv_format, bad):
    layout = FP8_LAYOUTS[kv_format]
    k_cache = random_cache(kv_format)
    k_cache[1, 2, 0, layout.tile] = bad
    back = tilemla.dequantize_k_cache(tilemla.quantize_k_cache(k_cache, kv_format), kv_format)
    expected = torch.zeros(back.shape, dtype=torch.bool)
    expected[1, 2, 0, layout.tile : 2 * layout.tile] = True
    assert torch.equal(back.isnan(), expected)


def test_bytes_of_656_are_a_token_after_the_other():
    quantized = tilemla.quantize_k_cache(random_cache("fp8_656"), "fp8_656")
    assert quantized.is_contiguous()
    token = quantized[1, 2, 0].view(torch.uint8)
    expected = tilemla.dequantize_k_cache(quantized, "fp8_656", torch.float32)[1, 2, 0]
    values = token[:512].view(torch.float8_e4m3fn).float() * token[512:528].view(torch.float32).repeat_interleave(128)
    assert torch.equal(values, expected[:512])
    assert torch.equal(token[528:].view(torch.bfloat16).float(), expected[512:])


@pytest.mark.parametrize("page_block_size, stride", [(1, 1152), (64, 37440), (72, 42048)])
def test_bytes_of_584_have_the_scales_of_a_page_last(page_block_size, stride):
    quantized = tilemla.quantize_k_cache(random_cache("fp8_584", 3, page_block_size), "fp8_584")
    assert quantized.stride(0) == stride
    page = quantized.view(torch.uint8).as_strided((page_block_size * 584,), (1,), 2 * stride)
    expected = tilemla.dequantize_k_cache(quantized, "fp8_584", torch.float32)[2, -1, 0]
    token = page[(page_block_size - 1) * 576 : page_block_size * 576]
    scales = page[-8:-1].float().sub(127).exp2().repeat_interleave(64)
    assert torch.equal(token[:448].view(torch.float8_e4m3fn).float() * scales, expected[:448])
    assert torch.equal(token[448:].view(torch.bfloat16).float(), expected[448:])


@pytest.mark.parametrize("kv_format", FORMATS)
def test_caches_may_lie_anywhere(kv_format):
    layout = FP8_LAYOUTS[kv_format]
    k_cache = random_cache(kv_format, 4, 6)[::2, 1::2]
    quantized = tilemla.quantize_k_cache(k_cache, kv_format)
    assert torch.equal(
        quantized.contiguous().view(torch.uint8),
        tilemla.quantize_k_cache(k_cache.contiguous(), kv_format).contiguous().view(torch.uint8),
    )
    # At an odd address, with pages an odd distance apart, and other names of a byte.
    width = 3 * layout.bytes_per_token
    moved = torch.full((1 + 2 * (width + 7),), 255, dtype=torch.uint8)
    moved = moved[1:].as_strided((2, 3, 1, layout.bytes_per_token), (width + 7, layout.bytes_per_token, width, 1))
    moved.copy_(quantized.view(torch.uint8))
    expected = tilemla.dequantize_k_cache(quantized, kv_format)
    for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        assert torch.equal(tilemla.dequantize_k_cache(moved.view(dtype), kv_format), expected)


@pytest.mark.parametrize(
    "function, changes, error, message",
    [
        ("quantize_k_cache", {"kv_format": "fp8"}, ValueError, "kv_format must be one of fp8_656, fp8_584, got 'fp8'"),
        ("quantize_k_cache", {"kv_format": 656}, TypeError, "kv_format must be a str, got int 656"),
        ("quantize_k_cache", {"k_cache": None}, TypeError, r"k_cache must be a torch.Tensor \(num_blocks"),
        ("quantize_k_cache", {"k_cache": torch.zeros(2, 3, 576)}, ValueError, "must have 4 dimensions"),
        ("quantize_k_cache", {"k_cache": torch.zeros(2, 3, 2, 576)}, ValueError, "1, 576.* for fp8_656, got"),
        ("quantize_k_cache", {"k_cache": torch.zeros(2, 3, 1, 512)}, ValueError, "1, 576.* for fp8_656, got"),
        ("quantize_k_cache", {"k_cache": torch.zeros(2, 3, 1, 576).int()}, TypeError, "bfloat16.*got a int32"),
        ("dequantize_k_cache", {"k_cache": torch.zeros(2, 3, 1, 656)}, TypeError, "float8_e4m3fn.*got a float32"),
        ("dequantize_k_cache", {"k_cache": torch.zeros(2, 3, 1, 584).byte()}, ValueError, "1, 656.* for fp8_656"),
        (
            "dequantize_k_cache",
            {"k_cache": torch.zeros(2, 6, 1, 656).byte()[:, ::2]},
            ValueError,
            r"one after the other.*got strides \(3936, 1312, 656, 1\)",
        ),
        (
            "dequantize_k_cache",
            {"k_cache": torch.zeros(2, 3, 1, 656).byte(), "dtype": torch.float64},
            TypeError,
            "dtype must be one of torch.bfloat16, .*, got torch.float64",
        ),
    ],
)
def test_refusals(function, changes, error, message):
    arguments = {"k_cache": torch.zeros(2, 3, 1, 576), "kv_format": "fp8_656"}
    with pytest.raises(error, match=message):
        getattr(tilemla, function)(**{**arguments, **changes})
