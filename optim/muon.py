"""Muon: momentum whose matrices are orthogonalised before the step."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from optax import contrib

from crescendo.optim.checks import Rate
from crescendo.optim.masks import LayerAxis, Mask, as_mask, is_matrix, layer_axes, leaves_with_paths
from crescendo.optim.precision import in_float32
from crescendo.optim.registry import OPTIMIZERS
from crescendo.optim.scaling import with_learning_rate
from crescendo.ranges import Count, Decay, NotNegative, Positive


@OPTIMIZERS
def muon(
    learning_rate: Rate,
    *,
    momentum: Decay = 0.95,
    nesterov: bool = True,
    newton_schulz_steps: Count = 5,
    rms: Positive = 0.2,
    weight_decay: NotNegative = 0.1,
    adam_b1: Decay = 0.9,
    adam_b2: Decay = 0.95,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    dimensions: Callable[[optax.Params], Any] | None = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.muon` for hidden matrices, one per layer; AdamW without decay for everything else.

    Updates are scaled to a root mean square of `rms`, so that AdamW's rates and decay carry over.

    Args:
      learning_rate: a rate or a schedule; see `scale_by_learning_rate`.
      momentum: of the hidden matrices' gradients.
      nesterov: look ahead in it.
      newton_schulz_steps: iterations that make the momentum orthogonal.
      rms: root mean square of a matrix's update, before the rate.
      weight_decay: of the hidden matrices, multiplied by the learning rate.
      adam_b1: decay of the first moment of everything else.
      adam_b2: decay of its second moment.
      mask: what decays; None: matrices (see `masks.is_matrix`), True: everything.
      layer_axis: where layers are stacked; see `masks.layer_axes`.
      dimensions: a function from parameters to a tree of `optax.contrib.MuonDimensionNumbers`, or None where Adam is
        to be used; None: `matrix_dimensions` under `layer_axis`.
      moment_dtype: dtype in which the moments are stored; None: the parameters'.

    Raises:
      ValueError: a negative or NaN learning rate, a constant out of its range; at `init`, a mask that matches nothing.

    References:
      Jordan et al., 2024, `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_;
      Liu et al., 2025, `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_

    >>> import jax.numpy as jnp
    >>> params = {"blocks": {"kernel": jnp.ones((3, 4, 4))}}
    >>> updates, _ = muon(0.5).update(params, muon(0.5).init(params), params)
    >>> updates["blocks"]["kernel"].shape
    (3, 4, 4)
    """
    return in_float32(
        with_learning_rate(
            lambda rate: contrib.muon(
                rate,
                ns_steps=newton_schulz_steps,
                beta=momentum,
                weight_decay=weight_decay,
                weight_decay_mask=as_mask(mask, layer_axis),
                nesterov=nesterov,
                adam_b1=adam_b1,
                adam_b2=adam_b2,
                muon_weight_dimension_numbers=dimensions or (lambda params: matrix_dimensions(params, layer_axis)),
                consistent_rms=rms,
            ),
            learning_rate,
        ),
        moment_dtype=moment_dtype,
    )


def matrix_dimensions(params: optax.Params, layer_axis: LayerAxis = None) -> Any:
    """Muon's view of every parameter: which axes of a layer are its inputs and which its outputs; None: no matrix.

    Embeddings, output heads and what `is_matrix` excludes are None. Under `query`, `key` and `value` the first axis is
    the input; under `output` all but the last are; elsewhere the last two axes are a matrix, and axes before them
    (experts) count matrices.

    >>> import jax.numpy as jnp
    >>> matrix_dimensions({"blocks": {"output": {"kernel": jnp.ones((2, 4, 8, 32))}}, "head": jnp.ones((32, 9))})
    {'blocks': {'output': {'kernel': MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(3,))}}, 'head': None}
    """
    dimensions: list[contrib.MuonDimensionNumbers | None] = []
    for (path, leaf), axis, matrix in zip(
        leaves_with_paths(params),
        layer_axes(params, layer_axis),
        jax.tree.leaves(is_matrix(params, layer_axis)),
        strict=True,
    ):
        axes = tuple(i for i in range(np.ndim(leaf)) if i != axis)
        if not matrix or {"embedding", "head", "table"} & set(path):
            dimensions.append(None)
        elif {"query", "key", "value"} & set(path):
            dimensions.append(contrib.MuonDimensionNumbers(axes[:1], axes[1:]))
        elif "output" in path:
            dimensions.append(contrib.MuonDimensionNumbers(axes[:-1], axes[-1:]))
        else:
            dimensions.append(contrib.MuonDimensionNumbers(axes[-2:-1], axes[-1:]))
    return jax.tree.unflatten(jax.tree.structure(params), dimensions)
