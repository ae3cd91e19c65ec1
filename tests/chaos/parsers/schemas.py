"""Readers of `experiments/runtime`: the bounded reading of a file, and JSON checked against a schema."""

import json
from pathlib import Path

from fuzz import Parser

from crescendo.experiments.runtime import schemas


class _Point(schemas.Schema):
    name: str
    sizes: tuple[int, ...]
    at: dict[str, float]


def _samples(folder: Path) -> list[Path]:
    path = folder / "point.json"
    path.write_text(json.dumps({"name": "first", "sizes": [8, 16, 32], "at": {"loss": 2.5, "rate": 1e-3}}))
    return [path]


def _read(path: Path) -> None:
    point = schemas.read(path, _Point)
    assert all(isinstance(size, int) for size in point.sizes)


PARSERS = [Parser("schema", _samples, _read)]
