"""Configs: what they bind, and what they refuse."""

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs.factories import FACTORIES
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.training import train


def probe(*, number: int, name: str = "none", factory: object = None) -> tuple:
    """An experiment that returns what the configs bound."""
    return number, name, factory


def test_later_files_and_bindings_win(tmp_path):
    first, second = tmp_path / "first.gin", tmp_path / "second.gin"
    first.write_text("N = 3\nprobe.number = %N\nprobe.name = 'first'\n")
    second.write_text("probe.name = 'second'\n")
    bind = configurables.bind
    assert bind(probe, [str(first)])() == (3, "first", None)
    assert bind(probe, [str(first), str(second)])() == (3, "second", None)
    assert bind(probe, [str(first)], ["N = 5", "probe.name = 'third'"])() == (5, "third", None)


def test_factories_are_called_and_kept_in_the_operative_config():
    bindings = ["probe.number = 1", "probe.factory = @model()", "model.layers = 7", "model.preset = '30m'"]
    _, _, config = configurables.bind(probe, [], bindings)()
    assert (config.layers, config.width) == (7, 512)
    text = configurables.operative_config()
    assert "model.layers = 7" in text
    assert configurables.bind(probe, [], text.splitlines())() == (1, "none", config)


def test_every_factory_can_be_named_and_says_what_it_takes():
    for factories in FACTORIES.values():
        for name, factory in factories.items():
            assert factory.__doc__, name
            assert all(
                parameter.annotation is not inspect.Parameter.empty
                for parameter in inspect.signature(factory).parameters.values()
                if parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            ), f"{name} has a parameter without an annotation: it would not be checked"


def test_every_shipped_config_names_only_what_there_is():
    for name in configurables.shipped():
        assert configurables.bind(train, [name]).__name__ == "train"


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["probe.numbr = 3"], r"--set: probe has no parameter 'numbr'; nearest: number"),
        (["adamm.weight_decay = 3"], r"--set: unknown name 'adamm'; nearest: adamw"),
        (["probe.factory = @stagedd()", "probe.number = 1"], r"unknown name 'stagedd'; nearest: staged"),
        (["probe.number = %MISSING"], r"^%MISSING has no value: bind it, MISSING = VALUE$"),
        (["probe.factory = @a/singleton()", "probe.number = 1"], r"^a/singleton.constructor is not set: name what it"),
        (["probe.number = " + "-" * 5000 + "1"], r"^--set: probe.number = ---.* isn't gin: write|.* \.\.\. -*"),
        (["probe.name = {[]: 1}"], r"--set: unhashable type: 'list'$"),
        (
            ["constant.peak = 1.0"],
            r"'constant' means several: write optim.batch_size.constant or optim.schedules.const",
        ),
        (["probe.number 3"], r"--set: not gin: .*write NAME.PARAMETER = VALUE"),
        (["probe.number = 'three'"], r"probe.number = 'three' must be int"),
        (
            ["probe.number = 1", "probe.factory = @model()", "model.layers = 1.5"],
            r"model.layers = 1.5 must be int \| None",
        ),
        (["probe.factory = @probe()"], r"probe.factory = @probe\(\): an experiment can't stand within a configuration"),
        (["probe.factory = @probe"], r"probe.factory = @probe: an experiment can't stand within a configuration"),
        (
            ["probe.factory = @chain()", "chain.transforms = [@a/chain()]"],
            r"chain.transforms = \[@a/chain\(\)\] stands within itself",
        ),
        (["A = %B", "B = %A", "probe.number = %A"], r"[AB] = %[AB] stands within itself"),
        (["probe.number = True"], "probe.number = True must be int"),
        (["probe.name = ['a'"], "--set: not gin: unexpected EOF in multi-line statement"),
        (["probe.factory = @constant()"], "'constant' means several: write optim.batch_size.constant or"),
        (["include 'nowhere.gin'"], r"--set: include nowhere\.gin: no such file; Crescendo ships"),
        (["probe.factory = @mesh()", "mesh.data = True"], r"^mesh.data = True must be -1 \| int$"),
        (
            ["probe.factory = @model()", "model.logit_soft_cap = 0.0"],
            "^model.logit_soft_cap = 0.0 must be above 0 and finite",
        ),
        (
            ["probe.factory = @model()", "model.dtype = 'half'"],
            "^model.dtype = 'half' must be 'float32' or 'bfloat16'$",
        ),
        (
            ["probe.factory = @adamw()", "adamw.learning_rate = 0.1", "adamw.moment_dtype = 'nope'"],
            "moment_dtype must be a floating dtype, such as float32 or bfloat16, got 'nope'",
        ),
        ([], r"^probe\.number is not set: set it in a config or with --set"),
        (
            ["probe.number = 1", "probe.factory = @critical_batch_following()", "critical_batch_following.cap = 8"],
            r"^critical_batch_following\.curve, critical_batch_following\.start are not set: set them in a config",
        ),
    ],
)
def test_mistakes_are_one_line(bindings, message):
    with pytest.raises(UserError, match=message) as refused:
        configurables.bind(probe, [], bindings)()
    assert "\n" not in str(refused.value)


