"""The report of a comparison: `report.html` and its plots as PNG files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crescendo.experiments.reports import charts, page, plots, seconds
from crescendo.experiments.reports.compare import Arm, cells, compare, headings, headline, remark
from crescendo.experiments.reports.held_out import last_means
from crescendo.experiments.runs.records import Record
from crescendo.experiments.runs.run import Run, read_run
from crescendo.experiments.runtime import from_python
from crescendo.experiments.runtime.files import file_access

_MAX_EVENTS = 20
_MAX_POINTS = 50
_MAX_SAMPLES = 8


class Points(NamedTuple):
    """All points of a sweep, for its report.

    Attributes:
      names: of the values that the sweep sets.
      rows: of each point the loss and the status as text, and its values.
      figures: over all points.
    """

    names: list[str]
    rows: list[tuple[str, str, list[str]]]
    figures: list[page.Figure]


def write_report(
    runs: Sequence[Path], out: Path, title: str = "Training runs compared", sweep: Points | None = None
) -> Path:
    """Writes `report.html`, which needs no other file and no network, and the plots as PNG files.

    Args:
      runs: run folders; the first one is the baseline.
      out: the folder to write into; made if it doesn't exist.
      title: the page's title.
      sweep: all points of the sweep whose runs these are.

    Returns:
      The path of `report.html`.

    Raises:
      UserError: if a folder is not a run's or `out` can't be written.
    """
    return write_arms(compare([read_run(run) for run in runs]), out, title, sweep)


def _bindings(config: str) -> dict[str, str]:
    """The bindings and macros of an operative gin config, or what a run from Python was given.

    Lines that are indented continue the one before.
    """
    bindings: dict[str, str] = {}
    if config.startswith(from_python.FIRST_LINE):
        config = "started = from Python" + config.removeprefix(from_python.FIRST_LINE).replace("\n# ", "\n")
    for line in config.splitlines():
        name, equals, value = line.partition("=")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if equals and not line[0].isspace():
            bindings[name.strip()] = value.strip().removesuffix("\\").strip()
        elif bindings:
            last = next(reversed(bindings))
            bindings[last] = f"{bindings[last]} {line.strip()}".strip()
    return bindings


def _facts(info: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The entries of `run.json` but the name, as text; nested ones as `outer.inner`."""
    facts: dict[str, str] = {}
    for key, value in info.items():
        if isinstance(value, dict):
            facts |= _facts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            facts[prefix + key] = value
        elif isinstance(value, int) and not isinstance(value, bool):
            facts[prefix + key] = f"{value:,}"
        elif isinstance(value, float):
            facts[prefix + key] = f"{value:,.6g}"
        else:
            facts[prefix + key] = "–" if value is None else json.dumps(value)
    facts.pop("name", None)
    return facts


def _measured(run: Run) -> dict[str, str]:
    """The last means on held-out sets, as text; nothing where the loss is all there is."""
    means = last_means(run)
    return {name: f"{value:.4f}" for name, value in means.items()} if means.keys() - {"loss"} else {}


def _events(run: Run) -> list[str]:
    """Gaps in the run's records, its changes of batch size and settings, warnings and ways back, a sentence each."""
    sentences = [str(gap) for gap in run.gaps]
    for record in _merged(run.events):
        at = f"{record['examples_seen'] / run.info['total_examples']:.0%}"
        if record["kind"] == "batch_size":
            change = f"batch size {record['from']:,} → {record['to']:,}"
            sentences.append(f"{at}: {change} at step {record['step']:,} ({record['reason']})")
        elif record["kind"] == "setting":
            change = f"{record['name']} {record['from']} → {record['to']}"
            sentences.append(f"{at}: {change}, as the run went on from step {record['step']:,}")
        elif record["kind"] in ("warning", "rollback"):
            sentences.append(f"{at}: {record['message']} (step {record['step']:,})")
    more = len(sentences) - _MAX_EVENTS
    return sentences if more <= 0 else [*sentences[:_MAX_EVENTS], f"and {more:,} more"]


def _merged(events: Sequence[Record]) -> list[Record]:
    """The events with steps that were skipped one after the other as one."""
    merged: list[Record] = []
    skips: tuple[int, int] | None = None  # where the latest stand, and how many they are
    for record in events:
        if record["kind"] != "warning" or None in (record.get("first_example"), record.get("last_example")):
            merged.append(record)
        elif skips and merged[skips[0]]["last_example"] == record["first_example"] - 1:
            skips = skips[0], skips[1] + 1
            first = merged[skips[0]]
            start = first.get("first", first["message"])
            message = (
                f"{skips[1]} steps in a row were skipped, examples {first['first_example']:,} to "
                f"{record['last_example']:,}; the first: {start}"
            )
            merged[skips[0]] = {**first, "last_example": record["last_example"], "message": message, "first": start}
        else:
            merged.append(record)
            skips = len(merged) - 1, 1
    return merged


class Sample(NamedTuple):
    """A text that a run wrote: when, after what, and what."""

    at: str
    prompt: str
    text: str


def _samples(run: Run) -> list[Sample]:
    """The last texts of a run, the newest first."""
    records = [record for record in run.events if record["kind"] == "sample"][-_MAX_SAMPLES:]
    return [
        Sample(
            f"{record['examples_seen'] / run.info['total_examples']:.0%}",
            record["prompt"],
            record["text"],
        )
        for record in reversed(records)
    ]


def _eventful(arm: Arm) -> list[tuple[str, Run]]:
    """The runs whose events to show: one for all seeds where these are alike."""
    alike = all(_events(run) == _events(arm.runs[0]) for run in arm.runs)
    return [(arm.name, arm.runs[0])] if alike else [(run.name, run) for run in arm.runs]


def write_arms(arms: Sequence[Arm], out: Path, title: str, sweep: Points | None = None) -> Path:
    """Writes the page and the plots."""
    curves = [(arm.name, arm.runs) for arm in arms]
    runs = [(run, index) for index, arm in enumerate(arms) for run in arm.runs]
    shown = charts.charts_of(curves)
    above = [] if sweep is None else sweep.figures
    path = out / "report.html"
    html = page.render(
        [*above, *(page.figure(chart, curves) for chart in shown)],
        title=title,
        headline=headline(arms if sweep is None else arms[:1]),
        columns=list(headings(arms)),
        rows=[(remark(arm), cells(arm, arms[0])) for arm in arms],
        seconds_columns=seconds.COLUMNS,
        seconds_rows=[(index, row) for index, arm in enumerate(arms) if (row := seconds.cells(arm)) is not None],
        sweep_figures=len(above),
        points=[] if sweep is None else sweep.rows,
        point_names=[] if sweep is None else sweep.names,
        shown_points=_MAX_POINTS,
        runs=[(run.name, index) for run, index in runs],
        events=[(name, index, _events(run)) for index, arm in enumerate(arms) for name, run in _eventful(arm)],
        samples=[(run.name, index, _samples(run)) for run, index in runs],
        tables=[
            ("Held-out sets", page.side_by_side([_measured(run) for run, _ in runs])),
            ("Configuration", page.side_by_side([_bindings(run.config) for run, _ in runs])),
            ("Machine and versions", page.side_by_side([_facts(run.info) for run, _ in runs])),
        ],
    )
    with file_access("write", out):
        out.mkdir(parents=True, exist_ok=True)
        for chart in shown:
            (out / f"{chart.name}.png").write_bytes(plots.render(chart, curves))
        path.write_text(html, encoding="utf-8")
    return path
