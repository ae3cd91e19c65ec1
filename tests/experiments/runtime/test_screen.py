"""Names that rich would take for markup: commands show them as they are."""

from pathlib import Path

import pytest

from crescendo.experiments import evaluate, generate, report, sweep
from crescendo.experiments import train as train_command
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.training import train


@pytest.fixture
def odd(tmp_path) -> Path:
    """A folder `[x]:+1:/a[/b]`: markup that vanishes, an emoji, and an end of markup that never began."""
    folder = tmp_path / "[x]:+1:" / "a[" / "b]"
    folder.mkdir(parents=True)
    return folder


def test_reports_show_names_as_they_are(make_run, odd, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    runs = [make_run(str(odd / name)) for name in ("[red]plain", "lr[1e-3]")]
    report.main([*map(str, runs), "--title", "[bold]both[/nothing]"])
    shown = capsys.readouterr().out
    assert f"{runs[0]}/report/report.html" in shown
    assert "[red]plain" in shown
    assert "lr[1e-3]" in shown


@pytest.mark.slow
def test_a_run_says_its_folder_and_its_label_as_they_are(small_bindings, odd, capsys):
    bound = configurables.bind(
        train,
        ["debug.gin"],
        ["train.label = '[red]a[/b]'", "TOTAL_EXAMPLES = 96"],
        own=small_bindings[:4] + small_bindings[5:],
    )
    bound(run=str(odd / "run"))
    assert "[red]a[/b]" in capsys.readouterr().out


def test_refusals_name_what_was_typed_as_it_was(odd, capsys, monkeypatch):
    monkeypatch.chdir(odd)
    for call in (
        lambda: train_command.main(["--config", "[x].gin"]),
        lambda: train_command.main(["--set", "train.label = [x]"]),
        lambda: evaluate.main(["[x]"]),
        lambda: generate.main(["[x]", "--prompt", "a"]),
        lambda: report.main(["[x]"]),
        lambda: sweep.main(["--config", "[x].gin", "--grid", "LEARNING_RATE = [1e-3]"]),
    ):
        with pytest.raises(UserError, match=r"\[x\]"):
            call()
