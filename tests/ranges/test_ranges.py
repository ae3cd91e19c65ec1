"""Ranges at parameters: what they take, what they refuse and in which words."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from hypothesis import given
from hypothesis import strategies as st

from crescendo import optim, ranges
from crescendo.models import ModelConfig
from crescendo.ranges import Count, Decay, OneOf, Positive, Refused, checked, fitted


def is_a(value: object, annotation: Any) -> bool:
    return isinstance(value, annotation)


TAKEN = [
    (0.0, Decay), (-0.0, Decay), (1, Positive), (1e-37, Positive), (2**31 - 1, Count), (None, Count | None),
    (-1, Literal[-1] | Count), (3, Literal[-1] | Count), ([], Sequence[Count]), ((1, 2), Sequence[Count]),
    ([2.0], Annotated[Sequence[Positive], MinLen(1)]), ({"a": 1}, Mapping[str, Count]),
    (4, Annotated[int, MultipleOf(2)]),
    (math.inf, Annotated[float, Ge(0), Le(math.inf)]), (-5.0, Annotated[float, Le(0)]),
    ("a", Annotated[str, OneOf("ab")]),
    (print, Annotated[Any, Gt(0)]), ((0.0, 1.0), tuple[float, float]), (1, float),
]  # fmt: skip
REFUSED = [
    (1.0, Decay, "at least 0 and below 1"), (math.nan, Decay, "at least 0 and below 1"),
    (math.inf, Positive, "above 0 and finite"), (math.nan, float, "finite"), (-math.inf, float, "finite"),
    (1e39, Positive, r"above 0 and finite \(as float32 it is inf\)"), (10**400, Positive, "above 0 and finite"),
    (1e-320, Positive, r"above 0 and finite \(as float32 it is 0\)"),
    (1 - 1e-9, Decay, r"below 1 \(as float32 it is 1\)"),
    (0, Count, r"at least 1 and below 2\^31"), (2**31, Count, r"at least 1 and below 2\^31"),
    (True, Count, "int"), (True, float, "float"), (1.5, Count, "int"), ("1", Count, "int"), (None, Count, "int"),
    (True, Literal[-1] | Count, r"-1 \| int"), (0, Literal[-1] | Count, r"at least 1 and below 2\^31"),
    (True, Count | str, r"int \| str"), ([1, 0], Sequence[Count], r"each at least 1 and below 2\^31"),
    ("ab", Sequence[str], r"Sequence\[str\]"), ([], Annotated[Sequence[Count], MinLen(1)], "at least 1 long"),
    ({"a": 0}, Mapping[str, Count], "each at least 1"), ({1: 1}, Mapping[str, Count], "by str"),
    (3, Annotated[int, MultipleOf(2)], "a multiple of 2"), ("c", Annotated[str, OneOf("ab")], "one of a, b"),
    ("c", Literal["a", "b"], "'a' or 'b'"), ((1.0,), tuple[float, float], r"tuple\[float, float\]"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "annotation"), TAKEN)
def test_what_is_in_range_is_taken_as_it_is(value, annotation):
    assert fitted(value, annotation, is_a) is value or isinstance(value, dict)


@pytest.mark.parametrize(("value", "annotation", "message"), REFUSED)
def test_what_is_not_is_refused_in_words(value, annotation, message):
    with pytest.raises(Refused, match=message):
        fitted(value, annotation, is_a)


@given(st.floats() | st.integers(), st.floats(-10, 10, width=16), st.floats(0.125, 10, width=16))
def test_bounds_are_those_of_arithmetic(value, low, width):
    """Of numbers that float32 has exactly, or that are far from a bound."""
    high, near = low + width, float(np.float32(value)) if abs(value) < 1e30 else math.inf
    inside = abs(near) < math.inf and low <= near < high and low <= value < high and not 0 < abs(value) < 1e-30
    try:
        fitted(value, Annotated[float, Ge(low), Lt(high)])
    except Refused:
        assert not inside or low <= 0 < high
    else:
        assert low <= value < high


def test_an_int_past_the_devices_becomes_a_float_where_one_is_meant():
    assert type(fitted(2**31, Positive)) is float
    assert type(fitted(2**31 - 1, Positive)) is int
    assert [type(each) for each in fitted([1, 2**40], Sequence[Positive])] == [int, float]
    update, _ = optim.sgd(2**31).update(jnp.ones(1), optim.sgd(2**31).init(jnp.ones(1)), jnp.ones(1))
    assert float(update[0]) == -float(2**31)


def test_python_may_give_what_is_traced_a_schedule_or_an_array():
    """With no wait for the device: a traced value has none."""
    with jax.transfer_guard("disallow"):
        jax.jit(lambda rate, b1: optim.adamw(rate, b1=b1).init(jnp.ones(1)) and rate).lower(0.1, 0.9)
    injected = optax.inject_hyperparams(optim.adamw)(learning_rate=0.1, b1=0.9)
    state = injected.init(jnp.ones(1))
    jax.jit(injected.update)(jnp.ones(1), state, jnp.ones(1))
    jax.vmap(lambda rate: optim.sgd(rate).update(jnp.ones(1), optim.sgd(rate).init(jnp.ones(1)), jnp.ones(1))[0])(
        jnp.array([0.1, 0.2])
    )
    optim.adamw(jnp.float32(0.1), b1=np.float64(0.5))
    optim.adamw(optax.constant_schedule(0.1))
    for bad in (jnp.float32(-0.1), np.float32(np.nan), -1):
        with pytest.raises(ValueError, match=r"learning_rate = .* must be at least 0 and finite"):
            optim.adamw(bad)


def test_a_function_keeps_its_name_and_python_its_words():
    @checked
    def cook(minutes: Positive, *, how: str = "hot", stir: Callable | None = None) -> float:
        """Cooks."""
        return minutes

    assert (cook.__name__, cook.__doc__, cook(2.0)) == ("cook", "Cooks.", 2.0)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'minutes'"):
        cook()
    assert cook("long") == "long"  # types are Python's own affair
    with pytest.raises(ValueError, match=r"^minutes = 0 must be above 0 and finite$"):
        cook(0)


@pytest.mark.parametrize("value", [range(2), np.array([0, 4]), jnp.array([0, 4])], ids=["range", "numpy", "jax"])
def test_arrays_that_python_gives_are_checked_as_lists_are(value):
    taken = fitted(value, Sequence[Annotated[int, Ge(0)]])
    assert list(taken) == list(value)
    assert {type(each) for each in taken} == {int}
    with pytest.raises(ValueError, match=r"sizes = .* must each be at least 1"):
        optim.staged(value, starts_examples=[0, 8])


@pytest.mark.parametrize(("name", "value"), [("dtype", jnp.bfloat16), ("remat", None), ("remat", True)])
def test_python_too_chooses_among_what_there_is(name, value):
    with pytest.raises(
        ValueError, match=rf"{name} = .* must be 'float32' or|{name} = .* must be 'none', 'dots' or 'full'"
    ):
        ModelConfig(**{name: value})


def test_fields_of_a_dataclass_are_checked():
    @dataclasses.dataclass(frozen=True)
    class Pan:
        width: Count = 3
        heat: Decay | None = None

        def __post_init__(self):
            ranges.check_fields(self)

    assert Pan(4, 0.5) == Pan(4, 0.5)
    with pytest.raises(ValueError, match=r"^width = 0 must be at least 1 and below 2\^31: the default is 3$"):
        Pan(0)
    with pytest.raises(ValueError, match=r"heat = 1.0 must be at least 0 and below 1"):
        dataclasses.replace(Pan(), heat=1.0)


@pytest.mark.parametrize("value", ["x" * 1000, "a\nb", 10**5000, [[]] * 1000], ids=["long", "lines", "digits", "list"])
def test_a_value_is_shown_in_a_line(value):
    text = ranges.shown(value)
    assert len(text) <= 63
    assert "\n" not in text
