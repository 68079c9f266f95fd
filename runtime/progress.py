"""Progress of a build on stderr: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Protocol


class Progress(Protocol):
    """Told what happens to modules, by any thread."""

    def step(self, name: str, text: str) -> None:
        """Another step of the module called ``name`` begins."""

    def done(self, name: str, text: str, *, failed: bool = False) -> None:
        """The module called ``name`` is finished."""


class _PlainProgress:
    def __init__(self) -> None:
        self._lock = threading.Lock()

    def step(self, name: str, text: str) -> None:
        with self._lock:
            print(f"tilemla: {name}: {text}", file=sys.stderr, flush=True)

    def done(self, name: str, text: str, *, failed: bool = False) -> None:
        self.step(name, text)


@contextlib.contextmanager
def show_progress() -> Iterator[Progress]:
    """Show the steps of modules on stderr while the context is open; each appears with its first step."""
    if not sys.stderr.isatty():
        yield _PlainProgress()
        return
    with _live_display() as progress:
        yield progress


@contextlib.contextmanager
def _live_display() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import Progress as Display
    from rich.progress import SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

    display = Display(
        SpinnerColumn(finished_text="[green]✓[/green]"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[step]}"),
        console=Console(stderr=True),
    )

    class Live:
        def __init__(self) -> None:
            self._tasks: dict[str, TaskID] = {}
            self._lock = threading.Lock()

        def _task(self, name: str) -> TaskID:
            with self._lock:
                if name not in self._tasks:
                    self._tasks[name] = display.add_task(name, total=1, step="")
                return self._tasks[name]

        def step(self, name: str, text: str) -> None:
            display.update(self._task(name), step=text)

        def done(self, name: str, text: str, *, failed: bool = False) -> None:
            task = self._task(name)
            if failed:
                display.stop_task(task)
                display.update(task, step=f"[red]{text}[/red]")
            else:
                display.update(task, step=text, completed=1)

    with display:
        yield Live()
