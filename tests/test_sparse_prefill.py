"""Prefill with indices: out, largest score and log-sum-exp against float64, with NaN wherever nothing may be read."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilemla
from reference import check_result, chosen_reference
from sparse_cases import random_indices, require_kernel


@dataclasses.dataclass(frozen=True)
class Prefill:
    seq_len_q: int = 7
    seq_len_kv: int = 90
    num_heads_q: int = 20
    topk: int = 70
    dtype: torch.dtype = torch.bfloat16
    head_dim_qk: int = 576
    has_sink: bool = False
    lengths: tuple[int, ...] | None = None
    sm_scale: float = 0.05
    std: float = 1.0
    invalid: float = 0.2
    padding: int = 0
    seed: int = 0

    def __str__(self):
        changed = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return ",".join(changed) or "default"


def strided(tensor, padding):
    """The same values, rows apart."""
    whole = torch.full((*tensor.shape[:-1], tensor.shape[-1] + padding), 77, dtype=tensor.dtype, device=tensor.device)
    view = whole[..., : tensor.shape[-1]]
    view.copy_(tensor)
    return view


def make(case, device):
    """q, kv, indices, sink, lengths; tokens that no index names are NaN."""
    require_kernel(device, "mla_sparse_prefill", "dense")
    generator = torch.Generator().manual_seed(case.seed)
    q = (torch.randn((case.seq_len_q, case.num_heads_q, case.head_dim_qk), generator=generator) * case.std).to(
        case.dtype
    )
    kv = torch.randn((case.seq_len_kv, 1, case.head_dim_qk), generator=generator).to(case.dtype)
    indices = random_indices((case.seq_len_q, 1, case.topk), case.seq_len_kv, case.invalid, generator)
    lengths = None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int32)
    counts = (
        torch.arange(case.topk) < (torch.full((case.seq_len_q,), case.topk) if lengths is None else lengths)[:, None]
    )
    named = indices[:, 0][counts]
    unnamed = torch.ones(case.seq_len_kv, dtype=torch.bool)
    unnamed[named[(named >= 0) & (named < case.seq_len_kv)].long()] = False
    kv[unnamed] = math.nan
    sink = None
    if case.has_sink:
        sink = 2 * torch.randn(case.num_heads_q, generator=generator) + 3
        sink[:2] = torch.tensor([math.inf, -math.inf])[: case.num_heads_q]
    tensors = (strided(each.to(device), case.padding) for each in (q, kv, indices))
    return (*tensors, *(each if each is None else each.to(device) for each in (sink, lengths)))


def check(case, device):
    q, kv, indices, sink, lengths = make(case, device)
    results = tilemla.flash_mla_sparse_fwd(q, kv, indices, case.sm_scale, 512, sink, lengths)
    out, max_logits, lse = results
    reference, top = chosen_reference(
        q, [(kv[:, 0], indices[:, 0], lengths)], softmax_scale=case.sm_scale, attn_sink=sink
    )
    check_result(out, lse, reference)
    assert max_logits.dtype == torch.float32 and max_logits.shape == top.shape
    is_empty = torch.isinf(top)
    assert torch.equal(torch.isneginf(max_logits), is_empty)
    # As the log-sum-exp, which it is the largest part of.
    top, max_logits = (torch.where(is_empty, 0.0, each.double()) for each in (top, max_logits))
    bound = torch.maximum(top.abs() * 8.01 / 65536, (reference.score_magnitude * 2.0**-23).clamp(min=1e-6))
    assert bool(((max_logits - top).abs() <= bound).all())
    return results


@st.composite
def cases(draw):
    seq_len_q = draw(st.integers(1, 6))
    topk = draw(st.sampled_from((1, 5, 63, 64, 65, 130)))
    counts = st.sampled_from(sorted({0, 1, min(64, topk), min(65, topk), topk}))
    dtype, head_dim_qk = draw(st.sampled_from(((torch.bfloat16, 576), (torch.float16, 512))))
    return Prefill(
        seq_len_q=seq_len_q,
        seq_len_kv=draw(st.sampled_from((1, 3, 64, 200))),
        num_heads_q=draw(st.sampled_from((1, 2, 16, 17, 40))),
        topk=topk,
        dtype=dtype,
        head_dim_qk=head_dim_qk,
        has_sink=draw(st.booleans()),
        lengths=draw(st.one_of(st.none(), st.tuples(*[counts] * seq_len_q))),
        sm_scale=draw(st.sampled_from((0.5, 0.05, 0.01, 0.0))),
        std=draw(st.sampled_from((1.0, 0.1, 6.0))),
        invalid=draw(st.sampled_from((0.0, 0.2, 0.9, 1.0))),
        padding=draw(st.sampled_from((0, 8))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@given(case=cases())
def test_any(case):
    check(case, torch.device("cpu"))


def test_the_largest_score_is_that_and_not_a_bound(device):
    """Scores that rise by less than the running maximum follows: it stays behind, the largest score may not."""
    require_kernel(device, "mla_sparse_prefill", "dense")
    q = torch.zeros((1, 1, 576), dtype=torch.bfloat16, device=device)
    q[..., 0] = 1.0
    kv = torch.zeros((200, 1, 576), dtype=torch.bfloat16, device=device)
    kv[:, 0, 0] = torch.linspace(-1, 4, 200)
    indices = torch.arange(200, dtype=torch.int32, device=device).view(1, 1, 200)
    _, max_logits, _ = tilemla.flash_mla_sparse_fwd(q, kv, indices, 0.5)
    assert max_logits.item() == 2.0
    _, max_logits, _ = tilemla.flash_mla_sparse_fwd(q, kv, indices.flip(-1)[..., 100:], 0.5)
    assert max_logits.item() == pytest.approx(0.5 * kv[99, 0, 0].item())


@pytest.mark.parametrize("index", [-1, -(2**31), 2**31 - 1, 90])
def test_nothing_is_named(device, index):
    q, kv, indices, sink, _ = make(Prefill(invalid=1.0, has_sink=True), device)
    assert torch.isnan(kv).all()
    for sinks in (sink, None):
        out, max_logits, lse = tilemla.flash_mla_sparse_fwd(q, kv, indices.fill_(index), 0.1, 512, sinks)
        assert not out.any() and torch.isneginf(max_logits).all() and torch.isposinf(lse).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=str)
def test_sinks_without_end(device, value):
    q, kv, indices, _, _ = make(Prefill(), device)
    without = tilemla.flash_mla_sparse_fwd(q, kv, indices, 0.1)
    sink = torch.full((20,), value, device=device)
    out, max_logits, lse = tilemla.flash_mla_sparse_fwd(q, kv, indices, 0.1, attn_sink=sink)
    assert torch.equal(max_logits, without[1]) and torch.equal(lse, without[2])
    assert torch.equal(out, without[0]) if value < 0 else not out.any()


@pytest.mark.parametrize(
    "changes",
    [dict(seq_len_q=0), dict(topk=0), dict(seq_len_kv=0), dict(seq_len_kv=0, topk=0)],
    ids=["no query", "no index", "no token", "neither"],
)
def test_there_may_be_nothing(device, changes):
    out, max_logits, lse = check(Prefill(**changes), device)
    assert not out.any() and torch.isneginf(max_logits).all() and torch.isposinf(lse).all()


def test_lengths_are_held_to_the_list(device):
    case = Prefill(seq_len_q=4, lengths=(0, 0, 70, 70))
    q, kv, indices, _, lengths = make(case, device)
    expected = tilemla.flash_mla_sparse_fwd(q, kv, indices, 0.1, topk_length=lengths)
    wild = torch.tensor([-1, -(2**31), 71, 2**31 - 1], dtype=torch.int32, device=device)
    for one, other in zip(tilemla.flash_mla_sparse_fwd(q, kv, indices, 0.1, topk_length=wild), expected, strict=True):
        assert torch.equal(one, other)


def test_there_is_no_backward_pass(device):
    q, kv, indices, _, _ = make(Prefill(), device)
    results = tilemla.flash_mla_sparse_fwd(q.requires_grad_(), kv.requires_grad_(), indices, 0.1)
    assert not any(each.requires_grad for each in results)


BAD = {
    "q list": ("q", lambda x: x.tolist(), TypeError, r"q must be a torch.Tensor .seq_len_q, num_heads_q"),
    "q rank": ("q", lambda x: x[0], ValueError, "q must have 3 dimensions"),
    "q dtype": ("q", lambda x: x.float(), TypeError, "kv must be torch.float32, as q, got a bfloat16"),
    "q strided": ("q", lambda x: x.mT.contiguous().mT, ValueError, "q must have stride 1 in its last"),
    "kv rank": ("kv", lambda x: x[:, 0], ValueError, "kv must have 3 dimensions"),
    "kv heads": (
        "kv",
        lambda x: x.expand(-1, 2, -1),
        ValueError,
        r"kv must have shape .seq_len_kv, 1, head_dim_qk = 576",
    ),
    "kv dtype": ("kv", lambda x: x.half(), TypeError, "kv must be torch.bfloat16, as q, got a float16"),
    "kv width": ("kv", lambda x: x[..., :512], ValueError, "head_dim_qk = 576.*, as q, got .* 512"),
    "kv device": ("kv", lambda x: x.to("meta"), ValueError, "kv must be on cpu, as q"),
    "kv strided": ("kv", lambda x: torch.stack([x, x], -1)[..., 0], ValueError, "kv must have stride 1"),
    "indices dtype": ("indices", lambda x: x.long(), TypeError, "indices must be int32, got a int64"),
    "indices rank": ("indices", lambda x: x[:, 0], ValueError, "indices must have 3 dimensions .seq_len_q, 1, topk"),
    "indices queries": ("indices", lambda x: x[:3], ValueError, r"indices must have shape .* \(7, 1, 'any'\), got"),
    "indices strided": ("indices", lambda x: x[..., ::2], ValueError, "indices must have stride 1"),
    "sm_scale None": ("sm_scale", lambda x: None, TypeError, "sm_scale must be a float, got NoneType None"),
    "sm_scale nan": ("sm_scale", lambda x: math.nan, ValueError, "sm_scale must be finite and not negative, got nan"),
    "d_v": ("d_v", lambda x: 256, NotImplementedError, "head_dim_v must be 512, got 256"),
    "sink heads": ("attn_sink", lambda x: x[:3], ValueError, "attn_sink must have num_heads_q = 20 elements"),
    "sink dtype": ("attn_sink", lambda x: x.half(), TypeError, "attn_sink must be float32"),
    "lengths count": ("topk_length", lambda x: x[:3], ValueError, "topk_length must have seq_len_q = 7 elements"),
    "lengths dtype": ("topk_length", lambda x: x.long(), TypeError, "topk_length must be int32"),
    "lengths strided": ("topk_length", lambda x: x.repeat_interleave(2)[::2], ValueError, "topk_length must be contig"),
    "indexer_topk": ("indexer_topk", lambda x: 64, NotImplementedError, "indexer_topk must be 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name):
    q, kv, indices, sink, lengths = make(Prefill(has_sink=True, lengths=(5,) * 7), torch.device("cpu"))
    arguments = dict(
        q=q, kv=kv, indices=indices, sm_scale=0.1, d_v=512, attn_sink=sink, topk_length=lengths, indexer_topk=0
    )
    tilemla.flash_mla_sparse_fwd(**arguments)
    changed, change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        tilemla.flash_mla_sparse_fwd(**(arguments | {changed: change(arguments[changed])}))
