"""jax-triton, Ampere and later: every activation is read once and written once, forward and backward.

Forward a program has a few rows. Backward it walks over rows of one group, loading the next ones while it works on
these, and keeps its share of the scale's gradient in registers; the shares, one for each program, are added up at the
end.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from crescendo.pallas_kernels import rows
from crescendo.pallas_kernels.op import Unsupported, require_gpu, target_device
from crescendo.pallas_kernels.triton_call import triton_call
from crescendo.pallas_kernels.triton_rows import load, load_row, store

MAX_WIDTH = 16384
# Entries of a row that one thread holds.
ENTRIES = {"forward": 32, "backward": 8}
# Of a program, unless one row has more: a backward pass waits for the sum of each row, and more programs wait at once.
THREADS = {"forward": 256, "backward": 128}
# Threads of a backward pass that a streaming multiprocessor has registers for: RMSNorm's take 64, LayerNorm's up to
# 96, those with rotation 80.
NORM_THREADS = 1024
CENTERED_THREADS = 640
ROTARY_THREADS = 768


def rms_norm(x, scale, **_):
    """See the op."""
    _check(x, scale)
    return rows.Passes(forward, backward)


def layer_norm(x, scale, bias, **_):
    """See the op."""
    _check(x, scale, bias)
    return rows.Passes(forward, backward)


def qk_norm_rotary(q, k, q_scale, k_scale, **_):
    """See the op."""
    _check(q, k, q_scale, k_scale)
    if q.shape[-1] > 512:
        raise Unsupported(f"takes heads of at most 512, not {q.shape[-1]}")
    return rows.Passes(rotary_forward, rotary_backward)


def _check(x, *others) -> None:
    rows.check(x, *others)
    if x.shape[-1] > MAX_WIDTH:
        raise Unsupported(f"takes rows of at most {MAX_WIDTH:,}, not {x.shape[-1]:,}")
    require_gpu(8.0)


def forward(eps, x, scale, bias, residual):
    """`(y,)`, or `(y, h)` with a residual."""
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    has_residual, centered = residual is not None, bias is not None
    results = triton_call(
        *(x, scale, bias if centered else scale, residual if has_residual else x),
        kernel=_forward,
        out_shape=[like, like if has_residual else jax.ShapeDtypeStruct((1,), x.dtype)],
        CENTERED=centered,
        HAS_RESIDUAL=has_residual,
        EPS=eps,
        **_walk(x.shape, "forward"),
    )
    return results if has_residual else results[:1]


def backward(eps, centered, h, scale, dy, dh):
    """`(dx, dscale)`, and dbias if centered."""
    arrays, walk = (h, scale, dy, dy if dh is None else dh), _walk(h.shape, "backward", centered=centered)
    flags = {"CENTERED": centered, "HAS_SUM": dh is not None}
    return _with_shares(arrays, _backward, (True, centered), EPS=eps, **flags, **walk)


def rotary_forward(eps, x, scale, cosine, sine):
    """`(y,)`."""
    like, walk = jax.ShapeDtypeStruct(x.shape, x.dtype), _walk_heads(x.shape, "forward")
    return triton_call(x, scale, cosine, sine, kernel=_rotary_forward, out_shape=[like], EPS=eps, **walk)


def rotary_backward(eps, x, scale, cosine, sine, dy):
    """`(dx, dscale)`."""
    return _with_shares((x, scale, cosine, sine, dy), _rotary_backward, EPS=eps, **_walk_heads(x.shape, "backward"))


def _with_shares(arrays, kernel, vectors=(True,), **how):
    """The gradient of the first array, and those of vectors, of which each program has a share; of True ones only."""
    x = arrays[0]
    shapes = [(x.shape[0], how["PROGRAMS"], x.shape[-1]) if wanted else (1,) for wanted in vectors]
    out_shape = [
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
    ]
    dx, *shares = triton_call(*arrays, kernel=kernel, out_shape=out_shape, **how)
    return dx, *(jnp.sum(share, axis=1) for share, wanted in zip(shares, vectors, strict=True) if wanted)


def _walk(shape, passes: str, *, centered: bool = False) -> dict:
    """Programs, warps and sizes for `[G, R, D]`."""
    groups, rows, width = shape
    block = triton.next_power_of_2(width)
    together = max(1, min(THREADS[passes] * ENTRIES[passes] // block, triton.next_power_of_2(rows)))
    sizes = {"ROWS": rows, "WIDTH": width, "BLOCK": block, "TOGETHER": together}
    threads = (CENTERED_THREADS if centered else NORM_THREADS) if passes == "backward" else None
    # No more warps, a power of two, than have registers.
    most = 32 if threads is None else 1 << (threads // 32).bit_length() - 1
    warps = min(most, max(4, together * block // (32 * ENTRIES[passes])))
    return _launch(groups, -(-rows // together), warps, threads) | sizes


def _walk_heads(shape, passes: str) -> dict:
    """Programs, warps and sizes for `[B, T, H, E]`."""
    batch, length, heads, width = shape
    block = triton.next_power_of_2(width // 2)
    together = max(1, min(1024 // block, triton.next_power_of_2(length * heads)))
    sizes = {"ROWS": length * heads, "HEADS": heads, "WIDTH": width, "BLOCK": block, "TOGETHER": together}
    steps, threads = -(-length * heads // together), ROTARY_THREADS if passes == "backward" else None
    return _launch(batch, steps, 4, threads) | sizes


def _launch(groups: int, steps: int, warps: int, threads: int | None) -> dict:
    """Programs for each group: one for each step; of `threads` at once, so many that their waves take fewest steps."""
    programs = steps
    if threads:
        at_once = target_device().cores * max(1, threads // (32 * warps))
        # What a program reads before its first rows and writes after its last ones counts as a step.
        cost = lambda programs: -(-groups * programs // at_once) * (-(-steps // programs) + 1)  # noqa: E731
        programs = min(range(1, min(steps, 4 * at_once // groups + 1) + 1), key=cost)
    return {"grid": (groups * programs,), "num_warps": warps, "PROGRAMS": programs}


@triton.jit
def _rows_of(group, step, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """Where a step's rows begin, where their entries are from there, and which exist: `[TOGETHER, BLOCK]`."""
    rows = tl.arange(0, TOGETHER)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    first = step * TOGETHER
    start = (group.to(tl.int64) * ROWS + first) * WIDTH
    return start, rows * WIDTH + columns, (first + rows < ROWS) & (columns < WIDTH)


