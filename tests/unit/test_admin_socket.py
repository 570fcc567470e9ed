"""The admin socket: one server, one client, and what goes wrong between them."""

import os
import socket
import stat

import pytest
import trio

from filer.admin import unix
from filer.admin.client import CallFailed, NotRunning, call
from filer.admin.protocol import BadMessage, Progress, Request, encode
from filer.admin.server import serve_admin, text
from filer.errors import Misconfigured, Refused


@pytest.fixture
async def server(nursery, tmp_path):
    """Starts a server with the given handlers; returns its socket's path."""

    async def start(**handlers):
        path = tmp_path / "node.sock"
        options = {k: handlers.pop(k) for k in ("allowed_uids",) if k in handlers}

        async def serve(*, task_status):
            await serve_admin(path, handlers, task_status=task_status, **options)

        await nursery.start(serve)
        return path

    return start


async def echo(arguments, report):
    return arguments


async def test_a_call_gets_the_handlers_result(server):
    path = await server(echo=echo)

    assert await call(path, "echo", {"path": "/sh\udcffows"}) == {"path": "/sh\udcffows"}


async def test_progress_arrives_before_the_result(server):
    async def work(arguments, report):
        report(Progress(1, 2, "files"))
        await trio.testing.wait_all_tasks_blocked()
        report(Progress(2, 2, "files"))
        return {"files": 2}

    path = await server(work=work)
    seen = []

    assert await call(path, "work", on_progress=seen.append) == {"files": 2}
    assert seen[-1] == Progress(2, 2, "files")


async def test_the_newest_progress_wins_and_never_blocks_the_handler(server):
    async def chatty(arguments, report):
        for n in range(100_000):
            report(Progress(n))
        return {}

    path = await server(chatty=chatty)
    seen = []

    await call(path, "chatty", on_progress=seen.append)
    assert seen == [Progress(99_999)]


@pytest.mark.parametrize(("error", "kind", "hint", "exit_status"), [
    (Misconfigured("bad", "change it"), "misconfigured", "change it", 64),
    (Refused(2, "/a"), "refused", "", 1),
    (RuntimeError("boom"), "internal", "see the node's log", 1),
])
async def test_a_handlers_error_reaches_the_client_in_words(
    server, error, kind, hint, exit_status
):
    async def fail(arguments, report):
        raise error

    path = await server(fail=fail)
    with pytest.raises(CallFailed) as caught:
        await call(path, "fail")

    failure = caught.value.failure
    assert (failure.kind, failure.hint, failure.exit_status) == (kind, hint, exit_status)
    assert str(error) in failure.message


async def test_an_unknown_verb_is_answered_with_the_known_ones(server):
    path = await server(echo=echo)
    with pytest.raises(CallFailed) as caught:
        await call(path, "fulsh")

    assert "'fulsh'" in caught.value.failure.message
    assert "echo" in caught.value.failure.hint


async def test_a_missing_argument_is_the_clients_mistake_and_the_server_lives_on(server):
    async def flush(arguments, report):
        return {"path": text(arguments, "path")}

    path = await server(flush=flush)
    with pytest.raises(CallFailed) as caught:
        await call(path, "flush", {})

    assert caught.value.failure.kind == "bad-request"
    assert await call(path, "flush", {"path": "a"}) == {"path": "a"}


@pytest.mark.parametrize("sent", [b"hello\n", b"\xff\n", b"{}\n", b'{"type":"result"}\n'])
async def test_malformed_input_is_answered_and_the_server_lives_on(server, sent):
    path = await server(echo=echo)
    async with await unix.connect(path) as stream:
        await stream.send_all(sent)
        assert b"bad-request" in await stream.receive_some()

    assert await call(path, "echo", {}) == {}


async def test_a_silent_client_is_dropped(server, autojump_clock):
    path = await server(echo=echo)
    async with await unix.connect(path) as stream:
        assert await stream.receive_some() == b""


async def test_a_client_that_goes_away_cancels_its_request(server):
    started, cancelled = trio.Event(), trio.Event()

    async def forever(arguments, report):
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    path = await server(forever=forever)
    async with await unix.connect(path) as stream:
        await stream.send_all(encode(Request("forever")))
        await started.wait()

    with trio.fail_after(30):
        await cancelled.wait()


async def test_only_the_owner_can_open_the_socket(server):
    path = await server(echo=echo)

    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


async def test_a_user_who_is_not_allowed_is_told_so(server):
    path = await server(echo=echo, allowed_uids=frozenset({4711}))
    with pytest.raises(CallFailed, match="may not control this node") as caught:
        await call(path, "echo")

    assert caught.value.failure.kind == "refused"


async def test_the_socket_of_a_killed_server_is_replaced(server, tmp_path):
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "node.sock"))
    dead.close()
    with pytest.raises(NotRunning):
        await call(tmp_path / "node.sock", "echo")

    path = await server(echo=echo)

    assert await call(path, "echo", {"a": 1}) == {"a": 1}


async def test_a_stopped_server_takes_its_socket_away(tmp_path):
    path = tmp_path / "node.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda *, task_status: serve_admin(path, {}, task_status=task_status))
        assert path.exists()
        nursery.cancel_scope.cancel()

    assert not path.exists()


async def test_a_successors_socket_is_left_alone(tmp_path, nursery):
    path = tmp_path / "node.sock"
    async with trio.open_nursery() as first:
        await first.start(lambda *, task_status: serve_admin(path, {}, task_status=task_status))
        await nursery.start(
            lambda *, task_status: serve_admin(path, {"echo": echo}, task_status=task_status))
        first.cancel_scope.cancel()

    assert await call(path, "echo", {"a": 1}) == {"a": 1}


async def test_paths_longer_than_a_socket_address_work(nursery, tmp_path):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    path = deep / "node.sock"
    await nursery.start(
        lambda *, task_status: serve_admin(path, {"echo": echo}, task_status=task_status))

    assert await call(path, "echo", {"a": 1}) == {"a": 1}


async def test_no_socket_at_all_means_not_running(tmp_path):
    with pytest.raises(NotRunning):
        await call(tmp_path / "absent" / "node.sock", "status")


async def test_a_server_that_dies_during_a_call_is_not_running(nursery, tmp_path):
    path = tmp_path / "node.sock"
    listener = unix.listen(path)

    async def die():
        stream = await listener.accept()
        await stream.receive_some()
        await stream.aclose()

    nursery.start_soon(die)
    with pytest.raises(NotRunning):
        await call(path, "status")


async def test_nonsense_from_the_server_is_no_traceback_but_a_bad_message(nursery, tmp_path):
    path = tmp_path / "node.sock"
    listener = unix.listen(path)

    async def babble():
        stream = await listener.accept()
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")

    nursery.start_soon(babble)
    with pytest.raises(BadMessage):
        await call(path, "status")
