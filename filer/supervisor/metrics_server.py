"""Prometheus scrapes the node here.  Owns the HTTP server (a thread) and the node's own metrics.

A scrape asks the volume servers at that moment: nothing is kept between scrapes.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import structlog
import trio
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.metrics_core import CounterMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from filer.admin.reports import NodeStatus
from filer.errors import Misconfigured
from filer.supervisor.exposition import merge

log = structlog.get_logger()

_HEALTH = {"green": 0, "yellow": 1, "red": 2}

Snapshot = tuple[NodeStatus, Mapping[str, str]]
"""The node's status, and each answering volume's metrics as text."""


def node_metrics(status: NodeStatus) -> list[Metric]:
    health = GaugeMetricFamily("filer_health", "0 green, 1 yellow, 2 red")
    health.add_metric([], _HEALTH[status.health])
    info = InfoMetricFamily("filer_build", "The running version")
    info.add_metric([], {"version": status.version})
    up = GaugeMetricFamily("filer_child_up", "1 while the process runs", labels=["child", "volume"])
    restarts = CounterMetricFamily(
        "filer_child_restarts", "Starts after an end nobody asked for", labels=["child", "volume"])
    for child in status.children:
        labels = [child.name.replace(" ", "_"), child.volume]
        up.add_metric(labels, child.state == "running")
        restarts.add_metric(labels, child.restarts)
    answering = GaugeMetricFamily(
        "filer_volume_up", "1 while the volume server answers", labels=["volume"])
    for volume in status.volumes:
        answering.add_metric([volume.name], volume.status is not None)
    return [health, info, up, restarts, answering]


class _NodeCollector(Collector):
    def __init__(self, snapshot: Callable[[], Awaitable[Snapshot]], token: trio.lowlevel.TrioToken):
        self._snapshot = snapshot
        self._token = token

    def collect(self) -> Iterator[Metric]:
        try:
            status, texts = trio.from_thread.run(self._snapshot, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled):
            return  # the node stops: nothing to say any more
        yield from node_metrics(status)
        yield from merge(texts)

    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape; it would ask a node that still starts."""
        return []


@contextmanager
def serve_metrics(
    bind: str, port: int, snapshot: Callable[[], Awaitable[Snapshot]]
) -> Iterator[None]:
    """Serve ``/metrics`` while inside; port 0 serves nothing.

    Raises: Misconfigured: the port is taken.
    """
    if port == 0:
        yield
        return
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_NodeCollector(snapshot, trio.lowlevel.current_trio_token()))
    try:
        server, thread = start_http_server(port, addr=bind, registry=registry)
    except OSError as exc:
        raise Misconfigured(
            f"metrics_port {port} on {bind} cannot be used: {exc.strerror}",
            "choose another metrics_port; 0 turns it off") from exc
    try:
        yield
    finally:
        # shutdown() waits for the serving thread, which may be waiting for this loop: aside.
        threading.Thread(target=_close, args=(server, thread), daemon=True).start()


def _close(server: object, thread: threading.Thread) -> None:
    server.shutdown()  # type: ignore[attr-defined]
    server.server_close()  # type: ignore[attr-defined]
    thread.join()
