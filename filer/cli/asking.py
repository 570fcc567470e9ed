"""How a command finds the node it talks to, and asks it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from filer.admin.client import OnProgress, call_sync

_F = TypeVar("_F", bound=Callable[..., Any])


def node_options(function: _F) -> _F:
    """Decorator: ``--run-dir`` and ``--socket``; the command gets ``socket: Path``."""

    def choose(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path:
        run_dir: Path = ctx.params.pop("run_dir")
        return value or run_dir / "node.sock"

    function = click.option(
        "--socket", type=click.Path(path_type=Path), callback=choose, metavar="PATH",
        help="The node's admin socket.  [default: RUN_DIR/node.sock]")(function)
    return click.option(
        "--run-dir", type=click.Path(path_type=Path), envvar="FILER_RUN_DIR", is_eager=True,
        default=Path("/run/filer"), show_default=True, show_envvar=True, metavar="DIR",
        help="The run directory of the node.")(function)


def json_option(function: _F) -> _F:
    return click.option("--json", "as_json", is_flag=True,
                        help="Print the answer as JSON.")(function)


def ask(
    socket: Path, verb: str, arguments: dict[str, Any] | None = None, *,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """As ``admin.client.call``, whose errors ``errors.told`` turns into words."""
    return call_sync(socket, verb, arguments, on_progress=on_progress)


def print_json(value: Any) -> None:
    """ASCII, so that names of any bytes pass every terminal and pipe."""
    click.echo(json.dumps(value, indent=2))