def test_a_length_in_steps_is_told_of_the_clock():
    with pytest.raises(UserError, match=r"train has no parameter 'steps': a run's length is train\.total_examples"):
        configurables.bind(train, ["debug.gin"], ["train.steps = 100"])


def test_a_missing_file_lists_those_that_ship():
    with pytest.raises(UserError, match=r"--config nowhere.gin: no such file; Crescendo ships debug.gin"):
        configurables.bind(probe, ["nowhere.gin"])


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    config = tmp_path / "mine.gin"
    config.write_text("probe.numbr = 1\n")
    with pytest.raises(UserError, match=r"mine.gin: probe has no parameter 'numbr'"):
        configurables.bind(probe, [str(config)])


def test_files_are_read_as_utf8_with_or_without_a_mark_included_ones_too(tmp_path):
    (tmp_path / "inner.gin").write_bytes("probe.name = 'é'\r\n".encode("utf-8-sig"))
    outer = tmp_path / "outer.gin"
    outer.write_bytes(f"include '{tmp_path}/inner.gin'\nprobe.number = 3\n".encode("utf-8-sig"))
    assert configurables.bind(probe, [str(outer)])() == (3, "é", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("probe.number = 3".encode("utf-16"), r"mine\.gin is in UTF-16, not in UTF-8; convert it"),
        ("probe.number = 3".encode("utf-16-le"), r"mine\.gin is in UTF-16LE, not in UTF-8; convert it"),
        (b"probe.number = 3\0", r"mine\.gin: not gin: .*null bytes"),
        (b"probe.name = 'na\xefve'", r"mine\.gin: byte 0xef at offset 16 is not UTF-8"),
        (b"probe.name = '''open", r"mine\.gin: not gin: EOF in multi-line string"),
        (b"probe.number = " + b"[" * 300, r"mine\.gin: not gin: too many nested parentheses"),
        (b"import nowhere_at_all", r"mine\.gin: import nowhere_at_all: configs import nothing by themselves"),
        (b"include 'nowhere.gin'", r"mine\.gin: include nowhere\.gin: no such file; Crescendo ships debug\.gin"),
        (b"include 'gs://a/b.gin'", r"mine\.gin: gs://a/b\.gin is no path of this machine's"),
        (b"probe.number = float('nan')", r"mine\.gin: not gin: a value is no literal: write a number"),
        (b"include 'mine.gin'", r"mine\.gin: it includes itself"),
        (b"include 'utf16.gin'", r"mine\.gin: utf16\.gin is in UTF-16"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.gin").write_bytes(content)
    (tmp_path / "utf16.gin").write_bytes("probe.number = 3".encode("utf-16"))
    with pytest.raises(UserError, match=message) as refused:
        configurables.bind(probe, ["mine.gin"])
    assert "\n" not in str(refused.value)


def test_a_config_of_ones_own_includes_one_that_ships(tmp_path):
    config = tmp_path / "mine.gin"
    config.write_text("include 'debug.gin'\nLEARNING_RATE = 0.5\n")
    configurables.bind(train, [str(config)])
    assert configurables.given("train")["batch_size"] == 8
    assert "linear.peak = 0.5" in configurables.resolved(train)


def test_a_runs_folder_as_a_config_is_told_of_the_file_in_it(tmp_path):
    (tmp_path / "config.gin").touch()
    with pytest.raises(UserError, match=rf"^--config {tmp_path} is a folder: write {tmp_path}/config\.gin$"):
        configurables.bind(probe, [str(tmp_path)])


def test_what_is_typed_is_utf8():
    with pytest.raises(UserError, match=r"^--set: \"probe.*udcef.* is not UTF-8"):
        configurables.bind(probe, [], ["probe.name = 'na\udcefve'"])
    assert configurables.names_bound("probe.name = '''open") == []


def fit(*, rate: float = 0.5, inner: Any = None, names: Sequence[str] = ("a",)): ...


DEFAULTS = {"fit.rate": "0.5", "fit.inner": "None", "fit.names": "('a',)"}
CONFIGS = st.fixed_dictionaries(
    {"RATE": st.sampled_from(["0.5", "0.25"])},
    optional={
        "fit.rate": st.sampled_from(["0.5", "5e-1", "0.25", "%RATE"]),
        "fit.inner": st.sampled_from(
            ["@linear()", "@schedules.linear()", "@adamw", "[%RATE]", "[0.5]", "{'a': %RATE}"]
        ),
        "fit.names": st.sampled_from(["('a',)", "('b',)"]),
        "staged.sizes": st.sampled_from(["[1]", "[2]"]),  # which nothing calls
    },
)


def canonical(value: str, rate: str) -> str:
    return value.replace("%RATE", rate).replace("5e-1", "0.5").replace("schedules.", "")


@settings(deadline=None, max_examples=100)
@given(CONFIGS, CONFIGS)
def test_configurations_differ_where_a_run_is_given_something_else(earlier, later):
    operative = {name: earlier.get(name, default) for name, default in DEFAULTS.items()}
    text = [f"{name} = {value}" for name, value in {"RATE": earlier["RATE"], **operative}.items()]
    configurables.bind(fit, [], own=[f"{name} = {value}" for name, value in later.items()])
    before, now = configurables.differences("\n".join(text))
    expected = {
        name
        for name, value in operative.items()
        if canonical(value, earlier["RATE"]) != canonical(later.get(name, DEFAULTS[name]), later["RATE"])
    }
    assert set(before) == set(now) == expected


@pytest.mark.parametrize("earlier", [[], ["train.task = @language_model"]])
@pytest.mark.parametrize("later", [[], ["train.task = @tasks.language_model"]])
def test_a_function_that_is_a_default_may_be_written_out(earlier, later):
    configurables.bind(train, ["debug.gin"], earlier)
    text = configurables.gin.config_str()
    configurables.bind(train, ["debug.gin"], later)
    assert configurables.differences(text) == ({}, {})
    configurables.bind(train, ["debug.gin"], ["train.task = @masked_lm"])
    differing = {"train.task": "@tasks.language_model"}, {"train.task": "@tasks.masked_lm"}
    assert configurables.differences(text) == differing


def test_a_setting_that_is_new_or_gone_or_of_a_scope_differs():
    configurables.bind(train, ["debug.gin"], own=["model.width = 8", "peak/staged.sizes = [1]"])
    assert configurables.differences("model.preset = 'debug'\npeak/staged.sizes = [1]\npeak/staged.ratio = 2") == (
        {"model.width": "not set", "peak/staged.ratio": "2"},
        {"model.width": "8", "peak/staged.ratio": "not set"},
    )
