"""The op `shared_prefix`: attention of many sequences that begin with the same tokens."""

from crescendo.pallas_kernels.attention.op import HERE, attention
from crescendo.pallas_kernels.op import op


@op({"merged": f"{HERE}.prefix_merged", "reference": f"{HERE}.prefix_copied"})
def shared_prefix(
    q,
    prefix_k,
    prefix_v,
    k,
    v,
    *,
    causal: bool = False,
    segment_ids=None,
    positions=None,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
):
    r"""Attention over a prefix that the members of a group have in common, and over what each has of its own.

    With :math:`[a; b]` for one after the other, member m of group g gets
    :math:`\mathrm{softmax}(s\, q_m [k^{pre}_g; k_m]^T) [v^{pre}_g; v_m]`. The prefix is stored once and read once a
    group: the queries of all members attend it as those of one row, and both results are merged by their log-sum-exp.
    Every query sees all of the prefix. For members of different lengths give what is past a member's end another
    segment id: its results mean nothing, and no other token sees it.

    Args:
      q: `[B, T, H, D]`: G groups of B / G members each, those of a group side by side.
      prefix_k, prefix_v: `[G, P, K, D]`, of q's dtype.
      k, v: `[B, S, K, D]`, what follows the prefix.
      causal: a query sees those keys of its own member whose position is not greater than its own.
      segment_ids: as `attention` takes them, of queries and k: members' own tokens.
      positions: likewise; the prefix has none.
      scale, soft_cap: as `attention` takes them.
      return_lse: also returns the log-sum-exp of all scores, float32 `[B, T, H]`.

    Returns:
      `[B, T, H, D]` in q's dtype, or the pair with the log-sum-exp; differentiable in all five arrays.

    Raises:
      ValueError, TypeError: for arguments that no implementation could take.

    >>> import jax.numpy as jnp
    >>> q, prefix, k = (jnp.ones(shape) for shape in ((4, 3, 2, 8), (2, 5, 1, 8), (4, 3, 1, 8)))
    >>> shared_prefix(q, prefix, prefix, k, k, causal=True).shape
    (4, 3, 2, 8)

    References:
      Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes", 2024 (arXiv:2402.05099); Liu et
      al., "Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward", 2025 (arXiv:2506.05433).
    """
    options = {
        "causal": causal,
        "segment_ids": segment_ids,
        "positions": positions,
        "scale": scale,
        "soft_cap": soft_cap,
    }
    attention.check(q, k, v, **options)  # type: ignore[attr-defined]
    for name, array in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"{name} must be an array, not {type(array).__name__}")
        if array.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, not {array.dtype}")
        if len(array.shape) != 4 or tuple(array.shape[2:]) != tuple(k.shape[2:]) or 0 in array.shape:
            raise ValueError(f"{name} must be [groups, length, {k.shape[2]}, {k.shape[3]}] like k, not {array.shape}")
    if prefix_k.shape != prefix_v.shape:
        raise ValueError(f"prefix_k and prefix_v must have one shape, not {prefix_k.shape} and {prefix_v.shape}")
    if q.shape[0] % prefix_k.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows, which is no multiple of prefix_k's {prefix_k.shape[0]} groups")
    return {
        "q": q,
        "prefix": (prefix_k, prefix_v),
        "own": (k, v),
        "options": options,
        "return_lse": bool(return_lse),
    }
