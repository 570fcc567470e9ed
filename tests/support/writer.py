"""An NFS client that writes under failures and knows what must have survived them.

Owns one file and, for each of its blocks, which contents are acceptable: the last one that a
COMMIT (or FILE_SYNC) acknowledged, or anything written since.  Keeps to RFC 1813: UNSTABLE data
is remembered until a COMMIT answers with the verifier of its WRITE, and sent again if not.
"""

from __future__ import annotations

import random
import struct
import threading
from dataclasses import dataclass, field

from tests.support.nfs3 import Nfs3, Stable

BLOCK_BYTES = 4096
_HEADER = struct.Struct(">8sIII")
_MAGIC = b"block of"


def block_content(writer: int, block: int, serial: int) -> bytes:
    header = _HEADER.pack(_MAGIC, writer, block, serial)
    return (header * (BLOCK_BYTES // len(header) + 1))[:BLOCK_BYTES]


@dataclass
class _Block:
    stable: int = 0
    """The serial acknowledged as stable; 0: none."""
    later: list[int] = field(default_factory=list)
    """Serials sent since, oldest first, acknowledged or not."""


class Writer:
    """Writes blocks of one file until told to stop; `run` is for a thread."""

    def __init__(self, number: int, client: Nfs3, directory: bytes, *, seed: int,
                 blocks: int = 600) -> None:
        self.number = number
        self.acknowledged = 0
        """Operations that were answered; guarded by `progress`."""
        self.progress = threading.Condition()
        self.error: BaseException | None = None
        self._client = client
        self._random = random.Random(seed)
        self._file = client.create(directory, f"file-of-{number}").handle
        self._blocks = [_Block() for _ in range(blocks)]
        self._serial = 0
        self._uncommitted: dict[int, tuple[int, bytes]] = {}
        """Block → serial and verifier of its acknowledged, not yet committed WRITE."""

    def run(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                self._step()
                with self.progress:
                    self.acknowledged += 1
                    self.progress.notify_all()
        except BaseException as error:
            with self.progress:
                self.error = error
                self.progress.notify_all()

    def wait_for(self, operations: int, *, timeout_s: float = 120.0) -> None:
        """Until that many more operations were answered, or an error."""
        with self.progress:
            goal = self.acknowledged + operations
            reached = self.progress.wait_for(
                lambda: self.error is not None or self.acknowledged >= goal, timeout_s)
        if self.error is not None:
            raise self.error
        assert reached, f"writer {self.number} gets no answers"

    def _step(self) -> None:
        chance = self._random.random()
        if chance < 0.12:
            self.commit()
        else:
            first = self._random.randrange(len(self._blocks))
            count = self._random.choice((1, 1, 2, 16, 64))
            stable = Stable.FILE_SYNC if chance > 0.97 else Stable.UNSTABLE
            self._write(range(first, min(first + count, len(self._blocks))), stable)

    def _write(self, blocks: range, stable: Stable) -> None:
        self._serial += 1
        serial = self._serial
        data = b"".join(block_content(self.number, block, serial) for block in blocks)
        for block in blocks:
            self._blocks[block].later.append(serial)
        written = self._client.write(self._file, blocks.start * BLOCK_BYTES, data, stable)
        assert written.count == len(data), "a short write"
        for block in blocks:
            if written.committed is Stable.UNSTABLE:
                self._uncommitted[block] = (serial, written.verifier)
            else:
                self._is_stable(block, serial)

    def _is_stable(self, block: int, serial: int) -> None:
        state = self._blocks[block]
        state.stable = serial
        state.later = [later for later in state.later if later > serial]
        if block in self._uncommitted and self._uncommitted[block][0] <= serial:
            del self._uncommitted[block]

    def commit(self) -> None:
        """COMMIT the whole file; what the server forgot is written again, stably."""
        verifier = self._client.commit(self._file)
        for block, (serial, at_write) in list(self._uncommitted.items()):
            if at_write == verifier:
                self._is_stable(block, serial)
            else:
                self._write(range(block, block + 1), Stable.FILE_SYNC)

    def check(self, data: bytes) -> None:
        """*data*, the whole file, has every block in an acceptable state."""
        for number, state in enumerate(self._blocks):
            found = data[number * BLOCK_BYTES:(number + 1) * BLOCK_BYTES]
            serial = self._serial_of(number, found)
            acceptable = {state.stable, *state.later}
            assert serial in acceptable, (
                f"writer {self.number}, block {number}: found write {serial},"
                f" but {state.stable} is stable and {state.later} came later")

    def _serial_of(self, number: int, found: bytes) -> int:
        if not found.strip(b"\0"):
            return 0
        magic, writer, block, serial = _HEADER.unpack_from(found)
        assert (magic, writer, block) == (_MAGIC, self.number, number), (
            f"writer {self.number}, block {number}: foreign bytes {found[:32]!r}")
        assert found == block_content(writer, block, serial)[:len(found)], (
            f"writer {self.number}, block {number}: torn between writes")
        return int(serial)

    def read_back(self, client: Nfs3) -> bytes:
        data = b""
        while True:
            got = client.read(self._file, len(data), 1 << 20)
            data += got.data
            if got.is_end or not got.data:
                return data

    @property
    def name(self) -> str:
        return f"file-of-{self.number}"
