"""``python -m tests.demo``: a NAS far away, one filer node in front, a small render job.

Starts everything it needs, leaves nothing running, checks every byte, and draws build/demo.png.
Exit status 0 when every byte was right; 1 when something failed; 2 when it cannot run here;
130 when interrupted.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from tests.bench.__main__ import complaint
from tests.bench.load import BUILD, Export, LoadFailed, program
from tests.bench.node import NodeFailed, start_node
from tests.demo import job
from tests.demo.passes import Recorder
from tests.support.nas import running_nas
from tests.support.wan import running_wan

RTT_S, LINK_BYTES_PER_S = 0.030, 125e6
PICTURE = BUILD / "demo.png"


def _play(console: Console, work_dir: Path) -> Recorder:
    nas_dir = work_dir / "nas-disk"
    console.print(f"making {job.UNIQUE_BYTES / job.MIB:.0f} MiB of scenes, textures and plates")
    job.generate(nas_dir)
    with contextlib.ExitStack() as stack:
        console.print("starting the far-away NAS: NFS-Ganesha, 30 ms and 1 Gb/s from here")
        nas = stack.enter_context(running_nas(work_dir / "nas", {"/shows": nas_dir}))
        link = stack.enter_context(running_wan(
            targets={"nfs": nas.port, "mount": nas.mount_port}, rtt_s=RTT_S,
            bytes_per_s=LINK_BYTES_PER_S))
        direct = Export(link.port("nfs"), link.port("mount"), "/shows")
        url = nas.url("/shows", port=link.port("nfs"), mount_port=link.port("mount"))
        console.print("starting a filer node here:")
        node = stack.enter_context(start_node(work_dir / "node", core=url, settings={}))
        console.print(f"  {node.command_line}", style="bold", highlight=False, soft_wrap=True)
        console.print(
            f"{job.CLIENTS} NFS clients read {job.READ_BYTES / job.MIB:.0f} MiB in all, checking "
            f"every byte, then write {job.FRAMES.files} frames\n")

        recorder = Recorder(link, console)

        def read(name: str, export: Export) -> None:
            recorder.run(
                name, job.READ_BYTES, lambda tell: job.read_assets(export, tell), reads=True)

        def write(name: str, export: Export, kind: str) -> None:
            recorder.run(
                name, job.FRAMES.total_bytes,
                lambda tell: job.write_frames(export, kind, tell), reads=False)

        def publish(_: object) -> None:
            said = node.filer("flush", f"{node.export.path}/frames")
            console.print(said.strip(), style="dim", highlight=False)

        read("read directly over the WAN", direct)
        read("read through the filer, cold", node.export)
        read("read through the filer, warm", node.export)
        write("write frames directly", direct, "direct")
        write("write frames behind the filer", node.export, "filer")
        recorder.run("publish: filer flush", None, publish, reads=False)
        for kind in ("direct", "filer"):
            job.check_frames(nas_dir, kind)
        console.print(
            f"\nevery byte that was read was right, and so is every byte of the "
            f"{job.FRAMES.files} frames on the NAS; stopping everything")
    return recorder


def main() -> int:
    console = Console()
    if reason := complaint():
        console.print(f"[red]{reason}")
        return 2

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    begin_s = time.monotonic()
    BUILD.mkdir(exist_ok=True)
    work_dir = Path(tempfile.mkdtemp(prefix="demo-", dir=BUILD))
    try:
        program()
        recorder = _play(console, work_dir)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; everything that was started has been stopped")
        return 130
    except (LoadFailed, NodeFailed) as error:
        console.print(f"[red]failed: {error}")
        return 1
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)

    from tests.demo.picture import draw

    draw(recorder, LINK_BYTES_PER_S, PICTURE)
    console.print(recorder.table())
    console.print(f"plot: {PICTURE}")
    console.print(f"{time.monotonic() - begin_s:.0f} s in all", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
