"""Along which axes a layer's experts may be split: what each way sends, so whether weights or tokens move."""

from rich.table import Table

from crescendo.experiments.runtime.hardware import KnownDevice
from crescendo.experiments.trainer.session import Session
from crescendo.parallel.costs import Work, expert_splits


def experts_table(session: Session, work: Work, device: KnownDevice | None) -> Table | None:
    """Every way to split the experts over the session's mesh, the best first; None where there is one way alone.

    Args:
      session: what trains.
      work: what a step computes.
      device: of the mesh, whose links say how long sending takes; None: bytes alone decide.
    """
    layout, experts = session.layout, getattr(getattr(session.task, "config", None), "experts", None)
    if experts is None:
        return None
    links = None if device is None else device.links
    axes = session.task.logical_axes()
    splits = expert_splits(layout, session.parameters, axes, work, experts=experts, links=links)
    if len(splits) == 1:
        return None
    table = Table("strategy.experts", title="experts, in a step: a device sends")
    for column in ("tokens, GiB", "weights and all else, GiB", *(["for at least, ms"] if links else [])):
        table.add_column(column, justify="right")
    for split in splits:
        here = " (as set)" if set(split.axes) == set(layout.expert_axes) else ""
        seconds = [] if split.seconds is None else [f"{1e3 * split.seconds:,.1f}"]
        over = ", ".join(split.axes) or "expert"
        table.add_row(f"{over}{here}", f"{split.rows / 2**30:.3f}", f"{split.rest / 2**30:.3f}", *seconds)
    return table
