"""A ring of slots in shared memory: a producer fills them by the copy engine, consumers work on them and free them.

Step s of a ring has slot s mod `stages`; both sides count steps on their own. A slot has two barriers, which the ring
knows the arrivals of: `full`, one for each of its parts, and `free`, one for each consumer::

    ring = Ring({"k": Part((128, 64), dtype, tiled=True), "ids": Part((128,), jnp.int32)}, stages=2, consumers=2)
    plgpu.kernel(body, scratch_types=[ring.scratch()], ...)

    slots = ring.of(refs)                                   # in the kernel
    slots.fill(step, k=k_ref.at[...], ids=ids_ref.at[...])  # the producer: waits until the slot is free
    slots.drain(steps)                                      # at its end: nobody leaves before every arrival is seen

    slot = slots.slot(step)                                 # a consumer
    slots.wait(slot)
    ... slots["k"].at[slot] ...
    slots.free(slot)
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.hopper.memory import tiled


@dataclasses.dataclass(frozen=True)
class Part:
    """What one copy brings to a slot.

    Attributes:
      shape: of a slot.
      dtype: of its entries.
      tiled: whether it is laid out for the matrix instructions.
    """

    shape: tuple[int, ...]
    dtype: Any
    tiled: bool = False

    def memory(self, slots: int) -> Any:
        """Of so many slots."""
        shape = (slots, *self.shape)
        return tiled(shape, self.dtype) if self.tiled else plgpu.SMEM(shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class Ring:
    """What is fixed of a ring.

    Attributes:
      parts: of a slot, by name.
      stages: slots of a lane.
      consumers: that free a slot; 0 where the slots of another ring, filled with these, say when they are free.
      lanes: rings side by side, such as one for each consumer.
    """

    parts: Mapping[str, Part]
    stages: int
    consumers: int
    lanes: int = 1

    @property
    def slots(self) -> int:
        return self.stages * self.lanes

    def scratch(self) -> dict[str, Any]:
        """What a kernel allocates."""
        free = plgpu.Barrier(num_arrivals=self.consumers, num_barriers=self.slots) if self.consumers else None
        return {
            "parts": {name: part.memory(self.slots) for name, part in self.parts.items()},
            "full": plgpu.Barrier(num_arrivals=len(self.parts), num_barriers=self.slots),
            "free": free,
        }

    def of(self, refs: Mapping[str, Any]) -> "Slots":
        """The ring in a kernel, from what was allocated."""
        return Slots(self, refs["parts"], refs["full"], refs["free"])


@dataclasses.dataclass(frozen=True)
class Slots:
    """A ring in a kernel; `slots["name"]` are all slots of a part, `[slots, ...]`."""

    ring: Ring
    parts: Mapping[str, Any]
    full: Any
    free_barrier: Any

    def __getitem__(self, name: str) -> Any:
        return self.parts[name]

    def slot(self, step, lane=0):
        """Of a step of a lane."""
        stages = self.ring.stages
        if stages == 1:
            return lane
        slot = lax.rem(step, stages)
        return slot if self.ring.lanes == 1 else lane * stages + slot

    def fill(self, step, lane=0, **sources) -> None:
        """Begins the copies of a step's parts, once its slot is free; each part has to be given."""
        assert sources.keys() == self.parts.keys(), (*sources, *self.parts)
        slot = self.slot(step, lane)
        if self.free_barrier is not None:
            pl.when(step >= self.ring.stages)(lambda: plgpu.barrier_wait(self.free_barrier.at[slot]))
        for name, source in sources.items():
            plgpu.copy_gmem_to_smem(source, self.parts[name].at[slot], self.full.at[slot])

    def wait(self, slot) -> None:
        """Until all parts are there."""
        plgpu.barrier_wait(self.full.at[slot])

    def free(self, slot) -> None:
        """Says that this consumer doesn't read the slot any more."""
        plgpu.barrier_arrive(self.free_barrier.at[slot])

    def drain(self, steps) -> None:
        """Waits until the slots of the last steps are free, of so many in each lane, where the ring knows that."""
        if self.free_barrier is None:
            return

        @pl.loop(jnp.maximum(steps - self.ring.stages, 0), steps)
        def _(step):
            for lane in range(self.ring.lanes):
                plgpu.barrier_wait(self.free_barrier.at[self.slot(step, lane)])


@dataclasses.dataclass(frozen=True)
class Turns:
    """Consumers that issue one after the other, so that one's arithmetic hides behind another's products.

    Attributes:
      consumers: how many.
    """

    consumers: int

    def scratch(self) -> Any:
        """The barrier that the methods take."""
        return plgpu.Barrier(num_barriers=self.consumers)

    def begin(self, barrier, consumer) -> None:
        """The last one gives the first its first turn."""
        pl.when(consumer == self.consumers - 1)(lambda: plgpu.barrier_arrive(barrier.at[0]))

    @contextlib.contextmanager
    def taken(self, barrier, consumer) -> Iterator[None]:
        """A consumer's turn, which then goes to the next one."""
        plgpu.barrier_wait(barrier.at[consumer])
        yield
        plgpu.barrier_arrive(barrier.at[lax.rem(consumer + 1, self.consumers)])

    def end(self, barrier, consumer) -> None:
        """The first one takes the turn that the last one gave."""
        pl.when(consumer == 0)(lambda: plgpu.barrier_wait(barrier.at[consumer]))
