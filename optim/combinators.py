"""What makes one optimizer of several transforms, in a form that configs can name."""

from collections.abc import Sequence

import optax

from crescendo.optim.registry import COMBINATORS


@COMBINATORS
def chain(transforms: Sequence[optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` of a list: each transform works on the updates of the one before, and gets all extra arguments.

    In gin: `train.optimizer = @chain()` and `chain.transforms = [@record_gradient_norms(), @adamw()]`.

    Args:
      transforms: in order, the first one given the gradients.

    Raises:
      ValueError: no transforms.

    >>> import jax.numpy as jnp
    >>> clipped = chain([optax.clip(1.0), optax.sgd(0.5)])
    >>> print(clipped.update(jnp.array([3.0]), clipped.init(jnp.ones(1)), examples_seen=0)[0])
    [-0.5]
    """
    if not transforms:
        raise ValueError("chain.transforms is empty: name at least one transform")
    return optax.with_extra_args_support(optax.chain(*transforms))
