"""Layers in chunks over stages: from the order in which all else knows them to a schedule's, and back.

Parameters and what belongs to them are in the order of the layers wherever they are held: of p stages the stage s holds
the s-th part of all. A schedule with v chunks a stage wants the chunks s, p + s, 2 p + s, ... of v p there. The layers
move for the length of a pass over a batch and their gradients move back, so that nothing else knows of it: neither
checkpoints, nor what is measured of layers, nor whoever reads parameters. In each of v rounds every stage sends one
chunk and gets one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

AXIS = "stage"


class Move(NamedTuple):
    """A chunk's way.

    Attributes:
      held_by, held_at: the stage that holds it in the order of the layers, and its place among the chunks there.
      used_by, used_at: the same of the stage whose work it is.
    """

    held_by: int
    held_at: int
    used_by: int
    used_at: int


def rounds(stages: int, chunks: int) -> list[list[Move]]:
    """The moves, every round with each stage once on either side.

    >>> [[(move.held_by, move.used_by) for move in moves] for moves in rounds(stages=2, chunks=2)]
    [[(0, 0), (1, 1)], [(0, 1), (1, 0)]]
    """
    # Stages whose chunks begin at the same remainder of `stages` begin one place later each: they would meet otherwise.
    alike = stages // math.gcd(stages, chunks)

    def move(stage: int, begin: int) -> Move:
        place = (begin + stage // alike) % chunks
        chunk = stage * chunks + place
        return Move(stage, place, chunk % stages, chunk // stages)

    return [[move(stage, begin) for stage in range(stages)] for begin in range(chunks)]


def share_moved(stages: int, chunks: int) -> float:
    """Which share of all layers moves from one stage to another, one way.

    >>> share_moved(stages=2, chunks=2), share_moved(stages=4, chunks=1)
    (0.5, 0.0)
    """
    moves = [move for moves in rounds(stages, chunks) for move in moves]
    return sum(move.held_by != move.used_by for move in moves) / len(moves)


def interleaved(x: jax.Array, stages: int, chunks: int, axis: int = 0) -> jax.Array:
    """What a stage works with, of what it holds, inside a region that is manual over `AXIS`.

    Args:
      x: a stage's part; an axis of it are layers, `chunks` chunks of them.
      stages, chunks: of the schedule.
      axis: the layers'.
    """
    return _moved(x, rounds(stages, chunks), chunks, axis)


def in_order(x: jax.Array, stages: int, chunks: int, axis: int = 0) -> jax.Array:
    """What a stage holds, of what it worked with: the inverse of `interleaved`."""
    back = [[(*move[2:], *move[:2]) for move in moves] for moves in rounds(stages, chunks)]
    return _moved(x, back, chunks, axis)


def _moved(x: jax.Array, moves: Sequence[Sequence[tuple[int, int, int, int]]], chunks: int, axis: int) -> jax.Array:
    """Moves are `(from stage, from place, to stage, to place)`."""
    stage, result, size = jax.lax.axis_index(AXIS), jnp.zeros_like(x), x.shape[axis] // chunks
    for of_round in moves:
        take, put = np.zeros((2, len(of_round)), np.int32)
        for sender, begin, receiver, end in of_round:
            take[sender], put[receiver] = begin * size, end * size
        chunk = jax.lax.dynamic_slice_in_dim(x, jnp.asarray(take)[stage], size, axis)
        chunk = jax.lax.ppermute(chunk, AXIS, [(sender, receiver) for sender, _, receiver, _ in of_round])
        result = jax.lax.dynamic_update_slice_in_dim(result, chunk, jnp.asarray(put)[stage], axis)
    return result


def chunk_of(x: jax.Array, chunk: jax.Array, chunks: int) -> jax.Array:
    """One of the chunks that the first axis of an array are."""
    size = x.shape[0] // chunks
    return jax.lax.dynamic_slice_in_dim(x, chunk * size, size)


def add_to_chunk(x: jax.Array, chunk: jax.Array, chunks: int, term: jax.Array, axis: int = 0) -> jax.Array:
    """The array with a term added to one of the chunks that an axis of it are."""
    size = x.shape[axis] // chunks
    so_far = jax.lax.dynamic_slice_in_dim(x, chunk * size, size, axis)
    return jax.lax.dynamic_update_slice_in_dim(x, so_far + term, chunk * size, axis)
