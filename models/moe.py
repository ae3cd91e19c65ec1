r"""Layers with experts: of many feed-forward parts each token goes to a few, which a router chooses for it.

With x a token, X experts and k of them for each token (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538),

.. math::

  y = \sum_{e \in S(x)} w_e(x) \, \text{SwiGLU}_e(x), \qquad S(x) = \text{top}_k(p + b), \qquad
  w_e = p_e \Big/ \sum_{f \in S(x)} p_f, \qquad p = \text{softmax}(x W) \text{ or } \sigma(x W),

where with k = 1 the weight is :math:`p_e` itself (Fedus et al. 2022, https://arxiv.org/abs/2101.03961), since else the
router would learn nothing. The bias b, which only chooses, is 0 unless it balances. Router and weights are in float32.

No token is dropped unless a capacity says so: rows are put in the order of their experts, and multiplied group by group
(`crescendo.pallas_kernels.grouped_matmul`), however many there are in each; in the compute dtype, whatever recipe the
linear layers have. What keeps the loads even is taken of each
row of a batch by itself, so that a loss does not depend on how rows are grouped: with :math:`f_e` the share of a row's
choices that fall on expert e and :math:`P_e` the mean of its shares,

.. math::

  L_\text{balance} = X \sum_e f_e P_e, \qquad L_z = \overline{\log^2 \sum_e \exp(x W)_e}

(ST-MoE, Zoph et al. 2022, https://arxiv.org/abs/2202.08906). Balanced by a bias (Wang et al. 2024,
https://arxiv.org/abs/2408.15664) the first one has no part in the loss, and the bias has the gradient
:math:`f_e - 1 / X`: it is a parameter like others, whose optimizer lowers it for experts that are chosen too often.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from crescendo.models import axes
from crescendo.models.config import ModelConfig
from crescendo.models.layers import Linear, parameter
from crescendo.models.layout import HERE, Exchange, Layout
from crescendo.models.mlp import Mlp
from crescendo.pallas_kernels import grouped_matmul, swiglu

Routing = dict[str, jax.Array]
"""What is known of a layer's routing, float32: of each row `[B]`, of its experts `[B, X]`; or sums of it over rows."""

TOLD = ("balance_loss", "router_z_loss", "router_entropy", "dropped_share")
"""What training records have, as means over layers and tokens."""


