"""Time kernels over their specs, beside what else a user could call: `python -m crescendo.pallas_kernels.bench OP`.

A spec's call is timed forward, and forward and backward (the gradients of its `differentiable` arguments, for random
cotangents). `OP/peers.py` names the others: `PEERS`, functions of the op's own arguments, and `torch_peers()`,
functions of the same arrays as tensors, compiled by torch where it is installed.
"""

import argparse
import dataclasses
import functools
import importlib
import io
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from crescendo.pallas_kernels import OPS
from crescendo.pallas_kernels.console import output_console
from crescendo.pallas_kernels.op import Spec, Unsupported, explain

EXAMPLES = """examples:
  python -m crescendo.pallas_kernels.bench softmax
  python -m crescendo.pallas_kernels.bench attention --plot attention.png
  python -m crescendo.pallas_kernels.bench linear_cross_entropy --passes backward --tags speed
  python -m crescendo.pallas_kernels.bench rms_norm --only triton xla --json rms_norm.json
  python -m crescendo.pallas_kernels.bench attention --specs gpt2 llama --only mosaic_gpu tokamax
  python -m crescendo.pallas_kernels.bench softmax --passes forward --calls 20"""


@dataclasses.dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
      seconds: a call's, the median.
      extra_bytes: what the compiled program, of one call or several, needs beside its arguments and results; None for
        peers of torch.
      error: why there is no measurement.
    """

    op: str
    spec: str
    who: str
    passes: str
    seconds: float | None
    extra_bytes: int | None = None
    error: str = ""


class Prepared(NamedTuple):
    """A compiled program, how to wait for its results, the bytes it needs beside them, and how many calls it makes.

    `extra_bytes` is None where unknown.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    extra_bytes: int | None = None
    calls: int = 1


def seconds_in_turns(prepared: Sequence[Prepared], at_least: float = 0.03, rounds: int = 7) -> list[float]:
    """A program's seconds, the median over rounds in which everyone has a turn.

    So a device that warms up is everyone's. But it also throttles by what was just drawn: whoever follows a program
    that hardly works runs faster. So the order is another one in every round, and a turn is run twice and its second
    half timed. A half is as many calls as take `at_least` seconds, dispatched without waiting.
    """
    counts = []
    for call, wait, *_ in prepared:
        wait(call())
        start = time.perf_counter()
        wait(call())
        counts.append(max(2, min(300, round(at_least / (time.perf_counter() - start)))))
    runs: list[list[float]] = [[] for _ in prepared]
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for i in order.permutation(len(prepared)):
            call, wait, *_ = prepared[i]
            for _ in range(2):
                start = time.perf_counter()
                for _ in range(counts[i]):
                    result = call()
                wait(result)
            runs[i].append((time.perf_counter() - start) / counts[i])
    return [statistics.median(seconds) for seconds in runs]


def compiled(function: Callable, spec: Spec, passes: str, calls: int = 1):
    """A program of the spec's call of `function`, and what it takes: `(compiled, arguments)`.

    Args:
      function: takes the op's arguments.
      passes: "forward" or "backward", which is both.
      calls: how often, each time on arrays of its own.
    """

    drawn = [spec.inputs(seed) for seed in range(calls)]
    fixed = {name: value for name, value in drawn[0][1].items() if not isinstance(value, jax.Array)}

    def forward(arguments, named):
        return function(*arguments, **named, **fixed)

    def backward(arguments, named, cotangents):
        def of(differentiable):
            merged = list(arguments)
            for i, value in zip(spec.differentiable, differentiable, strict=True):
                merged[i] = value
            return forward(merged, named)

        results, back = jax.vjp(of, [arguments[i] for i in spec.differentiable])
        return results, back(cotangents)

    arrays: list[tuple] = [
        (arguments, {name: value for name, value in options.items() if name not in fixed})
        for arguments, options in drawn
    ]
    one = forward if passes == "forward" else backward
    if passes == "backward":
        shapes = jax.eval_shape(forward, *arrays[0])
        random = lambda y: jax.random.normal(jax.random.key(1), y.shape, y.dtype)  # noqa: E731
        arrays = [(*taken, jax.tree.map(random, shapes)) for taken in arrays]

    def program(*arrays):
        return [one(*taken) for taken in arrays]

    return jax.jit(program).lower(*arrays).compile(), arrays


