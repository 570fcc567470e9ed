"""Is the node well, and if not, why."""

import msgspec
import pytest

from filer.admin.reports import ChildStatus, FlushError, VolumeReport, VolumeStatus
from filer.supervisor.health import RECENT_S, Level, assess, level


def report(**status):
    return VolumeReport("shows", "/shows", "nfs://nas/shows", "full",
                        VolumeStatus("shows", **status))


@pytest.mark.parametrize(("status", "colour", "words"), [
    ({"core_reachable": False, "core_unreachable_s": 300.0}, "red", "does not answer for 5 min"),
    ({"flush_errors": [FlushError("/a", "ENOSPC"), FlushError("/b", "EDQUOT")]}, "red",
     "refuses to take /a: ENOSPC (and 1 more)"),
    ({"cache_degraded": True, "cache_reason": "read-only"}, "yellow", "pass through: read-only"),
    ({"corrupt_pages": 3}, "yellow", "3 corrupt pages"),
    ({"conflict_copies": 1}, "yellow", "1 conflict copies"),
    ({"internal_errors": 1}, "yellow", "1 unexpected errors"),
    ({"dirty_bytes": 95, "dirty_bytes_max": 100}, "yellow", "95% full: writers are slowed"),
    ({"dirty_oldest_s": 3600.0, "write_back_s": 600.0}, "yellow", "has waited 60 min"),
    ({"phase": "recovering"}, "yellow", "is recovering"),
])
def test_each_trouble_of_a_volume_has_its_colour_and_its_words(status, colour, words):
    (reason,) = assess([report(**status)], [])

    assert (reason.level, reason.volume) == (colour, "shows")
    assert words in reason.text


@pytest.mark.parametrize("status", [
    {},
    {"dirty_bytes": 50, "dirty_bytes_max": 100},
    {"dirty_oldest_s": 700.0, "write_back_s": 600.0},  # a flush takes its time
    {"dirty_oldest_s": 1e6, "write_back_s": None},  # scratch: never flushed, by policy
])
def test_normal_operation_is_green(status):
    assert assess([report(**status)], [ChildStatus("keeper", "shows")]) == []
    assert level([]) is Level.GREEN


def test_a_volume_server_that_does_not_answer_is_red():
    silent = msgspec.structs.replace(report(), status=None, problem="it is not running")

    (reason,) = assess([silent], [])
    assert (reason.level, reason.text) == ("red", "it is not running")


@pytest.mark.parametrize(("child", "colour"), [
    (ChildStatus("nfs server", state="restarting", last_exit="killed by SIGKILL"), "red"),
    (ChildStatus("nfs server", state="failed", last_exit="exit status 64"), "red"),
    (ChildStatus("nfs server", state="unresponsive"), "red"),
    (ChildStatus("nfs server", last_exit="killed by SIGKILL", last_exit_age_s=5.0), "yellow"),
])
def test_a_child_in_trouble_is_a_reason(child, colour):
    (reason,) = assess([], [child])

    assert reason.level == colour
    assert child.last_exit in reason.text


def test_a_restart_long_ago_is_forgotten():
    child = ChildStatus("nfs server", last_exit="boom", last_exit_age_s=RECENT_S)

    assert assess([], [child]) == []


def test_the_worst_reason_comes_first_and_gives_the_colour():
    reasons = assess([report(corrupt_pages=1, core_reachable=False)], [])

    assert [r.level for r in reasons] == ["red", "yellow"]
    assert level(reasons) is Level.RED
