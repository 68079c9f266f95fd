"""Schedules in plain Python: one plan carried out, and the schedule that cuts requests wherever it can."""

import numpy as np

BLOCK_N = 64


def walk(blocks, num_sm_parts, payload, may_cut, overhead):
    """One plan, carried out: a list of (request, first block, end) for each part; None if it needs more parts."""
    parts, remaining = [[]], payload
    for request, count in enumerate(blocks):
        first = 0
        while remaining < count - first + overhead:
            if remaining > overhead and may_cut:
                parts[-1].append((request, first, first + remaining - overhead))
                first += remaining - overhead
            elif not parts[-1]:
                return None  # nothing fits into a part of its own
            parts.append([])
            remaining = payload
        parts[-1].append((request, first, count))
        remaining -= count - first + overhead
    return parts if len(parts) <= num_sm_parts else None


def order_for(blocks, payload, may_cut, overhead):
    """The requests in the order of a plan: the longest that fits into the open part, else the longest."""
    left_over = sorted(range(len(blocks)), key=lambda request: (-blocks[request], request))
    order, remaining = [], payload
    while left_over:
        fitting = [request for request in left_over if blocks[request] + overhead <= remaining]
        request = (fitting or left_over)[0]
        left_over.remove(request)
        order.append(request)
        first = 0
        while remaining < blocks[request] - first + overhead:
            if remaining > overhead and may_cut:
                first += remaining - overhead
            elif remaining == payload:
                return None  # nothing fits into a part of its own
            remaining = payload
        remaining -= blocks[request] - first + overhead
    return order


def write_schedule(parts, batch_size, num_sm_parts):
    """The tensors that say what a walk did, as NumPy int32: (num_sm_parts, 8) and (batch_size + 1,)."""
    metadata = np.zeros((num_sm_parts, 8), dtype=np.int32)
    metadata[:, 0], metadata[:, 1] = batch_size, batch_size - 1
    pieces = [0] * batch_size
    for part in parts:
        for request, _, _ in part:
            pieces[request] += 1
    seen = [0] * batch_size
    for row, part in zip(metadata, parts, strict=False):
        if part:
            (begin, begin_block, _), (end, _, end_block) = part[0], part[-1]
            row[:7] = begin, end, begin_block, end_block, seen[begin], pieces[begin] > 1, pieces[end] > 1
            for request, _, _ in part:
                seen[request] += 1
    return metadata, np.cumsum([0, *pieces], dtype=np.int32)


def spread_schedule(lengths, num_sm_parts, order=None):
    """Equal shares of blocks, whatever cutting costs: the schedule with the most splits, in an order of requests."""
    blocks = [-(-lengths[request] // BLOCK_N) for request in order or range(len(lengths))]
    payload = max(-(-sum(blocks) // num_sm_parts), 1)
    metadata, by_place = write_schedule(walk(blocks, num_sm_parts, payload, True, 0), len(lengths), num_sm_parts)
    return (metadata, by_place) if order is None else put_in_order(metadata, by_place, order)


def put_in_order(metadata, by_place, order):
    """The schedule that visits the requests in an order, of one whose requests are its places."""
    assert len(order) <= min(256, 4 * len(metadata)), "there is no room for the order"
    metadata[metadata[:, 0] <= metadata[:, 1], :2] += 2**30
    metadata[:, 7] = np.array([*order, *[0] * (4 * len(metadata) - len(order))], dtype=np.uint8).view("<i4")
    pieces = np.zeros(len(order), dtype=np.int32)
    pieces[list(order)] = np.diff(by_place)
    return metadata, np.cumsum([0, *pieces], dtype=np.int32)
