"""A real Linux NFS client for tests: a virtual machine that runs Debian's kernel.

Its userland is this machine's own root directory, read-only through virtiofs; its network is
QEMU's user mode network, in which this machine is `HOST`.  The kernel package is fetched with
apt and unpacked into ``build/guest``, not installed.

The root directory is shared with long-lived caches, or each program would take seconds to
start: what the host changes there after the boot the guest may not see.  Give programs to the
guest as arguments.

Owns the virtual machine and what runs in it.  Does not own the servers it mounts.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.guest_agent import PORT as _AGENT_PORT
from tests.support.nas import free_ports

HOST = "10.0.2.2"
_PROJECT = Path(__file__).resolve().parents[2]
_CACHE_DIR = _PROJECT / "build" / "guest"
_VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
_MODULES = ("virtio_pci", "virtio_net", "virtiofs", "virtio_rng", "nfsv3", "nfsv4",
            "nfs_layout_nfsv41_files")
_BOOT_LIMIT_S = 180
_INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
for module in {modules}; do $b insmod /modules/$module || echo "cannot load $module"; done
$b mount -t virtiofs -o ro root /root || exec $b poweroff -f
for directory in run mnt var/lib/nfs; do $b mount -t tmpfs tmpfs /root/$directory; done
$b mount -t proc proc /root/proc
$b mount -t sysfs sysfs /root/sys
$b mount -t devtmpfs dev /root/dev
$b mkdir -p /root/dev/shm /root/dev/pts
$b mount -t tmpfs tmpfs /root/dev/shm
$b mount -t devpts devpts /root/dev/pts
$b hostname {name}
$b ip link set lo up
$b ip link set eth0 up
$b ip addr add 10.0.2.15/24 dev eth0
$b ip route add default via 10.0.2.2
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
$b chroot /root /usr/bin/python3 {agent} {project}
$b poweroff -f
"""


@dataclass(frozen=True, slots=True)
class Kernel:
    image: Path
    modules_dir: Path


def fetch_kernel(cache_dir: Path = _CACHE_DIR) -> Kernel:
    """Debian's cloud kernel, downloaded once."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / "lock").open("w") as lock:
        # Two test runs may start at the same time.
        fcntl.flock(lock, fcntl.LOCK_EX)
        unpacked = cache_dir / "kernel"
        if not unpacked.exists():
            _download_kernel(cache_dir, unpacked)
    (image,) = (unpacked / "boot").glob("vmlinuz-*")
    (modules_dir,) = (unpacked / "lib" / "modules").iterdir()
    return Kernel(image, modules_dir)


def _download_kernel(cache_dir: Path, unpacked: Path) -> None:
    package = _kernel_package()
    if package is None:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        package = _kernel_package()
    assert package is not None, "apt knows no linux-image-cloud-amd64; is the mirror reachable?"
    print(f"downloading {package} for the guest into {cache_dir}")
    subprocess.run(["apt-get", "download", "-qq", package], cwd=cache_dir, check=True)
    (archive,) = cache_dir.glob(f"{package}_*.deb")
    partial = cache_dir / "kernel.partial"
    shutil.rmtree(partial, ignore_errors=True)
    subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
    archive.unlink()
    partial.rename(unpacked)


def _kernel_package() -> str | None:
    """The package that the metapackage of Debian's cloud kernel names today."""
    told = subprocess.run(
        ["apt-cache", "depends", "--important", "linux-image-cloud-amd64"],
        capture_output=True, text=True)
    found = re.search(r"Depends: (linux-image-\S+)", told.stdout)
    return found[1] if found else None


def modules_in_order(modules_dir: Path, wanted: tuple[str, ...]) -> list[Path]:
    """The files of *wanted* modules and all they need, each after those it needs.

    What a module needs stands in the module itself; Debian 12 does not compress them.
    Those built into the kernel have no file and are left out.
    """
    files = {path.stem.replace("-", "_"): path for path in modules_dir.rglob("*.ko")}
    ordered: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or path in ordered:
            return
        found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for needed in found[1].decode().split(",") if found else ():
            add(needed)
        ordered.append(path)

    for name in wanted:
        add(name)
    return ordered