class Moe(nnx.Module):
    """A router, experts, and where the configuration has one an expert besides that every token goes to."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        assert config.experts is not None
        experts, width, inner = config.experts, config.width, config.expert_size
        names, down = (axes.EXPERTS, axes.EMBED, axes.MLP), (axes.EXPERTS, axes.MLP, axes.EMBED)
        # Small, so that at first all experts have nearly equal shares (Fedus et al. 2022).
        self.router = Linear((width,), (experts,), (axes.EMBED, axes.ROUTES), dtype=jnp.float32, rngs=rngs, scale=0.1)
        if config.balance == "bias":
            self.bias = nnx.Param(jnp.zeros(experts), axes=(axes.ROUTES,))
        self.gate = parameter(rngs, (experts, width, inner), names, width**-0.5)
        self.up = parameter(rngs, (experts, width, inner), names, width**-0.5)
        self.down = parameter(rngs, (experts, inner, width), down, (2 * config.layers * inner) ** -0.5)
        if config.shared_expert_width is not None:
            self.shared = Mlp(config, config.shared_expert_width, dtype=dtype, rngs=rngs)
        self.config, self.experts, self.dtype = config, experts, dtype

    def __call__(self, x_BTD, layout: Layout, *, counted_BT=None, implementation: str | None = None):
        """What the experts add to the residual stream, and the layer's `Routing`.

        Args:
          x_BTD: the normalised stream.
          layout: how arrays lie over devices.
          counted_BT: bool, which tokens are no padding: others go to no expert; None: all.
          implementation: of the products.
        """
        counted_BT = jnp.ones(x_BTD.shape[:2], bool) if counted_BT is None else counted_BT
        with jax.named_scope("routing"):
            chosen_BTC, weights_BTC, routing = self._route(x_BTD, counted_BT, layout)
        gate_up = jnp.stack([self.gate[...].astype(self.dtype), self.up[...].astype(self.dtype)], axis=-2)
        kernels = gate_up, self.down[...].astype(self.dtype)
        most = self.config.expert_rows(x_BTD.shape[1])
        y_BTD = layout.experts(
            functools.partial(through_experts, most_of_row=most, implementation=implementation),
            (x_BTD, chosen_BTC, weights_BTC),
            kernels,
            ((axes.EXPERTS, axes.EMBED, None, axes.MLP), (axes.EXPERTS, axes.MLP, axes.EMBED)),
        )
        if self.config.shared_expert_width is not None:
            all_BTD = layout.constrain(x_BTD, axes.TAKEN_IN)
            y_BTD = y_BTD + layout.constrain(self.shared(all_BTD, layout, implementation=implementation), axes.RESIDUAL)
        return y_BTD, routing

    def _route(self, x_BTD, counted_BT, layout: Layout):
        """`(chosen int32 [B, T, k], X where none is; weights [B, T, k]; Routing)`."""
        config = self.config
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        kernel = layout.weight(self.router.kernel[...].astype(wide), self.router.axes)
        logits_BTX = jnp.tensordot(x_BTD.astype(wide), kernel, axes=1, precision="highest")
        logits_BTX = layout.constrain(logits_BTX, axes.RESIDUAL)
        shares_BTX = jax.nn.softmax(logits_BTX) if config.router == "softmax" else jax.nn.sigmoid(logits_BTX)
        bias = self.bias[...] if config.balance == "bias" else 0
        _, chosen_BTC = jax.lax.top_k(jax.lax.stop_gradient(shares_BTX + bias), config.experts_per_token)
        picked_BTCX = chosen_BTC[..., None] == jnp.arange(self.experts)
        weights_BTC = jnp.sum(jnp.where(picked_BTCX, shares_BTX[..., None, :], 0), axis=-1)
        if config.experts_per_token > 1:
            weights_BTC = weights_BTC / jnp.sum(weights_BTC, axis=-1, keepdims=True)
        most = config.expert_rows(x_BTD.shape[1])
        kept_BTC = counted_BT[..., None] & _within(picked_BTCX & counted_BT[..., None, None], most)
        chosen_BTC = jnp.where(kept_BTC, chosen_BTC, self.experts)
        routing = self._told(logits_BTX, shares_BTX, picked_BTCX, kept_BTC, counted_BT)
        return chosen_BTC, jnp.where(kept_BTC, weights_BTC, 0), routing

    def _told(self, logits_BTX, shares_BTX, picked_BTCX, kept_BTC, counted_BT) -> Routing:
        """Means over each row's tokens."""
        config, counted = self.config, counted_BT.astype(logits_BTX.dtype)
        tokens_B = jnp.maximum(jnp.sum(counted, axis=1), 1)

        def mean(x_BT):
            return jnp.einsum("bt,bt...->b...", counted, x_BT) / tokens_B.reshape(-1, *(1,) * (x_BT.ndim - 2))

        parts_BTX = shares_BTX / jnp.sum(shares_BTX, axis=-1, keepdims=True)
        load_BX = mean(jnp.mean(picked_BTCX, axis=2, dtype=counted.dtype))
        logarithms_BTX = jnp.log(jnp.maximum(parts_BTX, jnp.finfo(parts_BTX.dtype).tiny))
        routing = {
            "balance_loss": self.experts * jnp.sum(load_BX * mean(parts_BTX), axis=-1),
            "router_z_loss": mean(jnp.square(jax.nn.logsumexp(logits_BTX, axis=-1))),
            "router_entropy": -mean(jnp.sum(parts_BTX * logarithms_BTX, axis=-1)),
            "dropped_share": mean(1 - jnp.mean(kept_BTC, axis=2, dtype=counted.dtype)),
            "expert_load": load_BX,
        }
        if config.balance == "bias":
            # Worth 0, and its gradient is that of the product.
            product_B = jnp.sum(self.bias[...] * jax.lax.stop_gradient(load_BX - 1 / self.experts), axis=-1)
            routing["balance_bias"] = product_B - jax.lax.stop_gradient(product_B)
        return routing


