"""A volume server that starts while the core filer is away."""

from __future__ import annotations

import os

import pytest

from tests.support.nas import running_nas
from tests.support.node import JUNCTION, running_node

pytestmark = [pytest.mark.nfs, pytest.mark.fuse]


def test_what_is_cached_is_served_and_writes_are_taken_although_the_core_filer_is_away(tmp_path):
    behind = tmp_path / "behind"
    for directory in (behind / "d", tmp_path / "nas", tmp_path / "node"):
        directory.mkdir(parents=True)
    texture = os.urandom(3 << 20)
    (behind / "d" / "texture").write_bytes(texture)
    (behind / "d" / "log").write_bytes(b"before\n")
    with (
        running_nas(tmp_path / "nas", {"/shows": behind}) as nas,
        running_node(tmp_path / "node", nas.url("/shows"), verify_s=1) as node,
    ):
        shows = node.mountpoint()
        assert (shows / "d" / "texture").read_bytes() == texture
        assert sorted(os.listdir(shows / "d")) == ["log", "texture"]
        assert (shows / "d" / "log").read_bytes() == b"before\n"

        nas.kill()
        node.kill("volume")

        assert (shows / "d" / "texture").read_bytes() == texture
        assert sorted(os.listdir(shows / "d")) == ["log", "texture"]
        with open(shows / "d" / "log", "ab") as log:
            log.write(b"during\n")
            os.fsync(log.fileno())
        assert (shows / "d" / "log").read_bytes() == b"before\nduring\n"

        nas.start()
        node.cli("flush", JUNCTION)
        assert (behind / "d" / "log").read_bytes() == b"before\nduring\n"
