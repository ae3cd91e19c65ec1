"""Schedules by their rules, and a small model's pipeline against the same batch on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crescendo.models.parts import Parts
from crescendo.parallel import Spread, accumulate, deviations, make_mesh
from crescendo.parallel.chunks import rounds
from crescendo.parallel.pipeline import evaluate_through_stages
from crescendo.parallel.schedules import Schedule
from crescendo.parallel.stages import Pipeline

K_MAX, EXAMPLES, WIDTH, LAYERS, VOCAB = 6, 3, 4, 8, 8

schedules = st.one_of(
    st.builds(Schedule, st.sampled_from(["1f1b", "gpipe"]), st.integers(2, 9)),
    st.builds(Schedule, st.just("interleaved"), st.integers(2, 5), st.integers(2, 5)),
)


@given(schedules, st.integers(1, 20))
def test_what_is_sent_is_used_in_the_next_tick(schedule, microbatches):
    p, v = schedule.stages, schedule.chunks
    ticks = np.full((2, v * p, microbatches), -1)  # by the chunks' place among all
    for which, work in enumerate(schedule.table(microbatches)):
        for tick, stage in zip(*np.nonzero(work.due), strict=True):
            place = work.chunk[tick, stage] * p + stage
            assert ticks[which, place, work.microbatch[tick, stage]] == -1
            ticks[which, place, work.microbatch[tick, stage]] = tick
    assert (ticks >= 0).all()  # every microbatch is once in each pass of each chunk
    assert (np.diff(ticks[0], axis=0) == 1).all()
    assert (np.diff(ticks[1], axis=0) == -1).all()
    assert (ticks[1, -1] >= ticks[0, -1]).all()  # the last stage's gradient comes from its own output


@given(schedules, st.integers(1, 20))
def test_the_share_of_idle_ticks_is_the_closed_form(schedule, microbatches):
    p, v = schedule.stages, schedule.chunks
    for count in (microbatches, microbatches * p):
        for work in schedule.table(count):
            run = work.due[work.due.any(axis=1).argmax() :][: schedule.passing(count)]
            assert run.sum() == work.due.sum()  # the passes that no stage has to do before and behind are left out
            assert run[-1].any()
            assert np.mean(~run) == pytest.approx(schedule.idle_share(count))
        if v == 1 or count % p == 0:
            assert schedule.idle_share(count) == pytest.approx((p - 1) / (v * count + p - 1))


@given(schedules, st.integers(1, 20), st.integers(0, 5))
def test_slots_are_enough(schedule, microbatches, further):
    forward, backward = schedule.table(microbatches)
    k_max = microbatches + further
    kept, finished = schedule.kept(k_max), schedule.finished(k_max)
    begun, ended = schedule.slot(forward, k_max), schedule.slot(backward, k_max)
    for stage in range(schedule.stages):
        slots: dict[int, tuple[int, int]] = {}
        for tick in range(len(forward.due)):
            if forward.due[tick, stage]:
                assert 0 <= begun[tick, stage] < kept
                assert begun[tick, stage] not in slots
                slots[begun[tick, stage]] = forward.microbatch[tick, stage], forward.chunk[tick, stage]
            if backward.due[tick, stage]:
                expected = backward.microbatch[tick, stage], backward.chunk[tick, stage]
                assert slots.pop(ended[tick, stage]) == expected
        assert not slots
    p, v, last = schedule.stages, schedule.chunks, schedule.stages - 1
    made, used = ((work.due & schedule.leaves(np.arange(p), work))[:, last].cumsum() for work in (forward, backward))
    assert max((made - used).max(), 1) <= finished  # also what is made and used within a tick needs a slot
    assert schedule.name == "gpipe" or kept <= (3 * v + 1) // 2 * p - v % 2  # however many microbatches there are


@given(st.integers(2, 9), st.integers(2, 9))
def test_every_stage_sends_and_gets_a_chunk_in_a_round(stages, chunks):
    moves = rounds(stages, chunks)
    for of_round in moves:
        assert sorted(move.held_by for move in of_round) == list(range(stages))
        assert sorted(move.used_by for move in of_round) == list(range(stages))
    ways = {move[:2]: move[2:] for of_round in moves for move in of_round}
    assert ways == {divmod(chunk, chunks): (chunk % stages, chunk // stages) for chunk in range(stages * chunks)}


def layer(carry, w):
    x, number = carry
    return (x + jnp.tanh(x @ w + number / 10), number + 1), None


def layers(parameters, stream, rows, first):
    """Depends on the layers' numbers, as dropout does."""
    return jax.lax.scan(layer, (stream[0], jnp.asarray(first, stream[0].dtype)), parameters["w"])[0][0], None


# The table is used before the layers and behind them, as a tied embedding is.
PARTS = Parts(
    lambda parameters, rows: (parameters["table"][rows["tokens"]], None),
    layers,
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


def pipeline(name: str, stages: int, chunks: int = 1) -> Pipeline:
    mesh = make_mesh(data=1, stage=stages, devices=jax.devices()[:stages])
    layered = {"table": False, "scale": False, "w": True}
    return Pipeline(Schedule(name, stages, chunks), mesh, layered, lambda x: x)


@pytest.fixture(scope="module")
def expected(problem):
    run = sums(Spread())
    return {count: run(*problem, jnp.int32(count)) for count in range(1, K_MAX + 1)}


SLOW = [
    pytest.param(*of, marks=pytest.mark.slow)
    for of in (("gpipe", 2, 1), ("1f1b", 4, 1), ("gpipe", 4, 1), ("interleaved", 4, 2), ("interleaved", 2, 4))
]


@pytest.mark.parametrize(("name", "stages", "chunks"), [("1f1b", 2, 1), ("interleaved", 2, 2), *SLOW])
def test_sums_equal_those_of_one_device_at_every_count(problem, expected, name, stages, chunks):
    run = sums(Spread(pipeline=pipeline(name, stages, chunks)))
    for count, alone in expected.items():
        # The same sums in another order.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), run(*problem, jnp.int32(count)), alone
        )
    assert run._cache_size() == 1


# In bfloat16 a program rounds where it ends a fusion, which two programs do in other places: of a loss of 40 by 2^-8.
@pytest.mark.parametrize(
    ("dtype", "off_by", "schedule"),
    [(jnp.float32, 1e-5, ("1f1b", 2)), (jnp.float32, 1e-5, ("interleaved", 2, 2)), (jnp.bfloat16, 2**-6, ("1f1b", 2))],
)
def test_evaluation_goes_through_the_stages(problem, dtype, off_by, schedule):
    parts = PARTS.of(lambda parameters: jax.tree.map(lambda x: x.astype(dtype), parameters))
    parameters, rows = problem
    found = jax.jit(lambda *of: evaluate_through_stages(pipeline(*schedule), parts, *of))(parameters, rows)
    one = jax.jit(parts)
    each = [one(parameters, {name: x[i] for name, x in rows.items()}) for i in range(K_MAX)]
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, sum(b), rtol=off_by, atol=20 * off_by), found, *each)
