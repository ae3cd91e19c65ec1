"""The loss on held-out rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crescendo import parallel
from crescendo.experiments.data import Rows, Stream
from crescendo.experiments.feed import put_rows
from crescendo.models import ModelConfig
from crescendo.models.loss import next_token_loss


def make_evaluation(
    config: ModelConfig,
    rows: Rows,
    layout: parallel.Layout,
    parameters: Any,
    *,
    evaluation_examples: int,
    microbatch_examples: int,
) -> Callable[[dict], float]:
    """`parameters -> nats a token` over a sample of `evaluation_examples` rows: always the same ones.

    Args:
      config: of the model.
      rows: held-out rows; all of them where there are fewer.
      layout: as the training's.
      parameters: shapes, dtypes and shardings of the parameters.
      evaluation_examples: how many rows.
      microbatch_examples: how many at a time; the last group is filled up with padding.
    """
    count = min(evaluation_examples, len(rows))
    groups = -(-count // microbatch_examples)
    stream = Stream(rows, seed=0)

    def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
        used = numbers[numbers < count]
        return {name: np.pad(x, ((0, len(numbers) - len(used)), (0, 0))) for name, x in stream.take(used).items()}

    batch = put_rows(layout, (groups, microbatch_examples, rows.sequence_length), read)

    def total(parameters, batch):
        def one(carry, rows):
            loss_sum, weight = next_token_loss(config, parameters, rows, layout=layout)
            return (carry[0] + loss_sum, carry[1] + weight), None

        (loss_sum, weight), _ = jax.lax.scan(one, (jnp.float32(0), jnp.float32(0)), batch)
        return loss_sum / weight

    # Compiled here, so that nothing compiles while the loop runs.
    compiled = jax.jit(total, out_shardings=layout.replicated).lower(parameters, batch).compile()
    return lambda parameters: float(jax.device_get(compiled(parameters, batch)))
