"""One file is all that a new optimizer, transform, schedule or policy takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crescendo import optim
from crescendo.experiments.configs.factories import FACTORIES
from crescendo.optim.registry import Registry

ROOT = Path(__file__).resolve().parent.parent.parent
NEW = '''"""A file of each kind."""

import optax

from crescendo.optim.batch_size import BatchSizePolicy, staged
from crescendo.optim.guard import Guard, guard
from crescendo.optim.registry import COMBINATORS, GUARDS, OPTIMIZERS, POLICIES, SCHEDULES, TRANSFORMS
from crescendo.optim.run_length import ends_with_the_run
from crescendo.optim.scaling import scale_by_learning_rate
from crescendo.optim.schedule_parts import progress, with_warmup


@OPTIMIZERS
def novel(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """An optimizer."""
    return optax.chain(halve(), scale_by_learning_rate(learning_rate))


@TRANSFORMS
def halve() -> optax.GradientTransformationExtraArgs:
    """A transform."""
    return optax.with_extra_args_support(optax.scale(0.5))


@COMBINATORS
def twice(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A combinator."""
    return optax.chain(optimizer, optimizer)


@SCHEDULES
@ends_with_the_run
def square(peak: float, total: float, *, warmup: float = 0) -> optax.Schedule:
    """A schedule."""
    return with_warmup(lambda t: peak * (1 - progress(t, warmup, total)) ** 2, warmup)


@POLICIES
def doubled(start: int) -> BatchSizePolicy:
    """A policy."""
    return staged([start, 2 * start], starts_examples=[0, 64])


@GUARDS
def strict() -> Guard:
    """A guard."""
    return guard(z=4.0)
'''
CONFIG = """
import jax.numpy as jnp

from crescendo import optim
from crescendo.experiments.configs import binding

assert optim.novel is optim.OPTIMIZERS["novel"] and {"novel", "halve", "twice", "doubled"} <= set(optim.__all__)


def run(optimizer: object, batch_size: object):
    return optimizer, batch_size


bound = binding.bind(
    run,
    [],
    [
        "run.optimizer = @twice()",
        "twice.optimizer = @optim.chain()",
        "optim.chain.transforms = [@halve(), @novel()]",
        "novel.learning_rate = @schedules.square()",
        "square.peak = 1.0",
        "square.total = 4",
        "run.batch_size = @policies.doubled()",
        "doubled.start = 8",
    ],
)
optimizer, policy = bound()
# Halved twice, at a rate of (1 - 1/2)^2: times -1/16; and once more.
print(optimizer.update(jnp.float32(256), optimizer.init(jnp.float32(0)), examples_seen=2)[0], policy.sizes)
"""


@pytest.fixture(scope="module")
def with_a_new_file(tmp_path_factory) -> Path:
    """A folder to import the package from: the sources by links, and one new file beside them in `optim`."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "crescendo" / "optim").mkdir(parents=True)
    for link in (ROOT / "typings" / "crescendo").iterdir():
        if link.name != "optim":
            (folder / "crescendo" / link.name).symlink_to(link.resolve())
    for path in (ROOT / "optim").glob("*.py"):
        (folder / "crescendo" / "optim" / path.name).symlink_to(path)
    (folder / "crescendo" / "optim" / "novelties.py").write_text(NEW)
    return folder


def python(folder: Path, *arguments: str) -> str:
    """What a new interpreter prints, for which the package lies in the folder."""
    environment = {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_configs_name_what_a_new_file_defines(with_a_new_file):
    assert python(with_a_new_file, "-c", CONFIG).strip() == "1.0 (8, 16)"


@pytest.mark.slow
def test_the_common_tests_take_what_a_new_file_defines(with_a_new_file):
    tests = ["tests/optim/test_common.py", "tests/experiments/trainer/test_conformance.py"]
    listed = python(with_a_new_file, "-m", "pytest", "-n", "0", "--collect-only", "-q", *tests)
    for test in (
        "test_converges[novel]",
        "test_sharded_equals_unsharded[halve]",
        "test_every_optimizer[novel-one device]",
        "test_every_transform[halve-one device]",
        "test_every_transform[twice-one device]",
        "test_every_schedule[square-one device]",
        "test_every_batch_size_policy[doubled-one device]",
        "test_every_guard[strict-one device]",
    ):
        assert test in listed, listed


def test_the_tables_hold_what_is_called_by_their_names():
    tables = (optim.OPTIMIZERS, optim.TRANSFORMS, optim.COMBINATORS, optim.SCHEDULES, optim.POLICIES, optim.GUARDS)
    for table in tables:
        for name, function in table.items():
            assert name == function.__name__
    together = optim.OPTIMIZERS | optim.TRANSFORMS | optim.COMBINATORS
    assert len(together) == len(optim.OPTIMIZERS) + len(optim.TRANSFORMS) + len(optim.COMBINATORS)
    for name, function in together.items():
        assert getattr(optim, name) is function


def test_the_modules_by_which_configs_qualify_a_policy():
    """Old configs and run folders name them so."""
    assert set(FACTORIES["optim.batch_size"]) == {"constant", "staged"}
    assert {"geometric_warmup", "noise_scale_following", "norm_test", "critical_batch_following"} <= set(
        FACTORIES["optim.policies"]
    )


def test_a_name_is_taken_once():
    table: Registry = Registry()

    def adamw():
        """Of this module."""

    assert table(adamw) is table["adamw"]
    assert table["adamw"].__wrapped__ is adamw
    assert table(adamw) is table["adamw"]  # a module that is reloaded
    with pytest.raises(ValueError, match=r"optim.adamw defines 'adamw', which .*test_registry has: take another name"):
        table(optim.adamw)
