"""Which processes work in a directory: how tests see that no build outlives who asked for it."""

import time
from pathlib import Path


def processes_in(directory):
    """Ids of the processes whose working directory lies below: builds and the compilers that they started."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if (process / "cwd").readlink().is_relative_to(directory):
                    found.append(int(process.name))
            except OSError:
                continue  # it has ended
    return found


def wait_until_gone(directory, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while processes_in(directory):
        assert time.monotonic() < deadline, "builds outlived the process that asked for them"
        time.sleep(0.05)