def _archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive ("newc") of {name: (mode, contents)}."""
    out = bytearray()

    def pad() -> None:
        out.extend(bytes(-len(out) % 4))

    for inode, (name, (mode, data)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))]):
        encoded = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        out += b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
        pad()
        out += data
        pad()
    return bytes(out)


def make_initramfs(path: Path, kernel: Kernel, *, name: str) -> Path:
    modules = modules_in_order(kernel.modules_dir, _MODULES)
    files: dict[str, tuple[int, bytes]] = {
        directory: (stat.S_IFDIR | 0o755, b"")
        for directory in ("bin", "dev", "proc", "sys", "modules", "root")
    }
    files["bin/busybox"] = (stat.S_IFREG | 0o755, Path("/bin/busybox").read_bytes())
    for module in modules:
        files[f"modules/{module.name}"] = (stat.S_IFREG | 0o644, module.read_bytes())
    init = _INIT.format(
        modules=" ".join(module.name for module in modules), name=name,
        agent=Path(__file__).with_name("guest_agent.py"), project=_PROJECT)
    files["init"] = (stat.S_IFREG | 0o755, init.encode())
    path.write_bytes(gzip.compress(_archive(files), compresslevel=1))
    return path


def _accelerator() -> str:
    """Emulation unless asked otherwise: that /dev/kvm opens does not mean that a guest boots."""
    return "kvm" if os.environ.get("FILER_TEST_KVM") else "tcg,thread=multi"


class GuestCommand:
    """A command that runs in the guest."""

    def __init__(self, port: int, command: str, timeout_s: float) -> None:
        self._command, self._timeout_s = command, timeout_s
        self._connection = socket.create_connection(("127.0.0.1", port), timeout=timeout_s + 60)
        request = {"command": command, "timeout_s": timeout_s}
        self._connection.sendall(json.dumps(request).encode() + b"\n")

    def wait(self, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        with self._connection, self._connection.makefile("rb") as lines:
            line = lines.readline()
        if not line:
            raise ConnectionError("the guest is gone")
        reply = json.loads(line)
        done = subprocess.CompletedProcess(
            self._command, reply["returncode"], *(
                reply[name].encode("latin-1").decode(errors="surrogateescape")
                for name in ("stdout", "stderr")))
        if check and done.returncode:
            raise AssertionError(
                f"in the guest: {self._command!r} ended with {done.returncode}\n"
                f"{done.stdout[-8000:]}\n{done.stderr[-8000:]}")
        return done

    def kill(self) -> None:
        self._connection.close()


class Guest:
    """A booted guest: any number of commands, one after the other or at once."""

    def __init__(self, agent_port: int, console: Path) -> None:
        self._agent_port = agent_port
        self.console = console
        self._mounts = 0

    def start(self, command: str, *, timeout: float = 300.0) -> GuestCommand:
        return GuestCommand(self._agent_port, command, timeout)

    def run(
        self, command: str, *, timeout: float = 300.0, check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command, in the project's directory; text of any bytes comes back."""
        return self.start(command, timeout=timeout).wait(check=check)

    def python(self, code: str, *arguments: str, timeout: float = 300.0) -> str:
        """Run a Python program and return what it prints."""
        words = ["/usr/bin/python3", "-c", code, *arguments]
        return self.run(shlex.join(words), timeout=timeout).stdout

    def mount_v3(
        self, port: int, mount_port: int, path: str, *, options: str = "nolock",
        host: str = HOST,
    ) -> Path:
        """Mount an NFSv3 export and return its mountpoint in the guest."""
        return self._mount(
            "nfs", f"{host}:{path}",
            f"vers=3,proto=tcp,addr={host},port={port},mountport={mount_port},mountaddr={host},"
            f"mountproto=tcp,mountvers=3,{options}")

    def mount_v41(
        self, port: int, path: str, *, options: str = "sec=sys", host: str = HOST,
    ) -> Path:
        return self._mount(
            "nfs4", f"{host}:{path}",
            f"vers=4.1,proto=tcp,addr={host},clientaddr=10.0.2.15,port={port},{options}")

    def _mount(self, kind: str, source: str, options: str) -> Path:
        self._mounts += 1
        mountpoint = Path(f"/mnt/{self._mounts}")
        # -i: no helper program; all options are the kernel's own.
        self.run(f"mkdir {mountpoint} && mount -i -t {kind} -o {options} {source} {mountpoint}",
                 timeout=120)
        return mountpoint

    def unmount(self, mountpoint: Path, *, force: bool = False) -> None:
        self.run(f"umount {'-f -l' if force else ''} {mountpoint}", timeout=60)


