"""``filer flush``: wait until something is in the core filer."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from filer.admin.reports import FlushReport
from filer.cli.asking import ask, json_option, node_options, print_json
from filer.cli.output import byte_count, console, path
from filer.cli.progress import progress_bar


@click.command(short_help="Wait until dirty data is in the core filer.")
@click.argument("path_", metavar="PATH")
@node_options
@json_option
def flush(path_: str, socket: Path, as_json: bool) -> None:
    """Write everything dirty at or below PATH to the core filer now, and wait until it is there.

    / flushes all volumes.  Exit status 0 means that the core filer has it on stable storage.

    \b
    Examples:
      filer flush /shows/ep1/frames
      filer flush / && shutdown-the-rack
    """
    with progress_bar(f"flushing {path_}", show=not as_json) as on_progress:
        answer = ask(socket, "flush", {"path": path_}, on_progress=on_progress)
    if as_json:
        print_json(answer)
        return
    report = msgspec.convert(answer, FlushReport)
    out = console()
    out.print(path(f"{report.path}: {report.files} files, {byte_count(report.bytes)} flushed"))
    if report.statement:
        out.print(path(report.statement))
