"""Where a training step's time goes, kernel by kernel: `crescendo benchmark train 124m --profile FOLDER`.

The device's own clock (JAX's profiler) says when each kernel ran, and the compiled program what it computed, of which
shapes and in whose name. A group's *bound* is the time that its kernels would take if each were limited by the device's
peak alone, or by moving the arrays that it reads and writes once at the speed of a plain copy, whichever takes longer.
"""

import collections
import glob
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.table import Table

from crescendo.experiments.benchmarks.optimizers import copy_bytes_per_second
from crescendo.experiments.benchmarks.steps import Loop
from crescendo.experiments.runtime import hardware
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, replace_file
from crescendo.experiments.runtime.tracing import traced
from crescendo.models import ModelConfig
from crescendo.parallel.collectives import KINDS, Shape, bytes_of, computations, shapes_of

# In whose name: the scopes that ops, the model and the step give to what they compute.
GROUPS = {
    "attention": "attention",
    "linear_cross_entropy": "loss",
    "rms_norm": "norm",
    "qk_norm_rotary": "norm",
    "layer_norm": "norm",
    "swiglu": "activation",
    "grouped_matmul": "experts",
    "routing": "routing",
    "permutation": "permutation",
    "quantize": "quantization",
    "optimizer": "optimizer",
}
WHOLE = ("attention", "linear_cross_entropy", "grouped_matmul", "routing")  # matrix products inside of these are theirs
MATMULS = re.compile(r'custom_call_target="__cublas|custom_call_target="__onednn\$matmul')
CALLERS = ("while", "conditional", "call")  # what they call is in the profile itself


class Span(NamedTuple):
    """One run of a kernel, in nanoseconds.

    Attributes:
      kernel: its own name.
      instruction: of the compiled program, or "".
    """

    kernel: str
    instruction: str
    begin: int
    end: int


class Instruction(NamedTuple):
    """What the compiled program says of a kernel.

    Attributes:
      opcode: such as "fusion".
      scope: whose it is, names separated by slashes.
      flops: of matrix products.
      moved_bytes: of what it takes and gives, each array once.
      shape: of a matrix product, such as "8192x768 . 768x2048".
    """

    opcode: str
    scope: str
    flops: float
    moved_bytes: float
    shape: str


class Kernel(NamedTuple):
    """All runs of one instruction, in the mean of the steps.

    Attributes:
      name: of the instruction, or of the kernel where that isn't known.
      group: see `group_of`.
      runs: in a step.
      seconds: in a step.
      flops: of matrix products in a step.
      bound_seconds: see the module; 0 where nothing is known.
    """

    name: str
    group: str
    runs: float
    seconds: float
    flops: float
    bound_seconds: float


class Profile(NamedTuple):
    """Of one device.

    Attributes:
      step_seconds: from the first kernel to the end of the last one, by the number of steps.
      busy_seconds: of a step, while at least one kernel ran.
      kernels: the slowest first.
    """

    step_seconds: float
    busy_seconds: float
    kernels: tuple[Kernel, ...]


def instructions(text: str) -> dict[str, Instruction]:
    """Every instruction of a compiled program by its name.

    Args:
      text: `compiled.as_text()`.

    >>> text = '''
    ... %inner (p: bf16[8,4], q: bf16[4,2]) -> f32[8,2] {
    ...   %p = bf16[8,4]{1,0} parameter(0)
    ...   %q = bf16[4,2]{1,0} parameter(1)
    ...   ROOT %d = f32[8,2]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }
    ... ENTRY %main (a: bf16[8,4], b: bf16[4,2]) -> f32[8,2] {
    ...   %a = bf16[8,4]{1,0} parameter(0)
    ...   %b = bf16[4,2]{1,0} parameter(1)
    ...   ROOT %f = f32[8,2]{1,0} fusion(%a, %b), kind=kCustom, calls=%inner, metadata={op_name="f/dot_general"}
    ... }'''
    >>> instructions(text)["f"]
    Instruction(opcode='fusion', scope='f/dot_general', flops=128.0, moved_bytes=144, shape='8x4 . 4x2')
    """
    bodies = {
        computation: re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", "\n".join(lines), re.MULTILINE)
        for computation, lines in computations(text).items()
    }
    written = {name: rest for lines in bodies.values() for name, rest in lines}
    results = {name: _results(rest) for name, rest in written.items()}
    opcodes = {name: re.search(r"(?:^|[\s)}\]])([a-z][\w\-]*)\(", rest) for name, rest in written.items()}
    operands = {
        name: re.findall(r"%([\w.\-]+)", written[name][opcode.end() :].split(")", 1)[0]) if opcode else []
        for name, opcode in opcodes.items()
    }
    own = {name: _product(rest, operands[name], results) for name, rest in written.items()}
    inner = {
        computation: [product for name, _ in lines if (product := own[name])] for computation, lines in bodies.items()
    }
    found = {}
    for name, rest in written.items():
        scope, called = (
            re.search(pattern, rest) for pattern in (r'op_name="((?:[^"\\]|\\.)*)"', r"calls=%?([\w.\-]+)")
        )
        product, opcode = own[name], opcodes[name]
        within = [product] if product else inner.get(called[1] if called else "", [])
        arrays = [*results[name], *(shape for operand in operands[name] for shape in results.get(operand, []))]
        found[name] = Instruction(
            opcode[1] if opcode else "",
            scope[1] if scope else "",
            float(sum(flops for flops, _ in within)),
            bytes_of(arrays),
            max(within)[1] if within else "",
        )
    return found


