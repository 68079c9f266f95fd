"""The command ``tilemla``: one file for each of its subcommands."""

from __future__ import annotations

import importlib

import click

from tilemla import __version__

# Imported when used: `tilemla doctor` must work where another command's libraries are broken.
_HOME = {
    "bench": ("tilemla.cli.bench", "bench"),
    "build": ("tilemla.cli.build", "build"),
    "clean": ("tilemla.cli.clean", "clean"),
    "doctor": ("tilemla.cli.doctor", "doctor"),
    "inspect": ("tilemla.cli.inspecting", "inspect"),
    "list": ("tilemla.cli.listing", "list_modules"),
    "tune": ("tilemla.cli.tune", "tune"),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_HOME)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _HOME:
            return None
        module, name = _HOME[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="tilemla %(version)s")
def main() -> None:
    """Build, inspect, ship and measure MLA decode kernels.

    \b
    Examples:
      tilemla doctor                                       what can this machine do?
      tilemla build --preset deepseek-v3 --arch sm_90a     fill the cache; needs no GPU
      tilemla build --arch sm_90a --wheel --out-dir dist   make a wheel to install elsewhere
      tilemla list                                         which modules are here?

    Completion of commands and options: put `eval "$(_TILEMLA_COMPLETE=bash_source tilemla)"` into ~/.bashrc
    (zsh_source and fish_source for those shells).
    """  # noqa: D301
