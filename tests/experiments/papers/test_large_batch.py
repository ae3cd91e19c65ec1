"""The large-batch experiment: every optimizer learns, cells are run once, and the summary follows from the records."""

import dataclasses
import functools
import gzip
import json
import struct
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from crescendo import optim
from crescendo.experiments.data.fashion_mnist import read_fashion_mnist
from crescendo.experiments.data.npz import Expected
from crescendo.experiments.papers import large_batch as experiment
from crescendo.experiments.papers.large_batch import Cell, example_order, large_batch
from crescendo.experiments.papers.large_batch import recipes as large_batch_tasks
from crescendo.experiments.papers.large_batch.recipes import TASKS, load_prepared, save_prepared, split
from crescendo.experiments.papers.large_batch.results import draw, kept_batch_size, summarize, table
from crescendo.experiments.runs.results import Results
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.interruption import Interrupted
from crescendo.experiments.sweeps.batched import make_sweep
from crescendo.experiments.tasks.base import Loss, RowArray
from crescendo.models import ModelConfig
from crescendo.models.resnet import ResNetConfig

TINY = {
    "mlm": ModelConfig(vocab_size=64, width=8, layers=1, heads=1, kv_heads=1, mlp_width=8),
    "images": ResNetConfig(classes=4, width=2, blocks=1, group_width=2),
}


