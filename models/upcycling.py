r"""Upcycling: a model with experts that begins as a dense one.

Every expert of a layer is a copy of the dense layer's feed-forward part f, and the router is drawn anew (Komatsuzaki et
al. 2022, https://arxiv.org/abs/2212.05055). The k > 1 weights of a token are normalised over the experts that it goes
to, so whatever the router chooses, the layer computes

.. math::

  \sum_{e \in S(x)} w_e(x) \, f(x) = f(x), \qquad \sum_{e \in S(x)} w_e(x) = 1.

With k = 1 the weight is the expert's share itself, and an expert of another width is no copy: both are refused. A
shared expert begins with a `down` of zeros, so that it adds nothing at first and has a gradient nonetheless. Experts
part as they get different tokens. Where a capacity drops tokens, these miss what f adds, from the first step on.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crescendo.models.config import ModelConfig
from crescendo.models.transformer import initialize

_COPIED = ("gate", "up", "down")


def dense_shapes(config: ModelConfig) -> dict:
    """The parameters of the model without experts that one with them can begin as, by names and shapes."""
    # A recipe, which asks something of widths, may be the later one's alone.
    dense = dataclasses.replace(config, matmul="dtype").without_experts()
    return jax.eval_shape(lambda: initialize(dense, jax.random.key(0)))


def upcycled(config: ModelConfig, parameters: dict, key) -> dict:
    """The parameters of a model with experts that computes what a dense one does.

    Args:
      config: of the model with experts, decided for the platform.
      parameters: of the dense model, named as `dense_shapes` says.
      key: of the router and of a shared expert, which are those that `initialize` draws of it.

    Returns:
      The same arrays, and on the host those of layers: all experts of a layer are views of one copy.

    Raises:
      ValueError: one expert a token, or another width or number of layers than the dense model's.

    >>> config = ModelConfig.preset("debug", experts=8).for_platform("cpu")
    >>> dense = initialize(ModelConfig.preset("debug").for_platform("cpu"), jax.random.key(0))
    >>> upcycled(config, dense, jax.random.key(1))["blocks"]["mlp"]["down"].shape  # [L, X, F, D]
    (3, 8, 384, 128)
    """
    assert config.experts is not None
    every, place = config.moe_every, _place(config)
    blocks = jax.tree.map(np.asarray, parameters[place])
    if config.shared_layers:  # a stack of one
        blocks = jax.tree.map(lambda x: x[None], blocks)
    _check(config, len(parameters["blocks"]["mlp_norm"]["scale"]), blocks["mlp"]["down"]["kernel"].shape[1])
    layers = [jax.tree.map(lambda x, first=first: x[first::every], blocks) for first in range(every)]
    feed_forward = {name: layers[-1]["mlp"][name]["kernel"] for name in _COPIED}
    experts = {
        name: np.broadcast_to(x[:, None], (len(x), config.experts, *x.shape[1:])) for name, x in feed_forward.items()
    }
    # Compiled, so that the experts, which aren't used, are not drawn.
    drawn = jax.device_get(jax.jit(lambda: _drawn(config, key))())
    if config.shared_layers:
        experts = {name: x[0] for name, x in experts.items()}
        return {**parameters, place: parameters[place] | {"mlp": experts | drawn}}
    layers[-1]["mlp"] = experts | drawn
    return {**parameters, "blocks": layers[0] if every == 1 else {f"layer_{i}": x for i, x in enumerate(layers)}}


def _check(config: ModelConfig, layers: int, width: int) -> None:
    if config.experts_per_token == 1:
        raise ValueError(
            "experts_per_token = 1 scales what an expert makes by its share, so that copies of a dense model's "
            "feed-forward parts don't compute the same: use at least 2"
        )
    of_experts = "mlp_width" if config.expert_width is None else "expert_width"
    for name in (of_experts, "mlp_width") if config.moe_every > 1 else (of_experts,):
        if (ours := getattr(config, name)) != width:
            raise ValueError(
                f"{name} = {ours}, but the dense model's feed-forward parts have the width {width}, and only copies of "
                f"them compute the same: set {name} = {width}"
            )
    if config.layers != layers:
        raise ValueError(f"layers = {config.layers}, but the dense model has {layers}: set layers = {layers}")


def _place(config: ModelConfig) -> str:
    """Which part of the parameters has the feed-forward parts."""
    return "shared_block" if config.shared_layers else "blocks"


def _drawn(config: ModelConfig, key) -> dict[str, Any]:
    """What layers with experts have besides these."""
    blocks = initialize(config, key)[_place(config)]
    mlp = (blocks if config.moe_every == 1 else blocks[f"layer_{config.moe_every - 1}"])["mlp"]
    drawn = {name: x for name, x in mlp.items() if name not in _COPIED}
    if "shared" in drawn:
        drawn["shared"] = drawn["shared"] | {"down": jax.tree.map(jnp.zeros_like, drawn["shared"]["down"])}
    return drawn
