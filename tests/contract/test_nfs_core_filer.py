"""What the NFS core filer does when the network or the NAS misbehaves."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import trio

from filer.core_filer.base import CoreFiler, Found, Handle, SetAttributes
from filer.core_filer.factory import open_core_filer
from filer.core_filer.nfs_mount import Mounter, NfsUrl
from filer.core_filer.rpc_connection import Limits
from filer.errors import Misconfigured, Refused, TryAgain
from tests.support.nas import Nas, free_ports, running_nas
from tests.support.nfs_relay import NfsRelay, running_relay

pytestmark = pytest.mark.nfs

IMPATIENT = Limits(silence_s=0.5)
PATIENT = Limits(silence_s=2.0)
"""Even on a busy machine a probe is answered in time."""
NOREPLACE, EXCHANGE = 1, 2


@pytest.fixture
def nas(tmp_path: Path) -> Iterator[Nas]:
    """One that the test may kill."""
    exported = tmp_path / "exported"
    exported.mkdir()
    with running_nas(tmp_path / "nas", {"/shows": exported}) as nas:
        yield nas


@pytest.fixture
def export(shared_nas: Nas, tmp_path: Path) -> Path:
    """This test's directory in the shared NAS."""
    directory = shared_nas.exports["/shows"] / tmp_path.name
    directory.mkdir()
    return directory


@pytest.fixture
async def relay(shared_nas: Nas) -> AsyncIterator[NfsRelay]:
    async with running_relay(shared_nas.port) as relay:
        yield relay


@pytest.fixture
async def core(shared_nas: Nas, export: Path, relay: NfsRelay) -> AsyncIterator[CoreFiler]:
    url = shared_nas.url(f"/shows/{export.name}", port=relay.port)
    async with open_core_filer(url, random=Random(1), limits=PATIENT) as core:
        yield core


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - states have no event to wait for
        await trio.sleep(0.005)


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


# --- An operation was applied and its answer lost

Operation = Callable[[CoreFiler, Found], Awaitable[object]]

LOST: dict[str, tuple[str, Operation, set[str]]] = {
    "create": (
        "create", lambda c, f: c.create(c.root, b"new", mode=0o640, uid=3, gid=4), {"f", "new"}),
    "create with set-uid": (
        "create", lambda c, f: c.create(c.root, b"new", mode=0o4640, uid=3, gid=4), {"f", "new"}),
    "mkdir": (
        "mkdir", lambda c, f: c.mkdir(c.root, b"new", mode=0o750, uid=3, gid=4), {"f", "new"}),
    "symlink": (
        "symlink", lambda c, f: c.symlink(c.root, b"new", b"to", uid=3, gid=4), {"f", "new"}),
    "mknod": (
        "mknod",
        lambda c, f: c.mknod(c.root, b"new", mode=stat.S_IFIFO | 0o600, rdev=0, uid=3, gid=4),
        {"f", "new"}),
    "link": ("link", lambda c, f: c.link(f.handle, c.root, b"new"), {"f", "new"}),
    "remove": ("remove", lambda c, f: c.remove(c.root, b"f"), set()),
    "rename": ("rename", lambda c, f: c.rename(c.root, b"f", c.root, b"new"), {"new"}),
    "noreplace, the link": (
        "link", lambda c, f: c.rename(c.root, b"f", c.root, b"new", flags=NOREPLACE), {"new"}),
    "noreplace, the removal": (
        "remove", lambda c, f: c.rename(c.root, b"f", c.root, b"new", flags=NOREPLACE), {"new"}),
    "setattr": ("setattr", lambda c, f: c.setattr(f.handle, SetAttributes(size=3)), {"f"}),
    "write": ("write", lambda c, f: c.write(f.handle, 0, b"abc", stable=True), {"f"}),
    "lookup": ("lookup", lambda c, f: c.lookup(c.root, b"f"), {"f"}),
}


@pytest.mark.parametrize("case", LOST)
async def test_an_operation_whose_answer_was_lost_succeeds_once(
    core: CoreFiler, relay: NfsRelay, export: Path, case: str
) -> None:
    procedure, operation, names = LOST[case]
    f = await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
    asked, connections = relay.calls[procedure], relay.connections
    relay.lose_answer(procedure)

    await operation(core, f)

    assert relay.calls[procedure] == asked + 2
    await until(lambda: relay.connections == connections + 1)
    assert set(os.listdir(export)) == names
    for name in names & {"new"}:
        seen = os.lstat(export / name)
        if procedure in ("create", "mkdir", "symlink", "mknod"):
            assert (seen.st_uid, seen.st_gid) == (3, 4)
        if case == "create with set-uid":
            assert stat.S_IMODE(seen.st_mode) == 0o4640


