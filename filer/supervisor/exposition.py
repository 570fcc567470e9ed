"""Merges the volume servers' metrics into one Prometheus page.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def merge(texts: Mapping[str, str]) -> list[Metric]:
    """One family for each name, its samples labelled with the volume they came from.

    *texts*: volume name → Prometheus text format.  A text that cannot be parsed is left out:
    one volume's bug must not hide the others.
    """
    merged: dict[str, Metric] = {}
    for volume, text in sorted(texts.items()):
        for family in _families(text):
            into = merged.setdefault(
                family.name, Metric(family.name, family.documentation, family.type))
            into.samples += [
                Sample(s.name, {"volume": volume, **s.labels}, s.value, s.timestamp, s.exemplar)
                for s in family.samples
            ]
    return list(merged.values())


def _families(text: str) -> Iterable[Metric]:
    try:
        return list(text_string_to_metric_families(text))
    except ValueError:
        return []
