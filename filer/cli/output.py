"""How numbers and tables look.  Owns no data."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from filer.cli.errors import printable

_COLOURS = {"green": "green", "yellow": "yellow", "red": "bold red"}


def console() -> Console:
    """Standard output; no colours and no wrapping into a terminal's width where it is none."""
    out = Console(highlight=False, emoji=False, soft_wrap=False)
    if not out.is_terminal:
        out.width = 200
    return out


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    made = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left",
                        no_wrap=column in right)
    return made


def health(level: str) -> Text:
    return Text(f"● {level}", style=_COLOURS.get(level, ""))


def path(text: str) -> Text:
    """Never interpreted as markup."""
    return Text(printable(text))


def byte_count(count: float) -> str:
    """``1536`` → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} d"
