"""A node's configuration: one typed schema, validated by pydantic; frozen values with units.

Owns the schema and its defaults.  Reading TOML and turning validation errors into messages
for people is ``filer/cli/configuration.py``; the docstrings of the fields are the help of the
flags, and every ``ValueError`` says what is allowed ("must be …"), because the message is
completed with the key and the value there.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from filer.policies import DEFAULT_POLICY, POLICIES, Policy

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
_UNITS = {"": 1, "B": 1, "K": KIB, "KIB": KIB, "M": MIB, "MIB": MIB, "G": GIB, "GIB": GIB,
          "T": TIB, "TIB": TIB}


def parse_bytes(value: object) -> object:
    """``"64 GiB"`` → bytes; integers pass through."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError("must be a number of bytes, or a number with KiB, MiB, GiB or TiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


ByteCount = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]


def _absolute(path: Path) -> Path:
    # The rest would have to be quoted in the NFS server's configuration, which cannot.
    if not path.is_absolute() or set(str(path)) & set('",=\\') or not str(path).isprintable():
        raise ValueError('must be an absolute path without " , = or \\')
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        # bool is an int in Python: "port = true" would be port 1.
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
            raise ValueError("must be a number")
        return value


class ClientRule(Schema):
    """Who may mount a junction, and how.  The first rule that matches a client applies."""

    clients: str = "0.0.0.0/0"
    """An IP address or CIDR network."""
    access: Literal["ro", "rw"] = "rw"
    squash: Literal["none", "root", "all"] = "none"
    """Whose requests become the anonymous user's: nobody's, root's, everyone's."""
    anonymous_uid: int = Field(65534, ge=0, lt=2**32)
    anonymous_gid: int = Field(65534, ge=0, lt=2**32)

    @field_validator("clients")
    @classmethod
    def _network(cls, value: str) -> str:
        try:
            ipaddress.ip_network(value, strict=False)
        except ValueError:
            raise ValueError(
                "must be an IP address or a network such as 10.0.0.0/8") from None
        return value


class CacheSettings(Schema):
    capacity_bytes: ByteCount = 50 * GIB
    """Clean pages of this volume on the local SSD."""
    high_water: float = Field(0.95, gt=0, le=1)
    """Eviction starts when this share of the capacity is used …"""
    low_water: float = Field(0.90, gt=0, le=1)
    """… and stops at this one."""
    inodes_in_memory_max: int = Field(40_000, ge=1000)
    """More are kept on the SSD only."""
    directory_entries_in_memory_max: int = Field(150_000, ge=10_000)
    """Of all cached directories together."""

    @model_validator(mode="after")
    def _ordered(self) -> CacheSettings:
        if self.low_water > self.high_water:
            raise ValueError(
                f"low_water {self.low_water} must not be above high_water {self.high_water}")
        return self


class WriteBehindSettings(Schema):
    dirty_bytes_max: ByteCount = 10 * GIB
    """At this much dirty data clients are slowed down until some is flushed."""
    dirty_records_max: int = Field(2_000_000, ge=1000)
    """The same for the number of log records not yet flushed."""
    segment_bytes: ByteCount = 256 * MIB
    """Size of one file of the write-behind log."""
    write_back_s: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Overrides the policy's delay."""
    flush_files_at_once: int = Field(16, ge=1, le=256)
    """Files written to the core filer in parallel."""


class ReadAheadSettings(Schema):
    window_bytes_max: ByteCount = 64 * MIB
    """Per stream; should cover bandwidth × delay of the link to the core filer."""
    in_flight_bytes_max: ByteCount = 128 * MIB
    """All fetches of the volume together."""
    small_file_bytes: ByteCount = 4 * MIB
    """Files up to this size are fetched whole."""
    sequence_files: int = Field(2, ge=0, le=64)
    """How many next files of a numbered sequence are fetched ahead; 0 turns it off."""


class VolumeSettings(Schema):
    name: str
    """In logs, metrics and file names.  It and *core* are part of every NFS handle."""
    core: str
    """``nfs://host[:port]/export[/subdir]`` or ``file:///path``."""
    junction: str
    """The path under which clients mount it."""
    policy: str = DEFAULT_POLICY
    """How long attributes are believed and what happens to writes (``filer explain PATH``)."""
    verify_s: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Overrides the policy's interval."""
    scratch_ttl_s: float = Field(86_400.0, ge=1, allow_inf_nan=False)
    """Policy scratch: files not written to for this long are removed."""
    export_id: int | None = Field(None, ge=1, le=65535)
    """Part of every NFS handle; default: the volume's position in the configuration."""
    clients: tuple[ClientRule, ...] = Field((ClientRule(),), min_length=1)
    """A client that no rule matches has no access."""
    connections: int = Field(4, ge=1, le=32)
    """TCP connections to the core filer."""
    xattrs: bool = False
    """User extended attributes; costs one more request for every write."""
    cache: CacheSettings = CacheSettings()
    write_behind: WriteBehindSettings = WriteBehindSettings()
    read_ahead: ReadAheadSettings = ReadAheadSettings()

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", value):
            raise ValueError("must be 1 to 31 of a-z, 0-9 and -, starting with a letter or digit")
        return value

    @field_validator("core")
    @classmethod
    def _core(cls, value: str) -> str:
        if not re.fullmatch(r"nfs://[^/\s]+/\S*|file:///.*", value):
            raise ValueError("must be nfs://host[:port]/export[/subdir] or file:///path")
        return value

    @field_validator("junction")
    @classmethod
    def _junction(cls, value: str) -> str:
        # What the NFS server's configuration and every client's mount(8) take unquoted.
        components = value.split("/")[1:]
        if not re.fullmatch(r"(/[\w.+@~-]+)+", value) or {".", ".."} & set(components):
            raise ValueError(
                "must be an absolute path such as /shows: letters, digits and . _ + @ ~ -,"
                " without a trailing /")
        return value

    @field_validator("policy")
    @classmethod
    def _policy(cls, value: str) -> str:
        if value not in POLICIES:
            raise ValueError(f"must be one of {', '.join(POLICIES)}")
        return value

    @property
    def effective_policy(self) -> Policy:
        """The named policy with this volume's overrides applied."""
        policy = POLICIES[self.policy]
        if self.verify_s is not None:
            policy = replace(policy, verify_s=self.verify_s)
        if self.write_behind.write_back_s is not None:
            policy = replace(policy, write_back_s=self.write_behind.write_back_s)
        return policy


