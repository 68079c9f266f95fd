"""The implementations that are timed side by side, each behind the same two steps: prepare a case, then call."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from tilemla import interface
from tilemla.bench.cases import HEAD_DIM_QK, HEAD_DIM_V, PAGE_BLOCK_SIZE, GridCase
from tilemla.bench.further import FurtherCase
from tilemla.bench.further_calls import FurtherInputs, prepare_further
from tilemla.bench.inputs import GridInputs, make_inputs

Decode = Callable[[], tuple[torch.Tensor, torch.Tensor]]

# Where FlashMLA is found: its own package, or the build of it in sglang-kernel. One of the two is enough.
FLASH_MLA_MODULES = ("flash_mla", "sgl_kernel.flash_mla")
FLASHINFER = "flashinfer"
_FLASHINFER_WORKSPACE_BYTES = 128 * 2**20  # what its documentation recommends
_PROBE = GridCase(1, PAGE_BLOCK_SIZE, 64, 1)


class PeerError(RuntimeError):
    """A peer that was asked for by name cannot be had; says why."""


class Implementation(Protocol):
    """Decode kernels of somebody."""

    @property
    def name(self) -> str:
        """What it is called in tables and logs."""

    @property
    def version(self) -> str | None:
        """What its package says, None where it says nothing."""

    def prepare(self, case: GridCase, inputs: GridInputs) -> Decode:
        """Plan a call, as a server does once per step; returns the call of one layer.

        The call returns ``out`` (batch_size, seq_len_q, num_heads_q, 512) and a log-sum-exp.
        """

    def prepare_further(self, case: FurtherCase, inputs: FurtherInputs) -> Decode:
        """The same for a further case."""


def _version_of(module: str) -> str | None:
    version = getattr(sys.modules.get(module.partition(".")[0]), "__version__", None)
    return version if isinstance(version, str) else None


@dataclasses.dataclass(frozen=True)
class FlashMLA:
    """A module with FlashMLA's API, in its tuple form."""

    name: str
    api: Any

    @property
    def version(self) -> str | None:
        """What the package that the module belongs to says."""
        return _version_of(self.name)

    def prepare(self, case: GridCase, inputs: GridInputs) -> Decode:
        """Schedule with ``get_mla_metadata``; the call is ``flash_mla_with_kvcache``."""
        return self.prepare_with(self.make_schedule(case, inputs), case, inputs)

    def prepare_further(self, case: FurtherCase, inputs: FurtherInputs) -> Decode:
        """Plan as the kernel's callers do; the call is the function that they call."""
        return prepare_further(self.name, case, inputs)

    def make_schedule(self, case: GridCase, inputs: GridInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """``tile_scheduler_metadata`` and ``num_splits``, as the implementation prefers them."""
        tokens_per_head_k = case.seq_len_q * case.num_heads_q // case.num_heads_k
        schedule: tuple[torch.Tensor, torch.Tensor] = self.api.get_mla_metadata(
            inputs.cache_seqlens, tokens_per_head_k, case.num_heads_k
        )
        return schedule

    def prepare_with(self, schedule: tuple[torch.Tensor, torch.Tensor], case: GridCase, inputs: GridInputs) -> Decode:
        """A call of ``flash_mla_with_kvcache`` that follows a schedule."""

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            result: tuple[torch.Tensor, torch.Tensor] = self.api.flash_mla_with_kvcache(
                inputs.q,
                inputs.k_cache,
                inputs.block_table,
                inputs.cache_seqlens,
                HEAD_DIM_V,
                *schedule,
                causal=case.causal,
            )
            return result

        return call


class FlashInfer:
    """FlashInfer's ``BatchMLAPagedAttentionWrapper`` with its backend for Hopper."""

    name = f"{FLASHINFER}.fa3"

    def __init__(self, device: torch.device) -> None:
        self._wrapper_class = importlib.import_module(f"{FLASHINFER}.mla").BatchMLAPagedAttentionWrapper
        self._workspace = torch.empty(_FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    @property
    def version(self) -> str | None:
        """What the package says."""
        return _version_of(FLASHINFER)

    def prepare(self, case: GridCase, inputs: GridInputs) -> Decode:
        """Plan with the wrapper; the call runs it on views of queries and cache, which it takes apart by head dims.

        Raises
        ------
        ValueError
            On several KV heads, which the wrapper has no notion of.
        """
        if case.num_heads_k != 1:
            raise ValueError(f"FlashInfer's wrapper serves one KV head, got {case.num_heads_k}")
        num_pages = [-(-length // PAGE_BLOCK_SIZE) for length in inputs.lengths]
        starts = torch.tensor([0, *num_pages], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        pages = torch.cat([inputs.block_table[request, :count] for request, count in enumerate(num_pages)])
        wrapper = self._wrapper_class(self._workspace, backend="fa3")
        wrapper.plan(
            torch.arange(case.batch_size + 1, dtype=torch.int32) * case.seq_len_q,
            starts,
            pages,
            torch.tensor(inputs.lengths, dtype=torch.int32),
            case.num_heads_q,
            HEAD_DIM_V,
            HEAD_DIM_QK - HEAD_DIM_V,
            PAGE_BLOCK_SIZE,
            case.causal,
            HEAD_DIM_QK**-0.5,
            inputs.q.dtype,
            inputs.k_cache.dtype,
        )
        q_nope, q_pe = inputs.q.flatten(0, 1).tensor_split([HEAD_DIM_V], dim=-1)
        ckv, kpe = inputs.k_cache.squeeze(2).tensor_split([HEAD_DIM_V], dim=-1)

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = wrapper.run(q_nope, q_pe, ckv, kpe, return_lse=True)
            return out.view(case.batch_size, case.seq_len_q, case.num_heads_q, HEAD_DIM_V), lse

        return call

    def prepare_further(self, case: FurtherCase, inputs: FurtherInputs) -> Decode:
        """Raise ValueError: only its dense decode is timed."""
        raise ValueError(f"FlashInfer is timed with 16-bit caches behind a block table, got {case}")


OURS: Implementation = FlashMLA("tilemla", interface)


class Peers(NamedTuple):
    """The peers that can be timed here, and why others cannot, by name."""

    found: tuple[Implementation, ...]
    missing: dict[str, str]


def _open_peer(name: str, device: torch.device, dtype: str) -> Implementation:
    """Import a peer and try a small call: some import well and say only then that they cannot run here."""
    peer: Implementation
    if name == FLASHINFER:
        peer = FlashInfer(device)
    else:
        api = importlib.import_module(name)
        lacking = [word for word in ("get_mla_metadata", "flash_mla_with_kvcache") if not hasattr(api, word)]
        if lacking:
            raise PeerError(f"the module has no {' and no '.join(lacking)}")
        peer = FlashMLA(name, api)
    case = dataclasses.replace(_PROBE, dtype=dtype)
    peer.prepare(case, make_inputs(case, device, poison=False))()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return peer


def find_peers(names: tuple[str, ...], device: torch.device, dtype: str) -> Peers:
    """Find the implementations to time beside ours.

    Parameters
    ----------
    names : tuple of str
        ``("none",)``; ``("auto",)``: FlashMLA and FlashInfer where they can be imported and run; or names:
        ``"flashinfer"``, and modules with FlashMLA's API.
    device : torch.device
        Where they must run.
    dtype : str
        Of queries and cache.

    Raises
    ------
    PeerError
        When a peer that was named cannot be imported or does not run, with the reason.
    """
    if names == ("none",):
        return Peers((), {})
    is_auto = names == ("auto",)
    if is_auto and device.type != "cuda":
        return Peers((), {name: "runs on a GPU only" for name in (*FLASH_MLA_MODULES, FLASHINFER)})
    found: list[Implementation] = []
    missing: dict[str, str] = {}
    for name in (*FLASH_MLA_MODULES, FLASHINFER) if is_auto else names:
        if is_auto and name in FLASH_MLA_MODULES and any(isinstance(peer, FlashMLA) for peer in found):
            continue
        try:
            found.append(_open_peer(name, device, dtype))
        except Exception as error:  # whatever keeps a peer from running: without it the benchmark still says something
            missing[name] = describe(error)
            if not is_auto:
                raise PeerError(f"peer {name} cannot be timed: {missing[name]}") from error
    return Peers(tuple(found), missing)


def describe(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
