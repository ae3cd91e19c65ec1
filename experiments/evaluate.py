"""The loss on held-out rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from crescendo import parallel
from crescendo.experiments.data import Rows, Stream
from crescendo.models import ModelConfig
from crescendo.models.loss import next_token_loss


def make_evaluation(
    config: ModelConfig,
    rows: Rows,
    mesh: Mesh,
    parameters: Any,
    *,
    evaluation_examples: int,
    microbatch_examples: int,
) -> Callable[[dict], float]:
    """`parameters -> nats a token` over a sample of `evaluation_examples` rows: always the same ones.

    Args:
      config: of the model.
      rows: held-out rows; all of them where there are fewer.
      mesh: as the training's.
      parameters: shapes, dtypes and shardings of the parameters.
      evaluation_examples: how many rows.
      microbatch_examples: how many at a time; the last group is filled up with padding.
    """
    count = min(evaluation_examples, len(rows))
    groups = -(-count // microbatch_examples)
    padding = groups * microbatch_examples - count

    def cut(x):
        return np.pad(x, ((0, padding), (0, 0))).reshape(groups, microbatch_examples, -1)

    batch = {name: cut(x) for name, x in Stream(rows, seed=0).read(0, count).items()}
    batch = jax.device_put(batch, parallel.batch_sharding(mesh, leading=1))

    constrain = parallel.constrain(mesh)

    def total(parameters, batch):
        def one(carry, rows):
            loss_sum, weight = next_token_loss(config, parameters, rows, constrain=constrain)
            return (carry[0] + loss_sum, carry[1] + weight), None

        (loss_sum, weight), _ = jax.lax.scan(one, (jnp.float32(0), jnp.float32(0)), batch)
        return loss_sum / weight

    # Compiled here, so that nothing compiles while the loop runs.
    compiled = jax.jit(total, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(parameters, batch).compile()
    return lambda parameters: float(jax.device_get(compiled(parameters, batch)))
