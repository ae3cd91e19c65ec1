"""What a checkpoint says of itself beside its arrays: the clock, what the run is, fingerprints, one over all of these.

Read without orbax: a file of JSON, `CHECKPOINT/meta/metadata`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic

from crescendo.experiments.runs.state import Clock
from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, read_file

Count = Annotated[int, pydantic.Field(ge=0)]
Print = Annotated[int, pydantic.Field(ge=0, lt=2**32)]


_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class DamagedError(Exception):
    """Why a checkpoint can't be used."""


class SavedClock(schemas.OpenSchema):
    """`Clock`, as a checkpoint has it."""

    examples_seen: Count
    steps: Count
    batch_size: Count
    seconds: Annotated[float, pydantic.Field(ge=0)]


class RunIdentity(schemas.OpenSchema):
    """What a run goes on only as, beside `run.json`, which may be lost.

    Attributes:
      format: the version of what runs keep.
      fixed: what decides its arrays, its data and its draws.
    """

    format: int
    fixed: dict[str, Any]


class Metadata(schemas.OpenSchema):
    """What a checkpoint says of itself.

    Attributes:
      clock: where the run stood.
      run: what it is; None: saved by a version that didn't keep it.
      fingerprint: of all else here, SHA-256; None: saved by a version that had none.
      fingerprints: of the state's arrays.
      evaluation_fingerprints: of the parameters to use, where those aren't the state's.
    """

    clock: SavedClock
    run: RunIdentity | None = None
    fingerprint: str | None = None
    fingerprints: list[Print]
    evaluation_fingerprints: list[Print] | None = None

    def of(self, item: str) -> list[int]:
        """The fingerprints of an item's arrays.

        Raises:
          DamagedError: it has none.
        """
        prints = self.fingerprints if item == "state" else self.evaluation_fingerprints
        if prints is None:
            raise DamagedError(f"its metadata have no fingerprints of its item {item}")
        return prints


def sealed(
    clock: Clock,
    run: Mapping[str, Any] | None,
    fingerprints: Sequence[int],
    evaluation_fingerprints: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What a checkpoint is to say, as JSON, with the fingerprint over it."""
    says: dict[str, Any] = {"clock": dataclasses.asdict(clock), "run": run, "fingerprints": list(fingerprints)}
    if evaluation_fingerprints is not None:
        says["evaluation_fingerprints"] = list(evaluation_fingerprints)
    return {"fingerprint": _fingerprint(says), **says}


def _fingerprint(says: Mapping[str, Any]) -> str:
    text = json.dumps({name: value for name, value in says.items() if name != "fingerprint"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read(checkpoint: Path, number: int) -> Metadata:
    """What the checkpoint in a folder says of itself, compared with its fingerprint and with the checkpoint's number.

    Raises:
      DamagedError: it isn't what was saved.
      UserError: it can't be read.
    """
    path = checkpoint / "meta" / "metadata"
    try:
        content = read_file(path)
    except UserError as error:
        # What is there and no file, or nothing, is damage; what the system keeps from being read isn't.
        is_damage = error.__cause__ is None or isinstance(error.__cause__, _NO_FILE)
        if is_damage and checkpoint.exists():
            raise DamagedError("its metadata are missing, or no file") from None
        raise
    try:
        says = schemas.parse(content, Metadata, "its metadata")
        everything = schemas.parse(content, dict[str, Any], "its metadata")
    except UserError as error:
        raise DamagedError(str(error)) from None
    if says.fingerprint is None and says.run is not None:
        raise DamagedError("its metadata have lost their fingerprint")
    if says.fingerprint not in (None, _fingerprint(everything)):
        raise DamagedError("its metadata are not the ones that were saved")
    if says.clock.examples_seen != number:
        raise DamagedError(f"its clock says {says.clock.examples_seen} examples")
    return says


def numbers(checkpoints: Path) -> list[int]:
    """The numbers of the checkpoints in a folder, increasing; none where it isn't there.

    Raises:
      UserError: the folder can't be read.
    """
    with file_access("read", checkpoints):
        names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii())


def newest_identity(checkpoints: Path) -> RunIdentity | None:
    """What the newest of a run's checkpoints that says so says that the run is; None where none does.

    Raises:
      UserError: one can't be read.
    """
    for number in reversed(numbers(checkpoints)):
        try:
            if (identity := read(checkpoints / str(number), number).run) is not None:
                return identity
        except DamagedError:
            continue
    return None
