"""``filer check-config``: would this configuration work here?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from filer.cli.asking import json_option, print_json
from filer.cli.configuration import load
from filer.cli.output import byte_count, console, duration, path, table
from filer.settings import NodeSettings


@click.command("check-config", short_help="Validate a configuration and show its meaning.")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def check_config(file: Path, as_json: bool) -> None:
    """Validate the configuration FILE and show what it means, all defaults filled in.

    Starts nothing and touches nothing.  Exit status 64: it cannot work.

    \b
    Examples:
      filer check-config /etc/filer/node.toml
      filer check-config --json node.toml | jq '.volumes[].policy'
    """
    settings = load(file)
    if as_json:
        print_json(json.loads(settings.model_dump_json()))
        return
    out = console()
    nfs = settings.nfs
    out.print(path(f"{file}: good"))
    out.print(path(
        f"node {settings.node}, cache {settings.cache_dir}, run {settings.run_dir},"
        f" NFS {nfs.bind}:{nfs.port}, NLM locks {'on' if nfs.locks else 'off'},"
        f" metrics {_metrics(settings)}"))
    made = table("volume", "junction", "core filer", "policy", "verified", "writes", "cache",
                 "clients", "export id", right=("cache", "export id"))
    for volume in settings.volumes:
        policy = volume.effective_policy
        made.add_row(
            volume.name, path(volume.junction), path(volume.core), policy.name,
            "never" if policy.verify_s is None else f"every {duration(policy.verify_s)}",
            f"behind, within {duration(policy.write_back_s)}"
            if policy.write_mode.value == "behind" else policy.write_mode.value,
            byte_count(volume.cache.capacity_bytes),
            "\n".join(f"{rule.clients} {rule.access}, squash {rule.squash}"
                      for rule in volume.clients),
            str(settings.export_id(volume)))
    out.print(made)


def _metrics(settings: NodeSettings) -> str:
    return f"{settings.metrics_bind}:{settings.metrics_port}" if settings.metrics_port else "off"
