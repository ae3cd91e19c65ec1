"""Tables where the output is no terminal."""

import io
import os
import subprocess
import sys

import pytest

from crescendo.pallas_kernels.console import plain_console

PRINT = """
from rich.table import Table
from crescendo.pallas_kernels.console import output_console

table = Table("name", "value")
table.add_row("n" * 70, "v" * 70)
output_console().print(table)
"""


def piped(**environment: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", PRINT],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if name != "COLUMNS"} | environment,
    )
    return run.stdout.splitlines()


def test_a_pipe_gets_every_row_on_one_line_without_escapes():
    lines = piped(FORCE_COLOR="1")
    assert f"│ {'n' * 70} │ {'v' * 70} │" in lines
    assert len({len(line) for line in lines}) == 1
    assert not any("\x1b" in line for line in lines)


def test_columns_of_the_environment_are_heeded():
    assert max(map(len, piped(COLUMNS="60"))) == 60


def test_a_reader_that_went_away_is_an_error_and_standard_output_stays():
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    output = os.fstat(sys.stdout.fileno())
    with pytest.raises(BrokenPipeError):
        plain_console(file=Closed()).print("a line")
    assert os.path.samestat(os.fstat(sys.stdout.fileno()), output)
