"""What the demo measures: one record per pass, sampled while it runs, shown live."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.support.wan import Wan

SAMPLE_S = 0.1

Tell = Callable[[int], None]


@dataclass(slots=True)
class Pass:
    name: str
    reads: bool
    begin_s: float
    """Since the first pass began."""
    end_s: float = 0.0
    client_bytes: int = 0
    wan_bytes: int = 0

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s

    @property
    def hit_rate(self) -> float | None:
        """The share of the bytes read that did not have to cross the WAN for this read."""
        return max(0.0, 1 - self.wan_bytes / self.client_bytes) if self.reads else None


@dataclass(frozen=True, slots=True)
class Sample:
    time_s: float
    client_bytes: int
    wan_bytes: int


@dataclass(slots=True)
class Recorder:
    """Runs passes one after the other and keeps what happened when."""

    link: Wan
    console: Console
    passes: list[Pass] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    _client_bytes: int = 0
    _started_s: float = field(default_factory=time.monotonic)

    def _wan_bytes(self) -> int:
        statistics = self.link.statistics()
        return statistics.up_bytes + statistics.down_bytes

    def _sample(self) -> Sample:
        sample = Sample(
            time.monotonic() - self._started_s, self._client_bytes, self._wan_bytes())
        self.samples.append(sample)
        return sample

    def run(
        self, name: str, total_bytes: int | None, work: Callable[[Tell], None], *, reads: bool
    ) -> Pass:
        """Do *work*, which is given a function to tell payload bytes to, and record the pass.

        *total_bytes*: ``None`` where the clients wait for something else than their bytes.
        """
        bar = Progress(
            TextColumn("{task.description:<30}"), BarColumn(12), TimeElapsedColumn(),
            TextColumn("{task.fields[rates]}"), console=self.console)
        first = self._sample()
        record = Pass(name, reads, first.time_s)
        failures: list[BaseException] = []
        task = bar.add_task(name, total=total_bytes, rates="")

        def tell(byte_count: int) -> None:
            self._client_bytes += byte_count
            bar.advance(task, byte_count)

        def guarded() -> None:
            try:
                work(tell)
            except BaseException as error:
                failures.append(error)

        worker = threading.Thread(target=guarded, daemon=True)
        with bar:
            worker.start()
            previous = first
            while worker.is_alive():
                worker.join(SAMPLE_S)
                current = self._sample()
                took_s = max(current.time_s - previous.time_s, 1e-3)
                bar.update(task, rates=(
                    f"{(current.client_bytes - previous.client_bytes) / took_s / 1e6:.0f} MB/s, "
                    f"{(current.wan_bytes - previous.wan_bytes) / took_s / 1e6:.0f} on the WAN"))
                previous = current
            bar.update(task, total=total_bytes or 1, rates="")
            if total_bytes is None and not failures:
                bar.update(task, completed=1)
        if failures:
            raise failures[0]
        record.end_s = previous.time_s
        record.client_bytes = previous.client_bytes - first.client_bytes
        record.wan_bytes = previous.wan_bytes - first.wan_bytes
        self.passes.append(record)
        return record

    def table(self) -> Table:
        table = Table(title="A render job, 30 ms and 1 Gb/s away from its NAS",
                      title_justify="left")
        table.add_column("pass")
        for column in ("seconds", "MB/s", "MiB over the WAN", "hit rate"):
            table.add_column(column, justify="right")
        for record in self.passes:
            hit_rate = record.hit_rate
            table.add_row(
                record.name, f"{record.seconds:.1f}",
                f"{record.client_bytes / record.seconds / 1e6:.0f}" if record.client_bytes else "",
                f"{record.wan_bytes / (1 << 20):.0f}",
                "" if hit_rate is None else f"{hit_rate:.1%}")
        return table
