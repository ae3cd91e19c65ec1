"""What the backward pass keeps of the forward pass, counted before anything runs."""

import collections
import math

import jax

from crescendo import parallel
from crescendo.experiments.tasks.base import Context
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.shapes import abstract_batch


def activation_bytes(session: Session, plan: parallel.BatchPlan) -> float:
    """Bytes of a microbatch's activations on a device: the residuals of the loss's derivative, parameters left out.

    They are those of the traced program; the compiler may keep fewer, and needs working memory besides. Over a mesh
    they are taken to be split evenly over the axes that split rows or tokens.

    Args:
      session: what trains, on devices that need not be there.
      plan: how batches are cut.
    """
    task, layout, trainable = session.task, session.layout, session.trainable
    batch = abstract_batch(task, layout, plan)
    rows = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch["rows"].items()}

    def residuals(parameters, rows):
        context = Context(implementation="xla")  # as every device can trace it
        trained = trainable.take(parameters)
        return jax.vjp(lambda some: task.loss(trainable.put(some, parameters), rows, context).sum, trained)[1]

    kept = jax.eval_shape(residuals, session.parameters, rows)
    counts = collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(kept))
    counts -= collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(session.parameters))
    total = sum(count * math.prod(shape) * dtype.itemsize for (shape, dtype), count in counts.items())
    return total / (layout.batch_shards * layout.sizes["sequence"] * layout.sizes["tensor"])
