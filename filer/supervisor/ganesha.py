"""NFS-Ganesha's configuration for a node, as text.  Pure.

What the settings are for is measured; the reasons stand beside them.  The same settings give
the same text, on every node: ``Export_Id`` and the fsid are part of every NFS handle.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filer.settings import ClientRule, NfsSettings, NodeSettings, VolumeSettings

_LOG_LINE = re.compile(r"\] \S+ :(?P<component>[^:]+) :(?P<level>[A-Z]+) :(?P<text>.*)")
"""date : epoch : host : program-pid[thread] function :COMPONENT :LEVEL :text"""

_NEVER_WHY = ("DBUS", "NFS CB")
"""D-Bus and Kerberos: Ganesha complains about them at every start."""

_SQUASH = {"none": "No_Root_Squash", "root": "Root_Squash", "all": "All_Squash"}


@dataclass(frozen=True, slots=True)
class Fsid:
    """The file system id in every handle of a volume: two 32 bit words."""

    major: int
    minor: int


def fsid(volume: VolumeSettings) -> Fsid:
    """Derived from what the volume *is*, so that it is equal on all nodes and after restarts.

    The kernel's own answer for a FUSE mount is its anonymous device number, which differs from
    mount to mount: clients would get ESTALE.
    """
    digest = hashlib.blake2b(f"{volume.name}\0{volume.core}".encode(), digest_size=8).digest()
    # 0 means "unknown" to some NFS clients.
    return Fsid(int.from_bytes(digest[:4]) or 1, int.from_bytes(digest[4:]) or 1)


def fsid_environment(exports: Iterable[tuple[Path, Fsid]]) -> str:
    """``FILER_FSID`` for the preloaded library: which mount answers which fsid."""
    return ",".join(f"{path}={f.major:#x}:{f.minor:#x}" for path, f in exports)


def render(settings: NodeSettings, exports: Iterable[tuple[VolumeSettings, Path]],
           recovery_dir: Path) -> str:
    """The configuration file; *exports* are the volumes that are mounted, and where."""
    blocks = [_core(settings.nfs), _nfsv4(settings.nfs, recovery_dir), _FIXED]
    blocks += [_export(settings.export_id(volume), volume, path) for volume, path in exports]
    return "\n".join(blocks)


def _core(nfs: NfsSettings) -> str:
    return f"""\
NFS_CORE_PARAM {{
    NFS_Protocols = 3, 4;
    Bind_addr = {nfs.bind};
    NFS_Port = {nfs.port};
    MNT_Port = {nfs.mount_port};
    NLM_Port = {nfs.nlm_port};
    Enable_NLM = {_bool(nfs.locks)};
    Enable_RQUOTA = false;
    Enable_UDP = false;
    # NFSv3 clients mount the junction, as NFSv4 clients do.
    Mount_Path_Pseudo = true;
    # A request that waits for the core filer holds a thread; the default of 200 would let one
    # core filer that hangs stop the other volumes.
    RPC_Ioq_ThrdMax = 2048;
}}
"""


def _nfsv4(nfs: NfsSettings, recovery_dir: Path) -> str:
    return f"""\
NFSV4 {{
    Lease_Lifetime = {nfs.lease_s};
    Grace_Period = {nfs.lease_s};
    RecoveryBackend = fs;
    RecoveryRoot = {_quoted(str(recovery_dir))};
    Minor_Versions = 0, 1, 2;
    Delegations = false;
    # Names would need the same user database on the clients, the node and the core filer.
    Only_Numeric_Owners = true;
    Allow_Numeric_Owners = true;
}}
"""


_FIXED = """\
NFS_KRB5 {
    Active_krb5 = false;
}

EXPORT_DEFAULTS {
    # The kernel's attribute cache, which we invalidate, answers in its place; with any other
    # value Ganesha serves attributes that it never hears are stale.
    Attr_Expiration_Time = 0;
}

MDCACHE {
    # Names learned by LOOKUP, in chunks of 128 per directory.  With the default of one chunk a
    # client that walks a larger directory costs a FUSE request for every LOOKUP, for ever: the
    # kernel drops a dentry whenever an NFS handle of its inode is used.
    Detached_Mult = 1000;
}

LOG {
    Default_Log_Level = EVENT;
}
"""


def _export(export_id: int, volume: VolumeSettings, path: Path) -> str:
    rules = "".join(_client(rule) for rule in volume.clients)
    return f"""\
EXPORT {{
    Export_Id = {export_id};
    Path = {_quoted(str(path))};
    Pseudo = {_quoted(volume.junction)};
    Protocols = 3, 4;
    Transports = TCP;
    SecType = sys;
    # For clients that no rule below names.
    Access_Type = None;
    FSAL {{ Name = VFS; }}
{rules}}}
"""


def _client(rule: ClientRule) -> str:
    return f"""\
    CLIENT {{
        Clients = {", ".join(_networks(rule.clients))};
        Access_Type = {rule.access.upper()};
        Squash = {_SQUASH[rule.squash]};
        Anonymous_Uid = {rule.anonymous_uid};
        Anonymous_Gid = {rule.anonymous_gid};
    }}
"""


def _networks(clients: str) -> list[str]:
    network = ipaddress.ip_network(clients, strict=False)
    if network.num_addresses == 1:
        return [str(network.network_address)]
    if network.prefixlen == 0:
        # Ganesha's parser takes "0.0.0.0/0" for a path; its two halves it understands.
        return [str(half) for half in network.subnets()]
    return [str(network)]


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _quoted(text: str) -> str:
    """Ganesha's string token (``conf_lex.l``): no escapes that would let text leave it."""
    assert not set('"\\\n') & set(text), f"cannot be quoted: {text!r}"
    return f'"{text}"'


def next_epoch(now_s: int, previous: int) -> int:
    """``-E``: what makes this start's NFSv4 ids and NFSv3 write verifiers new.

    Ganesha's own choice, the second it starts in, repeats when it is restarted quickly.
    """
    return max(now_s, previous + 1) & 0xFFFF_FFFF


def last_complaint(log_text: str) -> str:
    """Why Ganesha ended, by its log; empty if it does not say.

    A mistake in the configuration is told in several lines, the first of them precisely;
    everything else by the last complaint.
    """
    complaints = [
        found["text"].strip() for found in map(_LOG_LINE.search, log_text.splitlines())
        if found and found["level"] in ("FATAL", "MAJ", "CRIT")
        and found["component"] not in _NEVER_WHY and not found["text"].startswith("Fatal errors")
    ]
    about_configuration = [text for text in complaints if text.startswith("Config File")]
    return (about_configuration[:1] or complaints[-1:] or [""])[0]
