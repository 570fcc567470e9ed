"""From the paths that people name to volumes and paths in them.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from filer.errors import Misconfigured
from filer.settings import VolumeSettings


@dataclass(frozen=True, slots=True)
class Route:
    volume: VolumeSettings
    path: str
    """Relative to the volume's root; ``""`` is the root."""


def routes(path: str, volumes: Sequence[VolumeSettings]) -> list[Route]:
    """The volume of a path such as ``/shows/a/b.exr``; ``/`` names all volumes.

    Raises: Misconfigured: no junction is a prefix of it.
    """
    components = [c for c in path.split("/") if c not in ("", ".")]
    hint = f"exported here: {', '.join(v.junction for v in volumes)}"
    if not path.startswith("/"):
        raise Misconfigured(
            f"{path!r} is not a path as clients see it; it must start with /", hint)
    if ".." in components:
        raise Misconfigured(f"{path!r} must not contain ..", hint)
    if not components:
        return [Route(volume, "") for volume in volumes]
    for volume in volumes:
        junction = volume.junction.split("/")[1:]
        if components[: len(junction)] == junction:
            return [Route(volume, "/".join(components[len(junction):]))]
    raise Misconfigured(f"{path!r} is in no volume of this node", hint)
