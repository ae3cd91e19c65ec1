"""Schedules by their rules, and a small model's pipeline against the same batch on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crescendo.models.parts import Parts
from crescendo.parallel import Spread, accumulate, deviations, make_mesh
from crescendo.parallel.pipeline import Pipeline, evaluate_through_stages
from crescendo.parallel.schedules import SCHEDULES, Schedule

K_MAX, EXAMPLES, WIDTH, LAYERS, VOCAB = 6, 3, 4, 4, 8

schedules = st.builds(Schedule, st.sampled_from(SCHEDULES), st.integers(2, 9))


@given(schedules, st.integers(1, 20))
def test_what_is_sent_is_used_in_the_next_tick(schedule, microbatches):
    forward, backward = schedule.table(microbatches)
    ticks = np.full((2, schedule.stages, microbatches), -1)
    for which, table in enumerate((forward, backward)):
        for tick, stage in zip(*np.nonzero(table >= 0), strict=True):
            assert ticks[which, stage, table[tick, stage]] == -1
            ticks[which, stage, table[tick, stage]] = tick
    assert (ticks >= 0).all()  # every microbatch is once in each pass of each stage
    assert (np.diff(ticks[0], axis=0) == 1).all()
    assert (np.diff(ticks[1], axis=0) == -1).all()
    assert (ticks[1, -1] >= ticks[0, -1]).all()  # the last stage's gradient comes from its own output


@given(schedules, st.integers(1, 20))
def test_the_share_of_idle_ticks_is_the_closed_form(schedule, microbatches):
    for table in schedule.table(microbatches):
        run = table[(table >= 0).any(axis=1)]  # a pass that no stage has to do is left out
        assert len(run) == schedule.passing(microbatches)
        assert np.mean(run < 0) == pytest.approx(schedule.idle_share(microbatches))
    p = schedule.stages
    assert schedule.idle_share(microbatches) == pytest.approx((p - 1) / (microbatches + p - 1))


@given(schedules, st.integers(1, 20), st.integers(0, 5))
def test_slots_are_enough(schedule, microbatches, further):
    forward, backward = schedule.table(microbatches)
    kept, finished = (slots(microbatches + further) for slots in (schedule.kept, schedule.finished))
    for stage in range(schedule.stages):
        slots: dict[int, int] = {}
        for begun, ended in zip(forward[:, stage].tolist(), backward[:, stage].tolist(), strict=True):
            if begun >= 0:
                assert begun % kept not in slots
                slots[begun % kept] = begun
            if ended >= 0:
                assert slots.pop(ended % kept) == ended
        assert not slots
    waiting = (forward[:, -1] >= 0).cumsum() - (backward[:, -1] >= 0).cumsum()
    assert max(waiting.max(), 1) <= finished  # also what is made and used within a tick needs a slot
    assert schedule.name == "gpipe" or kept <= 2 * schedule.stages - 1  # however many microbatches there are


def layer(x, w):
    return x + jnp.tanh(x @ w), None


# The table is used before the layers and behind them, as a tied embedding is.
PARTS = Parts(
    lambda parameters, rows: (parameters["table"][rows["tokens"]], None),
    lambda parameters, stream, rows, first: (jax.lax.scan(layer, stream[0], parameters["w"])[0], first * 0.0),
    lambda parameters, stream, rows: losses(parameters, stream[0], rows),
)


def losses(parameters, x, rows):
    logits = (x * parameters["scale"]) @ parameters["table"].T
    each = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, rows["labels"][:, None], axis=-1)[:, 0]
    return jnp.sum(rows["weights"] * each), jnp.sum(rows["weights"]), {"logits": jnp.sum(logits)}


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng()
    parameters = {
        "table": random.normal(size=(VOCAB, WIDTH)),
        "scale": random.normal(size=WIDTH),
        "w": random.normal(size=(LAYERS, WIDTH, WIDTH)) / 2,
    }
    tokens, labels = random.integers(0, VOCAB, size=(2, K_MAX, EXAMPLES))
    rows = {"tokens": tokens, "labels": labels, "weights": random.uniform(size=(K_MAX, EXAMPLES)).astype(np.float32)}
    return jax.tree.map(np.float32, parameters), rows


def sums(spread: Spread):
    def run(parameters, rows, count):
        total = accumulate(PARTS, parameters, rows, count, measure=by_layer, spread=spread)
        means = jax.tree.map(lambda g: g / total.weight, total.gradients)
        return total, deviations(PARTS, parameters, rows, count, means, spread=spread)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def by_layer(gradients):
    return {"w": jnp.sum(jnp.square(gradients["w"]), axis=(1, 2)), "table": jnp.sum(jnp.square(gradients["table"]))}


def pipeline(name: str, stages: int) -> Pipeline:
    mesh = make_mesh(data=1, stage=stages, devices=jax.devices()[:stages])
    layered = {"table": False, "scale": False, "w": True}
    return Pipeline(Schedule(name, stages), mesh, layered, lambda x: x)


@pytest.fixture(scope="module")
def expected(problem):
    run = sums(Spread())
    return {count: run(*problem, jnp.int32(count)) for count in range(1, K_MAX + 1)}


SLOW = [
    pytest.param(name, stages, marks=pytest.mark.slow) for name, stages in (("gpipe", 2), ("1f1b", 4), ("gpipe", 4))
]


@pytest.mark.parametrize(("name", "stages"), [("1f1b", 2), *SLOW])
def test_sums_equal_those_of_one_device_at_every_count(problem, expected, name, stages):
    run = sums(Spread(pipeline=pipeline(name, stages)))
    for count, alone in expected.items():
        # The same sums in another order.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), run(*problem, jnp.int32(count)), alone
        )
    assert run._cache_size() == 1


# In bfloat16 a program rounds where it ends a fusion, which two programs do in other places: of a loss of 40 by 2^-8.
@pytest.mark.parametrize(("dtype", "off_by"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-6)])
def test_evaluation_goes_through_the_stages(problem, dtype, off_by):
    parts = PARTS.of(lambda parameters: jax.tree.map(lambda x: x.astype(dtype), parameters))
    parameters, rows = problem
    found = jax.jit(lambda *of: evaluate_through_stages(pipeline("1f1b", 2), parts, *of))(parameters, rows)
    one = jax.jit(parts)
    each = [one(parameters, {name: x[i] for name, x in rows.items()}) for i in range(K_MAX)]
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, sum(b), rtol=off_by, atol=20 * off_by), found, *each)