def _results(rest: str) -> list[Shape]:
    """The arrays that an instruction gives."""
    return shapes_of(rest.split("metadata=", 1)[0].split("(%", 1)[0])


def _product(rest: str, operands: Sequence[str], results: Mapping[str, list[Shape]]) -> tuple[float, str] | None:
    """FLOPs and shape of a matrix product; None of anything else."""
    if not (re.search(r"\bdot\(", rest) or MATMULS.search(rest)) or len(operands) < 2:
        return None
    contracted = re.search(r"lhs_contracting_dim(?:s=\{|ensions\":\[)([^}\]]*)", rest)
    left, right = (results.get(operand, [("", ())])[0][1] for operand in operands[:2])
    summed = [left[int(axis)] for axis in re.findall(r"\d+", contracted[1])] if contracted and left else []
    output = _results(rest)
    if not summed or not output:
        return None
    flops = 2.0 * math.prod(output[0][1]) * math.prod(summed)
    return flops, " . ".join("x".join(map(str, shape)) for shape in (left, right))


def group_of(kernel: str, instruction: Instruction | None) -> str:
    """Whose time a kernel's is: an op's, a matrix product's by its shape, "communication", or "other".

    >>> group_of("fusion_3", Instruction("fusion", "jit(step)/jvp(swiglu)/mul", 0.0, 96.0, ""))
    'activation'
    >>> group_of("ncclDevKernel_AllReduce", None)
    'communication'
    """
    if is_collective(kernel):
        return "communication"
    if instruction is None:
        return "other"
    if instruction.opcode.removesuffix("-start").removesuffix("-done") in KINDS:
        return "communication"
    scopes = re.findall(r"\w+", instruction.scope)
    named = [scope for scope in scopes if scope in GROUPS]
    if instruction.shape and not any(scope in WHOLE for scope in named):
        return f"matmul {instruction.shape}"
    return GROUPS[named[0]] if named else "other"


def is_collective(kernel: str) -> bool:
    """Whether it is one of NCCL's."""
    return "nccl" in kernel.lower()


def trace(loop: Loop, steps: int, folder: Path) -> Loop:
    """The loop after some steps, which left the profiler's files under a folder (XProf, TensorBoard, Perfetto)."""
    with traced(folder):
        loop, _ = loop.timed(steps)
    return loop


def spans_of_gpu(folder: Path) -> list[Span]:
    """The kernels that the first GPU ran, from the profiler's files under a folder, in any order; none without one."""
    gpu = next((plane for plane in _planes(folder) if re.fullmatch(r"/device:GPU:\d+", plane.name)), None)
    lines = [] if gpu is None else [line for line in gpu.lines if line.name.startswith("Stream")]
    return [span for line in lines for span in _of_line(line)]


def spans_of_cpu(folder: Path) -> list[Span]:
    """Likewise the instructions that the threads of the host ran."""
    lines = [line for plane in _planes(folder) if plane.name == "/host:CPU" for line in plane.lines]
    return [span for line in lines for span in _of_line(line) if span.instruction]


def _planes(folder: Path) -> list[Any]:
    files = glob.glob(f"{glob.escape(str(folder))}/**/*.xplane.pb", recursive=True)
    return list(jax.profiler.ProfileData.from_serialized_xspace(Path(max(files)).read_bytes()).planes) if files else []


def _of_line(line: Any) -> Iterator[Span]:
    for event in line.events:
        instruction = next((str(value) for name, value in event.stats if name == "hlo_op"), "")
        yield Span(event.name, instruction, int(event.start_ns), int(event.start_ns + event.duration_ns))


