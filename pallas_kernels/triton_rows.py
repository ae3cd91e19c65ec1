"""What Triton's kernels share: blocks of arrays, and rows each held on chip by as many programs as it takes.

A row is cut into parts, one for each program, which keeps its part in registers. Programs that share a row leave a few
numbers in memory, wait for the others' (`meet`), and go on. Waiting is safe because a program takes its part by a
ticket once it runs (`place`): the parts of a row are all taken before those of the next, so as long as the device can
hold as many programs as a row has parts, some row is complete.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


def meeting(rows: int, parts: int, numbers: int, first: int) -> tuple[list[jax.ShapeDtypeStruct], dict[str, Any]]:
    """What programs leave for each other, as results of the kernel from number `first` on, and how to call it.

    `left_ptr` is `numbers` a part; `arrived_ptr`, zeroed, the tickets taken and then the arrivals of each row.
    """
    if parts == 1:
        return [], {"left_ptr": None, "arrived_ptr": None}
    left = jax.ShapeDtypeStruct((numbers, rows, parts), jnp.float32)
    return [left, jax.ShapeDtypeStruct((1 + rows,), jnp.int32)], {"zeroed": [first + 1]}


@triton.jit
def load(pointer, at, exists, NOTHING: tl.constexpr = 0.0):
    """Entries in float32, `NOTHING` where there are none."""
    return tl.load(pointer + at, mask=exists, other=NOTHING).to(tl.float32)


@triton.jit
def store(pointer, at, values, exists):
    """Entries, in the array's dtype."""
    tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def load_row(pointer, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A row of `[rows, WIDTH]` in float32, over a block's rows: `[1, BLOCK]`."""
    columns = tl.arange(0, BLOCK)
    return load(pointer + row * WIDTH, columns, columns < WIDTH)[None, :]


@triton.jit
def part_of_row(COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's row, where its entries are, and which exist, of programs that don't wait for each other."""
    program = tl.program_id(0).to(tl.int64)
    row = program // PARTS
    columns = (program % PARTS) * BLOCK + tl.arange(0, BLOCK)
    return row, row * COLUMNS + columns, columns < COLUMNS


@triton.jit
def capped(x, SCALE: tl.constexpr, CAP: tl.constexpr):
    """`c tanh(s x / c)`, -inf where x is; of positive s."""
    x = x.to(tl.float32)
    nothing = x == -float("inf")
    if SCALE != 1.0:
        x = x * SCALE
    if CAP > 0:
        # tanh by exp of a negative number: no overflow.
        u = tl.abs(x) * (1 / CAP)
        e = tl.exp2(u * (-2 * LOG2E))
        # Near 0 the quotient cancels: the series is exact to float32 below 0.05.
        t = tl.where(u < 0.05, u * (1 - u * u * (1 / 3 - u * u * (2 / 15))), (1 - e) / (1 + e))
        capped = tl.where(x < 0, -CAP * t, CAP * t)
        x = tl.where(nothing, -float("inf"), capped)
    return x


@triton.jit
def capped_logits(
    x_ptr, mask_ptr, at, exists, SCALE: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """`capped` entries, -inf where there are none, and where the mask hides them."""
    x = tl.load(x_ptr + at, mask=exists, other=-float("inf"))
    logits = capped(x, SCALE, CAP)
    if MASKED:
        seen = tl.load(mask_ptr + at, mask=exists, other=0)
        logits = tl.where(seen != 0, logits, -float("inf"))
    return tl.where(exists, logits, -float("inf"))


@triton.jit
def place(arrived, ROWS: tl.constexpr, PARTS: tl.constexpr, TOGETHER: tl.constexpr):
    """The first row and the part that a program works on."""
    if PARTS > 1:
        ticket = tl.atomic_add(arrived, 1, sem="relaxed")
        return ticket // PARTS, ticket % PARTS
    return tl.program_id(0) * TOGETHER, 0


@triton.jit
def meet(arrived, row, PARTS: tl.constexpr):
    """Tells that this program's numbers are there, and waits for those of the row's other programs."""
    tl.debug_barrier()
    tl.atomic_add(arrived + 1 + row, 1, sem="release")
    while tl.atomic_add(arrived + 1 + row, 0, sem="acquire") < PARTS:
        pass
    tl.debug_barrier()


@triton.jit
def leave(left_ptr, number, row, part, value, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Writes one of a program's numbers (`meeting`) for the others of its row."""
    tl.store(left_ptr + row * PARTS + number * ROWS * PARTS + part, value)


@triton.jit
def of_parts(left_ptr, number, row, ROWS: tl.constexpr, PARTS: tl.constexpr, NOTHING: tl.constexpr):
    """What all programs of a row have left, once they have met; filled up with `NOTHING` to a power of two."""
    parts = tl.arange(0, triton.next_power_of_2(PARTS))
    at = left_ptr + row * PARTS + number * ROWS * PARTS + parts
    return tl.load(at, mask=parts < PARTS, other=NOTHING, cache_modifier=".cg")
