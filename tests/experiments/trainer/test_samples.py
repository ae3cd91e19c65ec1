"""Texts that a run writes as it trains: by the clock, and without a trace in the training."""

import json

import pytest

from crescendo import optim
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.reports.write import write_report
from crescendo.experiments.runs import trained
from crescendo.experiments.runs.generation import generate, stream
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.tasks.masked_lm import masked_lm
from crescendo.experiments.trainer.probes.samples import samples
from crescendo.experiments.trainer.session import Session
from crescendo.models import ModelConfig

SELDOM = "train.evaluate_every_examples = 512"
SAMPLES = (
    "train.probes = [@samples()]",
    "samples.every_examples = 256",
    "samples.prompts = ['batch', '', '']",
    "samples.tokens = 12",
)


@pytest.fixture(scope="module")
def sampled(train_small, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "sampled"
    train_small(run, SELDOM, *SAMPLES)
    return run


@pytest.mark.slow
def test_samples_are_recorded_and_change_nothing(sampled, train_small, records, tmp_path):
    train_small(tmp_path / "plain", SELDOM)
    written = [record for record in records(sampled) if record["kind"] == "sample"]
    assert [(each["examples_seen"], each["prompt"]) for each in written] == [
        *((256, "batch"), (256, ""), (256, "")),
        *((512, "batch"), (512, ""), (512, "")),
    ]
    assert len({each["text"] for each in written}) == 6
    assert [each for each in records(sampled) if each["kind"] != "sample"] == records(tmp_path / "plain")


def test_a_sample_is_what_generating_gives_by_the_clock(sampled, records):
    last = [record for record in records(sampled) if record["kind"] == "sample"][-3:]
    model = trained.load(sampled)
    for place, sample in enumerate(last):
        tokens = generate(model, sample["prompt"], tokens=12, seed=512 + place)
        assert "".join(stream(model, sample["prompt"], tokens)) == sample["text"]


def test_the_report_shows_them_without_control_characters(sampled, tmp_path):
    with (sampled / "metrics.jsonl").open("a") as file:
        sample = {"kind": "sample", "step": 4, "examples_seen": 64, "prompt": "<b>", "text": "new\nline \x07&"}
        file.write(json.dumps(sample) + "\n")
    page = write_report([sampled], tmp_path).read_text()
    assert "<b>&lt;b&gt;</b>new\nline \ufffd&amp;</li>" in page


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        pytest.param(["train.task = @masked_lm"], "the task masked_lm writes no text", marks=pytest.mark.slow),
        (["samples.prompts = []"], r"samples.prompts = \[\] must be at least 1 long"),
        (["samples.tokens = 0"], "samples.tokens = 0 must be at least 1"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_the_first_step(train_small, tmp_path, bindings, message):
    with pytest.raises(UserError, match=message):
        train_small(tmp_path / "run", SELDOM, *SAMPLES, *bindings)
    assert not [path for path in tmp_path.rglob("metrics.jsonl") if path.stat().st_size]


def test_a_task_that_writes_no_text_is_refused_when_the_run_is_assembled():
    session = Session(
        task=masked_lm,
        data=RandomText(128, 16),
        model=ModelConfig(vocab_size=128, width=16, layers=1, heads=2, kv_heads=1, mlp_width=32),
        optimizer=optim.adamw(1e-2),
        batch_size=8,
        total_examples=64,
    )
    with pytest.raises(UserError, match="the task masked_lm writes no text"):
        samples(32).prepare(session)


@pytest.mark.slow
def test_several_devices_write_too(train_small, records, tmp_path):
    train_small(tmp_path / "run", SELDOM, *SAMPLES, "train.average_examples = 16", devices=2)
    assert sum(record["kind"] == "sample" for record in records(tmp_path / "run")) == 6
