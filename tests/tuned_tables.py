"""Tables of what was chosen, where a test puts others in their place."""

from tilemla import fingerprint, interface, schedule, sparse
from tilemla.tuning import chosen


def forget():
    """Forget whatever was read from tables, and what was planned by them."""
    for cached in (chosen._read_if_there, schedule.costs_for, fingerprint.source_fingerprint):
        cached.cache_clear()
    for plans in (schedule._plans, interface._plans, sparse._plans):
        plans.clear()
