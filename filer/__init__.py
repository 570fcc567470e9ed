"""A hybrid caching POSIX filer.  Start reading in ARCHITECTURE.md, then ``node.py``."""

__version__ = "0.1.0"

if not __debug__:
    raise SystemExit("filer refuses to run under python -O: its assertions guard your data")
