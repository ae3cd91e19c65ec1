"""Runs compared: arms with the means of their seeds, against the first; as a table for the terminal."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from crescendo.experiments.reports import charts
from crescendo.experiments.runs.run import Run, read_run
from crescendo.experiments.runtime.text import compact

_COLUMNS = {  # the page's heading: the terminal's, short enough for 80 columns
    "run": "run",
    "validation loss": "val\nloss",
    "bits per byte": "bits\n/byte",
    "against baseline": "vs\nfirst",
    "optimizer steps": "steps",
    "steps saved": "steps\nsaved",
    "examples": "examples",
    "tokens": "tokens",
    "seconds": "seconds",
    "tokens/s": "tokens\n/s",
    "peak batch size": "peak\nbatch",
}


@dataclass(frozen=True)
class Arm:
    """One row of the comparison: a run, or the mean over the runs that differ in their seed alone.

    Attributes:
      name: the run's name, without the seed if there are several.
      runs: the runs.
      validation_loss: the last one, in nats per token; None before the first.
      bits_per_byte: the loss in bits per byte of text, which can be compared between tokenizers; None where it isn't
        known.
      validation_spread: its sample standard deviation over seeds; None for a single run.
      loss_difference: to the baseline's; positive is worse. None for the baseline, or where a loss is missing or not
        finite.
      steps: optimizer steps.
      steps_saved: 1 - steps / the baseline's steps; None for the baseline, or where the two saw different amounts of
        data (by more than 1% and more than a batch), since their steps can't be compared then.
      examples: drawn so far.
      tokens: seen so far.
      seconds: of training.
      tokens_per_second: over the whole run; None before the first step.
      peak_batch_size: in examples; None before the first step.
      done: the fraction of the planned examples that was seen.
    """

    name: str
    runs: tuple[Run, ...]
    validation_loss: float | None
    validation_spread: float | None
    steps: float
    examples: float
    tokens: float
    seconds: float
    tokens_per_second: float | None
    peak_batch_size: int | None
    done: float
    bits_per_byte: float | None = None
    loss_difference: float | None = None
    steps_saved: float | None = None


def compare(runs: Sequence[Run]) -> list[Arm]:
    """The runs' arms in order of their first run, with the differences to the first arm."""
    baseline, *others = [_arm(name, group) for name, group in _group_seeds(_distinct(runs))]
    return [baseline, *(_relative(arm, baseline) for arm in others)]


def comparison_table(runs: Sequence[Path]) -> Table:
    """The comparison of run folders for the terminal; the first one is the baseline.

    Raises:
      UserError: if a folder is not a run's.
    """
    return arms_table(compare([read_run(run) for run in runs]))


def headline(arms: Sequence[Arm]) -> str:
    """The main result in a sentence: which arm ends at the lowest validation loss, and by how much.

    It is compared with the first arm, and where it is the first with the next best. Where seeds are known, a difference
    that is no larger than their spread, the larger standard deviation of the two, is no difference.
    """
    ranked = sorted((arm for arm in arms if _is_known(arm)), key=lambda arm: arm.validation_loss or 0.0)
    if len(arms) == 1 or not ranked:
        first = arms[0]
        loss = "no validation loss yet" if first.validation_loss is None else f"{_loss(first)} nats"
        return f"{first.name}: {loss} after {first.steps:,.0f} steps and {compact(first.tokens)} tokens"
    best = ranked[0]
    if len(ranked) == 1:
        return f"{best.name}: {_loss(best)} nats; no other run has a finite validation loss"
    other = ranked[1] if best is arms[0] or not _is_known(arms[0]) else arms[0]
    best = _relative(best, other)
    assert best.loss_difference is not None
    seeds = " (one seed each)" if len(best.runs) == len(other.runs) == 1 else ""
    spread = max(arm.validation_spread or 0.0 for arm in (best, other))
    below = abs(best.loss_difference)
    if below <= spread:
        within = ", within the spread of their seeds" if spread else ""
        result = (
            f"No clear winner{seeds}: {best.name} ({_loss(best)} nats) and {other.name} ({_loss(other)}) differ by "
        )
        result += f"{below:.3f}{within}"
    else:
        result = f"{best.name} wins{seeds}: {_loss(best)} nats, {below:.3f} below {other.name} ({_loss(other)})"
    return f"{result}; {_effort(best, other)}"


def _is_known(arm: Arm) -> bool:
    return arm.validation_loss is not None and math.isfinite(arm.validation_loss)


def _effort(arm: Arm, other: Arm) -> str:
    """What two arms took: steps at equal data, else the data."""
    if arm.steps_saved is None:
        return f"{arm.name} saw {compact(arm.tokens)} tokens, {other.name} {compact(other.tokens)}"
    if arm.steps == other.steps:
        return f"both took {arm.steps:,.0f} steps"
    fewer, more = sorted((arm, other), key=lambda each: each.steps)
    share = 1 - fewer.steps / more.steps
    return f"{fewer.name} took {share:.0%} fewer steps ({fewer.steps:,.0f} against {more.steps:,.0f})"


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs, with the folder added to names that occur more than once."""
    names = [run.name for run in runs]
    return [
        replace(run, info={**run.info, "name": f"{run.name} ({run.folder})"}) if names.count(run.name) > 1 else run
        for run in runs
    ]


def _group_seeds(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Arms by name: the runs that share a name up to the seed; a lone run keeps its whole name."""
    groups: dict[tuple[str, bool], list[Run]] = {}
    for run in runs:
        seed = re.fullmatch(r"(.+)seed[-_=]?\d+", run.name)
        name = seed and (seed[1].rstrip("-_ ,./") or seed[1])
        groups.setdefault((name, True) if name else (run.name, False), []).append(run)
    return [(name if len(group) > 1 else group[0].name, group) for (name, _), group in groups.items()]


