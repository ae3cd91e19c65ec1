"""Sweeps: the points, the processes, what is kept, what a failure leaves."""

import io
import json
import math
import re
import shlex
import sys
import time
from pathlib import Path

import optuna
import pytest

from crescendo.experiments import sweep
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs import own_modules
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.sweeps import launchers as sweep_launchers
from crescendo.experiments.sweeps import plots as sweep_plots
from crescendo.experiments.sweeps import runner
from crescendo.experiments.sweeps.finished import check_points
from crescendo.experiments.sweeps.points import Point, axis, enumerate_points, spaces, zipped
from crescendo.experiments.sweeps.search import open_study, search
from crescendo.experiments.trainer.training import train
from crescendo.pallas_kernels.console import plain_console


def test_grids_multiply_zips_move_together_and_chains_follow():
    links = [[axis("a.x = [1, 2]"), zipped("b.y = ['p,q', [3]]; c.z = [@f(), %M]")], [axis("a.x = [5]")]]
    values = [point.values for point in enumerate_points(links)]
    assert values == [
        {"a.x": "1", "b.y": "'p,q'", "c.z": "@f()"},
        {"a.x": "1", "b.y": "[3]", "c.z": "%M"},
        {"a.x": "2", "b.y": "'p,q'", "c.z": "@f()"},
        {"a.x": "2", "b.y": "[3]", "c.z": "%M"},
        {"a.x": "5"},
    ]
    names = {point.name for point in enumerate_points(links)}
    assert len(names) == 5
    assert all("/" not in name and "'" not in name for name in names)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (axis, "a.x = 3"),
        (axis, "a.x = []"),
        (axis, "= [1]"),
        (zipped, "a.x = [1]; b.y = [1, 2]"),
        (lambda text: spaces([text]), "a.x = gauss(0, 1)"),
        (lambda text: spaces([text]), "a.x = log(0, 1)"),
        (lambda text: spaces([text]), "a.x = uniform(1)"),
        (lambda text: spaces([text]), "a.x = uniform(nan, 1)"),
        (lambda text: spaces([text]), "a.x = uniform(0, inf)"),
        (lambda text: spaces([text]), "a.x = int(1, 2.5)"),
        (lambda text: spaces([text, text]), "a.x = int(1, 2)"),
        (lambda text: enumerate_points([[axis(text), axis(text)]]), "a.x = [1]"),
        (lambda text: sweep.main([]), ""),
        (lambda text: sweep.main(["--grid", text, "--chain"]), "a.x = [1]"),
        (lambda text: sweep_launchers.divide_devices(["0"], 2), ""),
    ],
)
def test_a_mistake_is_one_line(make, text: str):
    with pytest.raises(UserError) as caught:
        make(text)
    assert "\n" not in str(caught.value)


STAND_IN = """
import json, pathlib, sys
run, value = pathlib.Path(sys.argv[1]), float(sys.argv[2])
run.mkdir(exist_ok=True)
with open(run / "starts", "a") as starts: starts.write("x")
if value < 0: sys.exit("error: value = -1.0 must be above 0")
(run / "run.json").write_text(json.dumps({"name": run.name, "total_examples": 8}))
(run / "config.gin").write_text("")
record = {"step": 1, "examples_seen": 8, "tokens_seen": 64, "seconds": 1.0, "loss": value, "batch_size": 8}
record |= {f"{part}_seconds": 0.0 for part in ("compile", "evaluation", "saving", "lost")} | {"wall_seconds": 7.0}
kinds = ("train", "validation", "time")
(run / "metrics.jsonl").write_text("".join(json.dumps({"kind": k, **record}) + "\\n" for k in kinds))
"""


@pytest.fixture
def stand_in(monkeypatch):
    """Instead of training, a process that writes a finished run whose loss is the value of `x`; it fails below 0."""

    def command(point: Point, folder: Path, configs, bindings, modules) -> list[str]:
        return [sys.executable, "-S", "-c", STAND_IN, str(folder / point.name), point.values["x"]]

    monkeypatch.setattr(runner, "command", command)


