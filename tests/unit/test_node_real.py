"""``filer serve`` as operators run it: real keepers, real volume servers, real NFS server."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from filer.supervisor.claim import remove_leftovers
from filer.supervisor.layout import Layout
from tests.support import nfs3
from tests.support.nas import free_ports

pytestmark = [pytest.mark.nfs, pytest.mark.fuse]

REPOSITORY = Path(__file__).parents[2]
CONTENT = os.urandom(3_000_000)


class Served:
    """``filer serve`` on a directory that stands for the NAS."""

    def __init__(self, directory: Path) -> None:
        self.nas = directory / "nas"
        self.nas.mkdir(parents=True)
        (self.nas / "texture").write_bytes(CONTENT)
        self.run_dir = directory / "run"
        self.port, self.mount_port, nlm_port = free_ports(3)
        self._command = [
            sys.executable, "-m", "filer", "serve", f"file://{self.nas}",
            "--cache", str(directory / "cache"), "--run-dir", str(self.run_dir),
            "--export", "/shows", "--policy", "full", "--nfs-bind", "127.0.0.1",
            "--nfs-port", str(self.port), "--nfs-mount-port", str(self.mount_port),
            "--nfs-nlm-port", str(nlm_port), "--no-nfs-locks", "--metrics-port", "0",
            "--log-format", "json"]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*self._command, *arguments], cwd=REPOSITORY, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL)
        self.log: list[str] = []
        for line in self.process.stderr:
            self.log.append(line.decode())
            if "node serves" in self.log[-1]:
                break
        else:
            raise AssertionError("it does not serve:\n" + "".join(self.log))
        threading.Thread(
            target=lambda: self.log.extend(map(bytes.decode, self.process.stderr)), daemon=True
        ).start()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def filer(self, *arguments: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-m", "filer", *arguments, "--json", "--run-dir", str(self.run_dir)],
            cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def client(self) -> tuple[nfs3.Nfs3, bytes]:
        return (nfs3.Nfs3("127.0.0.1", self.port, is_hard=True),
                nfs3.mount("127.0.0.1", self.mount_port, "/shows"))

    def write(self, name: str, content: bytes) -> None:
        client, root = self.client()
        with client:
            handle = client.create(root, name).handle
            client.write(handle, 0, content)
            client.commit(handle)


@pytest.fixture
def served(tmp_path):
    made = Served(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()
    remove_leftovers(Layout(made.run_dir, tmp_path / "cache"))


def test_what_was_committed_is_in_the_core_filer_after_an_orderly_stop(served):
    served.start()
    served.write("frame", b"x" * 1_000_000)
    assert served.filer("explain", "/shows/frame")["dirty_bytes"] == 1_000_000
    assert (served.nas / "frame").stat().st_size == 0

    assert served.stop() == 0

    assert (served.nas / "frame").read_bytes() == b"x" * 1_000_000


def test_with_keep_dirty_it_stays_in_the_log_and_the_next_run_writes_it(served):
    served.start("--keep-dirty")
    served.write("frame", b"x" * 1_000_000)
    assert served.stop() == 0
    assert (served.nas / "frame").stat().st_size == 0

    served.start()
    served.filer("flush", "/shows")

    assert (served.nas / "frame").read_bytes() == b"x" * 1_000_000
    assert served.stop() == 0


def test_nothing_committed_is_lost_and_handles_hold_when_the_supervisor_is_killed(served):
    served.start()
    client, root = served.client()
    client.close()
    served.write("frame", b"x" * 1_000_000)

    served.process.kill()
    served.process.wait()
    served.start()

    with nfs3.Nfs3("127.0.0.1", served.port, is_hard=True) as client:
        found = client.lookup(root, "frame")
        assert client.read(found.handle, 0, 1 << 20).data == b"x" * 1_000_000
    assert served.stop() == 0
    assert (served.nas / "frame").read_bytes() == b"x" * 1_000_000


def test_the_operators_verbs_work_on_a_real_node(served):
    served.start()

    warmed = served.filer("warm", "/shows")
    explained = served.filer("explain", "/shows/texture")
    evicted = served.filer("evict", "/shows/texture")

    assert (warmed["files"], warmed["bytes"]) == (1, len(CONTENT))
    assert (explained["cached_pages"], explained["total_pages"]) == (3, 3)
    assert evicted["bytes"] == len(CONTENT)
    status = served.filer("status")
    assert (status["health"], status["reasons"]) == ("green", [])
    assert served.stop() == 0


def test_an_upgrade_under_load_is_a_pause_not_an_error(served):
    served.start()
    before = [c["pid"] for c in served.filer("status")["children"]
              if c["name"] == "volume server"]
    client, root = served.client()
    with client:
        handle = client.lookup(root, "texture").handle
        served.process.send_signal(signal.SIGHUP)
        while not any("volume server replaced" in line for line in served.log):
            assert client.read(handle, 0, 1 << 20).data == CONTENT[:1 << 20]
            client.create(root, "scratch")
            client.remove(root, "scratch")

    after = [c["pid"] for c in served.filer("status")["children"] if c["name"] == "volume server"]
    assert after != before
    assert served.stop() == 0
