"""JSON from elsewhere: read as its schema has it, or refused in a line that names what is wrong."""

import json
import os
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import AfterValidator

from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.text import visible


class Inner(schemas.Schema):
    size: int


class Outer(schemas.Schema):
    name: str
    inner: Inner
    rate: float = 1.0


def check_even(value: int) -> int:
    if value % 2:
        raise ValueError(f"{value} is odd")
    return value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"name": "a"}', "here has no inner"),
        ('{"name": "a", "inner": {"size": 2.0}}', "here: inner.size = 2.0: input should be a valid integer"),
        ('{"name": "a", "inner": {"size": 2}, "rate": NaN}', "here: rate = nan: input should be a finite number"),
        ('{"name": "a", "inner": {"size": 2}, "rate": 1e999}', "here: rate = inf: input should be a finite number"),
        ('{"name": "a", "inner": {"size": 2}, "rte": 1}', "here: rte isn't understood"),
        ('{"name": "a", "inner": {"size": 2}, "\\n[b]": 1}', r"here: \n[b] isn't understood"),
        ('{"name": "a", "name": "b", "inner": {"size": 2}}', "here has 'name' twice in one object"),
        ('{"name": "a", "inner": {"size": 2, "size": 2}}', "here has 'size' twice in one object"),
        ("[" * 100_000, "here is damaged (invalid JSON: recursion limit exceeded"),
        ('{"name": "\\ud800", "inner": {"size": 2}}', "here is damaged (invalid JSON"),
        ('{"name": "a", "inner": {"size": ' + "9" * 10_000, "here is damaged (invalid JSON: number out of range"),
        ('{"name": "' + "x" * 10_000 + '", "inner": 1}', "here: inner = 1: input should be an object"),
    ],
)
def test_what_is_wrong_is_named_in_a_line(content: str, message: str):
    with pytest.raises(UserError) as refused:
        schemas.parse(content.encode(), Outer, "here", way_on="mend it")
    assert str(refused.value).startswith(message)
    assert str(refused.value).endswith("; mend it")
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 300


def test_a_value_that_a_check_of_ours_refuses_is_told_in_its_words():
    with pytest.raises(UserError, match=r"^here: 3 is odd$"):
        schemas.checked(3, Annotated[int, AfterValidator(check_even)], "here")
    with pytest.raises(UserError, match=r"^here: 1: 3 is odd$"):
        schemas.checked([2, 3], list[Annotated[int, AfterValidator(check_even)]], "here")


def test_what_is_no_file_or_too_large_is_not_read(tmp_path: Path):
    (tmp_path / "outer.json").write_text(json.dumps({"name": "a", "inner": {"size": 2}}))
    assert schemas.read(tmp_path / "outer.json", Outer).inner.size == 2
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match=r"pipe\.json is no file that can be read to its end"):
        schemas.read(tmp_path / "pipe.json", Outer)
    with pytest.raises(UserError, match="bytes, above the 9 that it may have"):
        schemas.read(tmp_path / "outer.json", Outer, limit_bytes=9)


def test_what_a_terminal_takes_for_an_order_is_not_shown():
    assert visible("\x1b[2J\r\x00\ud800\u202e é 字\t\n") == "\ufffd[2J\ufffd\ufffd\ufffd\ufffd é 字\t\n"
