"""Per-example gradients of norm scales against differentiating every example alone, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crescendo import models, parallel
from crescendo.models import ModelConfig, attention, layers, mlp
from crescendo.models.layers import RMSNorm
from crescendo.models.loss import next_token_loss
from crescendo.models.norm_probes import example_squared_norms, norm_probes, norm_scales, with_probes
from crescendo.pallas_kernels import OPS

CONFIG = ModelConfig(
    vocab_size=50, width=24, layers=2, heads=4, kv_heads=2, mlp_width=40, scan_layers=True
).for_platform("cpu")
EXAMPLES = 4
OF_ROWS = ((attention, "qk_norm_rotary"), (layers, "rms_norm"), (mlp, "swiglu"))


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng(0)
    draw = lambda high: jnp.asarray(random.integers(0, high, (EXAMPLES, 12)), jnp.int32)  # noqa: E731
    rows = {"tokens": draw(50), "labels": draw(50), "segment_ids": draw(2), "positions": jnp.arange(12) + 0 * draw(2)}
    return jax.jit(models.initialize, static_argnums=0)(CONFIG, jax.random.key(0)), rows


def loss(parameters, rows, implementation=None):
    return next_token_loss(CONFIG, parameters, rows, implementation=implementation)[0]


def probed(parameters, probes, rows, implementation=None):
    return loss(with_probes(parameters, probes), rows, implementation)


def ask_through(monkeypatch, change=lambda implementation: implementation) -> dict[str, set]:
    """Has the model's ops on rows asked for what `change` makes of an implementation; which were, by op."""
    asked: dict[str, set] = {name: set() for _, name in OF_ROWS}

    def recorded(name):
        def call(*args, implementation, **options):
            asked[name].add(implementation)
            return OPS[name](*args, implementation=change(implementation), **options)

        return call

    for module, name in OF_ROWS:
        monkeypatch.setattr(module, name, recorded(name))
    return asked


def test_a_layer_in_float64():
    """d scale of example b is sum_t dy[b, t] x[b, t] / rms(x[b, t]); written from the maths."""
    random = np.random.default_rng(1)
    x, dy, scale = random.normal(size=(3, 5, 2, 8)), random.normal(size=(3, 5, 2, 8)), random.normal(size=8)
    expected = np.sum(dy * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6), axis=(1, 2))
    structure, state = nnx.split(RMSNorm(8, "embed", 1e-6))

    def apply(scales):
        layer = nnx.merge(structure, jax.tree.map(lambda _: scales, state))
        return jnp.sum(layer(jnp.float32(x))[0] * dy)

    gradient = jax.grad(apply)(jnp.float32(np.tile(scale, (3, 1))))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)  # the layer computes in float32


@pytest.mark.slow
def test_the_ops_on_rows_change_no_gradient(problem, monkeypatch):
    """What a GPU takes, by the implementation of the same gradients that serves this device, against the formulas."""
    parameters, rows = problem
    probes = norm_probes(parameters, EXAMPLES)
    own = jax.jit(jax.value_and_grad(probed, (0, 1)), static_argnums=3)(parameters, probes, rows, "reference")
    asked = ask_through(monkeypatch, lambda implementation: "xla")
    by_kernel = jax.jit(jax.value_and_grad(lambda *args: probed(*args), (0, 1)))(parameters, probes, rows)
    assert all(implementations == {None} for implementations in asked.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), by_kernel, own)


@pytest.mark.parametrize(
    ("devices", "implementation", "expected"),
    [(1, None, None), (1, "xla", None), (1, "reference", "reference"), (2, None, None)],
)
def test_kernels_are_asked_where_they_may_serve(problem, monkeypatch, devices, implementation, expected):
    """Over several devices too, and not where second derivatives are wanted; the attention's name is its own."""
    parameters, rows = problem
    asked = ask_through(monkeypatch)
    layout = parallel.Layout(parallel.make_mesh(devices=jax.devices()[:devices]))
    jax.eval_shape(lambda: next_token_loss(CONFIG, parameters, rows, implementation=implementation, layout=layout))
    assert all(implementations == {expected} for implementations in asked.values())


def test_equals_differentiating_every_example_alone(problem):
    parameters, rows = problem
    gradients, of_probes = jax.jit(jax.grad(probed, (0, 1)))(parameters, norm_probes(parameters, EXAMPLES), rows)
    alone = jax.vmap(lambda row: jax.grad(loss)(parameters, jax.tree.map(lambda x: x[None], row)))
    of_examples = jax.jit(alone)(rows)
    expected = norm_scales(of_examples)
    assert set(expected) == set(of_probes)
    assert len(expected) == 5  # attention, its query and key, mlp, final
    squares = sum(np.sum(np.square(np.asarray(g, np.float64).reshape(EXAMPLES, -1)), axis=1) for g in expected.values())
    np.testing.assert_allclose(example_squared_norms(of_probes), squares, rtol=1e-4)  # the model computes in float32
    for name, g in expected.items():
        np.testing.assert_allclose(np.moveaxis(of_probes[name], -2, 0), g, rtol=1e-4, atol=1e-5)
    plain = jax.tree.map(lambda g: np.sum(g, axis=0, dtype=np.float64), jax.device_get(of_examples))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, plain)


def test_no_matrix_product_is_added(problem):
    """The same number of them in the program, and under 2% more arithmetic even in this narrow model."""
    parameters, rows = problem
    probes = norm_probes(parameters, EXAMPLES)
    plain = jax.jit(jax.grad(loss)).lower(parameters, rows)
    with_norms = jax.jit(jax.grad(probed, (0, 1))).lower(parameters, probes, rows)
    count = lambda lowered: lowered.as_text().count("dot_general")  # noqa: E731
    assert count(with_norms) == count(plain) > 0
    assert with_norms.cost_analysis()["flops"] < 1.02 * plain.cost_analysis()["flops"]


def test_without_probes_the_parameters_are_the_same(problem):
    parameters, _ = problem
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (with_probes(parameters, {}), parameters)), strict=True))
