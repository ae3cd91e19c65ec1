"""Masked tokens, by BERT's choice and by diffusion: the draws, the meshes, and what is measured."""

import jax
import numpy as np
import pytest

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.tasks.base import Context, padded_rows
from crescendo.experiments.tasks.language_model import language_model
from crescendo.experiments.tasks.masked_diffusion import masked_diffusion
from crescendo.experiments.tasks.masked_lm import masked_lm

from .conftest import MESHES, assert_any_cut, assert_same_on, assert_same_through_stages, fresh, read

TASKS = {"masked_lm": masked_lm, "masked_diffusion": masked_diffusion}


@pytest.fixture(params=TASKS)
def make(request, text, small_model):
    return lambda **changes: TASKS[request.param](text, small_model(**changes))


def test_they_say_what_they_are(make, text, small_model):
    task = make()
    assert TASKS[task.name]
    assert (task.unit, task.units_per_example, list(task.held_out)) == ("token", 16, ["validation"])
    assert task.flops_per_example > language_model(text, small_model()).flops_per_example  # attention both ways
    assert task.fingerprint != language_model(text, small_model()).fingerprint
    assert task.mask_token == text.vocab_size < task.config.vocab_size


def test_a_full_vocabulary_gets_rows_for_the_mask_token(text, small_model):
    text = type(text)(**{**vars(text), "vocab_size": 128})
    assert masked_lm(text, small_model()).config.vocab_size == 256
    assert language_model(text, small_model()).config.vocab_size == 128


# Quick are the draws by themselves, below, and the decoder that these share with `test_language_model.py`.
@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_any_mesh_will_do(make, mesh):
    task = make(dropout=0.2, z_loss=1e-3)
    # Diffusion weighs its terms by 1 / t: they round by their own size, and cancel in part (1.7e-5 was seen on a CPU).
    tolerance = 3e-5 if task.name == "masked_diffusion" else 1e-5
    assert_same_on(task, MESHES[mesh], read(task.train, range(4)), tolerance=tolerance)


@pytest.mark.slow
def test_stages_will_do(make):
    task = make(dropout=0.2, z_loss=1e-3)
    assert_same_through_stages(task, read(task.train, range(4)), tolerance=3e-5)  # as above


# Quick neighbours: test_diffusion's and test_encoder's draws that follow the example, and the held-out rows below.
@pytest.mark.slow
@pytest.mark.parametrize("make", ["masked_lm", "masked_diffusion"], indirect=True)
def test_draws_are_functions_of_seed_and_example(make):
    task = make()
    rows, parameters = read(task.train, range(4)), fresh(task)
    whole = assert_any_cut(task, rows, seed=1)
    loss = jax.jit(lambda rows, seed: task.loss(parameters, rows, Context(seed=seed)).sum)
    for other, seed in ((rows, 2), (rows | {"example": rows["example"] + 100}, 1)):
        assert whole.sum != loss(other, seed)
    np.testing.assert_allclose(loss(rows, 1), whole.sum, rtol=1e-6)


# BERT's scores are quick to see in `models/test_encoder.py`.
@pytest.mark.parametrize("make", [pytest.param("masked_lm", marks=pytest.mark.slow), "masked_diffusion"], indirect=True)
def test_held_out_rows_are_masked_alike_every_time_and_padding_weighs_nothing(make):
    task = make()
    parameters = fresh(task)
    evaluate = jax.jit(lambda rows, seed: task.evaluate(parameters, rows, Context(seed=seed)))
    rows = read(task.held_out["validation"], range(4))
    measured = evaluate(rows, 1)
    assert measured.keys() == {"loss", "accuracy"}
    assert measured == evaluate(rows, 2)
    padded = padded_rows(task.held_out["validation"], np.arange(4), 6) | {"example": np.arange(6, dtype=np.int32)}
    found = evaluate(padded, 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, measured)


def test_a_mask_fraction_out_of_its_range_is_refused(text, small_model):
    for fraction in (0, 1.5):
        with pytest.raises(UserError, match=f"mask_fraction = {fraction} must be above 0 and at most 1"):
            masked_lm(text, small_model(), mask_fraction=fraction)
    assert masked_lm(text, small_model(), mask_fraction=0.3).fingerprint != masked_lm(text, small_model()).fingerprint
