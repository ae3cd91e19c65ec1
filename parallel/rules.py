"""Where each logical axis lives: tables from logical axis name to mesh axes, a few for each strategy."""

import dataclasses
from typing import Annotated, Any

from crescendo.ranges import Count, OneOf, checked

Table = dict[str, tuple[str, ...]]

# A logical axis that a table doesn't name is replicated on every device.
TENSOR: Table = {"heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",), "vocab": ("tensor",)}
# Devices along `sequence` have the same parameters: they share them like those along `fsdp`. Convolutions' kernels and
# norms have channels in place of a residual width.
SPLIT: Table = TENSOR | {"embed": ("fsdp", "sequence"), "channels": ("fsdp", "sequence")}
BATCH_AXES = ("data", "fsdp", "expert")
# Between matmuls the residual stream and its norms are split by tokens over `tensor` too (Korthikanti et al. 2022).
ACTIVATIONS: Table = TENSOR | {
    "batch": BATCH_AXES,
    "length": ("sequence",),
    "residual_length": ("sequence", "tensor"),
}


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What is split along which mesh axes, and so when gradients are reduced.

    With Psi parameters over N devices of `fsdp`, Adam in mixed precision needs (Rajbhandari et al. 2020):

    | strategy | bytes a device | parameters' worth of traffic a step |
    | --- | --- | --- |
    | data | 16 Psi | 2 Psi |
    | zero1 | 4 Psi + 12 Psi / N | 2 Psi |
    | zero2 | 2 Psi + 14 Psi / N | 2 Psi |
    | fsdp | 16 Psi / N | 3 Psi |

    Attributes:
      parameters, gradients, optimizer: the tables of these arrays.
      ulysses: the part of the mesh axis `sequence` that splits heads inside attention (Ulysses); the rest is a ring.
    """

    parameters: Table
    gradients: Table
    optimizer: Table
    ulysses: int = 1

    @property
    def deferred(self) -> tuple[str, ...]:
        """The axes of the batch along which gradients are summed once a step, at its end: those that split none.

        Along the others they are summed after every microbatch, as a whole sum would need more memory than the table
        says.
        """
        splitting = {axis for axes in self.gradients.values() for axis in axes}
        return tuple(axis for axis in BATCH_AXES if axis not in splitting)

    def replicated_along(self, name: str) -> "Strategy":
        """The same, with a logical axis of parameters, gradients and optimizer state that is not split.

        >>> "embed" in STRATEGIES["zero1"].replicated_along("embed").optimizer
        False
        """

        def rest(table: Table) -> Table:
            return {axis: where for axis, where in table.items() if axis != name}

        return dataclasses.replace(
            self,
            parameters=rest(self.parameters),
            gradients=rest(self.gradients),
            optimizer=rest(self.optimizer),
        )


STRATEGIES: dict[str, Strategy] = {
    "data": Strategy(TENSOR, TENSOR, TENSOR),
    "zero1": Strategy(TENSOR, TENSOR, SPLIT),
    "zero2": Strategy(TENSOR, SPLIT, SPLIT),
    "fsdp": Strategy(SPLIT, SPLIT, SPLIT),
}


@checked
def strategy(name: Annotated[str, OneOf(STRATEGIES)] = "fsdp", *, ulysses: Count = 1) -> Strategy:
    """One of `STRATEGIES` by name.

    Args:
      name: "data" (replicas), "zero1" (optimizer state split), "zero2" (gradients too) or "fsdp" (parameters too).
        Tensor and sequence parallelism come with the mesh: every strategy uses those axes where they are above 1.
      ulysses: see `Strategy`.

    Raises:
      ValueError: an unknown name, or a degree below 1.

    >>> strategy("zero1").optimizer["embed"]
    ('fsdp', 'sequence')
    """
    return dataclasses.replace(STRATEGIES[name], ulysses=ulysses)


def spec_entries(table: Table, names: tuple[str | None, ...], without: frozenset[str] = frozenset()) -> list:
    """The entries of a `PartitionSpec` for an array whose axes have these names, some mesh axes left out.

    >>> spec_entries(ACTIVATIONS, ("batch", "length", None), frozenset({"data"}))
    [('fsdp', 'expert'), 'sequence', None]
    """
    entries: list[Any] = []
    for name in names:
        axes = tuple(axis for axis in table.get(name or "", ()) if axis not in without)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return entries
