"""optax's optimizers on this package's clock and masks, to compare with; the rules are optax's own.

Each takes a rate or a schedule, which follows the extra argument `examples_seen` if the caller passes it, decays
matrices only unless told otherwise, computes in float32 or better and stores its moments in `moment_dtype`. All of them
raise ValueError for a negative or NaN learning rate, for a constant out of its range (`checks.RANGES`) and, at `init`,
for a mask that matches nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from crescendo.optim.checks import check_constants
from crescendo.optim.masks import LayerAxis, Mask, as_mask, is_matrix, layer_axes, leaves_with_paths
from crescendo.optim.precision import in_float32
from crescendo.optim.scaling import scale_by_learning_rate, scale_by_parameter, with_learning_rate
from crescendo.optim.weight_decay import add_decayed_weights

DType = jax.typing.DTypeLike | None


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: DType = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD: v <- momentum v + g + weight_decay w; w <- w - eta v (with Nesterov: g + weight_decay w + momentum v).

    >>> import jax.numpy as jnp
    >>> print(sgd(0.5).update(jnp.ones(1), sgd(0.5).init(jnp.ones(1)), jnp.ones(1))[0])
    [-0.5]
    """
    check_constants(momentum=momentum, weight_decay=weight_decay)
    return in_float32(
        optax.chain(
            add_decayed_weights(weight_decay, mask, layer_axis),
            optax.trace(decay=momentum, nesterov=nesterov),
            scale_by_learning_rate(learning_rate),
        ),
        moment_dtype=moment_dtype,
    )


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay_rate: float = 0.8,
    clipping_threshold: float = 1.0,
    multiply_by_parameter_scale: bool = True,
    momentum: float | None = None,
    weight_decay: float = 0.0,
    min_dim_size_to_factor: int = 128,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: DType = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adafactor` (Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235).

    The weight decay isn't multiplied by the learning rate; clipping and parameter scale see a stack of layers as one
    block.

    >>> import jax.numpy as jnp
    >>> updates, _ = adafactor(0.5).update(jnp.ones(1), adafactor(0.5).init(jnp.ones(1)), jnp.ones(1))
    >>> print(updates)
    [-0.5]
    """
    check_constants(
        decay_rate=decay_rate,
        clipping_threshold=clipping_threshold,
        momentum=momentum,
        weight_decay=weight_decay,
        min_dim_size_to_factor=min_dim_size_to_factor,
    )
    return in_float32(
        with_learning_rate(
            lambda rate: optax.adafactor(
                rate,
                min_dim_size_to_factor=min_dim_size_to_factor,
                decay_rate=decay_rate,
                multiply_by_parameter_scale=multiply_by_parameter_scale,
                clipping_threshold=clipping_threshold,
                momentum=momentum,
                weight_decay_rate=weight_decay,
                weight_decay_mask=as_mask(mask, layer_axis),
            ),
            learning_rate,
        ),
        moment_dtype=moment_dtype,
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    newton_schulz_steps: int = 5,
    rms: float = 0.2,
    weight_decay: float = 0.1,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    dimensions: Callable[[optax.Params], Any] | None = None,
    moment_dtype: DType = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.muon` for hidden matrices, one per layer; AdamW without decay for everything else.

    Updates are scaled to a root mean square of `rms`, so that AdamW's rates and decay carry over (Liu et al., 2025,
    https://arxiv.org/abs/2502.16982; Muon: Jordan, 2024).

    Args:
      dimensions: a function from parameters to a tree of `optax.contrib.MuonDimensionNumbers`, or None where Adam is
        to be used; None: `matrix_dimensions` under `layer_axis`.

    >>> import jax.numpy as jnp
    >>> params = {"blocks": {"kernel": jnp.ones((3, 4, 4))}}
    >>> updates, _ = muon(0.5).update(params, muon(0.5).init(params), params)
    >>> updates["blocks"]["kernel"].shape
    (3, 4, 4)
    """
    check_constants(
        momentum=momentum,
        newton_schulz_steps=newton_schulz_steps,
        rms=rms,
        weight_decay=weight_decay,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
    )
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
        axes = tuple(i for i in range(leaf.ndim) if i != axis)
        if not matrix or {"embedding", "head", "table"} & set(path):
            dimensions.append(None)
        elif {"query", "key", "value"} & set(path):
            dimensions.append(contrib.MuonDimensionNumbers(axes[:1], axes[1:]))
        elif "output" in path:
            dimensions.append(contrib.MuonDimensionNumbers(axes[:-1], axes[-1:]))
        else:
            dimensions.append(contrib.MuonDimensionNumbers(axes[-2:-1], axes[-1:]))
    return jax.tree.unflatten(jax.tree.structure(params), dimensions)


def schedule_free(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    weight_power: float = 2.0,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: DType = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.schedule_free_adamw` with a mask; evaluate at `evaluation_params`, not at the parameters.

    Meant for a constant rate after a warmup (`schedules.constant`); b1 must be above 0 (Defazio et al., 2024,
    https://arxiv.org/abs/2405.15682).

    >>> import jax.numpy as jnp
    >>> update, _ = schedule_free(0.5).update(jnp.ones(()), schedule_free(0.5).init(jnp.ones(())), jnp.ones(()))
    >>> print(f"{update:.4f}")
    -0.5000
    """
    check_constants(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, weight_power=weight_power)
    if not isinstance(b1, jax.core.Tracer) and b1 == 0:
        raise ValueError("b1 = 0 must be above 0: the average is the parameters' share b1, try 0.9")

    def make(rate: jax.Array) -> optax.GradientTransformation:
        adam_without_momentum = optax.chain(
            optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
            add_decayed_weights(weight_decay, mask, layer_axis),
            scale_by_parameter(-rate),
        )
        return contrib.schedule_free(adam_without_momentum, rate, b1=b1, weight_lr_power=weight_power)

    return in_float32(with_learning_rate(make, learning_rate), moment_dtype=moment_dtype)


