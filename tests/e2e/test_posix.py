"""The POSIX suite on the filer: on its mount, and through a real NFS client."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import NodeFactory
from tests.posix.known import KNOWN_FAILURES
from tests.support.guest import Guest
from tests.support.nas import Nas, running_nas
from tests.support.node import JUNCTION

pytestmark = pytest.mark.timeout(900)
_PROJECT = Path(__file__).parents[2]
_LARGE_DIRECTORY = "2000"
"""Names of the large directory; 10,000 are the native suite's, and a soak's here."""


def failures(output: str) -> dict[str, str]:
    """From the output of ``python -m tests.posix --json``: what failed, and how."""
    (line,) = (line for line in output.splitlines() if line.startswith("{"))
    outcomes: dict[str, str] = json.loads(line)
    assert len(outcomes) > 150
    return {name: outcome for name, outcome in outcomes.items() if outcome.startswith("failed")}


def run_on(directory: Path) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.posix", "--json", str(directory)], cwd=_PROJECT,
        env={**os.environ, "POSIX_SUITE_ENTRIES": _LARGE_DIRECTORY}, capture_output=True,
        text=True, errors="surrogateescape")
    print(done.stderr)
    return failures(done.stdout)


def run_in_guest(guest: Guest, directory: Path, words: str = "") -> dict[str, str]:
    command = ["/usr/bin/python3", "-m", "tests.posix", "--json", str(directory), "-k", words]
    done = guest.run(f"POSIX_SUITE_ENTRIES=500 {shlex.join(command)}", timeout=840, check=False)
    print(done.stderr)
    return failures(done.stdout)


def unexpected(found: dict[str, str], known: str) -> dict[str, str]:
    return {name: why for name, why in found.items() if name not in KNOWN_FAILURES[known]}


@pytest.mark.fuse
def test_the_mount_passes_with_a_local_core(start_node: NodeFactory, local_core: Path):
    node = start_node(f"file://{local_core}")
    assert unexpected(run_on(node.mountpoint()), "filer") == {}


@pytest.mark.fuse
@pytest.mark.nfs
def test_the_mount_passes_with_a_nas(start_node: NodeFactory, nas: Nas):
    node = start_node(nas.url("/shows"))
    assert unexpected(run_on(node.mountpoint()), "filer-nfs") == {}


@pytest.mark.guest
def test_a_client_over_nfs3_passes(guest: Guest, start_node: NodeFactory, local_core: Path):
    node = start_node(f"file://{local_core}", policy="full")
    mountpoint = guest.mount_v3(node.nfs_port, node.mount_port, JUNCTION)
    try:
        assert unexpected(run_in_guest(guest, mountpoint), "filer-nfs3") == {}
    finally:
        guest.unmount(mountpoint, force=True)


@pytest.mark.guest
def test_a_client_over_nfs41_passes(guest: Guest, start_node: NodeFactory, local_core: Path):
    node = start_node(f"file://{local_core}", policy="full")
    mountpoint = guest.mount_v41(node.nfs_port, JUNCTION)
    try:
        assert unexpected(run_in_guest(guest, mountpoint), "filer-nfs41") == {}
    finally:
        guest.unmount(mountpoint, force=True)


@pytest.mark.guest
@pytest.mark.soak
@pytest.mark.parametrize("version", ["nfs3", "nfs41"])
def test_ext4_behind_ganesha_fails_what_is_known_and_nothing_else(
    guest: Guest, tmp_path: Path, version: str,
):
    """What `known.py` says about Ganesha is not about the filer: printed, to be compared."""
    (tmp_path / "export").mkdir()
    with running_nas(tmp_path / "nas", {"/export": tmp_path / "export"}) as nas:
        if version == "nfs3":
            mountpoint = guest.mount_v3(nas.port, nas.mount_port, "/export")
        else:
            mountpoint = guest.mount_v41(nas.port, "/export")
        try:
            found = run_in_guest(guest, mountpoint)
        finally:
            guest.unmount(mountpoint, force=True)
    print(sorted(found))
    assert unexpected(found, version) == {}
