"""What a configuration refers to, checked before anything is called: values, functions, calls that never end."""

from typing import Any

import gin

from crescendo.experiments.configs.factories import FACTORIES
from crescendo.experiments.configs.references import MACRO, Binding, Reached, effective, references, short, signature_of
from crescendo.experiments.runtime import arguments
from crescendo.experiments.runtime.errors import UserError
from crescendo.optim import TRANSFORMS
from crescendo.ranges import shown


def check_all(experiment: str, reached: Reached) -> None:
    """Everything that can be said of a configuration before anything is called.

    Raises:
      UserError: see the functions below.
    """
    check_calls_end(reached)
    check_calls(reached)
    check_values(reached)
    check_optimizers(experiment, reached)


def check_calls_end(reached: Reached) -> None:
    """That no experiment stands within a config, and nothing within itself: such calls would never end.

    Raises:
      UserError: names the binding.
    """
    for binding, value in reached.used.items():
        for reference in references(value):
            if reference.configurable.selector.rpartition(".")[0] == "experiments":
                raise UserError(f"{binding} = {reference!r}: an experiment can't stand within a configuration")
    for scope, selector in reached.calls:
        if selector == "gin.singleton" and not effective(scope, selector):
            raise UserError(f"{scope}{'/' if scope else ''}singleton.constructor is not set: name what it makes once")
    ended: set[tuple[str, str]] = set()

    def follow_down(call: tuple[str, str], above: tuple[tuple[str, str], ...]) -> None:
        if call in ended:
            return
        for binding, value in effective(*call).items():
            for reference in references(value):
                inner = "/".join(reference.scopes) or call[0], reference.configurable.selector
                if inner in (*above, call):
                    raise UserError(f"{binding} = {shown(value)} stands within itself: name something else there")
                if reference.evaluate:
                    follow_down(inner, (*above, call))
        ended.add(call)

    for call in reached.calls:
        follow_down(call, ())


def check_values(reached: Reached) -> None:
    """That what is written out has the type and the range of its parameter, before anything is called.

    What functions make is checked when they have made it.

    Raises:
      UserError: names the first value that hasn't.
    """
    for binding, value in reached.used.items():
        if binding.selector.startswith(("gin.", "optax.")):
            continue
        value, literal = _without_macros(value, ())
        if literal:
            given = {binding.parameter: value}
            arguments.fit(given, signature_of(binding.selector).parameters, str(binding).rpartition(".")[0])


def _without_macros(value: Any, above: tuple[str, ...]) -> tuple[Any, bool]:
    """A value with its macros' values in their place, and whether no reference is left in it."""
    match value:
        case gin.config.ConfigurableReference():
            name = "/".join(value.scopes)
            bound = effective(name, MACRO) if value.configurable.selector == MACRO else {}
            if not bound or name in above:
                return value, False
            return _without_macros(next(iter(bound.values())), (*above, name))
        case list() | tuple():
            items = [_without_macros(each, above) for each in value]
            return type(value)(each for each, _ in items), all(literal for _, literal in items)
        case dict():
            named = {key: _without_macros(each, above) for key, each in value.items()}
            return {key: each for key, (each, _) in named.items()}, all(literal for _, literal in named.values())
    return value, True


def check_calls(reached: Reached) -> None:
    """That `@name()` stands where what a function makes is wanted, and `@name` where the function is.

    Raises:
      UserError: names the first that doesn't.
    """
    for binding, value in reached.used.items():
        if not _is_ours(binding.selector) or binding.parameter not in signature_of(binding.selector).parameters:
            continue
        annotation = signature_of(binding.selector).parameters[binding.parameter].annotation
        # Such as `task: Callable[..., Task]`; a schedule, `Callable[[Numeric], Numeric]`, is what a factory makes.
        wants_function = "Callable[..." in str(annotation)
        for reference in references(value):
            table = reference.configurable.selector.rpartition(".")[0]
            if table not in FACTORIES or reference.evaluate != wants_function:
                continue
            if annotation in (Any, object) and table not in ("data", "models"):
                continue
            bare = repr(reference).removesuffix("()")
            if wants_function:
                raise UserError(f"{binding} = {bare}() is wanted as the function itself: write {binding} = {bare}")
            raise UserError(f"{binding} = {bare} is the function itself: write {bare}() for what it makes")


def check_optimizers(experiment: str, reached: Reached) -> None:
    """That no transform without a learning rate is an experiment's optimizer: its updates point along the gradient.

    Raises:
      UserError: names it.
    """
    value = reached.used.get(Binding("", experiment, "optimizer"))
    for reference in references(value):
        selector = reference.configurable.selector
        name = selector.rpartition(".")[2]
        if (
            name in TRANSFORMS
            and selector.startswith("optim.")
            and "learning_rate" not in signature_of(selector).parameters
        ):
            owner = short(experiment)
            raise UserError(
                f"{owner}.optimizer = @{name}() has no learning rate, and would climb: set {owner}.optimizer = "
                f"@chain(), chain.transforms = [@{name}(), @scale_by_learning_rate()] and "
                "scale_by_learning_rate.learning_rate"
            )


def _is_ours(selector: str) -> bool:
    return selector.rpartition(".")[0] in {*FACTORIES, "experiments"}
