"""What a schedule is for: the call that it was planned for, and the object that the first such call fills in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

NO_WINDOW = -1
_ORDER_FIELD = 7  # of a row: the requests at four places, a byte each
_SCHEDULE_TENSORS = ("tile_scheduler_metadata", "num_splits")


def order_of(tile_scheduler_metadata: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The requests by place, of a schedule with an order; of another one nothing that means anything.

    Parameters
    ----------
    tile_scheduler_metadata : Tensor, (num_sm_parts, 8), int32
    batch_size : int
        Requests.

    Returns
    -------
    Tensor, (batch_size,), int32
        On the same device.
    """
    fours = tile_scheduler_metadata[:, _ORDER_FIELD:].contiguous().view(torch.uint8).flatten()[:batch_size]
    order = torch.zeros(batch_size, dtype=torch.int32, device=fours.device)
    order[: fours.shape[0]] = fours
    return order


class ScheduleConfig(NamedTuple):
    """The call that a ``FlashMLASchedMeta`` was filled in by; later calls must be alike."""

    batch_size: int
    seq_len_q: int
    num_heads_q: int
    num_heads_k: int
    page_block_size: int
    causal: bool
    device: torch.device
    window_left: int
    is_fp8: bool = False

    @property
    def kind(self) -> str:
        """Of ``costs.CALL_KINDS``."""
        return "fp8" if self.is_fp8 else "dense"

    @property
    def tokens_per_head_k(self) -> int:
        """Rows of queries that share a KV head."""
        return self.seq_len_q * (self.num_heads_q // self.num_heads_k)

    @classmethod
    def of(cls, q: torch.Tensor, k_cache: torch.Tensor, causal: bool, window_left: int) -> ScheduleConfig:
        """That of a call whose tensors have their dimensions."""
        batch_size, seq_len_q, num_heads_q, _ = q.shape
        _, page_block_size, num_heads_k, _ = k_cache.shape
        # The last query sees every token: with one query the mask changes nothing.
        causal = causal and seq_len_q > 1
        sizes = (batch_size, seq_len_q, num_heads_q, num_heads_k, page_block_size)
        return cls(*sizes, causal, q.device, window_left, is_fp8=k_cache.element_size() == 1)


class SparseScheduleConfig(NamedTuple):
    """The call with ``indices`` that a ``FlashMLASchedMeta`` was filled in by; later calls must be alike.

    ``topk`` is how many indices a query has, and the extra fields are those of the second cache; None without one.
    """

    batch_size: int
    seq_len_q: int
    num_heads_q: int
    page_block_size: int
    kv_format: str
    topk: int
    extra_page_block_size: int | None
    extra_topk: int | None
    device: torch.device

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        kv_format: str,
        indices: torch.Tensor,
        extra_k_cache: torch.Tensor | None,
        extra_indices: torch.Tensor | None,
    ) -> SparseScheduleConfig:
        """That of a call whose tensors have their dimensions."""
        batch_size, seq_len_q, num_heads_q, _ = q.shape
        return cls(
            batch_size,
            seq_len_q,
            num_heads_q,
            k_cache.shape[1],
            kv_format,
            indices.shape[2],
            None if extra_k_cache is None else extra_k_cache.shape[1],
            None if extra_indices is None else extra_indices.shape[2],
            q.device,
        )

    @property
    def kind(self) -> str:
        """Of ``costs.CALL_KINDS``."""
        return "indexed"

    @property
    def num_heads_k(self) -> int:
        """What a schedule takes for KV heads: queries, for each reads tokens of its own choice."""
        return self.seq_len_q

    @property
    def tokens_per_head_k(self) -> int:
        """Rows of queries that share the tokens that are read: the heads of a query."""
        return self.num_heads_q

    @property
    def window_left(self) -> int:
        """That of a call without a window."""
        return NO_WINDOW


class FlashMLASchedMeta:
    """A schedule that the first decode call fills in. Opaque: only pass it on.

    It may be reused by calls with the same shapes, the same mask and the same ``cache_seqlens``, such as those of a
    model's layers. Tensors that a caller assigns to it are used in place of what it would be filled in with, by calls
    of any kind that they fit.

    Parameters
    ----------
    have_initialized : bool
        Whether a call has filled it in.
    config : ScheduleConfig or SparseScheduleConfig, optional
        The call that did; None where a caller assigned the tensors.
    tile_scheduler_metadata : Tensor, (num_sm_parts, 8), int32, optional
    num_splits : Tensor, (batch_size + 1,), int32, optional
    """

    def __init__(
        self,
        have_initialized: bool = False,
        config: ScheduleConfig | SparseScheduleConfig | None = None,
        tile_scheduler_metadata: torch.Tensor | None = None,
        num_splits: torch.Tensor | None = None,
    ) -> None:
        self.have_initialized = have_initialized
        self.tile_scheduler_metadata = tile_scheduler_metadata
        self.num_splits = num_splits
        self.config = config

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in _SCHEDULE_TENSORS:  # what is assigned is for no call that is known
            object.__setattr__(self, "config", None)

    def fill_in(
        self,
        tile_scheduler_metadata: torch.Tensor,
        num_splits: torch.Tensor,
        config: ScheduleConfig | SparseScheduleConfig,
    ) -> None:
        """Keep the schedule of the first call."""
        self.tile_scheduler_metadata, self.num_splits = tile_scheduler_metadata, num_splits
        self.config, self.have_initialized = config, True

    def expect(self, config: ScheduleConfig | SparseScheduleConfig) -> None:
        """Check that a call is like the one that filled this in.

        Raises
        ------
        ValueError
            When it is not.
        """
        if self.config is not None and self.config != config:
            raise ValueError(
                "tile_scheduler_metadata must be used for calls like the one that filled it in, "
                f"{self.config}; got a call of {config}"
            )

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({fields})"
