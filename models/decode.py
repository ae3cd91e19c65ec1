"""Decoding with a cache of keys and values: each token is computed once."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from crescendo.models.config import ModelConfig
from crescendo.models.layers import rotary
from crescendo.models.layout import ONE_DEVICE
from crescendo.models.transformer import apply, through_blocks
from crescendo.pallas_kernels import attention

Cache = dict[str, jax.Array]


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """Room for `length` tokens of each row: `keys` and `values`, `[L, B, length, K, E]` in the compute dtype.

    >>> config = ModelConfig.preset("debug").for_platform("cpu")
    >>> empty_cache(config, batch=2, length=16)["keys"].shape
    (3, 2, 16, 2, 32)
    """
    shape = (config.layers, batch, length, config.kv_heads, config.head_size)
    return {name: jnp.zeros(shape, config.dtype) for name in ("keys", "values")}


def decode(config: ModelConfig, parameters: dict, tokens_BT, begin, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits after each of some tokens, which go behind the `begin` ones that the cache has seen.

    What the cache holds past `begin` is overwritten or not looked at, so a prompt may be padded at its end and
    decoding may go on from its true length. It must be finite: kernels of attention multiply by 0 what they don't see.

    Args:
      config: `dtype` and `scan_layers` decided.
      parameters: as `initialize` makes them.
      tokens_BT: int32 `[B, T]`, one document a row.
      begin: int32 scalar, how many tokens are in the cache.
      cache: see `empty_cache`; its length must be at least `begin + T`.

    Returns:
      Logits, float32 `[B, T, V]`, and the cache with the tokens' keys and values.

    >>> from crescendo.models import initialize
    >>> config = ModelConfig.preset("debug").for_platform("cpu")
    >>> parameters = initialize(config, jax.random.key(0))
    >>> logits, cache = decode(config, parameters, jnp.zeros((1, 4), jnp.int32), 0, empty_cache(config, 1, 8))
    >>> logits.shape
    (1, 4, 384)
    """
    # A recipe would quantise every weight anew for each token, which takes longer than multiplying by it.
    # And a token alone has no row whose room at an expert it could share.
    model = apply(dataclasses.replace(config, matmul="dtype", expert_capacity=None), parameters)
    batch, length = tokens_BT.shape
    positions_BT = jnp.broadcast_to(begin + jnp.arange(length, dtype=jnp.int32), (batch, length))

    def attend(q_BTHE, k_BTKE, v_BTKE, cache, number):
        written, of_layer = {}, []
        for name, new in (("keys", k_BTKE), ("values", v_BTKE)):
            written[name] = jax.lax.dynamic_update_slice(cache[name], new[None], (number, 0, begin, 0, 0))
            of_layer.append(jax.lax.dynamic_index_in_dim(written[name], number, keepdims=False))
        # Causal by position: what lies in the cache past a token is after it.
        return attention(q_BTHE, *of_layer, causal=True, positions=begin), written

    stream, cache, _ = through_blocks(
        model.blocks,
        dataclasses.replace(model.config, scan_layers=True, remat="none"),
        model.enter(tokens_BT),
        attend,
        *rotary(positions_BT, config.head_size, config.rope_theta),
        implementation=None,
        layout=ONE_DEVICE,
        shared=model.shared_block,
        state=dict(cache),
    )
    hidden_BTD = model.leave(stream)
    table_VD = model.output_table().astype(hidden_BTD.dtype)
    logits = jnp.einsum("btd,vd->btv", hidden_BTD, table_VD, preferred_element_type=jnp.float32)
    if config.logit_soft_cap is not None:
        logits = config.logit_soft_cap * jnp.tanh(logits / config.logit_soft_cap)
    return logits, cache


def sample(logits_BV, key, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> jax.Array:
    """A token a row, int32 `[B]`, from the distribution of some logits `[B, V]`.

    Args:
      logits_BV: float32.
      key: a random key.
      temperature: divides the logits; 0 takes the greatest, of equal ones the first.
      top_k: only the k greatest can be taken; of equal ones the first.
      top_p: only the fewest tokens whose probabilities reach this sum (Holtzman et al. 2020), likewise.

    Raises:
      ValueError: an option out of its range.

    >>> print(sample(jnp.array([[0.0, 2.0, 1.0]]), jax.random.key(0), temperature=0.0))
    [1]
    """
    check_sampling(temperature, top_k, top_p)
    if temperature < jnp.finfo(logits_BV.dtype).tiny:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # From the greatest on, so that however low the temperature nothing becomes infinite that isn't lost anyway.
    logits = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature

    def only(tokens, values):
        """The logits of these tokens alone."""
        return jnp.put_along_axis(jnp.full_like(logits, -jnp.inf), tokens, values, axis=-1, inplace=False)

    if top_k is not None and top_k < logits.shape[-1]:
        values, tokens = jax.lax.top_k(logits, top_k)
        logits = only(tokens, values)
    if top_p < 1:
        order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
        ordered = jnp.take_along_axis(logits, order, axis=-1)
        shares = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares  # of all that are likelier; 0 for the likeliest, which stays
        logits = only(order, jnp.where(before < top_p, ordered, -jnp.inf))
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def check_sampling(temperature: float, top_k: int | None, top_p: float) -> None:
    """Raises ValueError for an option of `sample` out of its range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature = {temperature} must be at least 0 and finite")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k} must be at least 1")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} must be above 0 and at most 1: for the likeliest token use temperature 0")
