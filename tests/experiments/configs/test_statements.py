"""Configs as data: what gin reads back is what was given, and a user's statements don't contradict a command's own."""

import math

import gin
import numpy as np
import pytest
from gin import config_parser
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs.statements import Call, Macro, Reference, check_not_set, statements
from crescendo.experiments.runtime.errors import UserError


class Reader(config_parser.ParserDelegate):
    """References as the values that they were made of."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return Call(scoped_configurable_name) if evaluate else Reference(scoped_configurable_name)

    def macro(self, macro_name):
        return Macro(macro_name)


names = st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8})?", fullmatch=True)
keys = st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | keys | st.builds(Call, names) | st.builds(Reference, names) | st.builds(Macro, names),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=12,
)


def typed(value):
    """With the types, since True == 1 == 1.0, and with -0.0."""
    if isinstance(value, list | tuple):
        return type(value), [typed(item) for item in value]
    if isinstance(value, dict):
        return [(typed(key), typed(item)) for key, item in value.items()]
    return type(value), repr(value)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(["train.batch_size", "peak/linear.total", "RATE"]), values))
def test_gin_reads_back_what_was_given(bindings):
    text = statements(bindings)
    assert len(text) == len(bindings)
    for (name, value), statement in zip(bindings.items(), text, strict=True):
        (read,) = config_parser.ConfigParser(statement, Reader())
        assert "/".join(filter(None, [read.scope, ".".join(filter(None, [read.selector, read.arg_name]))])) == name
        assert typed(read.value) == typed(value)


def test_an_experiment_gets_the_values():
    def experiment(rate: float, sizes: list, policy: object, make: object) -> None:
        """For gin."""

    bound = {
        "RATE": 0.1 + 0.2,
        "experiment.rate": Macro("RATE"),
        "experiment.sizes": [2, Macro("RATE")],
        "experiment.policy": Call("batch_size.constant"),
        "batch_size.constant.batch_size": 3,
        "experiment.make": Reference("adamw"),
    }
    configurables.bind(experiment, [], statements(bound))
    values = configurables.arguments(experiment)
    assert values["rate"] == 0.1 + 0.2
    assert values["sizes"] == [2, 0.1 + 0.2]
    assert values["make"].__name__ == "adamw"
    gin.clear_config()


@pytest.mark.parametrize("value", [math.inf, math.nan, [1.0, -math.inf]])
def test_numbers_that_gin_has_no_text_for_are_refused(value):
    with pytest.raises(ValueError, match="has no gin text"):
        statements({"train.x": value})


@pytest.mark.parametrize("value", [np.float32(1.0), np.zeros(2), {1, 2}, b"x", len])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match="has no gin text"):
        statements({"train.x": value})


OWN = {"LEARNING_RATE": "--rate", "train.seed": "--seeds N", "schedules.linear.total": None}


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("LEARNING_RATE = 8e-3", "it sets LEARNING_RATE itself: give --rate 8e-3 instead of --set"),
        ("LEARNING_RATE=@wsd()", "it sets LEARNING_RATE itself: give --rate instead of --set"),
        ("LEARNING_RATE/macro.value = 1", "it sets LEARNING_RATE itself: give --rate 1 instead of --set"),
        ("train.seed = 3", "it sets train.seed itself: give --seeds N instead of --set"),
        ("experiments.train.seed = 3", "it sets experiments.train.seed itself"),
        ("a/b/train.seed = 3", "it sets train.seed itself"),
        ("linear.total = 5", "it sets linear.total itself: leave out --set 'linear.total = 5'"),
        ("optim.schedules.linear.total = 5", "it sets optim.schedules.linear.total itself"),
        ("model.width = 8\ntrain.seed = 3", "it sets train.seed itself"),
        ("train:\n  seed = 3\n", "it sets train.seed itself"),
    ],
)
def test_a_binding_of_the_commands_own_is_refused_however_it_is_written(statement, message):
    with pytest.raises(UserError) as refused:
        check_not_set("it", OWN, ["model.layers = 1", statement])
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    "statement", ["linear.peak = 1", "seed = 3", "RATE = %LEARNING_RATE", "wsd.total = 3", "no gin = 3", ""]
)
def test_other_bindings_pass(statement):
    check_not_set("it", OWN, [statement])
