"""Errors of the build."""


class BuildError(RuntimeError):
    """A module that cannot be built: no compiler, a program that does not lower, a kernel that is not good enough."""
