"""Choose the tiles of an op's kernels by timing them: `python -m crescendo.pallas_kernels.tune OP`.

`OP/tuning.py` names the kernels (`TUNABLES`), each with groups of a tile's fields and the values to try. The values of
a group are tried in every combination that fits, with the best of the groups before. A tile whose results aren't the
default's is refused. The best, the default and the tile in force are timed once more, in turns, and the one in force
stays unless the best is faster by more than the noise. The results go into `OP/tiles.json`, one entry for each kernel,
device, key and length, and replace the one that was there.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels import OPS, tiles
from crescendo.pallas_kernels.bench import Prepared, module, seconds_in_turns, specs
from crescendo.pallas_kernels.op import Spec, Unsupported, target_device

NOISE = 0.01  # the least gain over the default that counts
TOLERANCE = 1e-2  # relative distance of results that are the same but for rounding to bfloat16
EXAMPLES = """examples:
  python -m crescendo.pallas_kernels.tune attention
  python -m crescendo.pallas_kernels.tune attention --kernels forward --specs gpt2 llama --seconds 60
  python -m crescendo.pallas_kernels.tune attention --table tiles.json"""


class Problem(NamedTuple):
    """A call of a kernel whose tile is looked for.

    Attributes:
      key, length: where the answer goes in the table.
      default: the tile, a dataclass, that is taken where the table has none.
      arrays: makes what `run`'s functions take.
      run: `tile -> (function of the arrays)`.
      fits: `tile -> whether it is worth compiling`.
    """

    key: dict[str, Any]
    length: int
    default: Any
    arrays: Callable[[], tuple]
    run: Callable[[Any], Callable]
    fits: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A kernel: `problem(spec)` raises `Unsupported` where it doesn't serve; `groups` are values of a tile's fields."""

    name: str
    problem: Callable[[Spec], Problem]
    groups: Sequence[Mapping[str, Sequence[Any]]]


@dataclasses.dataclass(frozen=True)
class Timing:
    """One tile's time, or why it has none."""

    tile: Any
    seconds: float | None = None
    error: str = ""


def distance(results, wanted) -> float:
    """The greatest relative distance of two trees of arrays."""

    def one(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        apart = jnp.where(a == b, 0, a - b)  # equal infinities: the log-sum-exp of a row that sees nothing
        size = jnp.linalg.norm(jnp.where(jnp.isfinite(b), b, 0))
        return float(jnp.linalg.norm(apart) / jnp.maximum(size, 1e-30))

    worst = [one(a, b) for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(wanted), strict=True)]
    return max(worst) if all(map(math.isfinite, worst)) else math.inf


def timings(run: Callable, arrays: tuple, candidates: Sequence[Any], wanted, threads: int) -> Iterator[Timing]:
    """Compiles the tiles at once, and times them in turns; those that differ from `wanted` have an error."""
    said = lambda error: f"{type(error).__name__}: {error}".split("\n")[0][:160]  # noqa: E731

    def compiled(tile):
        try:
            return jax.jit(run(tile)).lower(*arrays).compile()
        except Exception as error:
            return said(error)

    with ThreadPoolExecutor(threads) as pool:
        distinct = dict.fromkeys(candidates)
        programs = dict(zip(distinct, pool.map(compiled, distinct), strict=True))
    errors = {tile: program for tile, program in programs.items() if isinstance(program, str)}
    prepared: dict[Any, Prepared] = {}
    for tile, program in programs.items():
        if tile in errors:
            continue
        try:
            error_norm = distance(program(*arrays), wanted)
        except Exception as error:
            errors[tile] = said(error)
            continue
        if error_norm < TOLERANCE:
            prepared[tile] = Prepared(functools.partial(program, *arrays), jax.block_until_ready)
        else:
            errors[tile] = f"its results differ from the default's by {error_norm:.2g}"
    seconds = dict(zip(prepared, seconds_in_turns(list(prepared.values())), strict=True))
    for tile in candidates:
        yield Timing(tile, seconds.get(tile), errors.get(tile, ""))


def search(
    tunable: Tunable, problem: Problem, deadline: float, threads: int, show: Callable[[Timing], None], in_force=None
):
    """The timings of the default and of the tile to take.

    `in_force` is the tile that calls take so far, None for the default: it stays unless another is faster by more than
    the noise.
    """
    default, arrays = problem.default, problem.arrays()
    so_far = in_force if in_force is not None and problem.fits(in_force) else default
    wanted = jax.jit(problem.run(default))(*arrays)
    tried: dict[Any, Timing] = {}
    best = so_far
    for group in tunable.groups:
        values = (dict(zip(group, chosen, strict=True)) for chosen in itertools.product(*group.values()))
        candidates = [tile for tile in (dataclasses.replace(best, **fields) for fields in values) if problem.fits(tile)]
        candidates = [tile for tile in dict.fromkeys([default, best, *candidates]) if tile not in tried]
        if time.monotonic() > deadline:
            break
        for timing in timings(problem.run, arrays, candidates, wanted, threads):
            tried[timing.tile] = timing
            show(timing)
        measured = {tile: timing.seconds for tile, timing in tried.items() if timing.seconds is not None}
        best = min(measured, key=measured.__getitem__, default=best)
    missing = Timing(default, error="not measured")
    last = list(dict.fromkeys([default, so_far, best]))
    if len(last) == 1 or tried.get(default, missing).seconds is None:
        return tried.get(default, missing), tried.get(default, missing)
    # Groups were timed at different moments: once more, these in turns.
    again = {timing.tile: timing for timing in timings(problem.run, arrays, last, wanted, threads)}
    seconds = {tile: timing.seconds for tile, timing in again.items() if timing.seconds is not None}
    if default not in seconds or best not in seconds:
        return tried[default], tried[default]
    stays = so_far in seconds and seconds[best] >= seconds[so_far] * (1 - NOISE)
    return again[default], again[so_far if stays else best]


