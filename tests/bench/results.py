"""What a benchmark row claims, and the table and the JSON made of it.  Pure.

A *row* (N1, N2, …) compares one or more *measures*; its own figures are those of the measure
that is furthest from the target, so that a row is only ok when every measure is.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Target:
    limit: float
    at_most: bool = False
    """Whether smaller is better."""
    of_ratio: bool = True
    """Whether it limits ours ÷ baseline, or ours itself."""

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}{' ×' if self.of_ratio else ''}"

    def met_by(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass(frozen=True, slots=True)
class Measure:
    """Values in the row's unit; those of a baseline were taken in turns with ours."""

    name: str
    ours: tuple[float, ...]
    baseline: tuple[float, ...] = ()

    @property
    def ours_median(self) -> float:
        return statistics.median(self.ours)

    @property
    def baseline_median(self) -> float | None:
        return statistics.median(self.baseline) if self.baseline else None

    @property
    def ratio(self) -> float | None:
        baseline = self.baseline_median
        return self.ours_median / baseline if baseline else None


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    what: str
    unit: str
    target: Target
    measures: tuple[Measure, ...] = ()
    notes: tuple[str, ...] = ()
    """Further figures, and what precisely was measured."""
    scale: float = 1.0
    failure: str = ""
    """Why there are no measures."""

    def _judged(self, measure: Measure) -> float:
        if self.target.of_ratio:
            assert measure.ratio is not None
            return measure.ratio
        return measure.ours_median

    @property
    def worst(self) -> Measure | None:
        if not self.measures:
            return None
        return (max if self.target.at_most else min)(self.measures, key=self._judged)

    def measure_ok(self, measure: Measure) -> bool:
        return self.target.met_by(self._judged(measure))

    @property
    def ok(self) -> bool:
        return bool(self.measures) and all(map(self.measure_ok, self.measures))

    def as_json(self) -> dict[str, Any]:
        worst = self.worst
        return {
            "id": self.id,
            "what": self.what,
            "unit": self.unit,
            "ours": worst and worst.ours_median,
            "baseline": worst and worst.baseline_median,
            "ratio": worst and worst.ratio,
            "target": str(self.target),
            "ok": self.ok,
            "runs": {m.name: {"ours": m.ours, "baseline": m.baseline} for m in self.measures},
            "notes": self.notes,
            "scale": self.scale,
            **({"failure": self.failure} if self.failure else {}),
        }


def merged(earlier: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """*earlier* with *row* in place of the one with its id, in the order of the ids."""
    kept = [r for r in earlier if r["id"] != row["id"]]
    return sorted([*kept, row], key=lambda r: int(r["id"][1:]))


@dataclass(slots=True)
class Report:
    """The rows of one invocation as a table for people."""

    rows: list[Row] = field(default_factory=list)

    def table(self) -> Table:
        table = Table(title="Figures to reach (medians)", title_justify="left")
        table.add_column("id")
        table.add_column("what")
        for name in ("ours", "baseline"):
            table.add_column(name, justify="right")
        table.add_column("unit")
        for name in ("ratio", "target"):
            table.add_column(name, justify="right")
        table.add_column("")
        for row in self.rows:
            if not row.measures:
                table.add_row(row.id, row.what, "", "", "", "", str(row.target), "[red]failed")
            for i, measure in enumerate(row.measures):
                ratio = measure.ratio
                table.add_row(
                    row.id if i == 0 else "",
                    row.what if len(row.measures) == 1 else f"{row.what}: {measure.name}",
                    number(measure.ours_median),
                    "–" if measure.baseline_median is None
                    else number(measure.baseline_median),
                    row.unit,
                    "–" if ratio is None else f"{ratio:.2f}",
                    str(row.target),
                    "[green]ok" if row.measure_ok(measure) else "[yellow]not ok",
                )
        return table


def number(value: float) -> str:
    """Three significant digits, or whole with separators."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
