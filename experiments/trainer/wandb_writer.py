"""Metrics to Weights & Biases: `train.writers = ["wandb"]`."""

import contextlib
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from crescendo.experiments.runs.records import Record
from crescendo.experiments.runtime.encoding import read_text
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access
from crescendo.experiments.trainer.observers import Thinned


class WandbWriter:
    """Sends every number of the records as `kind/name` against `examples_seen`, to the project of $WANDB_PROJECT.

    Training records are thinned to one in half a second, and the last one always gets in. A run that is resumed goes
    on under its own id, kept in the folder; what it records a second time after a kill is there twice, since the
    service forgets nothing. `WANDB_MODE=offline` keeps everything in the folder, for `wandb sync`: there each part of a
    run that is resumed is a run of its own in the group of that id, since of two parts with one id the later one synced
    replaces the other.

    Args:
      folder: the run's; gets a folder `wandb`.
      label: the run's name.

    Raises:
      UserError: if the package isn't installed, or doesn't begin a run (no key, no network).
    """

    def __init__(self, folder: Path, label: str):
        wandb = _wandb()
        place = folder / "wandb_id"
        with file_access("write", folder):
            if not place.exists():
                place.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        name = read_text(place).strip()
        try:
            offline = wandb.setup().settings.mode in ("offline", "dryrun")
            identity = {"id": f"{name}-{uuid.uuid4().hex[:6]}", "group": name} if offline else {"id": name}
            settings = wandb.Settings(silent=True)
            self._run = wandb.init(dir=str(folder), name=label, resume="allow", settings=settings, **identity)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"Weights & Biases: {reason}; `wandb login`, or WANDB_MODE=offline, or no writer"
            ) from error
        self._run.define_metric("*", step_metric="examples_seen")
        self._thinned = Thinned(self._send)

    @staticmethod
    def check() -> None:
        """Raises UserError where the package isn't installed."""
        _wandb()

    def __call__(self, record: Record) -> None:
        self._thinned(record)

    def close(self) -> None:
        """Sends what is left, and ends the run there."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._run.finish)
            self._thinned.flush()

    def _send(self, record: Record) -> None:
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float | np.number)}
        seen = numbers.pop("examples_seen")
        self._run.log({"examples_seen": seen} | {f"{record['kind']}/{name}": x for name, x in numbers.items()})


def _wandb() -> Any:
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError("train.writers = ['wandb'] needs the package wandb: pip install 'crescendo[wandb]'") from None
    return wandb
