"""``filer explain``: what applies to a path, and why."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from filer.admin.reports import Explanation
from filer.cli.asking import ask, json_option, node_options, print_json
from filer.cli.output import byte_count, console, duration, path, table


@click.command(short_help="What applies to a path, and why.")
@click.argument("path_", metavar="PATH")
@node_options
@json_option
def explain(path_: str, socket: Path, as_json: bool) -> None:
    """Show PATH's policy, cached pages, dirty data, last verification, and why it missed.

    \b
    Examples:
      filer explain /shows/ep1/tex/skin.tx
      filer explain --json /shows/ep1 | jq .policy
    """
    answer = ask(socket, "explain", {"path": path_})
    if as_json:
        print_json(answer)
        return
    found = msgspec.convert(answer, Explanation)
    made = table("", "")
    made.show_header = False
    for key, value in rows(found):
        made.add_row(key, path(value))
    console().print(made)


def rows(found: Explanation) -> list[tuple[str, str]]:
    """What there is to say, in reading order."""
    made = [("path", f"{found.path}  ({found.kind})")]
    if found.inode is not None:
        made.append(("inode", str(found.inode)))
    made.append(("policy", f"{found.policy}: {found.policy_why}"))
    verify = "never" if found.verify_s is None else f"every {duration(found.verify_s)}"
    made.append(("verified against the core filer", verify))
    if found.kind != "missing":
        made.append(("last verified", "never" if found.last_verified_s is None
                     else f"{duration(found.last_verified_s)} ago"))
    made.append(("writes", found.write_mode + (
        f", flushed within {duration(found.write_back_s)}"
        if found.write_back_s is not None and found.write_mode == "behind" else "")))
    if found.kind == "file":
        share = f" of {byte_count(found.size)}"
        made.append(("cached here", f"{byte_count(found.cached_bytes)}{share}"
                     f" ({found.cached_pages} of {found.total_pages} pages)"))
        made.append(("dirty", f"{byte_count(found.dirty_bytes)}, oldest"
                     f" {duration(found.dirty_oldest_s)}" if found.dirty_bytes else "nothing"))
    if found.flush_error:
        made.append(("cannot be flushed", found.flush_error))
    if found.why_missed:
        made.append(("last miss", found.why_missed))
    return made
