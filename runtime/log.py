"""The logger. ``TILEMLA_LOG`` writes it to stderr; without, the application decides, and Python shows warnings."""

from __future__ import annotations

import functools
import logging

from tilemla import env


@functools.cache
def logger() -> logging.Logger:
    """The logger ``tilemla``, set up at its first use."""
    log = logging.getLogger("tilemla")
    level = env.log_level()
    if level is not None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("tilemla: %(levelname)s: %(message)s"))
        log.addHandler(handler)
        log.setLevel(level)
        log.propagate = False
    return log
