"""The decoder's task: its arithmetic is `next_token_loss`'s, it has second derivatives, and any mesh will do."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo import parallel
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.tasks.base import Context
from crescendo.experiments.tasks.language_model import language_model
from crescendo.models import ModelConfig
from crescendo.models.loss import next_token_loss
from crescendo.models.norm_probes import norm_probes, with_probes

from .conftest import MESHES, assert_any_cut, assert_same_on, fresh, meshes, on_mesh, read


@pytest.fixture(scope="module")
def task(text, small_model):
    return language_model(text, small_model(z_loss=1e-3))


def test_it_says_what_it_is(task, text):
    assert (task.name, task.unit, task.units_per_example) == ("language_model", "token", 16)
    assert task.config.vocab_size == 128
    assert task.flops_per_example == task.config.flops_per_token(16) * 16
    rows = task.train.take([0, 1])
    assert {name: (x.shape[1:], str(x.dtype)) for name, x in rows.items()} == {
        name: array[:2] for name, array in task.row.items()
    }
    assert list(task.held_out) == ["validation"]
    assert len(task.held_out["validation"]) == len(text.held_out["validation"])
    assert not {"scan_layers", "remat", "dtype", "dropout"} & set(task.identity)


@pytest.mark.parametrize("token", [-1, 60])
def test_tokens_outside_of_the_vocabulary_are_refused_where_they_come_in(text, small_model, token):
    rows = text.train.take([0, 1])
    place = int(np.argmax(rows["segment_ids"][1] > 0)) + 1
    rows["tokens"][1, place] = token
    source = SimpleNamespace(take=lambda numbers: rows)
    changed = type(text)(**{**vars(text), "train": source})
    with pytest.raises(UserError, match=rf"tokens\[{place}\] of row 7 is {token}, and of vocab_size = 60"):
        language_model(changed, small_model()).train.take([3, 7])
    rows["tokens"][1, place], rows["segment_ids"][1, place] = token, 0
    language_model(changed, small_model()).train.take([3, 7])  # padding holds anything


def test_the_fingerprint_is_that_of_model_and_rows(text):
    text = type(text)(**{**vars(text), "vocab_size": 384})
    found = {
        language_model(text, ModelConfig(remat=remat).for_platform(on)).fingerprint
        for remat, on in (("none", "cpu"), ("full", "gpu"))
    }
    assert found == {"5bebb39a8f325f44"}  # that of curves of critical batch sizes measured before there were tasks
    assert language_model(text, ModelConfig(dropout=0.1).for_platform("cpu")).fingerprint not in found


def test_the_loss_is_bit_for_bit_next_token_loss(task):
    rows, parameters = read(task.train, range(4)), fresh(task)
    found = jax.jit(lambda p: task.loss(p, rows, Context()))(parameters)
    expected = jax.jit(lambda p: next_token_loss(task.config, p, rows, z_loss=1e-3))(parameters)
    assert (found.sum, found.weight, found.extra) == (*expected, {})
    plain = jax.jit(lambda p: next_token_loss(task.config, p, rows))(parameters)
    assert jax.jit(lambda p: task.evaluate(p, rows, Context()))(parameters)["loss"] == plain


def test_probed_parameters_will_do(task):
    rows, parameters = read(task.train, range(4)), fresh(task)
    loss = jax.jit(lambda p: task.loss(p, rows, Context()).sum)
    np.testing.assert_allclose(loss(with_probes(parameters, norm_probes(parameters, 4))), loss(parameters), rtol=1e-6)


@pytest.mark.slow
def test_the_reference_has_second_derivatives(task):
    """A Hessian-vector product against the difference of gradients."""
    rows, parameters = read(task.train, range(2)), fresh(task)
    gradient = jax.jit(jax.grad(lambda p: task.loss(p, rows, Context(implementation="reference")).sum))
    direction = jax.tree.map(lambda x: x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), parameters)
    product = jax.jit(lambda p: jax.jvp(gradient, (p,), (direction,))[1])(parameters)
    at = lambda h: gradient(jax.tree.map(lambda x, d: x + h * d, parameters, direction))  # noqa: E731
    difference = jax.tree.map(lambda a, b: (a - b) / 2e-3, at(1e-3), at(-1e-3))
    dot = lambda a, b: sum(float(jnp.vdot(x, y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))  # noqa: E731
    assert dot(product, difference) / (dot(product, product) * dot(difference, difference)) ** 0.5 > 0.999


@pytest.mark.parametrize("mesh", meshes(quick="ring 2"))
def test_any_mesh_will_do(task, mesh):
    assert_same_on(task, MESHES[mesh], read(task.train, range(4)))


@pytest.mark.slow
def test_dropout_follows_examples_and_not_the_cut(text, small_model):
    task = language_model(text, small_model(dropout=0.3))
    rows, parameters = read(task.train, range(5)), fresh(task)
    whole = assert_any_cut(task, rows, seed=1)
    loss = jax.jit(lambda rows, seed: task.loss(parameters, rows, Context(seed=seed)).sum)
    for other, seed in ((rows, 2), (rows | {"example": rows["example"] + 100}, 1)):
        assert whole.sum != loss(other, seed)
    still = jax.jit(lambda rows: task.loss(parameters, rows, Context(training=False)).sum)(rows)
    without = language_model(text, small_model())
    assert still == jax.jit(lambda rows: without.loss(parameters, rows, Context()).sum)(rows)


@pytest.mark.parametrize("mesh", meshes(quick="tensor 2, data 2"))
def test_the_reference_serves_on_any_mesh(task, mesh):
    rows, parameters = read(task.train, range(4)), fresh(task)
    layout = task.place(parallel.Layout(parallel.make_mesh(**MESHES[mesh], devices=jax.devices()[:4]), "fsdp"))
    placed = on_mesh(task, layout, rows)
    context = Context(layout=layout, implementation="reference")
    found = jax.jit(lambda p: task.loss(p, placed, context).sum)(parameters)
    expected = jax.jit(lambda p: task.loss(p, rows, Context()).sum)(parameters)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    gradient = jax.grad(lambda p: task.loss(p, placed, context).sum)
    jax.eval_shape(lambda p: jax.jvp(gradient, (p,), (p,))[1], parameters)


def test_the_layout_is_asked_for_the_heads(text, small_model):
    asked = []

    class Stub:
        def with_experts(self, experts):
            asked.append(experts)
            return self

        def with_heads(self, heads, kv_heads):
            asked.append((heads, kv_heads))
            return self

        def order(self, length):
            asked.append(length)

    stub = Stub()
    assert language_model(text, small_model()).place(stub) is stub
    assert asked == [None, (4, 2), 16]


def test_a_ring_does_not_keep_the_order_in_which_a_capacity_fills_experts(text, small_model):
    task, mesh = language_model(text, small_model(experts=4, expert_capacity=1.0)), parallel.make_mesh(sequence=2)
    message = r"^expert_capacity = 1 fills .* use strategy.ulysses = 2, mesh sequence = 1, or None to drop no token$"
    with pytest.raises(ValueError, match=message):
        task.place(parallel.Layout(mesh))
    task.place(parallel.Layout(mesh, parallel.strategy(ulysses=2)))


def test_speed_is_not_identity(text, small_model):
    config = small_model()
    faster = dataclasses.replace(config, remat="full", dtype="bfloat16", scan_layers=not config.scan_layers)
    assert language_model(text, faster).identity == language_model(text, config).identity
