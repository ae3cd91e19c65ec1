"""A person's own module, with no checkout: what it defines can be named, and its mistakes are one line."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import optax
import pytest

from crescendo.experiments import train as command
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs import own_modules
from crescendo.experiments.configs.factories import FACTORIES
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.training import train

OWN = """
from __future__ import annotations

import dataclasses

import optax

from crescendo.experiments.data.documents import Documents
from crescendo.optim.batch_size import BatchSizePolicy, staged
from crescendo.optim.run_length import ends_with_the_run
from crescendo.optim.scaling import scale_by_learning_rate


def own_sgd(learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9):
    return optax.chain(optax.trace(momentum), scale_by_learning_rate(learning_rate))


@ends_with_the_run
def own_schedule(peak: float, total: float, *, warmup: float = 0) -> optax.Schedule:
    return lambda t: peak * t / total


def own_policy(start: int) -> BatchSizePolicy:
    return staged([start, 2 * start], starts_examples=[0, 64])


def own_documents() -> Documents:
    return Documents("own", "own 1", lambda: iter([b"a", b"b"]), 2)


@dataclasses.dataclass(frozen=True)
class OwnModel:
    width: int = 8


def own_task(data: object, model: OwnModel) -> object:
    return data, model


def _private():
    pass
"""


def assembled(
    *, optimizer: object, policy: object, documents: object, task: Callable[..., object], model: object
) -> dict:
    return dict(locals())


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch, request) -> Iterator[Callable[[str], Path]]:
    """`own_file(text)`: a file of a name of its own; what this process has loaded is forgotten afterwards."""
    monkeypatch.setattr(own_modules, "LOADED", [])
    monkeypatch.setattr(own_modules, "ANY_IMPORTS", False)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text: str) -> Path:
        path = tmp_path / f"own_{abs(hash(request.node.nodeid)):x}.py"
        path.write_text(text)
        return path

    yield write
    registry = configurables.gin.config._REGISTRY
    for name in [name for name, _ in registry.items() if "own_" in name]:
        registry.pop(name)
    for name in [name for name in FACTORIES if "own_" in name]:
        del FACTORIES[name]


BINDINGS = (
    "assembled.optimizer = @own_sgd()",
    "own_sgd.learning_rate = @own_schedule()",
    "own_schedule.peak = 0.5",
    "own_schedule.total = 8",
    "assembled.policy = @own_policy()",
    "own_policy.start = 4",
    "assembled.documents = @own_documents()",
    "assembled.task = @own_task",
    "assembled.model = @OwnModel()",
)


@pytest.mark.parametrize("by", ["module", "import"])
def test_what_a_module_defines_can_be_named_without_any_registration(own_file, by: str):
    path = own_file(OWN.replace("own_", f"{by}_"))
    bindings = [binding.replace("own_", f"{by}_").replace("@Own", f"@{path.stem}.Own") for binding in BINDINGS]
    if by == "module":
        command.parser().parse_args(["--module", str(path)])
    else:  # as a run's config.gin says it
        command.parser().parse_args(["--allow-imports"])
        sys.path.insert(0, str(path.parent))
        bindings.insert(0, f"import {path.stem}")
    made = configurables.bind(assembled, [], bindings)()
    assert isinstance(made["optimizer"], optax.GradientTransformation)
    assert made["policy"].sizes == (4, 8)
    assert made["documents"].source == "own"
    assert made["model"].width == 8
    assert made["task"](1, made["model"]) == (1, made["model"])
    assert configurables.operative_config().startswith(f"import {path.stem}\n")  # repeats the run, and says how
    with pytest.raises(UserError, match=f"{by}_sgd.momentum = 'much' must be float"):  # annotations are text there
        configurables.bind(assembled, [], [*bindings, f"{by}_sgd.momentum = 'much'"])()
    with pytest.raises(UserError, match=f"unknown name '{by}_sdg'; nearest: {by}_sgd"):
        configurables.bind(assembled, [], [*bindings, f"assembled.optimizer = @{by}_sdg()"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import {name}", "import {name}: configs import nothing .*: give its file with --module, .* --allow-imports"),
        ("import os", "import os: configs import nothing by themselves, as that runs code: .*--allow-imports$"),
        ("from os import path", "import os.path: configs import nothing"),
        ("from os import path as p", "import os.path: configs import nothing"),
        (
            "from __gin__ import dynamic_registration",
            "dynamic_registration: configs import nothing .* --allow-imports$",
        ),
        ("train.seed = @os.getpid()", "unknown name 'os.getpid'"),
        ("train.seed = @os/getpid()", "unknown name 'getpid'"),
    ],
)
def test_a_config_runs_no_code_of_its_own(own_file, tmp_path, text, message):
    path = own_file("raise SystemExit('this ran')\n")
    sys.path.insert(0, str(path.parent))
    text, message = (each.format(name=path.stem) for each in (text, message))
    config = tmp_path / "theirs.gin"
    config.write_text(f"include 'debug.gin'\n{text}\n")
    inner = tmp_path / "inner.gin"
    inner.write_text(f"include '{config}'\n")
    for configs, typed in (([str(config)], []), ([str(inner)], []), (["debug.gin"], [text])):
        with pytest.raises(UserError, match=message) as refused:
            configurables.bind(train, configs, typed)
        assert "\n" not in str(refused.value)


def test_a_runs_own_config_goes_on_where_the_module_is_named_again(own_file, tmp_path):
    path = own_file(OWN)
    config = tmp_path / "config.gin"
    config.write_text(f"import {path.stem}\n" + "\n".join(BINDINGS).replace("@Own", f"@{path.stem}.Own"))
    sys.path.insert(0, str(path.parent))
    with pytest.raises(UserError, match="configs import nothing by themselves"):
        configurables.bind(assembled, [str(config)])
    command.parser().parse_args(["--module", str(path)])
    assert configurables.bind(assembled, [str(config)])()["model"].width == 8


def test_a_name_that_crescendo_has_too_is_written_out(own_file):
    path = own_file("def lion(learning_rate: float) -> float:\n    return learning_rate\n")
    command.parser().parse_args(["--module", str(path)])
    with pytest.raises(UserError, match=f"'lion' means several: write {path.stem}.lion or optim.lion"):
        configurables.bind(assembled, [], ["assembled.model = @lion()"])


def test_a_module_of_a_package_named_experiments_is_no_experiment(own_file, monkeypatch):
    monkeypatch.delitem(sys.modules, "experiments", raising=False)  # the tests' own
    path = own_file(OWN)
    package = path.parent / "experiments"
    package.mkdir()
    (package / "__init__.py").touch()
    path.rename(package / "own_module.py")
    sys.path.insert(0, str(path.parent))
    command.parser().parse_args(["--module", "experiments.own_module"])
    bindings = [each.replace("@Own", "@experiments.own_module.Own") for each in BINDINGS]
    assert configurables.bind(assembled, [], bindings)()["model"].width == 8


@pytest.mark.parametrize("annotation", ["not python", "Unknown", "optax.Nothing", "int | 3"])
def test_annotations_that_are_no_types_are_left_alone(own_file, annotation: str):
    own = OWN.replace("from __future__ import annotations\n", "")
    path = own_file(f"{own}\n\ndef own_made(size: {annotation!r}, rate: 'float' = 0.1):\n    return size\n")
    command.parser().parse_args(["--module", str(path)])
    bindings = [each.replace("@Own", f"@{path.stem}.Own") for each in BINDINGS[4:]]
    bindings += ["assembled.optimizer = @own_made()", "own_made.size = 3"]
    assert configurables.bind(assembled, [], bindings)()["optimizer"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import numpy\nx = numpy.nothing\n", r"AttributeError: module 'numpy' has no attribute .* \(line 2 of "),
        ("def f(:\n", r"SyntaxError: .* \(line 1 of "),
        ("import not_there_at_all\n", r"ModuleNotFoundError: No module named 'not_there_at_all' \(line 1 of"),
    ],
)
def test_the_mistakes_of_a_module_are_one_line(own_file, text: str, message: str):
    path = own_file(text)
    with pytest.raises(UserError, match=rf"--module {re.escape(str(path))}: {message}") as caught:
        command.parser().parse_args(["--module", str(path)])
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there_or_whose_name_is_taken_is_refused(own_file, tmp_path: Path):
    (tmp_path / "json.py").write_text("")
    (tmp_path / "my-opt.py").write_text("")
    for given, message in (
        ("nothing.py", "no such file"),
        ("nothing_here", "no module named nothing_here here"),
        (str(tmp_path / "json.py"), "another module has the name json: rename the file"),
        (str(tmp_path / "my-opt.py"), "'my-opt' is no name of a module"),
    ):
        with pytest.raises(UserError, match=f"--module {re.escape(given)}: {message}"):
            own_modules.load(given)
    command.parser().parse_args(["--allow-imports"])
    with pytest.raises(UserError, match=r"--set: import nothing_here: no module named nothing_here here.*--module"):
        configurables.bind(assembled, [], ["import nothing_here"])


@pytest.mark.slow
def test_a_run_of_an_own_module_is_repeated_by_its_config(own_file, small_bindings, tmp_path: Path):
    path = own_file(OWN)
    bindings = [*small_bindings, "train.optimizer = @own_sgd()", "own_sgd.learning_rate = @schedules.linear()"]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        arguments = [sys.executable, "-m", "crescendo.experiments.train", *arguments]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        return subprocess.run(arguments, capture_output=True, text=True, env=environment)

    first = run("--module", str(path), "--run", str(tmp_path / "a"), *(p for b in bindings for p in ("--set", b)))
    assert first.returncode == 0, first.stderr
    config = ["--config", str(tmp_path / "a" / "config.gin"), "--run", str(tmp_path / "b")]
    assert "give its file with --module" in run(*config).stderr
    assert run("--module", str(path), *config).returncode == 0
    assert (tmp_path / "a" / "config.gin").read_text().replace("/a'", "/b'") == (
        tmp_path / "b" / "config.gin"
    ).read_text()
