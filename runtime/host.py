"""What this machine is: its C and C++ libraries, its driver and GPUs, and whether a module can run on it.

Standard library only, and runnable as a script: that is how the GPUs are asked for in a process of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilemla.manifest import Requirements

# cuInit wakes every GPU of the machine; without a persistent driver that takes seconds for each.
_PROBE_TIMEOUT_S = 60.0
_ERROR_NO_DEVICE = 100
_ATTRIBUTE_SMS, _ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 16, 75, 76  # CUdevice_attribute
_NAME_CHARS = 256


class DriverError(RuntimeError):
    """There is an NVIDIA driver, but it does not answer."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU.

    Parameters
    ----------
    name : str
        The product's name, such as ``"NVIDIA H100 80GB HBM3"``.
    capability : (int, int)
        CUDA compute capability.
    sms : int
        Multiprocessors.
    memory_bytes : int
        All of its memory, used or not.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    memory_bytes: int


def glibc_version() -> str:
    """Version of the GNU C library, such as ``"2.36"``; empty where the C library is another."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (OSError, ValueError):  # the name is unknown to other C libraries
        return ""
    return version if name == "glibc" else ""


def _mapped_libstdcxx() -> Path | None:
    """The C++ library that this process has loaded."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            if "/libstdc++.so" in line:
                return Path(line.split(maxsplit=5)[5].rstrip("\n").removesuffix(" (deleted)"))
    return None


@functools.cache
def libstdcxx_version() -> str:
    """Greatest ``GLIBCXX`` symbol version of this process's C++ library, such as ``"3.4.30"``.

    Of the library that is loaded already, since a process keeps its first, else of the one that would be.

    Returns
    -------
    str
        Empty where there is no ``libstdc++.so.6``.
    """
    try:
        ctypes.CDLL("libstdc++.so.6")
    except OSError:
        return ""
    path = _mapped_libstdcxx()
    if path is None:
        return ""
    # A package upgrade removes the file under a running process: its successor, behind the link, has all that it had.
    data = (path if path.exists() else path.with_name("libstdc++.so.6")).read_bytes()
    minors = {int(minor) for minor in re.findall(rb"GLIBCXX_3\.4\.(\d+)\0", data)}
    return f"3.4.{max(minors)}" if minors else ""


def _open_driver() -> Any:
    """The driver's library, or None where there is none. Opening it initialises nothing."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


@functools.cache
def driver_version() -> str:
    """CUDA version that the NVIDIA driver supports, such as ``"13.0"``, as ``nvidia-smi`` shows it.

    CUDA is not initialised by asking.

    Returns
    -------
    str
        Empty where there is no driver, or one that does not say (a stub).
    """
    version = ctypes.c_int()
    ask = getattr(_open_driver(), "cuDriverGetVersion", None)
    if ask is None or ask(ctypes.byref(version)) != 0:
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: ``"2.13.0+cpu"`` and ``"2.13"`` are both ``(2, 13)``."""
    leading = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(number) for number in leading[0].split(".")] if leading else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def why_unmet(requires: Requirements) -> str | None:
    """Why a module cannot run on this machine.

    Parameters
    ----------
    requires : Requirements
        The least versions, from the module's manifest.

    Returns
    -------
    str or None
        What is needed, what is here and what to do; None when nothing is lacking. A machine without an NVIDIA driver
        lacks nothing: a module can be opened and looked into there.
    """
    needs: tuple[tuple[str, str, Callable[[], str], str], ...] = (
        (
            "glibc",
            requires.glibc,
            glibc_version,
            "build the module on a distribution as old as this one, or run it on a newer one",
        ),
        (
            "libstdc++ with GLIBCXX",
            requires.libstdcxx,
            libstdcxx_version,
            "install a newer libstdc++ (libstdc++6, with conda libstdcxx-ng), or build the module with an older "
            "compiler",
        ),
        (
            "a driver for CUDA",
            requires.driver,
            driver_version,
            "upgrade the NVIDIA driver, or build the module with an older CUDA toolkit",
        ),
    )
    reasons = []
    for what, least, probe, mend in needs:
        if not least:
            continue
        here = probe()
        if not here and probe is driver_version:
            continue
        if version_numbers(here) < version_numbers(least):
            reasons.append(f"{what} {least} or later is needed, here is {here or 'none'}: {mend}")
    return "; ".join(reasons) or None


