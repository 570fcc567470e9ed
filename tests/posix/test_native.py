"""The suite must pass on the machine's own file system, or it asks the wrong questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.posix.suite import CASES, Case, Skipped


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in CASES.values() if not case.is_slow])
def test_native(case: Case, tmp_path: Path) -> None:
    try:
        case.check(tmp_path)
    except Skipped as reason:
        pytest.skip(str(reason))