def _within(picked_BTCX, most: int | None):
    """Which choices an expert has room for, bool `[B, T, k]`: the first `most` of a row's, token by token."""
    if most is None:
        return jnp.ones(picked_BTCX.shape[:3], bool)
    rows, length, choices, experts = picked_BTCX.shape
    taken = jnp.cumsum(picked_BTCX.reshape(rows, length * choices, experts), axis=1, dtype=jnp.int32)
    return jnp.any(picked_BTCX & (taken.reshape(picked_BTCX.shape) <= most), axis=-1)


def through_experts(
    x_BTD,
    chosen_BTC,
    weights_BTC,
    gate_up_XD2F,
    down_XFD,
    *,
    exchange: Exchange = HERE,
    most_of_row: int | None = None,
    implementation: str | None = None,
):
    """The weighted sums of what each token's experts make of it, `[B, T, D]` in x's dtype.

    Args:
      x_BTD: the tokens.
      chosen_BTC: int32, their experts; one that there isn't adds nothing.
      weights_BTC: float32.
      gate_up_XD2F, down_XFD: the experts' matrices, in x's dtype.
      exchange: brings rows to the device that has their experts, and back.
      most_of_row: how many of a row's tokens an expert has at most; None: all.
      implementation: of the products; "reference" is that of the permutation too.

    >>> x, one = jnp.ones((1, 2, 4)), jnp.ones((1, 2, 1))
    >>> y = through_experts(x, jnp.array([[[1], [2]]]), one, jnp.ones((2, 4, 2, 3)), jnp.ones((2, 3, 4)))
    >>> print(y[0, :, 0].round())  # the second token has no expert
    [47.  0.]
    """
    width, choices, plain = x_BTD.shape[-1], chosen_BTC.shape[-1], implementation == "reference"
    parts, chosen, weights = (cut(array, exchange.chunks) for array in (x_BTD, chosen_BTC, weights_BTC))
    experts_X = jnp.arange(len(gate_up_XD2F) * exchange.devices)
    rows, sizes, orders = [], [], []
    with jax.named_scope("permutation"):
        for part_BTD, part_BTC in zip(parts, chosen, strict=True):
            chosen_M = part_BTC.reshape(-1)
            order_M = jnp.argsort(chosen_M, stable=True)
            inverse_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(order_M.size), unique_indices=True)
            sizes.append(jnp.sum(chosen_M[:, None] == experts_X, axis=0, dtype=jnp.int32))
            rows.append((_take if plain else _to_experts)(part_BTD.reshape(-1, width), order_M, inverse_M, choices))
            orders.append((order_M, inverse_M))

    def of_experts(rows_MD, sizes_X):
        product = functools.partial(grouped_matmul, implementation=implementation)
        inner_M2F = product(rows_MD, gate_up_XD2F.reshape(*gate_up_XD2F.shape[:2], -1), sizes_X)
        inner_M2F = inner_M2F.reshape(len(rows_MD), *gate_up_XD2F.shape[2:])
        return product(swiglu(inner_M2F, implementation=implementation), down_XFD, sizes_X)

    def together(rows_MD, order_M, inverse_M, weights_BTC):
        """The sums over a token's experts, of products rounded to the dtype, as those of a dense layer are."""
        rows_MD = rows_MD[inverse_M] if plain else _from_experts(rows_MD, order_M, inverse_M)
        y_BTD = jnp.sum(rows_MD.reshape(*weights_BTC.shape, width) * weights_BTC[..., None], axis=-2)
        return y_BTD.astype(x_BTD.dtype)

    made = exchange(of_experts, rows, sizes, most_of_row and len(parts[0]) * most_of_row)
    with jax.named_scope("permutation"):
        sums = [together(rows_MD, *order, each) for rows_MD, order, each in zip(made, orders, weights, strict=True)]
        return jnp.concatenate(sums).reshape(x_BTD.shape)


