"""Any value for any parameter of anything that configs can name: taken, or refused in one line."""

import inspect
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gin
import jax
import jax.numpy as jnp
import optax
import pytest

from crescendo.experiments.configs import binding
from crescendo.experiments.configs.factories import FACTORIES
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.training import train
from crescendo.ranges import Count, told, words

NASTY = [
    0, -1, -0.0, 1e-320, -1e-320, 1e-45, 2**31 - 1, 2**31, 2**63, -(2**63), 10**400, 1e400, -1e400, float("nan"),
    1e38, 1e39, True, False, None, "", "x", "x" * 100_000, "\n[/b]\0\udcff", "none", [], [None], [[]], [0, -1],
    [1, "a"], [True], (), {}, {"a": None}, {1: 1, "b": 2}, b"bytes", b"", 1j, 0.5, 1, 2, 1.0, 3.0, ..., object(),
]  # fmt: skip
# What a factory needs besides the parameter that is tried; those that open data are given some that are there.
GIVEN: dict[str, dict[str, Any]] = {
    "optimizer": {"optimizer": optax.sgd(0.1)},
    "refined": {"path": "nowhere.json"},
    "staged": {"starts_examples": [0]},
    "group": {"path": "*"},
    "infinite": {"cooldown": 8},
    "step": {"total": 100},
}
OF_ANY = {
    "learning_rate": 0.1, "peak": 0.1, "batch_size": 8, "start": 8, "end": 16, "cap": 16, "sizes": [8],
    "warmup_examples": 64, "examples": 64, "every_examples": 64,
    "curve": {"tokens": [0, 9], "critical_batch_size": [9, 9]},
    "transforms": [optax.sgd(0.1)], "optimizer": optax.sgd(0.1), "paths": "nowhere", "name": "nowhere",
}  # fmt: skip
PARAMETERS = {"blocks": {"mlp": {"kernel": jnp.ones((2, 3, 4))}}, "head": jnp.ones((4, 5))}


def parameters() -> Iterator[tuple[str, str, inspect.Parameter]]:
    """Every parameter that a config can set: its function's complete name, its own, and it."""
    for table, factories in FACTORIES.items():
        for name, factory in factories.items():
            for key, parameter in inspect.signature(factory).parameters.items():
                if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    yield f"{table}.{name}", key, parameter


def others(selector: str, key: str, signature: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Values for what a function needs besides a parameter."""
    needed = {name: OF_ANY.get(name) for name, p in signature.items() if p.default is p.empty}
    return {k: v for k, v in (needed | GIVEN.get(selector.rpartition(".")[2], {})).items() if k != key}


def drawn(random: random.Random) -> Any:
    """A value of any kind."""
    number = random.choice([1, -1]) * 10.0 ** random.uniform(-322, 308)
    kinds: list[Callable[[], Any]] = [
        lambda: random.choice(NASTY),
        lambda: number,
        lambda: random.choice([1, -1]) * random.getrandbits(random.randint(1, 80)),
        lambda: random.uniform(-2, 2),
        lambda: "".join(chr(random.randint(0, 0x2FF)) for _ in range(random.randint(0, 9))),
        lambda: [drawn(random) for _ in range(random.randint(0, 3))],
        lambda: tuple(drawn(random) for _ in range(random.randint(0, 3))),
        lambda: {random.choice(["a", "b", 1]): drawn(random)},
    ]
    return random.choice(kinds)()


@pytest.fixture
def register(tmp_path, monkeypatch):
    """With the working folder and the cache in a folder of the test's, where no data are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    binding.bind(train, [])


def tried(selector: str, key: str, parameter: inspect.Parameter, value: Any) -> str:
    """ "taken" or "refused"; whatever else happens is a failure."""
    factory = gin.config._REGISTRY[selector].wrapped
    case = f"{selector}.{key} = {repr(value)[:80]}"
    try:
        made = factory(**others(selector, key, inspect.signature(factory).parameters), **{key: value})
        if isinstance(made, optax.GradientTransformation):
            try:
                jax.eval_shape(made.init, PARAMETERS)
            except ValueError as error:  # as a session takes it
                raise UserError(str(error).splitlines()[0]) from None
    except UserError as refused:
        said = str(refused)
        assert "\n" not in said and len(said) <= 1000, case  # noqa: PT018
        return "refused"
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    kinds = words(parameter.annotation)
    if isinstance(value, float):
        assert abs(value) < float("inf"), f"{case} is taken"
    if isinstance(value, bool) and "Any" not in kinds and "object" not in kinds:
        assert "bool" in kinds, f"{case} is taken"
    if isinstance(value, int | float) and not isinstance(value, bool) and told(parameter.annotation):
        assert value >= 0 or value == -1 or "at most 0" in told(parameter.annotation), f"{case} is taken"
    return "taken"


# Those that read a corpus or a catalogue are tried with little: one call takes them long.
SLOW = {"data.stdlib_text", "data.text_data", "data.image_data", "data.tfds_text"}


@pytest.mark.parametrize("table", FACTORIES)
def test_any_value_is_taken_or_refused_in_a_line(table, register):
    random_, count = random.Random(table), Counter[str]()
    for selector, key, parameter in parameters():
        if selector.rpartition(".")[0] == table and selector not in SLOW:
            for value in random_.sample(NASTY, 12):
                count[tried(selector, key, parameter, value)] += 1
    assert count["refused"] > 0 or not count
    print(f"{table}: {dict(count)}")


@pytest.mark.chaos
def test_tens_of_thousands_of_values(register):
    seed = random.randrange(2**31)
    random_, count = random.Random(seed), Counter[str]()
    print(f"seed {seed}")
    each = [one for one in parameters() if one[0] not in SLOW]
    for number in range(30_000):
        selector, key, parameter = each[number % len(each)]
        count[tried(selector, key, parameter, drawn(random_))] += 1
    print(dict(count))


def test_every_number_that_a_config_can_set_has_a_range():
    """So that no help is silent about it, and no negative one is taken where it means nothing."""
    without = {
        f"{selector}.{key}"
        for selector, key, parameter in parameters()
        if {"int", "float"} & set(words(parameter.annotation).replace("[", " ").replace("]", " ").split())
        and not re.search("Any|a tree", words(parameter.annotation))
        and not told(parameter.annotation)
    }
    assert without == set()


def test_a_literal_is_refused_before_anything_is_made():
    def seeded(*, seed: Count, data: object) -> None: ...

    binding.bind(seeded, [], ["seeded.seed = 1", "seeded.data = @linear()", "linear.peak = 0.5"])
    with pytest.raises(UserError, match=r"^seeded\.seed = 0 must be at least 1 and below 2\^31$"):
        binding.bind(seeded, [], ["seeded.seed = 0", "seeded.data = @linear()", "linear.peak = 0.5"])