def options(jobs: int) -> dict:
    launcher = sweep_launchers.Local(jobs, devices=[])
    return {"configs": [], "bindings": [], "launcher": launcher, "console": plain_console(file=io.StringIO())}


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_failing_point_is_recorded_and_a_finished_one_never_run_again(stand_in, tmp_path: Path, jobs: int):
    points = enumerate_points([[axis("x = [2.0, -1.0, 1.0]")]])
    for _ in range(2):
        waiting, outcomes = iter(points), runner.Outcomes(tmp_path)
        runner.run_points(
            tmp_path, lambda w=waiting: next(w, None), lambda *a: None, lambda p: False, outcomes, **options(jobs)
        )
    assert [(tmp_path / point.name / "starts").read_text() for point in points] == ["x", "xx", "x"]
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [rows[point.name]["status"] for point in points] == ["done", "failed", "done"]
    assert rows[points[1].name]["why"] == "exit code 1: error: value = -1.0 must be above 0"
    assert [name for name, _ in outcomes.ranked()] == [points[2].name, points[0].name]


def test_a_search_keeps_its_study_and_takes_up_what_was_left_running(stand_in, tmp_path: Path):
    text = ["x = uniform(1, 2)"]
    search(tmp_path, text, 2, runner.Outcomes(tmp_path), **options(1))
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'study.db'}")
    left = study.ask(spaces(text))
    outcomes = runner.Outcomes(tmp_path)
    search(tmp_path, text, 4, outcomes, **options(1))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    assert study.trials[left.number].params == left.params
    assert all(trial.value == trial.params["x"] for trial in study.trials)
    assert all((tmp_path / f"trial-000{i}" / "starts").read_text() == "x" for i in range(4))
    assert len(outcomes.ranked()) == 4


def test_a_point_that_was_trained_otherwise_is_refused(make_run, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sweep, "run_points", lambda *a, **k: None)
    monkeypatch.setattr(sweep, "finish_sweep", lambda *a, **k: None)
    folder = tmp_path / "sweep"
    command = ["--grid", "train.batch_size = [8, 16]", "--run", str(folder), "--set", "TOTAL_EXAMPLES = 64"]
    sweep.main(command)
    configurables.bind(train, ["debug.gin"], ["TOTAL_EXAMPLES = 64", "train.batch_size = 16"])
    point = enumerate_points([[axis("train.batch_size = [16]")]])[0]
    make_run("earlier", config=configurables.gin.config_str()).rename(folder / point.name)
    sweep.main(command)
    for statement, message in (
        ("train.seed = 1", "train.seed was not set and is now 1"),
        ("TOTAL_EXAMPLES = 128", "train.total_examples was 64 and is now 128"),
    ):
        with pytest.raises(UserError, match=f"{re.escape(point.name)} can't go on: {message}"):
            sweep.main([*command, "--set", statement])


def test_a_point_that_was_trained_on_other_text_is_refused(make_run, tmp_path: Path, monkeypatch):
    """The settings say where the text is, and not what it is."""
    text = tmp_path / "a.txt"
    text.write_text("".join(f"line {i} of the text\n" for i in range(4000)))
    documents = [f"text_files.paths = {str(text)!r}", "text_files.document_bytes = 256"]
    options = ["text_data.documents = @text_files()", f"text_data.cache_directory = '{tmp_path / 'cache'}'", *documents]
    bindings = [*options, "SEQUENCE_LENGTH = 8", "train.batch_size = 16"]
    configurables.bind(train, ["debug.gin"], bindings)
    point = enumerate_points([[axis("train.batch_size = [16]")]])[0]
    folder = tmp_path / "sweep"
    folder.mkdir()
    run = make_run("earlier", config=configurables.gin.config_str()).rename(folder / point.name)
    fingerprint = configurables.arguments(train, ["data"])["data"].fingerprint
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"fixed": {"data": fingerprint}}))
    check_points(folder, [point], ["debug.gin"], bindings)
    text.write_text(text.read_text().replace("line", "LINE"))
    with pytest.raises(UserError, match=rf"can't go on: data was {fingerprint} and is now \w+, a hash of what is read"):
        check_points(folder, [point], ["debug.gin"], bindings)


def test_a_search_that_goes_on_draws_what_it_would_have_drawn(stand_in, tmp_path: Path):
    def values(folder: str, trials: int) -> list[str]:
        outcomes = runner.Outcomes(tmp_path / folder)
        search(tmp_path / folder, ["x = uniform(1, 2)"], trials, outcomes, **options(1))
        return [row["values"]["x"] for row in outcomes.rows.values()]

    first = values("parts", 2)
    assert values("parts", 4)[:2] == first
    assert values("parts", 4) == values("at_once", 4)
    assert len(set(values("parts", 4))) == 4


