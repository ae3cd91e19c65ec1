"""Schedules by their rules, and a small model's pipeline against the same batch on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crescendo.models.parts import Parts
from crescendo.parallel import Layout, MeshSpec, Spread, accumulate, deviations, make_mesh, strategy
from crescendo.parallel.chunks import rounds
from crescendo.parallel.pipeline import evaluate_through_stages
from crescendo.parallel.schedules import Schedule
from crescendo.parallel.stages import Pipeline

K_MAX, EXAMPLES, WIDTH, LAYERS, VOCAB = 6, 3, 4, 8, 8

schedules = st.one_of(
    st.builds(Schedule, st.sampled_from(["1f1b", "gpipe"]), st.integers(2, 9)),
    st.builds(Schedule, st.just("interleaved"), st.integers(2, 5), st.integers(2, 5)),
    st.builds(lambda n, hops: Schedule("1f1b", n * hops, one_of=n), st.integers(2, 4), st.integers(1, 5)),
)


def paths(schedule: Schedule, microbatches: int) -> np.ndarray:
    """Tick and stage of both passes through every place, `[2, microbatches, hops * chunks, 2]`; -1: none."""
    ticks = np.full((2, microbatches, schedule.hops * schedule.chunks, 2), -1)
    for which, work in enumerate(schedule.table(microbatches)):
        for tick, stage in zip(*np.nonzero(work.due), strict=True):
            place = work.chunk[tick, stage] * schedule.hops + stage // schedule.one_of
            assert ticks[which, work.microbatch[tick, stage], place, 0] == -1
            ticks[which, work.microbatch[tick, stage], place] = tick, stage
    return ticks


@given(schedules, st.integers(1, 20))
def test_what_is_sent_is_used_in_the_next_tick(schedule, microbatches):
    ticks, stages = np.moveaxis(paths(schedule, microbatches), -1, 0)
    assert (ticks >= 0).all()  # every microbatch is once in each pass of each chunk of a stage of each group
    assert (np.diff(ticks[0], axis=1) == 1).all()
    assert (np.diff(ticks[1], axis=1) == -1).all()
    assert (ticks[1, :, -1] >= ticks[0, :, -1]).all()  # the last stage's gradient comes from its own output
    np.testing.assert_array_equal(*stages)  # back by the same way
    for back, of_pass in ((False, slice(None)), (True, slice(None, None, -1))):
        routes = schedule.routes(back=back)
        sent = ticks[int(back), :, of_pass], stages[int(back), :, of_pass]
        for begin, sender, receiver in zip(
            sent[0][:, :-1].flat, sent[1][:, :-1].flat, sent[1][:, 1:].flat, strict=True
        ):
            assert (sender, receiver) in routes[begin % len(routes)]


@pytest.mark.parametrize(("stages", "one_of"), [(4, 2), (8, 2), (9, 3)])
def test_microbatches_go_all_ways(stages, one_of):
    schedule = Schedule("1f1b", stages, one_of=one_of)
    ways = one_of**schedule.hops
    taken = {tuple(way) for way in paths(schedule, ways)[0, :, :, 1].tolist()}
    assert len(taken) == ways


def test_skipped_stages_save_what_the_paper_says():
    # 2502.19913: up to 55% less time an iteration.
    half, full = (Schedule("1f1b", 4, one_of=n).passing(8) for n in (2, 1))
    assert 1 - half / full == pytest.approx(0.55, abs=0.005)


@given(schedules, st.integers(1, 20))
def test_the_share_of_idle_ticks_is_the_closed_form(schedule, microbatches):
    p, v, n = schedule.hops, schedule.chunks, schedule.one_of
    for count in (microbatches, microbatches * p * n):
        for work in schedule.table(count):
            run = work.due[work.due.any(axis=1).argmax() :][: schedule.passing(count)]
            assert run.sum() == work.due.sum()  # the passes that no stage has to do before and behind are left out
            assert run[-1].any()
            assert np.mean(~run) == pytest.approx(schedule.idle_share(count))
        if (v == 1 or count % p == 0) and count % n == 0:
            assert schedule.idle_share(count) == pytest.approx((p - 1) / (v * count / n + p - 1))


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
    p, v = schedule.hops, schedule.chunks
    made, used = (
        (work.due & schedule.leaves(np.arange(schedule.stages), work)).cumsum(axis=0) for work in (forward, backward)
    )
    assert max((made - used).max(), 1) <= finished  # also what is made and used within a tick needs a slot
    assert schedule.name == "gpipe" or kept <= (3 * v + 1) // 2 * p - v % 2  # however many microbatches there are


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "interleaved"}, "strategy.chunks = 1 interleaves nothing: use 2 or more, or '1f1b'"),
        ({"chunks": 2}, "strategy.chunks = 2 with strategy.schedule = '1f1b', .*: use 'interleaved', or chunks = 1"),
        (
            {"schedule": "gpipe", "one_of": 2},
            "strategy.one_of = 2 skips stages, .* 'gpipe' doesn't: use '1f1b', or one_",
        ),
        (
            {"one_of": 3},
            r"one_of = 3 does not divide the mesh's stage = 4: use one of \[1, 2, 4\], or a stage that 3 divides",
        ),
    ],
)
def test_what_a_schedule_has_no_use_for_is_refused(options, message):
    mesh = MeshSpec(data=1, stage=4).abstract(4)
    with pytest.raises(ValueError, match=message):
        Layout(mesh, strategy("data", **options))


def test_a_mesh_without_stages_has_none_to_skip():
    # Else a run that goes on over another mesh would train all of its layers, without a word.
    with pytest.raises(ValueError, match=r"one_of = 2 does not divide the mesh's stage = 1: .* a stage that 2 divides"):
        Layout(MeshSpec(data=4).abstract(4), strategy("data", one_of=2))


@given(st.integers(2, 9), st.integers(2, 9))
def test_every_stage_sends_and_gets_a_chunk_in_a_round(stages, chunks):
    moves = rounds(stages, chunks)
    for of_round in moves:
        assert sorted(move.held_by for move in of_round) == list(range(stages))
        assert sorted(move.used_by for move in of_round) == list(range(stages))
    ways = {move[:2]: move[2:] for of_round in moves for move in of_round}
    assert ways == {divmod(chunk, chunks): (chunk % stages, chunk // stages) for chunk in range(stages * chunks)}


def layer(carry, w, weights):
    x, number = carry
    x = x + jnp.tanh(x @ w + number / 10)
    return (x, number + 1), jnp.sum(weights[:, None] * jnp.sin(x), axis=0, dtype=jnp.float32)


def layers(parameters, stream, rows, first):
    """Depends on the layers' numbers, as dropout does, and says a vector for each, as experts do."""
    begin = stream[0], jnp.asarray(first, stream[0].dtype)
    (x, _), told = jax.lax.scan(lambda carry, w: layer(carry, w, rows["weights"]), begin, parameters["w"])
    return (x, None), {"told": told}


