"""The NFS server's configuration, and the identifiers in every NFS handle."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filer.settings import NodeSettings
from filer.supervisor import ganesha

RECOVERY = Path("/ssd/cache/nfs-recovery")


def settings(*volumes, **nfs):
    return NodeSettings.model_validate({
        "cache_dir": "/ssd/cache", "nfs": nfs,
        "volumes": [{"name": "shows", "core": "nfs://nas/shows", "junction": "/shows", **volume}
                    for volume in volumes or ({},)]})


def rendered(node):
    return ganesha.render(
        node, [(v, Path("/run/filer/mounts") / v.name) for v in node.volumes], RECOVERY)


def blocks(text, name):
    """The bodies of the blocks called *name*, as {key: value}."""
    stripped = re.sub(r"#.*", "", text)
    bodies = re.findall(rf"\b{name} \{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}", stripped)
    return [dict(re.findall(r"(\w+) = ([^;]*);", body)) for body in bodies]


def test_attributes_are_never_served_from_ganeshas_own_cache():
    (defaults,) = blocks(rendered(settings()), "EXPORT_DEFAULTS")

    assert defaults["Attr_Expiration_Time"] == "0"


def test_a_volume_is_exported_under_its_junction_for_both_protocols():
    (export,) = blocks(rendered(settings({"junction": "/prod/shows", "export_id": 7})), "EXPORT")

    assert export["Export_Id"] == "7"
    assert export["Path"] == '"/run/filer/mounts/shows"'
    assert export["Pseudo"] == '"/prod/shows"'
    assert export["Protocols"] == "3, 4"
    assert "Mount_Path_Pseudo = true;" in rendered(settings())


def test_whom_no_rule_names_has_no_access():
    text = rendered(settings({"clients": [{"clients": "10.0.0.0/8"}]}))

    before_rules = text[text.index("EXPORT {"):text.index("CLIENT {")]
    assert "Access_Type = None;" in before_rules


def test_client_rules_keep_their_order_and_their_squash():
    text = rendered(settings({"clients": [
        {"clients": "10.1.2.3", "access": "rw", "squash": "none"},
        {"clients": "10.0.0.0/8", "access": "rw", "squash": "root",
         "anonymous_uid": 99, "anonymous_gid": 98},
        {"clients": "fd00::/8", "access": "ro", "squash": "all"},
    ]}))

    rules = [(c["Clients"], c["Access_Type"], c["Squash"], c["Anonymous_Uid"], c["Anonymous_Gid"])
             for c in blocks(text, "CLIENT")]
    assert rules == [
        ("10.1.2.3", "RW", "No_Root_Squash", "65534", "65534"),
        ("10.0.0.0/8", "RW", "Root_Squash", "99", "98"),
        ("fd00::/8", "RO", "All_Squash", "65534", "65534"),
    ]


@pytest.mark.parametrize(("clients", "shown"), [
    ("0.0.0.0/0", "0.0.0.0/1, 128.0.0.0/1"),  # Ganesha's parser takes "0.0.0.0/0" for a path
    ("::/0", "::/1, 8000::/1"),
    ("10.9.8.7/8", "10.0.0.0/8"),
    ("192.168.1.1/32", "192.168.1.1"),
])
def test_networks_are_written_as_ganesha_reads_them(clients, shown):
    (rule,) = blocks(rendered(settings({"clients": [{"clients": clients}]})), "CLIENT")

    assert rule["Clients"] == shown


def test_locks_and_lease_follow_the_settings():
    text = rendered(settings(locks=False, lease_s=20, port=12049))

    (core,), (v4,) = blocks(text, "NFS_CORE_PARAM"), blocks(text, "NFSV4")
    assert (core["Enable_NLM"], core["NFS_Port"]) == ("false", "12049")
    assert (v4["Lease_Lifetime"], v4["Grace_Period"]) == ("20", "20")
    assert v4["RecoveryRoot"] == f'"{RECOVERY}"'


def test_export_ids_are_the_positions_unless_given():
    node = settings({}, {"name": "plates", "junction": "/plates"},
                    {"name": "cg", "junction": "/cg", "export_id": 77})

    assert [e["Export_Id"] for e in blocks(rendered(node), "EXPORT")] == ["1", "2", "77"]


def test_the_fsid_is_what_it_was_in_the_first_release():
    """Every NFS handle that clients hold contains it."""
    (volume,) = settings().volumes

    assert ganesha.fsid(volume) == ganesha.Fsid(0x68ece03c, 0x826e7763)


def test_volumes_have_different_fsids_whatever_else_is_equal():
    node = settings({}, {"name": "shows2", "junction": "/b"},
                    {"name": "plates", "core": "nfs://nas/plates", "junction": "/c"})

    assert len({ganesha.fsid(v) for v in node.volumes}) == 3


def test_the_preloaded_library_is_told_each_mount_and_its_fsid():
    text = ganesha.fsid_environment([
        (Path("/run/filer/mounts/a"), ganesha.Fsid(0xA, 0xB)),
        (Path("/run/filer/mounts/b"), ganesha.Fsid(1, 2))])

    assert text == "/run/filer/mounts/a=0xa:0xb,/run/filer/mounts/b=0x1:0x2"


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31))
def test_two_starts_never_share_an_epoch(now_s, previous):
    epoch = ganesha.next_epoch(now_s, previous)

    assert epoch != previous
    assert 0 <= epoch < 2**32


def test_a_start_in_the_same_second_or_after_the_clock_went_back_is_newer():
    assert ganesha.next_epoch(1000, 1000) == 1001
    assert ganesha.next_epoch(10, 1001) == 1002
    assert ganesha.next_epoch(5000, 1001) == 5000


LOG = """\
21/11/2026 01:56:04 : epoch 0012d687 : vm : nfs-ganesha-8308[main] main :MAIN :EVENT :nfs-ganesha Starting: Ganesha Version 4.3
21/11/2026 01:56:04 : epoch 0012d687 : vm : nfs-ganesha-8308[main] gsh_dbus_pkginit :DBUS :CRIT :dbus_bus_get failed (Failed to connect)
21/11/2026 01:56:04 : epoch 0012d687 : vm : nfs-ganesha-8308[main] __Register_program :DISP :MAJ :Cannot register NFS V3 on TCP
21/11/2026 01:56:04 : epoch 0012d687 : vm : nfs-ganesha-8308[main] gsh_dbus_thread :DBUS :CRIT :DBUS not initialized
"""  # noqa: E501


BAD_CONFIG = """\
… : vm : ganesha.nfsd-31337[main] main :NFS STARTUP :CRIT :Error setting parameters.
… : vm : ganesha.nfsd-31337[main] config_errs_to_log :CONFIG :CRIT :Config File (x:3): No IP address
… : vm : ganesha.nfsd-31337[main] config_errs_to_log :CONFIG :CRIT :Config File (x:1): 1 errors
… : vm : ganesha.nfsd-31337[main] main :NFS STARTUP :FATAL :Fatal errors.  Server exiting...
"""


def test_of_a_bad_configuration_the_precise_line_is_taken():
    assert ganesha.last_complaint(BAD_CONFIG) == "Config File (x:3): No IP address"


def test_the_reason_of_an_end_is_taken_from_ganeshas_log():
    assert ganesha.last_complaint(LOG) == "Cannot register NFS V3 on TCP"
    assert ganesha.last_complaint("") == ""
    assert ganesha.last_complaint("nonsense\n\n") == ""
