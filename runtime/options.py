"""What a decode call may ask for beyond FlashMLA's dense arguments: windows, sinks, results in place, another log."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tilemla.validate import check_bool, check_lse_base, check_tensor, describe

WindowSize = tuple[int, int]
# What `window_size` is when it is left out.
UNLIMITED: WindowSize = (-1, -1)
# The largest window that kernels calculate with; no cache is longer.
_MAX_WINDOW = 2**30


class Options(NamedTuple):
    """The options of a call that change what its kernels do; part of what its plan is found by.

    Parameters
    ----------
    window_size : (int, int)
        Tokens to the left and to the right of its own position that a query sees; -1 is all.
    lse_scale : float
        Log of 2 in the base of the log-sum-exp.
    has_sink, batch_invariant : bool
        Whether there is an attention sink, and whether requests are cut by their own lengths alone.
    """

    window_size: WindowSize = UNLIMITED
    lse_scale: float = check_lse_base("e")
    has_sink: bool = False
    batch_invariant: bool = False


DEFAULT_OPTIONS = Options()


class Traits(NamedTuple):
    """A call's options as its kernels take them, for its number of queries."""

    window_left: int
    window_right: int
    lse_scale: float
    has_sink: bool

    @property
    def is_plain(self) -> bool:
        """Whether the plain decode program serves the call."""
        return self.window_left < 0 and not self.has_sink

    @classmethod
    def of(cls, options: Options, causal: bool, seq_len_q: int) -> Traits:
        """Those of a call with ``seq_len_q`` queries a request."""
        window = kernel_window(options.window_size, causal, seq_len_q)
        return cls(*window, options.lse_scale, options.has_sink)


def kernel_window(window_size: WindowSize, causal: bool, seq_len_q: int) -> WindowSize:
    """A window as kernels take it: -1 where it hides nothing; a causal mask is one that ends at its query."""
    left, right = window_size
    bounds = [bound for bound in (right, 0 if causal else -1) if 0 <= bound < seq_len_q - 1]
    return (-1 if left > _MAX_WINDOW else left, min(bounds, default=-1))


def check_options(*, window_size: Any, lse_base: Any, attn_sink: Any, batch_invariant: Any) -> Options:
    """Return the options of a call if they are sound by themselves.

    Raises
    ------
    TypeError, ValueError
        On an option that does not fit, naming it, what it must be and what it got.
    """
    check_bool("batch_invariant", batch_invariant)
    return Options(_check_window(window_size), check_lse_base(lse_base), attn_sink is not None, batch_invariant)


def _check_window(window_size: Any) -> WindowSize:
    words = "window_size must be (left, right), two ints that are -1 (no limit) or more"
    if not isinstance(window_size, (tuple, list)):
        raise TypeError(f"{words}, got {describe(window_size)}")
    if len(window_size) != 2:
        raise ValueError(f"{words}, got {len(window_size)} elements, {window_size!r}")
    for bound in window_size:
        if not isinstance(bound, int) or isinstance(bound, bool):
            raise TypeError(f"{words}, got {window_size!r}")
        if bound < -1:
            raise ValueError(f"{words}, got {window_size!r}")
    left, right = window_size
    return (int(left), int(right))


def check_attn_sink(attn_sink: Any, q: torch.Tensor) -> torch.Tensor | None:
    """Return the attention sink of a call if it fits its queries, (…, num_heads_q, head_dim_qk)."""
    if attn_sink is None:
        return None
    num_heads_q = q.shape[-2]
    sink = check_tensor("attn_sink", attn_sink, 1, "(num_heads_q,)")
    if sink.dtype is not torch.float32:
        raise TypeError(f"attn_sink must be float32, got {describe(sink)}")
    if sink.device != q.device:
        raise ValueError(f"attn_sink must be on {q.device}, as q, got {describe(sink)}")
    if sink.shape[0] != num_heads_q:
        raise ValueError(f"attn_sink must have num_heads_q = {num_heads_q} elements, got {describe(sink)}")
    if not sink.is_contiguous():
        raise ValueError(f"attn_sink must be contiguous, got stride {sink.stride()}")
    return sink.detach()


def check_results(out: Any, softmax_lse: Any, q: torch.Tensor, head_dim_v: int) -> None:
    """Check tensors that results are to be written to, where they are given.

    Raises
    ------
    TypeError, ValueError
        On a dtype, shape, device or stride that does not fit.
    """
    batch_size, seq_len_q, num_heads_q, _ = q.shape
    lse_layout = "(batch_size, num_heads_q, seq_len_q)"
    for name, value, layout, shape, dtype in (
        (
            "out",
            out,
            "(batch_size, seq_len_q, num_heads_q, head_dim_v)",
            (batch_size, seq_len_q, num_heads_q, head_dim_v),
            q.dtype,
        ),
        ("softmax_lse", softmax_lse, lse_layout, (batch_size, num_heads_q, seq_len_q), torch.float32),
    ):
        if value is None:
            continue
        check_tensor(name, value, len(shape), layout)
        if value.dtype is not dtype:
            raise TypeError(f"{name} must be {dtype}, got {describe(value)}")
        if value.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, as q, got {describe(value)}")
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {layout} = {shape}, got {describe(value)}")
    if out is not None and not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if softmax_lse is not None and not (softmax_lse.is_contiguous() or has_heads_side_by_side(softmax_lse)):
        raise ValueError(
            f"softmax_lse must be contiguous, or the transpose of a contiguous (batch_size, seq_len_q, num_heads_q), "
            f"got strides {softmax_lse.stride()}"
        )


def has_heads_side_by_side(softmax_lse: torch.Tensor) -> bool:
    """Whether a log-sum-exp, (batch_size, num_heads_q, seq_len_q), is laid out as kernels write it."""
    return softmax_lse.transpose(1, 2).is_contiguous()


_FORMATS = (
    "is_fp8_kvcache",
    "indices",
    "extra_k_cache",
    "extra_indices_in_kvcache",
    "topk_length",
    "extra_topk_length",
)


def refuse_formats(*arguments: Any) -> None:
    """Refuse arguments that torch's compiler has no operator for, in the order of ``_FORMATS``, unless all are None."""
    names = ", ".join(name for name, value in zip(_FORMATS, arguments, strict=True) if value is not None)
    if names:
        raise NotImplementedError(
            f"{names} must be left at the default where torch.compile traces a call without indices: there is no "
            "operator for that; leave the call out of the graph with torch.compiler.disable"
        )
