"""Continuing a text with a trained model: tokens, and the text that they add."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from crescendo.experiments.runs.trained import Trained
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.models import ModelConfig
from crescendo.models.decode import Cache, check_sampling, decode, empty_cache, sample

# Prompts and caches are rounded up to so many tokens, so that texts of like lengths share compiled programs.
BUCKET = 64


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _read_prompt(config: ModelConfig, parameters: dict, tokens_BT, last, cache: Cache):
    """Logits after the prompt's last token, and the cache."""
    logits, cache = decode(config, parameters, tokens_BT, 0, cache)
    return jax.lax.dynamic_index_in_dim(logits, last, axis=1, keepdims=False), cache


@functools.partial(
    jax.jit, static_argnames=("config", "temperature", "top_k", "top_p"), donate_argnames=("cache", "logits_BV")
)
def _next(config: ModelConfig, parameters: dict, logits_BV, place, cache: Cache, key, temperature, top_k, top_p):
    """A token drawn from the logits, the logits after it, and the cache."""
    token_B = sample(logits_BV, jax.random.fold_in(key, place), temperature=temperature, top_k=top_k, top_p=top_p)
    logits, cache = decode(config, parameters, token_B[:, None], place, cache)
    return token_B, logits[:, 0], cache


def generate(
    model: Trained,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens that follow a prompt, one at a time, until the text ends or there are `tokens` of them.

    Args:
      model: see `crescendo.experiments.runs.trained.load`.
      prompt: the text so far; it is read as a document's begin.
      tokens: at most so many.
      temperature, top_k, top_p: see `crescendo.models.decode.sample`.
      seed: of the draws.

    Raises:
      UserError: for a value out of its range.
    """
    if tokens < 1:
        raise UserError(f"--tokens {tokens} must be at least 1")
    with user_values():
        check_sampling(temperature, top_k, top_p)
    end = model.tokenizer.end_of_text
    read = np.concatenate([[end], model.tokenizer.encode(prompt)]).astype(np.int32)
    if read.max() >= model.config.vocab_size:
        place, rows = int(read.argmax()), model.config.vocab_size
        what = f"token {place} of the prompt" if place else "the tokenizer's end of text"
        raise UserError(
            f"{what} is number {read[place]}, and the model's table has {rows} rows: its tokenizer.json has more "
            "tokens than the model; use its own, or another prompt"
        )
    room = -(-(len(read) + tokens) // BUCKET) * BUCKET
    padded = np.zeros((1, -(-len(read) // BUCKET) * BUCKET), np.int32)
    padded[0, : len(read)] = read
    parameters, cache = jax.device_put(model.parameters), empty_cache(model.config, 1, max(room, padded.shape[1]))
    logits, cache = _read_prompt(model.config, parameters, padded, len(read) - 1, cache)
    # Rows of the vocabulary that no token uses are only there to fill the hardware's tiles.
    unused = jnp.where(jnp.arange(logits.shape[-1]) < model.tokenizer.vocab_size, 0.0, -jnp.inf)
    key = jax.random.key(seed)
    for place in range(len(read), len(read) + tokens):
        token_B, logits, cache = _next(
            model.config, parameters, logits + unused, place, cache, key, temperature, top_k, top_p
        )
        token = int(token_B[0])
        if token == end:
            return
        yield token


def stream(model: Trained, prompt: str, tokens: Iterator[int]) -> Iterator[str]:
    """The text that tokens add to a prompt, as it becomes known.

    Some tokenizers write a token by those before it: the first one of a text without its space, say. So all are decoded
    together. What the next token can still change waits for it: a character that lacks bytes, a space before a stop.
    """
    seen = model.tokenizer.encode(prompt).tolist()
    before = model.tokenizer.decode(seen)
    shown = len(before)
    for token in tokens:
        seen.append(token)
        text = model.tokenizer.decode(seen)
        same = next(
            (i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text))
        )
        settled = text[:same].rstrip("\ufffd")
        if len(settled) > shown:
            yield settled[shown:]
            shown = len(settled)
        before = text
    yield before[shown:]
