"""Losses of classes as `(sum, weight)`, from logits `[B, classes]`."""

import jax
import jax.numpy as jnp


def classification_loss(logits_BC, labels_B, weights_B=None, *, label_smoothing: float = 0.0):
    r"""The cross-entropy: `(sum in nats, weight in examples)`, both float32 scalars.

    .. math::

      \sum_b a_b \left(-\sum_c q_{bc} \log \mathrm{softmax}(l_b)_c\right), \quad
      q_{bc} = (1 - \epsilon) [c = y_b] + \epsilon / C

    Szegedy et al., 2016, "Rethinking the Inception Architecture", section 7, https://arxiv.org/abs/1512.00567.

    Args:
      logits_BC: float32.
      labels_B: int32 in `[0, C)`; others make the loss and its gradients NaN.
      weights_B: a, float32; None: 1. Where it is 0, logits and labels may hold anything.
      label_smoothing: epsilon in [0, 1).

    >>> loss, weight = classification_loss(jnp.zeros((2, 8)), jnp.array([1, 7]), jnp.array([1.0, 0.0]))
    >>> print(f"{loss:.4f} {weight}")
    2.0794 1.0
    """
    weights_B = jnp.ones(labels_B.shape, jnp.float32) if weights_B is None else weights_B
    in_range_B, nothing_B = (labels_B >= 0) & (labels_B < logits_BC.shape[-1]), weights_B == 0
    weights_B = jnp.where(in_range_B | nothing_B, weights_B, jnp.nan)
    # Selected away, since 0 times NaN is NaN.
    log_probabilities = jax.nn.log_softmax(jnp.where(nothing_B[:, None], 0, logits_BC))
    labels_B = jnp.where(in_range_B, labels_B, 0)
    losses = -jnp.take_along_axis(log_probabilities, labels_B[:, None], axis=-1)[:, 0]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * jnp.mean(log_probabilities, axis=-1)
    return jnp.sum(weights_B * losses), jnp.sum(weights_B)


def classification_accuracy(logits_BC, labels_B, weights_B=None):
    """The weight of the examples that have the largest logit at their label, and of all: float32 scalars.

    >>> print(*classification_accuracy(jnp.eye(3), jnp.array([0, 1, 1])))
    2.0 3.0
    """
    correct = jnp.argmax(logits_BC, axis=-1) == labels_B
    if weights_B is None:
        return jnp.sum(correct, dtype=jnp.float32), jnp.float32(correct.size)
    return jnp.sum(jnp.where(correct, weights_B, 0)), jnp.sum(weights_B)
