"""What is asked of torch's CUDA state in every call, by the shortest way that torch has.

The public functions check or build things that a call on a CUDA tensor does not need; where a torch lacks the short way
they serve.
"""

from __future__ import annotations

from collections.abc import Callable

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
