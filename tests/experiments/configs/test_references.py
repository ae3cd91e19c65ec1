"""What is typed is used, or refused with what would use it; nothing is built for that, and nothing written."""

import inspect
import re
from typing import Any

import gin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.experiments import sweep
from crescendo.experiments import train as train_module
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs import own_modules, references
from crescendo.experiments.configs.explain import ELSEWHERE, elsewhere
from crescendo.experiments.configs.factories import FACTORIES
from crescendo.experiments.papers.critical_batch import critical_batch
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.sweeps.arms import compare_arms
from crescendo.experiments.trainer.training import train

SWAPPED = ("train.optimizer = @lion()", "lion.learning_rate = 1e-3")
COSINE = ("adamw.learning_rate = @cosine()", "cosine.peak = 1.0")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["LEARNING_RTE = 1e-2"], "nothing reads the macro LEARNING_RTE; nearest: LEARNING_RATE"),
        (["Total_Examples = 8"], "nothing reads the macro Total_Examples; nearest: TOTAL_EXAMPLES"),
        (["batch_size = 8"], "nothing reads the macro batch_size; as a parameter it is train.batch_size"),
        (["lr = 1e-2"], "nothing reads the macro lr: the learning rate is the macro LEARNING_RATE"),
        (
            ["text_files.paths = ['a']"],
            r"text_files.paths: text_data.documents is @stdlib_text\(\); name it: text_data.documents = @text_files",
        ),
        (["train.batch_size = 8", "staged.sizes = [8]"], r"staged.sizes: train.batch_size is 8; .* = @staged\(\)$"),
        (
            [*COSINE, "schedules.linear.warmup = 64"],
            r"linear.warmup: adamw.learning_rate is @cosine\(\); name it: adamw.learning_rate = @linear\(\)",
        ),
        ([*SWAPPED, "LEARNING_RATE = 1.0"], r"LEARNING_RATE, which is for adamw: train.optimizer is @lion\(\)"),
        ([*SWAPPED, "adamw.weight_decay = 0.1"], "nothing uses adamw.weight_decay: train.optimizer is @lion"),
        (["masked_lm.mask_fraction = 0.3"], "nothing uses masked_lm.mask_fraction: name it: train.task = @masked_lm$"),
        (["resnet.width = 8"], r"train.model is @model\(\); name it: train.model = @resnet\(\)"),
        (["mesh.fsdp = 2"], r"nothing uses mesh.fsdp: name it: train.mesh = @mesh\(\)"),
        (["gradient_noise_scale.norm_layers = True"], r"name it: train.noise_scale = @gradient_noise_scale\(\)"),
        (["parameter_norms.every_examples = 8"], r"name it: train.probes = \[@parameter_norms\(\)\]"),
        (["optax.lion.b1 = 0.5"], r"train.optimizer is @adamw\(\); name it: train.optimizer = @optax.lion\(\)"),
        (["inner/linear.warmup = 8"], "nothing uses inner/linear.warmup: what is called takes linear.warmup"),
        (
            ["adamw.learning_rate = @inner/linear()", "inner/linear.warmup = 8", "linear.warmup = 9"],
            "nothing uses linear.warmup: what is called takes inner/linear.warmup",
        ),
        (["HALF = 0.5", "OTHER = %HALF"], "nothing reads the macro HALF, which is for OTHER; nearest|known"),
        (["SCHEDULE = @cosine()", "cosine.peak = 1.0"], "nothing reads the macro SCHEDULE"),
        (["train.optimizer = @adamw"], r"train.optimizer = @adamw is the function itself: write @adamw\(\)"),
        (["adamw.learning_rate = @linear"], r"adamw.learning_rate = @linear is the function itself: write @linear\(\)"),
        (["train.data = @text_data"], r"write @text_data\(\)"),
        (["train.probes = [@parameter_norms]"], r"write @parameter_norms\(\)"),
        (["train.task = @masked_lm()"], "train.task = @masked_lm$"),
    ],
)
def test_what_nothing_uses_is_refused_with_what_would_use_it(typed, message):
    with pytest.raises(UserError, match=message) as refused:
        configurables.bind(train, ["debug.gin"], typed)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "typed",
    [
        ["LEARNING_RATE = 1e-3", "schedules.linear.warmup = 0"],  # defaults, and what the file has already
        [*SWAPPED],
        ["train.task = @masked_lm", "masked_lm.mask_fraction = 0.3"],  # called later
        ["PEAK = 1.0", "inner/linear.peak = %PEAK", "adamw.learning_rate = @inner/linear()"],
        ["SCHEDULE = @cosine()", "SCHEDULE/cosine.peak = 1.0", "adamw.learning_rate = %SCHEDULE"],
        ["train.probes = [@parameter_norms(), @b/parameter_norms()]", "b/parameter_norms.every_examples = 8"],
        ["linear.warmup = 8", "adamw.learning_rate = @a/b/linear()", "a/linear.peak = 1.0"],
        ["adamw.learning_rate = @rate/singleton()", "rate/singleton.constructor = @cosine", "cosine.peak = 1.0"],
    ],
)
def test_what_is_used_is_taken(typed):
    configurables.bind(train, ["debug.gin"], typed)


