"""Runs inside the guest: one shell command for each connection, until the guest is gone.

A request is one JSON line ``{"command": …, "timeout_s": …}``; the reply is one JSON line
``{"returncode": …, "stdout": …, "stderr": …}`` (bytes as Latin-1).  When the other side closes
the connection first, the command and its children are killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

PORT = 5000


def serve_one(connection: socket.socket) -> None:
    with connection, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with connection.makefile("rb") as lines:
            line = lines.readline()
        if not line:
            return
        request = json.loads(line)
        process = subprocess.Popen(
            ["/bin/bash", "-c", request["command"]], stdin=subprocess.DEVNULL, stdout=out,
            stderr=err, start_new_session=True)
        returncode = wait(process, connection, request["timeout_s"])
        if returncode is None:
            return
        out.seek(0)
        err.seek(0)
        reply = {"returncode": returncode, "stdout": out.read().decode("latin-1"),
                 "stderr": err.read().decode("latin-1")}
        connection.sendall(json.dumps(reply).encode() + b"\n")


def wait(
    process: subprocess.Popen[bytes], connection: socket.socket, timeout_s: float,
) -> int | None:
    """The return code, -9 after a timeout, None if the host does not want to know any more."""
    deadline_s = time.monotonic() + timeout_s
    exit_fd = os.pidfd_open(process.pid)
    try:
        left_s = deadline_s - time.monotonic()
        ready, _, _ = select.select([exit_fd, connection.fileno()], [], [], max(0.0, left_s))
    finally:
        os.close(exit_fd)
    if exit_fd not in ready:
        os.killpg(process.pid, signal.SIGKILL)
        if ready:
            return None
    return process.wait()


def main() -> None:
    os.environ["TMPDIR"] = "/run/tmp"
    os.makedirs("/run/tmp", exist_ok=True)
    os.chdir(sys.argv[1])
    with socket.create_server(("", PORT), backlog=64) as server:
        # The host waits for this line on the console.
        print("guest agent ready", flush=True)
        while True:
            connection, _ = server.accept()
            threading.Thread(target=serve_one, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
