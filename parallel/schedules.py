"""When each stage of a pipeline does what: schedules as closed formulas of the tick, the stage and the microbatches.

In a tick a stage runs the forward pass of one microbatch through some of its layers, the backward pass of another one,
both or none. Its layers are v chunks: of p stages the stage s has the chunks s, p + s, 2 p + s, ... of all v p, in the
order of the layers; with v = 1 a stage's layers are one chunk. The i-th pass of a stage is that

.. math::  \\text{of microbatch } \\lfloor i / pv \\rfloor p + i \\bmod p
           \\text{ through the stage's chunk } \\lfloor (i \\bmod pv) / p \\rfloor

and stage s does it at tick i + s, so that what a stage sends is used by the next one in the next tick, and by the first
one what the last has sent. Backward passes mirror that, from a first tick on. Whether all stages are idle is known by
the tick alone, so a program can leave such passes out without a branch that differs from stage to stage. Of m
microbatches, where p divides m or v is 1,

.. math::  \\frac{p - 1}{v m + p - 1}

of the time of each pass is idle. Otherwise the places of the last p microbatches that there aren't are idle too.

Where a microbatch goes through one of n neighbouring stages (SkipPipe), these work on n microbatches at once, and all
that is said of p stages and m microbatches holds of p / n groups of stages and m / n groups of microbatches. Which one
of its group a stage has changes from group to group: the stages of a group take turns.

Huang et al., 2019, "GPipe", https://arxiv.org/abs/1811.06965; Narayanan et al., 2020, "Memory-Efficient
Pipeline-Parallel DNN Training" (PipeDream-Flush, which is 1F1B), https://arxiv.org/abs/2006.09503; Narayanan et al.,
2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM" (interleaved chunks),
https://arxiv.org/abs/2104.04473; Blagoev et al., 2025, "SkipPipe: Partial and Reordered Pipelining Framework for
Training LLMs in Heterogeneous Networks", https://arxiv.org/abs/2502.19913.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from crescendo.parallel.sizes import divisors

SCHEDULES = ("1f1b", "gpipe", "interleaved")
"""`gpipe` runs all forward passes before any backward pass, `1f1b` a microbatch's backward pass as soon as it can, and
so does `interleaved`, whose stages have several chunks of layers."""


# Groups of stages take turns in ways of their own, and every so many of them alike: the routes of a tick are a part of
# the program each.
_WAYS = 3


class Work(NamedTuple):
    """What a stage does of a pass in a tick.

    Attributes:
      microbatch: of which.
      chunk: through which of the stage's chunks.
      due: whether there is any; where there isn't, the number is none of a microbatch, and the chunk is any.
    """

    microbatch: Any
    chunk: Any
    due: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A schedule over some stages; its numbers may be arrays, also traced ones.

    Attributes:
      name: one of `SCHEDULES`.
      stages: p.
      chunks: v, of a stage's layers.
      one_of: n, of so many neighbouring stages a microbatch goes through one, and skips the others.

    Raises:
      ValueError: chunks with a schedule that has none, or one of them for one that has; stages skipped by another one
        than "1f1b", or that can't be grouped so.

    >>> print(Schedule("1f1b", 2).draw(3))
    stage 0  F0   F1   F2B0 B1   B2
    stage 1       F0B0 F1B1 F2B2
    """

    name: str
    stages: int
    chunks: int = 1
    one_of: int = 1

    def __post_init__(self):
        if self.name == "interleaved" and self.chunks < 2:
            raise ValueError(
                f"strategy.schedule = 'interleaved' with strategy.chunks = {self.chunks} interleaves nothing: use 2 "
                "or more, or '1f1b'"
            )
        if self.name != "interleaved" and self.chunks > 1:
            raise ValueError(
                f"strategy.chunks = {self.chunks} with strategy.schedule = {self.name!r}, which has one a stage: use "
                "'interleaved', or chunks = 1"
            )
        if self.one_of > 1 and self.name != "1f1b":
            raise ValueError(
                f"strategy.one_of = {self.one_of} skips stages, which strategy.schedule = {self.name!r} doesn't: use "
                "'1f1b', or one_of = 1"
            )
        if self.stages % self.one_of:
            raise ValueError(
                f"strategy.one_of = {self.one_of} does not divide the mesh's stage = {self.stages}: use one of "
                f"{divisors(self.stages)}, or a stage that {self.one_of} divides"
            )

    @property
    def hops(self) -> int:
        """Groups of stages, p / n: a microbatch goes through one stage of each."""
        return self.stages // self.one_of

    @property
    def whole(self) -> "Schedule":
        """The schedule of passes that skip no stages."""
        return dataclasses.replace(self, one_of=1)

    @property
    def first_stages(self) -> range:
        """Where microbatches begin."""
        return range(self.one_of)

    @property
    def last_stages(self) -> range:
        """Where microbatches end."""
        return range(self.stages - self.one_of, self.stages)

    @property
    def _round(self) -> int:
        """Passes of a stage after which the next groups of microbatches come, as many as groups of stages."""
        return self.hops * self.chunks

    def passing(self, microbatches: Any) -> Any:
        """How many ticks a pass takes, from the first stage's first microbatch to the last stage's last one."""
        last = (microbatches - 1) // self.one_of
        after = last // self.hops * self._round + (self.chunks - 1) * self.hops + last % self.hops
        return after + self.hops

    def first_backward(self, microbatches: Any) -> Any:
        """The first tick of a backward pass."""
        return self.passing(microbatches) if self.name == "gpipe" else self._round - 1

    def ticks(self, microbatches: Any) -> Any:
        """How many there are."""
        return self.first_backward(microbatches) + self.passing(microbatches)

    def forward(self, tick: Any, stage: Any, microbatches: Any) -> Work:
        """What a stage does of the forward passes."""
        return self._pass(tick - stage // self.one_of, stage, microbatches)

    def backward(self, tick: Any, stage: Any, microbatches: Any) -> Work:
        """What a stage does of the backward passes, after its forward pass of the same tick."""
        before = self.first_backward(microbatches) + self.hops - 1 - stage // self.one_of
        mirrored = self._pass(tick - before, stage, microbatches)
        return mirrored._replace(chunk=self.chunks - 1 - mirrored.chunk)

    def _pass(self, number: Any, stage: Any, microbatches: Any) -> Work:
        """The one of this number of a stage."""
        group = number // self._round * self.hops + number % self.hops
        member = (stage - self._turn(group, stage // self.one_of)) % self.one_of
        microbatch = group * self.one_of + member
        return Work(microbatch, number % self._round // self.hops, (number >= 0) & (microbatch < microbatches))

    def _turn(self, group: Any, hop: Any) -> Any:
        """By how much the members of a group of microbatches are moved along the stages of a group."""
        return (hop > 0) * (group // self.one_of ** ((hop - 1) % _WAYS)) % self.one_of

    def routes(self, *, back: bool = False) -> list[list[tuple[int, int]]]:
        """Who sends to whom what it has made in a tick, of each tick modulo their number; `back`: backward passes.

        >>> Schedule("1f1b", 3).routes(), Schedule("1f1b", 4, one_of=2).routes()
        ([[(0, 1), (1, 2), (2, 0)]], [[(0, 2), (1, 3)], [(0, 3), (1, 2)]])
        """
        p, n = self.stages, self.one_of
        if n == 1:
            return [[(stage, (stage + (-1 if back else 1)) % p) for stage in range(p)]]
        ways = n ** min(self.hops - 1, _WAYS)

        def to(tick: int, stage: int) -> int:
            hop = stage // n
            after = hop - 1 if back else hop + 1
            group = tick - (self.first_backward(1) + self.hops - 1 - hop if back else hop)
            return after * n + (stage - self._turn(group, hop) + self._turn(group, after)) % n

        senders = range(n, p) if back else range(p - n)
        return [[(stage, to(tick, stage)) for stage in senders] for tick in range(ways)]

    def passed(self, microbatches: int) -> np.ndarray:
        """Which microbatches go through which stages, bool `[microbatches, stages]`."""
        stages = np.arange(self.stages)
        group, hop = np.arange(microbatches)[:, None] // self.one_of, stages // self.one_of
        return (stages - self._turn(group, hop)) % self.one_of == np.arange(microbatches)[:, None] % self.one_of

    def enters(self, stage: Any, work: Work) -> Any:
        """Whether the work of a stage begins with the layers' input, or in a backward pass ends with its gradient."""
        return (stage < self.one_of) & (work.chunk == 0)

    def leaves(self, stage: Any, work: Work) -> Any:
        """Whether the work of a stage ends with the layers' output, or in a backward pass begins with its gradient."""
        return (stage >= self.stages - self.one_of) & (work.chunk == self.chunks - 1)

    def _slots(self, max_microbatches: int) -> list[int]:
        """Of each chunk, how many microbatches are on their way at most, from a stage's forward to its backward pass.

        At the first stages the input of chunk k waits longest, for 2 p (v - k) - 1 ticks, and in a round of p v ticks
        p of them come, p being the groups of stages here.
        """
        most, p, v = -(-max_microbatches // self.one_of), self.hops, self.chunks
        return [most if self.name == "gpipe" else min(most, p + min(p, max(0, p * (v - 2 * k) - 1))) for k in range(v)]

    def kept(self, max_microbatches: int) -> int:
        """How many inputs a stage keeps for its backward passes: so many are never on their way at once."""
        return sum(self._slots(max_microbatches))

    def slot(self, work: Work, max_microbatches: int) -> Any:
        """Where among the `kept` ones the input of some work is."""
        slots = self._slots(max_microbatches)
        begins = np.cumsum([0, *slots[:-1]])
        # Sums of what is before a chunk: an array can't be indexed by a number that is traced.
        begin = sum(int(n) * (work.chunk == k) for k, n in enumerate(begins))
        size = sum(n * (work.chunk == k) for k, n in enumerate(slots))
        return begin + work.microbatch // self.one_of % size

    def finished(self, max_microbatches: int) -> int:
        """How many outputs of the last stage wait for the loss."""
        return max_microbatches if self.name == "gpipe" else 1

    def table(self, microbatches: int) -> tuple[Work, Work]:
        """The forward and the backward passes, arrays `[ticks, stages]`; -1 is none of a microbatch."""
        ticks, stages = np.arange(self.ticks(microbatches))[:, None], np.arange(self.stages)

        works = (passes(ticks, stages, microbatches) for passes in (self.forward, self.backward))
        forward, backward = (work._replace(microbatch=np.where(work.due, work.microbatch, -1)) for work in works)
        return forward, backward

    def draw(self, microbatches: int) -> str:
        """A line a stage, a column a tick: `F2B0` is the forward pass of microbatch 2, then the backward one of 0.

        Where stages have several chunks, letters tell them apart: `F2b` is through the second one.
        """

        def cell(forward: int, chunk: int, backward: int, chunk_back: int) -> str:
            passes = (("F", forward, chunk), ("B", backward, chunk_back))
            shown = (
                f"{letter}{n}" + (chr(ord("a") + c) if self.chunks > 1 else "") for letter, n, c in passes if n >= 0
            )
            return "".join(shown)

        of_passes = (array for work in self.table(microbatches) for array in (work.microbatch, work.chunk))
        cells = np.vectorize(cell, otypes=[object])(*of_passes)
        width = max(map(len, cells.flat))
        lines = (" ".join(f"{text:{width}}" for text in column) for column in cells.T)
        return "\n".join(f"stage {stage}  {line}".rstrip() for stage, line in enumerate(lines))

    def idle_share(self, microbatches: int) -> float:
        """The share of a stage's time in which it waits for others, `(p - 1) / (v m + p - 1)` where p divides m.

        >>> Schedule("1f1b", 4).idle_share(9), Schedule("interleaved", 4, chunks=2).idle_share(8)
        (0.25, 0.15789473684210525)
        """
        places = self.one_of * self.passing(microbatches)
        return (places - self.chunks * microbatches) / places
