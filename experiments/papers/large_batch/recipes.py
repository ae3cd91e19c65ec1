"""The two tasks of the large-batch experiment: their data, models and learning rates."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from crescendo.experiments.data.fashion_mnist import read_fashion_mnist
from crescendo.experiments.data.npz import Expected, check_arrays, read_npz
from crescendo.experiments.data.rows import Source
from crescendo.experiments.data.text_data import text_data
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access
from crescendo.experiments.tasks.base import Task
from crescendo.experiments.tasks.images import images
from crescendo.experiments.tasks.masked_lm import masked_lm
from crescendo.models import ModelConfig
from crescendo.models.resnet import ResNetConfig

# Of the 60,000 training pictures, those that choose the learning rate.
VALIDATION_IMAGES = 5000
TEXT_HELD_OUT = 0.1
TEXT_LENGTH = 128
SPLITS = ("train", "validation", "test")

# The trust ratio gives a layer's step a length of its own, so LARS' rate follows the batch as Adam's does; and what has
# no ratio (norm scales) moves by plain SGD, so the coefficient is chosen for a rate that suits SGD.
LARS = MappingProxyType({"trust_coefficient": 0.02, "weight_decay": 5e-4})

Arrays = dict[str, np.ndarray]


class Recipe(NamedTuple):
    """An optimizer's settings.

    Attributes:
      learning_rate: the peak at the task's base batch size, before the sweep.
      rule: how it follows the batch size, as `optim.learning_rate_factor` takes it.
      options: of the optimizer, where they aren't its defaults.
    """

    learning_rate: float
    rule: str
    options: Mapping[str, float] = MappingProxyType({})


class Size(NamedTuple):
    """How large an experiment is.

    Attributes:
      model: the model's configuration.
      batch_sizes: in examples.
      epochs: over the training examples, the same for every batch size.
      max_microbatch_examples: what fits the device, times the learning rates that train side by side.
      train_examples: at most so many of the data; None: all.
      held_out_examples: likewise for the validation and the test split each.
    """

    model: Any
    batch_sizes: tuple[int, ...]
    epochs: float
    max_microbatch_examples: int
    train_examples: int | None = None
    held_out_examples: int | None = None


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained, on what, and how its quality is measured.

    Attributes:
      name: a key of `TASKS`.
      title: for people.
      unit: what the loss and the accuracy are taken over.
      sizes: "full", for one GPU, and "debug", for a CPU.
      recipes: by optimizer.
      optimizers: those compared unless others are asked for.
      base_batch_size: the batch that the recipes' learning rates are meant for; in the middle of the range, so that
        the rules have to carry them half as far.
      prepare: reads the data, `SPLIT/NAME` -> array for the splits train, validation and test; what is no split's has a
        plain name.
      arrays: of a split, by name: what files of prepared data must have for each.
      shared_arrays: what is no split's.
      make: `(model configuration, arrays) -> Task`.
      side_by_side: whether the learning rates of a sweep train in one batched program, on accelerators. Matrix products
        batch well there; convolutions with a kernel for each member become grouped ones, which are slow.
    """

    name: str
    title: str
    unit: str
    sizes: dict[str, Size]
    recipes: dict[str, Recipe]
    optimizers: tuple[str, ...]
    base_batch_size: int
    prepare: Callable[[], Arrays]
    arrays: Mapping[str, Expected]
    shared_arrays: Mapping[str, Expected]
    make: Callable[[Any, Arrays], Task]
    side_by_side: bool


