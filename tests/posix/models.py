"""Random operations compared with a model in memory, and programs that depend on much at once."""

from __future__ import annotations

import mmap
import os
import random
import sqlite3
from pathlib import Path

from tests.posix.registry import case
from tests.posix.tools import in_processes, opened, seeded_random, write_file

_BORDERS = (0, 1, 4095, 4096, 65_536, 1 << 20, (1 << 20) + 1, 2 << 20, 3 << 20)


class _ModelFile:
    """A file and the bytes it must have."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self._path, self._rng = path, rng
        self._bytes = bytearray()
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR)

    def close(self) -> None:
        os.close(self._fd)

    def step(self) -> None:
        operation = self._rng.choice((
            self._write, self._write, self._write, self._read, self._read, self._truncate,
            self._append, self._reopen, self._map_write, self._rename, self._sync,
        ))
        operation()
        assert os.fstat(self._fd).st_size == len(self._bytes), operation.__name__

    def _offset(self) -> int:
        if self._rng.random() < 0.5:
            return max(0, self._rng.choice(_BORDERS) + self._rng.randint(-2, 2))
        return self._rng.randrange(len(self._bytes) + 10_000)

    def _data(self) -> bytes:
        return self._rng.randbytes(self._rng.choice((1, 10, 4096, 5000, 70_000, 300_000)))

    def _put(self, offset: int, data: bytes) -> None:
        if offset > len(self._bytes):
            self._bytes.extend(bytes(offset - len(self._bytes)))
        self._bytes[offset:offset + len(data)] = data

    def _write(self) -> None:
        offset, data = self._offset(), self._data()
        assert os.pwrite(self._fd, data, offset) == len(data)
        self._put(offset, data)

    def _read(self) -> None:
        offset, length = self._offset(), self._rng.choice((1, 4096, 100_000))
        assert os.pread(self._fd, length, offset) == self._bytes[offset:offset + length], offset

    def _truncate(self) -> None:
        size = self._offset()
        os.truncate(self._path, size)
        if size < len(self._bytes):
            del self._bytes[size:]
        else:
            self._put(size, b"")

    def _append(self) -> None:
        data = self._data()
        with opened(self._path, os.O_WRONLY | os.O_APPEND) as fd:
            assert os.write(fd, data) == len(data)
        self._bytes += data

    def _reopen(self) -> None:
        os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDWR)
        self.compare()

    def _map_write(self) -> None:
        if not self._bytes:
            return
        offset = self._rng.randrange(len(self._bytes))
        data = self._rng.randbytes(min(500, len(self._bytes) - offset))
        with mmap.mmap(self._fd, len(self._bytes)) as mapping:
            mapping[offset:offset + len(data)] = data
            mapping.flush()
        self._put(offset, data)

    def _rename(self) -> None:
        new = self._path.with_name(f"renamed-{self._rng.randrange(10**9)}")
        os.rename(self._path, new)
        self._path = new

    def _sync(self) -> None:
        os.fsync(self._fd)

    def compare(self) -> None:
        found = self._path.read_bytes()
        if found != self._bytes:
            first = next((i for i, (a, b) in enumerate(zip(found, self._bytes, strict=False))
                          if a != b), min(len(found), len(self._bytes)))
            raise AssertionError(
                f"{len(found)} bytes for {len(self._bytes)}, different from byte {first}")


@case
def random_file_operations_agree_with_a_model(root: Path) -> None:
    rng = seeded_random()
    files = [_ModelFile(root / f"file-{number}", rng) for number in range(3)]
    try:
        for _ in range(500):
            rng.choice(files).step()
        for file in files:
            file.compare()
    finally:
        for file in files:
            file.close()


class _ModelTree:
    """Names and what they are: ``None`` for a directory, else the identity of a file."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self._root, self._rng = root, rng
        self._entries: dict[str, int | None] = {"": None}
        self._serial = 0

    def step(self) -> None:
        operation = self._rng.choice((self._mkdir, self._create, self._create, self._link,
                                      self._rename, self._rename, self._remove))
        operation()

    def _directory(self) -> str:
        return self._rng.choice([p for p, kind in self._entries.items() if kind is None])

    def _any(self) -> str:
        return self._rng.choice(list(self._entries))

    def _new_name(self) -> str:
        return f"{self._directory()}/{self._rng.choice('abcdefghij')}"

    def _try(self, is_allowed: bool, act: object, *paths: str) -> bool:
        try:
            act(*(f"{self._root}{path}" for path in paths))  # type: ignore[operator]
        except OSError as error:
            if is_allowed:
                raise AssertionError(f"{act} {paths}: {error}") from error
            return False
        assert is_allowed, f"{act} {paths} succeeded"
        return True

    def _children(self, path: str) -> list[str]:
        return [p for p in self._entries if p.startswith(f"{path}/")]

    def _mkdir(self) -> None:
        name = self._new_name()
        if self._try(name not in self._entries, os.mkdir, name):
            self._entries[name] = None

    def _create(self) -> None:
        name = self._new_name()
        self._serial += 1

        def create(path: str) -> None:
            with opened(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY) as fd:
                os.write(fd, b"%d" % self._serial)

        if self._try(name not in self._entries, create, name):
            self._entries[name] = self._serial

    def _link(self) -> None:
        source, name = self._any(), self._new_name()
        is_allowed = self._entries[source] is not None and name not in self._entries
        if self._try(is_allowed, os.link, source, name):
            self._entries[name] = self._entries[source]

    def _rename(self) -> None:
        source = self._any()
        target = self._any() if self._rng.random() < 0.3 else self._new_name()
        if not source or not target:
            return
        if not self._try(self._may_rename(source, target), os.rename, source, target):
            return
        kind = self._entries[source]
        if source == target or (kind is not None and kind == self._entries.get(target)):
            return
        self._entries.pop(target, None)
        for path in [source, *self._children(source)]:
            self._entries[target + path[len(source):]] = self._entries.pop(path)

    def _may_rename(self, source: str, target: str) -> bool:
        if source == target:
            return True
        if target.startswith(f"{source}/") or source.startswith(f"{target}/"):
            return False
        if target not in self._entries:
            return True
        if self._entries[source] is None:
            return self._entries[target] is None and not self._children(target)
        return self._entries[target] is not None

    def _remove(self) -> None:
        path = self._any()
        if not path:
            return
        is_directory = self._entries[path] is None
        is_allowed = not is_directory or not self._children(path)
        if self._try(is_allowed, os.rmdir if is_directory else os.unlink, path):
            del self._entries[path]

    def compare(self) -> None:
        found: dict[str, int | None] = {"": None}
        for parent, directories, files in os.walk(self._root):
            base = parent[len(str(self._root)):]
            found.update((f"{base}/{name}", None) for name in directories)
            for name in files:
                found[f"{base}/{name}"] = int(Path(parent, name).read_bytes())
        assert found == self._entries
        serials = [kind for kind in self._entries.values() if kind is not None]
        for path, kind in self._entries.items():
            if kind is not None:
                assert os.stat(f"{self._root}{path}").st_nlink == serials.count(kind), path


