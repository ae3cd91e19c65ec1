"""What a run's `run.json` says of it: its schema."""

import math
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

from pydantic import Field, with_config

from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError

_Count = Annotated[int, Field(ge=0)]
_AtLeast1 = Annotated[int, Field(ge=1, lt=2**63)]
_Flops = Annotated[float, Field(ge=0)]


@with_config(schemas.OPEN)
class Fixed(TypedDict, total=False):
    """What a run goes on only as; see `trainer/training.py`.

    Attributes:
      arrays: shapes and dtypes of its state, by path (`runs/arrays.py`).
    """

    task: str
    model: dict[str, Any]
    arrays: dict[str, Annotated[str, Field(pattern=r"^[a-z]\w*\[(\d+(, \d+)*)?\]$")]]
    seed: int


@with_config(schemas.OPEN)
class RunInfo(TypedDict, total=False):
    """The content of `run.json`; what else is there is for people."""

    format: int
    name: Required[str]
    unit: Annotated[str, Field(pattern=r"^\w{1,99}$")]
    parameters: _Count
    sequence_length: _AtLeast1
    total_examples: Required[_AtLeast1]
    peak_flops_per_second: _Flops | None
    step_peak_bytes: _Count | None
    microbatch_examples: _AtLeast1
    fingerprint: str
    fixed: Fixed
    ended: str | None
    compilations: _Count
    started: str
    git_commit: str | None
    versions: dict[str, str | None]
    device: str


def read_info(path: Path) -> RunInfo:
    """A run's `run.json`.

    Raises:
      UserError: a file that can't be read, or doesn't say what it should.
    """
    way_on = "restore it or leave this run out"
    info = schemas.read(path, RunInfo, way_on=way_on)
    name = f"flops_per_{info.get('unit', 'token')}"
    flops = info.get(name, 0.0)
    if isinstance(flops, bool) or not isinstance(flops, int | float) or not 0 <= flops < math.inf:
        raise UserError(f"{path}: {name} = {flops!r:.60} must be a number of at least 0; {way_on}")
    return info
