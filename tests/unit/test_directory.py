"""Names and their cookies: what a reader of a changing directory sees."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from filer.ids import InodeId
from filer.namespace.inode import FIRST_COOKIE, Directory

NAMES = [b"n%d" % i for i in range(12)]
STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.sampled_from(NAMES)))


def test_cookies_start_after_ganeshas_own():
    names = Directory()

    assert names.add(b"first", InodeId(10)) == FIRST_COOKIE == 3


def test_a_name_keeps_its_cookie_while_it_leads_to_the_same_inode():
    names = Directory()
    cookie = names.add(b"a", InodeId(10))

    assert names.add(b"a", InodeId(10)) == cookie
    assert names.add(b"a", InodeId(11)) != cookie


def test_a_removed_name_never_gets_its_cookie_back():
    names = Directory()
    cookie = names.add(b"a", InodeId(10))
    names.remove(b"a")

    assert names.add(b"a", InodeId(10)) > cookie


def test_a_restored_directory_goes_on_with_new_cookies():
    names = Directory()
    names.restore([(7, b"a", InodeId(1)), (9, b"b", InodeId(2))])

    assert names.add(b"c", InodeId(3)) == 10
    assert [name for _, name, _ in names.since(7)] == [b"b", b"c"]


@given(before=STEPS, during=STEPS, batch=st.integers(1, 4))
def test_names_that_stay_are_seen_exactly_once_whatever_else_changes(before, during, batch):
    names = Directory()
    _apply(names, before)
    there_at_start = set(names.entries)
    touched = {name for _, name in during}
    seen: list[bytes] = []
    cookie, steps = 0, iter(during)

    while True:
        page = [e for e, _ in zip(names.since(cookie), range(batch), strict=False)]
        if not page:
            break
        seen += [name for _, name, _ in page]
        cookie = page[-1][0]
        _apply(names, [step for step, _ in zip(steps, range(2), strict=False)])

    for name in there_at_start - touched:
        assert seen.count(name) == 1
    cookies = [c for c, _, _ in names.since(0)]
    assert cookies == sorted(set(cookies))


@given(STEPS)
def test_entries_and_order_agree(steps):
    names = Directory()
    model: dict[bytes, InodeId] = {}
    for action, name in steps * 40:
        if action == "add":
            model.setdefault(name, InodeId(100 + NAMES.index(name)))
        else:
            model.pop(name, None)
        _apply(names, [(action, name)])

    assert {name: inode for _, name, inode in names.since(0)} == model


def _apply(names: Directory, steps) -> None:
    for action, name in steps:
        if action == "add":
            names.add(name, InodeId(100 + NAMES.index(name)))
        else:
            names.remove(name)
