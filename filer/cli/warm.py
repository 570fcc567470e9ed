"""``filer warm``: fetch into the cache before it is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from filer.admin.protocol import EXIT_FAILED
from filer.admin.reports import WarmReport
from filer.cli.asking import ask, json_option, node_options, print_json
from filer.cli.errors import printable
from filer.cli.output import byte_count, console, path
from filer.cli.progress import progress_bar
from filer.settings import parse_bytes

_PATHS_IN_ONE_REQUEST = 20_000
_FAILURES_SHOWN = 20


class Rate(click.ParamType[int]):
    """Bytes per second: ``50MiB``."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            rate = parse_bytes(value.removesuffix("/s") if isinstance(value, str) else value)
        except ValueError as exc:
            self.fail(f"{value!r}: {exc}", param, ctx)
        if not isinstance(rate, int) or rate <= 0:
            self.fail(f"{value!r} must be more than 0 bytes per second", param, ctx)
        return rate


@click.command(short_help="Fetch into the cache before it is needed.")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("--manifest", type=click.Path(path_type=Path, allow_dash=True), metavar="FILE",
              help="Warm the paths in FILE, one a line; - is standard input.")
@click.option("-0", "--null", "null", is_flag=True,
              help="Paths in the manifest end with a NUL instead of a newline (find -print0).")
@click.option("--rate", type=Rate(), metavar="BYTES",
              help="Fetch at most this much a second, such as 50MiB.")
@node_options
@json_option
def warm(paths: tuple[str, ...], manifest: Path | None, null: bool, rate: int | None,
         socket: Path, as_json: bool) -> None:
    """Fetch files, and all below directories, into the cache.

    What is cached already is not fetched again.  Ctrl-C stops; what was fetched stays.

    \b
    Examples:
      filer warm /shows/ep1/tex /shows/ep1/geo
      filer warm --manifest job-4711.txt --rate 50MiB
      find-inputs scene.ma | filer warm --manifest -
    """
    wanted = [*paths, *(_read_manifest(manifest, null) if manifest else [])]
    if not wanted:
        raise click.UsageError("name a PATH or a --manifest with paths in it")
    report = WarmReport()
    batches = [wanted[i:i + _PATHS_IN_ONE_REQUEST]
               for i in range(0, len(wanted), _PATHS_IN_ONE_REQUEST)]
    for number, batch in enumerate(batches, 1):
        title = "warming" if len(batches) == 1 else f"warming, part {number} of {len(batches)}"
        with progress_bar(title, show=not as_json) as on_progress:
            answer = ask(socket, "warm", {"paths": batch, "rate_bytes_s": rate},
                         on_progress=on_progress)
        report = _added(report, msgspec.convert(answer, WarmReport))
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        _show(report)
    if report.failed:
        raise SystemExit(EXIT_FAILED)


def _read_manifest(manifest: Path, null: bool) -> Sequence[str]:
    data = sys.stdin.buffer.read() if str(manifest) == "-" else manifest.read_bytes()
    return [os.fsdecode(line) for line in data.split(b"\0" if null else b"\n") if line]


def _added(left: WarmReport, right: WarmReport) -> WarmReport:
    return WarmReport(
        files=left.files + right.files, bytes=left.bytes + right.bytes,
        already_cached_bytes=left.already_cached_bytes + right.already_cached_bytes,
        failed=left.failed + right.failed)


def _show(report: WarmReport) -> None:
    console().print(path(
        f"{report.files} files: {byte_count(report.bytes)} fetched,"
        f" {byte_count(report.already_cached_bytes)} were cached already"))
    for failure in report.failed[:_FAILURES_SHOWN]:
        click.echo(f"filer: {printable(failure.path)}: {failure.error}", err=True)
    if len(report.failed) > _FAILURES_SHOWN:
        click.echo(f"filer: … and {len(report.failed) - _FAILURES_SHOWN} more", err=True)
