"""How kernels are cut up: tiles that were measured, by device, kernel and shape.

`OP/tiles.json` holds them for an op, made by `python -m crescendo.pallas_kernels.tune OP`; a kernel asks `tuned` for
the one nearest to its call and has a default where nobody measured. `cut` replaces either.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib.resources
import math
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from typing import Annotated, Any, NotRequired, TypedDict

import pydantic

from crescendo.pallas_kernels.op import GPUS, target_device

FILE = "tiles.json"


_Milliseconds = Annotated[float, pydantic.Field(gt=0)]


@pydantic.with_config(pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Entry(TypedDict):
    """A line of a table: the tile that was measured to be the best for a call.

    Attributes:
      kernel: which of the op's.
      key: what must be equal, such as the width of a head.
      length: what may differ.
      tile: its fields, where they aren't the default's.
      ms, default_ms: how long the kernel takes with it, and with the default.
    """

    kernel: str
    key: dict[str, int | bool | str]
    length: Annotated[int, pydantic.Field(ge=1, lt=2**63)]
    tile: dict[str, int | bool | str]
    ms: NotRequired[_Milliseconds]
    default_ms: NotRequired[_Milliseconds]


def path(op_name: str) -> Traversable:
    """Where an op's table lies."""
    return importlib.resources.files(f"crescendo.pallas_kernels.{op_name}") / FILE


def read(file: Traversable) -> dict[str, list[Entry]]:
    """A table: by family of devices, its entries; empty where there is no such file.

    Raises:
      ValueError: for what is none, naming the first value that is wrong.
    """
    if not file.is_file():
        return {}
    try:
        return pydantic.TypeAdapter(dict[str, list[Entry]]).validate_json(file.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = repr(".".join(map(str, first["loc"])))[1:-1][:100]
        raise ValueError(f"{file} is no table of tiles ({place}: {first['msg']}): restore it") from None


@functools.cache
def table(op_name: str) -> dict[str, list[Entry]]:
    """An op's table; see `read`."""
    return read(path(op_name))


def family(kind: str) -> str:
    """The devices that share tiles.

    >>> family("NVIDIA H100 80GB HBM3")
    'H100'
    """
    return next((name for name in GPUS if name in kind), kind)


_cuts = contextvars.ContextVar[Mapping[tuple[str, str], dict[str, Any]]]("cuts", default={})  # noqa: B039  never changed


@contextlib.contextmanager
def cut(op_name: str, kernel: str, **fields: Any) -> Iterator[None]:
    """Calls traced within cut a kernel up so, whatever table and default say: one of many blocks out of a small call.

    It is no part of what JAX remembers a trace by: functions that were compiled before stay as they are.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Rows:
    ...     rows: int = 64
    >>> with cut("softmax", "made up", rows=8):
    ...     print(tuned("softmax", "made up", {}, 1024, Rows()))
    Rows(rows=8)
    """
    at = op_name, kernel
    token = _cuts.set({**_cuts.get(), at: {**_cuts.get().get(at, {}), **fields}})
    try:
        yield
    finally:
        _cuts.reset(token)


def tuned[Tile](op_name: str, kernel: str, key: dict[str, Any], length: int, default: Tile) -> Tile:
    """The measured tile with this key and the nearest length on the target device, or `default`; see `cut`.

    Tiles of a device with the same processor count as well (an H200 is an H100 with more memory).

    Args:
      op_name: the op's package.
      kernel: which of its kernels.
      key: what must be equal, such as the width of a head.
      length: what may differ; ratios are compared.
      default: a dataclass; the table's fields replace its own.
    """
    measured = nearest(op_name, kernel, key, length)
    fields = {**(measured["tile"] if measured else {}), **_cuts.get().get((op_name, kernel), {})}
    known = {field.name for field in dataclasses.fields(default)}  # type: ignore[arg-type]
    if unknown := sorted(fields.keys() - known):
        raise ValueError(
            f"{path(op_name)}: {kernel} has no {unknown[0]} in its tile: it has {', '.join(sorted(known))}"
        )
    return dataclasses.replace(default, **fields)  # type: ignore[type-var]


def nearest(op_name: str, kernel: str, key: dict[str, Any], length: int) -> Entry | None:
    """The table's entry for a call of `tuned`, if there is one."""
    own = family(target_device().kind)
    alike = [name for name, processor in GPUS.items() if processor == GPUS.get(own)]
    entries = [entry for name in dict.fromkeys([own, *alike]) for entry in table(op_name).get(name, [])]
    entries = [entry for entry in entries if entry["kernel"] == kernel and entry["key"] == key]
    # The first of the nearest: the device's own.
    return min(entries, key=lambda entry: abs(math.log(entry["length"] / length)), default=None)
