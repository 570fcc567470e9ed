"""The keeper: the mount survives its servers, requests are answered, nothing is left behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from filer.keeper import restart_delay_s
from tests.support.kept import KeptServer, kept_server, wait_until

pytestmark = pytest.mark.fuse


class Load:
    """Threads that use the mount until stopped; ``errors`` must stay empty."""

    def __init__(self, mountpoint: Path, threads: int = 3) -> None:
        self.errors: list[str] = []
        self.rounds = [0] * threads
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._use, args=(mountpoint, i), daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _use(self, mountpoint: Path, number: int) -> None:
        while not self._stop.is_set():
            path = mountpoint / f"t{number}-{self.rounds[number]}"
            renamed = mountpoint / f"{path.name}-renamed"
            try:
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
                os.pwrite(fd, path.name.encode(), 0)
                os.close(fd)
                os.rename(path, renamed)
                assert renamed.read_bytes() == path.name.encode()
                os.unlink(renamed)
                assert not path.exists()
                assert not renamed.exists()
                assert "a" in os.listdir(mountpoint)
            except (OSError, AssertionError) as error:
                self.errors.append(f"{path.name}: {error!r}")
                return
            self.rounds[number] += 1

    def wait_rounds(self, more: int) -> None:
        """Until each thread has done *more* rounds from here, or one has failed."""
        goal = [done + more for done in self.rounds]
        wait_until(
            lambda: self.errors or all(d >= g for d, g in zip(self.rounds, goal, strict=True)),
            f"{more} more rounds",
        )

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


def in_background(function: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    result: list[object] = []

    def run() -> None:
        try:
            result.append(function())
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, result


def is_mounted(kept: KeptServer) -> bool:
    return str(kept.mountpoint) in Path("/proc/self/mountinfo").read_text()


def test_clients_see_no_error_while_the_server_is_killed_again_and_again(tmp_path):
    with kept_server(tmp_path) as kept:
        kept.wait_running()
        load = Load(kept.mountpoint)
        for _ in range(5):
            load.wait_rounds(5)
            restarts = kept.state["restarts"]
            kept.kill_server()
            kept.wait_running(restarts + 1)
        load.wait_rounds(5)
        load.stop()

        assert load.errors == []
        assert kept.state["last_exit"] == "signal 9"


def test_clients_see_no_error_while_the_server_is_replaced(tmp_path):
    with kept_server(tmp_path) as kept:
        kept.wait_running()
        load = Load(kept.mountpoint)
        for restarts in (1, 2, 3):
            load.wait_rounds(3)
            kept.process.send_signal(signal.SIGHUP)
            kept.wait_running(restarts)
        load.stop()

        assert load.errors == []
        assert kept.state["last_exit"] == "exit 0"
        assert sum("SIGUSR1" in event for event in kept.events) == 3
        assert not any("SIGTERM" in event for event in kept.events)


def test_a_request_in_progress_is_answered_by_the_next_server(tmp_path):
    (tmp_path / "hold-lookup-a").touch()
    with kept_server(tmp_path) as kept:
        kept.wait_running()
        thread, result = in_background(lambda: (kept.mountpoint / "a").read_bytes())
        kept.wait_event("holds a")

        kept.kill_server()

        thread.join(30)
        assert result == [b"constant"]


def test_a_server_that_cannot_die_is_freed_and_replaced(tmp_path):
    """Its notifier thread waits for the directory's lock, held by a LOOKUP it never answers."""
    (tmp_path / "hold-lookup-a").touch()
    (tmp_path / "block-notifier").touch()
    with kept_server(tmp_path) as kept:
        pid = kept.wait_running()
        thread, result = in_background(lambda: (kept.mountpoint / "a").read_bytes())
        wait_until(
            lambda: any(
                "fuse_reverse_inval_entry" in (task / "stack").read_text()
                for task in Path(f"/proc/{pid}/task").iterdir()
            ),
            "a thread in the kernel's invalidation",
        )

        kept.kill_server()

        thread.join(30)
        assert [error.errno for error in result if isinstance(error, OSError)] == [errno.EAGAIN]
        kept.wait_running(1)
        assert not Path(f"/proc/{pid}").exists()
        assert (kept.mountpoint / "a").read_bytes() == b"constant"


@pytest.mark.parametrize("operation", ["create", "unlink", "rename"])
def test_a_repeated_operation_gets_its_first_answer(tmp_path, operation):
    perform = {
        "create": lambda path: os.close(os.open(path, os.O_CREAT | os.O_EXCL)),
        "unlink": os.unlink,
        "rename": lambda path: os.rename(path, f"{path}-new"),
    }[operation]
    with kept_server(tmp_path) as kept:
        kept.wait_running()
        for point in ("begun", "applied", "done"):
            path = kept.mountpoint / point
            if operation != "create":
                path.touch()

            kept.bomb(f"{operation}-{point}")
            perform(path)  # no error

            assert path.exists() == (operation == "create")
            repeats = [event for event in kept.events if f"{operation} repeated" in event]
            assert f"is_done={point == 'done'}" in repeats.pop()
        assert len(repeats) == 2


def test_a_repeated_operation_that_failed_fails_the_same_way(tmp_path):
    with kept_server(tmp_path) as kept:
        kept.wait_running()
        path = kept.mountpoint / "x"
        path.touch()
        kept.bomb("create-begun")
        with pytest.raises(FileExistsError):
            os.open(path, os.O_CREAT | os.O_EXCL)


