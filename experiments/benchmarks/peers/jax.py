"""A decoder in plain JAX and optax: layers unrolled, cuDNN's attention, the cross-entropy by chunks of rows."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crescendo.experiments.benchmarks.peers import Prepared
from crescendo.models import ModelConfig

PACKAGES = ("jax", "optax")
INSTALL = "pip install crescendo"

CHUNK_TOKENS = 4096
"""Of which logits exist at a time, at most."""


def initialize(model: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters: matrices that multiply from the right, one dict of them a layer."""
    D, E, F = model.width, model.head_size, model.mlp_width
    shapes = {
        "query": (D, model.heads * E),
        "key": (D, model.kv_heads * E),
        "value": (D, model.kv_heads * E),
        "output": (model.heads * E, D),
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
    }

    def layer(key):
        keys = jax.random.split(key, len(shapes))
        drawn = {
            name: jax.random.normal(k, s) * s[0] ** -0.5 for k, (name, s) in zip(keys, shapes.items(), strict=True)
        }
        return drawn | {"attention_norm": jnp.ones(D), "mlp_norm": jnp.ones(D)}

    first, second, *rest = jax.random.split(key, 2 + model.layers)
    table = {"embedding": 0.02 * jax.random.normal(first, (model.vocab_size, D))}
    if not model.tied_head:
        table["head"] = 0.02 * jax.random.normal(second, (model.vocab_size, D))
    return table | {"final_norm": jnp.ones(D), "layers": [layer(key) for key in rest]}


def mean_loss(model: ModelConfig, parameters: Mapping[str, Any], tokens_BT, labels_BT) -> jax.Array:
    """The mean cross-entropy of the labels in nats, float32; matmuls in the model's dtype, a document a row."""
    dtype = jnp.dtype(model.dtype)
    B, T = tokens_BT.shape
    frequency = model.rope_theta ** (-jnp.arange(0, model.head_size, 2, dtype=jnp.float32) / model.head_size)
    angle = jnp.arange(T)[:, None] * frequency
    cosine, sine = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]

    def norm(x, scale):
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + model.norm_epsilon) * scale).astype(dtype)

    def turn(x):
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1).astype(dtype)

    def times(x, matrix):
        return x @ matrix.astype(dtype)

    def block(x_BTD, layer):
        y_BTD = norm(x_BTD, layer["attention_norm"])
        q, k, v = (times(y_BTD, layer[name]).reshape(B, T, -1, model.head_size) for name in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(
            turn(q), turn(k), v, is_causal=True, implementation="cudnn" if dtype == jnp.bfloat16 else "xla"
        )
        x_BTD = x_BTD + times(mixed.reshape(B, T, -1), layer["output"])
        y_BTD = norm(x_BTD, layer["mlp_norm"])
        return x_BTD + times(jax.nn.silu(times(y_BTD, layer["gate"])) * times(y_BTD, layer["up"]), layer["down"])

    x_BTD = parameters["embedding"][tokens_BT].astype(dtype)  # in this order its gradient adds up in float32
    for layer in parameters["layers"]:
        x_BTD = block(x_BTD, layer)
    hidden_ND = norm(x_BTD, parameters["final_norm"]).reshape(B * T, -1)
    return cross_entropy(hidden_ND, parameters.get("head", parameters["embedding"]), labels_BT.reshape(-1))


@jax.custom_vjp
def cross_entropy(hidden_ND, table_VD, labels_N) -> jax.Array:
    """The mean of `log sum_v exp(logit_v) - logit_label` with logits `hidden table^T`, of some rows at a time."""
    return _with_gradients(hidden_ND, table_VD, labels_N)[0]


def _with_gradients(hidden_ND, table_VD, labels_N):
    """The loss, and its gradients, which are made while a chunk's logits are there."""
    N, D = hidden_ND.shape
    table = table_VD.astype(hidden_ND.dtype)
    chunk = math.gcd(N, CHUNK_TOKENS)

    def add(so_far, rows):
        total, table_gradient = so_far
        hidden, labels = rows
        logits = jnp.einsum("nd,vd->nv", hidden, table, preferred_element_type=jnp.float32)
        log_sum = jax.nn.logsumexp(logits, -1, keepdims=True)
        total += jnp.sum(log_sum[:, 0] - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0])
        is_label = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1) == labels[:, None]
        of_logits = ((jnp.exp(logits - log_sum) - is_label) / N).astype(hidden.dtype)
        table_gradient += jnp.einsum("nv,nd->vd", of_logits, hidden, preferred_element_type=jnp.float32)
        return (total, table_gradient), of_logits @ table

    zero = jnp.float32(0), jnp.zeros(table.shape, jnp.float32)
    chunks = hidden_ND.reshape(-1, chunk, D), labels_N.reshape(-1, chunk)
    (total, of_table), of_hidden = jax.lax.scan(add, zero, chunks)
    return total / N, (of_hidden.reshape(N, D), of_table)


def _backward(gradients, of_loss):
    of_hidden, of_table = gradients
    return (of_hidden * of_loss).astype(of_hidden.dtype), of_table * of_loss, None


cross_entropy.defvjp(_with_gradients, _backward)


def prepare(model: ModelConfig, rows: Mapping[str, np.ndarray]) -> Prepared:
    """Float32 parameters and AdamW's moments, matmuls in the model's dtype, on the first device.

    Args:
      model: the decoder's shape, decided for the platform; queries and keys are not normalised.
      rows: `tokens` and `labels`, int32 `[B, T]`, a document a row.
    """
    optimizer = optax.adamw(3e-4)
    tokens, labels = (jnp.asarray(rows[name]) for name in ("tokens", "labels"))
    parameters = jax.jit(functools.partial(initialize, model))(jax.random.key(0))
    state = parameters, jax.jit(optimizer.init)(parameters)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, tokens_BT, labels_BT):
        parameters, moments = state
        loss, gradient = jax.value_and_grad(functools.partial(mean_loss, model))(parameters, tokens_BT, labels_BT)
        updates, moments = optimizer.update(gradient, moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), loss

    def step():
        nonlocal state
        state, loss = update(state, tokens, labels)
        return loss

    device = jax.devices()[0]
    return Prepared(
        device.device_kind,
        sum(x.size for x in jax.tree.leaves(parameters)),
        step,
        float,
        lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"),
    )