def entry(tunable: Tunable, problem: Problem, default: Timing, best: Timing) -> dict[str, Any]:
    """The table's line: the fields that aren't the default's."""
    fields = dataclasses.asdict(best.tile)
    usual = dataclasses.asdict(problem.default)
    assert best.seconds is not None
    assert default.seconds is not None
    return {
        "kernel": tunable.name,
        "key": problem.key,
        "length": problem.length,
        "tile": {name: value for name, value in fields.items() if value != usual[name]},
        "ms": round(1e3 * best.seconds, 4),
        "default_ms": round(1e3 * default.seconds, 4),
    }


def merged(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """Entries by kernel, key and length; the new ones replace."""
    where = lambda line: (line["kernel"], json.dumps(line["key"], sort_keys=True), line["length"])  # noqa: E731
    lines = {where(line): line for line in [*old, *new]}
    return [lines[at] for at in sorted(lines)]


def write(file: Path, kind: str, new: Sequence[dict]) -> None:
    """Adds entries to the table in `file`, one line each."""
    table: dict[str, Sequence] = {**tiles.read(file)}
    table[kind] = merged(table.get(kind, []), new)
    lines = [
        f" {json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, table[name])) + "\n ]" for name in sorted(table)
    ]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def shown(tile) -> str:
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(tile).items())


def tunable_ops() -> list[str]:
    """The ops whose folder has a `tuning.py`.

    >>> tunable_ops()
    ['attention', 'grouped_matmul']
    """
    return [name for name in OPS if (Path(__file__).parent / name / "tuning.py").is_file()]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        description="Times the tiles of an op's kernels on the device at hand and keeps the best in the op's table.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("op", metavar="OP", help=", ".join(tunable_ops()))
    result.add_argument("--tags", nargs="+", default=["speed"], help="of the specs, all of them (default speed)")
    result.add_argument("--specs", nargs="+", default=[], help="only those of these names")
    result.add_argument("--kernels", nargs="+", default=[], help="only those of these names")
    result.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after so long")
    result.add_argument("--threads", type=int, default=8, help="that compile (default 8)")
    result.add_argument("--table", type=Path, help="the file to add to (default the op's own)")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = parser().parse_args(argv)

    def stop(message: str):
        print(message, file=sys.stderr)
        raise SystemExit(2)

    if arguments.op not in tunable_ops():
        stop(f"{arguments.op!r} is no op with tiles to tune: use {' or '.join(tunable_ops())}")
    tunables = module(arguments.op, "tuning").TUNABLES
    chosen = [t for t in tunables if not arguments.kernels or t.name in arguments.kernels]
    calls = [s for s in specs(arguments.op, arguments.tags) if not arguments.specs or s.name in arguments.specs]
    if not chosen:
        stop(f"no kernel named {arguments.kernels}: there are {', '.join(t.name for t in tunables)}")
    if not calls:
        stop(f"no spec with the tags {arguments.tags} and a name in {arguments.specs}: see --help")
    kind = tiles.family(target_device().kind)
    file = arguments.table or Path(str(tiles.path(arguments.op)))
    if file.exists() and not file.is_file():
        stop(f"{file} is no file: name another --table")
    try:
        tiles.read(file)
    except ValueError as error:
        stop(str(error))
    start = time.monotonic()
    deadline = start + arguments.seconds
    done: dict[Any, str] = {}
    refused: list[str] = []
    for tunable, spec in itertools.product(chosen, calls):
        if time.monotonic() > deadline:
            print(f"out of time: nothing more after {arguments.seconds:.0f} s", flush=True)
            break
        print(f"{time.monotonic() - start:6.1f} s  {spec.name}, {tunable.name}", flush=True)
        try:
            problem = tunable.problem(spec)
        except Unsupported as reason:
            print(f"          not asked for: {reason}", flush=True)
            refused.append(str(reason))
            continue
        at = tunable.name, json.dumps(problem.key), problem.length
        if at in done:
            print(f"          as {done[at]}", flush=True)
            continue
        done[at] = spec.name

        def show(timing: Timing):
            took = f"{1e3 * timing.seconds:9.4f} ms" if timing.seconds else "        -   "
            print(f"{took}  {shown(timing.tile)}  {timing.error}", flush=True)

        in_force = tiles.tuned(arguments.op, tunable.name, problem.key, problem.length, problem.default)
        default, best = search(tunable, problem, deadline, arguments.threads, show, in_force)
        if default.seconds is None or best.seconds is None:
            print(f"          no result: {default.error}", flush=True)
            continue
        print(f"          {default.seconds / best.seconds:.3f}x the default: {shown(best.tile)}", flush=True)
        write(file, kind, [entry(tunable, problem, default, best)])
    if refused and not done:
        stop(f"{arguments.op} can't be tuned here: {refused[0]}")
    print(f"{time.monotonic() - start:6.1f} s  {file}", flush=True)


if __name__ == "__main__":
    main()
