"""A run, told before it begins: configuration, data, memory, FLOPs, hours and cost."""

import argparse
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from rich.console import Console

from crescendo import parallel
from crescendo.experiments.planning.experts import experts_table
from crescendo.experiments.planning.fitting import fit
from crescendo.experiments.planning.mesh import session_memory, stages_line, step_work
from crescendo.experiments.runtime import hardware
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.runtime.text import compact, duration
from crescendo.experiments.trainer.announcing import passes
from crescendo.experiments.trainer.microbatches import MEMORY_SHARE
from crescendo.experiments.trainer.session import Session
from crescendo.parallel.tables import memory_table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those by which a plan is made for devices that aren't here, and its cost told."""
    add = parser.add_argument
    add("--device", metavar="NAME", help="plan for devices of this kind, which need not be here, such as H100")
    add("--mfu", type=float, default=0.4, help="the share of the devices' peak that is expected (default 0.4)")
    add("--dollars-per-hour", type=float, metavar="X", help="what a device costs: the plan says what the run does")


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `plan_run` takes of a command line with `--devices` and these options."""
    return {name: getattr(arguments, name) for name in ("device", "devices", "mfu", "dollars_per_hour")}


def plan_run(
    console: Console,
    *,
    settings: str,
    arguments: Callable[[Collection[str]], dict[str, Any]],
    mesh_sizes: Mapping[str, int],
    device: str | None = None,
    devices: int | None = None,
    mfu: float = 0.4,
    dollars_per_hour: float | None = None,
) -> None:
    """Prints what a run will be; nothing is trained or written.

    For the devices that are here the step is compiled, whose memory the compiler counts; for named ones it is counted
    part by part.

    Args:
      console: where.
      settings: the configuration, as text.
      arguments: gives those of the session's arguments that are asked for.
      mesh_sizes: what is set of the mesh: devices along axes.
      device: a name of `hardware.KNOWN_DEVICES`; None: those here.
      devices: how many named ones; None: one.
      mfu: the expected share of the devices' peak, in (0, 1].
      dollars_per_hour: of one device; None: no cost is told.

    Raises:
      UserError: for a value out of its range, an unknown device, or what a session says of its arguments.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu} must be above 0 and at most 1")
    if devices is not None and devices < 1:
        raise UserError(f"--devices {devices} must be at least 1")
    if devices is not None and device is None:
        raise UserError(f"--devices {devices} needs --device NAME: without it the plan is for the devices here")

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    taken = [name for name in inspect.signature(Session).parameters if name not in ("further_sizes", "platform")]
    if device is None:
        session = Session(**arguments(taken))
        kind: Any = session.layout.mesh.devices.flat[0]
        devices, memory = session.layout.mesh.size, hardware.memory_bytes(kind)
    else:
        kind = hardware.named_device(device)
        devices, memory = devices or 1, kind.memory_bytes
        with user_values():
            mesh = parallel.MeshSpec(**mesh_sizes).abstract(devices)
        options = arguments([name for name in taken if name != "mesh"])
        session = Session(**options, mesh=mesh, platform=kind.platform)
    session.check_rows()
    say(settings)
    say(str(session.task.data))
    task, total, sizes = session.task, session.asked_examples, session.policy.sizes
    steps = sorted({math.ceil(total / size) for size in (min(sizes), max(sizes))})
    say(
        f"{total:,} examples, {total * task.units_per_example:,} {task.unit}s: "
        f"{passes(session, f'the {len(task.train):,} rows')}, in {' to '.join(f'{count:,}' for count in steps)} steps"
    )
    parameters = sum(x.size for x in jax.tree.leaves(session.parameters))
    flops = total * session.flops_per_example
    per_unit = session.flops_per_example / task.units_per_example
    say(f"{parameters:,} parameters, {per_unit / 1e6:,.1f} MFLOPs for each {task.unit}, {flops:.3g} FLOPs in all")
    plan = session.plan if device is None else _largest(session, kind)
    parts = session_memory(session, plan, None if device is None else kind)
    say(f"microbatches of {plan.microbatch_examples} examples on {devices} x {kind.device_kind}")
    if (schedule := session.layout.schedule) is not None:
        say(stages_line(session.layout, schedule, plan, session.parameters, task.logical_axes()))
    console.print(memory_table(parts))
    config: Any = getattr(task, "config", None)
    if session.layout.mesh.size > 1 and getattr(config, "experts", None) is not None:
        work = step_work(config, plan, task.units_per_example)
        if (splits := experts_table(session, work, hardware.known_device(kind.device_kind))) is not None:
            console.print(splits)
    if device is None:
        say(f"{session.peak_bytes / 2**30:.3f} GiB on a device at the peak, by the compiler's count")
        for note in session.notes:
            say(f"note: {note}")
    say(fit({"at the peak": session.peak_bytes} if device is None else parts, memory, kind.device_kind))
    say(_hours(flops, kind, devices, mfu, dollars_per_hour))


def _largest(session: Session, device: hardware.KnownDevice) -> parallel.BatchPlan:
    """How batches are cut into the largest microbatches that fit by our own count; one example a device if none do."""
    for plan in session.plans():
        if sum(session_memory(session, plan, device).values()) <= MEMORY_SHARE * device.memory_bytes:
            break
    return plan


def _hours(flops: float, kind: Any, devices: int, mfu: float, dollars_per_hour: float | None) -> str:
    peak = hardware.peak_flops_per_second(kind)
    if peak is None:
        return f"hours: the peak of a {kind.device_kind} isn't known: name a device with --device"
    seconds = flops / (peak * devices * mfu)
    device_hours = seconds * devices / 3600
    cost = "" if dollars_per_hour is None else f", {device_hours * dollars_per_hour:,.2f} dollars"
    return (
        f"{duration(seconds)} of training on {devices} x {kind.device_kind} at {mfu:.0%} of {compact(peak)}FLOP/s: "
        f"{device_hours:,.2f} device hours{cost}; evaluation, compilation and saving come on top"
    )
