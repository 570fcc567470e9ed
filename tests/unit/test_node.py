"""The supervisor with the real NFS server, over fake volumes."""

import json
import os
import select
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

from filer.admin.client import NotRunning, call_sync
from filer.supervisor import ganesha
from filer.supervisor.claim import mounts_below
from tests.support import nfs3
from tests.support.fake_node import FakeNode

pytestmark = pytest.mark.nfs


@pytest.fixture
def node_of(tmp_path):
    nodes = []

    def make(*volumes, directory="node", **settings):
        (tmp_path / directory).mkdir(exist_ok=True)
        node = FakeNode(tmp_path / directory, *volumes, **settings)
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.clean_up()


def nfs_root(node, junction: str) -> bytes:
    """The handle that a client gets when it mounts *junction*; NfsError if it may not."""
    return nfs3.mount("127.0.0.1", node.mount_port, junction)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_node_starts_serves_and_stops_leaving_nothing(node_of):
    node = node_of("shows", "plates")
    node.start()
    node.wait_serving()

    status = node.status()
    assert (status["health"], status["reasons"]) == ("green", [])
    assert {c["name"]: c["state"] for c in status["children"]} == {
        "keeper": "running", "volume server": "running", "nfs server": "running"}
    assert node.nfs_answers()
    assert ganesha.last_complaint((node.run_dir / "ganesha.log").read_text()) == ""
    pids = [c["pid"] for c in status["children"]]

    node.signal(signal.SIGTERM)

    assert node.wait() == 0
    assert not any(is_alive(pid) for pid in pids)
    assert mounts_below(node.run_dir) == []
    assert not node.socket.exists()
    for volume in ("shows", "plates"):
        assert [e for e in node.events() if e.startswith(volume)] == [
            f"{volume} start", f"{volume} stop keep_dirty=False", f"{volume} end"]


def test_the_nfs_server_stops_before_dirty_data_is_written_back(node_of):
    node = node_of("shows")
    (node.fake / "shows.stuck").touch()
    node.start()
    node.wait_serving()
    nfs_server = node.child("nfs server")["pid"]

    node.signal(signal.SIGTERM)
    node.wait_status(lambda s: "shows stop keep_dirty=False" in node.events())

    assert not is_alive(nfs_server)
    assert not node.nfs_answers()


def test_a_second_signal_leaves_the_rest_in_the_log(node_of):
    node = node_of("shows")
    (node.fake / "shows.stuck").touch()
    node.start()
    node.wait_serving()
    node.signal(signal.SIGTERM)
    node.wait_status(lambda s: "shows stop keep_dirty=False" in node.events())

    node.signal(signal.SIGINT)

    assert node.wait() == 0
    said = node.wait_logged("dirty data stays in the write-behind log until the next start")
    assert (said["volume"], said["dirty_bytes"]) == ("shows", 9)
    assert node.events()[-2:] == ["shows stop keep_dirty=True", "shows end"]


def test_keep_dirty_does_not_flush_at_stop(node_of):
    node = node_of("shows")
    node.start("--keep-dirty")
    node.wait_serving()

    node.signal(signal.SIGTERM)

    assert node.wait() == 0
    assert "shows stop keep_dirty=False" not in node.events()
    assert "shows stop keep_dirty=True" in node.events()


def test_a_killed_nfs_server_is_started_again_and_the_mount_is_left_alone(node_of):
    node = node_of("shows")
    node.start()
    node.wait_serving()
    before = node.child("nfs server")

    os.kill(before["pid"], signal.SIGKILL)
    status = node.wait_status(lambda s: any(
        c["name"] == "nfs server" and c["restarts"] == 1 and c["state"] == "running"
        for c in s["children"]))

    assert node.nfs_answers()
    assert status["health"] == "yellow"
    assert "killed by SIGKILL" in status["reasons"][0]["text"]
    assert node.events() == ["shows start"]


def test_a_killed_keeper_is_started_again_and_the_nfs_server_follows(node_of):
    node = node_of("shows")
    node.start()
    node.wait_serving()
    before = {name: node.child(name, volume)["pid"]
              for name, volume in (("keeper", "shows"), ("nfs server", ""))}

    os.kill(before["keeper"], signal.SIGKILL)
    status = node.wait_status(lambda s: all(
        c["restarts"] == 1 and c["state"] == "running"
        for c in s["children"] if c["name"] in before))

    assert node.nfs_answers()
    assert [str(p) for p in mounts_below(node.run_dir)] == [str(node.run_dir / "mounts/shows")]
    reasons = " ".join(r["text"] for r in status["reasons"])
    assert "the mount of volume shows was lost" in reasons


