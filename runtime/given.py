"""The schedule of a decode call, in whichever of the forms of FlashMLA and its callers it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tilemla.sched_meta import FlashMLASchedMeta, ScheduleConfig, SparseScheduleConfig
from tilemla.schedule import derive_num_splits, make_schedule, num_sm_parts_for
from tilemla.streams import capture_id, is_capturing
from tilemla.validate import check_schedule_tensors, check_tile_scheduler_metadata

Lengths = torch.Tensor | Callable[[], torch.Tensor]


class Given(NamedTuple):
    """What a call follows.

    Parameters
    ----------
    tile_scheduler_metadata, num_splits : Tensor
        The tuple form, checked as far as shapes can tell.
    by_length : bool
        Whether they were written by hand to ask for results that do not depend on the rest of the batch. They are then
        no schedule, and one that cuts each request by its own length is to be made.
    """

    tile_scheduler_metadata: torch.Tensor
    num_splits: torch.Tensor
    by_length: bool = False


def _recall_num_splits(tile_scheduler_metadata: Any) -> torch.Tensor | None:
    """``num_splits`` of a tensor that ``get_mla_metadata`` returned, where it is sure to be in step with it."""
    attributes = getattr(tile_scheduler_metadata, "__dict__", None)
    if not attributes or "tile_scheduler_metadata" in attributes:
        return None
    num_splits = attributes.get("num_splits")
    if not _is_untouched(tile_scheduler_metadata, num_splits):
        return None
    if tile_scheduler_metadata.device.type == "cuda" and is_capturing():
        return None
    return num_splits  # type: ignore[no-any-return]


def recall_schedule(
    tile_scheduler_metadata: Any, num_splits: Any
) -> tuple[torch.Tensor, torch.Tensor, ScheduleConfig | SparseScheduleConfig | None] | None:
    """The schedule of a call where it is there, and nothing else of the call is needed to tell.

    Parameters
    ----------
    tile_scheduler_metadata, num_splits
        As in ``flash_mla_with_kvcache``; of any type.

    Returns
    -------
    (tile_scheduler_metadata, num_splits, config) or None
        The tuple form, unchecked, and what a call must be like to follow it, None for any. None where `find_schedule`
        has to look.
    """
    config = None
    if num_splits is None:
        if tile_scheduler_metadata.__class__ is FlashMLASchedMeta:
            given = tile_scheduler_metadata
            config = given.config
            if config is not None:
                tile_scheduler_metadata, num_splits = given.tile_scheduler_metadata, given.num_splits
        else:
            num_splits = _recall_num_splits(tile_scheduler_metadata)
        if num_splits is None:
            return None
    # One part that is not ours may be no schedule at all (`Given.by_length`).
    if config is None and (
        not isinstance(tile_scheduler_metadata, torch.Tensor)
        or ("num_splits" not in tile_scheduler_metadata.__dict__ and tile_scheduler_metadata.shape[0] < 2)
    ):
        return None
    return tile_scheduler_metadata, num_splits, config


def _is_untouched(tile_scheduler_metadata: torch.Tensor, num_splits: Any) -> bool:
    """Whether torch has written to neither since they were made, by an operation on it or on a view of it."""
    return isinstance(num_splits, torch.Tensor) and not any(
        tensor.is_inference() or tensor._version for tensor in (tile_scheduler_metadata, num_splits)
    )


def find_schedule(
    tile_scheduler_metadata: Any,
    num_splits: Any,
    cache_seqlens: Lengths,
    config: ScheduleConfig | SparseScheduleConfig,
    num_sms: int,
) -> Given:
    """Find the schedule of a call, making or completing it on the device where it is not there yet.

    Parameters
    ----------
    tile_scheduler_metadata, num_splits
        As in ``flash_mla_with_kvcache``; of any type.
    cache_seqlens : Tensor, (batch_size,), int32, or callable
        Checked already, or what makes it where a schedule has to be made.
    config : ScheduleConfig or SparseScheduleConfig
        The call.
    num_sms : int
        Multiprocessors of the device.

    Raises
    ------
    TypeError, ValueError
        On a schedule that does not fit the call, as far as shapes can tell.
    """
    given = tile_scheduler_metadata
    is_ours = False
    if isinstance(given, FlashMLASchedMeta):
        if num_splits is not None:
            raise ValueError(f"num_splits must be None beside a FlashMLASchedMeta, got {type(num_splits).__name__}")
        if given.tile_scheduler_metadata is None:
            given.fill_in(*_make(cache_seqlens, config, num_sms), config)
        else:
            given.expect(config)
        is_ours = given.config is not None
        metadata, splits = given.tile_scheduler_metadata, given.num_splits
    elif isinstance(given, torch.Tensor) and num_splits is None:
        attributes = vars(given)
        metadata, splits = attributes.get("tile_scheduler_metadata"), attributes.get("num_splits")
        if metadata is None:
            metadata = given
            is_ours = _is_untouched(given, splits)
            if not is_ours:
                splits = None
            elif given.device.type == "cuda" and is_capturing():
                metadata, splits = _make_in_graph(given, cache_seqlens, config, num_sms)
    else:
        metadata, splits = given, num_splits
    batch_size = config.batch_size
    if splits is None:
        metadata = check_tile_scheduler_metadata(metadata, config.device)
        splits = derive_num_splits(metadata, batch_size)
    else:
        metadata, splits = check_schedule_tensors(metadata, splits, batch_size, config.device)
    return Given(metadata, splits, not is_ours and _is_in_older_order(metadata, splits, batch_size))


def _make(
    cache_seqlens: Lengths, config: ScheduleConfig | SparseScheduleConfig, num_sms: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = config.tokens_per_head_k
    return make_schedule(
        cache_seqlens if isinstance(cache_seqlens, torch.Tensor) else cache_seqlens(),
        num_sm_parts_for(num_sms, rows, config.num_heads_k),
        rows,
        seq_len_q=config.seq_len_q,
        window_left=config.window_left,
        kind=config.kind,
    )


def _make_in_graph(
    given: Any, cache_seqlens: Lengths, config: ScheduleConfig | SparseScheduleConfig, num_sms: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the schedule of a call that is being captured within the graph, once for all calls that get ``given``.

    Callers of today's FlashMLA expect that: there ``get_mla_metadata`` plans nothing, whatever its arguments, and the
    first call does, so that a replay follows the lengths of the day. What was planned before the capture is neither
    made again by a replay nor kept alive for it.
    """
    if not isinstance(cache_seqlens, torch.Tensor):  # new in each call
        return _make(cache_seqlens, config, num_sms)
    graph = capture_id()
    key = (graph, cache_seqlens.data_ptr(), config)
    known, schedule = getattr(given, "_in_graph", (None, None))
    if graph is None or known != key or schedule is None:
        schedule = _make(cache_seqlens, config, num_sms)
        given._in_graph = (key, schedule)
    return schedule


def _is_in_older_order(metadata: torch.Tensor, num_splits: torch.Tensor, batch_size: int) -> bool:
    """Whether a schedule is what vLLM's batch-invariant mode writes by hand, in the field order of older kernels.

    One part, (0, begin_block 0, batch_size - 1, end_block, 0, 0, 0, 0), and ``num_splits`` of zeros. A schedule never
    has such ``num_splits``. A GPU's values are not looked at, for that would wait for it: there, one part that
    ``get_mla_metadata`` did not return is taken for it. Cut by their lengths, requests come out right in any case.
    """
    if metadata.shape[0] != 1 or not batch_size:
        return False
    if metadata.device.type != "cpu":
        return "num_splits" not in vars(metadata)
    begin, begin_block, end_inclusive, _, *rest = metadata[0].tolist()
    is_one_part = (begin, begin_block, end_inclusive) == (0, 0, batch_size - 1) and not any(rest)
    return is_one_part and not num_splits[: batch_size + 1].any()
