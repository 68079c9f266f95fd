"""Hypothesis strategies for decode cases."""

import torch
from hypothesis import strategies as st

from cases import Case
from tilemla.spec import SUPPORTED_SPECS

# dtype, page_block_size and head_dim_qk: every value of each in some module, for each module is seconds of building.
GEOMETRIES = (
    (torch.bfloat16, 64, 576),
    (torch.float16, 64, 576),
    (torch.bfloat16, 16, 512),
    (torch.float16, 1, 576),
    (torch.bfloat16, 256, 576),
    (torch.float16, 32, 512),
    (torch.bfloat16, 128, 512),
)


def geometries_of(arch):
    """Those that there are kernels for."""
    served = {(spec.dtype, spec.page_block_size, spec.head_dim_qk) for spec in SUPPORTED_SPECS if spec.arch == arch}
    return [geometry for geometry in GEOMETRIES if (str(geometry[0]).removeprefix("torch."), *geometry[1:]) in served]


# Around the edges of pages (64 tokens), and a few pages.
EDGE_LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 256, 320)


def lengths_of_request(max_length):
    edges = [length for length in EDGE_LENGTHS if length <= max_length]
    return st.one_of(st.sampled_from(edges), st.integers(0, max_length))


@st.composite
def head_counts(draw, max_heads):
    """(num_heads_q, num_heads_k), with odd counts that fill no tile."""
    num_heads_k = draw(st.sampled_from((1, 1, 1, 2, 3, 8)))
    groups = [count for count in (1, 2, 3, 9, 16, 17, 63, 64, 126, 128) if count * num_heads_k <= max_heads]
    return draw(st.sampled_from(groups)) * num_heads_k, num_heads_k


def windows(max_length):
    """(left, right): none, a few tokens around each block's edge, any."""
    bounds = st.one_of(st.just(-1), st.sampled_from((0, 1, 62, 63, 64, 65, 130)), st.integers(0, max_length + 10))
    return st.one_of(st.just((-1, -1)), st.tuples(bounds, st.one_of(st.just(-1), st.integers(0, 5))))


@st.composite
def cases(draw, *, max_batch=5, max_length=700, max_heads=64, max_rows=130, arch="cpu"):
    """Cases that a CPU decodes in milliseconds; a GPU test asks for larger ones."""
    num_heads_q, num_heads_k = draw(head_counts(max_heads))
    dtype, page_block_size, head_dim_qk = draw(st.sampled_from(geometries_of(arch)))
    seq_lens = [count for count in (1, 1, 2, 3, 4) if count * num_heads_q <= max_rows]
    return Case(
        lengths=tuple(draw(st.lists(lengths_of_request(max_length), min_size=1, max_size=max_batch))),
        seq_len_q=draw(st.sampled_from(seq_lens)),
        num_heads_q=num_heads_q,
        num_heads_k=num_heads_k,
        causal=draw(st.booleans()),
        dtype=dtype,
        page_block_size=page_block_size,
        head_dim_qk=head_dim_qk,
        window=draw(windows(max_length)),
        has_sink=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from((None, None, 0.1, 0.01, 0.0))),
        q_std=draw(st.sampled_from((1.0, 1.0, 0.1, 8.0))),
        spare_pages=draw(st.integers(0, 3)),
        spare_columns=draw(st.integers(0, 3)),
        unused_page_id=draw(st.sampled_from((2147480000, -1))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )
