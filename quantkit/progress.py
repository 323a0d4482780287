"""What long work says while it runs: stage, step and time left, live on a terminal, a line a stage elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

# What is being done, steps done, steps in all: 0 where nobody knows, LINE for what is said once and stays to be read.
Report = Callable[[str, int, int], None]
LINE = -1


def silent(what: str, done: int, total: int) -> None:
    """A Report that says nothing."""


class Display:
    """The stages of a run on a terminal: those finished stay as lines, the running one has a bar and the time left."""

    def __init__(self, console: "Console") -> None:
        self.console = console
        self._progress: Progress | None = None
        self._last_line_s = 0.0

    @contextmanager
    def stage(self, title: str) -> Iterator[Report]:
        """Show a stage while the block runs; yields what its work reports to."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        begin_s = time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"[bold]{title}[/] ...")
        columns = (
            SpinnerColumn(), TextColumn("[bold]{task.fields[stage]}[/]"),
            TextColumn("{task.description}", markup=False),  # may be a line of a log
            BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True, redirect_stderr=sys.stderr.isatty()) as progress:
            task = progress.add_task("starting", stage=title, total=None)
            yield lambda what, done, total: self._update(progress, task, title, what, done, total)
        self.console.print(f"[green]done[/] [bold]{title}[/] in {spoken(time.monotonic() - begin_s)}")

    def _update(self, progress: "Progress", task: "TaskID", title: str, what: str, done: int, total: int) -> None:
        if total == LINE:
            self.console.print(f"  {title}: {what}", highlight=False, markup=False)  # may be a line of a log
            return
        known = progress.tasks[progress.task_ids.index(task)]
        if known.description != what and known.description != "starting":
            progress.reset(task, description=what, total=total or None, completed=done)  # a new step: its own clock
        progress.update(task, description=what, completed=done, total=total or None)
        if not self.console.is_terminal and time.monotonic() - self._last_line_s > 15:
            self._last_line_s = time.monotonic()
            left = known.time_remaining
            steps = f" {done}/{total}" if total else ""
            time_left = f", {spoken(left)} left" if left else ""
            self.console.print(f"  {title}: {what}{steps}{time_left}", markup=False)


def spoken(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
