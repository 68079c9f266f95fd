"""What the commands print with: one console, sizes and ages in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Where no terminal sets the width: in a file or a pipe a name must not be cut.
_PLAIN_WIDTH = 200


def make_console(*, stderr: bool = False) -> Console:
    """A console in the width of its terminal, and wide where there is none. Texts are taken literally."""
    from rich.console import Console

    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


def format_size(size_bytes: int) -> str:
    """A number of bytes in words, such as ``"180.2 KiB"``."""
    size = float(size_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def tree_size(path: Path) -> int:
    """Bytes of all files under a path, links counted as themselves; what goes away meanwhile counts nothing."""
    try:
        if path.is_symlink() or not path.is_dir():
            return path.lstat().st_size
        return sum(tree_size(child) for child in path.iterdir())
    except FileNotFoundError:
        return 0