def _arm(name: str, runs: Sequence[Run]) -> Arm:
    """The means over an arm's runs; a run without a step counts as zero steps."""
    losses = [run.validation["loss"][-1] for run in runs if len(run.validation["loss"])]
    bits = [run.validation["bits_per_byte"][-1] for run in runs if "bits_per_byte" in run.validation]
    trained = [run.train for run in runs if len(run.train["step"])]
    seconds, tokens, examples, steps = (
        sum(train[column][-1].item() for train in trained)
        for column in ("seconds", "units_seen", "examples_seen", "step")
    )
    with np.errstate(invalid="ignore"):  # the spread of losses that are not finite is NaN
        spread = float(np.std(losses, ddof=1)) if len(losses) > 1 else None
    return Arm(
        name=name,
        runs=tuple(runs),
        validation_loss=float(np.mean(losses)) if losses else None,
        validation_spread=spread,
        steps=steps / len(runs),
        examples=examples / len(runs),
        tokens=tokens / len(runs),
        seconds=seconds / len(runs),
        tokens_per_second=tokens / seconds if seconds > 0 else None,
        peak_batch_size=max((int(train["batch_size"].max()) for train in trained), default=None),
        bits_per_byte=float(np.mean(bits)) if bits else None,
        done=examples / sum(run.info["total_examples"] for run in runs),
    )


def _relative(arm: Arm, baseline: Arm) -> Arm:
    """The arm with its differences to the baseline."""
    difference, saved = math.nan, None
    if arm.validation_loss is not None and baseline.validation_loss is not None:
        difference = arm.validation_loss - baseline.validation_loss
    slack = max(0.01 * baseline.examples, arm.peak_batch_size or 0, baseline.peak_batch_size or 0)
    if baseline.steps and arm.steps and abs(arm.examples - baseline.examples) <= slack:
        saved = 1 - arm.steps / baseline.steps
    return replace(arm, loss_difference=difference if math.isfinite(difference) else None, steps_saved=saved)


def cells(arm: Arm, baseline: Arm) -> list[str]:
    """The arm's row, a cell for each of the `headings`."""
    return [
        arm.name,
        _loss(arm),
        *([] if baseline.bits_per_byte is None else [_number(arm.bits_per_byte, ".3f")]),
        "" if arm is baseline else _number(arm.loss_difference, "+.3f"),
        _number(arm.steps, ",.0f"),
        "" if arm is baseline else _number(arm.steps_saved, ".1%"),
        _number(arm.examples, ",.0f"),
        compact(arm.tokens),
        _number(arm.seconds, ",.0f" if arm.seconds >= 100 else ".1f"),
        "–" if arm.tokens_per_second is None else compact(arm.tokens_per_second),
        _number(arm.peak_batch_size, ",d"),
    ]


def remark(arm: Arm) -> str:
    """What a reader must know of the arm beside its name: its seeds, whether it has ended, lost records."""
    seeds = f"{len(arm.runs)} seeds" if len(arm.runs) > 1 else ""
    done = f"{arm.done:.0%} done" if arm.done < 1 else ""
    lost = "records missing" if any(run.gaps for run in arm.runs) else ""
    return ", ".join(filter(None, [seeds, done, lost]))


def _number(value: float | None, spec: str) -> str:
    """The value in a format, with a true minus sign; a dash where there is none."""
    return "–" if value is None else format(value, spec).replace("-", "−")


def _loss(arm: Arm) -> str:
    """The arm's validation loss, with its spread over seeds."""
    spread = "" if arm.validation_spread is None else f" ± {arm.validation_spread:.3f}"
    return _number(arm.validation_loss, ".3f") + spread


def headings(arms: Sequence[Arm]) -> dict[str, str]:
    """`_COLUMNS` in the words of what the runs count; without the bits per byte where the first arm has none."""
    runs = [run for arm in arms for run in arm.runs]
    shown = {
        page: text for page, text in _COLUMNS.items() if page != "bits per byte" or arms[0].bits_per_byte is not None
    }
    return {charts.in_units(page, runs): charts.in_units(terminal, runs) for page, terminal in shown.items()}


def arms_table(arms: Sequence[Arm]) -> Table:
    """The comparison in 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, header_style="bold")
    name, *numbers = headings(arms).values()
    table.add_column(name, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in arms:
        name, loss, *numbers = cells(arm, arms[0])
        note = remark(arm)
        table.add_row(Text(f"{name} ({note})" if note else name), loss.replace(" ± ", "\n±"), *numbers)
    return table
