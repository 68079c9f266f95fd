"""Make code that imports FlashMLA, and cannot be edited, import this package."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import tilemla

_SUBMODULE = "flash_mla_interface"
_MARK = "__tilemla_alias__"


def alias_flash_mla(name: str = "flash_mla", *, replace: bool = False) -> types.ModuleType:
    """Let ``import flash_mla``, and ``flash_mla.flash_mla_interface``, find this package from now on.

    Call it before the code that imports FlashMLA is imported: names that were imported before stay what they are. Doing
    it again changes nothing.

    Parameters
    ----------
    name : str
        The module to stand in for: ``"flash_mla"``, or the copy of a serving framework, such as
        ``"vllm.third_party.flashmla"`` or ``"sgl_kernel.flash_mla"``, whose parent packages must be there.
    replace : bool
        Hide a module of that name that is installed or imported already.

    Returns
    -------
    module
        What ``import name`` gives.

    Raises
    ------
    TypeError, ValueError
        When ``name`` is not the name of a module.
    ImportError
        When there is a module of that name, and ``replace`` is False; when there is no parent package.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, the name of a module, got {type(name).__name__} {name!r}")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"name must be the name of a module, such as 'flash_mla', got {name!r}")
    known = sys.modules.get(name)
    if known is not None and hasattr(known, _MARK):
        return known
    parent, _, child = name.rpartition(".")
    package = None
    if parent:
        try:
            package = importlib.import_module(parent)
        except ImportError as error:
            raise ImportError(f"{name} must have an importable parent package, but {error}", name=parent) from error
    if not replace:
        found = known or importlib.util.find_spec(name)
        if found is not None:
            where = getattr(found, "__file__", None) or getattr(found, "origin", None)
            raise ImportError(
                f"{name} must not be there already, found {where or found!r}; uninstall it, or hide it with "
                f"alias_flash_mla({name!r}, replace=True) before anything takes names from it",
                name=name,
            )
    for module_name in [name, *(other for other in sys.modules if other.startswith(f"{name}."))]:
        sys.modules.pop(module_name, None)
    module = _make_module(name, is_package=True)
    submodule = _make_module(f"{name}.{_SUBMODULE}", is_package=False)
    setattr(module, _SUBMODULE, submodule)
    sys.modules[name], sys.modules[submodule.__name__] = module, submodule
    if package is not None:
        setattr(package, child, module)
    return module


def _make_module(name: str, *, is_package: bool) -> types.ModuleType:
    """A module in which the names of this package are found when they are asked for."""
    module: Any = types.ModuleType(name, f"{tilemla.__name__} under the name {name}.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=tilemla.__file__, is_package=is_package)
    module.__package__ = name if is_package else name.rpartition(".")[0]
    if is_package:
        module.__path__ = []  # it has no files: what can be imported from it is there
    module.__version__ = tilemla.__version__
    module.__all__ = list(tilemla.__all__)
    module.__getattr__ = _find
    module.__dir__ = lambda: sorted({*vars(module), *tilemla.__all__})
    setattr(module, _MARK, True)
    return module  # type: ignore[no-any-return]


def _find(name: str) -> Any:
    if name not in tilemla.__all__:
        raise AttributeError(f"{tilemla.__name__}, which stands in for FlashMLA here, has no attribute {name!r}")
    return getattr(tilemla, name)