def finish(sums, told):
    """Each layer's with a part of its own in the loss."""
    loss_sum, weight, extra = sums
    return loss_sum + jnp.sum(jnp.cos(jnp.arange(told["told"].size)) * told["told"].ravel()), weight, extra | told


# The table is used before the layers and behind them, as a tied embedding is.
PARTS = Parts(
    lambda parameters, rows: (parameters["table"][rows["tokens"]], None),
    layers,
    lambda parameters, stream, rows: losses(parameters, stream[0], rows),
    finish,
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


def sums(spread: Spread, parts: Parts = PARTS):
    def run(parameters, rows, count):
        total = accumulate(parts, parameters, rows, count, measure=by_layer, spread=spread)
        means = jax.tree.map(lambda g: g / total.weight, total.gradients)
        return total, deviations(parts, parameters, rows, count, means, spread=spread)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def by_layer(gradients):
    return {"w": jnp.sum(jnp.square(gradients["w"]), axis=(1, 2)), "table": jnp.sum(jnp.square(gradients["table"]))}


def pipeline(name: str, stages: int, chunks: int = 1, one_of: int = 1) -> Pipeline:
    mesh = make_mesh(data=1, stage=stages, devices=jax.devices()[:stages])
    layered = {"table": False, "scale": False, "w": True}
    return Pipeline(Schedule(name, stages, chunks, one_of), mesh, layered, lambda x: x)


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


def only_on_the_way(parameters, stream, rows, first):
    """The layers that a microbatch goes through, which its rows name."""

    def some(carry, layer_on):
        w, on = layer_on
        (x, number), told = layer(carry, w, rows["weights"])
        return (jnp.where(on, x, carry[0]), number), jnp.where(on, told, 0)

    begin = stream[0], jnp.asarray(first, stream[0].dtype)
    (x, _), told = jax.lax.scan(some, begin, (parameters["w"], rows["on"]))
    return (x, None), {"told": told}


@pytest.mark.parametrize(("stages", "one_of"), [(4, 2), pytest.param(6, 3, marks=pytest.mark.slow)])
def test_a_microbatch_trains_the_stages_on_its_way(problem, stages, one_of):
    parameters, rows = problem
    layers = 2 * stages
    parameters = parameters | {"w": np.resize(parameters["w"], (layers, WIDTH, WIDTH))}
    how = pipeline("1f1b", stages, one_of=one_of)
    run = sums(Spread(pipeline=how))
    on = np.zeros((K_MAX, stages), bool)
    for microbatch, way in enumerate(paths(how.schedule, K_MAX)[0, :, :, 1]):
        on[microbatch, way] = True
    np.testing.assert_array_equal(on, how.schedule.passed(K_MAX))
    alone = sums(Spread(), dataclasses.replace(PARTS, layers=only_on_the_way))
    for count in (K_MAX, K_MAX - 1):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
            run(parameters, rows, jnp.int32(count)),
            alone(parameters, rows | {"on": np.repeat(on, 2, axis=1)}, jnp.int32(count)),
        )


# In bfloat16 a program rounds where it ends a fusion, which two programs do in other places: of a loss of 40 by 2^-8.
@pytest.mark.parametrize(
    ("dtype", "off_by", "schedule"),
    [
        (jnp.float32, 1e-5, ("1f1b", 2)),
        (jnp.float32, 1e-5, ("interleaved", 2, 2)),
        (jnp.float32, 1e-5, ("1f1b", 2, 1, 2)),
        (jnp.bfloat16, 2**-6, ("1f1b", 2)),
    ],
)
def test_evaluation_goes_through_the_stages(problem, dtype, off_by, schedule):
    parts = PARTS.of(lambda parameters: jax.tree.map(lambda x: x.astype(dtype), parameters))
    parameters, rows = problem
    found = jax.jit(lambda *of: evaluate_through_stages(pipeline(*schedule), parts, *of))(parameters, rows)
    one = jax.jit(parts)
    each = [one(parameters, {name: x[i] for name, x in rows.items()}) for i in range(K_MAX)]
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, sum(b), rtol=off_by, atol=20 * off_by), found, *each)
