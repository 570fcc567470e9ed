"""Where a node keeps what, below its run directory and its cache directory.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CHILD_OF = "FILER_CHILD_OF"
"""In the environment of all children: the run directory of the node they belong to.

By it the processes of a supervisor that was killed are found again: it is inherited, cannot go
stale like a pid file, and no process of another node carries it.
"""


@dataclass(frozen=True, slots=True)
class Layout:
    run_dir: Path
    cache_dir: Path

    @property
    def node_config(self) -> Path:
        """The validated settings, for children."""
        return self.run_dir / "node.json"

    @property
    def node_socket(self) -> Path:
        return self.run_dir / "node.sock"

    @property
    def run_lock(self) -> Path:
        return self.run_dir / "supervisor.lock"

    @property
    def cache_lock(self) -> Path:
        """Holds the run directory of the node that uses this cache."""
        return self.cache_dir / "supervisor.lock"

    @property
    def volumes_dir(self) -> Path:
        return self.run_dir / "volumes"

    def volume_socket(self, volume: str) -> Path:
        return self.volumes_dir / f"{volume}.sock"

    def keeper_state(self, volume: str) -> Path:
        return self.volumes_dir / f"{volume}.keeper.json"

    @property
    def mounts_dir(self) -> Path:
        return self.run_dir / "mounts"

    def mountpoint(self, volume: str) -> Path:
        return self.mounts_dir / volume

    @property
    def ganesha_config(self) -> Path:
        return self.run_dir / "ganesha.conf"

    @property
    def ganesha_log(self) -> Path:
        return self.run_dir / "ganesha.log"

    @property
    def ganesha_pid(self) -> Path:
        return self.run_dir / "ganesha.pid"

    @property
    def ganesha_recovery(self) -> Path:
        """Which NFSv4 clients may reclaim; on the SSD, because it must survive a reboot."""
        return self.cache_dir / "nfs-recovery"

    @property
    def ganesha_epoch(self) -> Path:
        return self.cache_dir / "nfs-epoch"
