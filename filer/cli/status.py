"""``filer status``: is the node well, and if not, why."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from filer.admin.reports import ChildStatus, NodeStatus, VolumeReport
from filer.cli.asking import ask, json_option, node_options, print_json
from filer.cli.output import byte_count, console, duration, health, path, table


@click.command(short_help="Is the node well, and if not, why.")
@node_options
@json_option
@click.option("--check", is_flag=True, help="Exit with status 1 unless the health is green.")
def status(socket: Path, as_json: bool, check: bool) -> None:
    """Show the node's health with reasons, its volumes and its processes.

    \b
    Examples:
      filer status
      filer status --json | jq .reasons
      filer status --check >/dev/null || page-somebody
    """
    answer = ask(socket, "status")
    if as_json:
        print_json(answer)
    else:
        show(msgspec.convert(answer, NodeStatus), console())
    if check and answer.get("health") != "green":
        raise SystemExit(1)


def show(node: NodeStatus, out: Console) -> None:
    out.print(Text.assemble(
        (node.node, "bold"), "  ", health(node.health), f"  {node.phase}, up"
        f" {duration(node.uptime_s)}  NFS {node.nfs}  version {node.version}  pid {node.pid}"))
    for reason in node.reasons:
        where = f"{reason.volume}: " if reason.volume else ""
        out.print(Text.assemble("  ", health(reason.level), "  ", path(where + reason.text)))
    out.print(_volumes(node.volumes))
    out.print(_children(node.children))


def _volumes(reports: list[VolumeReport]) -> Table:
    made = table("volume", "junction", "core filer", "policy", "cache", "dirty", "oldest", "state",
                 right=("cache", "dirty", "oldest"))
    for report in reports:
        found = report.status
        if found is None:
            made.add_row(report.name, path(report.junction), path(report.core), report.policy,
                         "–", "–", "–", Text(report.problem, style="red"))
            continue
        dirty = f"{byte_count(found.dirty_bytes)} in {found.dirty_files}"
        made.add_row(
            report.name, path(report.junction), path(report.core), report.policy,
            f"{byte_count(found.cache_bytes)} of {byte_count(found.cache_capacity_bytes)}",
            dirty if found.dirty_files else "0", duration(found.dirty_oldest_s), found.phase)
    return made


def _children(children: list[ChildStatus]) -> Table:
    made = table("process", "volume", "pid", "state", "restarts", "last end",
                 right=("pid", "restarts"))
    for child in children:
        last = child.last_exit
        if last and child.last_exit_age_s is not None:
            last += f", {duration(child.last_exit_age_s)} ago"
        made.add_row(child.name, child.volume, str(child.pid or "–"),
                     Text(child.state, style="" if child.state == "running" else "red"),
                     str(child.restarts), path(last))
    return made
