"""A keeper process with a tiny server, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filer.fuse_connection import remove_mounts

_PATIENCE_S = 30.0


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Poll another process; its events cannot be awaited."""
    end = time.monotonic() + _PATIENCE_S
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"never happened: {what}")
        time.sleep(0.01)
    return value


class KeptServer:
    def __init__(self, directory: Path, *keeper_options: str, server_options: tuple[str, ...] = ()):
        self.directory = directory
        self.mountpoint = directory / "mnt"
        self.state_path = directory / "state.json"
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "filer.keeper", "--volume", "tiny",
                "--mountpoint", str(self.mountpoint), "--state", str(self.state_path),
                *keeper_options, "--",
                sys.executable, "-m", "tests.support.tiny_server", str(directory), *server_options,
            ],
            stderr=open(directory / "stderr", "ab"),  # noqa: SIM115
        )

    @property
    def state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self.state_path.read_text())
        except FileNotFoundError:
            return {"phase": None, "restarts": 0, "keeper_pid": None}
        return state

    @property
    def events(self) -> list[str]:
        try:
            return (self.directory / "events").read_text().splitlines()
        except FileNotFoundError:
            return []

    def wait_running(self, restarts: int = 0) -> int:
        """Until that many restarts are done; returns the server's pid."""

        def is_running() -> bool:
            state = self.state
            return bool(
                state["phase"] == "running" and state["restarts"] >= restarts
                and state["keeper_pid"] == self.process.pid
            )

        wait_until(is_running, f"running after {restarts} restarts; {self.state}")
        return int(self.state["server_pid"])

    def kill_server(self) -> None:
        os.kill(self.wait_running(), signal.SIGKILL)

    def bomb(self, point: str) -> None:
        (self.directory / f"die-at-{point}").touch()

    def wait_event(self, text: str) -> None:
        wait_until(lambda: any(text in event for event in self.events), f"event {text!r}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_PATIENCE_S)


@contextlib.contextmanager
def kept_server(
    directory: Path, *keeper_options: str, server_options: tuple[str, ...] = ()
) -> Iterator[KeptServer]:
    """Start one; however the test ends, nothing of it is left."""
    kept = KeptServer(directory, *keeper_options, server_options=server_options)
    try:
        yield kept
    finally:
        remove_mounts(str(kept.mountpoint))  # whoever hangs on it is freed
        kept.process.kill()  # the server goes with it
        kept.process.wait()