def prepare_text() -> Arrays:
    """The standard library's source as bytes, in shuffled rows; half of the held-out rows for each of the two uses."""
    data = text_data(tokenizer="bytes", sequence_length=TEXT_LENGTH, validation_fraction=TEXT_HELD_OUT)
    random = np.random.default_rng(0)

    def shuffled(rows: Source) -> Arrays:
        batch = rows.take(random.permutation(len(rows)))
        return {name: batch[name].astype(np.int16) for name in ("tokens", "segment_ids", "positions")}

    train, held_out = shuffled(data.train), shuffled(data.validation)
    half = len(data.validation) // 2
    return {
        "mask_token": np.int16(data.vocab_size),  # type: ignore[dict-item]
        **{f"train/{name}": array for name, array in train.items()},
        **{f"validation/{name}": array[:half] for name, array in held_out.items()},
        **{f"test/{name}": array[half:] for name, array in held_out.items()},
    }


def prepare_images() -> Arrays:
    """Fashion-MNIST, the training pictures shuffled and the last of them kept for validation."""
    images, labels = read_fashion_mnist("train")
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order].astype(np.uint8)
    test_images, test_labels = read_fashion_mnist("test")
    return {
        "train/images": images[:-VALIDATION_IMAGES],
        "train/labels": labels[:-VALIDATION_IMAGES],
        "validation/images": images[-VALIDATION_IMAGES:],
        "validation/labels": labels[-VALIDATION_IMAGES:],
        "test/images": test_images,
        "test/labels": test_labels.astype(np.uint8),
    }


class PreparedText(NamedTuple):
    """What a text task wants to know of prepared rows, which the sweep has on the device."""

    vocab_size: int
    sequence_length: int
    fingerprint: str
    train: Any = None
    held_out: Mapping[str, Any] = MappingProxyType({})


class PreparedImages(NamedTuple):
    """Likewise for pictures."""

    shape: tuple[int, int, int]
    classes: int
    fingerprint: str
    train: Any = None
    validation: Any = None
    test: Any = None


def make_masked_lm(model: ModelConfig, arrays: Arrays) -> Task:
    """An encoder over bytes; the mask token is the first row of the table that no byte uses."""
    length, mask_token = arrays["train/tokens"].shape[1], int(arrays["mask_token"])
    refuse_outside(arrays, "tokens", mask_token)
    refuse_outside(arrays, "positions", length)
    refuse_outside(arrays, "segment_ids", length + 1)
    data = PreparedText(mask_token, length, fingerprint(arrays))
    return masked_lm(data, model.for_platform(jax.default_backend()))


def make_classifier(model: ResNetConfig, arrays: Arrays) -> Task:
    """A residual network on pictures."""
    refuse_outside(arrays, "labels", model.classes)
    data = PreparedImages(arrays["train/images"].shape[1:], model.classes, fingerprint(arrays))
    return images(data, model.for_platform(jax.default_backend()))


def save_prepared(path: Path, workload: Workload, arrays: Arrays) -> None:
    """Writes prepared data as one compressed .npz file."""
    with file_access("write", path), open(path, "wb") as file:
        np.savez_compressed(file, task=np.array(workload.name), **arrays)  # type: ignore[arg-type]


def load_prepared(path: str | os.PathLike, task: Workload) -> Arrays:
    """Reads what `save_prepared` wrote.

    Raises:
      UserError: if the file isn't there, isn't such a file, holds another task's data, or arrays of a split that don't
        belong together.
    """
    arrays = read_npz(Path(path))
    if str(arrays.pop("task", "")) != task.name:
        raise UserError(f"{path} holds no data of the task {task.name}: write it with --task {task.name} --prepare")
    expected = {f"{name}/{field}": each for name in SPLITS for field, each in task.arrays.items()}
    check_arrays(arrays, {**expected, **task.shared_arrays}, str(path))
    for name in SPLITS:
        lengths = {field: len(array) for field, array in split(arrays, name, None).items()}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise UserError(f"{path}: the arrays of {name} must have one length, of at least 1, and have {lengths}")
        for field in task.arrays:
            shape, of_train = arrays[f"{name}/{field}"].shape[1:], arrays[f"train/{field}"].shape[1:]
            if shape != of_train:
                raise UserError(f"{path}: {name}/{field} has rows of {shape}, and train/{field} of {of_train}")
    return arrays


