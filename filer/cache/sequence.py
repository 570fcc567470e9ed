"""Which file comes next in a numbered sequence: ``shot.0101.exr`` → ``shot.0102.exr``.

Owns the memory of names recently read in each directory and the arithmetic of names.  Pure: does
not know whether the names exist.

A sequence is believed after two consecutive names of it were read, by whichever clients; which
group of digits counts is learnt from those two.
"""

from __future__ import annotations

import re
from collections import OrderedDict

from filer.ids import InodeId

DIRECTORIES_MAX = 1024
NAMES_PER_DIRECTORY = 16
"""Sequences interleave in one directory: layers of a frame, several clients."""
DIGITS_MAX = 18

_DIGITS = re.compile(rb"(\d+)")


def successors(name: bytes, count: int, group: int = -1) -> list[bytes]:
    """The next *count* names, counting in digit group *group* (default: the last).

    Leading zeros keep the width, and numbers may outgrow it: ``099`` → ``100``, ``999`` →
    ``1000``.  Empty if the name has no such group.
    """
    parts = _DIGITS.split(name)  # text, digits, text, digits, … text
    groups = len(parts) // 2
    if not -groups <= group < groups:
        return []
    at = 2 * (group % groups) + 1
    digits = parts[at]
    if len(digits) > DIGITS_MAX:
        return []
    before, after = b"".join(parts[:at]), b"".join(parts[at + 1 :])
    return [
        before + b"%0*d" % (len(digits), int(digits) + step) + after
        for step in range(1, count + 1)
    ]


class Sequences:
    """What was read in which directory lately."""

    def __init__(self) -> None:
        self._directories: OrderedDict[InodeId, OrderedDict[bytes, None]] = OrderedDict()

    def on_read(self, directory: InodeId, name: bytes, count: int) -> list[bytes]:
        """A file was read from its start.

        Returns: the *count* names likely to be read next; empty unless the name before this one
        was read, too.
        """
        recent = self._directories.setdefault(directory, OrderedDict())
        self._directories.move_to_end(directory)
        while len(self._directories) > DIRECTORIES_MAX:
            self._directories.popitem(last=False)
        group = next((g for g in map(lambda r: _counting_group(r, name), reversed(recent))
                      if g is not None), None)
        recent[name] = None
        recent.move_to_end(name)
        while len(recent) > NAMES_PER_DIRECTORY:
            recent.popitem(last=False)
        return [] if group is None else successors(name, count, group)

    @property
    def directory_count(self) -> int:
        return len(self._directories)


def _counting_group(earlier: bytes, later: bytes) -> int | None:
    """The digit group in which *later* is *earlier* plus one, if that is their difference."""
    if abs(len(earlier) - len(later)) > 1:
        return None
    first, second = _DIGITS.split(earlier), _DIGITS.split(later)
    if len(first) != len(second):
        return None
    different = [at for at in range(len(first)) if first[at] != second[at]]
    if len(different) != 1 or different[0] % 2 == 0:
        return None
    group = different[0] // 2
    return group if successors(earlier, 1, group) == [later] else None
