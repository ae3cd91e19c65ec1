"""What `python -m crescendo.pallas_kernels.tune attention` chooses: the tiles of the kernels for GPUs."""

import functools

import jax

from crescendo.pallas_kernels.attention import hopper
from crescendo.pallas_kernels.attention.contract import Config, Operands, dout_out
from crescendo.pallas_kernels.attention.hopper import backward, forward, scores, split_keys, tiling
from crescendo.pallas_kernels.attention.hopper.key_gradients import KeyGradients
from crescendo.pallas_kernels.attention.hopper.query_gradients import QueryGradients
from crescendo.pallas_kernels.attention.op import attention
from crescendo.pallas_kernels.attention.tiles import key
from crescendo.pallas_kernels.hopper import memory
from crescendo.pallas_kernels.op import Spec, Unsupported, load
from crescendo.pallas_kernels.tune import Problem, Tunable


def _call(spec: Spec) -> tuple[Config, Operands, int]:
    """The constants, the arrays and the width in full swizzles."""
    args, options = spec.inputs()
    checked = attention.check(*args, **options)  # type: ignore[attr-defined]
    config, operands = checked["config"], checked["operands"]
    hopper.check(operands)
    return config, operands, key(config, operands)["width"]


def _blocked(operands: Operands, tile) -> tuple[Operands, tuple[int, int], bool]:
    """The rest of what a kernel's `Call` takes, without arrays: what it allocates is the same whatever is paired."""
    blocked = jax.eval_shape(lambda operands: tiling.padded(operands, tile.rows, tile.rows), operands)
    return blocked, operands.dims[1:3], False


def _another(config: Config, tile) -> bool:
    """Whether it is another tile than that with `pairs`, which are of causal calls alone."""
    return tile.pairs or config.causal


def _forward(spec: Spec) -> Problem:
    config, operands, width = _call(spec)

    def fits(tile: forward.ForwardTile) -> bool:
        # A float32 matrix of 64 rows takes half a register for each column, of each of a warpgroup's threads.
        matrices = width // 2 + tile.block // 2 + tile.block // 4
        call = forward.Forward(config, tile, *_blocked(operands, tile))
        return memory.fits(call.scratch, matrices, tile.consumers) and _another(config, tile)

    return Problem(
        key(config, operands),
        operands.dims[1],
        forward.default_tile(operands),
        lambda: (operands,),
        lambda tile: functools.partial(forward.forward, config, tile=tile),
        fits,
    )


def _for_backward(config: Config, operands: Operands) -> tuple:
    """The arrays of a backward pass."""
    out, lse = jax.jit(forward.forward, static_argnums=0)(config, operands)
    dout = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
    return operands, lse, dout, out


