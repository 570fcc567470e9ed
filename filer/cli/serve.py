"""``filer serve``: run a node in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from filer.cli import flags
from filer.cli.configuration import Location, read_toml, validated
from filer.settings import NodeSettings


@click.command(cls=flags.SectionedCommand, short_help="Run a node in the foreground.")
@click.argument("url", required=False)
@click.option("--config", "config", type=click.Path(path_type=Path), metavar="FILE",
              help="The configuration, as TOML (docs/operations.md).")
@click.option("--keep-dirty", is_flag=True,
              help="When the node stops, leave what is not yet in the core filer in the"
                   " write-behind log; the next start flushes it.")
@flags.setting_options
@click.pass_context
def serve(ctx: click.Context, /, url: str | None, config: Path | None, keep_dirty: bool,
          **settings: Any) -> None:
    """Run a node: cache the core filer URL, or what --config names, and export it over NFS.

    URL is nfs://host[:port]/export[/subdir], or file:///path for a mounted NAS.  With --config,
    flags for the node and the NFS server override the file.

    \b
    Examples:
      filer serve nfs://10.0.0.5/shows --cache /ssd/cache --export /shows
      filer serve nfs://nas/shows --cache /ssd/cache --export /shows \\
          --policy read-write --cache-capacity-bytes 800GiB --client 10.1.0.0/16:rw:root
      filer serve --config /etc/filer/node.toml

    \b
    Signals:
      TERM, INT  stop: NFS first, then write everything dirty back, then unmount;
                 a second one leaves the rest in the log
      HUP        replace the volume servers one by one; clients see a pause
    """
    # Imported here: the other verbs need neither trio's nor the supervisor's start-up time.
    from filer.node import NodeOptions, run_node

    run_node(settings_of(ctx, url, config), NodeOptions(keep_dirty=keep_dirty))


def settings_of(ctx: click.Context, url: str | None, config: Path | None) -> NodeSettings:
    """The configuration that the flags, or a file with some flags, make.

    Raises: click.UsageError; ConfigurationError.
    """
    given = flags.setting_values(ctx)
    if flags.CLIENTS in given:
        given[flags.CLIENTS] = flags.client_rules(given[flags.CLIENTS])
    if config is not None:
        return _from_file(ctx, url, config, given)
    if url is None:
        raise click.UsageError("name a core filer URL, or a file with --config", ctx)
    data: dict[str, Any] = {}
    for location, value in given.items():
        flags.put(data, location, value)
    flags.put(data, ("volumes", 0, "core"), url)
    volume = data["volumes"][0]
    volume.setdefault("name", _name_from(volume.get("junction", "")))
    return validated(data, source="", key_name=flags.flag_name(ctx))


def _from_file(
    ctx: click.Context, url: str | None, config: Path, given: dict[Location, Any]
) -> NodeSettings:
    volume_flags = {k: v for k, v in given.items() if flags.is_volume_setting(k)}
    if url is not None or volume_flags:
        extra = ["URL"] * (url is not None) + flags.describe(volume_flags, ctx)
        raise click.UsageError(
            f"{', '.join(extra)} cannot be combined with --config, which names the volumes", ctx)
    data = read_toml(config)
    for location, value in given.items():
        flags.put(data, location, value)
    return validated(data, source=str(config))


def _name_from(junction: str) -> str:
    """``/shows/2026`` → ``shows-2026``."""
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in junction.lower())
    return name.strip("-")[:31] or "volume"
