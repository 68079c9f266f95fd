"""``python -m tilemla.codegen SPEC CONFIG STORE``: generate one module; what the runtime starts as a child process.

SPEC and CONFIG are ``KernelSpec.to_dict()`` and ``KernelConfig.to_dict()`` as JSON, STORE the directory that gets the
entry. Steps are printed as they begin, after ``tilemla.generate.STEP_PREFIX``; a failure is the last thing printed and
exits with 1.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import threading
from pathlib import Path

from tilemla.codegen.errors import BuildError
from tilemla.config import KernelConfig
from tilemla.errors import ToolchainError
from tilemla.generate import STEP_PREFIX
from tilemla.spec import KernelSpec


def _end_with_parent() -> None:
    """When the parent goes and the pipe from it closes, end this process and the compilers that it started."""
    if not stat.S_ISFIFO(os.fstat(0).st_mode) or os.getpgrp() != os.getpid():
        return  # started by hand: nobody to watch, and a group that is not ours

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: list[str]) -> int:
    """Generate the module; returns the exit status."""
    if len(arguments) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    _end_with_parent()
    spec = KernelSpec.from_dict(json.loads(arguments[0]))
    config = KernelConfig.from_dict(json.loads(arguments[1]))
    store = Path(arguments[2])
    print(f"{STEP_PREFIX}loading TileLang", flush=True)
    try:
        from tilemla.codegen.build import build_module

        build_module(spec, store, config, lambda step: print(f"{STEP_PREFIX}{step}", flush=True))
    except (BuildError, ToolchainError) as error:
        print(error, flush=True)
        return 1
    except OSError as error:
        print(f"cannot write into {store}: {error}; free some space or set TILEMLA_CACHE_DIR", flush=True)
        return 1
    except ImportError as error:
        print(f"TileLang cannot be imported: {error}; pip install 'tilemla[codegen]'", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
