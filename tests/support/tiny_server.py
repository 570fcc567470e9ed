"""A volume server for the keeper: :class:`TinyFs` with a log, operation records and a bad temper.

    python -m tests.support.tiny_server DIRECTORY [--fail-at-start CODE] --fuse-fd N --init-fd M

In DIRECTORY: ``log`` (the state), ``records``, ``events`` (one line for each thing that happened)
and the bombs.  A file ``die-at-create-begun`` makes the server that finds it remove it and
kill itself there; points are ``{create,unlink,rename}-{begun,applied,done}``.  A file
``hold-lookup-NAME`` makes that LOOKUP wait for ever; with a ``block-notifier`` file the server then
also invalidates a name in the root, whose lock that LOOKUP holds.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import trio

from filer.ids import ROOT_INODE
from filer.vfs.dispatch import guarded
from filer.vfs.kernel import FuseKernelCaches
from filer.vfs.lookup_counts import LookupCounts
from filer.vfs.operation_records import OperationRecords
from filer.vfs.session import FuseSession, KeptMount
from filer.vfs.shim import UNIQUE_RESEND, current_unique, pyfuse3
from tests.support.tiny_fs import Node, TinyFs


@guarded
class RecordedFs(TinyFs):
    def __init__(self, directory: Path, mount: KeptMount) -> None:
        super().__init__(LookupCounts(is_complete=not mount.is_taken_over))
        self.directory = directory
        self.kernel = FuseKernelCaches(self.counts)
        self.records = OperationRecords(directory / "records", mount.mount_id)
        self.replay(directory / "log")
        if "a" not in map(os.fsdecode, self.nodes[1].names):
            self.make(1, b"a", 0o100644, b"constant")

    def event(self, text: str) -> None:
        with open(self.directory / "events", "a") as file:
            file.write(f"{os.getpid()} {text}\n")

    def bomb(self, point: str) -> None:
        try:
            os.unlink(self.directory / f"die-at-{point}")
        except FileNotFoundError:
            return
        self.event(f"dies at {point}")
        os.kill(os.getpid(), signal.SIGKILL)

    def once(self, operation: str, unique: int, perform: Callable[[bool], int]) -> int:
        """*perform* gets whether it may have been done before; returns the inode it made or 0."""
        repeat = self.records.begin(unique)
        if unique & UNIQUE_RESEND:
            self.event(f"{operation} repeated, {repeat}")
        self.bomb(f"{operation}-begun")
        if repeat is not None and repeat.is_done:
            if repeat.errno:
                raise pyfuse3.FUSEError(repeat.errno)
            return int.from_bytes(repeat.payload, "big")
        try:
            made = perform(repeat is not None)
        except pyfuse3.FUSEError as error:
            self.records.done(unique, error.errno)
            raise
        self.bomb(f"{operation}-applied")
        self.records.done(unique, 0, made.to_bytes(8, "big"))
        self.bomb(f"{operation}-done")
        return made

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        hold = self.directory / f"hold-lookup-{os.fsdecode(name)}"
        if hold.exists():
            hold.unlink()
            self.event(f"holds {os.fsdecode(name)}")
            if (self.directory / "block-notifier").exists():
                self.kernel.name_changed(ROOT_INODE, b"a")
            await trio.sleep_forever()
        return await super().lookup(parent_inode, name, ctx)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        def perform(repeated: bool) -> int:
            existing = self.nodes[parent_inode].names.get(name)
            if existing is not None and repeated:
                return existing
            node: Node = self.make(parent_inode, name, mode)
            return node.id

        inode = self.once("create", current_unique(), perform)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode)), self._entry(self._node(inode))

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        def perform(repeated: bool) -> int:
            if name in self.nodes[parent_inode].names:
                self.change("unlink", parent_inode, name)
            elif not repeated:
                raise pyfuse3.FUSEError(errno.ENOENT)
            return 0

        self.once("unlink", current_unique(), perform)

    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: pyfuse3.RequestContext,
    ) -> None:
        def perform(repeated: bool) -> int:
            if name_old in self.nodes[parent_inode_old].names:
                self.change("rename", parent_inode_old, name_old, parent_inode_new, name_new)
            elif not repeated:
                raise pyfuse3.FUSEError(errno.ENOENT)
            return 0

        self.once("rename", current_unique(), perform)


async def serve(directory: Path, mount: KeptMount) -> None:
    fs = RecordedFs(directory, mount)
    session = FuseSession(fs, mount)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGUSR1) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(session.run)
            await nursery.start(fs.kernel.run)
            fs.event("serves")
            async for number in signals:
                fs.event(signal.Signals(number).name)
                session.stop()
                break
            nursery.cancel_scope.cancel()
    session.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--fail-at-start", type=int)
    parser.add_argument("--fuse-fd", type=int, required=True)
    parser.add_argument("--init-fd", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.fail_at_start is not None:
        print("first line\nthe NAS has no export /nowhere", file=sys.stderr)
        sys.exit(arguments.fail_at_start)
    trio.run(serve, arguments.directory, KeptMount(arguments.fuse_fd, arguments.init_fd))


if __name__ == "__main__":
    main()
