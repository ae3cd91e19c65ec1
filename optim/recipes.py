"""Learning rates and batch sizes that papers report, by the batch, the model and the data."""

import math
from typing import NamedTuple

import optax

from crescendo.optim import schedules
from crescendo.optim.run_length import ends_with_the_run


class BertRecipe(NamedTuple):
    """Peak learning rate and warmup (as a fraction of the run) of BERT trained by LAMB."""

    learning_rate: float
    warmup_fraction: float


def bert_recipe(batch_size: int) -> BertRecipe:
    """The "76 minutes" recipe: rate 5e-3 * sqrt(B / 32768), warmup over 0.2 * B / 32768 of the run.

    The paper's table covers 512 to 32,768 examples; there the two formulas are exact.

    Raises:
      ValueError: a batch size that isn't positive, or one so large (163,840) that the warmup fills the run.

    References:
      You et al., 2020, `Large Batch Optimization for Deep Learning <https://arxiv.org/abs/1904.00962>`_, table 4

    >>> bert_recipe(512)
    BertRecipe(learning_rate=0.000625, warmup_fraction=0.003125)
    """
    if not 0 < batch_size < 5 * 32_768:
        raise ValueError(
            f"batch_size must be above 0 and below {5 * 32_768} (where warmup fills the run): {batch_size}"
        )
    ratio = batch_size / 32_768
    return BertRecipe(5e-3 * math.sqrt(ratio), 0.2 * ratio)


@ends_with_the_run
def bert_76_minutes(
    total: float, *, batch_sizes: tuple[int, ...] = (65_536, 32_768), boundaries: tuple[float, ...] | None = None
) -> optax.Schedule:
    """The recipe's schedule: per stage a warmup and a linear decay to 0, each by the stage's batch size.

    By default two stages: 65,536 examples (of 128 tokens) for 9/10 of the run, then 32,768 (of 512), warmed up again.

    Args:
      total: the length of the run, in the caller's count; None: what the loop says.
      batch_sizes: the batch of each stage, in examples.
      boundaries: the counts at which a new stage starts, one fewer than stages; None: 9/10 of `total` for two stages.

    Raises:
      ValueError: boundaries that don't rise within the run, or whose number doesn't fit the stages.

    References:
      You et al., 2020, `Large Batch Optimization for Deep Learning <https://arxiv.org/abs/1904.00962>`_, section 4.1

    >>> schedule = bert_76_minutes(1000)
    >>> print(f"{schedule(360):.5f} {schedule(900):.5f} {schedule(920):.5f}")
    0.00707 0.00000 0.00500
    """
    if boundaries is None:
        boundaries = (0.9 * total,) if len(batch_sizes) == 2 else ()
    edges = (0, *boundaries, total)
    if len(boundaries) != len(batch_sizes) - 1 or list(edges) != sorted(set(edges)):
        raise ValueError(
            f"boundaries {boundaries} don't fit {len(batch_sizes)} stages and total {total}: "
            f"give {len(batch_sizes) - 1}, rising, between 0 and total"
        )
    stages = []
    for batch_size, start, end in zip(batch_sizes, edges, edges[1:], strict=False):
        recipe = bert_recipe(batch_size)
        stages.append(
            schedules.linear(recipe.learning_rate, end - start, warmup=recipe.warmup_fraction * (end - start))
        )
    return optax.join_schedules(stages, list(boundaries))


def step_law(params: float, tokens: float) -> tuple[float, float]:
    """Peak learning rate and batch size for a language model: 1.79 N^-0.713 D^0.307 and 0.58 D^0.571 tokens.

    Args:
      params: N, the parameters without the embeddings.
      tokens: D, the tokens of the run.

    Returns:
      (learning_rate, batch_size_tokens), for AdamW under a cosine that ends at 1e-5.

    Raises:
      ValueError: counts that aren't positive.

    References:
      Li et al., 2025, `Predictable Scale: Part I <https://arxiv.org/abs/2503.04715>`_

    >>> learning_rate, batch_size_tokens = step_law(1e9, 1e11)
    >>> print(f"{learning_rate:.2e} {batch_size_tokens:.2e}")
    1.63e-03 1.11e+06
    """
    if not (0 < params < math.inf and 0 < tokens < math.inf):
        raise ValueError(f"params and tokens must be above 0 and finite, got {params} and {tokens}")
    return 1.79 * params**-0.713 * tokens**0.307, 0.58 * tokens**0.571
