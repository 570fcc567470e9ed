"""The load generator from Python: compiled once, run with checked options, answers as values.

Owns the calling convention of ``load.c`` and the contents formula for checks in Python.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

SOURCE = Path(__file__).with_name("load.c")
BUILD = Path(__file__).parents[2] / "build"


class LoadFailed(Exception):
    """The load did not run to its end, or an answer was wrong."""


@dataclass(frozen=True, slots=True)
class Export:
    """Where a client mounts."""

    port: int
    mount_port: int
    path: str
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class LoadResult:
    seconds: float
    operations: int
    """NFS calls."""
    bytes: int
    entries: int
    """Names seen by readdirplus, without ``.`` and ``..``."""
    errors: int
    error_status: int
    """The last NFS status that was not NFS3_OK."""
    wrong: int
    """Answers whose count, contents or verifier were not what they must be."""
    jukebox: int
    """Calls that had to be repeated because the server asked for it."""
    p50_us: float
    p99_us: float
    max_us: float
    cpu_s: float
    """Of the load generator itself."""

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.seconds

    @property
    def operations_per_s(self) -> float:
        return self.operations / self.seconds


def program() -> Path:
    """The compiled load generator, compiled now if its source has changed."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    binary = BUILD / f"load-{digest}"
    if not binary.exists():
        BUILD.mkdir(exist_ok=True)
        partial = binary.with_suffix(".partial")
        subprocess.run(["gcc", "-O3", "-march=native", "-o", str(partial), str(SOURCE)], check=True)
        partial.rename(binary)
    return binary


def _options(options: dict[str, object]) -> list[str]:
    return [f"{key}={int(v) if isinstance(v, bool) else v}" for key, v in options.items()]


def run_load(
    export: Export, operation: str, *, on_progress: Callable[[int], None] | None = None,
    **options: object,
) -> LoadResult:
    """Run one operation to its end; *options* are those named at the top of ``load.c``.

    *on_progress* is told the payload bytes so far, ten times a second.
    Raises: LoadFailed: any status, count, checksum or verifier was not as it must be.
    """
    if on_progress is not None:
        options["progress"] = 1
    command = [
        str(program()), export.host, str(export.port), str(export.mount_port), export.path,
        operation, *_options(options),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            answer: dict[str, float] = {}
            for line in process.stdout:
                answer = json.loads(line)
                if on_progress is not None and "progress" in answer:
                    on_progress(int(answer["progress"]))
            complaint = process.stderr.read().strip()
        except BaseException:
            process.kill()
            raise
    if "seconds" not in answer:
        raise LoadFailed(f"{operation}: {complaint or f'exit status {process.returncode}'}")
    result = LoadResult(**{f.name: answer[f.name] for f in fields(LoadResult)})  # type: ignore[arg-type]
    if result.errors or result.wrong:
        raise LoadFailed(
            f"{operation}: {result.errors} errors (last status {result.error_status}), "
            f"{result.wrong} wrong answers in {result.operations} calls")
    return result


def fill(directory: Path, **options: object) -> None:
    """Make the files that ``read`` expects, straight in a local directory."""
    subprocess.run(
        [str(program()), "fill", str(directory), *_options(options)],
        check=True, stdout=subprocess.DEVNULL)


def check(directory: Path, **options: object) -> None:
    """Compare every byte of local files with what ``write`` wrote.

    Raises: LoadFailed: a file is missing, longer, shorter or different.
    """
    done = subprocess.run(
        [str(program()), "check", str(directory), *_options(options)],
        capture_output=True, text=True)
    if done.returncode:
        raise LoadFailed(f"check of {directory}: {done.stderr.strip()} {done.stdout.strip()}")
