"""The benchmark's own parts: judgement, table and JSON; the load generator against a real NAS;
and every row once, tiny, with a second Ganesha in the place of a node."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from tests.bench import __main__ as cli
from tests.bench.load import Export, LoadFailed, check, fill, run_load
from tests.bench.results import Measure, Report, Row, Target, merged
from tests.bench.rig import Rig
from tests.bench.rows import DEFINITIONS
from tests.support.nas import running_nas

AT_LEAST_HALF = Target(0.5)


def row(*measures: Measure, target: Target = AT_LEAST_HALF) -> Row:
    return Row("N3", "something", "MB/s", target, measures)


def test_a_row_is_judged_by_the_ratio_of_medians():
    measured = row(Measure("x", ours=(1, 60, 50), baseline=(100, 1000, 90)))

    assert measured.as_json()["ratio"] == 0.5
    assert measured.ok


def test_a_row_shows_the_measure_that_is_furthest_from_its_target():
    measured = row(Measure("good", (90,), (100,)), Measure("bad", (40,), (100,)))

    assert not measured.ok
    assert measured.as_json()["ours"] == 40
    assert set(measured.as_json()["runs"]) == {"good", "bad"}


def test_where_smaller_is_better_the_largest_ratio_counts():
    measured = row(Measure("a", (1.0,), (1.0,)), Measure("b", (1.2,), (1.0,)),
                   target=Target(1.05, at_most=True))

    assert measured.as_json()["ratio"] == 1.2
    assert not measured.ok


def test_a_target_without_a_baseline_limits_the_value_itself():
    target = Target(400, at_most=True, of_ratio=False)

    assert row(Measure("RSS", (399,)), target=target).ok
    assert not row(Measure("RSS", (401,)), target=target).ok
    assert row(Measure("RSS", (399,)), target=target).as_json()["ratio"] is None


def test_a_row_that_could_not_be_measured_is_not_ok_and_says_why():
    failed = DEFINITIONS["N1"].failed("no disk", scale=0.1)

    assert not failed.ok
    assert failed.as_json()["failure"] == "no disk"


def test_rows_measured_again_replace_their_old_figures_and_keep_the_order():
    old = [{"id": "N1", "ours": 1}, {"id": "N10", "ours": 1}]

    rows = merged(merged(old, {"id": "N10", "ours": 2}), {"id": "N2", "ours": 3})

    assert [(r["id"], r["ours"]) for r in rows] == [("N1", 1), ("N2", 3), ("N10", 2)]


def test_the_json_of_a_row_has_the_promised_keys():
    plain = json.loads(json.dumps(row(Measure("x", (1.0,), (2.0,))).as_json()))

    assert {"id", "what", "unit", "ours", "baseline", "ratio", "target", "ok", "runs"} <= set(plain)


def test_all_promised_rows_exist():
    assert list(DEFINITIONS) == [f"N{i}" for i in range(1, 12)]


@pytest.mark.parametrize("arguments", [
    ["--only", "N12"], ["--scale", "0"], ["--scale", "2"], ["--runs", "0"], ["--nonsense"],
])
def test_a_wrong_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)

    assert exit_.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_an_empty_only_means_all_rows():
    assert cli._parsed(["--only", ""]).ids == list(DEFINITIONS)


# -- the load generator --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nas(tmp_path_factory) -> Iterator[tuple[Export, Path]]:
    work_dir = tmp_path_factory.mktemp("nas")
    (work_dir / "tree" / "sub" / "dir").mkdir(parents=True)
    with running_nas(work_dir / "nas", {"/e": work_dir / "tree"}) as server:
        yield Export(server.port, server.mount_port, "/e"), work_dir / "tree"


def test_contents_are_checked_wherever_they_are_read(nas):
    export, tree = nas
    fill(tree, name="a%ld", files=3, bytes=(1 << 20) + 4099)
    same = {"name": "a%ld", "files": 3, "bytes": (1 << 20) + 4099, "io": 300_000}

    assert run_load(export, "read", verify=2, window=3, **same).bytes == 3 * ((1 << 20) + 4099)
    with pytest.raises(LoadFailed, match="wrong"):
        run_load(export, "read", seed=2, **same)

    with (tree / "a1").open("r+b") as file:
        file.seek(70_001)
        byte = file.read(1)
        file.seek(70_001)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(LoadFailed, match="wrong"):
        run_load(export, "read", verify=2, **same)
    with pytest.raises(LoadFailed, match="a1 differs"):
        check(tree, name="a%ld", files=3, bytes=(1 << 20) + 4099)


def test_a_shorter_or_longer_file_than_expected_is_noticed(nas):
    export, tree = nas
    fill(tree, name="s", bytes=5000)

    for expected in (4999, 5001):
        with pytest.raises(LoadFailed):
            check(tree, name="s", bytes=expected)
    with pytest.raises(LoadFailed):
        run_load(export, "read", name="s", bytes=9000, io=1000)


def test_what_is_written_by_several_clients_is_on_the_disk(nas):
    export, tree = nas
    written = {"dir": "sub/dir", "name": "w%ld", "files": 7, "bytes": 123_457}

    result = run_load(
        export, "write", clients=3, files_at_once=2, window=2, io=10_000, **written)

    assert result.bytes == 7 * 123_457
    assert result.operations == 7 * (1 + 13 + 1)
    check(tree / "sub" / "dir", name="w%ld", files=7, bytes=123_457)

    run_load(export, "remove", dir="sub/dir", name="w%ld", files=7, clients=2)
    assert os.listdir(tree / "sub" / "dir") == []


def test_every_client_reads_everything_when_told_so(nas):
    export, tree = nas
    fill(tree, name="e%ld", files=2, bytes=10_000)

    result = run_load(export, "read", name="e%ld", files=2, bytes=10_000, clients=5, each=1)

    assert result.bytes == 5 * 2 * 10_000


def test_metadata_operations_count_calls_and_names(nas):
    export, tree = nas
    (tree / "m").mkdir()
    fill(tree / "m", files=50, bytes=0)

    for operation in ("getattr", "lookup"):
        result = run_load(
            export, operation, dir="m", files=50, clients=3, files_at_once=4, repeats=3)
        assert result.operations == 150
    assert run_load(export, "readdirplus", dir="m", repeats=2).entries == 100


def test_an_error_of_the_server_fails_the_load_with_its_status(nas):
    export, _ = nas

    with pytest.raises(LoadFailed, match="last status 2"):
        run_load(export, "lookup", name="absent")
    with pytest.raises(LoadFailed, match="status 2"):
        run_load(export, "lookup", dir="absent")


def test_progress_is_told_while_a_load_runs(nas):
    export, tree = nas
    fill(tree, name="p", bytes=64 << 20)
    told: list[int] = []

    while not told:  # A machine may read 64 MiB before the first tenth of a second is over.
        result = run_load(export, "read", name="p", bytes=64 << 20, window=1, io=65536,
                          on_progress=told.append)

    assert told == sorted(told)
    assert told[-1] <= result.bytes


# -- the rows, tiny, with a Ganesha instead of a node ---------------------------------------------


class StandIn:
    """Exports the core filer's directory itself: no cache, no link."""

    def __init__(self, export: Export, pid: int) -> None:
        self.export = export
        self.volume_server_pid = os.getpid()
        self.nfs_server_pid = pid
        self.commands: list[tuple[str, ...]] = []

    def filer(self, *arguments: str) -> str:
        self.commands.append(arguments)
        return ""

    def upcalls(self) -> dict[str, int]:
        return {"lookup": 5}

    def core_read_bytes(self) -> int:
        return 0


@pytest.mark.parametrize("row_id", list(DEFINITIONS))
def test_a_row_measures_ours_and_the_baseline_and_cleans_up(row_id, tmp_path):
    @contextmanager
    def start_node(work_dir: Path, *, core: str, settings: dict[str, str]) -> Iterator[StandIn]:
        work_dir.mkdir()
        with running_nas(work_dir, {"/shows": tmp_path / "work" / "core"}) as server:
            yield StandIn(Export(server.port, server.mount_port, "/shows"), server.pid)

    said: list[str] = []
    rig = Rig(tmp_path / "work", scale=0.001, runs=2, start_node=start_node, say=said.append)

    measured = DEFINITIONS[row_id].run(rig)

    assert measured.measures
    assert all(len(m.baseline) in (0, 2) for m in measured.measures)
    assert all(value >= 0 for m in measured.measures for value in m.ours + m.baseline)
    assert said
    assert not (tmp_path / "work").exists()
    Console(quiet=True).print(Report([measured]).table())