def test_a_search_in_other_spaces_is_refused_and_leaves_no_trial(stand_in, tmp_path: Path):
    search(tmp_path, ["x = uniform(1, 2)"], 1, runner.Outcomes(tmp_path), **options(1))
    others = ["x = log(1, 2)", "x = choice(1.5, 1.75)", "x = int(1, 2)", "x = uniform(0, 1)", "y = uniform(1, 2)"]
    for text in others:
        with pytest.raises(UserError, match=r"searched .*another --run"):
            search(tmp_path, [text], 2, runner.Outcomes(tmp_path), **options(1))
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"]
    study.ask()  # as an end between a trial's beginning and its draw leaves it
    outcomes = runner.Outcomes(tmp_path)
    search(tmp_path, ["x = uniform(0, 3)"], 2, outcomes, **options(1))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert [row["values"].keys() for row in outcomes.rows.values()] == [{"x"}, {"x"}]


def test_a_run_of_a_trial_that_the_study_does_not_hold_is_refused(stand_in, tmp_path: Path):
    text = ["x = uniform(1, 2)"]
    search(tmp_path, text, 2, runner.Outcomes(tmp_path), **options(1))
    (tmp_path / "study.db").rename(tmp_path / "elsewhere.db")
    with pytest.raises(UserError, match=r"trial-0000 is the run of a trial that .*study\.db doesn't hold"):
        search(tmp_path, ["x = uniform(3, 4)"], 2, runner.Outcomes(tmp_path), **options(1))
    (tmp_path / "elsewhere.db").rename(tmp_path / "study.db")
    search(tmp_path, text, 3, runner.Outcomes(tmp_path), **options(1))
    assert (tmp_path / "trial-0002").is_dir()


@pytest.mark.parametrize(
    "spoilt", [(b"FloatDistribution", b"FloatDistributiom"), (b'"low"', b'"lox"'), (b'"low"', b"'low'")]
)
def test_a_study_that_holds_what_is_no_trial_is_one_line(tmp_path: Path, spoilt: tuple[bytes, bytes]):
    study, drawn = open_study(tmp_path / "study.db")
    assert drawn == []
    study.ask(spaces(["x = uniform(1, 2)"]))
    content = (tmp_path / "study.db").read_bytes()
    (tmp_path / "study.db").write_bytes(content.replace(*spoilt))
    with pytest.raises(UserError, match=r"study\.db can't be opened \(.*\): restore") as refused:
        open_study(tmp_path / "study.db")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["lr?mode=memory", "100%41", "{x}", "a#b", "[x]"])
def test_a_study_is_in_its_own_folder_whatever_its_name(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    study, _ = open_study(tmp_path / name / "study.db")
    study.ask(spaces(["x = uniform(1, 2)"]))
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert [each.name for each in (tmp_path / name).iterdir()] == ["study.db"]
    assert len(open_study(tmp_path / name / "study.db")[1]) == 1


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"\1" * 200])
def test_a_study_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes):
    (tmp_path / "study.db").write_bytes(content)
    with pytest.raises(UserError, match=r"study\.db can't be opened \(.*\): restore") as refused:
        search(tmp_path, ["x = uniform(1, 2)"], 1, runner.Outcomes(tmp_path), **options(1))
    assert "\n" not in str(refused.value)


def test_a_search_of_other_settings_is_refused(stand_in, make_run, tmp_path: Path):
    search(tmp_path, ["x = uniform(1, 2)"], 1, runner.Outcomes(tmp_path), **options(1))
    (tmp_path / "trial-0000" / "config.gin").write_text("train.seed = 0")
    with pytest.raises(UserError, match=r"trial-0000 can't go on: train\.seed was 0 and is now 1"):
        search(
            *(tmp_path, ["x = uniform(1, 2)"], 2, runner.Outcomes(tmp_path)),
            **options(1) | {"bindings": ["train.seed = 1"]},
        )


def test_the_slurm_script_has_a_task_for_each_point(tmp_path: Path, capsys):
    sweep.main(["--launcher", "slurm", "--grid", "train.seed = [1, 2, 3]", "--run", str(tmp_path / "s")])
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-2" in script
    assert script.count("crescendo.experiments.train") == 3
    assert "--set 'train.seed = 3'" in script


