"""``filer evict``: free the local SSD."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from filer.admin.reports import EvictReport
from filer.cli.asking import ask, json_option, node_options, print_json
from filer.cli.output import byte_count, console, path
from filer.cli.progress import progress_bar


@click.command(short_help="Drop cached pages from the local SSD.")
@click.argument("path_", metavar="PATH")
@node_options
@json_option
def evict(path_: str, socket: Path, as_json: bool) -> None:
    """Drop the cached pages at or below PATH from the local SSD.

    Dirty data is never dropped: flush it first.  Attributes and names stay cached.

    \b
    Examples:
      filer evict /shows/ep1
      filer flush /shows/ep1 && filer evict /shows/ep1
    """
    with progress_bar(f"evicting {path_}", show=not as_json) as on_progress:
        answer = ask(socket, "evict", {"path": path_}, on_progress=on_progress)
    if as_json:
        print_json(answer)
        return
    report = msgspec.convert(answer, EvictReport)
    kept = report.kept_dirty_bytes
    console().print(path(
        f"{report.path}: {byte_count(report.bytes)} of {report.files} files evicted"
        + (f"; {byte_count(kept)} are dirty and stay" if kept else "")))
