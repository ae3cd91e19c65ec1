"""The training step on an NVIDIA GPU, in bfloat16 with cuDNN's attention, against float32 and XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crescendo import models, optim, parallel
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.tasks.base import EXAMPLE
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.shapes import abstract_batch
from crescendo.models import ModelConfig
from crescendo.models.loss import next_token_loss
from crescendo.optim.batch_size import staged

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def rows():
    """Packed documents of uneven lengths, some padding at the end."""
    random = np.random.default_rng()
    segment_ids = np.sort(random.integers(1, 5, (4, 256)), axis=1)
    segment_ids[:, 250:] = 0
    starts = np.concatenate([np.ones((4, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    index = np.broadcast_to(np.arange(256), (4, 256))
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    draw = lambda: random.integers(0, 384, (4, 256))  # noqa: E731
    batch = {"tokens": draw(), "labels": draw(), "segment_ids": segment_ids, "positions": positions}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


def test_bfloat16_and_cudnn_stay_close_to_float32(rows):
    parameters = models.initialize(ModelConfig.preset("debug").for_platform("cpu"), jax.random.key(0))

    def loss_and_gradient(dtype, implementation):
        config = ModelConfig.preset("debug", dtype=dtype).for_platform("gpu")
        loss = lambda p: next_token_loss(config, p, rows, implementation=implementation)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(parameters)

    with jax.default_matmul_precision("highest"):
        exact_loss, exact = loss_and_gradient("float32", "xla")
    loss, gradient = loss_and_gradient("bfloat16", "cudnn")
    assert float(loss) == pytest.approx(float(exact_loss), rel=2e-3)
    error = optax.global_norm(jax.tree.map(jnp.subtract, gradient, exact)) / optax.global_norm(exact)
    assert float(error) < 3e-2  # bfloat16 has 8 bits, and three layers add up


def test_a_step_takes_batches_of_several_sizes_and_lowers_the_loss(rows):
    session = Session(
        data=RandomText(384, 256),
        model=ModelConfig.preset("debug"),
        optimizer=optim.adamw(1e-2),
        batch_size=staged([4, 16], starts_examples=[0, 64]),
        total_examples=1024,
        mesh=parallel.make_mesh(devices=jax.devices()[:1]),
    )
    state = session.fresh_state()
    shardings = jax.tree.map(lambda x: x.sharding, abstract_batch(session.task, session.layout, session.plan))
    assert session.plan.max_microbatches == 4
    losses = []
    for count in (1, 1, 4, 4, 2, 2):
        buffer = {name: np.stack([np.asarray(x)] * 4) for name, x in rows.items()}
        buffer[EXAMPLE] = np.arange(16, dtype=np.int32).reshape(4, 4)
        scalars = {"microbatches": np.int32(count), "examples_seen": np.int32(0), "seed": np.uint32(0)}
        state, metrics = session.step(state, jax.device_put({"rows": buffer, **scalars}, shardings))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert np.isfinite(losses).all()
