"""Cross-entropy of a linear layer's outputs, which never exist in full."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from crescendo.pallas_kernels.linear_cross_entropy import chunked
from crescendo.pallas_kernels.op import check_floating, op
from crescendo.pallas_kernels.sharded import alike, mesh_axes, varying

IMPLEMENTATIONS = {
    name: f"crescendo.pallas_kernels.linear_cross_entropy.{name}"
    for name in ("mosaic_gpu", "triton", "xla", "reference")
}


@op(IMPLEMENTATIONS, run=chunked.loss)
def linear_cross_entropy(
    x,
    w,
    labels,
    *,
    weights=None,
    z_loss=0.0,
    soft_cap=None,
    label_smoothing=0.0,
    ignore_id=None,
    vocab_axis=None,
    return_lse=False,
    checked=False,
):
    r"""The weighted sum of the cross-entropies of the logits `x w^T`, and the sum of the weights.

    .. math::

      l_{iv} = c \tanh(x_i \cdot w_v / c), \quad Z_i = \sum_v e^{l_{iv}}, \quad
      L = \sum_i a_i \left(\log Z_i - \sum_v q_{iv} l_{iv} + \zeta \log^2 Z_i\right), \quad
      q_{iv} = (1 - \epsilon) [v = y_i] + \epsilon / V

    Logits are of one chunk of rows at a time. The gradients of x and w are computed with the loss, three matmuls in
    all; that of w is summed in float32. Differentiable in x, w, weights, and through the log-sum-exps. The kernel for
    Hopper adds rows of the same label to the gradient of w in any order, as XLA does in an embedding's gradient: its
    last bits vary from call to call.

    Args:
      x: `[..., D]`, float32, bfloat16 or float16; the matmuls are in this dtype and sum in float32. For float16, whose
        least number is 6e-8, those of gradients are in float32; not by the kernels for GPUs, which want a scaled loss.
      w: `[V, D]`, in any such dtype, which is that of its gradient: a float32 w loses nothing beside a bfloat16 x.
      labels: int `[...]` in `[0, V)`, or `ignore_id`. Where the weight is 0 any value will do; elsewhere one out of
        range makes the loss and its gradients NaN (see `checked`).
      weights: a, float `[...]`; None: 1.
      z_loss: zeta, keeps `log Z` near 0 (PaLM, section 5).
      soft_cap: c, above 0; None: the logits as they are.
      label_smoothing: epsilon in `[0, 1)`.
      ignore_id: the label of rows that count nothing, such as -100. They and those of weight 0 may hold anything, NaN
        and infinities too; not with `return_lse`, which shows them.
      vocab_axis: inside `jax.shard_map`, the mesh axis that splits w by its rows; a maximum and sums of rows cross
        the devices, never logits. x and the labels are the same on all of them. Under `jit` with a sharded w none is
        needed.
      return_lse: return `log Z`, float32 `[...]`, too.
      checked: report labels out of range: ValueError where labels are concrete, `checkify.check` where traced.

    Returns:
      `(loss_sum, weight_sum)`, float32 scalars, and `log Z` if asked for.

    Raises:
      ValueError: shapes that don't fit each other, options out of range, or labels out of range if `checked`.
      TypeError: dtypes other than those above.

    References:
      Wijmans et al., 2024, `Cut Your Losses in Large-Vocabulary Language Models <https://arxiv.org/abs/2411.09009>`_;
      Hsu et al., 2024, `Liger Kernel <https://arxiv.org/abs/2410.10989>`_ (gradients in the forward, by chunks);
      Chowdhery et al., 2022, `PaLM <https://arxiv.org/abs/2204.02311>`_

    >>> labels = jnp.array([1, 7, -1])
    >>> loss_sum, weight_sum = linear_cross_entropy(jnp.zeros((3, 4)), jnp.ones((8, 4)), labels, ignore_id=-1)
    >>> print(f"{loss_sum / weight_sum:.4f} {math.log(8):.4f} {weight_sum}")
    2.0794 2.0794 2.0
    """
    check_floating(x=x, w=w, **({} if weights is None else {"weights": weights}))
    if not (hasattr(labels, "dtype") and jnp.issubdtype(labels.dtype, jnp.integer)):
        raise TypeError(f"labels is {getattr(labels, 'dtype', type(labels).__name__)} and must be an array of integers")
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x {list(x.shape)} must be [..., D] and w {list(w.shape)} [V, D] with the same D")
    for name, array in (("labels", labels), ("weights", weights)):
        if array is not None and tuple(array.shape) != tuple(x.shape[:-1]):
            raise ValueError(
                f"{name} {list(array.shape)} must have the shape of x {list(x.shape)} without its last axis"
            )
    if not w.size:
        raise ValueError(f"w {list(w.shape)} must hold at least one row and one column")
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ValueError(f"soft_cap = {soft_cap} must be positive and finite, or None")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing = {label_smoothing} must be in [0, 1)")
    if not (math.isfinite(z_loss) and z_loss >= 0):
        raise ValueError(f"z_loss = {z_loss} must be at least 0 and finite")
    if not varying(w) >= set(mesh_axes([vocab_axis])):
        raise ValueError(f"vocab_axis = {vocab_axis!r} must split w inside jax.shard_map, with its check_vma left on")
    # A narrow dtype holds neither V nor ignore_id, and would wrap them around.
    labels = jnp.asarray(labels, jnp.promote_types(labels.dtype, jnp.int32))
    vocab_size = w.shape[0] * (1 if vocab_axis is None else jax.lax.axis_size(vocab_axis))
    wide, counts_all = jnp.promote_types(x.dtype, jnp.float32), weights is None and ignore_id is None
    weights = jnp.ones(labels.shape, wide) if weights is None else jnp.asarray(weights, wide)
    if ignore_id is not None:
        weights = jnp.where(labels == ignore_id, 0, weights)
    in_range = (labels >= 0) & (labels < vocab_size)
    if checked:
        _report(labels, in_range | (weights == 0), vocab_size)
    weights = jnp.where(in_range | (weights == 0), weights, jnp.nan)
    if not (counts_all or return_lse):
        # Selected away, since 0 times NaN or infinity is NaN: in the gradient of w that would be everywhere.
        x = jnp.where((weights == 0)[..., None], 0, x)
    labels = jnp.where(in_range, labels, 0).astype(jnp.int32)
    x, w, labels, weights = alike(x, w, labels, weights, but=vocab_axis)
    options = chunked.Options(
        float(z_loss),
        None if soft_cap is None else float(soft_cap),
        float(label_smoothing),
        vocab_axis,
        w.dtype,
        return_lse,
    )
    return {"options": options, "x": x, "w": w, "labels": labels, "weights": weights}


def _report(labels, good, vocab_size: int) -> None:
    """Raises, now or when the program runs, for labels that are not good."""
    message = f"labels must be in [0, {vocab_size}), be ignore_id, or have weight 0"
    if isinstance(good, jax.core.Tracer):
        worst = jnp.where(good, 0, labels)
        checkify.check(jnp.all(good), message + ": {low} to {high} found", low=jnp.min(worst), high=jnp.max(worst))
    elif not np.all(good):
        where = np.argwhere(~np.asarray(good))
        place = tuple(int(i) for i in where[0])
        value = int(np.asarray(labels)[place])
        raise ValueError(f"{message}: {len(where)} are not, the first one at {place}, labels{list(place)} = {value}")
