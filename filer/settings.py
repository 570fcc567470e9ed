"""A node's configuration: one typed schema, validated by pydantic; frozen values with units.

Owns the schema and its defaults.  Reading TOML and turning validation errors into messages
for people is ``filer/cli/configuration.py``.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator,
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
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClientRule(Schema):
    """Who may mount a junction, and how.  The first rule that matches a client applies."""

    clients: str = "0.0.0.0/0"
    """An IP address or CIDR network."""
    access: Literal["ro", "rw"] = "rw"
    squash: Literal["none", "root", "all"] = "none"
    anonymous_uid: int = Field(65534, ge=0, lt=2**32)
    anonymous_gid: int = Field(65534, ge=0, lt=2**32)

    @field_validator("clients")
    @classmethod
    def _network(cls, value: str) -> str:
        ipaddress.ip_network(value, strict=False)
        return value


class CacheSettings(Schema):
    capacity_bytes: ByteCount = 50 * GIB
    high_water: float = Field(0.95, gt=0, le=1)
    """Eviction starts when this share of the capacity is used …"""
    low_water: float = Field(0.90, gt=0, le=1)
    """… and stops at this one."""
    inodes_in_memory_max: int = Field(200_000, ge=1000)
    directory_entries_in_memory_max: int = Field(1_000_000, ge=10_000)

    @model_validator(mode="after")
    def _ordered(self) -> CacheSettings:
        if self.low_water > self.high_water:
            raise ValueError("low_water must not be above high_water")
        return self


class WriteBehindSettings(Schema):
    dirty_bytes_max: ByteCount = 10 * GIB
    """At this much dirty data clients are slowed down until some is flushed."""
    dirty_records_max: int = Field(2_000_000, ge=1000)
    segment_bytes: ByteCount = 256 * MIB
    write_back_s: float | None = Field(None, ge=0)
    """Overrides the policy's delay."""
    flush_files_at_once: int = Field(16, ge=1, le=256)


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
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")
    core: str
    """``nfs://host[:port]/export[/subdir]`` or ``file:///path``."""
    junction: str
    """The path under which clients mount it."""
    policy: str = DEFAULT_POLICY
    verify_s: float | None = Field(None, ge=0)
    """Overrides the policy's interval."""
    export_id: int | None = Field(None, ge=1, le=65535)
    """Part of every NFS handle; default: the volume's position in the configuration."""
    clients: tuple[ClientRule, ...] = (ClientRule(),)
    connections: int = Field(4, ge=1, le=32)
    xattrs: bool = False
    cache: CacheSettings = CacheSettings()
    write_behind: WriteBehindSettings = WriteBehindSettings()
    read_ahead: ReadAheadSettings = ReadAheadSettings()

    @field_validator("core")
    @classmethod
    def _core(cls, value: str) -> str:
        if not re.fullmatch(r"nfs://[^/\s]+/\S*|file:///.*", value):
            raise ValueError("must be nfs://host[:port]/export[/subdir] or file:///path")
        return value

    @field_validator("junction")
    @classmethod
    def _junction(cls, value: str) -> str:
        if not re.fullmatch(r"(/[^/\s]+)+", value):
            raise ValueError("must be an absolute path such as /shows, without a trailing /")
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
        from dataclasses import replace

        policy = POLICIES[self.policy]
        if self.verify_s is not None:
            policy = replace(policy, verify_s=self.verify_s)
        if self.write_behind.write_back_s is not None:
            policy = replace(policy, write_back_s=self.write_behind.write_back_s)
        return policy


class NfsSettings(Schema):
    bind: str = "0.0.0.0"
    port: int = Field(2049, ge=1, le=65535)
    mount_port: int = Field(20048, ge=1, le=65535)
    nlm_port: int = Field(32803, ge=1, le=65535)
    locks: bool = True
    """NLM byte-range locks for NFSv3; needs rpcbind and rpc.statd.  v4.1 always has locks."""
    lease_s: int = Field(15, ge=5, le=300)

    @field_validator("bind")
    @classmethod
    def _address(cls, value: str) -> str:
        ipaddress.ip_address(value)
        return value


class NodeSettings(Schema):
    node: str = Field("node1", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    cache_dir: AbsolutePath
    """On the local SSD; holds the page cache, the write-behind log and the inode store."""
    run_dir: AbsolutePath = Path("/run/filer")
    """Sockets, mounts and rendered configuration; may be empty after a reboot."""
    metrics_bind: str = "127.0.0.1"
    metrics_port: int = Field(9105, ge=0, le=65535)
    """Prometheus scrapes http://metrics_bind:metrics_port/metrics; 0 turns it off."""
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    nfs: NfsSettings = NfsSettings()
    volumes: tuple[VolumeSettings, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> NodeSettings:
        for what in ("name", "junction", "export_id"):
            seen = [getattr(v, what) for v in self.volumes if getattr(v, what) is not None]
            twice = {x for x in seen if seen.count(x) > 1}
            if twice:
                raise ValueError(f"two volumes have the same {what}: {sorted(map(str, twice))[0]}")
        return self

    def export_id(self, volume: VolumeSettings) -> int:
        return volume.export_id or 1 + self.volumes.index(volume)
