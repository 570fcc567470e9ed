"""Identifiers shared by every layer.  Owns no behaviour."""

from __future__ import annotations

from typing import NewType

InodeId = NewType("InodeId", int)
"""64 bit; the FUSE node id and hence part of every NFS handle.  Equal on all nodes, for ever."""

ROOT_INODE = InodeId(1)

VolumeId = NewType("VolumeId", str)
NodeId = NewType("NodeId", str)

Epoch = NewType("Epoch", int)
"""Fencing token: of two writers the one with the smaller epoch must fail."""

Lsn = NewType("Lsn", int)
"""Position in a volume's journal; strictly increasing, never reused."""

DataVersion = NewType("DataVersion", int)
"""64 bit name of one state of a file's bytes; a cached page belongs to exactly one."""