def prepare(function: Callable, spec: Spec, passes: str, calls: int = 1) -> Prepared:
    """Compiles so many calls."""
    program, arrays = compiled(function, spec, passes, calls)
    memory = program.memory_analysis()
    extra_bytes = memory.temp_size_in_bytes if memory else None
    return Prepared(lambda: program(*arrays), jax.block_until_ready, extra_bytes, calls)


def prepare_torch(function: Callable, spec: Spec, passes: str, calls: int = 1) -> Prepared:
    """The same for a function of tensors, compiled by torch; several calls become a CUDA graph."""
    import torch

    torch.compiler.reset()  # each spec is another program
    if not os.environ.get("TRITON_CACHE_DIR", "unset"):
        del os.environ["TRITON_CACHE_DIR"]  # jax-triton empties it, and then torch can't compile

    def tensor(array):
        wide = np.asarray(array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array)
        dtype = getattr(torch, array.dtype.name) if wide.dtype.kind == "f" else None
        return torch.from_numpy(np.array(wide)).to("cuda", dtype)

    def drawn(seed: int):
        arguments, options = jax.tree.map(
            lambda a: tensor(a) if isinstance(a, jax.Array) else a, spec.inputs(seed), is_leaf=lambda a: a is None
        )
        return arguments, [arguments[i].requires_grad_() for i in spec.differentiable], options

    run = torch.compile(lambda arguments, options: function(*arguments, **options), dynamic=False)

    def forward(arguments, options):
        with torch.no_grad():
            return run(arguments, options)

    taken = [drawn(seed) for seed in range(calls)]
    listed = lambda y: [y] if isinstance(y, torch.Tensor) else list(y)  # noqa: E731
    cotangents = [torch.randn_like(y) for y in listed(forward(taken[0][0], taken[0][2]))]

    def everything():
        if passes == "forward":
            return [forward(arguments, options) for arguments, _, options in taken]
        return [
            torch.autograd.grad(listed(run(arguments, options)), inputs, cotangents)
            for arguments, inputs, options in taken
        ]

    wait = lambda _: torch.cuda.synchronize()  # noqa: E731
    if calls == 1:
        return Prepared(everything, wait)
    everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = everything()
    return Prepared(lambda: (graph.replay(), results)[1], wait, calls=calls)


class Candidate(NamedTuple):
    """Someone to time: `prepare(function, spec, passes, calls)` is `prepare` or `prepare_torch`."""

    name: str
    function: Callable
    prepare: Callable[[Callable, Spec, str, int], Prepared]


def measure(op_name: str, spec: Spec, passes: str, who: Sequence[Candidate], calls: int = 1) -> list[Result]:
    """Compiles everyone's version of one call, or of a program of several, and times them; what fails says why.

    A peer that has no such call, of options that it doesn't take, is left out.
    """

    def attempt(function: Callable, *arguments):
        try:
            return function(*arguments)
        except Unsupported as reason:
            return str(reason)
        except Exception as error:
            if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
                return None
            return f"{type(error).__name__}: {error}".split("\n")[0]

    def first(prepared: Prepared) -> Prepared:
        prepared.wait(prepared.call())
        return prepared

    # JAX compiles in threads. Torch's compiler follows alone, and so does whatever runs: XLA records what a program
    # launches in its first calls, and another thread's work spoils that.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        begun = [
            None if c.prepare is prepare_torch else pool.submit(attempt, c.prepare, c.function, spec, passes, calls)
            for c in who
        ]
    programs = [
        future.result() if future else attempt(c.prepare, c.function, spec, passes, calls)
        for c, future in zip(who, begun, strict=True)
    ]
    taken = [(c, x) for c, x in zip(who, programs, strict=True) if x is not None]
    taken = [(c, x if isinstance(x, str) else attempt(first, x)) for c, x in taken]
    seconds = iter(seconds_in_turns([x for _, x in taken if not isinstance(x, str)]))
    return [
        Result(op_name, spec.name, c.name, passes, None, error=x)
        if isinstance(x, str)
        else Result(op_name, spec.name, c.name, passes, next(seconds) / x.calls, x.extra_bytes)
        for c, x in taken
    ]


