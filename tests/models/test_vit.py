"""The vision transformer against a float64 version of its maths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.models import axes, vit
from crescendo.models.vit import ViTConfig, cut_into_patches

SMALL = ViTConfig(image_size=8, patch_size=4, in_channels=2, classes=5, width=16, layers=2, heads=2, mlp_width=24)
CONFIG = SMALL.for_platform("cpu")


@pytest.fixture(scope="module")
def parameters():
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(vit.initialize, CONFIG), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype), shapes)


def written_from_the_maths(parameters, image):
    """Logits of one picture [6, 7, 2], in float64 NumPy."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale

    framed = np.zeros((8, 8, 2))
    framed[1:7, 0:7] = image
    patches = np.stack([framed[i : i + 4, j : j + 4].ravel() for i in (0, 4) for j in (0, 4)])
    x = patches @ p["patch"]["kernel"] + p["places"]
    for i in range(SMALL.layers):
        block = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        a, h = block["attention"], norm(x, block["attention_norm"]["scale"])
        out = np.zeros_like(x)
        for head in range(SMALL.heads):
            q, k, v = (h @ a[name]["kernel"][:, head] for name in ("query", "key", "value"))
            q, k = norm(q, a["query_norm"]["scale"]), norm(k, a["key_norm"]["scale"])
            weight = np.exp(q @ k.T / np.sqrt(8))
            out += weight / weight.sum(-1, keepdims=True) @ v @ a["output"]["kernel"][head]
        x = x + out
        h = norm(x, block["mlp_norm"]["scale"])
        gate = h @ block["mlp"]["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ block["mlp"]["up"]["kernel"])) @ block["mlp"]["down"]["kernel"]
    return norm(x, p["final_norm"]["scale"]).mean(0) @ p["head"]["kernel"]


def test_logits_are_those_of_the_maths(parameters):
    images = np.random.default_rng(0).normal(size=(3, 6, 7, 2))
    found = jax.jit(lambda p, x: vit.apply(CONFIG, p)(x))(parameters, jnp.float32(images))
    assert found.dtype == jnp.float32
    for logits, image in zip(found, images, strict=True):
        np.testing.assert_allclose(logits, written_from_the_maths(parameters, image), rtol=1e-4, atol=1e-4)


def test_every_parameter_names_its_axes(parameters):
    def check(parameter, names):
        assert len(names) == parameter.ndim
        assert set(names) <= set(axes.ALL)

    named = vit.logical_axes(CONFIG)
    jax.tree.map(check, parameters, named)
    assert named["places"] == ("places", "embed")
    assert named["blocks"]["attention"]["query"]["kernel"][0] == "layers"


def test_flops_are_those_of_the_matrices():
    config = ViTConfig()
    shapes = jax.eval_shape(lambda: vit.initialize(config.for_platform("gpu"), jax.random.key(0)))
    of_patches = shapes["patch"]["kernel"].size + sum(x.size for x in jax.tree.leaves(shapes["blocks"]) if x.ndim > 2)
    attention = 12 * config.layers * config.width * config.patches
    assert config.flops_per_example() == 64 * (6 * of_patches + attention) + 6 * shapes["head"]["kernel"].size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "image_size = 32 must be a multiple of patch_size = 5"),
        ({"classes": 0}, "classes = 0 must be at least 1"),
        ({"heads": 3}, "width = 128 must be a multiple of heads = 3"),
        ({"dropout": 1.0}, "dropout = 1.0 must be at least 0 and below 1"),
    ],
)
def test_bad_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**changes)


def test_an_undecided_configuration_and_large_pictures_are_refused():
    with pytest.raises(ValueError, match="undecided"):
        vit.initialize(SMALL, jax.random.key(0))
    with pytest.raises(ValueError, match="image_size = 8 is smaller than pictures of 9 x 8"):
        cut_into_patches(jnp.zeros((1, 9, 8, 1)), 8, 4)
