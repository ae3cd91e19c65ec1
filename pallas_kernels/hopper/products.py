"""Matrix products of a warpgroup: accumulators that begin with what registers hold, and rows and columns of results.

Pallas' interpreter knows neither accumulators that begin with registers' values nor left operands in registers. Within
`sums_aside` such a part of a sum is kept aside, and added when the accumulator is read.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.hopper.memory import ROWS

ROW_LAYOUT, COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class _Aside:
    """What the interpreter's accumulators don't hold."""

    def __init__(self) -> None:
        self._values: dict[int, jax.Array] = {}
        self._issued: set[int] = set()

    def begin(self, accumulator, value) -> None:
        self._values[id(accumulator)] = value

    def product(self, accumulator, a, b) -> None:
        key = id(accumulator)
        if not isinstance(a, jax.Array):
            plgpu.wgmma(accumulator, a, b)
            self._issued.add(key)
            return
        value = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # the matrix instruction would have read `b` as the copies write it
        self._values[key] = self._values[key] + value if key in self._values else value

    def finish(self, accumulator):
        key = id(accumulator)
        value, issued = self._values.pop(key, None), key in self._issued
        self._issued.discard(key)
        if value is None:
            return accumulator[...]
        return accumulator[...] + value if issued else value


_aside = contextvars.ContextVar[_Aside | None]("aside", default=None)


@contextlib.contextmanager
def sums_aside() -> Iterator[None]:
    """For kernels that are traced within, for Pallas' interpreter (`crescendo.pallas_kernels.interpreter`)."""
    token = _aside.set(_Aside())
    try:
        yield
    finally:
        _aside.reset(token)


def begin(accumulator, value) -> None:
    """Sets an accumulator to registers' values."""
    if (aside := _aside.get()) is not None:
        aside.begin(accumulator, value)
    else:
        accumulator[...] = value


def product(accumulator, a, b) -> None:
    """Issues `accumulator += a @ b`; `a` may be in registers."""
    if (aside := _aside.get()) is not None:
        aside.product(accumulator, a, b)
    else:
        plgpu.wgmma(accumulator, a, b)


def finish(accumulator, in_flight: int = 0):
    """The accumulator's value, once at most that many later products are in flight."""
    if (aside := _aside.get()) is not None:
        return aside.finish(accumulator)
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)


def zeros(shape):
    """A matrix of an accumulator's layout."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def row_vector(value):
    """A number for each of a warpgroup's rows."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW_LAYOUT)


def along_rows(vector, shape):
    """A value for each row, over the columns."""
    return lax.broadcast_in_dim(vector, shape, (0,))


def along_columns(vector, shape):
    """A value for each column, over the rows."""
    return lax.broadcast_in_dim(vector, shape, (1,))


def load_rows(ref):
    """A number for each row, `[64]`, from memory."""
    return plgpu.load(ref, layout=ROW_LAYOUT, optimized=False)


def load_columns(ref):
    """A number for each column, from memory."""
    return plgpu.load(ref, layout=COLUMN_LAYOUT, optimized=False)


def opaque(index):
    """`index`, in such a form that the compiler can't know.

    Otherwise it finds that an operand's addresses are the same in every step, and keeps them all in registers.
    """
    return lax.optimization_barrier(index)
