"""A residual network, which knows no mesh, on several: five steps against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crescendo.models import resnet
from crescendo.models.classification import classification_loss
from crescendo.parallel import Layout, accumulate, make_mesh

CONFIG = resnet.ResNetConfig(width=8, blocks=1).for_platform("cpu")
AXES = resnet.logical_axes(CONFIG)
STEPS, MICROBATCHES, EXAMPLES = 5, 2, 16
TRANSFORM = optax.adamw(1e-2)


def trained(layout: Layout) -> tuple[list[float], dict, dict]:
    """The losses, the first step's gradients, and the parameters behind the last step."""
    random = np.random.default_rng(0)
    images = random.normal(size=(MICROBATCHES, EXAMPLES, 12, 12, 1)).astype(np.float32)
    labels = random.integers(0, 10, size=(MICROBATCHES, EXAMPLES)).astype(np.int32)
    rows = {
        "images": jax.device_put(images, layout.rows((None, None, None), leading=1)),
        "labels": jax.device_put(labels, layout.rows((), leading=1)),
    }

    def fresh():
        parameters = resnet.initialize(CONFIG, jax.random.key(0))
        return parameters, TRANSFORM.init(parameters)

    shapes, opt_shapes = jax.eval_shape(fresh)
    of_parameters = layout.parameters(AXES, shapes)
    of_opt_state = optax.tree_utils.tree_map_params(
        TRANSFORM,
        lambda _, sharding: sharding,
        opt_shapes,
        layout.optimizer(AXES, shapes),
        transform_non_params=lambda _: layout.replicated,
    )

    def loss_fn(parameters, rows):
        logits = resnet.apply(CONFIG, parameters)(rows["images"], layout=layout)
        return (*classification_loss(logits, rows["labels"]), {})

    def step(parameters, opt_state, rows):
        total = accumulate(loss_fn, parameters, rows, jnp.int32(MICROBATCHES), spread=layout.spread(AXES))
        gradients = jax.tree.map(lambda g: g / total.weight, total.gradients)
        gradients, parameters = (
            layout.lay_out(layout.strategy.optimizer, tree, AXES) for tree in (gradients, parameters)
        )
        updates, opt_state = TRANSFORM.update(gradients, opt_state, parameters)
        return optax.apply_updates(parameters, updates), opt_state, total.loss_sum / total.weight, gradients

    parameters, opt_state = jax.jit(fresh, out_shardings=(of_parameters, of_opt_state))()
    step = jax.jit(step, out_shardings=(of_parameters, of_opt_state, None, None))
    losses, gradients = [], []
    for _ in range(STEPS):
        parameters, opt_state, loss, found = step(parameters, opt_state, rows)
        losses.append(float(loss))
        gradients.append(found)
    return losses, jax.device_get(gradients[0]), parameters


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "plan"),
    [
        ({"data": 2, "fsdp": 4}, "fsdp"),
        ({"fsdp": 8}, "fsdp"),
        ({"fsdp": 8}, "zero1"),
        ({"data": 2, "fsdp": 4}, "zero2"),
    ],
)
def test_convolutions_split_by_channels_equal_those_of_one_device(quick_compilation, axes, plan):
    layout = Layout(make_mesh(**{"data": 1} | axes), plan)
    losses, gradients, parameters = trained(layout)
    expected_losses, expected_gradients, expected = trained(Layout(make_mesh(devices=jax.devices()[:1])))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for found, wanted in ((gradients, expected_gradients), (jax.device_get(parameters), jax.device_get(expected))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)
    if plan == "fsdp":
        kernel = parameters["blocks"][0]["conv1"]["kernel"]
        assert kernel.addressable_shards[0].data.size * axes["fsdp"] == kernel.size
