"""The line that shows how a run goes."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from crescendo.experiments.runtime.text import RunningMean, compact, duration
from crescendo.pallas_kernels.console import plain_console


class ProgressLine:
    """Shows how a run goes: a live line on a terminal; elsewhere a plain line now and then, and the last one.

    Changes of the batch size and of settings, warnings and ways back are printed above it to stay. The loss and the
    throughput are means over the last 2% of the run. What doesn't fit the terminal's width is left out, least important
    first.

    Args:
      total_examples: where the run ends.
      label: the run's name.
      console: where to print; standard output if None.
      unit: what the throughput counts: "token", "image".
      plain_seconds: the time between two plain lines.
      clock: seconds, for the time between two lines.
    """

    def __init__(
        self,
        total_examples: int,
        label: str,
        console: Console | None = None,
        *,
        unit: str = "token",
        plain_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total_examples, self._label, self._clock = total_examples, label, clock
        self._console = console or plain_console()
        # Drawn only when a record comes: a drawing thread would compete with the loop that dispatches steps.
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False) if terminal else None
        self._interval_seconds = 0.25 if self._live else plain_seconds
        self._shown_at = -math.inf
        self._train: Mapping[str, Any] | None = None
        self._validation: Mapping[str, Any] | None = None
        self._unshown = False
        self._loss, self._per_second = RunningMean(0.02 * total_examples), RunningMean(0.02 * total_examples)
        self._unit = unit

    def __call__(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "train":
            self._train, self._unshown = record, True
            self._loss.add(record["loss"], record["batch_size"])
            self._per_second.add(record[f"{self._unit}s_per_second"], record["batch_size"])
        elif record["kind"] == "validation":
            self._validation, self._unshown = record, True
        elif record["kind"] == "batch_size":
            self._say(record, f"batch size {record['from']:,} → {record['to']:,} ({record['reason']})", "cyan")
        elif record["kind"] == "setting":
            self._say(record, f"{record['name']} {record['from']} → {record['to']}", "cyan")
        elif record["kind"] == "sample":
            self._say(record, f"{record['prompt']!r} → {record['text']!r}", "green")
        elif record["kind"] in ("warning", "rollback"):
            self._say(record, f"{record['kind']}: {record['message']}", "yellow")
        now = self._clock()
        if self._train is not None and self._unshown and now - self._shown_at >= self._interval_seconds:
            self._shown_at = now
            self._show()

    def close(self) -> None:
        if self._unshown and self._train is not None:
            self._show()
        if self._live:
            self._live.stop()

    def _show(self) -> None:
        self._unshown = False
        if self._live:
            self._live.start()
            self._live.update(self, refresh=True)
        else:
            self._console.print(Text("  ".join(self._parts())), soft_wrap=True)

    def _say(self, record: Mapping[str, Any], message: str, style: str) -> None:
        at = f"step {record['step']:,} ({record['examples_seen'] / self._total_examples:.0%})"
        self._console.print(Text(f"{self._label}  {at}  {message}", style=style), soft_wrap=True)

    def _parts(self) -> list[str]:
        """The line's parts, the most important first."""
        record = self._train
        assert record is not None
        seen, per_second = record["examples_seen"], self._per_second.value
        left_units = (self._total_examples - seen) * record[f"{self._unit}s_seen"] / seen
        left = f"{duration(left_units / per_second)} left" if per_second > 0 else ""
        parts = [
            self._label,
            f"{seen / self._total_examples:4.0%}",
            left if left_units > 0 else f"in {duration(record['seconds'])}",
            f"loss {self._loss.value:.3f}",
            f"{compact(per_second)} {'tok' if self._unit == 'token' else self._unit}/s",
            f"batch {record['batch_size']:,}",
            "" if record["learning_rate"] is None else f"lr {record['learning_rate']:.2e}",
            "" if record.get("mfu") is None else f"MFU {record['mfu']:.1%}",
            "" if self._validation is None else _validation(self._validation),
            f"step {record['step']:,}",
        ]
        return [part for part in parts if part]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        parts = self._parts()
        while len(parts) > 2 and len("  ".join(parts)) > options.max_width:
            parts.pop()
        label, *rest = parts
        line = Text(no_wrap=True, overflow="ellipsis").append(label, "bold")
        bar = min(24, options.max_width - len("  ".join(parts)) - 2)
        if bar >= 8:
            assert self._train is not None
            filled = min(bar, round(bar * self._train["examples_seen"] / self._total_examples))
            line.append("  ").append("━" * filled, "cyan").append("━" * (bar - filled), "bright_black")
        yield line.append("".join("  " + part for part in rest))


def _validation(record: Mapping[str, Any]) -> str:
    """A validation's loss, of text also in bits per byte.

    >>> _validation({"loss": 2.5, "bits_per_byte": 1.25})
    'val 2.500 (1.250 bits/byte)'
    """
    bits = f" ({record['bits_per_byte']:.3f} bits/byte)" if "bits_per_byte" in record else ""
    return f"val {record['loss']:.3f}{bits}"
