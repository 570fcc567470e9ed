"""``filer top``: what the node does at the moment."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import click
import msgspec
from rich.console import Group
from rich.live import Live
from rich.text import Text

from filer.admin.reports import NodeTop, TopSample
from filer.cli.asking import ask, json_option, node_options
from filer.cli.output import byte_count, console, duration, health, table
from filer.cli.rates import VolumeRates, rates

_BUSIEST = 8


@click.command(short_help="Live rates of each volume.")
@node_options
@json_option
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True,
              metavar="SECONDS", help="Time between two views.")
@click.option("--count", type=click.IntRange(1), metavar="N",
              help="Stop after N views.  [default: until Ctrl-C]")
def top(socket: Path, as_json: bool, interval: float, count: int | None) -> None:
    """Show live rates of each volume: operations, bytes, hit ratios, the core filer's share.

    Operations are those that reached the volume server; what the kernel's caches answer costs
    nothing and is not counted.  With --json, one line for each view.

    \b
    Examples:
      filer top
      filer top --json --count 5 --interval 10
    """
    views = itertools.count() if count is None else range(count)
    before: dict[str, TopSample] = {s.volume: s for s in _sample(socket).samples}
    try:
        if as_json:
            for _ in views:
                time.sleep(interval)
                node, found = _rates(socket, before)
                click.echo(json.dumps({"node": node.node, "health": node.health,
                                       "volumes": msgspec.to_builtins(found)}))
            return
        with Live(console=console(), auto_refresh=False, transient=False) as live:
            for _ in views:
                time.sleep(interval)
                live.update(_view(*_rates(socket, before)), refresh=True)
    except KeyboardInterrupt:
        pass  # the usual way to leave


def _sample(socket: Path) -> NodeTop:
    return msgspec.convert(ask(socket, "top"), NodeTop)


def _rates(socket: Path, before: dict[str, TopSample]) -> tuple[NodeTop, list[VolumeRates]]:
    """The rates since the samples in *before*, which are replaced."""
    node = _sample(socket)
    found = [rates(before.get(sample.volume), sample) for sample in node.samples]
    before.clear()
    before.update({sample.volume: sample for sample in node.samples})
    return node, found


def _view(node: NodeTop, volumes: list[VolumeRates]) -> Group:
    per_volume = table(
        "volume", "ops/s", "read/s", "write/s", "names", "attrs", "pages", "core ops/s",
        "core read/s", "core write/s", "in flight", "cache", "dirty", "oldest",
        right=("ops/s", "read/s", "write/s", "names", "attrs", "pages", "core ops/s",
               "core read/s", "core write/s", "in flight", "cache", "dirty", "oldest"))
    operations = table("volume", "operation", "per s", "mean time", right=("per s", "mean time"))
    for v in volumes:
        per_volume.add_row(
            v.volume, f"{v.operations_per_s:.0f}", byte_count(v.read_bytes_per_s),
            byte_count(v.written_bytes_per_s),
            *(_percent(v.hit_ratio.get(layer)) for layer in ("names", "attributes", "pages")),
            f"{v.core_operations_per_s:.0f}", byte_count(v.core_read_bytes_per_s),
            byte_count(v.core_written_bytes_per_s), str(v.core_in_flight),
            byte_count(v.cache_bytes), byte_count(v.dirty_bytes), duration(v.dirty_oldest_s))
        for operation in v.busiest[:_BUSIEST]:
            operations.add_row(v.volume, operation.operation, f"{operation.per_s:.1f}",
                               "–" if operation.mean_s is None else
                               f"{operation.mean_s * 1000:.2f} ms")
    return Group(Text.assemble((node.node, "bold"), "  ", health(node.health),
                               "   (hit ratios: share answered without the core filer)"),
                 per_volume, operations)


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.0%}"
