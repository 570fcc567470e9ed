"""The node's admin socket: routes each verb to the volumes it concerns, and merges the answers.

Owns no state; the verbs themselves are the volume servers'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import trio

from filer.admin.protocol import BadMessage, Progress
from filer.admin.reports import NodeStatus, NodeTop, TopSample, VolumeReport
from filer.admin.server import Handler, Report, number, text, texts
from filer.errors import Misconfigured
from filer.supervisor.routing import Route, routes
from filer.supervisor.volumes import Volume


class Control:
    def __init__(
        self, volumes: Sequence[Volume], status: Callable[[], NodeStatus]
    ) -> None:
        self._volumes = {volume.settings.name: volume for volume in volumes}
        self._status = status

    def handlers(self) -> dict[str, Handler]:
        return {
            "status": self.status, "top": self.top, "explain": self.explain,
            "flush": self.flush, "evict": self.evict, "warm": self.warm,
        }

    async def status(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        async with trio.open_nursery() as nursery:
            for volume in self._volumes.values():
                nursery.start_soon(volume.refresh)
        return _plain(self._status())

    async def top(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        samples: dict[str, TopSample] = {}

        async def ask(volume: Volume) -> None:
            sample = await volume.top()
            if sample is not None:
                samples[volume.settings.name] = sample

        async with trio.open_nursery() as nursery:
            for volume in self._volumes.values():
                nursery.start_soon(ask, volume)
        status = self._status()
        return _plain(NodeTop(
            node=status.node, health=status.health,
            samples=[samples[name] for name in self._volumes if name in samples]))

    async def explain(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        found = self._routes(text(arguments, "path"))
        if len(found) > 1:
            raise Misconfigured("/ is above all volumes", "name a path in one of them")
        (route,) = found
        answer = await self._volumes[route.volume.name].ask("explain", {"path": route.path})
        return {**answer, "path": _as_clients_see(route, route.path),
                "volume": route.volume.name}

    async def flush(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        return await self._for_each_route("flush", text(arguments, "path"), report)

    async def evict(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        return await self._for_each_route("evict", text(arguments, "path"), report)

    async def _for_each_route(self, verb: str, path: str, report: Report) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for route in self._routes(path):
            answer = await self._volumes[route.volume.name].work(
                verb, {"path": route.path}, report)
            merged = _added(merged, answer)
        return {**merged, "path": path}

    async def warm(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        """The volumes one after the other, so that the rate holds for all together."""
        rate_bytes_s = number(arguments, "rate_bytes_s")
        by_volume: dict[str, list[Route]] = {}
        for path in texts(arguments, "paths"):
            for route in self._routes(path):
                by_volume.setdefault(route.volume.name, []).append(route)
        if not by_volume:
            raise BadMessage("no paths to warm")
        merged: dict[str, Any] = {}
        for name, found in by_volume.items():
            answer = await self._volumes[name].work(
                "warm", {"paths": [route.path for route in found],
                         "rate_bytes_s": None if rate_bytes_s is None else int(rate_bytes_s)},
                _shifted(report, merged))
            failed = [{**failure, "path": _as_clients_see(found[0], failure["path"])}
                      for failure in answer.get("failed", [])]
            merged = _added(merged, {**answer, "failed": failed})
        return merged

    def _routes(self, path: str) -> list[Route]:
        return routes(path, [volume.settings for volume in self._volumes.values()])


def _as_clients_see(route: Route, path: str) -> str:
    return f"{route.volume.junction}/{path}" if path else route.volume.junction


def _shifted(report: Report, so_far: dict[str, Any]) -> Report:
    """Progress of the next volume, counted on from the volumes that are finished."""
    done = so_far.get("bytes", 0) + so_far.get("already_cached_bytes", 0)

    def shifted(progress: Progress) -> None:
        if progress.unit != "bytes" or not done:
            report(progress)
            return
        total = None if progress.total is None else progress.total + done
        report(msgspec.structs.replace(progress, done=progress.done + done, total=total))

    return shifted


def _added(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Counts are added, lists joined, sentences joined; other values are the newer's."""
    merged = {**left, **right}
    for key in left.keys() & right.keys():
        if isinstance(left[key], str):
            if left[key] != right[key]:
                merged[key] = f"{left[key]} {right[key]}".strip()
        elif isinstance(left[key], int | float | list):
            merged[key] = left[key] + right[key]
    return merged


def _plain(report: NodeStatus | NodeTop | VolumeReport) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(report)
    return plain
