"""What the backward pass keeps of the forward pass, counted before anything runs."""

import collections
import contextlib
import math

import jax
import jax.numpy as jnp

from crescendo import parallel
from crescendo.experiments.runtime.hardware import KnownDevice
from crescendo.experiments.tasks.base import Context
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.shapes import abstract_batch
from crescendo.pallas_kernels.op import target


def activation_bytes(session: Session, plan: parallel.BatchPlan, device: KnownDevice | None = None) -> float:
    """Bytes of a microbatch's activations on a device, at most: the residuals of the loss's derivative.

    They are those of the traced program, without the parameters. The compiler computes some of them anew: of 32 rows of
    1,024 tokens in a model of 124 million parameters this counts 21 GiB, where the step compiled for an H100 holds 12.5
    in all. Over a mesh they are taken to be split evenly over the axes that split rows or tokens, and over stages,
    which keep the inputs of the microbatches on their way besides.

    Args:
      session: what trains, on devices that need not be there.
      plan: how batches are cut.
      device: for whose kernels the program is traced; None: the default device's.
    """
    task, layout, trainable = session.task, session.layout, session.trainable
    batch = abstract_batch(task, layout, plan)
    rows = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch["rows"].items()}

    def residuals(parameters, rows):
        trained = trainable.take(parameters)
        return jax.vjp(lambda some: task.loss(trainable.put(some, parameters), rows, Context()).sum, trained)[1]

    with contextlib.nullcontext() if device is None else target(device):
        kept = jax.eval_shape(residuals, session.parameters, rows)
    counts = collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(kept))
    counts -= collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(session.parameters))
    total = sum(count * math.prod(shape) * dtype.itemsize for (shape, dtype), count in counts.items())
    if (schedule := layout.schedule) is not None:
        parts = task.parts(Context())
        assert parts is not None  # or the mesh was refused
        stream, _ = jax.eval_shape(parts.enter, session.parameters, rows)
        slots = schedule.kept(plan.max_microbatches) + schedule.finished(plan.max_microbatches)
        total = total / schedule.stages + slots * stream.size * stream.dtype.itemsize
    return total / (layout.batch_shards * layout.sizes["sequence"] * layout.sizes["tensor"])


def slot_bytes(session: Session, plan: parallel.BatchPlan) -> float:
    """Bytes that a device holds for tokens which other devices may send to its experts, beside those of even loads.

    Of each slot the backward pass needs the token and what lies between an expert's products, in the layers whose
    activations are kept; where no token is dropped there are slots for all tokens of all these devices.

    Args:
      session, plan: as `activation_bytes` takes them.
    """
    layout, sizes = session.layout, session.layout.sizes
    config = getattr(session.task, "config", None)
    if config is None or not layout.expert_axes:
        return 0.0
    length, chunks = session.task.units_per_example, layout.strategy.expert_chunks
    devices, whole = math.prod(sizes[axis] for axis in layout.expert_axes), "tensor" in layout.expert_axes
    rows = plan.microbatch_examples // layout.batch_shards
    tokens = length // sizes["sequence"] // (sizes["tensor"] if whole else 1)
    of_chunk = config.experts_per_token * rows * tokens // chunks
    pieces = rows // math.gcd(rows, chunks)  # of rows, in a chunk
    most = config.expert_rows(length)
    room = of_chunk if most is None else min(of_chunk, most * pieces * config.experts // devices)
    kept = config.width + 3 * config.expert_size / (1 if whole else sizes["tensor"])
    layers = 1 if config.remat == "full" else config.sparse_layers / sizes["stage"]
    return max(0, chunks * (devices * room - of_chunk)) * kept * jnp.dtype(config.dtype).itemsize * layers
