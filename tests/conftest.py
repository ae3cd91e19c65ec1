"""Eight simulated CPU devices for every test, set before JAX is imported; `make test-gpu` asks for the GPU.

Prepared data and compiled programs go to a cache of the session's own, shared by its worker processes. What a small run
takes stands here: a corpus and a model with which the whole program takes a second or two.
"""

import atexit
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.pop("COLUMNS", None)  # xdist gives its workers a terminal's width; what the tests see is a pipe
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="crescendo-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
    # A program that a test before has compiled is not compiled again, small ones neither.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{os.environ['XDG_CACHE_HOME']}/crescendo/xla"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import numpy as np
import pytest

SMALL_MODEL = (
    "model.width = 16",
    "model.layers = 1",
    "model.heads = 2",
    "model.kv_heads = 1",
    "model.mlp_width = 32",
)
# What of a config is no part of the step.
BESIDE_THE_STEP = (
    *("train.checkpoint_", "train.evaluat", "train.keep_", "train.label ", "train.stop_"),
    *("train.probes = [@samples()]", "samples.", "text_files.validation_paths"),
)
WORDS = ("batch", "size", "noise", "scale", "warm", "up", "learning", "rate", "mesh", "kernel", "decay", "token")


def pytest_collection_finish():
    """The modules that are loaded are garbage no more, and JAX's part of each collection costs more than the rest."""
    gc.freeze()
    gc.set_threshold(20_000)


# By module: without an __init__.py beside it, a package's fixture would last to the end of the session.
@pytest.fixture(scope="module")
def quick_compilation():
    """For tests that compile much and check arithmetic: the compiler need not work on the programs' speed."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """400 text files of random sentences."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for i in range(400):
        words = random.choice(WORDS, size=random.integers(20, 80))
        (folder / f"{i:03}.txt").write_text(" ".join(words) + ".\n")
    return folder


@pytest.fixture(scope="session")
def small_bindings(corpus, tmp_path_factory) -> list[str]:
    """Bindings on top of debug.gin that make a run of 512 examples take a second."""
    return [
        "text_data.documents = @text_files()",
        f"text_files.paths = ['{corpus}/*.txt']",
        f"text_data.cache_directory = '{tmp_path_factory.mktemp('cache')}'",
        "SEQUENCE_LENGTH = 32",
        "TOTAL_EXAMPLES = 512",
        "schedules.linear.warmup = 64",
        "schedules.linear.peak = 1e-2",
        "train.batch_size = 16",
        "train.evaluation_examples = 16",
        *SMALL_MODEL,
    ]


@pytest.fixture(scope="session")
def train_small(small_bindings):
    """`train_small(run, *bindings)`: trains in this process, on the first of its devices or on several.

    What is asked for with the same bindings has the same step, which is traced and compiled once.
    """
    steps: dict[tuple, jax.stages.Compiled] = {}

    def call(run: Path, *bindings: str, devices: int = 1) -> dict:
        from crescendo import parallel
        from crescendo.experiments.configs import binding as configurables
        from crescendo.experiments.trainer.session import Session
        from crescendo.experiments.trainer.training import train

        lower, quick = Session.lower, jax.config.read("jax_disable_most_optimizations")

        def lowered(session: Session, plan: parallel.BatchPlan, **options) -> SimpleNamespace:
            of_step = tuple(binding for binding in bindings if not binding.startswith(BESIDE_THE_STEP))
            key = (of_step, devices, quick, plan, *options.values())
            if key not in steps:
                steps[key] = lower(session, plan, **options).compile()
            return SimpleNamespace(compile=lambda: steps[key])

        mesh = parallel.make_mesh(devices=jax.devices()[:devices])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "lower", lowered)
            return configurables.bind(train, ["debug.gin"], bindings, own=small_bindings)(run=str(run), mesh=mesh)

    return call


@pytest.fixture(scope="session")
def start_train(small_bindings):
    """`start_train(run, *bindings)`: the command in a process of its own, on one CPU device.

    What it has started is in its list `started`.
    """

    def call(run: Path, *bindings: str, **options) -> subprocess.Popen:
        arguments = [part for binding in (*small_bindings, *bindings) for part in ("--set", binding)]
        arguments += options.pop("arguments", [])
        prefix = options.pop("prefix", [])
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "crescendo.experiments.train", "--run", str(run), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | options.pop("environment", {}),
            **options,
        )
        started.append(process)
        return process

    call.started = started = []  # type: ignore[attr-defined]
    return call


@pytest.fixture
def records():
    """`records(run)`: the metrics of a run without what the clock on the wall decides."""

    def read(run: Path) -> list[dict]:
        timed = ("seconds", "tokens_per_second", "mfu")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["kind"] != "time"]
        return [{name: value for name, value in record.items() if name not in timed} for record in lines]

    return read


STEP_BUDGETS = Path(__file__).parent / "step_budgets.json"
# What another processor's compiler fuses otherwise is less, a copy of the activations or the logits more.
BUDGET_TOLERANCE = 0.03


@pytest.fixture
def within_budget():
    """`within_budget(name, **found)`: a step costs, by the compiler's count, what `step_budgets.json` says.

    What costs less is an error too: the next loss would go unseen.
    """

    def check(name: str, **found: int) -> None:
        budget = json.loads(STEP_BUDGETS.read_text()).get(name, {})
        off = [what for what in found if found[what] != pytest.approx(budget.get(what, 0), rel=BUDGET_TOLERANCE)]
        assert not off, (
            f"{name}: {', '.join(off)} more than {BUDGET_TOLERANCE:.0%} off the budget {budget}; if that is meant, "
            f"write to {STEP_BUDGETS.name}: {json.dumps({name: found})}"
        )

    return check
