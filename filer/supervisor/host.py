"""What a node needs of its host, checked before anything is started.  Changes nothing."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from filer.errors import Misconfigured
from filer.settings import NodeSettings
from filer.supervisor.nfs_server import GANESHA, RPCBIND, STATD


def check_host(settings: NodeSettings) -> None:
    """Raises: Misconfigured: the node cannot run here; the hint says what to do."""
    if os.geteuid() != 0:
        raise Misconfigured("filer serve needs root: it mounts, and serves all users' files",
                            "run it as root, or by systemd (images/filer.service)")
    if not Path("/dev/fuse").exists():
        raise Misconfigured("there is no /dev/fuse", "modprobe fuse")
    programs = [(GANESHA, "nfs-ganesha nfs-ganesha-vfs")]
    if settings.nfs.registers:
        programs.append((RPCBIND, "rpcbind"))
    if settings.nfs.locks:
        programs.append((STATD, "nfs-common"))
    for program, package in programs:
        if not program.exists():
            raise Misconfigured(f"{program} is missing", f"apt-get install {package}")
    _check_ports(settings)


def _check_ports(settings: NodeSettings) -> None:
    nfs = settings.nfs
    ports = {"nfs.port": nfs.port, "nfs.mount_port": nfs.mount_port}
    if nfs.locks:
        ports["nfs.nlm_port"] = nfs.nlm_port
    family = socket.AF_INET6 if ":" in nfs.bind else socket.AF_INET
    for key, port in ports.items():
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the NFS server does; a connection in TIME_WAIT is no obstacle then.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((nfs.bind, port))
            except OSError as exc:
                raise Misconfigured(
                    f"{key} {port} on {nfs.bind} cannot be used: {exc.strerror}",
                    f"stop what listens there (ss -ltnp 'sport = :{port}'),"
                    f" or choose another {key}") from exc