def candidates(op_name: str, only: Sequence[str] = ()) -> list[Candidate]:
    """Implementations in order of preference, then the peers."""
    op, peers = OPS[op_name], module(op_name, "peers")
    all_of_them = [Candidate(name, functools.partial(op, implementation=name), prepare) for name in op.implementations]
    all_of_them += [Candidate(name, function, prepare) for name, function in peers.PEERS.get(op_name, {}).items()]
    all_of_them += [Candidate(name, function, prepare_torch) for name, function in peers.torch_peers(op_name).items()]
    return [entry for entry in all_of_them if (entry.name in only if only else entry.name != "reference")]


def module(op_name: str, name: str) -> ModuleType:
    """A module in the op's folder: its `specs`, `peers` or `tuning`.

    >>> module("log_softmax", "specs").__name__
    'crescendo.pallas_kernels.softmax.specs'
    """
    folder = OPS[op_name].__module__.removeprefix("crescendo.pallas_kernels.").split(".")[0]
    return importlib.import_module(f"crescendo.pallas_kernels.{folder}.{name}")


def specs(op_name: str, tags: Iterable[str] = ()) -> list[Spec]:
    """Those that carry all the tags, out of `SPECS_OF[op_name]` of the folder's `specs`, or its `SPECS`."""
    of_folder = module(op_name, "specs")
    listed = getattr(of_folder, "SPECS_OF", {}).get(op_name, of_folder.SPECS)
    return [spec for spec in listed if set(tags) <= spec.tags]


def best_peers(op_name: str, results: Sequence[Result]) -> dict[tuple[str, str], float]:
    """The seconds of the fastest that isn't this project's own kernel, by spec and passes; cuDNN's and XLA's count."""
    ours = set(OPS[op_name].implementations) - {"cudnn", "xla"}
    best: dict[tuple[str, str], float] = {}
    for result in results:
        if result.seconds is not None and result.who not in ours:
            key = result.spec, result.passes
            best[key] = min(result.seconds, best.get(key, result.seconds))
    return best


def rate(result: Result, spec: Spec) -> tuple[float, str]:
    """What the spec's own operations or bytes make of a measurement, and the unit."""
    assert result.seconds is not None
    both = result.passes == "backward"
    if spec.flops:
        return (spec.flops + (spec.backward_flops or 2.0 * spec.flops) * both) / result.seconds / 1e12, "TFLOP/s"
    moved = spec.bytes + (spec.backward_bytes or 1.5 * spec.bytes) * both
    return moved / result.seconds / 1e9, "GB/s"


def row(result: Result, spec: Spec, best: dict[tuple[str, str], float]) -> list[str]:
    """A measurement, for people."""
    named = [result.spec, result.passes, result.who]
    if result.seconds is None:
        return [*named, "-", "-", "-", "-", result.error[:60]]
    speed, unit = rate(result, spec)
    extra = "-" if result.extra_bytes is None else f"{result.extra_bytes / 2**30:.2f}"
    against = best.get((result.spec, result.passes))
    ratio = "-" if against is None else f"{against / result.seconds:.2f}"
    return [*named, f"{1e3 * result.seconds:,.3f}", f"{speed:,.0f}", unit, extra, ratio]


def table(op_name: str, results: Sequence[Result], calls: Sequence[Spec]) -> Table:
    """Rows of measurements; the last column is the speed over that of the best peer."""
    by_name, best = {spec.name: spec for spec in calls}, best_peers(op_name, results)
    kind = jax.devices()[0].device_kind
    columns = ("call", "passes", "who", "ms", "rate", "unit", "GiB extra", "x best peer")
    shown = Table(*columns, title=f"{op_name} on {kind}")
    for result in results:
        shown.add_row(*row(result, by_name[result.spec], best))
    return shown


