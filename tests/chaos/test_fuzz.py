"""Malformed files for every reader that has an entry in `parsers/`, and what the harness itself finds."""

import os
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest
from faults import times

from crescendo.experiments.runtime.errors import UserError

INPUTS, FEW = 10_000, 200
PARSERS = fuzz.parsers()


def share(inputs: int) -> int:
    """Of one parser, of so many inputs over all."""
    return -(-inputs // len(PARSERS))


@pytest.mark.parametrize("name", PARSERS)
def test_a_few_malformed_files_are_read_or_refused(name, tmp_path):
    verdicts = fuzz.fuzz(PARSERS[name], range(share(FEW)), tmp_path / "fuzz")
    assert not [v for v in verdicts if v.outcome == "failed"], f"again: python {fuzz.__file__} --parser {name} --seed N"


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PARSERS)
def test_malformed_files_are_read_or_refused(name, tmp_path):
    """In a process of its own, which code that isn't Python's may end."""
    seed, count = os.environ["CRESCENDO_CHAOS_SEED"], share(times(INPUTS))
    command = [sys.executable, fuzz.__file__, "--parser", name, "--seed", seed, "--count", str(count)]
    done = subprocess.run([*command, "--keep", str(tmp_path / "kept")], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def planted(read) -> fuzz.Parser:
    def samples(folder: Path) -> list[Path]:
        (folder / "numbers.json").write_text('{"first": 1, "second": [2, 3]}')
        return [folder / "numbers.json"]

    return fuzz.Parser("planted", samples, read, seconds=0.3, memory_bytes=1 << 26)


class Reader:
    """Reads the sample as it is, and calls `otherwise` for whatever else."""

    def __init__(self, otherwise):
        self.sample, self.otherwise = None, otherwise

    def __call__(self, path):
        content = path.read_bytes() if path.is_file() else b""
        self.sample = self.sample or content
        if content != self.sample:
            self.otherwise()


class InTwoLinesError(UserError):
    """As gin makes them, which adds where in a config a call stood."""

    def __str__(self):
        return "one line\nand another"


def refuse(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("otherwise", "outcome", "says"),
    [
        (lambda: {}["missing"], "failed", "KeyError: 'missing'"),
        (lambda: time.sleep(60), "failed", "took more than 0.3 s"),
        (lambda: bytes(1 << 30), "failed", "asked for more than 67,108,864 bytes"),
        (lambda: sys.exit(3), "failed", "SystemExit: 3"),
        (refuse(InTwoLinesError()), "failed", "refused in 2 lines"),
        (refuse(UserError("numbers.json is damaged")), "refused", "numbers.json is damaged"),
        (lambda: None, "read", ""),
    ],
)
def test_what_is_planted_is_found(otherwise, outcome, says, tmp_path):
    (verdict,) = fuzz.fuzz(planted(Reader(otherwise)), [1], tmp_path / "fuzz")
    assert verdict.outcome == outcome
    assert says in verdict.message
    assert verdict.path.exists() == (outcome == "failed")  # kept


def test_a_seed_makes_the_same_input_again(tmp_path):
    def spoilt(folder, seeds):
        contents = []
        verdicts = fuzz.fuzz(
            planted(lambda path: contents.append(path.read_bytes() if path.is_file() else None)), seeds, folder
        )
        return contents[1:], [verdict.spoilt for verdict in verdicts]

    first, second = spoilt(tmp_path / "first", range(50)), spoilt(tmp_path / "second", range(25, 75))
    assert first[0][25:] == second[0][:25]
    assert first[1][25:] == second[1][:25]
    assert len(set(first[0])) > 40