def _address(value: str) -> str:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        raise ValueError("must be an IP address of this host, or 0.0.0.0 for all") from None
    return value


Address = Annotated[str, AfterValidator(_address)]


class NfsSettings(Schema):
    bind: Address = "0.0.0.0"
    """The local address that clients mount from."""
    port: int = Field(2049, ge=1, le=65535)
    """NFS itself."""
    mount_port: int = Field(20048, ge=1, le=65535)
    """MOUNT protocol of NFSv3."""
    nlm_port: int = Field(32803, ge=1, le=65535)
    """Lock protocol of NFSv3."""
    locks: bool = True
    """NLM byte-range locks for NFSv3; needs rpcbind and rpc.statd.  v4.1 always has locks."""
    rpcbind: bool | None = None
    """Register with rpcbind, where NFSv3 clients look up the ports; default: as *locks*.
    Without it they mount with port= and mountport=, and several nodes can share a host."""
    lease_s: int = Field(15, ge=5, le=300)
    """Lease and grace period of NFSv4: how long clients may take to come back."""

    @model_validator(mode="after")
    def _consistent(self) -> NfsSettings:
        if len({self.port, self.mount_port, self.nlm_port}) < 3:
            raise ValueError(
                f"port {self.port}, mount_port {self.mount_port} and nlm_port {self.nlm_port}"
                " must be three different ports")
        if self.locks and self.rpcbind is False:
            raise ValueError("rpcbind = false needs locks = false: NLM cannot work without it")
        return self

    @property
    def registers(self) -> bool:
        """Whether rpcbind is used."""
        return self.locks if self.rpcbind is None else self.rpcbind


class NodeSettings(Schema):
    node: str = "node1"
    """This node's name in logs, metrics and the names of conflict copies."""
    cache_dir: AbsolutePath
    """On the local SSD; holds the page cache, the write-behind log and the inode store."""
    run_dir: AbsolutePath = Path("/run/filer")
    """Sockets, mounts and rendered configuration; may be empty after a reboot."""
    metrics_bind: Address = "127.0.0.1"
    """Where Prometheus may connect to."""
    metrics_port: int = Field(9105, ge=0, le=65535)
    """Prometheus scrapes http://metrics_bind:metrics_port/metrics; 0 turns it off."""
    log_format: Literal["console", "json"] = "console"
    """To standard error: for people, or one JSON object a line."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is less important is not logged."""
    nfs: NfsSettings = NfsSettings()
    volumes: tuple[VolumeSettings, ...] = Field(min_length=1)

    @field_validator("node")
    @classmethod
    def _node(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value):
            raise ValueError("must be 1 to 63 of letters, digits and . _ -")
        return value

    @field_validator("volumes")
    @classmethod
    def _distinct(cls, volumes: tuple[VolumeSettings, ...]) -> tuple[VolumeSettings, ...]:
        for what in ("name", "junction"):
            seen = [getattr(v, what) for v in volumes]
            twice = {x for x in seen if seen.count(x) > 1}
            if twice:
                raise ValueError(f"two volumes have the same {what}: {min(twice)}")
        for outer in volumes:
            for inner in volumes:
                if inner.junction.startswith(outer.junction + "/"):
                    raise ValueError(
                        f"junctions must not be inside each other:"
                        f" {inner.junction} is in {outer.junction}")
        ids = [_export_id(volumes, v) for v in volumes]
        twice_ids = {i for i in ids if ids.count(i) > 1}
        if twice_ids:
            raise ValueError(
                f"two volumes have the same export_id: {min(twice_ids)}"
                " (a volume without one has its position, counted from 1)")
        return volumes

    @model_validator(mode="after")
    def _apart(self) -> NodeSettings:
        """A core filer that contains our own cache would cache itself."""
        for volume in self.volumes:
            if not volume.core.startswith("file://"):
                continue
            core = Path(volume.core.removeprefix("file://"))
            for what, own in (("cache_dir", self.cache_dir), ("run_dir", self.run_dir)):
                if own.is_relative_to(core):
                    raise ValueError(
                        f"{what} {own} must not be inside the core filer {core}"
                        f" of volume {volume.name}")
        return self

    def export_id(self, volume: VolumeSettings) -> int:
        return _export_id(self.volumes, volume)


def _export_id(volumes: tuple[VolumeSettings, ...], volume: VolumeSettings) -> int:
    return volume.export_id or 1 + volumes.index(volume)