def tiny_data(task: str) -> dict[str, np.ndarray]:
    """Rows of one repeated letter, or pictures whose quarter tells the class."""
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, examples in {"train": 64, "validation": 24, "test": 20}.items():
        labels = random.integers(0, 4, size=examples)
        if task == "mlm":
            tokens = np.repeat(labels[:, None], 8, axis=1).astype(np.int16)
            arrays[f"{name}/tokens"] = tokens
            arrays[f"{name}/segment_ids"] = np.ones_like(tokens)
            arrays[f"{name}/positions"] = np.tile(np.arange(8, dtype=np.int16), (examples, 1))
        else:
            images = random.integers(0, 100, size=(examples, 8, 8, 1)).astype(np.uint8)
            images[np.arange(examples), 4 * (labels // 2) + 1, 4 * (labels % 2) + 1] = 255
            arrays[f"{name}/images"], arrays[f"{name}/labels"] = images, labels.astype(np.uint8)
    return arrays | ({"mask_token": np.int16(5)} if task == "mlm" else {})


class Quadratic:
    """One matrix and one vector, fitted to the rows' mean: every optimizer compiles in no time."""

    row: ClassVar = {"x": RowArray((3,), "float32", (None,))}

    def initialize(self, key):
        return {"matrix": 0.1 * jax.random.normal(key, (2, 3)), "scale": jnp.zeros(3)}

    def logical_axes(self):
        return {"matrix": ("in_channels", "channels"), "scale": ("channels",)}

    def loss(self, parameters, rows, context):
        return Loss(jnp.sum(self._errors(parameters, rows)), jnp.float32(len(rows["x"])))

    def evaluate(self, parameters, rows, context):
        errors, weight = self._errors(parameters, rows), jnp.float32(len(rows["x"]))
        return {"loss": (jnp.sum(errors), weight), "accuracy": (jnp.sum(errors < 3, dtype=jnp.float32), weight)}

    def _errors(self, parameters, rows):
        return jnp.sum((rows["x"] - parameters["matrix"].sum(0) - parameters["scale"]) ** 2, axis=-1)


def sweep_of(task, name, recipe, most, *, side_by_side=False):
    make = functools.partial(optim.OPTIMIZERS[name], **recipe.options)
    return jax.jit(make_sweep(task, make, most, warmup_fraction=0.1, side_by_side=side_by_side))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A file of data for the task "toy": the quadratic, by the recipes of the pictures."""
    x = np.random.default_rng(0).normal(loc=1.0, size=(108, 3)).astype(np.float32)
    arrays = {"train/x": x[:64], "validation/x": x[64:88], "test/x": x[88:]}
    of_toy = {"arrays": {"x": Expected("f", 2)}, "make": lambda model, arrays: Quadratic()}
    toy = dataclasses.replace(TASKS["images"], name="toy", **of_toy)
    monkeypatch.setitem(TASKS, "toy", toy)
    path = tmp_path / "toy.npz"
    save_prepared(path, toy, arrays)
    return path


@pytest.mark.parametrize("name", TASKS["images"].recipes)
def test_every_optimizer_learns_at_its_rate_and_each_member_of_a_sweep_at_its_own(name):
    x = np.random.default_rng(0).normal(loc=1.0, scale=0.1, size=(64, 3)).astype(np.float32)
    recipe = TASKS["images"].recipes[name]
    sweep = sweep_of(Quadratic(), name, recipe, 2)
    order = example_order(64, 64 * 40, 4, seed=0)
    peaks = np.float32([0.0, recipe.learning_rate])
    losses, scores = sweep({"x": x}, {"x": x[:5]}, order, np.int32(2), peaks, np.uint32(0))
    assert scores.shape == (2, 5, 3)
    assert losses.shape == (2, 640)
    assert not losses[:, 320:].any()
    still, moving = losses[:, :320]
    assert moving[0] == still[0]
    assert np.mean(moving[-20:]) < 0.6 * np.mean(still[-20:])


def test_side_by_side_is_the_same_as_one_after_the_other():
    x = np.random.default_rng(0).normal(loc=1.0, size=(64, 3)).astype(np.float32)
    order, peaks = example_order(64, 128, 8, seed=0), np.float32([0.1, 0.2, 0.4])
    recipe = TASKS["images"].recipes["lamb"]
    both = [
        sweep_of(Quadratic(), "lamb", recipe, 2, side_by_side=flag)(
            {"x": x}, {"x": x}, order, np.int32(2), peaks, np.uint32(3)
        )
        for flag in (True, False)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *both)


def test_the_microbatch_changes_nothing_and_one_program_serves_every_batch_size():
    x = np.random.default_rng(0).normal(loc=1.0, size=(64, 3)).astype(np.float32)
    peaks, recipe = np.float32([0.1]), TASKS["images"].recipes["adamw"]

    def sweep(most):
        return sweep_of(Quadratic(), "adamw", recipe, most)

    def scores(program, microbatch, count):
        order = example_order(64, 136, microbatch, seed=0)
        return program({"x": x}, {"x": x}, order, np.int32(count), peaks, 3)[1]

    shared = sweep(8)
    for batch_size in (2, 16):
        alone = scores(sweep(1), batch_size, 1)
        np.testing.assert_allclose(scores(shared, 2, batch_size // 2), alone, rtol=1e-5, atol=1e-6)
    assert shared._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize(("task", "optimizer"), [("mlm", "lamb"), ("images", "adamw")])
def test_a_task_learns(task, optimizer):
    arrays = tiny_data(task)
    recipe = TASKS[task].recipes[optimizer]
    sweep = sweep_of(TASKS[task].make(TINY[task], arrays), optimizer, recipe, 1)
    order = example_order(64, 64 * 40, 16, seed=0)
    rate = np.float32([4 * recipe.learning_rate])
    (losses,), (scores,) = sweep(
        split(arrays, "train", None), split(arrays, "test", None), order, np.int32(1), rate, np.uint32(0)
    )
    assert np.mean(losses[-10:]) < 0.75 * losses[0]
    loss, correct, weight = scores.sum(0)
    assert correct / weight > 0.5  # chance is 0.25
    assert loss / weight < losses[0]


def test_a_finished_cell_is_never_run_again(data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    settings = {"size": "debug", "data": data, "optimizers": ["lamb"], "multipliers": [4.0, 8.0], "epochs": 24.0}
    with pytest.raises(Interrupted, match="1 of 2 cells are left"):
        large_batch("toy", folder, batch_sizes=[16, 64], minutes=1e-6, **settings)
    first = Results(folder, "cells.jsonl", Cell).records
    assert list(first) == [Cell("lamb", 16, 0)]
    (record,) = first.values()
    assert record["steps"] == 96
    for run in record["runs"]:
        assert run["train_loss"] < run["first_loss"]

    # The second cell's line torn by a kill: it is run again, the first is not.
    with open(folder / "cells.jsonl", "a") as cells:
        cells.write('\n{"optimizer": "la')
    ran = []
    run_cell = experiment.Programs.run
    monkeypatch.setattr(
        experiment.Programs, "run", lambda self, cell, *rest: ran.append(cell) or run_cell(self, cell, *rest)
    )
    summary = large_batch("toy", folder, batch_sizes=[16, 64], **settings)
    assert ran == [Cell("lamb", 64, 0)]
    assert Results(folder, "cells.jsonl", Cell).records[Cell("lamb", 16, 0)] == record
    assert large_batch("toy", folder, batch_sizes=[16, 64], **settings) == summary
    assert len(ran) == 1
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(summary))
    assert (folder / "large_batch.png").stat().st_size > 10_000
    assert "2/2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"multipliers was \[4\.0, 8\.0\] and is now \[1\.0\]"):
        large_batch("toy", folder, batch_sizes=[16], **settings | {"multipliers": [1.0]})


def record(optimizer: str, batch_size: int, accuracies: list[float | None], seed: int = 0) -> dict:
    """A finished cell; accuracy on the test split is 0.01 below that on the validation split."""
    return {
        "optimizer": optimizer,
        "batch_size": batch_size,
        "seed": seed,
        "steps": 7,
        "seconds": 1.5,
        "runs": [
            {
                "multiplier": 2.0**i,
                "learning_rate": 0.1 * 2**i,
                "train_loss": 1.0,
                "validation_accuracy": accuracy,
                "test_accuracy": None if accuracy is None else accuracy - 0.01,
                "test_loss": None if accuracy is None else 1 - accuracy,
            }
            for i, accuracy in enumerate(accuracies)
        ],
    }


FIXED = {"multipliers": [1.0, 2.0, 4.0], "total_examples": 640, "train_examples": 64}


def test_the_summary_takes_what_validation_chose_and_averages_seeds():
    records = [
        record("lamb", 32, [0.90, 0.91, 0.89]),
        record("lamb", 32, [0.93, 0.91, 0.89], seed=1),
        record("lamb", 512, [None, 0.91, 0.92]),
        record("lamb", 512, [0.99, 0.91, 0.92], seed=1),
        record("adamw", 32, [0.95, 0.96, 0.95]),
        record("adamw", 512, [None, None, None]),
    ]
    summary = summarize(records, TASKS["mlm"], FIXED)
    points = {(p["optimizer"], p["batch_size"]): p for p in summary["points"]}
    assert [point["multiplier"] for point in points.values()] == [2.0, 1.0, 1.0, 4.0]
    assert points["lamb", 32]["accuracy"] == pytest.approx(0.905)
    assert points["lamb", 32]["accuracies"] == pytest.approx([0.89, 0.92])
    assert points["lamb", 512]["at_edge"]
    assert not points["adamw", 32]["at_edge"]
    assert points["adamw", 512]["accuracy"] is None
    assert summary["kept_to"] == {"adamw": 32, "lamb": 512}

    console = Console(width=120, record=True)
    console.print(table(summary))
    shown = console.export_text()
    for expected in ("95.00% (2)", "diverged", "90.50% (1!)", "91.00% (4!)"):
        assert expected in shown
    assert draw(summary).startswith(b"\x89PNG")


def test_quality_must_hold_at_every_batch_size_on_the_way():
    assert kept_batch_size({32: 0.90, 128: 0.88, 512: 0.90}) == 32
    assert kept_batch_size({512: 0.895, 32: 0.90, 128: 0.8911}) == 512
    assert kept_batch_size({32: None, 128: 0.9}) is None


def test_every_batch_size_reads_the_same_examples_in_the_same_order():
    small, large = (example_order(10, 45, size, seed=1) for size in (3, 8))
    assert small.shape == (15, 3)
    assert large.shape == (5, 8)
    np.testing.assert_array_equal(small.ravel()[:40], large.ravel())
    assert sorted(small.ravel()[:10]) == list(range(10))
    assert np.any(example_order(10, 45, 3, seed=2) != small)


def test_learning_rates_follow_each_ones_rule():
    task = TASKS["images"]
    programs = experiment.Programs(task, task.sizes["debug"], Quadratic(), [0.5, 1.0], 64, None, 64)
    base = task.base_batch_size
    for name, growth in {"sgd": 4.0, "adamw": 2.0, "lamb": 2.0, "lion": 2.0, "lars": 2.0}.items():
        before, after = (programs.peaks(Cell(name, size, 0)) for size in (base, 4 * base))
        np.testing.assert_allclose(before, task.recipes[name].learning_rate * np.array([0.5, 1.0]), rtol=1e-6)
        np.testing.assert_allclose(after / before, growth, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "text"}, "--task text: no such task; there are mlm, images, toy"),
        ({"size": "huge"}, "--size huge: no such size; there are full, debug"),
        ({"optimizers": ["adam"]}, "--optimizers adam: no such optimizer; the task has sgd, adamw, lars, lamb, lion"),
        ({"batch_sizes": [16, 65]}, r"--batch-sizes 65 is larger than the data \(64 training examples"),
        ({"batch_sizes": [16, 0]}, "--batch-sizes 0 must be above 0"),
        ({"multipliers": [1.0, -2.0]}, r"--multipliers -2\.0 must be above 0"),
        ({"multipliers": [float("nan")]}, "--multipliers nan must be above 0"),
        ({"epochs": 0.0}, r"--epochs 0\.0 must be above 0"),
        ({"seeds": 0}, "--seeds 0 must be above 0"),
        ({"minutes": -1.0}, r"--minutes -1\.0 must be above 0"),
        ({"train_examples": 0}, "--train-examples 0 must be above 0"),
        ({"data": "nowhere.npz"}, r"cannot read nowhere\.npz: No such file"),
    ],
)
def test_bad_values_are_refused(arguments, message, data, tmp_path):
    given = {"task": "toy", "size": "debug", "data": data, "batch_sizes": [16]} | arguments
    with pytest.raises(UserError, match=message):
        large_batch(run=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_data_of_another_task_or_no_data_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="holds no data of the task images"):
        load_prepared(data, TASKS["images"])
    (tmp_path / "other.npz").write_bytes(b"not a zip file")
    with pytest.raises(UserError, match=r"other\.npz is no \.npz file"):
        load_prepared(tmp_path / "other.npz", TASKS["images"])


def test_the_command_ends_with_code_2_and_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: experiment.main(["--task", "text"]))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --task text: no such task; there are mlm, images\n"


def write_idx(folder, name: str, array: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx_folder(tmp_path):
    random = np.random.default_rng(0)
    for name, examples in {"train": 6, "t10k": 3}.items():
        images = random.integers(0, 256, size=(examples, 28, 28), dtype=np.uint8)
        write_idx(tmp_path, f"{name}-images-idx3", images)
        write_idx(tmp_path, f"{name}-labels-idx1", np.arange(examples, dtype=np.uint8))
        Image.fromarray(images[2]).save(tmp_path / f"{name}.png")
    return tmp_path


def test_idx_files_are_read(idx_folder):
    for split_name, prefix, examples in (("train", "train", 6), ("test", "t10k", 3)):
        images, labels = read_fashion_mnist(split_name, idx_directory=idx_folder)
        assert images.shape == (examples, 28, 28, 1)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(labels, np.arange(examples))
        np.testing.assert_array_equal(images[2, ..., 0], np.asarray(Image.open(idx_folder / f"{prefix}.png")))


def test_missing_and_damaged_idx_files_are_named(idx_folder, tmp_path):
    with pytest.raises(UserError, match='no split "validation": use train or test'):
        read_fashion_mnist("validation", idx_directory=idx_folder)
    labels = idx_folder / "t10k-labels-idx1-ubyte.gz"
    whole = gzip.decompress(labels.read_bytes())
    write_idx(idx_folder, "t10k-labels-idx1", np.zeros(2, np.uint8))
    with pytest.raises(UserError, match="3 images but 2 labels"):
        read_fashion_mnist("test", idx_directory=idx_folder)
    for content in (gzip.compress(whole[:-1]), gzip.compress(b"text"), gzip.compress(b"")):
        labels.write_bytes(content)
        with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz is not an IDX file of bytes"):
            read_fashion_mnist("test", idx_directory=idx_folder)
    labels.write_bytes(b"\x1f\x8b broken")
    with pytest.raises(UserError, match="can't read"):
        read_fashion_mnist("test", idx_directory=idx_folder)
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        read_fashion_mnist("test", idx_directory=tmp_path / "nowhere")


def test_prepared_pictures_are_split_three_ways(idx_folder, monkeypatch):
    monkeypatch.setattr(large_batch_tasks, "VALIDATION_IMAGES", 2)
    from_folder = functools.partial(read_fashion_mnist, idx_directory=idx_folder)
    monkeypatch.setattr(large_batch_tasks, "read_fashion_mnist", from_folder)
    arrays = TASKS["images"].prepare()
    labels = {name: split(arrays, name, None)["labels"].tolist() for name in ("train", "validation", "test")}
    assert sorted(labels["train"] + labels["validation"]) == list(range(6))
    assert len(labels["validation"]) == 2
    assert labels["test"] == [0, 1, 2]
    assert len(split(arrays, "train", 3)["images"]) == 3
