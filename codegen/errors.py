"""Errors of the build."""


class BuildError(RuntimeError):
    """A module that cannot be built: a program that does not lower, or a kernel that is not good enough."""
