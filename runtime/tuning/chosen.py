"""What tables say when a module is built or a schedule is made.

Tables lie in the folder of ``TILEMLA_TUNING_DIR``, else in the package: ``<spec's name>/<gpu>.json``. A spec without a
table of its own takes that of its architecture's first spec, since the programs are the same; so do schedules, which
callers of the tuple form make without saying for what dtype or page size.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from tilemla import env
from tilemla.config import DEFAULT_CONFIG, KernelConfig
from tilemla.costs import ScheduleCosts
from tilemla.spec import KernelSpec
from tilemla.tuning.table import Table, TableError, read_table, table_path

# A module is built for every GPU of an architecture, mostly where there is none: it is tuned for this one.
_REFERENCE_GPU = {"sm_90a": "h100"}


def tuning_folder() -> Path:
    """The folder of logs and tables: that of ``TILEMLA_TUNING_DIR``, else the package's.

    Raises
    ------
    TableError
        When the variable names no folder.
    """
    chosen = env.tuning_dir()
    if chosen is not None:
        if not chosen.is_dir():
            raise TableError(f"TILEMLA_TUNING_DIR must be a folder of tables, got {chosen}, which is none")
        return chosen
    return _package_folder()


@functools.cache
def _package_folder() -> Path:
    # Asked for first where a module is looked for, and then remembered: a thread that builds one while tilemla is being
    # imported must not ask for a part of it.
    found = importlib.util.find_spec("tilemla.tuning_logs")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("this installation of tilemla lacks its package tilemla.tuning_logs")
    return Path(next(iter(found.submodule_search_locations)))


@functools.cache
def _read_if_there(path: Path) -> Table | None:
    return read_table(path) if path.exists() else None


def find_table(spec: KernelSpec, gpu: str) -> Table | None:
    """The table of a kernel on a GPU, or of the first kernel of its architecture; None when there is neither.

    Raises
    ------
    TableError
        On a file that is no table: it is not passed over.
    """
    folder = tuning_folder()
    for each in dict.fromkeys((spec, KernelSpec(arch=spec.arch))):
        table = _read_if_there(table_path(folder, each, gpu))
        if table is not None:
            return table
    return None


def select_config(spec: KernelSpec) -> KernelConfig:
    """What the module of a spec is tuned by.

    Returns
    -------
    KernelConfig
        The one in the table for the GPU that modules of the architecture are tuned for, else the default.

    Raises
    ------
    TableError
        On a file that is no table.
    """
    is_tuned = spec.arch in _REFERENCE_GPU and spec.kernel == "mla_decode"
    table = find_table(spec, _REFERENCE_GPU[spec.arch]) if is_tuned else None
    return DEFAULT_CONFIG if table is None else table.config


def chosen_costs(arch: str, gpu: str) -> dict[str, ScheduleCosts]:
    """What schedules for a GPU are made with, by class of shapes; empty where nothing was chosen.

    Parameters
    ----------
    arch : str
        Architecture of its modules.
    gpu : str
        The GPU's name, ``"cpu"`` for a CPU.

    Raises
    ------
    TableError
        On a file that is no table.
    """
    table = find_table(KernelSpec(arch=arch), gpu)
    return {} if table is None else table.chosen_costs