def test_without_resend_requests_in_progress_are_answered_try_again(tmp_path):
    (tmp_path / "hold-lookup-a").touch()
    with kept_server(tmp_path, "--no-resend") as kept:
        kept.wait_running()
        thread, result = in_background(lambda: (kept.mountpoint / "a").read_bytes())
        kept.wait_event("holds a")

        kept.kill_server()

        thread.join(30)
        assert [error.errno for error in result if isinstance(error, OSError)] == [errno.EAGAIN]
        kept.wait_running(1)
        assert (kept.mountpoint / "a").read_bytes() == b"constant"


def test_sigterm_stops_the_server_and_unmounts(tmp_path):
    with kept_server(tmp_path) as kept:
        kept.wait_running()
        assert is_mounted(kept)

        assert kept.stop() == 0

        assert not is_mounted(kept)
        assert any("SIGTERM" in event for event in kept.events)
        assert kept.state["phase"] == "stopped"
        assert kept.state["server_pid"] is None


def test_sigterm_unmounts_lazily_what_is_in_use(tmp_path):
    with kept_server(tmp_path) as kept:
        kept.wait_running()
        fd = os.open(kept.mountpoint / "a", os.O_PATH)
        try:
            assert kept.stop() == 0
            assert not is_mounted(kept)
        finally:
            os.close(fd)


def test_a_misconfigured_server_is_not_started_again(tmp_path):
    with kept_server(tmp_path, server_options=("--fail-at-start", "64")) as kept:
        assert kept.process.wait(30) == 64

        assert not is_mounted(kept)
        assert kept.state["phase"] == "misconfigured"
        assert kept.state["last_line"] == "the NAS has no export /nowhere"
        assert kept.state["restarts"] == 0


def test_a_failing_server_is_started_again_with_growing_delays(tmp_path):
    with kept_server(tmp_path, server_options=("--fail-at-start", "3")) as kept:
        wait_until(lambda: kept.state["restarts"] >= 3, "three restarts")
        assert kept.state["last_exit"] == "exit 3"
        assert kept.state["last_line"] == "the NAS has no export /nowhere"
        assert is_mounted(kept)
        assert kept.stop() == 0

    delays = [restart_delay_s(deaths) for deaths in range(1, 12)]
    assert delays[:4] == [0.0, 0.1, 0.2, 0.4]
    assert delays == sorted(delays)
    assert delays[-1] == 5.0


def test_the_mount_of_a_killed_keeper_is_replaced(tmp_path):
    with kept_server(tmp_path) as first:
        server_pid = first.wait_running()
        fd = os.open(first.mountpoint / "a", os.O_PATH)  # keeps the dead mount busy
        first.process.kill()
        first.process.wait()
        wait_until(lambda: not Path(f"/proc/{server_pid}").exists(), "the server dies as well")
        with pytest.raises(OSError):
            os.listdir(first.mountpoint)

        with kept_server(tmp_path) as second:
            second.wait_running()
            assert (second.mountpoint / "a").read_bytes() == b"constant"
            mounts = Path("/proc/self/mountinfo").read_text().count(str(second.mountpoint))
            assert mounts == 1
        os.close(fd)


def test_a_second_keeper_leaves_the_first_one_alone(tmp_path):
    with kept_server(tmp_path) as first:
        first.wait_running()
        second = KeptServer(tmp_path)
        assert second.process.wait(30) == 75
        assert (first.mountpoint / "a").read_bytes() == b"constant"


def test_the_keeper_stops_when_its_parent_dies(tmp_path):
    """The parent here is a shell that waits for its standard input to end."""
    command = (
        f"{sys.executable} -m filer.keeper --volume tiny --mountpoint {tmp_path}/mnt "
        f"--state {tmp_path}/state.json -- {sys.executable} -m tests.support.tiny_server {tmp_path}"
    )
    parent = subprocess.Popen(
        ["sh", "-c", f"{command} </dev/null 2>>{tmp_path}/stderr & read line"],
        stdin=subprocess.PIPE,
    )
    wait_until((tmp_path / "events").exists, "the server serves")
    parent.communicate()

    wait_until(
        lambda: f"{tmp_path}/mnt" not in Path("/proc/self/mountinfo").read_text(), "unmounted"
    )
    assert "SIGTERM" in (tmp_path / "events").read_text()


def test_the_keeper_imports_the_standard_library_only():
    script = (
        "import sys, filer.keeper\n"
        "print([m for m in sys.modules if m.split('.')[0] not in sys.stdlib_module_names"
        " and m != '__main__' and not m.startswith(('_distutils_hack', 'filer', '__editable__'))"
        "])\n"
        "print(sorted(m for m in sys.modules if m.startswith('filer')))"
    )
    # Isolated from what the environment's .pth files import.
    result = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.stdout.splitlines() == [
        "[]", "['filer', 'filer.fuse_connection', 'filer.keeper']",
    ]


def test_read_ahead_is_raised_before_the_first_request(tmp_path):
    with kept_server(tmp_path) as kept:
        kept.wait_running()
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if str(kept.mountpoint) in line:
                device = line.split()[2]
        (kept.mountpoint / "a").read_bytes()  # FUSE_INIT is answered for certain
        value = Path(f"/sys/class/bdi/{device}/read_ahead_kb").read_text()
        assert value.strip() == "8192"
