"""Run the suite on a directory: ``python -m tests.posix /mnt/point [-k words]``.

Prints a line for each case that does not pass, then ``N passed, M failed, K skipped``.
``--known name`` takes the failures listed under that name in known.py as expected.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.posix.known import KNOWN_FAILURES
from tests.posix.suite import CASES, Case, Skipped


def select(words: str, *, with_slow: bool) -> list[Case]:
    """The cases whose name contains one of the words; words after "not" exclude."""
    wanted, _, unwanted = words.partition("not ")
    return [
        case for case in CASES.values()
        if (with_slow or not case.is_slow)
        and (not wanted.split() or any(word in case.name for word in wanted.split()))
        and not any(word in case.name for word in unwanted.split())
    ]


def run_in_new_directory(case: Case, mountpoint: Path) -> None:
    """Run one case in a directory of its own, and remove that whatever the outcome."""
    directory = Path(tempfile.mkdtemp(prefix="posix-", dir=mountpoint))
    try:
        case.check(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _time_out(*_: object) -> None:
    raise TimeoutError("the case did not end in time")


def _report(error: BaseException) -> str:
    """The traceback, and the variables of the frame that failed."""
    lines = traceback.format_exception(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames:
        for name, value in frames[-1].f_locals.items():
            lines.append(f"    {name} = {repr(value)[:200]}\n")
    return "".join(lines)


def run_suite(
    cases: list[Case], mountpoint: Path, *, seconds_each: int, say: Callable[[str], None],
) -> dict[str, str]:
    """Outcome of each case by name: ``passed``, ``skipped: why`` or ``failed: error``."""
    signal.signal(signal.SIGALRM, _time_out)
    outcomes = {}
    for case in cases:
        started_s = time.monotonic()
        signal.alarm(seconds_each)
        try:
            run_in_new_directory(case, mountpoint)
            outcomes[case.name] = "passed"
        except Skipped as reason:
            outcomes[case.name] = f"skipped: {reason}"
        except Exception as error:
            outcomes[case.name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            say(f"FAILED {case.name}\n{_report(error)}")
        finally:
            signal.alarm(0)
        say(f"{time.monotonic() - started_s:7.2f} s  {case.name}  {outcomes[case.name][:7]}")
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.posix", description=__doc__)
    parser.add_argument("mountpoint", type=Path, help="a directory of the file system to check")
    parser.add_argument("-k", dest="words", default="", metavar="WORDS",
                        help="only cases whose name contains one of these words; "
                             "words after 'not' exclude")
    parser.add_argument("--slow", action="store_true", help="the slow cases too")
    parser.add_argument("--known", choices=sorted(KNOWN_FAILURES), default="native",
                        help="whose known failures to expect")
    parser.add_argument("--seconds-each", type=int, default=120)
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON at the end")
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    arguments = parser.parse_args()

    def say(line: str) -> None:
        if arguments.verbose or line.startswith("FAILED"):
            print(line, file=sys.stderr, flush=True)

    os.umask(0o022)
    outcomes = run_suite(
        select(arguments.words, with_slow=arguments.slow), arguments.mountpoint,
        seconds_each=arguments.seconds_each, say=say)
    known = KNOWN_FAILURES[arguments.known]
    failed = {name for name, outcome in outcomes.items() if outcome.startswith("failed")}
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    skipped = sum(outcome.startswith("skipped") for outcome in outcomes.values())
    for name in sorted(failed & known.keys()):
        print(f"known failure: {name}: {known[name]}")
    for name in sorted(known.keys() & outcomes.keys() - failed):
        print(f"passes although it is a known failure: {name}")
    if arguments.json:
        print(json.dumps(outcomes))
    print(f"{passed} passed, {len(failed - known.keys())} failed, {skipped} skipped, "
          f"{len(failed & known.keys())} known failures")
    return 1 if failed - known.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
