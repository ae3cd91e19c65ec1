"""Options made from a function's signature, and the options that each paper's command has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.papers import batch_warmup, critical_batch, large_batch, refine_schedule
from crescendo.experiments.runtime import command
from crescendo.experiments.runtime.errors import UserError
from crescendo.ranges import Count, Positive


def experiment(
    name: str,
    run: Path = Path("runs/it"),
    *,
    configs: Sequence[str] = ("debug.gin",),
    bindings: Sequence[str] = (),
    batch_size: int = 2,
    rates: Sequence[float] = (1e-3, 0.5),
    norm: Literal["l1", "l2"] = "l1",
    norms: Sequence[Literal[1, 2]] = (1,),
    quiet: bool = False,
    shuffle: bool = True,
    minutes: float | None = None,
    data: Path | None = None,
) -> dict:
    """Tries it,
    once.

    More is said of it.

    Args:
      name: of it; 5% of `rates` and `TOTAL` are
        enough.
      run: the folder.
      configs: gin files.
      bindings: gin statements.
      batch_size: in examples.
      rates: of learning.
      norm: which.
      norms: more.
      quiet: say nothing.
      shuffle: the rows.
      minutes: stop then.
      data: a file.

    Returns:
      Nothing.
    """
    return dict(locals())


def parse(*arguments: str) -> dict:
    parser = command.make_parser(experiment, "examples:\n  it", configurables.parser)
    return command.call(experiment, parser.parse_args(["--name", "x", *arguments]))


def test_what_is_not_given_is_the_functions_own_default():
    assert parse() == experiment("x", bindings=[])


def test_every_type_is_read():
    given = parse(
        *("--run", "a/b", "--config", "a.gin", "--config", "b.gin", "--set", "x = 1", "--set", "y = 2"),
        *("--batch-size", "8", "--rates", "1", "2e-3", "--norm", "l2", "--norms", "2", "1", "--quiet", "--no-shuffle"),
        *("--minutes", "1.5", "--data", "c"),
    )
    assert given == experiment(
        "x",
        Path("a/b"),
        configs=["a.gin", "b.gin"],
        bindings=["x = 1", "y = 2"],
        batch_size=8,
        rates=[1.0, 2e-3],
        norm="l2",
        norms=[2, 1],
        quiet=True,
        shuffle=False,
        minutes=1.5,
        data=Path("c"),
    )


@pytest.mark.parametrize(
    "arguments", [["--batch-size", "2.5"], ["--norm", "l3"], ["--norms", "3"], ["--rates"], ["-x"]]
)
def test_a_value_of_another_type_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_help_and_defaults_are_the_functions():
    text = " ".join(command.make_parser(experiment, "examples:\n  it", configurables.parser).format_help().split())
    for said in (
        "Tries it, once. options:",
        "--name NAME of it; 5% of --rates and TOTAL are enough --run",
        "--run PATH the folder (default runs/it)",
        "--batch-size N in examples (default 2)",
        "--rates X [X ...] of learning (default 0.001 0.5)",
        "--norm {l1,l2} which (default l1)",
        "--quiet say nothing --",
        "--minutes X stop then --data PATH a file examples: it",
    ):
        assert said in text


def test_a_parameter_that_no_option_can_be_made_of_is_a_mistake():
    def unsaid(a: int = 1) -> None:
        """Says nothing of a."""

    def odd(a: dict | None = None) -> None:
        """Odd.

        Args:
          a: what.
        """

    with pytest.raises(TypeError, match="unsaid: a needs an annotation and a line below Args:"):
        command.make_parser(unsaid)
    with pytest.raises(TypeError, match=r"odd\.a: no option can be made of"):
        command.make_parser(odd)


CONFIGURED = "module allow-imports config set run"  # of every command that takes configs
OPTIONS = {
    batch_warmup: f"{CONFIGURED} batch-size double-at total-examples arms largest curve learning-rates seeds minutes",
    refine_schedule: f"{CONFIGURED} learning-rate peak-factor norm smoothing seeds",
    critical_batch: f"{CONFIGURED} batch-size factors points branch-examples tolerance seeds first-seed minutes",
    large_batch: "task run size optimizers batch-sizes multipliers epochs train-examples seeds minutes data prepare",
}


@pytest.mark.parametrize("paper", OPTIONS, ids=lambda paper: paper.__name__.split(".")[-1])
def test_the_options_of_each_command(paper):
    actions = paper.parser()._actions
    assert [option for action in actions[1:] for option in action.option_strings] == [
        f"--{name}" for name in OPTIONS[paper].split()
    ]
    assert all(action.help for action in actions)


def test_ranges_are_shown_and_checked():
    def cook(*, minutes: Positive, seeds: Sequence[Count] = (1,), how: Literal["hot", "cold"] = "hot") -> None:
        """Cooks.

        Args:
          minutes: how long.
          seeds: of what.
          how: it is served.
        """

    parser = command.make_parser(cook)
    text = " ".join(parser.format_help().split())
    assert "how long (above 0)" in text
    assert "of what (each at least 1; default 1)" in text
    for typed, message in (
        (["--minutes", "0"], "--minutes = 0.0 must be above 0 and finite"),
        (["--minutes", "inf"], "--minutes = inf must be above 0 and finite"),
        (["--minutes", "1", "--seeds", "1", "0"], r"--seeds = \[1, 0\] must each be at least 1 and below 2\^31"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            command.call(cook, parser.parse_args(typed))
