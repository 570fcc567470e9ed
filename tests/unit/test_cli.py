"""The command line: what it asks the node, what it prints, and how it ends."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
import trio
from click.testing import CliRunner

from filer import __version__
from filer.admin.protocol import Progress
from filer.admin.reports import (
    ChildStatus,
    EvictReport,
    Explanation,
    FlushReport,
    NodeStatus,
    NodeTop,
    Reason,
    TopSample,
    VolumeReport,
    VolumeStatus,
    WarmFailure,
    WarmReport,
)
from filer.admin.server import serve_admin
from filer.cli import filer
from filer.errors import Refused, TryAgain

VERBS = ["serve", "status", "top", "warm", "flush", "evict", "explain", "check-config"]


def invoke(*arguments, **options):
    """The command as typed; standard output and standard error apart."""
    return CliRunner().invoke(filer, [str(a) for a in arguments], **options)


@pytest.fixture
def node(tmp_path):
    """A node's socket, answered by handlers that a test sets; ``asked`` is what it was asked."""
    class Node:
        run_dir = tmp_path
        asked: list = []  # noqa: RUF012
        answers: dict = {}  # noqa: RUF012

        def run(self, verb, *arguments, **options):
            return invoke(verb, "--run-dir", self.run_dir, *arguments, **options)

    stub = Node()
    stub.asked, stub.answers = [], {}

    def handler(verb):
        async def answer(arguments, report):
            stub.asked.append((verb, arguments))
            found = stub.answers[verb]
            found = found.pop(0) if isinstance(found, list) else found
            if isinstance(found, Exception):
                raise found
            report(Progress(1, 2))
            return msgspec.to_builtins(found)
        return answer

    started = threading.Event()
    stop = []

    async def serve():
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda *, task_status: serve_admin(
                tmp_path / "node.sock", {verb: handler(verb) for verb in VERBS},
                task_status=task_status))
            stop.append((trio.lowlevel.current_trio_token(), nursery.cancel_scope.cancel))
            started.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert started.wait(30)
    yield stub
    token, cancel = stop[0]
    token.run_sync_soon(cancel)
    thread.join()


# -- help and usage --------------------------------------------------------------------------------


def test_the_version_is_told():
    assert invoke("--version").output == f"filer, version {__version__}\n"


