"""When a child that ended is started again."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filer.supervisor.restart import (
    GiveUp,
    HangDetector,
    RestartAt,
    RestartPolicy,
    Restarts,
    exit_reason,
)

POLICY = RestartPolicy(delay_s_min=1.0, delay_s_max=8.0, proven_after_s=60.0)


def test_the_first_end_is_forgiven_at_once_and_later_ones_wait_ever_longer():
    restarts, now_s, delays_s = Restarts(POLICY), 0.0, []
    for _ in range(7):
        restarts.started(now_s)
        decision = restarts.ended(now_s, "boom")
        delays_s.append(decision.at_s - now_s)
        now_s = decision.at_s

    assert delays_s == [0, 1, 2, 4, 8, 8, 8]


def test_a_child_that_ran_well_is_forgiven_again():
    restarts = Restarts(POLICY)
    for _ in range(5):
        restarts.started(0.0)
        restarts.ended(0.0, "boom")

    restarts.started(100.0)
    assert restarts.ended(100.0 + POLICY.proven_after_s, "boom") == RestartAt(160.0, "boom")


def test_a_misconfigured_child_is_not_started_again():
    restarts = Restarts(POLICY)
    restarts.started(0.0)

    assert restarts.ended(1.0, "exit status 64", misconfigured=True) == GiveUp("exit status 64")
    assert restarts.count == 0
    assert restarts.last_reason == "exit status 64"


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_a_restart_is_never_in_the_past_nor_later_than_the_longest_delay(lives_s):
    restarts, now_s = Restarts(POLICY), 0.0
    for life_s in lives_s:
        restarts.started(now_s)
        now_s += life_s
        decision = restarts.ended(now_s, "boom")

        assert now_s <= decision.at_s <= now_s + POLICY.delay_s_max
        if life_s >= POLICY.proven_after_s:
            assert decision.at_s == now_s
        now_s = decision.at_s
    assert restarts.count == len(lives_s)


@given(st.integers(2, 5000))
def test_no_number_of_deaths_overflows(deaths):
    restarts = Restarts(POLICY)
    for _ in range(deaths):
        restarts.started(0.0)
        decision = restarts.ended(0.0, "boom")

    assert decision.at_s <= POLICY.delay_s_max


@pytest.mark.parametrize(("status", "words"), [
    (0, "exit status 0"), (3, "exit status 3"), (-signal.SIGKILL, "killed by SIGKILL"),
    (-99, "killed by signal 99"),
])
def test_an_end_is_told_in_words(status, words):
    assert exit_reason(status) == words


def test_a_server_that_misses_some_probes_is_not_hung():
    hangs = HangDetector()
    for answered in (False, False, False, True) * 3:
        assert not hangs.probed(answered=answered, excused=False)


def test_a_server_that_misses_all_probes_is_killed_once():
    hangs = HangDetector()

    killed = [hangs.probed(answered=False, excused=False) for _ in range(8)]

    assert killed == [False, False, False, True] * 2


def test_a_server_that_waits_for_a_core_filer_is_left_alone_until_that_answers():
    hangs = HangDetector()
    assert not any(hangs.probed(answered=False, excused=True) for _ in range(100))

    assert hangs.probed(answered=False, excused=False)