def test_a_volume_that_comes_late_is_exported_when_it_serves(node_of):
    node = node_of("shows", "late")
    os.mkfifo(node.fake / "late.late")
    node.start("--no-patience")
    node.wait_serving()
    config = node.run_dir / "ganesha.conf"
    assert '"/late"' not in config.read_text()

    (node.fake / "late.late").write_text("go\n")
    node.wait_logged("volumes that came late are exported")

    assert nfs_root(node, "/late")


def test_a_volume_that_cannot_start_stops_the_node_with_its_reason(node_of):
    node = node_of("shows", "bad")
    (node.fake / "bad.misconfigured").touch()
    node.start()

    assert node.wait() == 64
    told = [line for line in node.raw_log if line.startswith("REFUSED")]
    assert len(told) == 1
    assert "volume bad" in told[0]
    assert "the disk is upside down" in told[0]
    assert mounts_below(node.run_dir) == []


@pytest.mark.parametrize("shared", ["cache_dir", "run_dir"])
def test_a_second_node_on_the_same_directory_is_refused_and_the_first_unharmed(node_of, shared):
    first = node_of("shows", directory="first")
    first.start()
    first.wait_serving()
    second = node_of("shows", directory="second",
                     **{shared: str(getattr(first.settings, shared))})

    second.start()

    assert second.wait() == 64
    assert f"{shared} {getattr(first.settings, shared)} is in use" in "".join(second.raw_log)
    assert f"pid {first.process.pid}" in "".join(second.raw_log)
    assert first.status()["health"] == "green"
    assert first.nfs_answers()
    second.process = None  # its directories are the first one's: nothing of it to clean up
    second.clean_up = lambda: None


def test_what_a_killed_node_left_is_removed_by_the_next(node_of):
    node = node_of("shows")
    node.start()
    node.wait_serving()
    keeper = node.child("keeper", "shows")["pid"]
    nfs_server = node.child("nfs server")["pid"]
    node.signal(signal.SIGKILL)
    node.process.wait()
    assert is_alive(keeper)

    node.log.clear()
    node.start()
    node.wait_serving()

    assert not is_alive(keeper)
    assert not is_alive(nfs_server)
    assert node.status()["health"] == "green"
    assert len(mounts_below(node.run_dir)) == 1


def test_a_taken_port_is_refused_by_its_key(node_of):
    first = node_of("shows", directory="first")
    first.start()
    first.wait_serving()
    nfs = first.settings.nfs.model_dump()
    second = node_of("shows", directory="second", nfs=nfs)

    second.start()

    assert second.wait() == 64
    assert f"nfs.port {first.port} on 127.0.0.1 cannot be used" in "".join(second.raw_log)


def test_health_follows_what_the_volumes_say(node_of):
    node = node_of("shows")
    (node.fake / "shows.status").write_text(
        '{"core_reachable": false, "core_unreachable_s": 12.0, "core_reason": "timed out"}')
    node.start()
    node.wait_serving()

    status = node.status()

    assert status["health"] == "red"
    assert status["reasons"] == [{
        "level": "red", "volume": "shows",
        "text": "the core filer does not answer for 12 s: timed out"}]


def test_verbs_reach_the_volume_that_a_path_belongs_to(node_of):
    node = node_of("shows", "plates")
    node.start()
    node.wait_serving()

    answer = call_sync(node.socket, "flush", {"path": "/plates/a//b"})
    call_sync(node.socket, "warm", {"paths": ["/shows/x", "/plates", "/shows/y"],
                                    "rate_bytes_s": 50})

    assert (answer["path"], answer["files"]) == ("/plates/a//b", 2)
    assert node.events()[2:] == [
        "plates flush 'a/b'", "shows warm ['x', 'y'] rate=50", "plates warm [''] rate=50"]


def test_metrics_of_all_volumes_are_on_one_page_with_their_volume(node_of):
    node = node_of("shows", "plates")
    node.start()
    node.wait_serving()

    page = urllib.request.urlopen(f"http://127.0.0.1:{node.metrics_port}/metrics").read().decode()

    assert 'filer_upcalls_total{operation="lookup",volume="plates"} 7.0' in page
    assert 'filer_upcalls_total{operation="lookup",volume="shows"} 7.0' in page
    assert page.count("# TYPE filer_upcalls_total counter") == 1
    assert "filer_health 0.0" in page
    assert 'filer_child_restarts_total{child="nfs_server",volume=""} 0.0' in page


def test_the_nfs_server_dies_with_its_supervisor(node_of):
    node = node_of("shows")
    node.start()
    node.wait_serving()
    nfs_server = node.child("nfs server")["pid"]
    pidfd = os.pidfd_open(nfs_server)

    node.signal(signal.SIGKILL)
    node.process.wait()

    assert select.select([pidfd], [], [], 30)[0] == [pidfd]
    os.close(pidfd)
    with pytest.raises(NotRunning):
        node.status()


