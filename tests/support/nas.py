"""A real NAS for tests: NFS-Ganesha exporting local directories on free ports.

Needs root, and neither rpcbind nor D-Bus.  Everything it writes (configuration, log, pid file,
recovery records) stays in the given working directory, so several run beside each other and
beside a node under test.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filer.supervisor.nfs_server import preload

_PROGRAM = "/usr/bin/ganesha.nfsd"
_START_LIMIT_S = 30.0
_STOP_LIMIT_S = 15.0
_NFS_PROGRAM, _MOUNT_PROGRAM = 100003, 100005


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 nobody listens on at the moment; distinct."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


class Nas:
    """One Ganesha; *exports* maps the path clients mount to the directory behind it."""

    def __init__(
        self,
        work_dir: Path,
        exports: Mapping[str, Path],
        *,
        attr_expiration_s: int = 0,
        log_level: str = "EVENT",
        export_options: str = "",
    ) -> None:
        self.port, self.mount_port = free_ports(2)
        self.exports = dict(exports)
        self.log = work_dir / "ganesha.log"
        self._configuration = work_dir / "ganesha.conf"
        self._pid_file = work_dir / "ganesha.pid"
        self._preload = preload("filer.supervisor._no_rpcbind")
        self._process: subprocess.Popen[bytes] | None = None
        self._epoch = int(time.time())
        recovery = work_dir / "recovery"
        recovery.mkdir(parents=True, exist_ok=True)
        self._configuration.write_text(
            _render(
                self.port, self.mount_port, self.exports, recovery,
                attr_expiration_s=attr_expiration_s, log_level=log_level,
                export_options=export_options,
            )
        )

    @property
    def pid(self) -> int:
        assert self._process is not None, "the NAS is not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def url(
        self, export: str, *, port: int | None = None, mount_port: int | None = None
    ) -> str:
        """The core filer URL of *export* (or of a directory in one).

        Other ports, for a proxy in between, replace the NAS's own.
        """
        return f"nfs://127.0.0.1:{port or self.port}{export}" \
               f"?mountport={mount_port or self.mount_port}"

    def start(self) -> None:
        """Start, on the same ports as before if it ran before; returns once it answers."""
        assert not self.running, "the NAS runs already"
        # Its write verifier is its start time in seconds, which two quick starts would share.
        self._epoch += 1
        self._process = subprocess.Popen(
            [_PROGRAM, "-F", "-f", str(self._configuration), "-L", str(self.log),
             "-p", str(self._pid_file), "-E", str(self._epoch)],
            env={**os.environ, "LD_PRELOAD": str(self._preload)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            # Signals meant for the test (Ctrl-C) must not reach it before the test does.
            start_new_session=True,
        )
        deadline_s = time.monotonic() + _START_LIMIT_S
        for port, program in ((self.port, _NFS_PROGRAM), (self.mount_port, _MOUNT_PROGRAM)):
            while not _answers(port, program):
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    self.kill()
                    raise RuntimeError(f"NFS-Ganesha did not start:\n{self._log_tail()}")
                select.select([], [], [], 0.01)

    def stop(self) -> None:
        """Terminate and wait; does nothing if it is not running."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """As by power loss of the NAS's head: no goodbye to anyone."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None

    def hang(self) -> None:
        """Connections stay up, nothing is answered, until `resume`."""
        os.kill(self.pid, signal.SIGSTOP)
        # Its threads answer until each of them has stopped.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else "(no log)"


@contextmanager
def running_nas(
    work_dir: Path,
    exports: Mapping[str, Path],
    *,
    attr_expiration_s: int = 0,
    log_level: str = "EVENT",
    export_options: str = "",
) -> Iterator[Nas]:
    """Export ``{"/shows": directory, …}`` until the block ends.

    *attr_expiration_s*: how long Ganesha believes attributes; 0 shows at once what a test
    changes in the directory itself.  *export_options*: more lines for every EXPORT block.
    """
    nas = Nas(
        work_dir, exports, attr_expiration_s=attr_expiration_s, log_level=log_level,
        export_options=export_options,
    )
    nas.start()
    try:
        yield nas
    finally:
        nas.stop()


def _render(
    port: int, mount_port: int, exports: Mapping[str, Path], recovery: Path, *,
    attr_expiration_s: int, log_level: str, export_options: str,
) -> str:
    blocks = [
        f"""NFS_CORE_PARAM {{
    NFS_Protocols = 3, 4;
    NFS_Port = {port};
    MNT_Port = {mount_port};
    Bind_addr = 127.0.0.1;
    Enable_NLM = false;
    Enable_RQUOTA = false;
    Enable_UDP = false;
    Mount_Path_Pseudo = true;
    allow_set_io_flusher_fail = true;
}}
NFSV4 {{
    Graceless = true;
    RecoveryBackend = fs;
    RecoveryRoot = {recovery};
    Only_Numeric_Owners = true;
    Allow_Numeric_Owners = true;
}}
EXPORT_DEFAULTS {{ Attr_Expiration_Time = {attr_expiration_s}; }}
LOG {{ Default_Log_Level = {log_level}; }}
"""
    ]
    for export_id, (mount_path, directory) in enumerate(exports.items(), start=1):
        blocks.append(
            f"""EXPORT {{
    Export_Id = {export_id};
    Path = {directory};
    Pseudo = {mount_path};
    Access_Type = RW;
    Squash = No_Root_Squash;
    SecType = sys;
    Protocols = 3, 4;
    Transports = TCP;
    Filesystem_Id = 192.{export_id};
    {export_options}
    FSAL {{ Name = VFS; }}
}}
"""
        )
    return "".join(blocks)


def _answers(port: int, program: int) -> bool:
    """Whether *program* answers a NULL call (RFC 5531) on *port*."""
    call = struct.pack(">10I", 0x46494C52, 0, 2, program, 3, 0, 0, 0, 0, 0)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as s:
            s.sendall(struct.pack(">I", 0x80000000 | len(call)) + call)
            return s.recv(4) != b""
    except OSError:
        return False
