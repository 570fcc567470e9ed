"""A configuration is right, or the operator is told what is wrong with which key."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filer.cli.configuration import ConfigurationError, load, validated
from filer.policies import POLICIES
from filer.settings import GIB, MIB, NodeSettings, parse_bytes

MINIMAL = """
cache_dir = "/ssd/cache"
[[volumes]]
name = "shows"
core = "nfs://10.0.0.5/shows"
junction = "/shows"
"""


def checked(text: str) -> NodeSettings:
    return validated(tomllib.loads(text), source="node.toml")


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        checked(text)
    return caught.value.problems


def test_the_smallest_configuration_is_complete():
    settings = checked(MINIMAL)

    (volume,) = settings.volumes
    assert volume.policy == "clients-bypass"
    assert settings.export_id(volume) == 1
    assert settings.nfs.port == 2049


def test_children_read_back_what_the_supervisor_validated():
    settings = checked(MINIMAL + "verify_s = 7\ncache.capacity_bytes = '1.5 GiB'")

    assert NodeSettings.model_validate_json(settings.model_dump_json()) == settings


def test_overrides_change_the_effective_policy_only():
    (volume,) = checked(MINIMAL + "policy = 'full'\nverify_s = 7").volumes

    assert volume.effective_policy.verify_s == 7
    assert volume.effective_policy.write_back_s == POLICIES["full"].write_back_s
    assert POLICIES["full"].verify_s is None


@pytest.mark.parametrize(("text", "count"), [
    ("0", 0), ("17", 17), ("1.5 GiB", 3 * GIB // 2), ("64k", 65536), ("2M", 2 * MIB),
    (" 3 tib ", 3 << 40),
])
def test_byte_counts_take_the_usual_units(text, count):
    assert parse_bytes(text) == count


# Each: what stands in the file, and what the line of the error must contain.
NODE_MISTAKES = [
    ('cache_dir = "ssd"', 'cache_dir: "ssd" is not allowed; must be an absolute path'),
    ("cache_dir = 7", "cache_dir: 7 is not allowed; must be a string"),
    ('run_dir = "run"', 'run_dir: "run" is not allowed; must be an absolute path'),
    ('run_dir = "/run/a,b"', "run_dir: \"/run/a,b\" is not allowed; must be an absolute path"),
    ('node = "a b"', 'node: "a b" is not allowed; must be 1 to 63 of letters, digits and . _ -'),
    ("metrics_port = 70000", "metrics_port: 70000 is not allowed; must be between 0 and 65535"),
    ('metrics_bind = "here"', 'metrics_bind: "here" is not allowed; must be an IP address'),
    ('log_level = "loud"',
     'log_level: "loud" is not allowed; must be one of debug, info, warning, error'),
    ('log_format = "xml"', 'log_format: "xml" is not allowed; must be one of console, json'),
    ('cach_dir = "/x"', 'cach_dir is not a known key; did you mean "cache_dir"?'),
    ("zzz = 1", "zzz is not a known key; must be one of cache_dir, log_format"),
    ("nfs = 3", "nfs: 3 is not allowed; must be a table"),
    ("nfs.port = 0", "nfs.port: 0 is not allowed; must be between 1 and 65535"),
    ("nfs.port = 'nfs'", 'nfs.port: "nfs" is not allowed; must be a whole number between 1 and'),
    ("nfs.port = true", "nfs.port: true is not allowed; must be a number"),
    ("nfs.port = 20.5", "nfs.port: 20.5 is not allowed; must be a whole number between 1 and"),
    ("nfs.mount_port = 2049", "nfs: port 2049, mount_port 2049 and nlm_port 32803 must be three"),
    ("nfs.locks = 'maybe'", 'nfs.locks: "maybe" is not allowed; must be true or false'),
    ("nfs.rpcbind = false", "nfs: rpcbind = false needs locks = false"),
    ("nfs.lease_s = 1", "nfs.lease_s: 1 is not allowed; must be between 5 and 300"),
    ("nfs.bind = 'eth0'", 'nfs.bind: "eth0" is not allowed; must be an IP address of this host'),
    ("nfs.lock = true", 'nfs.lock is not a known key; did you mean "locks"?'),
]

VOLUME_MISTAKES = [
    ('name = "Shows"', 'name: "Shows" is not allowed; must be 1 to 31 of a-z, 0-9 and -'),
    ('name = ""', 'name: "" is not allowed; must be 1 to 31'),
    ('core = "10.0.0.5:/shows"',
     'core: "10.0.0.5:/shows" is not allowed; must be nfs://host[:port]/export[/subdir] or file'),
    ('core = "file://relative"', 'core: "file://relative" is not allowed; must be nfs://'),
    ('junction = "shows"', 'junction: "shows" is not allowed; must be an absolute path such as'),
    ('junction = "/"', 'junction: "/" is not allowed; must be an absolute path such as /shows'),
    ('junction = "/shows/"', 'junction: "/shows/" is not allowed; must be an absolute path'),
    ('junction = "/a/../b"', 'junction: "/a/../b" is not allowed; must be an absolute path'),
    ("junction = '/a\"b'", "is not allowed; must be an absolute path such as /shows: letters"),
    ('policy = "fast"',
     'policy: "fast" is not allowed; must be one of clients-bypass, read, read-write, full, '),
    ("verify_s = -1", "verify_s: -1 is not allowed; must be at least 0"),
    ("verify_s = inf", "verify_s: Infinity is not allowed; must be a number at least 0"),
    ("verify_s = 'often'", 'verify_s: "often" is not allowed; must be a number at least 0'),
    ("export_id = 65536", "export_id: 65536 is not allowed; must be between 1 and 65535"),
    ("export_id = 0", "export_id: 0 is not allowed; must be between 1 and 65535"),
    ("connections = 99", "connections: 99 is not allowed; must be between 1 and 32"),
    ("xattrs = 2", "xattrs: 2 is not allowed; must be true or false"),
    ("clients = []", "clients: [] is not allowed; must have at least one entry"),
    ("clients = [{clients = '10.0.0.0/99'}]",
     'clients[0].clients: "10.0.0.0/99" is not allowed; must be an IP address or a network'),
    ("clients = [{clients = '10.0.0.1', access = 'rwx'}]",
     'clients[0].access: "rwx" is not allowed; must be one of ro, rw'),
    ("clients = [{squash = 'yes'}]",
     'clients[0].squash: "yes" is not allowed; must be one of none, root, all'),
    ("clients = [{anonymous_uid = -2}]",
     "clients[0].anonymous_uid: -2 is not allowed; must be at least 0 and less than 4294967296"),
    ("clients = [{acces = 'ro'}]", 'clients[0].acces is not a known key; did you mean "access"?'),
    ("cache.capacity_bytes = 'lots'",
     'cache.capacity_bytes: "lots" is not allowed; must be a number of bytes, or a number with'),
    ("cache.capacity_bytes = -5", "cache.capacity_bytes: -5 is not allowed; must be at least 0"),
    ("cache.capacity_bytes = true", "cache.capacity_bytes: true is not allowed; must be a number"),
    ("cache.high_water = 1.5",
     "cache.high_water: 1.5 is not allowed; must be more than 0 and at most 1"),
    ("cache = {low_water = 0.9, high_water = 0.8}",
     "cache: low_water 0.9 must not be above high_water 0.8"),
    ("cache.capacity = 1", 'cache.capacity is not a known key; did you mean "capacity_bytes"?'),
    ("write_behind.flush_files_at_once = 0",
     "write_behind.flush_files_at_once: 0 is not allowed; must be between 1 and 256"),
    ("read_ahead.sequence_files = 65",
     "read_ahead.sequence_files: 65 is not allowed; must be between 0 and 64"),
]


@pytest.mark.parametrize(("line", "told"), NODE_MISTAKES)
def test_a_mistake_of_the_node_is_told_by_key_value_and_what_is_allowed(line, told):
    key = line.split("=")[0].split(".")[0].strip()
    rest = "\n".join(text for text in MINIMAL.splitlines() if not text.startswith(f"{key} "))

    (problem,) = problems(line + "\n" + rest)
    assert problem.startswith("node.toml: ")
    assert told in problem


@pytest.mark.parametrize(("line", "told"), VOLUME_MISTAKES)
def test_a_mistake_of_a_volume_is_told_by_key_value_and_what_is_allowed(line, told):
    key = line.split("=")[0].split(".")[0].strip()
    rest = "\n".join(text for text in MINIMAL.splitlines() if not text.startswith(f"{key} "))

    (problem,) = problems(rest + "\n" + line)
    assert problem.startswith("node.toml: volumes[0]")
    assert told in problem


SECOND = """
[[volumes]]
name = "{name}"
core = "nfs://nas/b"
junction = "{junction}"
{more}
"""


@pytest.mark.parametrize(("name", "junction", "more", "told"), [
    ("shows", "/b", "", "two volumes have the same name: shows"),
    ("b", "/shows", "", "two volumes have the same junction: /shows"),
    ("b", "/b", "export_id = 1", "two volumes have the same export_id: 1"),
    ("b", "/shows/b", "", "/shows/b is in /shows"),
])
def test_volumes_that_collide_are_told(name, junction, more, told):
    (problem,) = problems(MINIMAL + SECOND.format(name=name, junction=junction, more=more))

    assert told in problem


@pytest.mark.parametrize(("core", "what"), [("file:///ssd", "cache_dir"),
                                            ("file:///run", "run_dir")])
def test_a_core_filer_that_contains_our_own_directories_is_refused(core, what):
    (problem,) = problems(MINIMAL.replace("nfs://10.0.0.5/shows", core))

    assert what in problem
    assert "must not be inside the core filer" in problem


def test_what_is_missing_is_told_with_its_meaning():
    told = problems("")

    assert told[0].startswith("node.toml: cache_dir is missing; it must be given: on the local SSD")
    assert told[1].startswith("node.toml: volumes is missing; every node needs at least one")


def test_all_mistakes_are_told_at_once():
    told = problems("nfs.port = 0\nlog_level = 'loud'\n" + MINIMAL + "policy = 'fast'")

    assert len(told) == 3


@pytest.mark.parametrize(("content", "told"), [
    (b"cache_dir = ", "not valid TOML: invalid value (at end of document)"),
    (b"\n\nnode = x\n", "not valid TOML: invalid value (at line 3, column 8)"),
    (b"node = 'a'\nnode = 'b'\n", "not valid TOML"),
    (b"node = '\xff'", "byte 8 is not UTF-8"),
])
def test_a_file_that_is_no_toml_is_told_with_its_line(tmp_path, content, told):
    path = tmp_path / "node.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        load(path)

    assert str(path) in caught.value.problems[0]
    assert told in caught.value.problems[0]


@pytest.mark.parametrize("path", ["/nowhere/node.toml", "/tmp"])
def test_a_file_that_cannot_be_read_is_told(path):
    with pytest.raises(ConfigurationError, match=path):
        load(Path(path))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["cache_dir", "volumes", "nfs", "name", "core", "clients", "x"]),
        inner, max_size=4),
    max_leaves=12)


@given(st.dictionaries(
    st.sampled_from(["cache_dir", "run_dir", "nfs", "volumes", "node", "nonsense"]), _JSON))
def test_no_input_gets_anything_but_settings_or_told_problems(data):
    told = ["node.toml: "]
    try:
        validated(data, source="node.toml")
    except ConfigurationError as exc:
        told = exc.problems

    assert told
    assert all(problem.startswith("node.toml: ") for problem in told)