def test_the_slurm_script_says_how_to_get_the_report_and_that_works(make_run, tmp_path: Path, capsys, monkeypatch):
    folder = tmp_path / "s"
    sweep.main(["--launcher=slurm", "--grid", "train.seed = [1, 2]", "--run", str(folder)])
    written = capsys.readouterr()
    (said,) = re.findall(r"^#   (.*)$", written.out, flags=re.MULTILINE)
    assert said in written.err
    words = shlex.split(said)[3:]
    with pytest.raises(UserError, match="no such folder, so no sweep to report"):
        sweep.main(words)
    done = enumerate_points([[axis("train.seed = [1]")]])[0]
    folder.mkdir()
    make_run("earlier", loss=2.5).rename(folder / done.name)
    monkeypatch.setattr(sweep, "check_points", lambda *a: None)
    monkeypatch.setattr(sweep_launchers.Local, "start", None)  # nothing is started
    sweep.main(words)
    assert "1 done, 1 waiting" in capsys.readouterr().out
    assert (folder / "report" / "report.html").exists()


def test_a_sweep_says_what_it_does_where_there_is_no_terminal(stand_in, tmp_path: Path):
    points = enumerate_points([[axis("x = [2.0, -1.0, 1.0]")]])
    waiting, outcomes, screen = iter(points), runner.Outcomes(tmp_path, 3), io.StringIO()
    runner.run_points(
        *(tmp_path, lambda: next(waiting, None), lambda *a: None, lambda p: False, outcomes),
        **(options(1) | {"console": plain_console(file=screen)}),
    )
    lines = screen.getvalue().splitlines()
    assert [re.sub(r"  about .* left$", "", line) for line in lines] == [
        "0/3  running  x = 2.0",
        "1/3  done  loss 2.0000  in 0:07  x = 2.0",
        "1/3  running  x = -1.0",
        "2/3  failed: exit code 1: error: value = -1.0 must be above 0  x = -1.0",
        "2/3  running  x = 1.0",
        "3/3  done  loss 1.0000  in 0:07  x = 1.0",
    ]
    assert ["left" in line for line in lines] == [False, True, True, True, True, False]