def cut(x_BT, chunks: int) -> list[jax.Array]:
    """Equal parts of the tokens, in their order: rows, and parts of rows where there are too few rows.

    A part has as few rows as can be: what an expert takes of each bounds what it takes of the part.

    >>> [x.shape for x in cut(jnp.zeros((6, 8)), 2)], [x.shape for x in cut(jnp.zeros((2, 8)), 4)]
    ([(3, 8), (3, 8)], [(1, 4), (1, 4), (1, 4), (1, 4)])
    """
    rows, length = x_BT.shape[:2]
    pieces = chunks // math.gcd(rows, chunks)  # of a row
    return jnp.split(x_BT.reshape(rows * pieces, length // pieces, *x_BT.shape[2:]), chunks)


def _take(x_ND, order_M, inverse_M, choices: int):
    del inverse_M
    return x_ND[order_M // choices]


# Rows are gathered backward too: the transpose of a gather would add them up one by one.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _to_experts(x_ND, order_M, inverse_M, choices: int):
    """Each token once for each of its choices, in their order."""
    return _take(x_ND, order_M, inverse_M, choices)


def _to_experts_backward(choices: int, inverse_M, g_MD):
    g_NCD = g_MD[inverse_M].reshape(-1, choices, g_MD.shape[-1])
    wide = jnp.promote_types(g_MD.dtype, jnp.float32)
    return jnp.sum(g_NCD, axis=1, dtype=wide).astype(g_MD.dtype), None, None


_to_experts.defvjp(
    lambda x_ND, order_M, inverse_M, choices: (_to_experts(x_ND, order_M, inverse_M, choices), inverse_M),
    _to_experts_backward,
)


@jax.custom_vjp
def _from_experts(y_MD, order_M, inverse_M):
    """The rows in the order of the tokens."""
    del order_M
    return y_MD[inverse_M]


_from_experts.defvjp(
    lambda y_MD, order_M, inverse_M: (y_MD[inverse_M], order_M), lambda order_M, g_MD: (g_MD[order_M], None, None)
)


def over_rows(routing: Routing, weights_B) -> Routing:
    """The sums over rows `[layers, ...]` of what layers say of them, `[layers, B, ...]`, by the rows' weights.

    And `weight`, `[layers]`: the sum of these.
    """
    sums = {name: jnp.einsum("lb...,b->l...", x, weights_B) for name, x in routing.items()}
    return sums | {"weight": jnp.full(len(routing["expert_load"]), jnp.sum(weights_B))}


def training_terms(config: ModelConfig, routing: Routing, weight) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What sums of routing add to the training loss, and what of it is told: sums over the loss's weight.

    A layer's terms are added up over layers. What is told are means over layers and the rows that they had: where
    stages are skipped, a layer has some of them.

    Args:
      config: the coefficients.
      routing: of the batch, see `over_rows`.
      weight: of the loss.
    """
    balance = routing["balance_loss" if config.balance == "loss" else "balance_bias"]
    terms = config.balance_loss * jnp.sum(balance) + config.router_z_loss * jnp.sum(routing["router_z_loss"])
    of_layers = jnp.sum(routing["weight"])
    share = weight / jnp.where(of_layers == 0, 1, of_layers)
    return terms, {name: share * jnp.sum(routing[name]) for name in TOLD}


def scores(routing: Routing, weight) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What is told of held-out rows, as sums with their weights: the loads of all experts too, by layer and expert."""
    told = {name: (jnp.mean(routing[name]), weight) for name in ("balance_loss", "router_entropy", "dropped_share")}
    loads = routing["expert_load"]
    return told | {load_name(i, j): (loads[i, j], weight) for i in range(len(loads)) for j in range(loads.shape[1])}


def load_name(layer: int, expert: int) -> str:
    """What the share of a layer's choices is called that falls on an expert.

    >>> load_name(0, 3)
    'expert_load_0_3'
    """
    return f"expert_load_{layer}_{expert}"
