"""Training on the hard examples of each batch: which these are, on any mesh, in any microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crescendo import parallel
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.tasks.base import Context, Loss
from crescendo.experiments.trainer.hard import hardest
from crescendo.experiments.trainer.session import Session
from crescendo.models import ModelConfig
from crescendo.optim.batch_size import staged
from crescendo.optim.noise_scale import gradient_noise_scale
from crescendo.optim.policies import norm_test

MODEL = ModelConfig(width=16, layers=2, heads=4, kv_heads=2, mlp_width=32, scan_layers=True, dropout=0.1)
BATCH, SHARE = 16, 0.3  # of 16 examples 5


def session(mesh=None, **options) -> Session:
    given = {"model": MODEL, "optimizer": optax.sgd(0.5), "batch_size": BATCH, "total_examples": 64}
    sizes = mesh or {"data": 1}
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    of = parallel.make_mesh(**sizes, devices=devices)
    return Session(data=RandomText(128, 16), **{**given, "hard_share": SHARE, **options, "mesh": of})


@pytest.fixture(scope="module")
def one():
    return session(max_microbatch_examples=4)


def losses_of(of: Session, parameters, examples_seen: int) -> np.ndarray:
    """Each row's training loss in a batch of one."""
    context = Context(seed=of.seed, examples_seen=examples_seen)
    batch = of.feed().read(examples_seen, BATCH)["rows"]

    @jax.jit
    def loss(row):
        found = of.task.loss(parameters, row, context)
        return found.sum / found.weight

    flat = {name: x.reshape(-1, 1, *x.shape[2:])[:BATCH] for name, x in batch.items()}
    return np.array([loss({name: x[i] for name, x in flat.items()}) for i in range(BATCH)])


