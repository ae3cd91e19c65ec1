"""Configs: gin files, as `--config` reads them."""

import shutil
from pathlib import Path

from fuzz import Parser

from crescendo.experiments.configs import binding
from crescendo.experiments.trainer.training import train

OWN = """include 'debug.gin'

LEARNING_RATE = 1e-3
train.batch_size = @staged()
staged.sizes = [8, 16]
staged.starts_examples = [0, 64]
train.groups = [@group(), @vocabulary/group()]
group.path = '*/bias'
vocabulary/group.axis = 'vocab'
train.keep_checkpoints_at_examples = (64, 128)
train.task = @masked_lm
masked_lm.mask_fraction = 0.2
"""


def samples(folder: Path) -> list[Path]:
    paths = [folder / name for name in binding.shipped()]
    for path in paths:
        shutil.copy(str(binding.CONFIGS / path.name), path)
    (folder / "own.gin").write_text(OWN, encoding="utf-8")
    return [*paths, folder / "own.gin"]


def read(path: Path) -> None:
    binding.bind(train, [str(path)])


PARSERS = [Parser("config", samples, read)]