def prodigy(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    initial_rate: float = 1e-6,
    rate_coefficient: float = 1.0,
    safeguard_warmup: bool = False,
    moment_dtype: DType = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.prodigy`: Adam that finds its own rate; `learning_rate` is a multiplier with a peak of 1.

    Everything decays alike: the rule has no mask. Keep `safeguard_warmup` on with a warmup (Mishchenko and Defazio,
    2023, https://arxiv.org/abs/2306.06101). Steps before the first gradient at a rate above 0 change nothing: the
    estimate of the rate is a quotient of sums over them, 0 / 0 in optax.

    >>> import jax.numpy as jnp
    >>> print(prodigy().update(jnp.ones(1), prodigy().init(jnp.ones(1)), jnp.ones(1))[0].shape)
    (1,)
    """
    check_constants(
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        initial_rate=initial_rate,
        rate_coefficient=rate_coefficient,
    )

    def make(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
        rule = contrib.prodigy(
            rate,
            betas=(b1, b2),
            eps=eps,
            estim_lr0=initial_rate,
            estim_lr_coef=rate_coefficient,
            weight_decay=weight_decay,
            safeguard_warmup=safeguard_warmup,
        )

        def update(
            updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: object
        ) -> tuple[optax.Updates, optax.OptState]:
            moved, after = rule.update(updates, state, params, **extra_args)
            known = optax.tree.norm(after.grad_sum, ord=1) != 0  # the estimate's denominator
            moved = jax.tree.map(lambda u: jnp.where(known, u, 0), moved)
            return moved, jax.tree.map(lambda new, old: jnp.where(known, new, old), after, state)

        return optax.GradientTransformationExtraArgs(rule.init, update)

    return in_float32(with_learning_rate(make, learning_rate), moment_dtype=moment_dtype)


def sophia(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.965,
    b2: float = 0.99,
    eps: float = 1e-8,
    gamma: float = 0.01,
    clip_threshold: float = 1.0,
    update_interval: int = 10,
    weight_decay: float = 0.1,
    seed: int = 0,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: DType = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.sophia` with Hutchinson's estimate of the Hessian's diagonal (Liu et al., 2023).

    `update` needs the extra argument `obj_fn`, the batch's loss as a function of the parameters alone
    (https://arxiv.org/abs/2305.14342).

    >>> import jax.numpy as jnp
    >>> params = jnp.ones(2)
    >>> print(sophia(0.5).update(params, sophia(0.5).init(params), params, obj_fn=lambda w: w @ w / 2)[0])
    [-0.5 -0.5]
    """
    check_constants(
        b1=b1,
        b2=b2,
        eps=eps,
        gamma=gamma,
        clip_threshold=clip_threshold,
        update_interval=update_interval,
        weight_decay=weight_decay,
    )
    return in_float32(
        with_learning_rate(
            lambda rate: contrib.sophia(
                rate,
                b1=b1,
                b2=b2,
                eps=eps,
                weight_decay=weight_decay,
                weight_decay_mask=as_mask(mask, layer_axis),
                gamma=gamma,
                clip_threshold=clip_threshold,
                update_interval=update_interval,
                hessian_diagonal_fn=contrib.hutchinson_estimator_diag_hessian(jax.random.PRNGKey(seed)),
            ),
            learning_rate,
        ),
        moment_dtype=moment_dtype,
    )
