"""Told before it begins: what a run will be, and every setting that there is."""

import dataclasses
import re

import jax
import pytest

from crescendo import optim, parallel
from crescendo.experiments import describe
from crescendo.experiments import train as train_module
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs.settings import settings
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.planning.activations import activation_bytes
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.training import train
from crescendo.models import ModelConfig

SMALL = ModelConfig(vocab_size=128, width=16, layers=2, heads=2, kv_heads=1, mlp_width=32)


@pytest.fixture
def typed(small_bindings) -> list[str]:
    return [part for binding in small_bindings for part in ("--set", binding)]


def test_a_dry_run_says_what_the_run_will_be_and_writes_nothing(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_module.main(["--dry-run", "--run", str(tmp_path / "run"), *typed, "--set", "train.mesh = @mesh()"])
    shown = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "train.total_examples = 512\n" in shown  # a macro's value
    assert "linear.end_fraction = 0.0\n" in shown  # a default
    assert re.search(r"512 examples, 16,384 tokens: [\d.,]+ passes over the [\d,]+ rows, in 32 steps", shown)
    parts = [float(number) for number in re.findall(r"│ +([\d.]+) │\n", shown)]
    assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=0.003)
    assert re.search(r"GiB on a device at the peak, by the compiler's count", shown)
    assert "name a device with --device" in shown


def test_a_run_is_planned_for_devices_that_are_not_here(typed, capsys):
    options = ["--device", "h100", "--devices", "4", "--mfu", "0.5", "--dollars-per-hour", "3"]
    typed = [*typed, "--set", "train.mesh = @mesh()", "--set", "mesh.data = 1", "--set", "mesh.fsdp = -1"]
    describe.main(["--config", "debug.gin", *typed, *options])
    shown = capsys.readouterr().out
    assert "on 4 x H100" in shown
    assert re.search(r"^fits: [\d.]+ of the 80.0 GiB of one H100$", shown, re.MULTILINE)
    flops = float(re.search(r"([\d.e+]+) FLOPs in all", shown)[1])
    hours, dollars = map(float, re.search(r": ([\d.]+) device hours, ([\d.]+) dollars", shown).groups())
    assert hours == pytest.approx(flops / (989e12 * 0.5) / 3600, abs=0.005)
    assert dollars == pytest.approx(3 * hours, abs=0.02)


def test_the_plan_of_a_pipeline_says_what_its_schedule_costs(typed, capsys):
    of_run = ["model.layers = 2", "train.mesh = @mesh()", "mesh.stage = 2", "mesh.data = 2"]
    typed = [*typed, *(part for binding in of_run for part in ("--set", binding))]
    describe.main(["--config", "debug.gin", *typed, "--device", "h100", "--devices", "4"])
    said = r"^2 stages, 1f1b: \d+% of the time is idle, the inputs of 3 passes are kept$"
    assert re.search(said, capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (train_module.main, ["--dry-run", "--device", "abacus"], "--device abacus: known are A10, "),
        (train_module.main, ["--dry-run", "--device", "H100", "--mfu", "0"], r"--mfu 0\.0 must be above 0"),
        (train_module.main, ["--dry-run", "--device", "H100", "--devices", "0"], "--devices 0 must be at least 1"),
        (train_module.main, ["--dry-run", "--devices", "8"], "--devices 8 needs --device NAME"),
        (train_module.main, ["--device", "H100"], "--device is of a plan: add --dry-run"),
        (train_module.main, ["--dry-run", "--set", "LEARNING_RTE = 1"], "nearest: LEARNING_RATE"),
        (train_module.main, ["--list", "learning_rte"], "--list learning_rte: no setting"),
        (describe.main, ["--config", "debug.gin", "--fsdp", "4"], "--fsdp is of a mesh, and a config says its own"),
        (describe.main, ["--set", "LEARNING_RTE = 1"], "nearest: LEARNING_RATE"),
        (describe.main, ["--model", "1b", "--mfu", "0.5"], "--mfu is of a config"),
        (describe.main, ["124m", "--device", "abacus"], "--device abacus: known are"),
    ],
)
def test_mistakes_are_one_line(command, options, message):
    with pytest.raises(UserError, match=message) as refused:
        command(options)
    assert "\n" not in str(refused.value)


def test_data_of_less_than_a_batch_are_refused_as_the_run_would(typed, tmp_path):
    few = [*typed, "--set", "train.batch_size = 65536", "--set", "TOTAL_EXAMPLES = 131072"]
    for command in (["--dry-run", "--device", "H100"], ["--run", str(tmp_path / "run")]):
        with pytest.raises(UserError, match=r"the data have \d+ rows, fewer than one batch of 65536"):
            train_module.main([*command, *few])


def test_a_model_over_a_mesh_says_whether_it_fits(capsys):
    for fsdp, remat, verdict in (
        (8, "full", "does not fit: "),
        (32, "none", "may not fit: up to "),
        (512, "full", "fits: "),
    ):
        mesh = ["--model", "70b", "--devices", str(fsdp), "--batch-size", str(fsdp), "--remat", remat]
        describe.main([*mesh, "--device", "H100"])
        shown = capsys.readouterr().out
        assert "activations of a microbatch" in shown
        assert verdict in shown
    describe.main(["124m", "--device", "A100"])
    assert "of the 80.0 GiB of one A100, activations not counted" in capsys.readouterr().out


def kept(examples: int = 4, **changes) -> float:
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    model = dataclasses.replace(SMALL, **changes)
    options = {"data": RandomText(128, 16), "optimizer": optim.adamw(1e-2), "batch_size": examples, "mesh": mesh}
    session = Session(model=model, total_examples=64, **options)
    return activation_bytes(session, parallel.BatchPlan(examples, 1))


def test_activations_grow_with_the_microbatch_and_shrink_by_recomputing():
    assert kept(8) == pytest.approx(2 * kept(4), rel=0.05)
    assert kept(layers=4) > 1.5 * kept()
    inputs = 2 * 4 * 16 * 16 * 4  # layers x examples x tokens x width, float32
    assert inputs <= kept(remat="full") < kept(remat="dots") < kept()


def test_every_setting_is_listed_with_its_default_and_a_line(capsys):
    every = {setting.name: setting for setting in settings(train)}
    assert [name for name, setting in every.items() if not setting.says] == []
    assert every["train.seed"].default == "0"
    assert every["train.task"].default == "@language_model"
    assert every["adamw.learning_rate"].default == "required"
    assert every["nadamw.b1"].says == every["adamw.b1"].says
    assert not {"train.run", "train.operative_config", "train.written"} & set(every)
    configurables.bind(train, ["debug.gin"])
    for name in configurables.resolved(train).splitlines():
        called = name.partition(" = ")[0]
        assert called in every or called.replace("linear.", "schedules.linear.") in every, name
    train_module.main(["--list", "Max_Gradient"])
    assert re.search(r"train.max_gradient_norm +1.0 +above 0 +clip the mean gradient", capsys.readouterr().out)