def test_runs_end_with_a_sweep_whose_lines_nobody_reads_any_more(tmp_path: Path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    started, popen = [], sweep_launchers.subprocess.Popen
    monkeypatch.setattr(runner, "command", lambda *a: [sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(
        sweep_launchers.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    points = iter(enumerate_points([[axis("x = [1.0, 2.0]")]]))
    with pytest.raises(BrokenPipeError):
        runner.run_points(
            *(tmp_path, lambda: next(points, None), lambda *a: None, lambda p: False, runner.Outcomes(tmp_path, 2)),
            **(options(1) | {"console": plain_console(file=Closed())}),
        )
    try:
        assert [process.wait(timeout=5) for process in started] == [-15]
    finally:
        for process in started:
            process.kill()


def test_the_last_table_keeps_the_seconds(stand_in, tmp_path: Path):
    for _ in range(2):  # of points that were finished before, too
        waiting, outcomes = iter(enumerate_points([[axis("x = [2.0, 1.0]")]])), runner.Outcomes(tmp_path, 2)
        runner.run_points(
            *(tmp_path, lambda w=waiting: next(w, None), lambda *a: None, lambda p: False, outcomes), **options(1)
        )
        screen = io.StringIO()
        runner.finish_sweep(tmp_path, outcomes, plain_console(file=screen))
        assert re.findall(r"x = (\S+) +done +\S+ +(\S+)", screen.getvalue()) == [("1.0", "7.0"), ("2.0", "7.0")]


PRUNABLE = """
import json, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
run.mkdir(exist_ok=True)
(run / "run.json").write_text(json.dumps({"name": run.name, "total_examples": 8}))
(run / "config.gin").write_text("")
late = run.name >= "trial-0004"
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
for seen in (4, 8):
    record = {"step": 1, "examples_seen": seen, "tokens_seen": 8, "seconds": 1.0, "batch_size": 4}
    record["loss"] = 2.0 if late else 1.0
    with open(run / "metrics.jsonl", "a") as file:
        for kind in ("train", "validation"): file.write(json.dumps({"kind": kind, **record}) + "\\n")
    if late and seen == 4: time.sleep(20)
"""


def test_a_trial_worse_than_the_median_is_given_up(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(
        runner, "command", lambda point, folder, *rest: [sys.executable, "-S", "-c", PRUNABLE, str(folder / point.name)]
    )
    outcomes, begin = runner.Outcomes(tmp_path, 6), time.monotonic()
    search(tmp_path, ["x = uniform(1, 2)"], 6, outcomes, **options(1))
    assert time.monotonic() - begin < 20  # less than one of the last two would take
    assert [row["status"] for row in outcomes.rows.values()] == ["done"] * 4 + ["pruned"] * 2
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4 + ["PRUNED"] * 2
    assert study.trials[4].intermediate_values == {4: 2.0}


@pytest.mark.slow
def test_the_pruner_gives_up_a_run_that_trains_badly(small_bindings, tmp_path: Path):
    rates = "schedules.linear.peak = choice(1e-2, 8e-3, 6e-3, 1e-9)"
    sets = [part for binding in small_bindings for part in ("--set", binding)]
    arguments = ["--search", rates, "--trials", "7", "--run", str(tmp_path / "s"), *sets]
    sweep.main([*arguments, "--set", "TOTAL_EXAMPLES = 8192"])
    rows = list(json.loads((tmp_path / "s" / "sweep.json").read_text()).values())
    pruned = [row for row in rows if row["status"] == "pruned"]
    assert "1e-9" in {row["values"]["schedules.linear.peak"] for row in pruned}
    assert all(row["status"] in ("done", "pruned") for row in rows)
    page = (tmp_path / "s" / "report" / "report.html").read_text(encoding="utf-8")
    assert "Parallel coordinates" in page
    assert "<td>pruned</td>" in page


@pytest.mark.slow
def test_points_run_through_ray_and_can_be_ended_there(stand_in, tmp_path: Path):
    ray = pytest.importorskip("ray", reason="pip install 'crescendo[ray]'")
    launcher = sweep_launchers.Ray(2)
    try:
        points = enumerate_points([[axis("x = [2.0, -1.0, 1.0]")]])
        waiting, outcomes = iter(points), runner.Outcomes(tmp_path)
        runner.run_points(
            *(tmp_path, lambda: next(waiting, None), lambda *a: None, lambda p: False, outcomes),
            **(options(1) | {"launcher": launcher}),
        )
        assert [outcomes.rows[point.name]["status"] for point in points] == ["done", "failed", "done"]
        assert "value = -1.0 must be above 0" in outcomes.rows[points[1].name]["why"]
        process = launcher.start([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", None)
        time.sleep(2)
        assert process.poll() is None
        process.terminate()
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.poll() == -15
    finally:
        ray.shutdown()


def test_the_charts_are_those_that_the_points_allow():
    rows = [{"values": {"LEARNING_RATE": str(r), "b": b}, "loss": r} for r in (1e-3, 1e-2) for b in ("8", "@f()")]
    parallel, valley = sweep_plots.figures(rows)
    assert len(parallel.data) == 4
    assert parallel.data[-1]["meta"] == 0  # the best, drawn last
    assert [(trace["x"], trace["y"]) for trace in valley.data] == [([1e-3, 1e-2], [1e-3, 1e-2])] * 2
    assert [figure.title for figure in sweep_plots.figures([{"values": {"b": "8"}, "loss": 1.0}])] == [parallel.title]
    assert sweep_plots._heights(["1", "10", "100"]) == [0.0, pytest.approx(0.5), 1.0]
    assert math.isnan(sweep_plots._number("@f()"))


def test_the_report_of_a_sweep_shows_every_point(stand_in, tmp_path: Path):
    points = enumerate_points([[axis("x = [2.0, -1.0, 1.0]")]])
    waiting, outcomes = iter(points), runner.Outcomes(tmp_path, 3)
    runner.run_points(tmp_path, lambda: next(waiting, None), lambda *a: None, lambda p: False, outcomes, **options(1))
    runner.finish_sweep(tmp_path, outcomes, plain_console(file=io.StringIO()))
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', page)[:3]
    assert rows == [
        ("1.0000", "done", "1.0"),
        ("2.0000", "done", "2.0"),
        ("–", "failed: exit code 1: error: value = -1.0 must be above 0", "-1.0"),
    ]


def test_the_runs_of_a_sweep_may_import_what_it_may(tmp_path, monkeypatch):
    (point,) = enumerate_points([[axis("LEARNING_RATE = [1e-3]")]])
    assert "--allow-imports" not in runner.command(point, tmp_path, ["debug.gin"], [])
    monkeypatch.setattr(own_modules, "ANY_IMPORTS", True)
    assert "--allow-imports" in runner.command(point, tmp_path, ["debug.gin"], [])
