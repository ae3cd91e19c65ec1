"""Malformed files for every reader: each is read, or refused in one line, in bounded time and memory.

How to add a reader: a module `tests/chaos/parsers/AREA.py` with a list `PARSERS` of `Parser(name, samples, read)`,
after `from fuzz import Parser` (pytest has this folder on its path: `pyproject.toml`). `samples(folder)` writes small
valid files, or folders of files, and returns their paths; what it writes must not change from one call to the next.
`read(path)` reads one of them as the program does, to the last of what it checks, and returns anything; an `assert` in
it is a failure when it doesn't hold, which is how nonsense that was accepted is found. It is called many times in one
process, so it compiles nothing. The harness copies a sample, spoils it by the format that its name ends with (`.json`,
`.jsonl`, `.gin`, `.npz`, `.safetensors`, `.gz`, any other as bytes) and calls `read`: it must return or raise a
`UserError` of one line.

    python tests/chaos/fuzz.py --list
    python tests/chaos/fuzz.py --parser NAME                        # a thousand inputs, from a seed that is printed
    python tests/chaos/fuzz.py --parser NAME --seed N               # one of them again, with the traceback

An input is a function of the parser's name, its samples and the seed. What fails is kept, and its path is printed.
"""

import argparse
import contextlib
import faulthandler
import importlib.util
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spoil import spoil

from crescendo.experiments.runtime.errors import UserError


class Parser(NamedTuple):
    """A reader of files that others may have written.

    Attributes:
      name: of the reader, for the command line and the tests.
      samples: writes valid files (or folders) into a folder and returns them.
      read: reads one such file (or folder) as the program does.
      seconds: how long a reading may take, of the processor's time.
      memory_bytes: how much memory it may ask for.
    """

    name: str
    samples: Callable[[Path], Sequence[Path]]
    read: Callable[[Path], object]
    seconds: float = 10.0
    memory_bytes: int = 1 << 30


class Verdict(NamedTuple):
    """What became of one input.

    Attributes:
      seed: of the input.
      spoilt: what was done to the sample, in words.
      outcome: "read", "refused" or "failed".
      message: the refusal, or what failed.
      path: where the input is kept if it failed.
    """

    seed: int
    spoilt: str
    outcome: str
    message: str
    path: Path


class TooLongError(BaseException):
    """The reading took too long; no `except Exception` of the reader's takes it for the file's fault."""


def parsers() -> dict[str, Parser]:
    """Every parser by its name, from the modules in `parsers/`."""
    found: dict[str, Parser] = {}
    for path in sorted((Path(__file__).parent / "parsers").glob("*.py")):
        specification = importlib.util.spec_from_file_location(f"fuzz_parsers_{path.stem}", path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        for parser in module.PARSERS:
            assert parser.name not in found, f"two parsers are called {parser.name}"
            found[parser.name] = parser
    return found


def fuzz(parser: Parser, seeds: Sequence[int], folder: Path, loud: bool = False) -> list[Verdict]:
    """Reads the spoilt input of each seed, after every sample as it is.

    Args:
      parser: what reads.
      seeds: of the inputs.
      folder: for samples and inputs; those that failed stay there.
      loud: print the traceback of a failure.

    Raises:
      AssertionError: when a sample isn't read as it is.
    """
    (folder / "samples").mkdir(parents=True)
    samples = [Path(path) for path in parser.samples(folder / "samples")]
    assert samples, f"{parser.name} has no samples"
    for sample in samples:
        outcome, message = attempt(parser, _copied(sample, folder / "as_it_is"), loud=True)
        assert outcome == "read", f"{parser.name}: the sample {sample.name} isn't read as it is: {message}"
        _remove(folder / "as_it_is")
    verdicts = []
    for seed in seeds:
        own, choose = folder / str(seed), random.Random(f"{parser.name} {seed}")
        path = _copied(choose.choice(samples), own)
        spoilt = spoil(path, choose)
        outcome, message = attempt(parser, path, loud)
        if outcome != "failed":
            _remove(own)
        verdicts.append(Verdict(seed, spoilt, outcome, message, path))
    return verdicts


def attempt(parser: Parser, path: Path, loud: bool = False) -> tuple[str, str]:
    """Reads a file: `("read", "")`, `("refused", the line)` or `("failed", why)`."""
    began = time.monotonic()
    try:
        with _bounded(parser.seconds, parser.memory_bytes):
            parser.read(path)
    except UserError as error:
        lines = str(error).splitlines()
        if len(lines) != 1 or not lines[0].strip():
            return "failed", f"refused in {len(lines)} lines: {str(error)!r}"
        return "refused", lines[0]
    except TooLongError:
        return "failed", f"took more than {parser.seconds:g} s"
    except MemoryError:
        return "failed", f"asked for more than {parser.memory_bytes:,} bytes"
    except (Exception, SystemExit) as error:
        if loud:
            traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error} (after {time.monotonic() - began:.1f} s)"
    return "read", ""


