"""merge_states: two results over parts of a cache are the result over all of it."""

import math

import pytest
import torch

import tilemla
from cases import Case, make_inputs
from reference import check_result, reference_of

DTYPES = [torch.bfloat16, torch.float16]
NO_KEYS = (math.inf, -math.inf)


def bits(state):
    out, lse = state
    return out.view(torch.int16), lse.contiguous().view(torch.int32)


def assert_same_bits(actual, expected):
    for left, right in zip(bits(actual), bits(expected), strict=True):
        assert torch.equal(left, right)


def make_state(device, dtype=torch.bfloat16, shape=(3, 2, 5, 512), seed=0, scale=1.0):
    """A state whose log-sum-exp has the strides of a decode call's."""
    generator = torch.Generator().manual_seed(seed)
    batch_size, seq_len_q, num_heads_q, _ = shape
    out = torch.randn(shape, generator=generator).to(dtype)
    lse = scale * torch.randn((batch_size, seq_len_q, num_heads_q), generator=generator)
    return out.to(device), lse.to(device).transpose(1, 2)


def merge_reference(out_a, lse_a, out_b, lse_b):
    """In float64, for states that saw something."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    weight_a, weight_b = (torch.exp(x.double() - lse).transpose(1, 2)[..., None] for x in (lse_a, lse_b))
    return weight_a * out_a.double() + weight_b * out_b.double(), lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 5, 512), (1, 1, 1, 512), (7, 1, 128, 512), (1, 9, 3, 512)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e6])
def test_merged_states_are_right(device, dtype, shape, scale):
    a, b = (make_state(device, dtype, shape, seed, scale) for seed in (1, 2))
    out, lse = tilemla.merge_states(*a, *b)
    expected_out, expected_lse = merge_reference(*a, *b)
    unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), expected_out, rtol=1.01 * unit, atol=3e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=3e-7, atol=3e-7)
    assert out.dtype is dtype and out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_a_cache(device, dtype):
    """The pages of each request are dealt to two caches; one request has no tokens, one no tokens in the second."""
    case = Case(lengths=(500, 0, 64, 300), seq_len_q=2, num_heads_q=6, num_heads_k=2, dtype=dtype, seed=3)
    inputs = make_inputs(case).to(device)
    states = []
    for first in (0, 1):
        table = inputs.block_table[:, first::2].contiguous()
        lengths = torch.tensor([sum(1 for t in range(n) if t // 64 % 2 == first) for n in case.lengths])
        lengths = lengths.to(device, torch.int32)
        schedule = tilemla.get_mla_metadata(lengths, 6, 2)
        states += tilemla.flash_mla_with_kvcache(inputs.q, inputs.k_cache, table, lengths, 512, *schedule)
    out, lse = tilemla.merge_states(*states)
    check_result(out, lse, reference_of(inputs))
    assert torch.isposinf(lse[1]).all() and not out[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("no_keys", NO_KEYS)
def test_empty_states(device, dtype, no_keys):
    """Merging with an empty state returns the other bit for bit, even beside NaN; of two empty ones nothing is left."""
    out, lse = make_state(device, dtype)
    out[0, 0, 0, :3] = torch.tensor([-0.0, math.inf, math.nan], dtype=dtype)
    empty = torch.full_like(out, math.nan), torch.full_like(lse, no_keys)
    assert_same_bits(tilemla.merge_states(out, lse, *empty), (out, lse))
    assert_same_bits(tilemla.merge_states(*empty, out, lse), (out, lse))
    both_out, both_lse = tilemla.merge_states(*empty, *empty)
    assert not both_out.view(torch.int16).any() and torch.isposinf(both_lse).all()


def test_empty_rows_among_others(device):
    a, b = (make_state(device, seed=seed) for seed in (1, 2))
    expected = tilemla.merge_states(*a, *b)
    a[1][1, 2, 0] = math.inf
    b[1][2, 4, 1] = math.inf
    out, lse = tilemla.merge_states(*a, *b)
    for at, state in (((1, 0, 2), b), ((2, 1, 4), a)):
        request, query, head = at
        assert torch.equal(out[at], state[0][at]) and lse[request, head, query] == state[1][request, head, query]
        expected[0][at], expected[1][request, head, query] = out[at], lse[request, head, query]
    assert_same_bits((out, lse), expected)


def test_not_a_number_is_not_hidden(device):
    a, b = (make_state(device, seed=seed) for seed in (1, 2))
    a[1][0, 0, 0] = math.nan
    out, lse = tilemla.merge_states(*a, *b)
    assert torch.isnan(out[0, 0, 0]).all() and torch.isnan(lse[0, 0, 0])
    assert torch.isnan(out).sum() == 512


def test_order_changes_nothing(device):
    a, b = (make_state(device, seed=seed) for seed in (1, 2))
    assert_same_bits(tilemla.merge_states(*a, *b), tilemla.merge_states(*b, *a))


def test_base_2(device):
    (out_a, lse_a), (out_b, lse_b) = (make_state(device, seed=seed) for seed in (1, 2))
    out, lse = tilemla.merge_states(out_a, lse_a / math.log(2), out_b, lse_b / math.log(2), lse_base="2")
    expected_out, expected_lse = tilemla.merge_states(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out, expected_out, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(lse * math.log(2), expected_lse, rtol=1e-6, atol=1e-6)


def test_strides_change_nothing(device):
    """Contiguous and expanded logarithms, outputs that are slices; nothing that was given is written to."""
    a, b = (make_state(device, seed=seed) for seed in (1, 2))
    expected = tilemla.merge_states(*a, *b)
    wide = torch.full((3, 2, 5, 520), math.nan, dtype=a[0].dtype, device=device)
    wide[..., :512] = a[0]
    before = wide.clone()
    assert_same_bits(tilemla.merge_states(wide[..., :512], a[1].contiguous(), *b), expected)
    assert torch.equal(wide.view(torch.int16), before.view(torch.int16))
    one = torch.ones((1, 1, 1), device=device).expand(3, 5, 2)
    assert_same_bits(tilemla.merge_states(a[0], one, *b), tilemla.merge_states(a[0], one.contiguous(), *b))


def test_no_rows(device):
    state = torch.empty((0, 2, 5, 512), dtype=torch.bfloat16, device=device), torch.empty((0, 5, 2), device=device)
    out, lse = tilemla.merge_states(*state, *state)
    assert out.shape == (0, 2, 5, 512) and lse.shape == (0, 5, 2)


WRONG = {
    "no tensor": (0, lambda x: None, TypeError, "out_a must be a torch.Tensor"),
    "rank": (1, lambda x: x[0], ValueError, "lse_a must have 3 dimensions"),
    "dtype": (2, lambda x: x.float(), NotImplementedError, "out_b must be bfloat16 or float16, got a float32"),
    "other dtype": (2, lambda x: x.half(), TypeError, "out_b must be torch.bfloat16, as out_a"),
    "lse dtype": (3, lambda x: x.double(), TypeError, "lse_b must be float32, got a float64"),
    "head dim": (0, lambda x: x[..., :256], NotImplementedError, "out_a must have head_dim_v = 512"),
    "swapped lse": (1, lambda x: x.transpose(1, 2), ValueError, r"lse_a must have shape .* = \(3, 5, 2\)"),
    "batch": (2, lambda x: x[:2], ValueError, r"lse_b must have shape .* = \(2, 5, 2\)"),
    "device": (3, lambda x: x.to("meta"), ValueError, "lse_b must be on .*, as out_b, got .* on meta"),
}


@pytest.mark.parametrize(("position", "change", "error", "words"), WRONG.values(), ids=WRONG)
def test_bad_argument(position, change, error, words):
    arguments = [*make_state("cpu", seed=1), *make_state("cpu", seed=2)]
    arguments[position] = change(arguments[position])
    with pytest.raises(error, match=words):
        tilemla.merge_states(*arguments)


def test_states_of_other_shapes():
    a, b = make_state("cpu"), make_state("cpu", shape=(3, 2, 4, 512))
    with pytest.raises(ValueError, match=r"out_b must have shape \(3, 2, 5, 512\), as out_a"):
        tilemla.merge_states(*a, *b)


@pytest.mark.parametrize(("base", "error"), [(2, TypeError), ("10", ValueError)])
def test_bad_base(base, error):
    with pytest.raises(error, match="lse_base must be"):
        tilemla.merge_states(*make_state("cpu"), *make_state("cpu"), lse_base=base)