async def test_rmdir_whose_answer_was_lost_succeeds(
    core: CoreFiler, relay: NfsRelay, export: Path
) -> None:
    await core.mkdir(core.root, b"d", mode=0o755, uid=0, gid=0)
    relay.lose_answer("rmdir")
    await core.rmdir(core.root, b"d")
    assert os.listdir(export) == []


@pytest.mark.parametrize("move", [1, 2, 3])
async def test_exchange_survives_a_lost_answer_at_each_of_its_moves(
    core: CoreFiler, relay: NfsRelay, export: Path, move: int
) -> None:
    for name in (b"a", b"b"):
        found = await core.create(core.root, name, mode=0o644, uid=0, gid=0)
        await core.write(found.handle, 0, name, stable=True)
    for _ in range(1, move):
        relay.let_pass("rename")
    relay.lose_answer("rename")

    await core.rename(core.root, b"a", core.root, b"b", flags=EXCHANGE)

    assert contents(export) == {"a": b"b", "b": b"a"}


async def test_a_refused_operation_stays_refused_after_a_lost_answer(
    core: CoreFiler, relay: NfsRelay
) -> None:
    relay.lose_answer("rename")
    with pytest.raises(Refused) as caught:
        await core.rename(core.root, b"nothing", core.root, b"new")
    assert caught.value.errno == errno.ENOENT


