"""The op `attention`: its contract and its implementations in order of preference."""

import math
import numbers

import jax.numpy as jnp

from crescendo.pallas_kernels.attention.contract import Config, Operands, attend
from crescendo.pallas_kernels.op import check_number, op
from crescendo.pallas_kernels.sharded import alike

HERE = "crescendo.pallas_kernels.attention"
IMPLEMENTATIONS = {"split_keys": f"{HERE}.hopper.split_keys", "mosaic_gpu": f"{HERE}.hopper"} | {
    name: f"{HERE}.{name}" for name in ("cudnn", "triton", "mosaic_tpu", "xla", "reference")
}


@op(IMPLEMENTATIONS, run=attend)
def attention(
    q,
    k,
    v,
    *,
    causal: bool = False,
    window: int | None = None,
    segment_ids=None,
    positions=None,
    bias=None,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
):
    """`softmax(scale q k^T + bias) v`, without the matrix of scores in memory.

    Query head h attends with key head `h // (H // K)`. A query that sees no key gives 0, and its gradients are 0.
    What a query doesn't see adds nothing to it, forward or backward, and may hold anything, NaN and infinities too, by
    `xla` and `reference`; by `xla` so may the cotangent of a query, for keys that it doesn't see. The kernels for GPUs
    and TPUs skip blocks that are hidden altogether and multiply by 0 what is hidden in others: there it must be finite.

    Args:
      q: `[B, T, H, D]`. Gradients of float16 are multiplied in float32 by `xla`, where they would be lost; the kernels
        for GPUs multiply in float16 and want a scaled loss.
      k, v: `[B, S, K, D]`, H a multiple of K, of q's dtype.
      causal: a query sees keys whose position is not greater than its own.
      window: keeps keys at a distance less than this: `i - w < j`, and `j <= i` when causal, `j < i + w` otherwise.
      segment_ids: int `[B, T]` (where S = T), or a pair of `[B, T]` and `[B, S]`: queries see keys of their segment.
      positions: likewise, int; `arange` from 0 on both sides where it is None. Or one number, Python's or an int array
        of the shape (): that of the first query, the next ones following it, and the keys from 0 on, as in a cache that
        holds so many tokens before them. `causal` and `window` compare them.
      bias: added to the scores, floating-point; its shape broadcasts to `[B, H, T, S]`. -inf hides a key.
      scale: `D ** -0.5` where it is None.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`, before the bias.
      return_lse: also returns `log(sum(exp(scores)))`, float32 `[B, T, H]` (-inf where nothing is seen), which is
        differentiable too, so that parts of a longer attention can be merged.

    Returns:
      `[B, T, H, D]` in q's dtype, or the pair with the log-sum-exp.

    Raises:
      ValueError, TypeError: for arguments that no implementation could take.
      NotImplementedError: if none of the named implementations serves the call; the message says which would.

    >>> q, k = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 1, 8))
    >>> attention(q, k, k, causal=True).shape
    (1, 4, 2, 8)
    >>> out, lse = attention(q, k, k, segment_ids=jnp.array([[1, 1, 2, 2]]), return_lse=True)
    >>> lse.shape
    (1, 4, 2)

    References:
      Dao, "FlashAttention-2", 2023 (arXiv:2307.08691); Shah et al., "FlashAttention-3", 2024 (arXiv:2407.08608);
      Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021 (arXiv:2112.05682).
    """
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"{name} must be an array, not {type(array).__name__}")
        if len(array.shape) != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, length, heads, width], not the shape {array.shape}"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating-point, not {array.dtype}")
    batch, length, heads, width = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, not {k.shape} and {v.shape}")
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch and width")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}: cast them first")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q {q.shape} and k {k.shape} must not be empty")
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads, which is no multiple of k's {kv_heads}")
    if window is not None and (not isinstance(window, numbers.Integral) or window < 1):
        raise ValueError(f"window must be a whole number of at least 1, or None, not {window!r}")
    check_number("scale", scale, optional=True)
    check_number("soft_cap", soft_cap, optional=True)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale!r}")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap must be positive and finite, or None, not {soft_cap!r}")
    if bias is not None:
        if not hasattr(bias, "shape") or not hasattr(bias, "dtype"):
            raise TypeError(f"bias must be an array, not {type(bias).__name__}")
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise TypeError(f"bias must be floating-point, not {bias.dtype}: jnp.where(mask, 0.0, -jnp.inf) hides keys")
        full = (batch, heads, length, keys)
        if len(bias.shape) != 4 or any(size not in (1, most) for size, most in zip(bias.shape, full, strict=True)):
            raise ValueError(f"bias {bias.shape} must broadcast to [batch, heads, length, keys] = {full}")
    config = Config(
        scale=width**-0.5 if scale is None else float(scale),
        causal=bool(causal),
        window=None if window is None else int(window),
        soft_cap=None if soft_cap is None else float(soft_cap),
        sees_itself=not isinstance(segment_ids, tuple) and positions is None and bias is None and length == keys,
        return_lse=bool(return_lse),
    )
    begin = None
    if not config.masks:
        positions = None  # nothing reads them
    elif isinstance(positions, numbers.Integral) or getattr(positions, "shape", None) == ():
        _check_integers("positions", positions)
        if isinstance(positions, numbers.Integral) and not -(2**31) <= int(positions) < 2**31 - length:
            raise ValueError(f"positions = {positions} must be at least -2**31 and below 2**31 - {length}, q's length")
        positions, begin = None, jnp.asarray(positions, jnp.int32)[None]
    segments = _pair("segment_ids", segment_ids, batch, length, keys)
    operands = Operands(q, k, v, bias, *segments, *_pair("positions", positions, batch, length, keys))
    return {"config": config, "operands": alike(operands._replace(begin=begin))[0]}


@op({name: at for name, at in IMPLEMENTATIONS.items() if name not in ("cudnn", "reference")}, function="attention")
def kernels(config: Config, operands: Operands):
    """The forward and the backward pass of the implementation that serves a call (`contract.Kernels`).

    For whoever merges parts of a longer attention and has a derivative rule of his own: the backward pass takes the
    log-sum-exp of all parts.
    """
    return {"config": config, "operands": operands}


def _pair(name: str, value, batch: int, length: int, keys: int):
    """One array for both sides, or a pair, checked."""
    if value is None:
        return None, None
    if not isinstance(value, tuple):
        if length != keys:
            raise ValueError(f"{name} must be a pair for q and k, whose lengths differ: {length} and {keys}")
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{name} must be one array or a pair, not {len(value)} of them")
    for side, array, size in (("q", value[0], length), ("k", value[1], keys)):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"{name} for {side} must be an array, not {type(array).__name__}")
        if tuple(array.shape) != (batch, size):
            raise ValueError(f"{name} for {side} must have the shape {(batch, size)}, not {tuple(array.shape)}")
        _check_integers(f"{name} for {side}", array)
    return value


def _check_integers(name: str, value) -> None:
    if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise TypeError(f"{name} must be integers, not {jnp.result_type(value)}")
