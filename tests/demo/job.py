"""The render job of the demo: what is on the NAS, what each client reads and writes.

Owns the assets and the passes over them; every byte read is compared with what it must be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.bench.load import Export, check, fill, run_load

MIB = 1 << 20
CLIENTS = 4


@dataclass(frozen=True, slots=True)
class Assets:
    """Numbered files of one size in one directory."""

    directory: str
    name: str
    files: int
    file_bytes: int
    shared: bool
    """Whether every client needs all of them, or each its own share."""

    @property
    def total_bytes(self) -> int:
        return self.files * self.file_bytes

    @property
    def read_bytes(self) -> int:
        """What the clients read together in one pass."""
        return self.total_bytes * (CLIENTS if self.shared else 1)


ASSETS = (
    Assets("scenes", "shot%04ld.usd", 24, MIB // 2, shared=True),
    Assets("textures", "wood%04ld.tx", 40, 6 * MIB, shared=True),
    Assets("plates", "plate.%04ld.exr", 24, 4 * MIB, shared=False),
)
FRAMES = Assets("frames", "beauty.%04ld.exr", 24, 8 * MIB, shared=False)

READ_BYTES = sum(a.read_bytes for a in ASSETS)
UNIQUE_BYTES = sum(a.total_bytes for a in ASSETS)


def generate(root: Path) -> None:
    for assets in ASSETS:
        directory = root / assets.directory
        directory.mkdir(parents=True)
        fill(directory, name=assets.name, files=assets.files, bytes=assets.file_bytes)
    for kind in ("direct", "filer"):
        (root / FRAMES.directory / kind).mkdir(parents=True)


class Together:
    """Sums what several clients tell about their progress."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()

    def part(self) -> Callable[[int], None]:
        """For one load: takes its bytes so far."""
        last = 0

        def progress(so_far: int) -> None:
            nonlocal last
            with self._lock:
                self._tell(so_far - last)
            last = so_far

        return progress


def read_assets(export: Export, tell: Callable[[int], None]) -> None:
    """All clients at once: the scenes, the textures, then each its share of the plates."""
    together = Together(tell)

    def client(number: int) -> None:
        for assets in ASSETS:
            share = assets.files if assets.shared else assets.files // CLIENTS
            progress = together.part()
            result = run_load(
                export, "read", on_progress=progress, dir=assets.directory, name=assets.name,
                first=0 if assets.shared else number * share, files=share,
                bytes=assets.file_bytes, window=4, verify=2)
            progress(result.bytes)

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(client, range(CLIENTS)))


def write_frames(export: Export, kind: str, tell: Callable[[int], None]) -> None:
    """Each client writes its share of the frames, one after the other, each with a COMMIT."""
    together = Together(tell)

    def client(number: int) -> None:
        share = FRAMES.files // CLIENTS
        progress = together.part()
        result = run_load(
            export, "write", on_progress=progress, dir=f"{FRAMES.directory}/{kind}",
            name=FRAMES.name, first=number * share, files=share, bytes=FRAMES.file_bytes,
            window=4)
        progress(result.bytes)

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(client, range(CLIENTS)))


def check_frames(root: Path, kind: str) -> None:
    """Every byte of every frame, read on the NAS itself."""
    check(root / FRAMES.directory / kind, name=FRAMES.name, files=FRAMES.files,
          bytes=FRAMES.file_bytes)
