"""The fsid that NFS-Ganesha sees: ours for volumes, the kernel's for everything else."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

PROGRAM = """
#include <stdio.h>
#include <stdint.h>
#include <string.h>
#include <sys/vfs.h>
int main(int count, char **paths) {
    for (int i = 1; i < count; i++) {
        struct statfs%(suffix)s result; uint32_t words[2];
        if (statfs%(suffix)s(paths[i], &result)) { puts("error"); continue; }
        memcpy(words, &result.f_fsid, sizeof words);
        printf("%%x:%%x %%d\\n", words[0], words[1], result.f_blocks > 0);
    }
}
"""


@pytest.fixture(scope="module", params=["", "64"])
def program(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fsid")
    source = directory / "program.c"
    source.write_text("#define _GNU_SOURCE\n" + PROGRAM % {"suffix": request.param})
    subprocess.run(["gcc", "-o", directory / "program", source], check=True)
    return directory / "program"


def run(program: Path, fsid: str | None, *paths: Path) -> subprocess.CompletedProcess[str]:
    spec = importlib.util.find_spec("filer.supervisor._fsid_preload")
    assert spec is not None
    assert spec.origin is not None
    environment = {**os.environ, "LD_PRELOAD": spec.origin}
    if fsid is not None:
        environment["FILER_FSID"] = fsid
    return subprocess.run(
        [program, *paths], env=environment, capture_output=True, text=True, check=False
    )


def words(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.split()[0] for line in result.stdout.splitlines()]


def test_exactly_the_named_paths_get_their_fsid(program, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two=2"
    one.mkdir()
    two.mkdir()
    plain = run(program, None, one, two, tmp_path)

    result = run(program, f"{one}=0xfc10001:0x2,{two}=7:8", one, two, tmp_path)

    assert words(result) == ["fc10001:2", "7:8", words(plain)[2]]
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["1", "1", "1"]


def test_errors_of_statfs_stay_errors(program, tmp_path):
    absent = tmp_path / "absent"
    assert run(program, f"{absent}=1:2", absent).stdout == "error\n"


@pytest.mark.parametrize(
    "fsid",
    ["relative=1:2", "/a", "/a=1", "/a=1:", "/a=1:2:3", "/a=x:1", "/a=0x100000000:1", "/a=1:2;"],
)
def test_what_cannot_be_used_ends_the_process_with_a_message(program, tmp_path, fsid):
    result = run(program, fsid, tmp_path)
    assert result.returncode == 78
    assert fsid in result.stderr
    assert result.stdout == ""
