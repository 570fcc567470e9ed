"""Listings over NFS of directories that change between two replies."""

from __future__ import annotations

import pytest

from tests.support.nfs3 import Nfs3
from tests.support.node import Node

pytestmark = [pytest.mark.nfs, pytest.mark.fuse]


@pytest.mark.parametrize("plus", [True, False], ids=["READDIRPLUS", "READDIR"])
def test_a_directory_is_emptied_while_it_is_listed(node: Node, plus: bool):
    """What rm -r does over NFS: remove the names of one reply, ask for the next ones."""
    with node.client() as client:
        directory = client.mkdir(node.root_handle(), "dir").handle
        names = {b"name-%05d" % number for number in range(1500)}
        for name in names:
            client.create(directory, name)
        removed = remove_while_listing(client, directory, plus=plus)
        assert removed == names
        assert client.list_names(directory) == []


def remove_while_listing(client: Nfs3, directory: bytes, *, plus: bool) -> set[bytes]:
    removed: set[bytes] = set()
    cookie, verifier = 0, bytes(8)
    while True:
        if plus:
            listing = client.readdirplus(directory, cookie, verifier, reply_bytes_max=8192)
        else:
            listing = client.readdir(directory, cookie, verifier, count=2048)
        for entry in listing.entries:
            if entry.name not in (b".", b".."):
                client.remove(directory, entry.name)
                removed.add(entry.name)
        if listing.is_end:
            return removed
        cookie, verifier = listing.entries[-1].cookie, listing.cookie_verifier


@pytest.mark.parametrize("plus", [True, False], ids=["READDIRPLUS", "READDIR"])
def test_names_nobody_touches_are_listed_once_while_others_change(node: Node, plus: bool):
    with node.client() as client:
        directory = client.mkdir(node.root_handle(), "dir").handle
        kept = [b"kept-%05d" % number for number in range(1000)]
        for name in kept:
            client.create(directory, name)
        seen: list[bytes] = []
        cookie, verifier, serial = 0, bytes(8), 0
        while True:
            if plus:
                listing = client.readdirplus(directory, cookie, verifier, reply_bytes_max=8192)
            else:
                listing = client.readdir(directory, cookie, verifier, count=2048)
            seen += [entry.name for entry in listing.entries]
            if listing.is_end:
                break
            cookie, verifier = listing.entries[-1].cookie, listing.cookie_verifier
            for _ in range(5):
                serial += 1
                client.create(directory, b"new-%05d" % serial)
                if serial > 3:
                    client.remove(directory, b"new-%05d" % (serial - 3))
        assert sorted(name for name in seen if name.startswith(b"kept-")) == kept