@contextmanager
def guest(
    work_dir: Path, *, cpus: int = 1, memory_mib: int = 1024, name: str = "guest",
) -> Iterator[Guest]:
    """Boot a guest; it is switched off at the end of the block.  Needs root."""
    kernel = fetch_kernel()
    work_dir.mkdir(parents=True, exist_ok=True)
    initramfs = make_initramfs(work_dir / "initramfs.gz", kernel, name=name)
    (agent_port,) = free_ports(1)
    console = work_dir / "console.log"
    with ExitStack() as stack:
        share = _start_virtiofsd(stack, work_dir)
        qemu = _start_qemu(stack, [
            "-accel", _accelerator(), "-cpu", "max",
            "-smp", str(cpus), "-m", str(memory_mib),
            "-object", f"memory-backend-memfd,id=memory,size={memory_mib}M,share=on",
            "-numa", "node,memdev=memory",
            "-kernel", str(kernel.image), "-initrd", str(initramfs),
            "-append", "console=ttyS0 quiet loglevel=4 panic=-1",
            "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio",
            "-chardev", f"socket,id=share,path={share}",
            "-device", "vhost-user-fs-pci,chardev=share,tag=root",
            "-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{agent_port}-:{_AGENT_PORT}",
            "-device", "virtio-net-pci,netdev=net,romfile=",
            "-device", "virtio-rng-pci",
        ], work_dir)
        _wait_for_agent(qemu, console)
        yield Guest(agent_port, console)


def _start_virtiofsd(stack: ExitStack, work_dir: Path) -> Path:
    """Share the root directory; QEMU connects to the socket that this returns."""
    # A unix socket's path has at most 107 bytes; test directories can be longer.
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="guest-", dir="/tmp"))
    path = Path(directory) / "virtiofs"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    with (work_dir / "virtiofsd.log").open("wb") as log, listener:
        process = subprocess.Popen(
            [_VIRTIOFSD, f"--fd={listener.fileno()}", "-o", "source=/", "-o", "cache=always",
             "-o", "sandbox=chroot", "-o", "no_posix_lock"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[listener.fileno()],
            start_new_session=True)
    stack.callback(_end, process)
    return path


def _start_qemu(
    stack: ExitStack, arguments: list[str], work_dir: Path,
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        ["qemu-system-x86_64", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=(work_dir / "qemu.log").open("wb"), start_new_session=True)
    stack.callback(_end, process)
    return process


def _wait_for_agent(qemu: subprocess.Popen[bytes], console: Path) -> None:
    """Copy the console to its file, in the background from the agent's first line on."""
    ready = threading.Event()

    def copy() -> None:
        assert qemu.stdout is not None
        with console.open("wb", buffering=0) as log:
            for line in qemu.stdout:
                log.write(line)
                if b"guest agent ready" in line:
                    ready.set()
        ready.set()

    threading.Thread(target=copy, daemon=True).start()
    if not ready.wait(_BOOT_LIMIT_S) or qemu.poll() is not None:
        tail = console.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"the guest did not boot:\n{tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
