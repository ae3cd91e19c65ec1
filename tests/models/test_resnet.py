"""The residual network against a float64 version of its maths, and that examples don't depend on each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crescendo import parallel
from crescendo.models import axes, resnet
from crescendo.models.classification import classification_accuracy, classification_loss
from crescendo.models.resnet import ResNetConfig

SMALL = ResNetConfig(classes=4, width=4, blocks=1, group_width=2)
CONFIG = SMALL.for_platform("cpu")


@pytest.fixture(scope="module")
def parameters():
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(resnet.initialize, CONFIG), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    images = random.normal(size=(16, 9, 9, 1)).astype(np.float32)
    return {"images": jnp.asarray(images), "labels": jnp.asarray(random.integers(0, 4, size=16), jnp.int32)}


@jax.jit
def logits(parameters, images):
    return resnet.apply(CONFIG, parameters)(images)


def written_from_the_maths(parameters, image):
    """Logits of one picture [H, W, C], in float64 NumPy."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)

    def convolve(x, kernel, stride=1):
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        rows, columns = range(0, x.shape[0], stride), range(0, x.shape[1], stride)
        return np.array([[np.tensordot(padded[i : i + 3, j : j + 3], kernel, 3) for j in columns] for i in rows])

    def norm(x, weights):
        out = np.empty_like(x)
        for first in range(0, x.shape[-1], SMALL.group_width):
            group = x[..., first : first + SMALL.group_width]
            out[..., first : first + SMALL.group_width] = (group - group.mean()) / np.sqrt(group.var() + 1e-5)
        return out * weights["scale"] + weights["bias"]

    x = np.maximum(norm(convolve(image, p["stem"]["kernel"]), p["stem_norm"]), 0)
    for number in sorted(p["blocks"]):
        block = p["blocks"][number]
        stride = 1 if number == 0 else 2
        y = np.maximum(norm(convolve(x, block["conv1"]["kernel"], stride), block["norm1"]), 0)
        y = norm(convolve(y, block["conv2"]["kernel"]), block["norm2"])
        shortcut = np.zeros_like(y)
        shortcut[..., : x.shape[-1]] = x[::stride, ::stride]
        x = np.maximum(shortcut + y, 0)
    return x.mean((0, 1)) @ p["head"]["kernel"]


def test_logits_are_those_of_the_maths(parameters, batch):
    found = logits(parameters, batch["images"][:2])
    for i in range(2):
        expected = written_from_the_maths(parameters, np.float64(batch["images"][i]))
        # Float32 through 8 layers of sums of up to 144 terms.
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-4)


def test_loss_and_accuracy(parameters, batch):
    scores = np.float64(logits(parameters, batch["images"]))
    labels = np.asarray(batch["labels"])
    found = logits(parameters, batch["images"])
    loss, weight = classification_loss(found, batch["labels"])
    expected = np.log(np.exp(scores).sum(-1)) - scores[np.arange(16), labels]
    assert weight == 16
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-5)
    correct, count = classification_accuracy(found, batch["labels"])
    assert (correct, count) == ((scores.argmax(-1) == labels).sum(), 16)


def test_what_weighs_nothing_may_hold_anything():
    scores, weights = jnp.arange(6.0).reshape(2, 3), jnp.array([0.5, 0.0])

    def run(scores, label):
        loss = lambda scores: classification_loss(scores, jnp.array([2, label]), weights, label_smoothing=0.1)[0]  # noqa: E731
        return jax.value_and_grad(loss)(scores)

    expected = run(scores, 0)
    for value, label in ((jnp.nan, -1), (jnp.inf, 3), (-jnp.inf, 1000)):
        for result, array in zip(run(scores.at[1].set(value), label), expected, strict=True):
            np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize("label", [-1, 3, 1000])
@pytest.mark.parametrize("weights", [None, jnp.ones(2)], ids=["unweighted", "weighted"])
def test_a_label_that_is_no_class_shows(label, weights):
    loss = lambda scores: classification_loss(scores, jnp.array([2, label]), weights)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.arange(6.0).reshape(2, 3))
    assert np.isnan(value)
    assert np.isnan(gradient[1]).all()


def test_sharded_examples_give_the_same_gradients(parameters, batch):
    """With statistics per example nothing couples the shards but the sum."""

    def loss(parameters, batch):
        return classification_loss(resnet.apply(CONFIG, parameters)(batch["images"]), batch["labels"])[0]

    mesh = parallel.make_mesh()
    assert mesh.devices.size == 8
    sharded = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    spread = jax.device_put(parameters, NamedSharding(mesh, PartitionSpec()))
    gradient = jax.jit(jax.grad(loss))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),  # float32 sums in another order
        gradient(parameters, batch),
        gradient(spread, sharded),
    )


def test_every_parameter_names_its_axes(parameters):
    named = resnet.logical_axes(CONFIG)

    def check(parameter, names):
        assert len(names) == parameter.ndim
        assert set(names) <= set(axes.ALL)

    jax.tree.map(check, parameters, named)
    mesh = parallel.make_mesh()
    jax.device_put(parameters, parallel.Layout(mesh).parameters(named))


def test_the_default_is_small_and_bfloat16_on_a_gpu():
    config = ResNetConfig().for_platform("gpu")
    assert config.dtype == "bfloat16"
    shapes = jax.eval_shape(lambda: resnet.initialize(config, jax.random.key(0)))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert sum(x.size for x in jax.tree.leaves(shapes)) < 300_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 0}, "blocks = 0 must be at least 1"),
        ({"width": 12}, "width = 12 must be a multiple of group_width = 8"),
        ({"dtype": "float16"}, "dtype = 'float16'"),
    ],
)
def test_bad_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**changes)


def test_an_undecided_dtype_is_refused():
    with pytest.raises(ValueError, match="undecided"):
        resnet.initialize(SMALL, jax.random.key(0))