def test_a_node_can_be_stopped_while_it_still_waits_for_its_volume(node_of):
    node = node_of("shows")
    os.mkfifo(node.fake / "shows.late")
    node.start()
    node.wait_status(lambda s: "shows start" in node.events())

    status = node.status()
    node.signal(signal.SIGTERM)

    assert (status["phase"], status["health"]) == ("starting", "red")
    assert node.wait() == 0
    assert mounts_below(node.run_dir) == []


def test_an_nfs_server_that_hangs_is_killed_and_started_again(node_of):
    node = node_of("shows")
    node.start("--no-patience")
    node.wait_serving()
    hung = node.child("nfs server")["pid"]

    os.kill(hung, signal.SIGSTOP)
    node.wait_status(lambda s: s["children"][-1]["restarts"] == 1
                     and s["children"][-1]["state"] == "running")

    assert "it hung" in node.child("nfs server")["last_exit"]
    assert not is_alive(hung)
    assert node.nfs_answers()


def test_handles_are_the_same_after_the_whole_node_was_restarted(node_of):
    node = node_of("shows", "plates")
    node.start()
    node.wait_serving()
    before = [nfs_root(node, junction) for junction in ("/shows", "/plates")]
    node.signal(signal.SIGTERM)
    assert node.wait() == 0

    node.log.clear()
    node.start()
    node.wait_serving()

    assert [nfs_root(node, junction) for junction in ("/shows", "/plates")] == before
    assert before[0] != before[1]


def test_client_rules_decide_who_may_mount_and_how(node_of):
    def volume(name, *rules):
        return {"name": name, "core": f"file:///nowhere/{name}", "junction": f"/{name}",
                "clients": rules}

    everyone = {"clients": "0.0.0.0/0"}
    node = node_of("open", "ro", "first", "closed", volumes=[
        volume("open", everyone),
        volume("ro", {"clients": "127.0.0.0/8", "access": "ro"}, everyone),
        volume("first", {"clients": "127.0.0.1", "squash": "root", "anonymous_uid": 99},
               everyone),
        volume("closed", {"clients": "10.0.0.0/8"}),
    ])
    for name in ("open", "ro", "first", "closed"):
        os.chmod(node.fake / "data" / name, 0o777)
    node.start()
    node.wait_serving()

    with nfs3.Nfs3("127.0.0.1", node.port) as client:
        created = client.create(nfs_root(node, "/open"), "x")
        assert created.attributes.uid == 0
        with pytest.raises(nfs3.NfsError, match="ROFS"):
            client.create(nfs_root(node, "/ro"), "x")
        squashed = client.create(nfs_root(node, "/first"), "x")
        assert squashed.attributes.uid == 99
    with pytest.raises(nfs3.NfsError, match="ACCES"):
        nfs_root(node, "/closed")


OWN_NETWORK = ("unshare", "--net", "--mount", "sh", "-c", """
    ip link set lo up && ip address add 192.0.2.1/24 dev lo  # an address that is not loopback:
    mount -t tmpfs none /run && mount -t tmpfs none /var/lib/nfs  # else none counts as configured
    mkdir /var/lib/nfs/sm /var/lib/nfs/sm.bak && exec "$@"
    """, "sh")


def test_rpcbind_and_statd_are_started_where_nobody_runs_them_and_stopped_at_the_end(node_of):
    node = node_of("shows")
    nfs = node.settings.nfs.model_copy(update={"locks": True})
    node.settings = node.settings.model_copy(update={"nfs": nfs})
    node.start(inside=OWN_NETWORK)
    node.wait_serving()

    children = {c["name"]: c for c in node.status()["children"]}
    registered = subprocess.run(
        ["nsenter", "--net", "--mount", f"--target={node.process.pid}", "rpcinfo", "-p"],
        capture_output=True, text=True, check=True).stdout

    assert children["rpcbind"]["state"] == children["statd"]["state"] == "running"
    programs = {int(line.split()[0]) for line in registered.splitlines()[1:]}
    assert {100000, 100003, 100005, 100021, 100024} <= programs  # …, NFS, MOUNT, NLM, statd
    node.signal(signal.SIGTERM)
    assert node.wait() == 0
    assert not any(is_alive(children[name]["pid"]) for name in ("rpcbind", "statd"))


def test_a_run_directory_behind_a_symbolic_link_works(node_of, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    node = node_of("shows", run_dir=str(tmp_path / "link" / "run"))
    node.run_dir = tmp_path / "link" / "run"
    node.start()
    node.wait_serving()

    assert node.status()["health"] == "green"
    config = json.loads((node.run_dir / "node.json").read_text())
    assert config["run_dir"] == str(tmp_path / "real" / "run")