def anything(*, inner: Any = None, other: Any = None): ...


VALUES = ["1.0", "%ONE", "%TWO", "@linear()", "@cosine()", "@a/linear()", "@b/cosine()", "[@a/b/linear(), %ONE]"]
NAMES = ["linear", "cosine", "a/linear", "b/linear", "a/b/linear", "ONE/linear", "b/cosine"]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.sampled_from(VALUES), min_size=4, max_size=4),
    st.sets(st.sampled_from(NAMES)),
    st.sampled_from(["2.0", "@cosine()", "@b/linear()"]),
)
def test_what_is_followed_is_what_gin_calls(values, peaks, two):
    inner, other, one, _ = values
    own = [
        f"anything.inner = {inner}",
        f"anything.other = {other}",
        f"TWO = {two}",
        "linear.peak = 1.0",
        "cosine.peak = 1.0",
    ]
    own += [f"ONE = {'3.0' if '%' in one else one}", *(f"{name}.peak = 0.5" for name in peaks)]
    configurables.bind(anything, [], own=own)()
    assert set(references.follow("experiments.anything").calls) == set(gin.config._OPERATIVE_CONFIG)


def test_a_function_that_python_calls_by_gins_decoration_may_use_what_is_bound(tmp_path, monkeypatch):
    (tmp_path / "decorated.py").write_text(
        "import gin\n\n@gin.configurable\ndef inner(size=1):\n    return size\n\n"
        "@gin.configurable\ndef outer(optimizer=None):\n    return inner()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(own_modules, "ANY_IMPORTS", True)
    (tmp_path / "mine.gin").write_text("import decorated\n")
    typed = ["anything.inner = @outer()", "inner.size = 5", "outer.optimizer = @adamw()", "adamw.learning_rate = 1.0"]
    configurables.bind(anything, [str(tmp_path / "mine.gin")], typed)
    with pytest.raises(UserError, match=r"nothing uses lion\.b1"):
        configurables.bind(anything, [str(tmp_path / "mine.gin")], [*typed, "lion.b1 = 0.5"])
    del FACTORIES["decorated"]  # other tests list what can be set


def test_files_are_warned_of_once_and_by_name(tmp_path, capsys):
    (tmp_path / "inner.gin").write_text("cosine.peak = 3.0\n")
    (tmp_path / "mine.gin").write_text(f"include '{tmp_path}/inner.gin'\nanything.inner = %SIZE\nSIZE = 1\nSISE = 2\n")
    for _ in range(2):
        configurables.bind(anything, [str(tmp_path / "mine.gin")])()
    assert capsys.readouterr().err == f"warning: nothing uses what {tmp_path}/mine.gin binds as cosine.peak, SISE\n"


def test_shipped_configs_bind_nothing_in_vain():
    for config in configurables.shipped():
        configurables.bind(train, [config])
        reached = references.follow("experiments.train")
        assert [str(binding) for binding in references.bound() if binding not in reached.used] == [], config


def test_a_command_refuses_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = "LEARNING_RTE = [1e-3, 1e-2]"
    for call in (
        lambda: train_module.main(["--set", "LEARNING_RTE = 1e-2"]),
        lambda: train_module.main(["--set", "train.run = 'elsewhere'"]),
        lambda: sweep.main(["--grid", wrong]),
        lambda: sweep.main(["--zip", wrong]),
        lambda: sweep.main(["--search", "LEARNING_RTE = log(1e-3, 1e-2)"]),
        lambda: sweep.main(["--grid", "LEARNING_RATE = [1e-3, 1e-2]", "--set", "text_files.paths = ['a']"]),
        lambda: sweep.main(
            ["--grid", "train.optimizer = [@adamw(), @lion()]", "--grid", "lion.learning_rate = [1e-3, 1e-2]"]
        ),
        lambda: sweep.main(["--search", "train.optimizer = choice(@lion(), @adamw())", "--set", "sgd.momentum = 0.5"]),
        lambda: critical_batch(bindings=["LEARNING_RTE = 1e-2"]),
        lambda: compare_arms(tmp_path / "runs", {"a": {"model.width": 8}}, command="it", title="", bindings=["A = 1"]),
        lambda: compare_arms(tmp_path / "runs", {"a": {}, "b": {"staged.sizes": [8]}}, command="it", title=""),
    ):
        with pytest.raises(UserError, match=r"nothing|is set by the command itself"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_value_may_be_for_some_of_the_runs(tmp_path, monkeypatch):
    """A sweep's process is given what its point uses, and an arm what it uses."""
    rates = ["--set", "lion.learning_rate = 1e-3", "--set", "adamw.weight_decay = 0.0"]
    sweep_of_two = ["--grid", "train.optimizer = [@adamw(), @lion()]", *rates, "--launcher", "slurm"]
    shown: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *texts, **options: shown.extend(texts))
    sweep.main(sweep_of_two)
    first, second = (line for line in shown[0].splitlines() if "exec" in line)
    assert ("lion.learning_rate" in first, "adamw.weight_decay" in first) == (False, True)
    assert ("lion.learning_rate" in second, "adamw.weight_decay" in second) == (True, False)


def test_what_takes_the_place_of_other_frameworks_names_is_there():
    for place in ELSEWHERE.values():
        for name, parameter in re.findall(
            r"\b(train|model|mesh|text_data|text_files|adamw|linear|cosine)\.(\w+)", place
        ):
            configurables.bind(anything, [])
            assert parameter in inspect.signature(gin.get_configurable(name)).parameters, place


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("lr", "LEARNING_RATE"),
        ("gradient_accumulation_steps", "the global batch"),
        ("microbatch", "the global batch"),
        ("micro_batch_size", "the global batch"),
        ("per_device_train_batch_size", "of all devices"),
        ("num_train_epochs", "train.total_examples"),
        ("epochs", "train.total_examples"),
        ("max_steps", "train.total_examples"),
        ("warmup_steps", "linear.warmup"),
        ("max_grad_norm", "train.max_gradient_norm"),
        ("gradient_clip_val", "train.max_gradient_norm"),
        ("bf16", "model.dtype"),
        ("eval_steps", "train.evaluate_every_examples"),
        ("output_dir", "--run"),
        ("n_embd", "model.width"),
        ("num_workers", "by themselves"),
    ],
)
def test_names_of_other_frameworks_say_what_takes_their_place(name, place):
    assert place in elsewhere(name)
    for typed in (f"train.{name} = 1", f"{name} = 1"):
        with pytest.raises(UserError, match=re.escape(elsewhere(name))):
            configurables.bind(train, ["debug.gin"], [typed])


@pytest.mark.parametrize(
    ("typed", "instead"),
    [
        ("text_files.paths=books", """--set 'text_files.paths = "books"'"""),
        ("text_files.paths=[books/*.txt]", """--set 'text_files.paths = ["books/*.txt"]'"""),
        ("train.coupling = linear", """--set 'train.coupling = "linear"'"""),
        ("train.keep_best_checkpoint=true", "--set 'train.keep_best_checkpoint = True'"),
    ],
)
def test_quotes_that_are_missing_are_shown(typed, instead):
    with pytest.raises(UserError, match=re.escape(f"--set: {typed} isn't gin: write {instead}")):
        configurables.bind(train, ["debug.gin"], [typed])
