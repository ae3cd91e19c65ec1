"""Evaluating a run: the numbers of its records, other files, other checkpoints, and nothing written."""

import hashlib
import math
from pathlib import Path

import pytest

from crescendo.experiments import evaluate as command
from crescendo.experiments import report
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError


@pytest.fixture(scope="module")
def run(train_small, corpus, tmp_path_factory):
    """A run with two held-out sets of its own."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    sets = {"validation": f"{corpus}/00*.txt", "news": f"{corpus}/01*.txt"}
    train_small(
        folder,
        f"text_files.validation_paths = {sets}",
        "train.evaluation_examples = 8",
        "train.checkpoint_every_examples = 256",
        "train.evaluate_every_examples = 256",
    )
    return folder


@pytest.fixture(autouse=True)
def _cache(run, small_bindings, monkeypatch):
    """Prepared data go where the run's are."""
    (directory,) = [binding for binding in small_bindings if "cache_directory" in binding]
    monkeypatch.setenv("XDG_CACHE_HOME", directory.split("'")[1])


def test_a_run_is_evaluated_as_it_was_while_it_trained_and_nothing_is_written(run):
    def content():
        return {path: hashlib.sha256(path.read_bytes()).digest() for path in run.rglob("*") if path.is_file()}

    before = content()
    task, seen, evaluations = command.evaluate(run)
    assert (task.unit, seen, list(evaluations)) == ("token", 512, ["validation", "news"])
    validation = read_run(run).validation
    for name, prefix in (("validation", ""), ("news", "news/")):
        assert evaluations[name].rows == 8
        assert evaluations[name].of_rows > 8
        for metric in ("loss", "bits_per_byte"):
            recorded = validation[prefix + metric][-1]
            assert evaluations[name].means[metric] == pytest.approx(recorded, rel=1e-5)
    _, seen, earlier = command.evaluate(run, at=256)
    assert seen == 256
    assert earlier["validation"].means["loss"] == pytest.approx(validation["loss"][0], rel=1e-5)
    assert content() == before


def test_bits_per_byte_are_all_nats_over_all_bytes_of_any_files(run, corpus, tmp_path, capsys):
    (tmp_path / "a=b").mkdir()
    for path in corpus.glob("02*.txt"):
        (tmp_path / "a=b" / path.name).write_bytes(path.read_bytes())
    command.main([str(run), "--data", f"old={tmp_path}/a=b/*.txt", f"{corpus}/03*.txt", "--examples", "999"])
    old, data = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert (old[0], data[0]) == ("old", "data")
    for (_, _, loss, bits), names in ((old, "02*.txt"), (data, "03*.txt")):
        sizes = [path.stat().st_size for path in corpus.glob(names)]
        labels = sum(sizes) + len(sizes)  # every byte, and an end of text for each document
        assert float(bits) == pytest.approx(float(loss) * labels / (math.log(2) * sum(sizes)), abs=2e-4)


def test_the_reports_show_every_held_out_set(run, capsys, tmp_path):
    report.main([str(run), "--out", str(tmp_path)])
    shown, validation = capsys.readouterr().out, read_run(run).validation
    assert f"{validation['bits_per_byte'][-1]:.3f}" in shown.splitlines()[3]
    (news,) = [line.split() for line in shown.splitlines() if " news " in line]
    assert news[-2:] == [f"{validation[f'news/{name}'][-1]:.4f}" for name in ("loss", "bits_per_byte")]
    page = (tmp_path / "report.html").read_text()
    assert "bits per byte" in page
    assert f"{validation['news/bits_per_byte'][-1]:.4f}" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--at", "5"], r"no checkpoint at 5 examples.*256, 512"),
        (["--examples", "0"], r"--examples 0 must be at least 1"),
        (["--data", "nowhere.txt"], r'--data: "nowhere.txt" does not exist'),
    ],
)
def test_what_is_not_there_is_named(run, arguments, message):
    with pytest.raises(UserError, match=message):
        command.main([str(run), *arguments])


def test_runs_that_do_not_say_what_they_are_and_data_that_changed_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        command.main([str(tmp_path)])
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("run.json", "metrics.jsonl"):
        (copy / name).write_bytes((run / name).read_bytes())
    (copy / "config.gin").write_text("# started from Python\n")
    with pytest.raises(UserError, match=r"has no config\.gin that says what it is"):
        command.main([str(copy)])
    config = (run / "config.gin").read_text()
    assert "validation_fraction = 0.05" in config
    (copy / "config.gin").write_text(config.replace("/00*.txt", "/02*.txt"))
    with pytest.raises(UserError, match=r"are not what they were when it trained: put them back, or name other files"):
        command.main([str(copy)])
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        command.main([str(copy), "--data", str(Path(__file__))])
