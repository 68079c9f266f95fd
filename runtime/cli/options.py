"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import click

from tilemla.spec import ARCHS, DTYPES, HEAD_DIMS, KV_FORMATS, PAGE_BLOCK_SIZES

_HEAD_DIMS_QK, _HEAD_DIMS_V = (sorted({str(dims[i]) for dims in HEAD_DIMS}) for i in range(2))


def repeatable(option: str, name: str, values: Sequence[object], what: str) -> Callable[[Any], Any]:
    """An option that takes some of a few values."""
    choices = click.Choice([str(value) for value in values])
    return click.option(option, name, multiple=True, type=choices, help=f"{what}; may be given repeatedly.")


def spec_options(default_archs: str) -> Callable[[Any], Any]:
    """The options that narrow specs by field: ``archs``, ``dtypes`` and so on, as ``select_specs`` calls them.

    Parameters
    ----------
    default_archs : str
        Which architectures are taken without ``--arch``, in words.
    """
    options = (
        repeatable("--arch", "archs", ARCHS, f"This architecture. Default: {default_archs}"),
        repeatable("--dtype", "dtypes", DTYPES, "Only this dtype"),
        repeatable("--kv-format", "kv_formats", KV_FORMATS, "Only this layout of the cache"),
        repeatable("--head-dim-qk", "head_dims_qk", _HEAD_DIMS_QK, "Only this head dim of queries and keys"),
        repeatable("--head-dim-v", "head_dims_v", _HEAD_DIMS_V, "Only this head dim of values"),
        repeatable("--page-block-size", "page_block_sizes", PAGE_BLOCK_SIZES, "Only this number of tokens in a page"),
    )
    return lambda command: functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)