def overlap(collectives: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The length of the union of the first intervals, and of the part of it that the second ones don't cover.

    Args:
      collectives, others: pairs of begin and end, in any order.

    >>> overlap([(0, 10), (5, 12)], [(2, 4), (11, 20)])
    (12, 9)
    """
    events = [(t, change, 0) for begin, end in others for t, change in ((begin, 1), (end, -1))]
    events += [(t, change, 1) for begin, end in collectives for t, change in ((begin, 1), (end, -1))]
    running = [0, 0]
    total = exposed = previous = 0
    for t, change, which in sorted(events):
        if running[1]:
            total += t - previous
            exposed += 0 if running[0] else t - previous
        running[which] += change
        previous = t
    return total, exposed


def profile(
    found: Sequence[Span],
    program: Mapping[str, Instruction],
    steps: int,
    *,
    peak_flops_per_second: float | None,
    bytes_per_second: float | None,
    flops: Mapping[str, float] = {},
) -> Profile:
    """Sums up what ran.

    Args:
      found: all runs of kernels, of so many steps.
      program: by the instructions' names.
      steps: that were profiled.
      peak_flops_per_second: of the device; None where it isn't known.
      bytes_per_second: of a plain copy on it; None where that is no bound, as with a CPU's caches.
      flops: in a step, of groups whose kernels the program knows no products of.
    """
    leaves = [span for span in found if (i := program.get(span.instruction)) is None or i.opcode not in CALLERS]
    by_name: dict[str, list[Span]] = collections.defaultdict(list)
    for span in leaves:
        by_name[span.instruction or span.kernel].append(span)
    kernels = []
    for name, runs in by_name.items():
        instruction = program.get(name)
        # A library's product may clear its workspace by a kernel of its own first.
        times = max(collections.Counter(span.kernel for span in runs).values()) / steps
        arithmetic = instruction.flops * times / peak_flops_per_second if instruction and peak_flops_per_second else 0.0
        moving = instruction.moved_bytes * times / bytes_per_second if instruction and bytes_per_second else 0.0
        seconds = 1e-9 * sum(span.end - span.begin for span in runs) / steps
        group = group_of(runs[0].kernel, instruction)
        done = instruction.flops * times if instruction else 0.0
        kernels.append(Kernel(name, group, times, seconds, done, max(arithmetic, moving)))
    for group, total in flops.items():
        kernels = _with_flops(kernels, group, total, peak_flops_per_second)
    whole = max(span.end for span in leaves) - min(span.begin for span in leaves)
    busy, _ = overlap([(span.begin, span.end) for span in leaves], [])
    slowest_first = tuple(sorted(kernels, key=lambda kernel: -kernel.seconds))
    return Profile(1e-9 * whole / steps, 1e-9 * busy / steps, slowest_first)


def _with_flops(kernels: list[Kernel], group: str, total: float, peak: float | None) -> list[Kernel]:
    """A group's FLOPs, shared out among its kernels by their time, where the program knows none."""
    members = [kernel for kernel in kernels if kernel.group == group]
    seconds = sum(kernel.seconds for kernel in members)
    if any(kernel.flops for kernel in members) or not seconds:
        return kernels

    def completed(kernel: Kernel) -> Kernel:
        if kernel.group != group:
            return kernel
        flops = total * kernel.seconds / seconds
        return kernel._replace(flops=flops, bound_seconds=max(kernel.bound_seconds, flops / peak if peak else 0.0))

    return [completed(kernel) for kernel in kernels]


def kernel_flops(
    model: ModelConfig, *, sequence_length: int, batch_size: int, documents_in_row: int
) -> dict[str, float]:
    """FLOPs in a step of the groups whose own kernels tell none: causal attention at half, packed rows by document."""
    tokens, length = batch_size * sequence_length, sequence_length / documents_in_row
    products = 2 + 5  # of attention, forward and backward; one is this many FLOPs a token
    one = model.layers * model.heads * model.head_size * length
    inner = model.sparse_layers * model.experts_per_token * model.expert_size
    return {
        "attention": products * one * tokens,
        "loss": 6.0 * model.vocab_size * model.width * tokens,
        "experts": 18.0 * inner * model.width * tokens,
    }


def profile_of(loop: Loop, folder: Path, *, flops: Mapping[str, float], steps: int = 5) -> Profile:
    """Runs some steps under the profiler, whose files stay under the folder; on a GPU without its graphs of kernels.

    Args:
      loop: what trains.
      folder: for the profiler's files.
      flops: as `profile` takes them.
      steps: to profile.

    Raises:
      UserError: the folder can't be written, or the profiler saw no kernel.
    """
    session = loop.session
    # A CUDA graph runs many kernels under its own name.
    alone = {"xla_gpu_enable_command_buffer": ""}
    step = session.lower(session.plan, total_examples=session.total_examples).compile(compiler_options=alone)
    loop, _ = loop._replace(step=step).timed(2)
    trace(loop, steps, folder)
    found = spans_of_gpu(folder) or spans_of_cpu(folder)
    if not found:
        raise UserError(f"the profiler saw no kernel on {jax.devices()[0].device_kind}: see its files in {folder}")
    return profile(
        found,
        instructions(step.as_text() or ""),
        steps,
        peak_flops_per_second=hardware.peak_flops_per_second(jax.devices()[0]),
        bytes_per_second=None if jax.default_backend() == "cpu" else copy_bytes_per_second(),
        flops=flops,
    )


def profile_table(title: str, seen: Profile, at_least: float = 0.005) -> Table:
    """Groups, the slowest first, and under each its kernels that take at least a share of the step."""
    table = Table("group, kernel", "ms a step", "share", "runs", "TFLOP/s", "bound, ms", "of bound", title=title)
    for group, kernels in by_group(seen).items():
        seconds, flops, bound = (sum(getattr(k, f) for k in kernels) for f in ("seconds", "flops", "bound_seconds"))
        table.add_row(group, *_cells(seen, seconds, sum(k.runs for k in kernels), flops, bound))
        shown = [kernel for kernel in kernels if kernel.seconds >= at_least * seen.step_seconds]
        for kernel in shown if len(kernels) > 1 else ():
            cells = _cells(seen, kernel.seconds, kernel.runs, kernel.flops, kernel.bound_seconds)
            table.add_row(f"  {kernel.name}", *cells)
    idle = seen.step_seconds - seen.busy_seconds
    table.add_row("idle", f"{1e3 * idle:.2f}", f"{idle / seen.step_seconds:.1%}", *["-"] * 4)
    table.add_row("step", f"{1e3 * seen.step_seconds:.2f}", "100.0%", *["-"] * 4)
    return table


def _cells(seen: Profile, seconds: float, runs: float, flops: float, bound: float) -> tuple[str, ...]:
    rate = f"{flops / seconds / 1e12:,.{0 if flops >= 1e13 * seconds else 3}f}" if flops and seconds else "-"
    share = f"{seconds / seen.step_seconds:.1%}"
    of_bound = f"{bound / seconds:.0%}" if bound and seconds else "-"
    return f"{1e3 * seconds:.2f}", share, f"{runs:g}", rate, f"{1e3 * bound:.2f}" if bound else "-", of_bound


def by_group(seen: Profile) -> dict[str, list[Kernel]]:
    """The kernels of each group, the slowest group first."""
    groups: dict[str, list[Kernel]] = collections.defaultdict(list)
    for kernel in seen.kernels:
        groups[kernel.group].append(kernel)
    return dict(sorted(groups.items(), key=lambda item: -sum(kernel.seconds for kernel in item[1])))


def write(folder: Path, name: str, title: str, seen: Profile) -> None:
    """Writes `NAME.json`, all kernels, and `NAME.png`, a bar a group.

    Raises:
      UserError: for a disk that is full or can't be written.
    """
    content = {
        "title": title,
        "step_seconds": seen.step_seconds,
        "busy_seconds": seen.busy_seconds,
        "kernels": [kernel._asdict() for kernel in seen.kernels],
    }
    with file_access("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
        replace_file(folder / f"{name}.png", draw(title, seen))


def draw(title: str, seen: Profile, groups: int = 16) -> bytes:
    """A PNG: a bar for each of the slowest groups, and a line at its bound."""
    from matplotlib.figure import Figure

    rows = [
        (group, 1e3 * sum(k.seconds for k in kernels), 1e3 * sum(k.bound_seconds for k in kernels))
        for group, kernels in by_group(seen).items()
    ]
    shown, rest = rows[:groups], rows[groups:]
    if rest:
        shown.append((f"{len(rest)} smaller ones", sum(row[1] for row in rest), sum(row[2] for row in rest)))
    shown.append(("idle", 1e3 * (seen.step_seconds - seen.busy_seconds), 0.0))
    names, milliseconds, bounds = zip(*shown, strict=True)
    figure = Figure(figsize=(8, 1 + 0.32 * len(shown)), layout="constrained")
    axes = figure.subplots()
    at = range(len(shown))
    axes.barh(at, milliseconds, color="#56B4E9", label="measured")
    known = [(place, bound) for place, bound in zip(at, bounds, strict=True) if bound]
    axes.vlines(
        [bound for _, bound in known],
        [place - 0.4 for place, _ in known],
        [place + 0.4 for place, _ in known],
        color="#D55E00",
        label="bound of arithmetic or memory",
    )
    for place, value in zip(at, milliseconds, strict=True):
        axes.text(value, place, f" {value:.2f}", va="center", fontsize=8)
    axes.set_yticks(at, names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("ms a step")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()
