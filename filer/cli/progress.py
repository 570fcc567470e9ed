"""A progress bar on standard error for requests that take long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from filer.admin import protocol
from filer.admin.client import OnProgress
from filer.cli.errors import printable
from filer.cli.output import byte_count


@contextmanager
def progress_bar(title: str, *, show: bool = True) -> Iterator[OnProgress]:
    """Shown on a terminal only; what it yields takes the reports."""
    console = Console(stderr=True, highlight=False, emoji=False)
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console, transient=True,
        disable=not (show and console.is_terminal))
    with bar:
        task = bar.add_task(printable(title), total=None, amount="")

        def on_progress(report: protocol.Progress) -> None:
            bar.update(task, completed=report.done, total=report.total, amount=_amount(report))

        yield on_progress


def _amount(report: protocol.Progress) -> str:
    def shown(count: int) -> str:
        return byte_count(count) if report.unit == "bytes" else f"{count} {report.unit}"

    of = "" if report.total is None else f" of {shown(report.total)}"
    message = f"  {printable(report.message)}" if report.message else ""
    return f"{shown(report.done)}{of}{message}"