@triton.jit
def _centered(h, exists, WIDTH: tl.constexpr):
    """h less the mean of its row, and 0 where there is nothing."""
    return tl.where(exists, h - (tl.sum(h, axis=1) * (1.0 / WIDTH))[:, None], 0.0)


@triton.jit
def _for_rows(vector_ptr, group, exists, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A group's vector for rows that lie as `exists`: so it needn't go to their threads through shared memory."""
    rows = tl.zeros_like(exists).to(tl.int32)
    return load(vector_ptr + group * WIDTH, rows + tl.arange(0, BLOCK)[None, :], exists)


@triton.jit
def _forward(
    x_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    h_ptr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EPS: tl.constexpr,
):
    group = tl.program_id(0) // PROGRAMS
    start, offsets, exists = _rows_of(group, tl.program_id(0) % PROGRAMS, ROWS, WIDTH, BLOCK, TOGETHER)
    h = tl.load(x_ptr + start + offsets, mask=exists, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + start + offsets, mask=exists, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(h_ptr + start + offsets, h, mask=exists)
    h = h.to(tl.float32)
    # One vector is asked for before the sums, and is there after them. With two there, half the rows would be on their
    # way at once, for want of registers.
    if CENTERED:
        h = _centered(h, exists, WIDTH)
    else:
        scale = load_row(scale_ptr, group, WIDTH, BLOCK)
    inverse = tl.rsqrt(tl.sum(h * h, axis=1) * (1.0 / WIDTH) + EPS)
    y = h * inverse[:, None]
    if CENTERED:
        y *= _for_rows(scale_ptr, group, exists, WIDTH, BLOCK)
        y += _for_rows(bias_ptr, group, exists, WIDTH, BLOCK)
    else:
        y *= scale
    store(y_ptr + start, offsets, y, exists)


@triton.jit
def _backward(
    h_ptr,
    scale_ptr,
    dy_ptr,
    dh_ptr,
    dx_ptr,
    shares_ptr,
    bias_shares_ptr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_SUM: tl.constexpr,
    EPS: tl.constexpr,
):
    group = tl.program_id(0) // PROGRAMS
    step = tl.program_id(0) % PROGRAMS
    columns = tl.arange(0, BLOCK)
    scale = load_row(scale_ptr, group, WIDTH, BLOCK)
    start, offsets, exists = _rows_of(group, step, ROWS, WIDTH, BLOCK, TOGETHER)
    h = tl.load(h_ptr + start + offsets, mask=exists, other=0.0)
    dy = tl.load(dy_ptr + start + offsets, mask=exists, other=0.0)
    share = tl.zeros([BLOCK], tl.float32)
    bias_share = tl.zeros([BLOCK], tl.float32)
    while step * TOGETHER < ROWS:
        ahead, _, ahead_exists = _rows_of(group, step + PROGRAMS, ROWS, WIDTH, BLOCK, TOGETHER)
        ahead_h = tl.load(h_ptr + ahead + offsets, mask=ahead_exists, other=0.0)
        ahead_dy = tl.load(dy_ptr + ahead + offsets, mask=ahead_exists, other=0.0)
        h = h.to(tl.float32)
        dy = dy.to(tl.float32)
        if CENTERED:
            h = _centered(h, exists, WIDTH)
            bias_share += tl.sum(dy, axis=0)
        inverse = tl.rsqrt(tl.sum(h * h, axis=1) * (1.0 / WIDTH) + EPS)[:, None]
        u = h * inverse
        g = dy * scale
        share += tl.sum(dy * u, axis=0)
        dx = g - u * (tl.sum(g * u, axis=1) * (1.0 / WIDTH))[:, None]
        if CENTERED:
            dx -= (tl.sum(g, axis=1) * (1.0 / WIDTH))[:, None]
        dx *= inverse
        if HAS_SUM:
            dx += load(dh_ptr + start, offsets, exists)
        store(dx_ptr + start, offsets, dx, exists)
        h, dy, start, exists = ahead_h, ahead_dy, ahead, ahead_exists
        step += PROGRAMS
    place = tl.program_id(0).to(tl.int64) * WIDTH
    tl.store(shares_ptr + place + columns, share, mask=columns < WIDTH)
    if CENTERED:
        tl.store(bias_shares_ptr + place + columns, bias_share, mask=columns < WIDTH)


@triton.jit
def _heads_of(
    batch,
    step,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Where a step's heads begin, where the first halves of their entries are from there, where their angles are, and
    which exist: `[TOGETHER, BLOCK]`."""
    rows = tl.arange(0, TOGETHER)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    first = step * TOGETHER
    start = (batch.to(tl.int64) * ROWS + first) * WIDTH
    angles = batch.to(tl.int64) * (ROWS // HEADS * (WIDTH // 2))
    turn = angles + (first + rows) // HEADS * (WIDTH // 2) + columns
    return start, rows * WIDTH + columns, turn, (first + rows < ROWS) & (columns < WIDTH // 2)


@triton.jit
def _halves(pointer, at, exists, HALF: tl.constexpr):
    """The first and the second half of heads, in float32."""
    return load(pointer, at, exists), load(pointer + at, HALF, exists)


@triton.jit
def _rotary_forward(
    x_ptr,
    scale_ptr,
    cosine_ptr,
    sine_ptr,
    y_ptr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    PROGRAMS: tl.constexpr,
    EPS: tl.constexpr,
):
    HALF: tl.constexpr = WIDTH // 2
    batch = tl.program_id(0) // PROGRAMS
    step = tl.program_id(0) % PROGRAMS
    start, offsets, turn, exists = _heads_of(batch, step, ROWS, HEADS, WIDTH, BLOCK, TOGETHER)
    x1, x2 = _halves(x_ptr + start, offsets, exists, HALF)
    cosine = tl.load(cosine_ptr + turn, mask=exists, other=0.0)
    sine = tl.load(sine_ptr + turn, mask=exists, other=0.0)
    columns = tl.arange(0, BLOCK)
    scale1, scale2 = _halves(scale_ptr + batch * WIDTH, columns[None, :], columns[None, :] < HALF, HALF)
    inverse = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) * (1.0 / WIDTH) + EPS)[:, None]
    u1 = x1 * inverse * scale1
    u2 = x2 * inverse * scale2
    y1 = u1 * cosine - u2 * sine
    y2 = u2 * cosine + u1 * sine
    store(y_ptr + start, offsets, y1, exists)
    store(y_ptr + start + offsets, HALF, y2, exists)


@triton.jit
def _rotary_backward(
    x_ptr,
    scale_ptr,
    cosine_ptr,
    sine_ptr,
    dy_ptr,
    dx_ptr,
    shares_ptr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    PROGRAMS: tl.constexpr,
    EPS: tl.constexpr,
):
    HALF: tl.constexpr = WIDTH // 2
    batch = tl.program_id(0) // PROGRAMS
    step = tl.program_id(0) % PROGRAMS
    columns = tl.arange(0, BLOCK)
    scale1, scale2 = _halves(scale_ptr + batch * WIDTH, columns[None, :], columns[None, :] < HALF, HALF)
    share1 = tl.zeros([TOGETHER, BLOCK], tl.float32)
    share2 = tl.zeros([TOGETHER, BLOCK], tl.float32)
    while step * TOGETHER < ROWS:
        start, offsets, turn, exists = _heads_of(batch, step, ROWS, HEADS, WIDTH, BLOCK, TOGETHER)
        x1, x2 = _halves(x_ptr + start, offsets, exists, HALF)
        dy1, dy2 = _halves(dy_ptr + start, offsets, exists, HALF)
        cosine = tl.load(cosine_ptr + turn, mask=exists, other=0.0)
        sine = tl.load(sine_ptr + turn, mask=exists, other=0.0)
        d1 = dy1 * cosine + dy2 * sine
        d2 = dy2 * cosine - dy1 * sine
        inverse = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) * (1.0 / WIDTH) + EPS)[:, None]
        u1 = x1 * inverse
        u2 = x2 * inverse
        share1 += d1 * u1
        share2 += d2 * u2
        g1 = d1 * scale1
        g2 = d2 * scale2
        mean = tl.sum(g1 * u1 + g2 * u2, axis=1)[:, None] * (1.0 / WIDTH)
        dx1 = inverse * (g1 - u1 * mean)
        dx2 = inverse * (g2 - u2 * mean)
        store(dx_ptr + start, offsets, dx1, exists)
        store(dx_ptr + start + offsets, HALF, dx2, exists)
        step += PROGRAMS
    place = shares_ptr + tl.program_id(0).to(tl.int64) * WIDTH + columns
    tl.store(place, tl.sum(share1, axis=0), mask=columns < HALF)
    tl.store(place + HALF, tl.sum(share2, axis=0), mask=columns < HALF)