def _backward(which: int, from_scores: bool | None, spec: Spec) -> Problem:
    """Of the kernel for the gradients of k and v (0) or one for that of q (1), beside the other with its default.

    `from_scores` says which one for q it is.
    """
    config, operands, width = _call(spec)
    defaults: tuple = backward.default_tiles(operands)
    parts = scores.parts_for(config, operands, defaults[0])
    if parts is not None:
        defaults = defaults[0], scores.default_tile(config, operands, parts)
    if from_scores not in (None, parts is not None):
        raise Unsupported("the gradient of q is made by the other kernel")

    def run(tile):
        pair = (tile, defaults[1]) if which == 0 else (defaults[0], tile)

        def gradients(operands, lse, dout, out):
            return backward.backward(config, operands, lse, dout, None, out, pair)[:3]

        return gradients

    def fits(tile) -> bool:
        given = config, tile, *_blocked(operands, tile)
        call: tiling.Call
        if isinstance(tile, scores.ScoresTile):
            assert parts is not None
            matrices = tile.blocks * width // 2
            call = scores.FromScores(*given, parts.store)
        else:
            # Up to a width of 128 the one for k and v holds both gradients.
            gradients = width if which == 0 and width <= 128 else width // 2
            matrices = gradients + tile.block + (tile.block // 4 if tile.behind else 0)
            call = KeyGradients(*given, parts=parts) if which == 0 else QueryGradients(*given)
        return memory.fits(call.scratch, matrices, tile.consumers) and _another(config, tile)

    arrays = functools.partial(_for_backward, config, operands)
    return Problem(key(config, operands), operands.dims[1], defaults[which], arrays, run, fits)


def _split_keys(spec: Spec) -> Problem:
    config, operands, width = _call(spec)
    split_keys.attention(config, operands)  # refuses what it leaves to others
    default = split_keys.default_tile(operands)

    def fits(tile: forward.ForwardTile) -> bool:
        matrices = width // 2 + tile.block // 2 + tile.block // 4
        call = jax.eval_shape(lambda operands: split_keys.call_of(config, operands, tile).operands, operands)
        ours = split_keys.SplitKeys(config, tile, call, operands.dims[1:3], False, 1, 1)
        return memory.fits(ours.scratch, matrices, tile.consumers)

    return Problem(
        key(config, operands),
        operands.dims[2],
        default,
        lambda: (operands,),
        lambda tile: functools.partial(split_keys.forward, config, tile=tile),
        fits,
    )


def _triton(passes: str, spec: Spec) -> Problem:
    args, options = spec.inputs()
    checked = attention.check(*args, **options)  # type: ignore[attr-defined]
    config, operands = checked["config"], checked["operands"]
    load(attention, "triton")(config, operands)  # refuses what it doesn't serve, or where the package is missing
    from crescendo.pallas_kernels.attention import triton

    length, width = operands.dims[1], operands.dims[-1]

    def fits(tile) -> bool:
        # Of a thread, two blocks of keys or queries in float32 and one of scores, in registers.
        numbers = tile.block_q * width + tile.block_q * tile.block_k + tile.block_k * width * (passes == "backward")
        return numbers <= 32 * tile.warps * 200

    def arrays() -> tuple:
        if passes == "forward":
            return (operands,)
        out, lse = jax.jit(triton.forward, static_argnums=0)(config, operands)
        dout = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
        return operands, lse, dout, dout_out(dout, out)

    def run(tile):
        if passes == "forward":
            return functools.partial(triton.forward, config, tile=tile)
        return lambda operands, lse, dout, delta: triton.backward(config, operands, lse, dout, delta, None, tile)[:3]

    default = triton.forward_tile(width) if passes == "forward" else triton.backward_tile(width)
    return Problem(key(config, operands), length, default, arrays, run, fits)


ORDER: dict[str, tuple[bool, ...]] = {"persistent": (True, False), "pairs": (True, False)}
BACKWARD = ({"block": (64, 128), "stages": (2, 3, 4), "behind": (True, False)}, ORDER)
OF_TRITON = ({"block_q": (64, 128), "block_k": (32, 64, 128), "warps": (4, 8)}, {"stages": (1, 2, 3, 4)})
TUNABLES = (
    Tunable(
        "forward",
        _forward,
        (
            # Three consumers have 160 registers a thread each, and took 1.4 times as long on an H100 wherever they fit.
            {"block": (64, 128), "stages": (2, 3)},
            {"turns": (True, False), **ORDER},
        ),
    ),
    Tunable("gradients of k and v", functools.partial(_backward, 0, None), BACKWARD),
    Tunable("gradient of q", functools.partial(_backward, 1, False), BACKWARD),
    Tunable(
        "gradient of q from scores",
        functools.partial(_backward, 1, True),
        ({"blocks": (1, 2), "stages": (3, 4, 5, 6)}, ORDER),
    ),
    Tunable("split keys", _split_keys, ({"block": (64, 128), "stages": (2, 3, 4, 6, 8)},)),
    Tunable("triton forward", functools.partial(_triton, "forward"), OF_TRITON),
    Tunable("triton backward", functools.partial(_triton, "backward"), OF_TRITON),
)
