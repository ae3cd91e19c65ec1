"""The list of results: what a kill leaves, and what an older run wrote."""

import json
import math
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import pytest
from pydantic import with_config

from crescendo.experiments.runs.results import Results
from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError


class Part(NamedTuple):
    seed: int
    factor: int


@with_config(schemas.STRICT)
class PartRecord(TypedDict):
    seed: int
    factor: int
    losses: list[float | None]


def open_list(folder: Path) -> Results[Part]:
    return Results(folder, "parts.jsonl", Part)


def test_a_part_torn_by_a_kill_is_left_out_and_spoils_no_other(tmp_path: Path):
    results = open_list(tmp_path)
    results.add({"seed": 0, "factor": 1, "loss": 1.5})
    whole = results.path.read_bytes()
    results.add({"seed": 0, "factor": 2, "loss": None})
    full = results.path.read_bytes()
    for cut in range(len(whole), len(full)):
        results.path.write_bytes(full[:cut])
        again = open_list(tmp_path)
        # all of a line but its end is a whole line
        assert list(again.records) == [Part(0, 1), Part(0, 2)][: 1 + (cut == len(full) - 1)]
        again.add({"seed": 1, "factor": 1, "loss": 2.0})
        assert open_list(tmp_path).records == again.records


@pytest.mark.parametrize("text", ['\n{"seed": 0, "factor": 1}\n{"seed": 0, "factor": 2}', '{"factor": 1, "seed": 0}\n'])
def test_files_with_the_end_of_a_line_before_or_behind_it_are_read(tmp_path: Path, text: str):
    (tmp_path / "parts.jsonl").write_text(text)
    results = open_list(tmp_path)
    assert len(results.records) == text.count("seed")
    results.add({"seed": 5, "factor": 5})
    assert len(open_list(tmp_path).records) == text.count("seed") + 1


def test_a_number_that_json_does_not_know_is_null_and_held_as_it_is_read_back(tmp_path: Path):
    results = open_list(tmp_path)
    results.add({"seed": 0, "factor": 1, "losses": (1.5, math.nan), "best": np.float32("-inf")})
    assert results.records == {Part(0, 1): {"seed": 0, "factor": 1, "losses": [1.5, None], "best": None}}
    assert open_list(tmp_path).records == results.records
    json.loads(results.path.read_bytes(), parse_constant=pytest.fail)


def test_a_list_of_something_else_is_one_clear_error(tmp_path: Path):
    (tmp_path / "parts.jsonl").write_text('{"seed": 0}\n')
    with pytest.raises(UserError, match=r"parts.jsonl has no seed, factor at line 1: remove that line"):
        open_list(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"seed": 0, "factor": 2.0}, "line 2: factor = 2.0: input should be a valid integer"),
        ({"seed": True, "factor": 2}, "line 2: seed = True: input should be a valid integer"),
        ({"seed": [0], "factor": 2}, r"line 2: seed = \[0\]: input should be a valid integer"),
        ([0, 2], "has no seed, factor at line 2"),
        ({"seed": 0, "factor": 2, "losses": [1.0, "x"]}, r"line 2: losses.1 = 'x': input should be a valid number"),
        (
            {"seed": 0, "factor": 2, "losses": [1.0, math.inf]},
            r"line 2: losses.1 = inf: input should be a finite number",
        ),
        ({"seed": 0, "factor": 2}, "line 2 has no losses"),
        ({"seed": 0, "factor": 2, "losses": [], "note": 1}, "line 2: note isn't understood"),
        ('{"seed": 0, "factor": 2, "seed": 1, "losses": []}', "line 2 has 'seed' twice in one object"),
        ({"seed": 0, "factor": 1, "losses": [2.0]}, "line 2 is the second of seed = 0, factor = 1, and another"),
    ],
)
def test_a_line_that_is_no_result_is_named(tmp_path: Path, line, message: str):
    first = {"seed": 0, "factor": 1, "losses": [1.5, None]}
    second = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "parts.jsonl").write_text(f"{json.dumps(first)}\n{second}\n")
    with pytest.raises(UserError, match=rf"parts\.jsonl:? {message}"):
        Results(tmp_path, "parts.jsonl", Part, PartRecord)


def test_a_line_that_stands_there_twice_is_one_result(tmp_path: Path):
    line = json.dumps({"seed": 0, "factor": 1, "losses": [1.5]}) + "\n"
    (tmp_path / "parts.jsonl").write_text(2 * line)
    assert list(Results(tmp_path, "parts.jsonl", Part, PartRecord).records) == [Part(0, 1)]


def test_settings_that_change_the_meaning_are_named(tmp_path: Path):
    open_list(tmp_path).check_same({"batch_size": 2})
    open_list(tmp_path).check_same({"batch_size": 2})
    with pytest.raises(UserError, match="batch_size was 2 and is now 4"):
        open_list(tmp_path).check_same({"batch_size": 4})
    assert json.loads((tmp_path / "run.json").read_text())["fixed"] == {"batch_size": 2}
