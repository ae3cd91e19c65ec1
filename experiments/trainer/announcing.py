"""What a run says of itself before its first step, in a few short lines."""

from collections.abc import Callable

import jax

from crescendo.experiments.trainer.session import Session


def announce(session: Session, written: Callable[[str], str] | None, say: Callable[[str], None]) -> None:
    """Says what is trained on what and how, and that the step compiles now.

    Args:
      session: not compiled yet.
      written: gives a setting as the config has it; None: there is no config.
      say: prints a line.
    """
    task, layout, sizes = session.task, session.layout, session.policy.sizes
    devices, total = layout.mesh.devices, session.asked_examples
    split = ", ".join(f"{axis} {n}" for axis, n in layout.sizes.items() if n > 1) or "one device"
    moved = f"{min(sizes):,} to {max(sizes):,}, by {_shown(written, 'batch_size')}"
    strategy = session.strategy if isinstance(session.strategy, str) else _shown(written, "strategy")
    say(f"data: {task.data}")
    batch = moved if len(sizes) > 1 else f"{sizes[0]:,}"
    if session.base_batch_size != sizes[0]:
        batch += f" (the learning rate is meant for {session.base_batch_size:,})"
    say(f"run: {total:,} examples, {passes(session, 'the data')}; batch: {batch}")
    say(f"mesh: {split}, of {devices.size} x {devices.flat[0].device_kind}; strategy: {strategy}")
    say(f"optimizer: {_shown(written, 'optimizer')}")
    say("compiling the step ...")


def announce_compiled(session: Session, say: Callable[[str], None]) -> None:
    """Says what the compiled step needs and takes, and what the session noted."""
    task, devices = session.task, session.layout.mesh.devices
    parameters = sum(x.size for x in jax.tree.leaves(session.parameters))
    mflops = session.flops_per_example / task.units_per_example / 1e6
    say(
        f"model: {parameters:,} parameters, {mflops:,.1f} MFLOPs {'an' if task.unit[0] in 'aeiou' else 'a'} "
        f"{task.unit}; one step of at most {max(session.sizes)} examples in microbatches of "
        f"{session.plan.microbatch_examples} needs {session.peak_bytes / 2**20:,.0f} MiB on each of {devices.size} "
        f"{devices.flat[0].device_kind}"
    )
    if session.kernels:
        say("kernels: " + ", ".join(f"{name} {' and '.join(chosen)}" for name, chosen in session.kernels.items()))
    for note in session.notes:
        say(f"note: {note}")


def _shown(written: Callable[[str], str] | None, parameter: str) -> str:
    return (written(parameter) if written else "") or "given in Python"


def passes(session: Session, data: str) -> str:
    """How often a run sees the data, which are called so; of several sources each."""
    total, epochs = session.asked_examples, session.order.epochs(session.asked_examples)
    return ", ".join(
        f"{_times(count)} over {name}" for name, count in (epochs or {data: total / len(session.task.train)}).items()
    )


def _times(count: float) -> str:
    """
    >>> _times(0.5), _times(2048.2)
    ('0.5 passes', '2,048 passes')
    """
    return f"{count:.2g} passes" if count < 10 else f"{count:,.0f} passes"
