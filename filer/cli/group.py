"""``filer`` itself: what stands above the verbs."""

from __future__ import annotations

import click

from filer import __version__
from filer.cli.errors import FilerGroup


@click.group(cls=FilerGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="filer")
def filer() -> None:
    """A caching NFS filer: local-speed NFS in front of far-away storage.

    \b
    Start a node:
      filer serve nfs://10.0.0.5/shows --cache /ssd/cache --export /shows
      filer serve --config /etc/filer/node.toml
    Mount it on a render client:
      mount -t nfs -o vers=3 NODE:/shows /shows
    Look after it:
      filer status            is it well, and if not, why
      filer top               what it does at the moment
      filer warm /shows/ep1   fetch before the job starts
      filer flush /shows/out  wait until the results are in the core filer

    Paths are as clients see them: a junction and what follows.

    \b
    Exit status:
      0 done   1 failed   2 wrong usage   64 configuration cannot work   69 no node is running
    """