@case
def random_changes_of_a_tree_agree_with_a_model(root: Path) -> None:
    tree = _ModelTree(root, seeded_random())
    for _ in range(12):
        for _ in range(50):
            tree.step()
        tree.compare()


@case
def a_database_counts_right_with_several_writers(root: Path) -> None:
    """SQLite leans on locks, fsync, truncation and journals that come and go."""
    path = root / "database"
    with sqlite3.connect(path) as database:
        database.execute("create table counter (number integer)")
        database.execute("insert into counter values (0)")

    def count(worker: int) -> None:
        connection = sqlite3.connect(path, timeout=120, isolation_level=None)
        for _ in range(15):
            connection.execute("begin immediate")
            connection.execute("update counter set number = number + 1")
            connection.execute("commit")
        connection.close()
        del worker

    in_processes(*(lambda worker=worker: count(worker) for worker in range(3)))
    connection = sqlite3.connect(path)
    assert connection.execute("select number from counter").fetchone() == (45,)
    assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    connection.close()


@case
def files_saved_by_rename_are_old_or_new_and_nothing_else(root: Path) -> None:
    """What editors and package managers do, with every step made durable."""
    for number in range(30):
        write_file(root / "file.new", b"version %d\n" % number * 100)
        with opened(root / "file.new", os.O_RDWR) as fd:
            os.fsync(fd)
        os.rename(root / "file.new", root / "file")
        with opened(root, os.O_RDONLY) as fd:
            os.fsync(fd)
        assert (root / "file").read_bytes() == b"version %d\n" % number * 100
    assert os.listdir(root) == ["file"]


@case
def a_log_is_rotated_while_it_is_written(root: Path) -> None:
    def write() -> None:
        for number in range(300):
            with opened(root / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT) as fd:
                os.write(fd, b"%04d\n" % number)

    def rotate() -> int:
        rotated = 0
        while rotated < 10:
            try:
                os.rename(root / "log", root / f"log.{rotated}")
                rotated += 1
            except FileNotFoundError:
                if (root / "done").exists():
                    break
        return rotated

    def write_and_say_so() -> None:
        write()
        write_file(root / "done")

    in_processes(write_and_say_so, rotate)
    lines = b"".join(path.read_bytes() for path in root.glob("log*")).split()
    assert sorted(lines) == [b"%04d" % number for number in range(300)]
