"""The demo's passes as a picture: what the clients got and what crossed the WAN, over time."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from tests.demo.passes import Recorder

_CLIENTS, _WAN = "#2a78b8", "#d9822b"
_SMOOTH = 3
"""Samples over which a rate is taken: progress is told ten times a second, not evenly."""


def draw(recorder: Recorder, link_bytes_per_s: float, path: Path) -> None:
    samples = recorder.samples
    times, clients, wan = [], [], []
    for a, b in zip(samples, samples[_SMOOTH:], strict=False):
        took_s = b.time_s - a.time_s
        times.append((a.time_s + b.time_s) / 2)
        clients.append((b.client_bytes - a.client_bytes) / took_s / 1e6)
        wan.append((b.wan_bytes - a.wan_bytes) / took_s / 1e6)
    figure, (over_time, totals) = pyplot.subplots(
        1, 2, figsize=(13, 4.8), width_ratios=(2, 1), layout="constrained")

    over_time.fill_between(times, clients, color=_CLIENTS, alpha=0.25, linewidth=0)
    over_time.plot(times, clients, color=_CLIENTS, label="clients read or write")
    over_time.plot(times, wan, color=_WAN, label="on the WAN, both ways")
    over_time.axhline(link_bytes_per_s / 1e6, color=_WAN, linestyle=":", linewidth=1)
    top = max([*clients, link_bytes_per_s / 1e6]) * 1.25
    for number, record in enumerate(recorder.passes, start=1):
        if number % 2:
            over_time.axvspan(record.begin_s, record.end_s, color="0.95", zorder=0)
        over_time.text((record.begin_s + record.end_s) / 2, top * 0.98, str(number),
                       ha="center", va="top", color="0.3")
    over_time.set(xlabel="seconds", ylabel="MB/s", ylim=(0, top), xlim=(0, samples[-1].time_s))
    over_time.set_title("Rates; dotted: the link's", loc="left")
    over_time.legend(loc="center left", frameon=False)

    names = [f"{record.name}  {n}" for n, record in enumerate(recorder.passes, start=1)]
    positions = range(len(names))
    totals.barh([p - 0.2 for p in positions], [r.seconds for r in recorder.passes], 0.4,
                color=_CLIENTS, label="seconds")
    below = totals.twiny()
    below.barh([p + 0.2 for p in positions], [r.wan_bytes / 2**20 for r in recorder.passes], 0.4,
               color=_WAN, label="MiB over the WAN")
    totals.set_yticks(list(positions), names)
    totals.invert_yaxis()
    totals.set_xlabel("seconds", color=_CLIENTS)
    below.set_xlabel("MiB over the WAN", color=_WAN)
    for axes in (over_time, totals, below):
        axes.spines[["right"]].set_visible(False)
    over_time.spines[["top"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
