"""From a core filer's URL to the running core filer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from urllib.parse import unquote_to_bytes, urlsplit

from filer.core_filer.base import CoreFiler
from filer.core_filer.directory import DirectoryCoreFiler
from filer.errors import Misconfigured


@asynccontextmanager
async def open_core_filer(url: str, *, random: Random) -> AsyncIterator[CoreFiler]:
    parts = urlsplit(url)
    if parts.scheme == "file":
        path = unquote_to_bytes(parts.path).decode(errors="surrogateescape")
        directory = DirectoryCoreFiler(Path(path), random=random)
        try:
            yield directory
        finally:
            directory.close()
    else:
        raise Misconfigured(f"core filer {url}: unknown kind", "nfs://… or file:///…")