class Toy:
    """Its loss is the row's number x, over a weight of its own."""

    @staticmethod
    def loss(parameters, rows, context) -> Loss:
        del context
        return Loss(jnp.sum(parameters * rows["x"] * rows["w"]), jnp.sum(rows["w"]))


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [
        (0.5, 3, [1, 3, 5]),  # the first of the two that are 5
        (0.5, 2, [1, 3]),
        (0.51, 2, [0, 1, 3]),
        (1.0, 1, [0, 1]),
        (1 / 4096, 3, [1]),
    ],
)
def test_so_many_of_the_examples_that_are_read_are_kept(share, count, expected):
    """Of three microbatches of two, of which the first ones are read."""
    x = jnp.array([[2.0, 9.0], [1.0, 5.0], [0.0, 5.0]])
    rows = {"x": x, "w": 1 + x, "example": jnp.arange(6).reshape(3, 2) + 40}
    batch = {"rows": rows, "microbatches": jnp.int32(count), "seed": 0, "examples_seen": 0}
    chosen, told = hardest(Toy, jnp.float32(2), batch, Context(), share)
    kept = len(expected)
    assert chosen["rows"]["example"].ravel()[:kept].tolist() == [40 + i for i in expected]
    assert not any(np.asarray(array).ravel()[kept:].any() for array in chosen["rows"].values())
    assert int(chosen["microbatches"]) == -(-kept // 2)
    np.testing.assert_allclose(told["loss_of_all"], 2 * np.mean(x.ravel()[: 2 * count]))


def test_a_loss_that_isn_t_finite_is_the_highest():
    """So that its step is skipped, as without a choice."""
    rows = {"x": jnp.array([[1.0, jnp.nan, 3.0, 2.0]]), "w": jnp.ones((1, 4)), "example": jnp.arange(4)[None]}
    batch = {"rows": rows, "microbatches": jnp.int32(1), "seed": 0, "examples_seen": 0}
    assert hardest(Toy, jnp.float32(1), batch, Context(), 0.25)[0]["rows"]["example"][0, 0] == 1


@pytest.mark.slow
def test_those_with_the_highest_losses_are_kept_in_order(one):
    parameters = one.fresh_state().parameters
    batch = one.feed().read(BATCH, BATCH)
    context = Context(seed=batch["seed"], examples_seen=batch["examples_seen"])
    chosen, told = jax.jit(lambda p, b: hardest(one.task, p, b, context, SHARE))(parameters, batch)
    losses = losses_of(one, parameters, BATCH)
    expected = np.sort(np.argsort(-losses, kind="stable")[:5])
    assert int(chosen["microbatches"]) == 2
    numbers = chosen["rows"]["example"].ravel()
    assert numbers[:8].tolist() == [*(BATCH + expected).tolist(), 0, 0, 0]
    tokens = np.asarray(batch["rows"]["tokens"]).reshape(-1, 16)[expected]
    np.testing.assert_array_equal(np.asarray(chosen["rows"]["tokens"]).reshape(-1, 16)[:5], tokens)
    assert not np.asarray(chosen["rows"]["segment_ids"]).reshape(-1, 16)[5:].any()
    np.testing.assert_allclose(told["loss_of_all"], losses.mean(), rtol=1e-5)


def steps(of: Session, count: int = 3) -> tuple[list[dict], dict]:
    state, feed, told = of.fresh_state(), of.feed(), []
    for i in range(count):
        state, metrics = of.step(state, feed.read(i * BATCH, BATCH))
        told.append(jax.device_get(metrics))
    return told, jax.device_get(state.parameters)


@pytest.mark.slow
def test_a_step_is_that_of_these_rows_alone(one):
    """Beside the gradient of the mean over the tokens of the chosen rows."""
    (told,), after = steps(one, 1)
    before = one.fresh_state().parameters
    chosen = np.sort(np.argsort(-losses_of(one, before, 0), kind="stable")[:5])
    batch = one.feed().read(0, BATCH)["rows"]
    rows = {name: jnp.asarray(x).reshape(-1, *x.shape[2:])[chosen] for name, x in batch.items()}

    def loss(parameters):
        found = one.task.loss(parameters, rows, Context(seed=one.seed, examples_seen=0))
        return found.sum / found.weight

    value, gradient = jax.jit(jax.value_and_grad(loss))(before)
    norm = optax.global_norm(gradient)
    np.testing.assert_allclose([told["loss"], told["gradient_norm"]], [value, norm], rtol=1e-5)
    assert told["loss"] > told["loss_of_all"]
    clipped = jax.tree.map(lambda w, g: w - 0.5 * g / max(1.0, float(norm)), before, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after, clipped)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ({"data": 1}, {"max_microbatch_examples": 16}),
        ({"data": 2, "fsdp": 2}, {"max_microbatch_examples": 8}),
        ({"data": 4}, {"strategy": "zero1"}),
        ({"data": 2, "tensor": 2}, {}),
    ],
)
def test_it_is_the_same_in_other_microbatches_and_on_other_meshes(one, mesh, options):
    expected, parameters = steps(one)
    found, after = steps(session(mesh, **options))
    for a, b in zip(found, expected, strict=True):
        for name in ("loss", "loss_of_all", "gradient_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after, parameters)


@pytest.mark.slow
def test_the_clock_counts_what_is_read_and_flops_what_is_computed():
    of = session(batch_size=staged([8, BATCH], starts_examples=[0, 16]), hard_share=0.5)
    state, feed = of.fresh_state(), of.feed()
    state, first = of.step(state, feed.read(0, 8))
    assert int(first["next_batch_size"]) == 8
    _, second = of.step(state, feed.read(8, 8))
    assert int(second["next_batch_size"]) == BATCH
    assert of.flops_per_example == pytest.approx(of.task.flops_per_example * (1 / 3 + 1 / 2))


@pytest.mark.parametrize(
    ("mesh", "options", "message"),
    [
        ({"sequence": 2}, {}, r"mesh\.sequence = 2 splits them: use sequence = 1"),
        ({"stage": 2}, {}, r"mesh\.stage = 2 splits them: use stage = 1"),
        ({}, {"noise_scale": gradient_noise_scale()}, r"leave out train\.noise_scale"),
        ({}, {"batch_size": norm_test(8, cap=16)}, r"or train\.hard_share"),
        ({}, {"hard_share": 1e-5}, r"train\.hard_share = 1e-05 is below 1/4096"),
        ({}, {"hard_share": 0.0}, r"hard_share = 0\.0 must be above 0"),
        ({}, {"hard_share": 1.5}, r"hard_share = 1\.5 must be .*at most 1"),
    ],
)
def test_what_can_t_be_is_refused(mesh, options, message):
    with pytest.raises(UserError, match=message):
        session({"data": 1, **mesh}, **options)