async def test_create_does_not_take_somebody_elses_file_for_its_own(
    core: CoreFiler, relay: NfsRelay, export: Path
) -> None:
    """The call was lost before the NAS; another client then makes a file that looks the same."""

    def made_by_another() -> None:
        os.close(os.open(export / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        os.chown(export / "lock", 3, 4)

    relay.lose_call("create", made_by_another)
    with pytest.raises(Refused) as caught:
        await core.create(core.root, b"lock", mode=0o600, uid=3, gid=4)
    assert caught.value.errno == errno.EEXIST


async def test_the_only_connection_lost_is_no_outage(
    shared_nas: Nas, relay: NfsRelay, export: Path
) -> None:
    def made_by_another() -> None:
        (export / "lock").touch(mode=0o600)

    url = shared_nas.url(f"/shows/{export.name}", port=relay.port)
    async with open_core_filer(url, random=Random(1), connections=1) as core:
        relay.lose_call("create", made_by_another)
        with pytest.raises(Refused) as caught:
            await core.create(core.root, b"lock", mode=0o600, uid=0, gid=0)
    assert caught.value.errno == errno.EEXIST


async def test_a_lost_call_is_sent_again(
    core: CoreFiler, relay: NfsRelay, export: Path
) -> None:
    relay.lose_call("create")
    relay.lose_call("create")
    await core.create(core.root, b"f", mode=0o600, uid=3, gid=4)
    assert os.listdir(export) == ["f"]
    assert relay.calls["create"] == 3


# --- What the NAS answers


@pytest.mark.parametrize(
    ("status", "expected"),
    [(28, errno.ENOSPC), (69, errno.EDQUOT), (13, errno.EACCES), (70, errno.ESTALE),
     (30, errno.EROFS), (5, errno.EIO), (10006, errno.EIO), (27, errno.EFBIG),
     (10001, errno.ESTALE)],
)
async def test_the_nas_refusals_reach_the_caller(
    core: CoreFiler, relay: NfsRelay, status: int, expected: int
) -> None:
    f = await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
    relay.answer("write", status)
    with pytest.raises(Refused) as caught:
        await core.write(f.handle, 0, b"x")
    assert errno.errorcode[caught.value.errno] == errno.errorcode[expected]
    assert (await core.write(f.handle, 0, b"x")).count == 1


async def test_a_busy_nas_is_asked_again_until_it_answers(
    core: CoreFiler, relay: NfsRelay
) -> None:
    relay.answer("getattr", 10008, times=3)
    asked = relay.calls["getattr"]
    assert (await core.getattr(core.root)).is_directory
    assert relay.calls["getattr"] == asked + 4


async def test_a_busy_answer_does_not_make_a_create_uncertain(
    core: CoreFiler, relay: NfsRelay, export: Path
) -> None:
    (export / "f").touch(mode=0o644)
    relay.answer("create", 10008)
    with pytest.raises(Refused) as caught:
        await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
    assert caught.value.errno == errno.EEXIST


async def test_a_listing_starts_again_when_its_cookie_went_bad(
    core: CoreFiler, relay: NfsRelay, export: Path
) -> None:
    names = {f"{i:05}".encode() for i in range(6000)}
    for name in names:
        (export / os.fsdecode(name)).touch()
    entries = core.readdir(core.root)
    seen = {e.name for e in await anext(entries)}
    relay.answer("readdirplus", 10003)
    async for batch in entries:
        seen |= {e.name for e in batch}
    assert seen == names


async def test_a_nas_without_readdirplus_is_listed_by_name(
    core: CoreFiler, relay: NfsRelay, export: Path
) -> None:
    (export / "f").touch()
    relay.answer("readdirplus", 10004)
    for _ in range(2):
        batches = [batch async for batch in core.readdir(core.root)]
        assert [(e.name, e.handle) for batch in batches for e in batch] == [(b"f", None)]
    assert relay.calls["readdirplus"] == 1


async def test_a_listing_survives_names_that_vanish_under_the_nas(
    core: CoreFiler, relay: NfsRelay, export: Path
) -> None:
    (export / "f").touch()
    relay.answer("readdirplus", 2)
    relay.answer("readdirplus", 70)
    batches = [batch async for batch in core.readdir(core.root)]
    assert [e.name for batch in batches for e in batch] == [b"f"]


async def test_listing_a_removed_directory_is_stale(core: CoreFiler) -> None:
    d = await core.mkdir(core.root, b"d", mode=0o755, uid=0, gid=0)
    await core.rmdir(core.root, b"d")
    with pytest.raises(Refused) as caught:
        await anext(core.readdir(d.handle))
    assert caught.value.errno == errno.ESTALE


LONG_TARGET = ((b"x" * 99 + b"/") * 41)[:4095]


async def test_long_symlink_targets(core: CoreFiler, export: Path) -> None:
    target = LONG_TARGET[:3500]
    made = await core.symlink(core.root, b"l" * 255, target, uid=0, gid=0)
    assert await core.readlink(made.handle) == target
    os.symlink(LONG_TARGET, export / "longest")
    assert await core.readlink((await core.lookup(core.root, b"longest")).handle) == LONG_TARGET


async def test_a_symlink_target_beyond_libnfs_buffer_is_refused(
    core: CoreFiler, relay: NfsRelay
) -> None:
    with pytest.raises(Refused) as caught:
        await core.symlink(core.root, b"l", LONG_TARGET, uid=0, gid=0)
    assert caught.value.errno == errno.ENAMETOOLONG
    assert (await core.getattr(core.root)).is_directory
    assert core.state().reconnects == 0


# --- Silence


async def test_a_slow_answer_is_awaited_while_probes_are_answered(
    core: CoreFiler, relay: NfsRelay
) -> None:
    gate = relay.hold_answer("getattr")
    probes = relay.calls["null"]
    done = trio.Event()

    async def ask() -> None:
        assert (await core.getattr(core.root)).is_directory
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        # More probes than fit into the time after which silence means loss.
        await relay.wait_called("null", probes + 9)
        assert not done.is_set()
        assert core.state().reachable
        assert core.state().reconnects == 0
        gate.set()
        await done.wait()


async def test_a_hung_nas_blocks_only_what_needs_it(nas: Nas, tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    async with (
        open_core_filer(nas.url("/shows"), random=Random(1), limits=IMPATIENT) as core,
        open_core_filer(f"file://{tmp_path}/local", random=Random(1)) as other,
        trio.open_nursery() as nursery,
    ):
        f = await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
        nas.hang()
        try:
            sent = trio.Event()
            answers: list[Found] = []

            async def ask() -> None:
                sent.set()
                answers.append(await core.lookup(core.root, b"f"))

            nursery.start_soon(ask)
            await sent.wait()
            await until(lambda: not core.state().reachable)
            state = core.state()
            assert state.in_flight == 1
            assert state.reason
            assert state.unreachable_since is not None
            assert state.unreachable_since <= trio.current_time()
            await other.create(other.root, b"goes on", mode=0o644, uid=0, gid=0)
            assert not answers
        finally:
            nas.resume()
        await until(lambda: bool(answers))
        assert answers[0].handle == f.handle
        assert core.state().reachable
        assert core.state().reconnects > 0


async def test_a_waiting_request_can_be_cancelled(core: CoreFiler, relay: NfsRelay) -> None:
    gate = relay.hold_answer("getattr")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(core.getattr, core.root)
        await relay.wait_called("getattr")
        nursery.cancel_scope.cancel()
    assert core.state().in_flight == 0
    gate.set()  # The late answer must find nobody, and disturb nobody.
    assert (await core.getattr(core.root)).is_directory
    assert core.state().reconnects == 0


async def test_the_filer_closes_while_the_nas_hangs(nas: Nas) -> None:
    async with (
        open_core_filer(nas.url("/shows"), random=Random(1)) as core,
        trio.open_nursery() as nursery,
    ):
        nas.hang()
        nursery.start_soon(core.getattr, core.root)
        await until(lambda: core.state().in_flight == 1)
        nursery.cancel_scope.cancel()
    nas.resume()


# --- The NAS dies and comes back


async def test_requests_wait_for_a_restarted_nas_and_none_is_lost_or_doubled(nas: Nas) -> None:
    finished = 0
    enough = trio.Event()

    async with open_core_filer(nas.url("/shows"), random=Random(1), limits=IMPATIENT) as core:

        async def work(worker: int) -> None:
            nonlocal finished
            directory = (
                await core.mkdir(core.root, b"%d" % worker, mode=0o755, uid=0, gid=0)).handle
            for i in range(20):
                name = b"%d" % i
                f = await core.create(directory, b"tmp" + name, mode=0o644, uid=1, gid=1)
                await core.write(f.handle, 0, name * 1000, stable=True)
                await core.rename(directory, b"tmp" + name, directory, name)
                if i % 5 == 4:
                    await core.remove(directory, name)
                finished += 1
                if finished in (40, 120):
                    enough.set()

        async with trio.open_nursery() as nursery:
            for worker in range(10):
                nursery.start_soon(work, worker)
            for _ in range(2):
                await enough.wait()
                enough = trio.Event()
                nas.kill()
                await until(lambda: "refused" in core.state().reason)
                nas.start()
                await until(lambda: core.state().reachable)
        assert core.state().reconnects >= 2

    exported = nas.exports["/shows"]
    assert set(os.listdir(exported)) == {str(w) for w in range(10)}
    expected = {str(i): str(i).encode() * 1000 for i in range(20) if i % 5 != 4}
    for worker in range(10):
        assert contents(exported / str(worker)) == expected


@pytest.mark.parametrize("wanted_owner", [(3, 4), (0, 0)])
async def test_what_a_dying_nas_left_half_made_is_finished(
    nas: Nas, wanted_owner: tuple[int, int]
) -> None:
    """It died after the file was there, and before owner, set-uid and our mark were set."""
    uid, gid = wanted_owner
    left = nas.exports["/shows"] / "f"
    async with running_relay(nas.port) as relay:
        url = nas.url("/shows", port=relay.port)
        async with (
            open_core_filer(url, random=Random(1), connections=1) as core,
            trio.open_nursery() as nursery,
        ):

            def dies() -> None:
                left.touch(mode=0o640)
                nas.kill()

            async def create() -> None:
                made.append(
                    await core.create(core.root, b"f", mode=0o4640, uid=uid, gid=gid))

            made: list[Found] = []
            connections = relay.connections
            relay.lose_call("create", dies)
            nursery.start_soon(create)
            await until(lambda: relay.connections >= connections + 2)
            nas.start()
    seen = os.stat(left)
    assert (stat.S_IMODE(seen.st_mode), seen.st_uid, seen.st_gid) == (0o4640, uid, gid)
    assert made[0].attributes.uid == uid


async def test_a_restarted_nas_has_another_verifier_and_the_same_handles(nas: Nas) -> None:
    async with open_core_filer(nas.url("/shows"), random=Random(1), limits=IMPATIENT) as core:
        f = await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
        written = await core.write(f.handle, 0, b"unstable")
        nas.kill()
        nas.start()
        committed = await core.commit(f.handle)
        assert committed.verifier != written.verifier
        assert (await core.lookup(core.root, b"f")).handle == f.handle


# --- Opening


async def test_a_subdirectory_of_an_export_is_a_root_of_its_own(
    shared_nas: Nas, export: Path
) -> None:
    (export / "deep" / "er").mkdir(parents=True)
    url = shared_nas.url(f"/shows/{export.name}/deep/er/")
    async with open_core_filer(url, random=Random(1)) as core:
        await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
        assert (await core.lookup(core.root, b"..")).handle == core.root
    assert os.listdir(export / "deep" / "er") == ["f"]


@pytest.mark.parametrize("connections", [1, 2, 9])
async def test_any_number_of_connections_works(
    shared_nas: Nas, export: Path, connections: int
) -> None:
    url = shared_nas.url(f"/shows/{export.name}")
    async with open_core_filer(url, random=Random(1), connections=connections) as core:
        f = await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
        await core.write(f.handle, 0, b"x" * core.io_bytes_max)
        assert len((await core.read(f.handle, 0, core.io_bytes_max)).data) == core.io_bytes_max


async def test_a_wrong_path_is_a_misconfiguration(shared_nas: Nas) -> None:
    with pytest.raises(Misconfigured) as caught:
        async with open_core_filer(shared_nas.url("/nothing/here"), random=Random(1)):
            pass
    assert "/nothing/here" in str(caught.value)
    assert caught.value.hint


async def test_a_wrong_subdirectory_is_a_misconfiguration(
    shared_nas: Nas, export: Path
) -> None:
    (export / "file").touch()
    for name in ("nothing", "file"):
        with pytest.raises(Misconfigured):
            async with open_core_filer(
                shared_nas.url(f"/shows/{export.name}/{name}"), random=Random(1)
            ):
                pass


@pytest.mark.parametrize(
    "url",
    ["ftp://nas/x", "nfs:///shows", "nfs://nas:70000/shows", "nfs://nas/s?mountport=x",
     "nfs://nas/s?mountport=0", "nfs://nas/s?version=3", "nfs://nas/s#x", "file://host/x",
     "file:///does/not/exist", "/shows"],
)
async def test_impossible_urls_are_misconfigurations_with_a_hint(url: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        async with open_core_filer(url, random=Random(1)):
            pass
    assert caught.value.hint


async def test_a_nas_that_is_not_there_yet_is_waited_for(nas: Nas) -> None:
    nas.stop()
    reasons: list[str] = []

    def waiting(reason: str) -> None:
        reasons.append(reason)
        if len(reasons) == 2:
            nas.start()

    async with open_core_filer(
        nas.url("/shows"), random=Random(1), waiting=waiting
    ) as core:
        assert (await core.getattr(core.root)).is_directory
    assert "refused" in reasons[0].lower()


async def test_every_address_of_a_host_is_tried(shared_nas: Nas) -> None:
    """The NAS listens on 127.0.0.1 only; localhost may also, and first, be ::1."""
    url = shared_nas.url("/shows").replace("127.0.0.1", "localhost")
    async with open_core_filer(url, random=Random(1)) as core:
        assert (await core.getattr(core.root)).is_directory


async def test_waiting_for_a_nas_ends_with_the_time_given() -> None:
    port, mount_port = free_ports(2)
    with pytest.raises(TryAgain) as caught:
        async with open_core_filer(
            f"nfs://127.0.0.1:{port}/shows?mountport={mount_port}", random=Random(1),
            connect_timeout_s=0.2,
        ):
            pass
    assert "refused" in str(caught.value).lower()


async def test_errors_of_the_callers_block_arrive_as_themselves(shared_nas: Nas) -> None:
    with pytest.raises(KeyError):
        async with open_core_filer(shared_nas.url("/shows"), random=Random(1)):
            raise KeyError("mine")


async def test_ports_are_asked_from_the_portmapper(shared_nas: Nas) -> None:
    asked: list[int] = []
    ports = {100003: shared_nas.port, 100005: shared_nas.mount_port}

    async def serve(stream: trio.SocketStream) -> None:
        # One connection asks two questions: procedure 0, then the port.
        for _ in range(2):
            data = await stream.receive_some()
            xid, *_, procedure = struct.unpack_from(">6I", data, 4)
            body = b""
            if procedure == 3:  # PMAPPROC_GETPORT: program, version, protocol, port
                program = struct.unpack(">4I", data[-16:])[0]
                asked.append(program)
                body = struct.pack(">I", ports[program])
            reply = struct.pack(">6I", xid, 1, 0, 0, 0, 0) + body
            await stream.send_all(struct.pack(">I", 0x80000000 | len(reply)) + reply)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        mounted = await Mounter(
            NfsUrl.parse("nfs://127.0.0.1/shows"), machine_name="m", limits=Limits(),
            portmap_port=listeners[0].socket.getsockname()[1],
        ).mount()
        nursery.cancel_scope.cancel()
    assert mounted.nfs_port == shared_nas.port
    assert asked == [100005, 100003]
    assert mounted.handle != Handle(b"")
