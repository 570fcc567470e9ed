"""The two ONC RPC calls a supervisor needs (RFC 5531, RFC 1833): NULL and GETPORT, over TCP."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Awaitable, Callable

import trio

NFS_PROGRAM, PORTMAP_PROGRAM, STATUS_PROGRAM = 100003, 100000, 100024
PORTMAP_PORT = 111

_xids = itertools.count(1)
_REPLY_BYTES_MAX = 1 << 16


async def answers(host: str, port: int, program: int, version: int) -> bool:
    """Whether *program* accepts a NULL call.  Waits for ever: give it a deadline."""
    return await _call(host, port, program, version, 0, b"") is not None


async def registered_port(program: int, version: int) -> int:
    """The TCP port rpcbind of this host knows for *program*; 0: none, or no rpcbind."""
    arguments = struct.pack(">IIII", program, version, 6, 0)
    answer = await _call("127.0.0.1", PORTMAP_PORT, PORTMAP_PROGRAM, 2, 3, arguments)
    return 0 if answer is None or len(answer) < 4 else int(struct.unpack(">I", answer[:4])[0])


async def until(
    condition: Callable[[], Awaitable[bool]], *, every_s: float = 0.05
) -> None:
    """Poll *condition*: nobody tells us when a foreign program is ready."""
    while not await condition():  # noqa: ASYNC110
        await trio.sleep(every_s)


async def _call(
    host: str, port: int, program: int, version: int, procedure: int, arguments: bytes
) -> bytes | None:
    """The results, or ``None`` if nobody answers or the call is not accepted."""
    xid = next(_xids) & 0xFFFF_FFFF
    # CALL, RPC version 2, then AUTH_NONE twice.
    call = struct.pack(">IIIIIIIIII", xid, 0, 2, program, version, procedure, 0, 0, 0, 0)
    call += arguments
    try:
        async with await trio.open_tcp_stream(host, port) as stream:
            await stream.send_all(struct.pack(">I", 0x8000_0000 | len(call)) + call)
            (mark,) = struct.unpack(">I", await _receive(stream, 4))
            reply = await _receive(stream, min(mark & 0x7FFF_FFFF, _REPLY_BYTES_MAX))
    except (OSError, trio.BrokenResourceError):
        return None
    if len(reply) < 24:
        return None
    got, kind, status, _flavor, verifier_bytes = struct.unpack(">IIIII", reply[:20])
    if (got, kind, status) != (xid, 1, 0):
        return None
    rest = reply[20 + verifier_bytes:]
    return rest[4:] if rest[:4] == b"\0\0\0\0" else None  # accept_stat SUCCESS


async def _receive(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        if not more:
            raise trio.BrokenResourceError("the server closed the connection")
        data += more
    return data
