"""What the sm_90a kernels for indices have that the CPU's have not: tiles of 64 heads, a ring, conversion in place."""

import dataclasses
import math

import pytest
import torch

import tilemla
from reference import check_result, chosen_reference
from schedules import spread_schedule
from sparse_cases import List, SparseCase, decode_sparse, make_sparse_inputs, num_tokens_of, sparse_reference

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
FORMATS = {
    "fp8_656": dict(kv_format="fp8_656", head_dim_qk=576),
    "fp8_584": dict(kv_format="fp8_584", head_dim_qk=512),
    "dense": dict(kv_format="dense", head_dim_qk=576),
    "dense d512": dict(kv_format="dense", head_dim_qk=512),
    "dense fp16": dict(kv_format="dense", head_dim_qk=576, dtype=torch.float16),
}
by_format = pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))


def spread(case, num_sm_parts):
    """As many splits as there can be."""
    return tuple(torch.from_numpy(array).to(DEVICE) for array in spread_schedule(num_tokens_of(case), num_sm_parts))


def check(case, num_sm_parts=None):
    inputs = make_sparse_inputs(case).to(DEVICE)
    schedule = None if num_sm_parts is None else spread(case, num_sm_parts)
    out, lse = decode_sparse(case, inputs, schedule)
    check_result(out, lse, sparse_reference(case, inputs))
    return out, lse


@by_format
@pytest.mark.parametrize("num_heads_q", [1, 16, 63, 64, 65, 128])
@pytest.mark.parametrize("num_sm_parts", [1, 7])
def test_tiles_of_heads(form, num_heads_q, num_sm_parts):
    check(SparseCase(2, 2, num_heads_q, main=List(200, 5), has_sink=num_heads_q > 2, **form), num_sm_parts)


@by_format
@pytest.mark.parametrize("topk", [1, 63, 64, 65, 128, 129, 1000, 2048])
def test_blocks(form, topk):
    """A turn of the ring and more, and last blocks of any length."""
    check(SparseCase(3, 1, 64, main=List(topk, 40), **form), 5)


@by_format
def test_requests_follow_each_other_in_one_part(form):
    """Queries of the next request are loaded under the last block of this one, or where it has no block."""
    lengths = (0, 64, 65, 0, 0, 1, 200, 128, 0)
    case = SparseCase(9, 2, 64, main=List(200, 9, lengths=lengths), has_sink=True, **form)
    for num_sm_parts in (1, 3):
        out, lse = check(case, num_sm_parts)
        assert not out[0].any() and torch.isposinf(lse[0]).all()


@by_format
def test_results_are_the_same_bit_for_bit(form):
    case = SparseCase(24, 2, 128, main=List(300, 16), extra=List(100, 3), **form)
    inputs = make_sparse_inputs(case).to(DEVICE)
    expected = decode_sparse(case, inputs, spread(case, 33))
    for _ in range(20):
        for one, other in zip(decode_sparse(case, inputs, spread(case, 33)), expected, strict=True):
            assert torch.equal(one, other)


@by_format
def test_tiles_that_share_their_tokens_do_not_depend_on_each_other(form):
    case = SparseCase(5, 2, 128, main=List(300, 16, lengths=(300, 0, 64, 65, 1)), extra=List(100, 3), **form)
    inputs = make_sparse_inputs(case).to(DEVICE)
    schedule = spread(case, 7)
    out, lse = decode_sparse(case, inputs, schedule)
    reference = sparse_reference(case, inputs)
    check_result(out, lse, reference)
    first, second = inputs.q[:, :, :64], inputs.q[:, :, 64:]
    swapped_out, swapped_lse = decode_sparse(
        case, dataclasses.replace(inputs, q=torch.cat((second, first), dim=2)), schedule
    )
    assert torch.equal(swapped_out, torch.cat((out[:, :, 64:], out[:, :, :64]), dim=2))
    assert torch.equal(swapped_lse, torch.cat((lse[:, 64:], lse[:, :64]), dim=1))
    # By themselves they are summed up in another order.
    for tile in (slice(0, 64), slice(64, 128)):
        out_alone, lse_alone = decode_sparse(case, dataclasses.replace(inputs, q=inputs.q[:, :, tile]), schedule)
        check_result(out_alone, lse_alone, sparse_reference(case, dataclasses.replace(inputs, q=inputs.q[:, :, tile])))


