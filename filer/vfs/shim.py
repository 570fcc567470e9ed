"""Loads our C extension before pyfuse3, so that it interposes on libfuse for it.

Import this module, never ``pyfuse3`` first::

    from filer.vfs.shim import pyfuse3

Owns the load order and the process-wide tuning; ``_fuse_shim.c`` says what it interposes.
"""

from __future__ import annotations

import sys

if "pyfuse3" in sys.modules:
    raise ImportError("filer.vfs.shim must be imported before pyfuse3: the linker binds once")

from filer.vfs import _fuse_shim

import pyfuse3  # isort: skip

MIB = 1 << 20

UNIQUE_RESEND = 1 << 63
"""Set by the kernel (6.9 and later) in the ``unique`` of a request that it sends again."""

current_unique = _fuse_shim.current_unique
"""``current_unique() -> int``: the request that this handler answers.

Valid in a handler up to its first ``await``; later it is some other request's.
"""

receive = _fuse_shim.receive
process_init = _fuse_shim.process_init
"""Both for ``session.py``; see their docstrings."""


def connection_info() -> dict[str, int]:
    """What was agreed with the kernel: capable, want, max_write, max_readahead, max_background."""
    return _fuse_shim.connection_info()


def tune_malloc() -> None:
    """Keep megabyte buffers on the heap; halves the CPU time of a 1 MiB read or write.

    By default glibc maps and unmaps each of them, so the kernel clears every page again.
    Buffers here are at most a chunk (4 MiB); up to 64 MiB of free heap stay with the process.
    """
    _fuse_shim.tune_malloc(8 * MIB, 64 * MIB)


__all__ = [
    "UNIQUE_RESEND", "connection_info", "current_unique", "process_init", "pyfuse3", "receive",
    "tune_malloc",
]