def refuse_outside(arrays: Arrays, field: str, end: int) -> None:
    """Raises a UserError for an array, of any split, whose entries don't all lie in 0..end - 1."""
    for name in SPLITS:
        array = arrays[f"{name}/{field}"]
        if array.min() < 0 or array.max() >= end:
            raise UserError(
                f"prepared data: {name}/{field} has {array.min()} to {array.max()}, and they must lie in 0..{end - 1}"
            )


def split(arrays: Arrays, name: str, examples: int | None) -> Arrays:
    """One split's arrays, without its name, cut to so many examples."""
    return {key.partition("/")[2]: array[:examples] for key, array in arrays.items() if key.startswith(f"{name}/")}


def fingerprint(arrays: Arrays) -> str:
    """Changes whenever the data do.

    >>> fingerprint({"train/x": np.arange(3)}) == fingerprint({"train/x": np.arange(4)})
    False
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        digest.update(json.dumps([name, arrays[name].dtype.str, arrays[name].shape]).encode())
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


TASKS = {
    task.name: task
    for task in (
        Workload(
            name="mlm",
            title="Masked language model",
            unit="masked byte",
            sizes={
                "full": Size(
                    ModelConfig(vocab_size=384, width=128, layers=4, heads=2, kv_heads=2, mlp_width=384),
                    batch_sizes=(32, 128, 512, 2048, 8192),
                    epochs=4,
                    max_microbatch_examples=1280,
                ),
                "debug": Size(
                    ModelConfig(vocab_size=384, width=48, layers=2, heads=2, kv_heads=2, mlp_width=128),
                    batch_sizes=(16, 64, 256),
                    epochs=2,
                    max_microbatch_examples=16,
                    train_examples=2048,
                    held_out_examples=256,
                ),
            },
            recipes={
                "adamw": Recipe(3e-3, "sqrt"),
                "sgd": Recipe(0.5, "linear"),
                "lars": Recipe(0.5, "sqrt", LARS),
                "lamb": Recipe(3e-2, "sqrt"),
                "lion": Recipe(6e-4, "sqrt"),
            },
            optimizers=("adamw", "lars", "lamb", "lion"),
            base_batch_size=512,
            prepare=prepare_text,
            arrays=dict.fromkeys(("tokens", "segment_ids", "positions"), Expected("i", 2)),
            shared_arrays={"mask_token": Expected("i", 0)},
            make=make_masked_lm,
            side_by_side=True,
        ),
        Workload(
            name="images",
            title="ResNet on Fashion-MNIST",
            unit="picture",
            sizes={
                "full": Size(
                    ResNetConfig(blocks=2),
                    batch_sizes=(64, 256, 1024, 4096, 16384),
                    epochs=10,
                    max_microbatch_examples=4096,
                ),
                "debug": Size(
                    ResNetConfig(width=8, blocks=1),
                    # Few: XLA runs a convolution inside a loop on one CPU core, seven times slower than outside.
                    batch_sizes=(16, 64),
                    epochs=3,
                    max_microbatch_examples=256,
                    train_examples=1024,
                    held_out_examples=250,
                ),
            },
            recipes={
                "sgd": Recipe(0.4, "linear", {"weight_decay": 5e-4}),
                "adamw": Recipe(3e-3, "sqrt"),
                "lars": Recipe(0.5, "sqrt", LARS),
                "lamb": Recipe(2e-2, "sqrt"),
                "lion": Recipe(6e-4, "sqrt"),
            },
            optimizers=("sgd", "adamw", "lars", "lamb", "lion"),
            base_batch_size=1024,
            prepare=prepare_images,
            arrays={"images": Expected("u", 4), "labels": Expected("iu", 1)},
            shared_arrays={},
            make=make_classifier,
            side_by_side=False,
        ),
    )
}
