"""The schedule of a decode call: how many parts there are, and the tensors that say what each does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from tilemla.allocate import allocator_for
from tilemla.costs import BATCH_INVARIANT_BLOCKS, ScheduleCosts, costs_of_kind, select_schedule_costs
from tilemla.launch import arch_of_device, gpu_name_of, module_for, num_sms_of
from tilemla.plan import remember
from tilemla.sched_meta import NO_WINDOW, FlashMLASchedMeta, order_of
from tilemla.spec import ORDERED
from tilemla.streams import current_device
from tilemla.tuning.chosen import chosen_costs
from tilemla.validate import METADATA_FIELDS, SCHEDULING_BLOCK, check_cache_seqlens, check_int

# Rows of a query tile in the formula below, whatever tile a kernel uses.
_SCHEDULING_BLOCK_M = 64
_METADATA_STRIDES = (METADATA_FIELDS, 1)


def num_sm_parts_for(num_sms: int, tokens_per_head_k: int, num_heads_k: int) -> int:
    """How many parts a schedule has: a contract with callers who size buffers by it.

    Parameters
    ----------
    num_sms : int
        Multiprocessors of the device.
    tokens_per_head_k : int
        ``seq_len_q * num_heads_q // num_heads_k``, the rows of queries that share a KV head.
    num_heads_k : int
        KV heads.

    Returns
    -------
    int
        ``max(num_sms // num_heads_k // ceil(tokens_per_head_k / 64), 1)``
    """
    return max(num_sms // num_heads_k // -(-tokens_per_head_k // _SCHEDULING_BLOCK_M), 1)


@functools.lru_cache(maxsize=4096)
def costs_for(device: torch.device, rows: int, batch_size: int, num_sm_parts: int, kind: str) -> ScheduleCosts:
    """What a schedule on a device is made with: ``costs_of_kind``, or ``select_schedule_costs`` of the device's table.

    Raises
    ------
    TableError
        When there is a file for the device, but it is no table.
    """
    costs = costs_of_kind(kind, rows, batch_size, num_sm_parts)
    if costs is not None:
        return costs
    arch = arch_of_device(device)
    chosen = {} if arch is None else chosen_costs(arch, gpu_name_of(device))
    return select_schedule_costs(rows, batch_size, num_sm_parts, chosen)


class SchedulePlan:
    """What the schedules of calls of a kind share.

    Parameters
    ----------
    device : torch.device
        Where the lengths are.
    batch_size, num_sm_parts : int
        Requests, at least one, and parts to spread them over.
    tokens_per_head_k : int
        Rows of queries that share a KV head: what cutting a request costs depends on them.
    seq_len_q, window_left : int
        Queries of a request, and how many tokens before its own position each sees; with -1, which is all, the number
        of queries does not matter.
    kind : str
        Of ``costs.CALL_KINDS``.
    costs : ScheduleCosts, optional
        What the schedules are made with; by default what was chosen for calls of the kind.
    get_mla_metadata : callable, optional
        The scheduler of a module; by default that of any module for the device.
    """

    __slots__ = ("_arguments", "_empty", "_index", "_metadata_shape", "_schedule", "_splits_shape")

    def __init__(
        self,
        device: torch.device,
        batch_size: int,
        num_sm_parts: int,
        tokens_per_head_k: int,
        *,
        seq_len_q: int = 1,
        window_left: int = NO_WINDOW,
        kind: str = "dense",
        costs: ScheduleCosts | None = None,
        get_mla_metadata: Callable[..., None] | None = None,
    ) -> None:
        self._index = device.index if device.type == "cuda" else None
        self._empty = allocator_for(device)
        self._schedule = get_mla_metadata or module_for(device, "get_mla_metadata").functions["get_mla_metadata"]
        self._metadata_shape = (num_sm_parts, METADATA_FIELDS)
        self._splits_shape = (batch_size + 1,)
        costs = costs or costs_for(device, tokens_per_head_k, batch_size, num_sm_parts, kind)
        # Kernels that take indices visit requests as they come.
        self._arguments = (*costs, seq_len_q, window_left, int(kind != "indexed"))

    def run(self, cache_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Enqueue the scheduler on the current stream of the tensor's device; returns as ``make_schedule``.

        ``tile_scheduler_metadata`` has the attribute ``num_splits``, for callers who pass nothing else on.

        Raises
        ------
        TypeError, ValueError
            On a tensor that the module cannot take; then nothing was enqueued.
        """
        if self._index is not None and current_device() != self._index:
            with torch.cuda.device(self._index):
                return self.run(cache_seqlens)
        if torch.is_inference_mode_enabled():
            # Tensors of inference mode do not tell whether they were written to, and `find_schedule` asks.
            with torch.inference_mode(False):
                return self.run(cache_seqlens)
        tile_scheduler_metadata: Any = self._empty(self._metadata_shape, _METADATA_STRIDES, torch.int32)
        num_splits = self._empty(self._splits_shape, (1,), torch.int32)
        self._schedule(cache_seqlens, tile_scheduler_metadata, num_splits, *self._arguments)
        tile_scheduler_metadata.num_splits = num_splits
        return tile_scheduler_metadata, num_splits


def make_schedule(
    cache_seqlens: torch.Tensor,
    num_sm_parts: int,
    tokens_per_head_k: int,
    *,
    seq_len_q: int = 1,
    window_left: int = NO_WINDOW,
    kind: str = "dense",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a schedule where ``cache_seqlens`` is, without a host round trip.

    Parameters
    ----------
    cache_seqlens : Tensor, (batch_size,), int32
        Tokens of each request; checked already.
    num_sm_parts : int
        Parts to spread the requests over.
    tokens_per_head_k, seq_len_q, window_left : int
        As for ``SchedulePlan``.
    kind : str
        As for ``SchedulePlan``.

    Returns
    -------
    tile_scheduler_metadata : Tensor, (num_sm_parts, 8), int32
    num_splits : Tensor, (batch_size + 1,), int32
        Exclusive prefix sum of the requests' split counts.
    """
    batch_size = cache_seqlens.shape[0]
    device = cache_seqlens.device
    if batch_size == 0:
        return _schedule_of_nothing(num_sm_parts, device)
    plan = SchedulePlan(
        device,
        batch_size,
        num_sm_parts,
        tokens_per_head_k,
        seq_len_q=seq_len_q,
        window_left=window_left,
        kind=kind,
    )
    return plan.run(cache_seqlens)


def make_batch_invariant_schedule(
    cache_seqlens: torch.Tensor, max_tokens: int, *, seq_len_q: int, window_left: int = NO_WINDOW
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a schedule that cuts each request by its own length alone, without a host round trip.

    Parameters
    ----------
    cache_seqlens : Tensor, (batch_size,), int32
        Tokens of each request; checked already.
    max_tokens : int
        Most tokens that a request can have: ``max_num_blocks_per_seq * page_block_size``. It decides how many parts
        there are, not where requests are cut; what a longer request has beyond goes to its last piece.
    seq_len_q, window_left : int
        As for ``SchedulePlan``.

    Returns
    -------
    tile_scheduler_metadata : Tensor, (num_sm_parts, 8), int32
        Idle parts come last.
    num_splits : Tensor, (batch_size + 1,), int32
    """
    batch_size, device = cache_seqlens.shape[0], cache_seqlens.device
    if batch_size == 0:
        return _schedule_of_nothing(1, device)
    max_pieces = -(-max_tokens // (SCHEDULING_BLOCK * BATCH_INVARIANT_BLOCKS))
    if window_left >= 0:
        # The window begins anywhere in a block, and that block anywhere between two cuts.
        blocks = (window_left + seq_len_q - 1) // SCHEDULING_BLOCK + 2
        max_pieces = min(max_pieces, (blocks - 1) // BATCH_INVARIANT_BLOCKS + 2)
    num_sm_parts = batch_size * max(max_pieces, 1)
    schedule = (
        torch.empty((num_sm_parts, METADATA_FIELDS), dtype=torch.int32, device=device),
        torch.empty(batch_size + 1, dtype=torch.int32, device=device),
    )
    name = "get_batch_invariant_metadata"
    program = module_for(device, "flash_mla_with_kvcache", program=name).functions[name]
    program(cache_seqlens, *schedule, BATCH_INVARIANT_BLOCKS, seq_len_q, window_left)
    return schedule


def _schedule_of_nothing(num_sm_parts: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Idle parts: begin_request = batch_size = 0, end_request (inclusive) = -1."""
    idle = torch.zeros((num_sm_parts, METADATA_FIELDS), dtype=torch.int32, device=device)
    idle[:, 1] = -1
    return idle, torch.zeros(1, dtype=torch.int32, device=device)


def derive_num_splits(tile_scheduler_metadata: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Compute ``num_splits`` of a schedule where it is, without a host round trip.

    Each part holds one piece of the request at each place from its first to its last; idle parts, whose first comes
    after their last, hold none.

    Parameters
    ----------
    tile_scheduler_metadata : Tensor, (num_sm_parts, 8), int32
        Checked already.
    batch_size : int
        Requests.

    Returns
    -------
    Tensor, (batch_size + 1,), int32
        Exclusive prefix sum of the requests' split counts.
    """
    begin, end_inclusive = tile_scheduler_metadata[:, :1], tile_scheduler_metadata[:, 1:2]
    is_ordered = (begin >= ORDERED).any()
    first = torch.where(is_ordered, ORDERED, 0)
    place = torch.arange(batch_size, dtype=torch.int32, device=tile_scheduler_metadata.device)
    # (num_sm_parts, batch_size): whether a part holds a piece of the request at a place.
    holds = (begin - first <= place) & (place <= end_inclusive - first)
    order = order_of(tile_scheduler_metadata, batch_size).clamp_(max=max(batch_size - 1, 0))
    request = torch.where(is_ordered, order, place).long()
    pieces = torch.zeros(batch_size + 1, dtype=torch.int32, device=place.device)
    pieces[1:].scatter_add_(0, request, holds.sum(0, dtype=torch.int32))
    return pieces.cumsum(0, dtype=torch.int32)


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[Any, Any]:
    """Plan a decode call: the first two of its last arguments.

    Two forms, as in FlashMLA's history. Without arguments the plan is made by the first decode call that gets it;
    with arguments it is made now, on the device of ``cache_seqlens``.

    Parameters
    ----------
    cache_seqlens : Tensor, (batch_size,), int32, optional
        Tokens of each request in the cache.
    num_q_tokens_per_head_k : int, optional
        ``seq_len_q * num_heads_q // num_heads_k``.
    num_heads_k : int, optional
        KV heads.
    num_heads_q : int, optional
        Accepted for upstream's sake; the plan does not depend on it.
    is_fp8_kvcache : bool
        Whether the cache is in FP8: requests are then cut where that pays there. Any plan serves any cache.
    topk : int, optional
        For calls with ``indices``: how many a query has. ``cache_seqlens`` then says how many requests there are alone.

    Returns
    -------
    (FlashMLASchedMeta, None)
        When called without arguments.
    (Tensor, Tensor)
        When called with arguments: ``tile_scheduler_metadata`` ``(num_sm_parts, 8)`` int32 and ``num_splits``
        ``(batch_size + 1,)`` int32. ``num_sm_parts`` depends on the device and the two integers alone, never on batch
        or lengths, and is ``max(SMs // num_heads_k // ceil(num_q_tokens_per_head_k / 64), 1)``; a CPU counts as 8 SMs.
        A decode call may be given the first alone. With ``topk`` and ``num_heads_q`` each query is a matter of its own:
        ``max(SMs // num_heads_k // (seq_len_q * ceil(num_heads_q / num_heads_k / 64)), 1)``.

    Raises
    ------
    TypeError, ValueError
        On an argument that does not fit, naming it and what it got.
    NotImplementedError
        On devices without kernels.
    """
    if topk is not None:
        return _plan_for_topk(cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q, topk)
    if cache_seqlens is None and num_q_tokens_per_head_k is None and num_heads_k is None:
        return FlashMLASchedMeta(), None
    of_cache = "fp8" if is_fp8_kvcache else "dense"
    if is_dynamo_compiling():
        return torch.ops.tilemla.get_mla_metadata(  # type: ignore[no-any-return]
            cache_seqlens, num_q_tokens_per_head_k, num_heads_k, kind=of_cache
        )
    # A call like one that was checked before; what the module refuses is checked again below, and named in the words of
    # this interface.
    lengths: Any = cache_seqlens
    try:
        kind = (
            lengths.shape,
            lengths.device,
            num_q_tokens_per_head_k,
            num_q_tokens_per_head_k.__class__,
            num_heads_k,
            num_heads_k.__class__,
            num_heads_q,
            num_heads_q.__class__,
            is_fp8_kvcache,
        )
        return _plans[kind].run(lengths)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        pass
    lengths = check_cache_seqlens(cache_seqlens)
    tokens_per_head_k = check_int("num_q_tokens_per_head_k", num_q_tokens_per_head_k, 1)
    heads_k = check_int("num_heads_k", num_heads_k, 1)
    if num_heads_q is not None:
        check_int("num_heads_q", num_heads_q, 1)
    device, batch_size = lengths.device, lengths.shape[0]
    num_sm_parts = num_sm_parts_for(num_sms_of(device), tokens_per_head_k, heads_k)
    schedule = make_schedule(lengths, num_sm_parts, tokens_per_head_k, kind=of_cache)
    if batch_size and device.type == "cuda":
        remember(_plans, kind, SchedulePlan(device, batch_size, num_sm_parts, tokens_per_head_k, kind=of_cache))
    return schedule


def _plan_for_topk(
    cache_seqlens: Any, num_q_tokens_per_head_k: Any, num_heads_k: Any, num_heads_q: Any, topk: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """A plan in tuple form for calls with ``indices``, of which all count."""
    is_traced = is_dynamo_compiling()
    lengths = cache_seqlens if is_traced else check_cache_seqlens(cache_seqlens)
    tokens_per_head_k = check_int("num_q_tokens_per_head_k", num_q_tokens_per_head_k, 1)
    heads_k = check_int("num_heads_k", num_heads_k, 1)
    check_int("topk", topk, 0)
    device, rows, queries = lengths.device, tokens_per_head_k, 1
    if num_heads_q is not None:
        rows = check_int("num_heads_q", num_heads_q, 1) // heads_k
        if rows * heads_k != num_heads_q or tokens_per_head_k % rows:
            raise ValueError(
                f"num_heads_q must be a multiple of num_heads_k = {heads_k} whose quotient divides "
                f"num_q_tokens_per_head_k = {tokens_per_head_k}, got {num_heads_q}"
            )
        queries = tokens_per_head_k // rows
    blocks = -(-topk // SCHEDULING_BLOCK)
    every = torch.full_like(lengths, blocks * SCHEDULING_BLOCK)
    if is_traced:
        return torch.ops.tilemla.get_mla_metadata(every, rows, heads_k * queries, kind="indexed")  # type: ignore[no-any-return]
    num_sm_parts = num_sm_parts_for(num_sms_of(device), rows, heads_k * queries)
    return make_schedule(every, num_sm_parts, rows, kind="indexed")


# What the calls with arguments that were checked came to. A CPU's lengths are checked each time.
_plans: dict[tuple[Any, ...], SchedulePlan] = {}
