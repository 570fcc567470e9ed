"""``python -m tests.bench``: run the rows, show progress and a table, write build/bench.json.

Exit status 0 when every row ran, whether or not it reached its target; 1 when one could not be
measured; 2 for a wrong command line or a machine that cannot run them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from tests.bench.load import BUILD
from tests.bench.results import Report, Row, merged
from tests.bench.rig import Rig
from tests.bench.rows import DEFINITIONS, Definition


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure the figures that the project promises, against Ganesha on ext4.")
    parser.add_argument(
        "--only", default="", metavar="N1,N5",
        help="rows to run, replacing them in build/bench.json; default: all")
    parser.add_argument(
        "--scale", type=float, default=1.0,
        help="size of files and directories; 0.1 for a quick look (default: 1)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument(
        "--work", type=Path, default=BUILD,
        help="directory on an ext4 disk for scratch files (default: build)")
    options = parser.parse_args(arguments)
    options.ids = [i.strip().upper() for i in options.only.split(",") if i.strip()]
    unknown = [i for i in options.ids if i not in DEFINITIONS]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(DEFINITIONS)}")
    if not 0 < options.scale <= 1:
        parser.error("--scale must be above 0 and at most 1")
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    options.ids = options.ids or list(DEFINITIONS)
    return options


def complaint() -> str:
    """Why the rows cannot run here; empty if they can."""
    if os.geteuid() != 0:
        return "needs root: it mounts, starts NFS servers and drops the kernel's caches"
    missing = [p for p in ("ganesha.nfsd", "gcc", "fusermount3") if shutil.which(p) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; run `make install`"
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse: load the kernel module fuse"
    return ""


def _run(definition: Definition, rig: Rig, console: Console) -> Row:
    console.rule(f"[bold]{definition.id}[/] {definition.what}", align="left")
    begin_s = time.monotonic()
    try:
        row = definition.run(rig)
    except Exception as error:
        console.print_exception()
        return definition.failed(f"{type(error).__name__}: {error}", rig.scale)
    for note in row.notes:
        console.print(f"  {note}", highlight=False)
    console.print(
        f"  {'[green]ok' if row.ok else '[yellow]not ok'}[/], "
        f"{time.monotonic() - begin_s:.0f} s", highlight=False)
    return row


def main(arguments: list[str]) -> int:
    options = _parsed(arguments)
    console = Console(width=None if sys.stdout.isatty() else 110)
    if reason := complaint():
        console.print(f"[red]{reason}")
        return 2
    from tests.bench.node import start_node

    BUILD.mkdir(exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    output = BUILD / "bench.json"
    stored = json.loads(output.read_text()) if options.only and output.exists() else []
    # A directory of its own: two runs on one machine disturb each other's figures, not files.
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=options.work))
    rig = Rig(
        scratch, scale=options.scale, runs=options.runs, start_node=start_node,
        say=lambda text: console.print(f"  {text}", highlight=False, style="dim"))
    report = Report()
    begin_s = time.monotonic()
    for row_id in options.ids:
        row = _run(DEFINITIONS[row_id], rig, console)
        report.rows.append(row)
        stored = merged(stored, row.as_json())
        output.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    console.print()
    console.print(report.table())
    failed = [r.id for r in report.rows if not r.measures]
    short = [r.id for r in report.rows if r.measures and not r.ok]
    if options.scale != 1:
        console.print(f"scale {options.scale:g}: the targets are meant for scale 1")
    if failed:
        console.print(f"[red]could not be measured: {', '.join(failed)}")
    console.print(
        f"{len(report.rows) - len(failed)} rows ran in {time.monotonic() - begin_s:.0f} s, "
        f"{f'below target: {chr(44).join(short)}' if short else 'none below target'}; "
        f"figures in {output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
