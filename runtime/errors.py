"""Errors that are not about one argument."""

from __future__ import annotations


class ModuleNotBuiltError(NotImplementedError):
    """There is no module for a kernel spec, and none may or can be generated here."""


class ModuleBuildError(ModuleNotBuiltError):
    """Generating a module was tried and failed: no compiler, no TileLang, or a kernel that is not good enough."""


class ToolchainError(RuntimeError):
    """A compiler is missing or failed; says what to install, or what it printed."""
