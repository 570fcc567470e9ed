"""``filer`` and ``python -m filer``: the command line."""

from __future__ import annotations

from filer.cli import filer


def main() -> None:
    filer.main(prog_name="filer")


if __name__ == "__main__":
    main()
