"""What is timed: the cases that FlashMLA publishes, small batches, and very different lengths."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

HEAD_DIM_QK, HEAD_DIM_V = 576, 512
PAGE_BLOCK_SIZE = 64
BYTES_PER_ELEMENT = 2
SHORT_DTYPE = {"bfloat16": "bf16", "float16": "fp16"}

# As many lengths are written out in a case's name; more are a range.
_NAMED_LENGTHS = 4


@dataclasses.dataclass(frozen=True)
class GridCase:
    """The shapes of one decode call.

    Parameters
    ----------
    batch_size : int
        Requests.
    mean_length : int
        Tokens of a request in the cache; the mean where lengths differ.
    num_heads_q, seq_len_q, num_heads_k : int
        Query heads, queries of a request, KV heads.
    is_varied : bool
        Draw lengths from a normal distribution around ``mean_length`` with half of it as deviation, as upstream does.
    has_zero_lengths : bool
        Make about half of the requests empty.
    causal : bool
        As the argument of ``flash_mla_with_kvcache``.
    dtype : str
        Of queries and cache: ``"bfloat16"`` or ``"float16"``.
    seed : int
        Of lengths and values.
    lengths : tuple of int
        Exact tokens of each request; when given, nothing is drawn. ``of_lengths`` makes such a case.

    Raises
    ------
    ValueError
        When ``lengths`` does not fit the other fields, or ``dtype`` is another one.
    """

    batch_size: int
    mean_length: int
    num_heads_q: int
    seq_len_q: int
    num_heads_k: int = 1
    is_varied: bool = False
    has_zero_lengths: bool = False
    causal: bool = True
    dtype: str = "bfloat16"
    seed: int = 0
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in SHORT_DTYPE:
            raise ValueError(f"dtype must be one of {', '.join(SHORT_DTYPE)}, got {self.dtype!r}")
        if not self.lengths:
            return
        if len(self.lengths) != self.batch_size:
            raise ValueError(f"lengths must have batch_size = {self.batch_size} entries, got {len(self.lengths)}")
        if min(self.lengths) < 0:
            raise ValueError(f"lengths must be 0 or more, got {min(self.lengths)}")
        mean_length = sum(self.lengths) // self.batch_size
        if self.mean_length != mean_length:
            raise ValueError(f"mean_length must be the mean of lengths, {mean_length}, got {self.mean_length}")
        if self.is_varied or self.has_zero_lengths:
            raise ValueError("is_varied and has_zero_lengths must be False beside lengths: exact lengths are not drawn")

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], num_heads_q: int, seq_len_q: int) -> GridCase:
        """A causal case with one KV head whose requests have exactly these lengths."""
        mean_length = sum(lengths) // len(lengths)
        return cls(len(lengths), mean_length, num_heads_q, seq_len_q, lengths=tuple(lengths))

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        heads = f"h{self.num_heads_q}k{self.num_heads_k}"
        return f"b{self.batch_size} L{self._length_text()} {heads} s{self.seq_len_q} {mask} {SHORT_DTYPE[self.dtype]}"

    def _length_text(self) -> str:
        if len(self.lengths) > _NAMED_LENGTHS:
            return f"{min(self.lengths)}-{max(self.lengths)}"
        if self.lengths:
            return ",".join(map(str, self.lengths))
        return ("~" if self.is_varied else "") + str(self.mean_length) + ("/0" if self.has_zero_lengths else "")

    def make_lengths(self) -> list[int]:
        """Tokens of each request; the same ones each time."""
        if self.lengths:
            return list(self.lengths)
        draw = random.Random(self.seed)
        lengths = [self.mean_length] * self.batch_size
        if self.is_varied:
            lengths = [
                max(int(draw.normalvariate(self.mean_length, self.mean_length / 2)), self.seq_len_q) for _ in lengths
            ]
        if self.has_zero_lengths:
            lengths = [length if draw.random() < 0.5 else 0 for length in lengths]
        return lengths

    @property
    def rows(self) -> int:
        """Rows of queries that share a KV head."""
        return self.seq_len_q * self.num_heads_q // self.num_heads_k

    @property
    def total_tokens(self) -> int:
        """Tokens of all requests."""
        return sum(self.make_lengths())

    @property
    def flop(self) -> int:
        """Multiplications and additions of both matrix products, as upstream counts them: without the mask."""
        return 2 * self.seq_len_q * self.num_heads_q * self.total_tokens * (HEAD_DIM_QK + HEAD_DIM_V)

    @property
    def num_bytes(self) -> int:
        """Bytes that must move: each token of the cache and each query read once, each output written once."""
        queries = self.batch_size * self.seq_len_q * self.num_heads_q
        elements = self.num_heads_k * self.total_tokens * HEAD_DIM_QK + queries * (HEAD_DIM_QK + HEAD_DIM_V)
        return BYTES_PER_ELEMENT * elements

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages that hold the tokens: what is read of the cache by whoever reads whole pages."""
        num_pages = sum(-(-length // PAGE_BLOCK_SIZE) for length in self.make_lengths())
        return BYTES_PER_ELEMENT * num_pages * PAGE_BLOCK_SIZE * self.num_heads_k * HEAD_DIM_QK

    def spread_evenly(self) -> GridCase:
        """The case whose requests share the same tokens evenly: what is left to gain by balancing."""
        share, rest = divmod(self.total_tokens, self.batch_size)
        lengths = tuple(share + (request < rest) for request in range(self.batch_size))
        return dataclasses.replace(self, mean_length=share, is_varied=False, has_zero_lengths=False, lengths=lengths)


def grid_cases() -> Iterator[GridCase]:
    """The 32 cases that FlashMLA publishes times of."""
    for mean_length, num_heads_q, seq_len_q, is_varied in itertools.product(
        (4096, 8192), (16, 32, 64, 128), (1, 2), (False, True)
    ):
        yield GridCase(128, mean_length, num_heads_q, seq_len_q, is_varied=is_varied)


def small_cases() -> Iterator[GridCase]:
    """Batches that do not fill a GPU by themselves: from bound by launches to bound by how requests are split."""
    for batch_size, length, num_heads_q in itertools.product((1, 4, 32), (1024, 8192, 65536), (16, 128)):
        yield GridCase(batch_size, length, num_heads_q, 1)


def imbalanced_cases() -> Iterator[GridCase]:
    """One request that is ten times as long as its neighbours, with speculative tokens."""
    yield GridCase.of_lengths((4641, 45118, 1730, 1696), num_heads_q=16, seq_len_q=4)


def even_cases() -> Iterator[GridCase]:
    """The varied cases of the grid, the same tokens spread evenly."""
    for case in grid_cases():
        if case.is_varied:
            yield case.spread_evenly()


def long_cases() -> Iterator[GridCase]:
    """The longest case that FlashMLA publishes a time of."""
    yield GridCase(128, 32768, 128, 2, is_varied=True)


def planning_cases() -> Iterator[GridCase]:
    """Batches from one request to many: how long ``get_mla_metadata`` takes is timed with these."""
    for batch_size in (1, 128, 1024):
        yield GridCase(batch_size, 1024, 16, 1, is_varied=True)


# By batch size, lengths that are fixed and, where negative, the mean of varied ones.
_TUNE_LENGTHS = {
    1: (1024, 4096, 8192, 65536),
    2: (4096, 32768, -16384),
    4: (1024, 8192, -8192),
    8: (8192, -4096),
    16: (1024, -8192),
    32: (1024, 2048, -8192),
    64: (-4096,),
    128: (4096, -8192),
    256: (-1024,),
}


def tune_cases() -> Iterator[GridCase]:
    """What a kernel is tuned with: each class of shapes by several batches and lengths, fixed and varied."""
    # 16 rows in part of a tile, 64 in one, 128 and 256 in several
    for num_heads_q, seq_len_q in ((16, 1), (64, 1), (128, 1), (128, 2)):
        for batch_size, lengths in _TUNE_LENGTHS.items():
            for length in lengths:
                yield GridCase(batch_size, abs(length), num_heads_q, seq_len_q, is_varied=length < 0)


def cpu_cases() -> Iterator[GridCase]:
    """What a CPU gets through in a minute."""
    for num_heads_q, seq_len_q, is_varied in itertools.product((16, 64), (1, 2), (False, True)):
        yield GridCase(2, 256, num_heads_q, seq_len_q, is_varied=is_varied)


CASE_LISTS: dict[str, Callable[[], Iterator[GridCase]]] = {
    "grid": grid_cases,
    "small": small_cases,
    "imbalanced": imbalanced_cases,
    "even": even_cases,
    "tune": tune_cases,
    "long": long_cases,
    "planning": planning_cases,
    "cpu": cpu_cases,
}
DEFAULT_LISTS = {"cuda": ("grid", "small", "imbalanced"), "cpu": ("cpu",)}


def select_cases(names: Sequence[str], *, dtype: str = "bfloat16", match: str = "") -> list[tuple[str, GridCase]]:
    """The cases of named lists, each with the name of its list.

    Parameters
    ----------
    names : sequence of str
        Keys of ``CASE_LISTS``.
    dtype : str
        The dtype that every case gets.
    match : str
        Keep the cases whose text contains this.
    """
    cases = [(name, dataclasses.replace(case, dtype=dtype)) for name in names for case in CASE_LISTS[name]()]
    return [(name, case) for name, case in cases if match in str(case)]