def draw(op_name: str, results: Sequence[Result], calls: Sequence[Spec]) -> bytes:
    """A PNG: a panel for each kind of pass, a group of bars for each spec."""
    from matplotlib.figure import Figure

    by_name = {spec.name: spec for spec in calls}
    measured = [result for result in results if result.seconds is not None]
    passes, names = (list(dict.fromkeys(getattr(r, field) for r in measured)) for field in ("passes", "who"))
    figure = Figure(figsize=(2 + 1.6 * len(calls), 3.4 * len(passes)), layout="constrained")
    panels = figure.subplots(len(passes), 1, squeeze=False)[:, 0]
    width = 0.8 / len(names)
    for panel, which in zip(panels, passes, strict=True):
        unit = ""
        for place, name in enumerate(names):
            chosen = [r for r in measured if r.passes == which and r.who == name]
            at = [calls.index(by_name[r.spec]) + (place - (len(names) - 1) / 2) * width for r in chosen]
            heights = [rate(r, by_name[r.spec]) for r in chosen]
            unit = heights[0][1] if heights else unit
            panel.bar(at, [height for height, _ in heights], width, label=name, color=f"C{place}")
        panel.set_xticks(range(len(calls)), [spec.name.replace(" ", "\n") for spec in calls], fontsize=7)
        panel.set_ylabel(unit)
        panel.set_title("forward" if which == "forward" else "forward and backward", fontsize=10)
    panels[0].legend(fontsize=7, ncols=min(4, len(names)))
    figure.suptitle(f"{op_name} on {jax.devices()[0].device_kind}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        description="Times ops over their specs, beside their peers, on the device at hand.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("op", choices=list(OPS), metavar="OP", help=", ".join(OPS))
    result.add_argument("--passes", nargs="+", choices=["forward", "backward"], default=["forward", "backward"])
    result.add_argument("--tags", nargs="+", default=["speed"], help="of the specs, all of them (default speed)")
    result.add_argument("--specs", nargs="+", default=[], help="only those of these names")
    result.add_argument("--only", nargs="+", default=[], help="these implementations and peers (default all)")
    result.add_argument(
        "--calls", type=int, default=1, help="in one program or CUDA graph, where a call takes less than to ask for it"
    )
    result.add_argument("--json", type=Path, help="write the measurements to this file")
    result.add_argument("--plot", type=Path, help="draw the measurements into this PNG")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = parser().parse_args(argv)
    if arguments.calls < 1:
        print(f"--calls must be at least 1, not {arguments.calls}", file=sys.stderr)
        raise SystemExit(2)
    chosen = [s for s in specs(arguments.op, arguments.tags) if not arguments.specs or s.name in arguments.specs]
    who = candidates(arguments.op, arguments.only)
    if not chosen or not who:
        named = f" and a name in {arguments.specs}" if arguments.specs else ""
        what = f"no spec with the tags {arguments.tags}{named}" if not chosen else f"nobody named {arguments.only}"
        print(f"{arguments.op} has {what}: see --help", file=sys.stderr)
        raise SystemExit(2)
    console = output_console()
    results: list[Result] = []
    calls = list(itertools.product(chosen, arguments.passes))
    with console.status("") as status:
        for number, (spec, passes) in enumerate(calls, 1):
            status.update(f"{number} of {len(calls)}: {spec.name}, {passes}")
            found = measure(arguments.op, spec, passes, who, arguments.calls)
            results += found
            for result in found:
                console.print("  ".join(row(result, spec, best_peers(arguments.op, results))))
    console.print(table(arguments.op, results, chosen))
    args, options = chosen[0].abstract()
    console.print(str(explain(OPS[arguments.op], *args, **options)))
    if arguments.plot:
        arguments.plot.write_bytes(draw(arguments.op, results, chosen))
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