@by_format
@pytest.mark.parametrize("first", [0, 64, 128])
def test_a_block_that_names_nothing(form, first):
    case = SparseCase(1, 1, 64, main=List(192, 9), invalid=0.0, **form)
    inputs = make_sparse_inputs(case).to(DEVICE)
    inputs.main.indices[..., first : first + 64] = -1
    out, lse = decode_sparse(case, inputs, spread(case, 1))
    check_result(out, lse, sparse_reference(case, inputs))


@pytest.mark.parametrize("share", [0.02, 1.0])
def test_scales_that_are_no_bfloat16(share):
    """They take another way to the product, a warp's 16 tokens at a time; both ways round once."""
    case = SparseCase(2, 1, 64, main=List(300, 9), **FORMATS["fp8_656"])
    inputs = make_sparse_inputs(case).to(DEVICE)
    raw = inputs.main.k_cache.view(torch.uint8)
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    tokens = torch.rand(raw.shape[:3], device=DEVICE, generator=generator) < share
    scales = torch.rand((int(tokens.sum()), 4), device=DEVICE, generator=generator) / 64
    raw[tokens, 512:528] = scales.view(torch.uint8)
    plain = tilemla.dequantize_k_cache(inputs.main.k_cache, "fp8_656", torch.bfloat16)
    inputs.main.tokens = plain.flatten(0, 2)
    out, lse = decode_sparse(case, inputs, spread(case, 3))
    check_result(out, lse, sparse_reference(case, inputs))
    # The same cache without a conversion: the same products.
    dense = dataclasses.replace(case, kv_format="dense")
    inputs.main.k_cache = plain
    for one, other in zip(decode_sparse(dense, inputs, spread(case, 3)), (out, lse), strict=True):
        assert torch.equal(one.isnan(), other.isnan()) and torch.allclose(
            one.float(), other.float(), atol=1e-5, rtol=2e-2
        )


@pytest.mark.parametrize("head_dim_qk", [576, 512])
@pytest.mark.parametrize(("seq_len_q", "num_heads_q"), [(1, 64), (3, 65), (70, 16), (2300, 128)])
def test_prefill(head_dim_qk, seq_len_q, num_heads_q):
    """Up to where a CTA takes several queries after each other, some of which name nothing."""
    generator = torch.Generator(device=DEVICE).manual_seed(seq_len_q)
    like = dict(generator=generator, device=DEVICE)
    q = torch.randn((seq_len_q, num_heads_q, head_dim_qk), **like).bfloat16()
    kv = torch.randn((500, 1, head_dim_qk), **like).bfloat16()
    indices = torch.randint(-20, 520, (seq_len_q, 1, 130), dtype=torch.int32, **like)
    lengths = torch.tensor([130, 0, 0, 64, 1, 65], dtype=torch.int32, device=DEVICE).repeat(seq_len_q // 6 + 1)
    lengths = lengths[:seq_len_q].contiguous()
    sink = torch.randn(num_heads_q, **like)
    out, max_logits, lse = tilemla.flash_mla_sparse_fwd(q, kv, indices, head_dim_qk**-0.5, 512, sink, lengths)
    reference, top = chosen_reference(q, [(kv[:, 0], indices[:, 0], lengths)], attn_sink=sink)
    check_result(out, lse, reference)
    assert torch.allclose(max_logits.double(), top, atol=1e-5, rtol=8.01 / 65536)
    assert seq_len_q < 2 or math.isinf(top.min())
