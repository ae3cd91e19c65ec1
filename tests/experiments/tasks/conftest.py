"""Small data in memory, meshes, and what every task must hold: the same value and gradient on any of them."""

import functools
import operator
from types import MappingProxyType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crescendo import parallel
from crescendo.experiments.data.packing import pack
from crescendo.experiments.data.rows import Rows
from crescendo.experiments.tasks.base import Context
from crescendo.models import ModelConfig
from crescendo.models.layout import ONE_DEVICE
from crescendo.parallel.pipeline import evaluate_through_stages
from crescendo.parallel.rules import ACTIVATIONS, spec_entries

LENGTH = 16
VOCAB = 60
SMALL = ModelConfig(width=16, layers=2, heads=4, kv_heads=2, mlp_width=32, scan_layers=True)
MESHES = {
    "data 2, fsdp 2": {"data": 2, "fsdp": 2},
    "tensor 2, data 2": {"data": 2, "tensor": 2},
    "ring 2": {"data": 1, "fsdp": 2, "sequence": 2},
}


def meshes(quick: str) -> list:
    """All of them for a test, of which a quick run takes one."""
    return [pytest.param(name, marks=() if name == quick else pytest.mark.slow) for name in MESHES]


@pytest.fixture(autouse=True, scope="module")
def _quick(quick_compilation):
    """For every module of the folder."""


def text_rows(documents: int, seed: int) -> Rows:
    """Packed random tokens; rows of 16 have several documents and padding."""
    random = np.random.default_rng(seed)
    ends = np.cumsum(random.integers(3, 24, size=documents))
    return Rows(random.integers(0, VOCAB, size=ends[-1] + 1), pack(np.array([0, *ends]), capacity=LENGTH), LENGTH)


@pytest.fixture(scope="session")
def text():
    """Packed text as a task needs it."""
    return SimpleNamespace(
        train=text_rows(60, 0),
        held_out={"validation": text_rows(20, 1)},
        tokenizer=None,
        vocab_size=VOCAB,
        sequence_length=LENGTH,
        fingerprint="rows",
    )


@pytest.fixture(scope="session")
def small_model():
    """`small_model(**changes)`: a decoder decided for the CPU."""
    return lambda **changes: SMALL.__class__(**{**vars(SMALL), **changes}).for_platform("cpu")


def read(source, numbers) -> dict[str, jax.Array]:
    """Rows as the trainer makes them, numbered by their place in the source."""
    rows = source.take(np.asarray(numbers)) | {"example": np.asarray(numbers, np.int32)}
    return jax.tree.map(jnp.asarray, rows)


def on_mesh(task, layout, rows) -> dict[str, jax.Array]:
    """The rows on the devices, in the order of the layout."""
    placed = {}
    for name, x in rows.items():
        names = ("batch", *(() if name == "example" else task.row[name].axes))
        if "length" in names and layout.order(x.shape[1]) is not None:
            x = x[:, layout.order(x.shape[1])]
        placed[name] = jax.device_put(x, NamedSharding(layout.mesh, PartitionSpec(*spec_entries(ACTIVATIONS, names))))
    return placed


def fresh(task, seed: int = 0):
    """Fresh parameters, three times as large so that rounding is small beside what is measured."""
    return jax.tree.map(lambda x: 3 * x, jax.jit(task.initialize)(jax.random.key(seed)))


def value_and_gradient(task, parameters, rows, context):
    """The loss's sums and their gradient."""

    @jax.jit
    def call(parameters, rows):
        def loss(parameters):
            found = task.loss(parameters, rows, context)
            return found.sum, found

        return jax.value_and_grad(loss, has_aux=True)(parameters)

    (_, found), gradient = call(parameters, rows)
    return found, gradient


def assert_same_on(task, mesh: dict, rows, *, seed: int = 5, tolerance: float = 1e-5):
    """Value, gradient and evaluation on a mesh are those of one device; gradients to `tolerance` of their largest."""
    parameters = fresh(task)
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    layout = task.place(parallel.Layout(parallel.make_mesh(**mesh, devices=devices), "fsdp"))
    spread = jax.device_put(parameters, layout.parameters(task.logical_axes(), parameters))
    placed = on_mesh(task, layout, rows)
    found, gradient = value_and_gradient(task, spread, placed, Context(layout=layout, seed=seed))
    expected, expected_gradient = value_and_gradient(task, parameters, rows, Context(seed=seed))
    np.testing.assert_allclose(found.sum, expected.sum, rtol=1e-5)
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=tolerance * float(jnp.max(jnp.abs(b)))),
        gradient,
        expected_gradient,
    )
    evaluate = lambda layout: jax.jit(functools.partial(task.evaluate, context=Context(layout=layout)))  # noqa: E731
    measured, wanted = evaluate(layout)(spread, placed), evaluate(ONE_DEVICE)(parameters, rows)
    assert measured.keys() == wanted.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), measured, wanted)


def assert_same_through_stages(task, rows, mesh=MappingProxyType({}), *, seed: int = 5, tolerance: float = 1e-5):
    """As `assert_same_on`, of two stages that get the rows in parts, each of a row for every device of a stage."""
    parameters, axes = fresh(task), task.logical_axes()
    mesh = {"data": 1, "stage": 2, **mesh}
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    layout = task.place(parallel.Layout(parallel.make_mesh(**mesh, devices=devices)))
    spread = jax.device_put(parameters, layout.parameters(axes, parameters))
    shards = layout.batch_shards
    by_part = {name: x.reshape(-1, shards, *x.shape[1:]) for name, x in rows.items()}
    training, evaluating = (Context(layout=layout, seed=seed, training=training) for training in (True, False))
    run = jax.jit(lambda *of: parallel.accumulate(task.parts(training), *of, spread=layout.spread(axes)))
    found = run(spread, by_part, jnp.int32(len(by_part["example"])))
    expected, gradient = value_and_gradient(task, parameters, rows, Context(seed=seed))
    sums = found.loss_sum, found.weight, found.extra
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sums, (*expected[:2], dict(expected.extra)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=tolerance * float(jnp.max(jnp.abs(b)))),
        found.gradients,
        gradient,
    )
    evaluate = jax.jit(
        lambda *of: evaluate_through_stages(layout.pipeline(axes), task.parts(evaluating, scores=True), *of)
    )
    wanted = jax.jit(functools.partial(task.evaluate, context=Context()))(parameters, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), evaluate(spread, by_part), wanted)


def assert_any_cut(task, rows, **context):
    """The sums over two parts of a batch are those of the whole: no draw depends on the cut."""
    parameters = fresh(task)
    size = len(rows["example"])
    parts = [{name: x[part] for name, x in rows.items()} for part in (slice(0, 2), slice(2, size))]
    loss = jax.jit(lambda p, rows: task.loss(p, rows, Context(**context)))
    whole, *found = (loss(parameters, part) for part in (rows, *parts))
    np.testing.assert_allclose(sum(x.sum for x in found), whole.sum, rtol=1e-6)
    np.testing.assert_allclose(sum(x.weight for x in found), whole.weight, rtol=1e-6)
    extra = jax.tree.map(operator.add, *(dict(x.extra) for x in found))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), extra, dict(whole.extra))
    return whole
