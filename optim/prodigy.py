"""Prodigy: Adam that estimates its own learning rate."""

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from crescendo.optim.checks import Rate
from crescendo.optim.precision import in_float32
from crescendo.optim.registry import OPTIMIZERS
from crescendo.optim.scaling import with_learning_rate
from crescendo.ranges import Decay, NotNegative, Positive


@OPTIMIZERS
def prodigy(
    learning_rate: Rate = 1.0,
    *,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NotNegative = 1e-8,
    weight_decay: NotNegative = 0.0,
    initial_rate: Positive = 1e-6,
    rate_coefficient: Positive = 1.0,
    safeguard_warmup: bool = False,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.prodigy`: Adam that estimates its own rate; `learning_rate` is a multiplier with a peak of 1.

    Everything decays alike: the rule has no mask. Steps before the first gradient at a rate above 0 change nothing: the
    estimate of the rate is a quotient of sums over them, 0 / 0 in optax.

    Args:
      learning_rate: a multiplier of the estimate or a schedule of it; see `scale_by_learning_rate`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator, times the estimate.
      weight_decay: multiplied by the rate.
      initial_rate: the first estimate.
      rate_coefficient: multiplies the estimate.
      safeguard_warmup: keep a warmup out of the estimate's denominator; on with a warmup.
      moment_dtype: dtype in which the moments are stored; None: the parameters'.

    Raises:
      ValueError: a negative or NaN learning rate, a constant out of its range; at `init`, complex parameters.

    References:
      Mishchenko and Defazio, 2023, `Prodigy: An Expeditiously Adaptive Parameter-Free Learner
      <https://arxiv.org/abs/2306.06101>`_

    >>> import jax.numpy as jnp
    >>> print(prodigy().update(jnp.ones(1), prodigy().init(jnp.ones(1)), jnp.ones(1))[0].shape)
    (1,)
    """

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
            with jax.debug_nans(False):  # 0 / 0 where nothing is known, which is selected away
                moved, after = rule.update(updates, state, params, **extra_args)
            known = optax.tree.norm(after.grad_sum, ord=1) != 0  # the estimate's denominator
            moved = jax.tree.map(lambda u: jnp.where(known, u, 0), moved)
            return moved, jax.tree.map(lambda new, old: jnp.where(known, new, old), after, state)

        return optax.GradientTransformationExtraArgs(rule.init, update)

    # optax squares gradients without a conjugate.
    return in_float32(with_learning_rate(make, learning_rate), moment_dtype=moment_dtype, real="prodigy")