@contextlib.contextmanager
def _bounded(seconds: float, memory_bytes: int) -> Iterator[None]:
    """Within it, more time raises `TooLongError`, and more memory makes allocations fail.

    The time is the process' own, or six times as much by the clock, since a machine may have other work. Code that
    never gives the interpreter back ends the process after ten times as much, with every thread's stack.
    """

    def too_long(number: int, frame: Any) -> None:
        del number, frame
        raise TooLongError

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    handlers = {number: signal.signal(number, too_long) for number in (signal.SIGALRM, signal.SIGPROF)}
    with contextlib.suppress(OSError):  # no /proc: the memory isn't bounded
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        most = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (most, limits[1]))
    faulthandler.dump_traceback_later(10 * seconds, exit=True, file=sys.__stderr__)
    began = time.monotonic()
    of_the_test, _ = signal.setitimer(signal.ITIMER_REAL, 6 * seconds)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if of_the_test:
            signal.setitimer(signal.ITIMER_REAL, max(0.1, of_the_test - (time.monotonic() - began)))


def _copied(sample: Path, folder: Path) -> Path:
    """The sample's copy in a folder of its own."""
    folder.mkdir(parents=True)
    return Path((shutil.copytree if sample.is_dir() else shutil.copyfile)(sample, folder / sample.name))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """The command; exits with 1 when an input fails."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--list", action="store_true", help="print the names of all parsers")
    options.add_argument("--parser", help="one of them (default: all)")
    options.add_argument("--seed", type=int, help="of the first input (default: by the clock)")
    options.add_argument("--count", type=int, help="how many inputs (default: 1 with --seed, else 1000)")
    options.add_argument("--keep", type=Path, help="a folder for what fails (default: a temporary one)")
    given = options.parse_args()
    every = parsers()
    if given.list:
        print("\n".join(every))
        return
    if given.parser and given.parser not in every:
        options.error(f"no parser {given.parser!r}: give one of {', '.join(every)}")
    count = given.count or (1 if given.seed is not None else 1000)
    first = time.time_ns() % 10**9 if given.seed is None else given.seed
    keep = given.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    failures = 0
    for name in [given.parser] if given.parser else every:
        print(f"{name}: seeds {first} to {first + count - 1}, in {keep / name}", flush=True)
        began = time.monotonic()
        verdicts = fuzz(every[name], range(first, first + count), keep / name, loud=count == 1)
        counted = [sum(v.outcome == outcome for v in verdicts) for outcome in ("read", "refused", "failed")]
        failures += counted[2]
        for verdict in verdicts:
            if count == 1 or verdict.outcome == "failed":
                print(f"{name} --seed {verdict.seed} ({verdict.spoilt}) {verdict.outcome}: {verdict.message}")
        print("{}: {} read, {} refused, {} failed in {:.1f} s".format(name, *counted, time.monotonic() - began))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