def test_help_names_every_verb():
    output = invoke("--help").output

    assert all(f"\n  {verb} " in output for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verbs_help_has_examples_and_describes_every_option(verb):
    result = invoke(verb, "--help")

    assert result.exit_code == 0
    assert f"filer {verb}" in result.output.partition("Examples:")[2]
    command = filer.commands[verb]
    assert all(p.help for p in command.params if p.param_type_name == "option")


@pytest.mark.parametrize("verb", ["status", "top", "warm", "flush", "evict", "explain"])
def test_every_reader_has_json(verb):
    assert "--json" in invoke(verb, "--help").output


@pytest.mark.parametrize(("arguments", "told"), [
    (["statsu"], "no such command 'statsu'; did you mean 'status'?"),
    (["zzz"], "no such command 'zzz'"),
    (["status", "--jsn"], "No such option"),
    (["flush"], "Missing argument 'PATH'"),
    (["warm", "/a", "--rate", "fast"], "'fast': must be a number of bytes"),
    (["warm", "/a", "--rate", "0"], "must be more than 0"),
    (["warm"], "name a PATH or a --manifest"),
    (["top", "--interval", "0"], "0.0 is not in the range"),
    (["serve"], "name a core filer URL"),
    (["serve", "nfs://a/b", "--config", "x"], "URL cannot be combined with --config"),
    (["serve", "--policy", "full", "--config", "x"], "--policy cannot be combined with --config"),
])
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(arguments, told):
    result = invoke(*arguments)

    assert result.exit_code == 2
    assert told in result.stderr


# -- finding the node ------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    ["status"], ["top"], ["warm", "/a"], ["flush", "/a"], ["evict", "/a"], ["explain", "/a"]])
def test_without_a_node_the_exit_status_is_69_with_a_way_out(arguments, tmp_path):
    result = invoke(*arguments, "--run-dir", tmp_path)

    assert result.exit_code == 69
    first, second = result.stderr.splitlines()
    assert f"nothing answers at {tmp_path}/node.sock" in first
    assert "filer serve" in second
    assert result.stdout == ""


def test_the_node_is_found_by_socket_run_dir_or_environment(node, tmp_path):
    node.answers["evict"] = EvictReport("/a")
    ways = [(["--socket", tmp_path / "node.sock"], {}), (["--run-dir", tmp_path], {}),
            ([], {"FILER_RUN_DIR": str(tmp_path)})]

    assert [invoke("evict", "/a", *where, env=env).exit_code for where, env in ways] == [0, 0, 0]


# -- verbs -----------------------------------------------------------------------------------------

STATUS = NodeStatus(
    node="n1", version="1", pid=7, phase="serving", uptime_s=7300.0, health="red",
    reasons=[Reason("red", "shows", "the core filer does not answer")], nfs="0.0.0.0:2049",
    volumes=[
        VolumeReport("shows", "/shows", "nfs://nas/shows", "full", VolumeStatus(
            "shows", cache_bytes=3 << 20, cache_capacity_bytes=1 << 40, dirty_bytes=5 << 20,
            dirty_files=2, dirty_oldest_s=90.0)),
        VolumeReport("cg", "/cg", "nfs://nas/cg", "read", problem="it is not running"),
    ],
    children=[ChildStatus("nfs server", pid=99, restarts=3, last_exit="killed by SIGSEGV",
                          last_exit_age_s=10.0)])


def test_status_shows_health_reasons_volumes_and_processes(node):
    node.answers["status"] = STATUS

    result = node.run("status")

    assert result.exit_code == 0
    for words in ("● red", "shows: the core filer does not answer", "3.0 MiB of 1.0 TiB",
                  "5.0 MiB in 2", "90 s", "it is not running", "killed by SIGSEGV, 10 s ago"):
        assert words in result.output


def test_status_as_json_is_what_the_node_said(node):
    node.answers["status"] = STATUS

    assert msgspec.convert(json.loads(node.run("status", "--json").output), NodeStatus) == STATUS


@pytest.mark.parametrize(("health", "exit_code"), [("green", 0), ("yellow", 1), ("red", 1)])
def test_status_check_fails_unless_green(node, health, exit_code):
    node.answers["status"] = msgspec.structs.replace(STATUS, health=health)

    assert node.run("status", "--check").exit_code == exit_code


def test_flush_tells_what_is_durable(node):
    node.answers["flush"] = FlushReport("/shows/a", 3, 2 << 20, "It is on the NAS.")

    result = node.run("flush", "/shows/a")

    assert result.output == "/shows/a: 3 files, 2.0 MiB flushed\nIt is on the NAS.\n"
    assert node.asked == [("flush", {"path": "/shows/a"})]


def test_evict_tells_what_stays(node):
    node.answers["evict"] = EvictReport("/shows/a", 3, 2 << 20, kept_dirty_bytes=1 << 20)

    assert "2.0 MiB of 3 files evicted; 1.0 MiB are dirty and stay" in (
        node.run("evict", "/shows/a").output)


def test_explain_tells_policy_pages_and_the_last_miss(node):
    node.answers["explain"] = Explanation(
        "/shows/a", inode=5, size=3 << 20, policy="full", policy_why="only ours",
        write_mode="behind", verify_s=None, write_back_s=600.0, last_verified_s=3.0,
        cached_bytes=1 << 20, cached_pages=1, total_pages=3, why_missed="evicted")

    output = node.run("explain", "/shows/a").output

    for words in ("full: only ours", "never", "3 s ago", "flushed within 10 min",
                  "1.0 MiB of 3.0 MiB (1 of 3 pages)", "evicted"):
        assert words in output


def test_names_of_any_bytes_reach_the_node_and_the_terminal(node):
    name = os.fsdecode(b"/shows/\xff\xe9")
    node.answers["flush"] = [FlushReport(name, 1, 1), FlushReport(name, 1, 1)]

    shown, as_json = node.run("flush", name), node.run("flush", name, "--json")

    assert node.asked[0] == ("flush", {"path": name})
    assert "/shows/\\xff\\xe9: 1 files" in shown.output
    assert json.loads(as_json.output)["path"] == name


def test_warm_asks_for_the_paths_at_the_rate(node):
    node.answers["warm"] = WarmReport(2, 5 << 20, 1 << 20)

    result = node.run("warm", "/shows/a", "/shows/b", "--rate", "50MiB/s")

    assert node.asked == [
        ("warm", {"paths": ["/shows/a", "/shows/b"], "rate_bytes_s": 50 << 20})]
    assert result.output == "2 files: 5.0 MiB fetched, 1.0 MiB were cached already\n"


@pytest.mark.parametrize(("content", "options", "paths"), [
    (b"/a\n/b c\n\n", [], ["/a", "/b c"]),
    (b"/a\0/b\nc\0", ["-0"], ["/a", "/b\nc"]),
    (b"/\xff\n", [], ["/\udcff"]),
])
def test_warm_reads_manifests(node, tmp_path, content, options, paths):
    manifest = tmp_path / "manifest"
    manifest.write_bytes(content)
    node.answers["warm"] = [WarmReport(), WarmReport()]

    node.run("warm", "--manifest", manifest, *options)
    node.run("warm", "--manifest", "-", *options, input=content)

    assert [arguments["paths"] for _, arguments in node.asked] == [paths, paths]


def test_warm_cuts_long_manifests_and_adds_the_answers(node, tmp_path):
    manifest = tmp_path / "manifest"
    manifest.write_text("".join(f"/a/{n}\n" for n in range(45_000)))
    node.answers["warm"] = [WarmReport(20_000, 1, 1), WarmReport(20_000, 1, 1),
                            WarmReport(5_000, 1, 1)]

    answer = json.loads(node.run("warm", "--json", "--manifest", manifest).output)

    assert [len(arguments["paths"]) for _, arguments in node.asked] == [20_000, 20_000, 5_000]
    assert (answer["files"], answer["bytes"]) == (45_000, 3)


def test_warm_fails_when_a_path_does_and_says_which(node):
    node.answers["warm"] = WarmReport(1, failed=[WarmFailure("/shows/x", "ENOENT")])

    result = node.run("warm", "/shows")

    assert result.exit_code == 1
    assert "filer: /shows/x: ENOENT" in result.stderr


def test_a_manifest_that_is_not_there_is_told(node):
    result = node.run("warm", "--manifest", "/nowhere")

    assert result.exit_code == 1
    assert result.stderr == "filer: /nowhere: No such file or directory\n"


def test_top_shows_rates_between_two_samples(node):
    def sample(time_s, lookups, read_bytes):
        return NodeTop("n1", "green", [TopSample(
            "shows", time_s, operations={"lookup": lookups},
            operation_seconds={"lookup": lookups / 1000}, read_bytes=read_bytes,
            hits={"pages": lookups}, misses={"pages": 0})])

    node.answers["top"] = [sample(10.0, 100, 0), sample(12.0, 300, 8 << 20)] * 2

    shown = node.run("top", "--interval", "0.1", "--count", "1")
    told = json.loads(node.run("top", "--interval", "0.1", "--count", "1", "--json").output)

    (rates,) = told["volumes"]
    assert (rates["operations_per_s"], rates["read_bytes_per_s"]) == (100.0, 4 << 20)
    assert rates["busiest"] == [{"operation": "lookup", "per_s": 100.0, "mean_s": 0.001}]
    for words in ("4.0 MiB", "100%", "lookup", "1.00 ms"):
        assert words in shown.output


def test_top_counts_from_zero_after_a_restart(node):
    def sample(time_s, lookups):
        return NodeTop("n1", "green", [TopSample("shows", time_s, operations={"lookup": lookups})])

    node.answers["top"] = [sample(10.0, 100), sample(12.0, 5)]

    told = json.loads(node.run("top", "--interval", "0.1", "--count", "1", "--json").output)

    assert told["volumes"][0]["operations_per_s"] == 0


@pytest.mark.parametrize(("error", "told"), [
    (Refused(2, "/shows/x"), "ENOENT (No such file or directory): /shows/x"),
    (TryAgain("the core filer does not answer"), "the core filer does not answer"),
    (RuntimeError("boom"), "RuntimeError: boom"),
])
def test_an_operation_that_fails_exits_with_1_and_no_traceback(node, error, told):
    node.answers["flush"] = error

    result = node.run("flush", "/shows/x")

    assert result.exit_code == 1
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 2


# -- configuration ---------------------------------------------------------------------------------

GOOD = """
cache_dir = "/ssd"
[[volumes]]
name = "shows"
core = "nfs://nas/shows"
junction = "/shows"
policy = "full"
"""


def test_check_config_shows_what_applies(tmp_path):
    path = tmp_path / "node.toml"
    path.write_text(GOOD)

    shown, told = invoke("check-config", path), invoke("check-config", "--json", path)

    assert shown.exit_code == 0
    for words in (f"{path}: good", "never", "behind, within 10 min", "50.0 GiB"):
        assert words in shown.output
    assert json.loads(told.output)["volumes"][0]["cache"]["high_water"] == 0.95


def test_a_configuration_that_cannot_work_exits_with_64_and_a_line_for_each_problem(tmp_path):
    path = tmp_path / "node.toml"
    path.write_text(GOOD.replace("full", "fast").replace("/ssd", "ssd"))

    for command in (["check-config", path], ["serve", "--config", path]):
        result = invoke(*command)
        assert result.exit_code == 64
        first, second = result.stderr.splitlines()
        assert first.startswith(f"filer: {path}: cache_dir: ")
        assert second.startswith(f'filer: {path}: volumes[0].policy: "fast" is not allowed; must')


@pytest.mark.parametrize(("arguments", "told"), [
    (["--export", "/s"], "--cache is missing"),
    (["--cache", "/c"], "--export is missing"),
    (["--cache", "c", "--export", "/s"], '--cache: "c" is not allowed; must be an absolute path'),
    (["--cache", "/c", "--export", "s"], '--export: "s" is not allowed; must be an absolute'),
    (["--cache", "/c", "--export", "/s", "--policy", "fast"],
     '--policy: "fast" is not allowed; must be one of clients-bypass'),
    (["--cache", "/c", "--export", "/s", "--nfs-port", "x"],
     '--nfs-port: "x" is not allowed; must be a whole number between 1 and 65535'),
    (["--cache", "/c", "--export", "/s", "--client", "10.0.0.0/99:ro"],
     '--client: "10.0.0.0/99" is not allowed; must be an IP address or a network'),
    (["--cache", "/c", "--export", "/s", "--cache-low-water", "0.99"],
     "low_water 0.99 must not be above high_water 0.95"),
])
def test_a_wrong_flag_is_told_by_its_name_value_and_what_is_allowed(arguments, told):
    result = invoke("serve", "nfs://nas/shows", *arguments)

    assert result.exit_code == 64
    (line,) = result.stderr.splitlines()
    assert told in line


def test_every_setting_is_a_flag(monkeypatch):
    started = []
    monkeypatch.setattr("filer.node.run_node", lambda settings, options: started.append(
        (settings, options)))

    result = invoke(
        "serve", "nfs://nas/shows", "--cache", "/ssd/cache", "--export", "/prod/Shows.2",
        "--policy", "full", "--verify-s", "9", "--cache-capacity-bytes", "1TiB",
        "--write-behind-dirty-bytes-max", "7GiB", "--read-ahead-sequence-files", "0",
        "--no-nfs-locks", "--nfs-lease-s", "20", "--node", "n7", "--metrics-port", "0",
        "--xattrs", "--client", "10.0.0.0/8:root", "--client", "fd00::/8:ro", "--keep-dirty")

    assert result.exit_code == 0, result.stderr
    ((settings, options),) = started
    (volume,) = settings.volumes
    assert (volume.name, volume.junction, volume.core) == (
        "prod-shows-2", "/prod/Shows.2", "nfs://nas/shows")
    assert (volume.verify_s, volume.xattrs) == (9, True)
    assert volume.cache.capacity_bytes == 1 << 40
    assert volume.write_behind.dirty_bytes_max == 7 << 30
    assert volume.read_ahead.sequence_files == 0
    assert (settings.node, settings.nfs.locks, settings.nfs.lease_s) == ("n7", False, 20)
    assert [(r.clients, r.access, r.squash) for r in volume.clients] == [
        ("10.0.0.0/8", "rw", "root"), ("fd00::/8", "ro", "none")]
    assert options.keep_dirty


def test_flags_for_the_node_override_the_file(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("filer.node.run_node", lambda settings, options: started.append(settings))
    path = tmp_path / "node.toml"
    path.write_text(GOOD)

    assert invoke("serve", "--config", path, "--nfs-port", "12049").exit_code == 0
    assert started[0].nfs.port == 12049
    assert started[0].volumes[0].policy == "full"


def test_the_installed_command_runs_and_leaves_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "filer", "status", "--run-dir", str(tmp_path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)

    assert done.returncode == 69
    assert "Traceback" not in done.stderr
