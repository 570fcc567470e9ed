"""A child is kept running, and stopped, whatever it does."""

import os
import sys
from pathlib import Path

import pytest
import trio

from filer.supervisor.child import Child, Program
from filer.supervisor.process import Process
from filer.supervisor.restart import RestartPolicy

PATIENT = RestartPolicy(delay_s_min=3600.0, delay_s_max=3600.0)


class Script(Program):
    """Runs shell code; remembers what the child loop did."""

    name = "script"

    def __init__(self, code: str) -> None:
        self.code = code
        self.steps: list[str] = []
        self.is_ready = trio.Event()

    async def prepare(self) -> None:
        self.steps.append("prepare")

    def start(self) -> Process:
        self.steps.append("start")
        return Process(["/bin/sh", "-c", self.code], os.environ)

    async def ended(self) -> None:
        self.steps.append("ended")

    def explain(self, status: int) -> str:
        return "as it was told to"


@pytest.fixture
def run(nursery):
    """Runs a child of the given program; returns it."""
    def start(program: Program, policy: RestartPolicy = PATIENT) -> Child:
        child = Child(program, policy)
        nursery.start_soon(child.run)
        return child

    return start


async def wait_for(holds) -> None:
    """The child has no event for what tests look at."""
    with trio.fail_after(60):
        while not holds():  # noqa: ASYNC110
            await trio.sleep(0.005)


async def test_a_child_that_ends_is_prepared_and_started_again_with_its_reason(run):
    program = Script("exit 3")
    child = run(program)

    await wait_for(lambda: child.status().restarts == 2)  # then the policy waits

    assert program.steps == ["prepare", "start", "ended"] * 2
    assert child.status().state == "restarting"
    assert child.status().last_exit == "exit status 3 (as it was told to)"
    await child.stop(1.0)
    assert child.status().state == "stopped"


class NeverReady(Script):
    async def wait_ready(self) -> None:
        await trio.sleep_forever()


async def test_a_misconfigured_child_settles_as_failed(run):
    child = run(NeverReady("exit 64"))

    with trio.fail_after(60):
        await child.settled.wait()

    assert child.status().state == "failed"
    await child.stop(1.0)


async def test_a_program_that_cannot_be_started_has_a_reason_and_is_tried_again(run):
    class Missing(Script):
        def start(self) -> Process:
            return Process(["/no/such/program"], os.environ)

    child = run(Missing(""))

    await wait_for(lambda: child.status().restarts == 2)

    assert "cannot be started" in child.status().last_exit
    await child.stop(1.0)


async def test_a_child_is_stopped_while_it_is_still_being_prepared(run):
    class Waiting(Script):
        async def prepare(self) -> None:
            await super().prepare()
            await trio.sleep_forever()

    program = Waiting("")
    child = run(program)
    await wait_for(lambda: program.steps)

    with trio.fail_after(60):
        await child.stop(3600.0)

    assert program.steps == ["prepare"]


async def test_a_child_that_ignores_sigterm_is_killed(run, tmp_path):
    ready = tmp_path / "ready"
    child = run(Script(f"trap '' TERM; touch {ready}; while :; do sleep 3600 & wait; done"))
    await wait_for(ready.exists)
    pid = child.pid

    with trio.fail_after(60):
        await child.stop(0.05)

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_killed_child_shows_why_it_was_killed(run):
    program = Script("exec sleep 3600")
    child = run(program)
    with trio.fail_after(60):
        await child.settled.wait()

    child.kill("it hung")
    await wait_for(lambda: child.status().restarts == 1)

    assert child.status().last_exit.startswith("it hung")
    await child.stop(1.0)


async def test_a_child_that_is_not_ready_is_still_starting(run):
    class Slow(Script):
        async def wait_ready(self) -> None:
            await self.is_ready.wait()

    program = Slow("exec sleep 3600")
    child = run(program)
    await wait_for(lambda: child.pid)
    assert child.status().state == "starting"

    program.is_ready.set()
    with trio.fail_after(60):
        await child.settled.wait()

    assert child.status().state == "running"
    await child.stop(1.0)


async def test_a_process_does_not_outlive_its_parent(tmp_path):
    pid_file = tmp_path / "pid"
    code = (
        "import os, sys, time\n"
        "from filer.supervisor.process import Process\n"
        "child = Process(['/bin/sleep', '3600'], os.environ, die_with_parent=True)\n"
        f"open({str(pid_file)!r} + '.new', 'w').write(str(child.pid))\n"
        f"os.rename({str(pid_file)!r} + '.new', {str(pid_file)!r})\n"
        "sys.stdin.read()\n")
    parent = await trio.lowlevel.open_process(
        [sys.executable, "-c", code], stdin=-1, cwd=Path(__file__).parents[2])
    try:
        await wait_for(pid_file.exists)
        pid = int(pid_file.read_text())
        pidfd = os.pidfd_open(pid)
        command = Path(f"/proc/{pid}/cmdline")
        await wait_for(lambda: command.read_bytes().startswith(b"/bin/sleep"))
    finally:
        parent.kill()
        await parent.wait()

    with trio.fail_after(60):
        await trio.lowlevel.wait_readable(pidfd)
    os.close(pidfd)
