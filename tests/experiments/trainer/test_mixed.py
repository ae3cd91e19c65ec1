"""A run on a mixture: its records, its report, and what it goes on under."""

import pytest

from crescendo.experiments import evaluate as evaluation
from crescendo.experiments import train as command
from crescendo.experiments.reports.charts import charts_of
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError


@pytest.fixture
def bindings(corpus):
    return [
        "text_data.documents = @text_mixture()",
        "text_mixture.sources = {'even': @text_files(), 'few': @few/text_files()}",
        f"text_files.paths = ['{corpus}/[012]*.txt']",
        f"few/text_files.paths = ['{corpus}/3*.txt']",
        "text_mixture.weights = {0: {'even': 1, 'few': 0}, 128: {'even': 1, 'few': 3}}",
        "text_mixture.between = 'anneal'",
        "text_mixture.validation_weights = {'even': 1, 'few': 3}",
        "text_data.validation_fraction = 0.2",
        "train.total_examples = 256",
    ]


@pytest.fixture(autouse=True)
def _cache(small_bindings, monkeypatch):
    """Prepared data go where the runs' are."""
    (directory,) = [binding for binding in small_bindings if "cache_directory" in binding]
    monkeypatch.setenv("XDG_CACHE_HOME", directory.split("'")[1])


def test_a_run_records_each_source(bindings, train_small, records, tmp_path, capsys):
    train_small(tmp_path / "a", *bindings)
    assert "passes over even" in capsys.readouterr().out
    found = records(tmp_path / "a")
    by_clock = {each["examples_seen"]: each for each in found if each["kind"] == "train"}
    # By the integral of the shares: at 128 examples 3/8 of them are of the scarce source, and 3/4 from then on.
    assert by_clock[256]["epochs_few"] / by_clock[128]["epochs_few"] == pytest.approx((48 + 96) / 48, rel=0.05)
    assert by_clock[256]["epochs_even"] > by_clock[128]["epochs_even"] > 0
    last = [each for each in found if each["kind"] == "validation"][-1]
    for metric in ("loss", "bits_per_byte"):
        assert last[metric] == pytest.approx(last[f"even/{metric}"] / 4 + 3 * last[f"few/{metric}"] / 4, rel=1e-6)
    titles = [chart.title for chart in charts_of([("a", [read_run(tmp_path / "a")])])]
    assert {"Loss on even", "Loss on few", "Passes over even", "Passes over few"} <= set(titles)


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit_under_its_own_weights_alone_and_is_evaluated_as_it_was(
    bindings, train_small, records, tmp_path
):
    (tmp_path / "news.txt").write_text("nothing new " * 20)
    bindings = [*bindings, f"few/text_files.validation_paths = {{'news': '{tmp_path}/news.txt'}}"]
    train_small(tmp_path / "whole", *bindings)
    train_small(tmp_path / "parts", *bindings, "train.stop_after_tokens = 4096")  # 128 rows of 32
    with pytest.raises(UserError, match=r"can't go on: data was .* the weights of sources"):
        train_small(tmp_path / "parts", *bindings, "text_mixture.between = 'hold'")
    train_small(tmp_path / "parts", *bindings)
    whole, parts = ([r for r in records(tmp_path / name) if r["kind"] == "train"] for name in ("whole", "parts"))
    assert parts == whole
    _, _, evaluated = evaluation.evaluate(tmp_path / "parts")
    assert list(evaluated) == ["validation", "even", "few", "few-news"]
    assert evaluated["validation"].rows == evaluated["even"].rows + evaluated["few"].rows
    assert evaluated["validation"].of_rows == evaluated["even"].of_rows + evaluated["few"].of_rows
    last = [each for each in records(tmp_path / "parts") if each["kind"] == "validation"][-1]
    for name, prefix in (("validation", ""), ("even", "even/"), ("few", "few/")):
        assert evaluated[name].means["loss"] == pytest.approx(last[f"{prefix}loss"], rel=1e-5)


def test_more_epochs_than_allowed_are_refused_before_the_start(bindings, train_small, tmp_path):
    with pytest.raises(UserError, match=r"the weights draw \d+ examples of few in 256, and its \d+ rows give \d+"):
        train_small(tmp_path / "b", *bindings, "text_mixture.most_epochs = {'few': 0.1}")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("of", ["mixture", "one source"])
def test_a_preview_shows_rows_and_bounds_and_trains_nothing(
    of, bindings, small_bindings, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    given = [*small_bindings, *(bindings if of == "mixture" else [])]
    (tmp_path / "runs.gin").write_text("include 'debug.gin'\n" + "\n".join(given))
    command.main(["--config", "runs.gin", "--preview", "3"])
    shown = capsys.readouterr().out
    assert shown.count("\nexample ") == 3
    place = "even, row" if of == "mixture" else "; 32 tokens of"
    assert shown.count(place) == 3
    assert "a document goes on" in shown
    assert "| " in shown
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="--preview 0 must be at least 1"):
        command.main(["--config", "runs.gin", "--preview", "0"])
