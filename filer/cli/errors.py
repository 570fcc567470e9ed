"""How errors leave the command line: a line of what, a line of what to do, an exit status.

Owns the translation from our error tree to words; nothing prints a traceback to an operator.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from filer.admin.client import CallFailed, NotRunning
from filer.admin.protocol import (
    EXIT_FAILED,
    EXIT_MISCONFIGURED,
    EXIT_NOT_RUNNING,
)
from filer.errors import FilerError, Misconfigured


class Failed(click.ClickException):
    """The command failed; *hint* is the second line."""

    def __init__(self, message: str, hint: str = "", exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.hint = hint
        self.exit_code = exit_code  # type: ignore[misc]  # as click's own FileError does

    def show(self, file: Any = None) -> None:
        for line in printable(self.message).splitlines():
            click.echo(f"filer: {line}", err=True)
        if self.hint:
            click.echo(f"  hint: {printable(self.hint)}", err=True)


@contextmanager
def told() -> Iterator[None]:
    """Our errors inside become ``Failed``."""
    try:
        yield
    except CallFailed as exc:
        raise Failed(exc.failure.message, exc.failure.hint, exc.failure.exit_status) from exc
    except NotRunning as exc:
        raise Failed(
            f"no node is running here: {exc}",
            "start one with 'filer serve', or name it with --run-dir or --socket",
            EXIT_NOT_RUNNING) from exc
    except Misconfigured as exc:
        raise Failed(str(exc), exc.hint, EXIT_MISCONFIGURED) from exc
    except FilerError as exc:
        raise Failed(str(exc)) from exc
    except PermissionError as exc:
        raise Failed(f"{exc.filename or 'the node'}: {exc.strerror}",
                     "run the command as root") from exc
    except OSError as exc:
        what = f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc)
        raise Failed(what) from exc


class FilerGroup(click.Group):
    """A group that tells our errors, and guesses what a mistyped verb was meant to be."""

    def invoke(self, ctx: click.Context) -> Any:
        with told():
            return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            meant = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f"; did you mean {meant[0]!r}?" if meant else ""
            raise click.UsageError(f"no such command {name!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


def printable(text: str) -> str:
    """File names that are not UTF-8 show as ``\\xff`` instead of failing to print."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
