"""What is asked of torch's CUDA state in every call, by the shortest way that torch has.

The public functions check or build things that a call on a CUDA tensor does not need; where a torch lacks the short way
they serve.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch


def _current_stream(device_index: int) -> int:
    return torch.cuda.current_stream(device_index).cuda_stream


# The handle of a device's current stream.
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
# Whether a CUDA graph is being captured on the current device's current stream.
is_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which the device of some tensors is the current one; nothing is done where it is."""
    if device.type != "cuda" or current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.lru_cache(maxsize=1)
def _get_capture_info() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None


def capture_id() -> int | None:
    """What tells the CUDA graph that the current stream is captured into from every other graph of the process.

    None where nothing is captured, or where the driver does not say.
    """
    function = _get_capture_info() if is_capturing() else None
    if function is None:
        return None
    status, identity = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(raw_stream(current_device()))
    if function(stream, ctypes.byref(status), ctypes.byref(identity), None, None, None) or status.value != 1:
        return None
    return identity.value
