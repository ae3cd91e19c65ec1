"""How kernels are cut up: tiles that were measured, by device, kernel and shape.

`OP/tiles.json` holds them for an op, made by `python -m crescendo.pallas_kernels.tune OP`; a kernel asks `tuned` for
the one nearest to its call and has a default where nobody measured.
"""

import dataclasses
import functools
import importlib.resources
import json
import math
from typing import Any

from crescendo.pallas_kernels.op import GPUS, target_device

FILE = "tiles.json"


def path(op_name: str):
    """Where an op's table lies."""
    return importlib.resources.files(f"crescendo.pallas_kernels.{op_name}") / FILE


@functools.cache
def table(op_name: str) -> dict[str, list[dict[str, Any]]]:
    """By family of devices, entries with `kernel`, `key`, `length`, `tile` (fields), `ms` and `default_ms`."""
    file = path(op_name)
    return json.loads(file.read_text()) if file.is_file() else {}


def family(kind: str) -> str:
    """The devices that share tiles.

    >>> family("NVIDIA H100 80GB HBM3")
    'H100'
    """
    return next((name for name in GPUS if name in kind), kind)


def tuned[Tile](op_name: str, kernel: str, key: dict[str, Any], length: int, default: Tile) -> Tile:
    """The measured tile with this key and the nearest length on the target device, or `default`.

    Tiles of a device with the same processor count as well (an H200 is an H100 with more memory).

    Args:
      op_name: the op's package.
      kernel: which of its kernels.
      key: what must be equal, such as the width of a head.
      length: what may differ; ratios are compared.
      default: a dataclass; the table's fields replace its own.
    """
    own = family(target_device().kind)
    alike = [name for name, processor in GPUS.items() if processor == GPUS.get(own)]
    entries = [entry for name in dict.fromkeys([own, *alike]) for entry in table(op_name).get(name, [])]
    entries = [entry for entry in entries if entry["kernel"] == kernel and entry["key"] == key]
    if not entries:
        return default
    # The first of the nearest: the device's own.
    nearest = min(entries, key=lambda entry: abs(math.log(entry["length"] / length)))
    return dataclasses.replace(default, **nearest["tile"])  # type: ignore[type-var]