def list_gpus(timeout_s: float = _PROBE_TIMEOUT_S) -> list[Gpu]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` has it.

    They are asked for in a child process, so that CUDA is never initialised in this one: it may still fork.

    Parameters
    ----------
    timeout_s : float
        How long the driver may take, in seconds.

    Returns
    -------
    list of Gpu
        In CUDA's order; empty where there is no driver or no GPU.

    Raises
    ------
    DriverError
        When there is a driver and it fails, crashes or does not answer in time.
    """
    if not sys.executable:
        raise DriverError("the GPUs cannot be asked for: this process has no Python interpreter to start")
    # Isolated: neither this folder, whose select.py is not the standard library's, nor the user's set-up gets in.
    command = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=1)  # no longer: a process that hangs inside the driver cannot be killed
        raise DriverError(f"the NVIDIA driver did not answer within {timeout_s:g} s") from None
    if child.returncode != 0:
        status = f"signal {signal.Signals(-child.returncode).name}" if child.returncode < 0 else f"{child.returncode}"
        raise DriverError(f"asking the NVIDIA driver for its GPUs ended with {status}: {errors.strip()[-2000:]}")
    found = json.loads(output.splitlines()[-1])
    if found["error"]:
        raise DriverError(found["error"])
    return [Gpu(**{**fields, "capability": tuple(fields["capability"])}) for fields in found["gpus"]]


def _probe_gpus() -> list[dict[str, Any]]:
    """Ask the driver. Initialises CUDA: for the child process alone."""
    driver = _open_driver()
    if driver is None:
        return []
    status = driver.cuInit(0)
    if status == _ERROR_NO_DEVICE:
        return []
    _check(driver, "cuInit", status)
    count = ctypes.c_int()
    _check(driver, "cuDeviceGetCount", driver.cuDeviceGetCount(ctypes.byref(count)))
    return [_probe_gpu(driver, index) for index in range(count.value)]


def _probe_gpu(driver: Any, index: int) -> dict[str, Any]:
    device, memory_bytes, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(_NAME_CHARS)
    _check(driver, "cuDeviceGet", driver.cuDeviceGet(ctypes.byref(device), index))
    _check(driver, "cuDeviceGetName", driver.cuDeviceGetName(name, _NAME_CHARS, device))
    _check(driver, "cuDeviceTotalMem", driver.cuDeviceTotalMem_v2(ctypes.byref(memory_bytes), device))

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        _check(driver, "cuDeviceGetAttribute", driver.cuDeviceGetAttribute(ctypes.byref(value), which, device))
        return value.value

    return {
        "name": name.value.decode(errors="replace"),
        "capability": [attribute(_ATTRIBUTE_MAJOR), attribute(_ATTRIBUTE_MINOR)],
        "sms": attribute(_ATTRIBUTE_SMS),
        "memory_bytes": memory_bytes.value,
    }


def _check(driver: Any, call: str, status: int) -> None:
    if status == 0:
        return
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    driver.cuGetErrorName(status, ctypes.byref(name))
    driver.cuGetErrorString(status, ctypes.byref(text))
    words = [value.decode(errors="replace") for value in (name.value, text.value) if value]
    raise DriverError(f"the NVIDIA driver's {call} failed with error {status}: {', '.join(words) or 'unknown'}")


def _main() -> None:
    try:
        found: dict[str, Any] = {"gpus": _probe_gpus(), "error": ""}
    except (DriverError, AttributeError) as error:  # AttributeError: a library that lacks the function
        found = {"gpus": [], "error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
