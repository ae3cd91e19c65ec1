"""The report's numbers follow from the records, and its page stands alone, whatever the runs hold."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plotly.offline
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from crescendo.experiments import plots, report
from crescendo.experiments.errors import UserError
from crescendo.experiments.metrics import read_run
from crescendo.experiments.report import compare, comparison_table, headline, write_report

T = 128
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes run folders whose batch size doubles at the given fractions of 1,000 examples."""

    def make(
        name: str,
        *,
        loss: float | None = 2.0,
        batch_size: int = 2,
        doublings: tuple[float, ...] = (),
        total: int = 1000,
        seen_until: int | None = None,
        seconds_per_step: float = 0.05,
        config: str = "train.seed = 1\n",
        warnings: tuple[str, ...] = (),
        train_loss: Callable[[int], float] = lambda seen: 2.0 + 3.0 * math.exp(-seen / 50),
    ) -> Path:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        records: list[dict] = []
        step = seen = 0
        size = batch_size
        ahead = list(doublings)
        while seen < (total if seen_until is None else seen_until):
            if ahead and seen >= ahead[0] * total:
                at = {"step": step, "examples_seen": seen, "from": size, "to": 2 * size}
                records.append({"kind": "batch_size", **at, "reason": f"staged: {ahead.pop(0):.0%}"})
                size *= 2
            drawn = min(size, total - seen)
            step, seen = step + 1, seen + drawn
            at = {"step": step, "examples_seen": seen, "tokens_seen": seen * T, "seconds": step * seconds_per_step}
            rest = {"microbatches": 1, "gradient_norm": 1.0, "skipped_steps": 0, "tokens_per_second": 1.0, "mfu": None}
            rate = 1e-3 * (1 - seen / total)
            records.append(
                {"kind": "train", "loss": train_loss(seen), "learning_rate": rate, "batch_size": drawn, **at, **rest}
            )
            if loss is not None and step % 100 == 0:
                records.append({"kind": "validation", "loss": loss + 1.0, **at})
        if loss is not None and step:
            records.append({"kind": "validation", "loss": loss, **at})
        records += [
            {"kind": "warning", "step": step, "examples_seen": seen, "message": message} for message in warnings
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        info = {"total_examples": total, "device": "2 x cpu", "versions": {"jax": "0.11.2"}, "parameters": 705_408}
        (folder / "run.json").write_text(json.dumps({"name": name, **info, "peak_flops_per_second": None}))
        (folder / "config.gin").write_text(config)
        return folder

    return make


def arms(*folders: Path) -> list[report.Arm]:
    return compare([read_run(folder) for folder in folders])


def test_the_comparison_follows_from_the_records(make_run: MakeRun):
    small = make_run("constant-2", loss=1.795, seconds_per_step=0.04)
    warmup = make_run("warmup", loss=1.808, doublings=(0.4, 0.8))
    first, second = arms(small, warmup)
    assert (first.validation_loss, first.loss_difference, first.steps_saved) == (1.795, None, None)
    assert (first.steps, first.examples, first.tokens) == (500, 1000, 128_000)
    assert first.seconds == pytest.approx(500 * 0.04)
    assert first.tokens_per_second == pytest.approx(128_000 / 20)
    assert second.steps == 200 + 100 + 25  # 400 examples by 2, 400 by 4, 200 by 8
    assert second.steps_saved == pytest.approx(1 - 325 / 500)
    assert second.loss_difference == pytest.approx(0.013)
    assert (first.peak_batch_size, second.peak_batch_size, second.done) == (2, 8, 1)
    assert headline([first, second]) == "warmup: 1.808 nats in 325 steps, 35% fewer than constant-2 (1.795)"


def test_the_headline_is_about_the_best_arm_against_the_first(make_run: MakeRun):
    base, same = make_run("base", loss=1.8), make_run("same", loss=1.9)
    assert headline(arms(base)) == "base: 1.800 nats after 500 steps and 128k tokens"
    assert headline(arms(base, same)) == "same: 1.900 nats in 500 steps, as many as base (1.800)"
    better = make_run("better", loss=1.7, batch_size=1)
    assert headline(arms(base, same, better)) == "better: 1.700 nats in 1,000 steps, 100% more than base (1.800)"
    half = make_run("half", loss=1.6, seen_until=500)
    assert headline(arms(base, half)) == "half: 1.600 nats after 64k tokens, base: 1.800 after 128k"
    assert headline(arms(make_run("new", loss=None))) == "new: no validation loss yet after 500 steps and 128k tokens"


@pytest.mark.parametrize(("seen_until", "saved"), [(1000, 0.5), (996, 1 - 249 / 500), (900, None)])
def test_steps_are_compared_at_equal_data_only(make_run: MakeRun, seen_until: int, saved: float | None):
    _, other = arms(make_run("base"), make_run("other", batch_size=4, seen_until=seen_until))
    assert other.steps_saved == (saved if saved is None else pytest.approx(saved))
    assert other.done == seen_until / 1000


def test_seeds_of_one_arm_are_averaged(make_run: MakeRun):
    folders = [make_run(f"small-seed{i}", loss=loss) for i, loss in enumerate((1.7, 1.8, 2.2))]
    folders += [make_run("big seed=7", loss=2.5, batch_size=4), make_run("small", loss=3.0)]
    small, big, plain = arms(*folders)
    assert (small.name, len(small.runs)) == ("small", 3)
    assert small.validation_loss == pytest.approx(1.9)
    assert small.validation_spread == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert (big.name, big.validation_spread) == ("big seed=7", None)  # alone: the seed stays in the name
    assert big.steps_saved == pytest.approx(0.5)
    assert (plain.name, len(plain.runs)) == ("small", 1)


def test_runs_of_one_name_are_told_apart_by_their_folder(make_run: MakeRun):
    first, second = make_run("debug-seed1"), make_run("debug-seed1")
    assert [arm.name for arm in arms(first, second)] == [f"debug-seed1 ({first})", f"debug-seed1 ({second})"]


def terminal(*folders: Path, width: int = 80) -> str:
    screen = io.StringIO()
    Console(width=width, file=screen).print(comparison_table(folders))
    return screen.getvalue()


def test_the_terminal_table_shows_every_column_in_80_columns(make_run: MakeRun):
    text = terminal(make_run("constant-2", loss=1.795), make_run("warmup", loss=1.75, doublings=(0.4, 0.8)))
    _, heading, _, first, second = (line.split() for line in text.splitlines())
    assert heading == ["run", "loss", "first", "steps", "saved", "examples", "tokens", "seconds", "/s", "batch"]
    assert first == ["constant-2", "1.795", "500", "1,000", "128k", "25.0", "5.12k", "2"]
    assert second == ["warmup", "1.750", "−0.045", "325", "35.0%", "1,000", "128k", "16.2", "7.88k", "8"]


def test_a_long_name_never_hides_a_number(make_run: MakeRun):
    folders = [make_run(f"{'a-very-long-name-' * 5}seed{i}", loss=1.5 + i, seen_until=600) for i in range(2)]
    text = terminal(*folders)
    for part in ("2.000", "±0.707", "2 seeds", "60% done", "300", "76.8k", "15.0", "5.12k"):
        assert part in re.sub(r"\s+", " ", text)


HOSTILE_NAME = "_$\\frac{$ </style><script>alert(1)</script><img src=http://evil.example/x> [red] & \"' 界"


# Those that every run has.
PLAIN_CHARTS = [chart for chart in plots.CHARTS if chart.columns[0] in ("loss", "tokens_per_second")]


def embedded(page: str) -> list[str]:
    return [base64.b64decode(data).decode() for data in re.findall(r'data:image/svg\+xml;base64,([^"]+)"', page)]


def assert_stands_alone(page: str) -> None:
    """No tag, style or embedded picture refers to anything outside the page."""
    assert "default-src 'none'" in page
    # Three scripts: the library, the curves and what draws them; none of a run's own.
    library = plotly.offline.get_plotlyjs()
    assert page.count(library) == 1
    page = page.replace(library, "")
    assert re.findall(r"<script[^>]*>", page) == [
        "<script>",
        '<script type="application/json" id="curves">',
        "<script>",
    ]
    pictures = embedded(page)
    assert len(pictures) == 2 * len(PLAIN_CHARTS)
    without_data = re.sub(r"data:image/svg\+xml;base64,[\w+/=]+", "data:", page)
    for text in (without_data, *pictures):
        references = re.findall(r"""<[^>]*?\b(?:src|srcset|href|action|data)\s*=\s*["']?([^"'\s>]*)""", text)
        references += re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s;]*)""", text)
        assert all(reference.startswith(("data:", "#")) for reference in references), references


@pytest.mark.filterwarnings("error")
def test_the_report_stands_alone_and_shows_what_the_table_shows(make_run: MakeRun, tmp_path: Path):
    config = "import x\n# Parameters\nadamw.b1 = 0.9\nschedule.at = \\\n    [0.35,\n     0.65]\n"
    runs = [
        make_run(HOSTILE_NAME, loss=1.795, config=config),
        make_run(
            "warmup", loss=1.808, doublings=(0.4,), config=config.replace("0.9", "0.8"), warnings=("loss is <nan>",)
        ),
    ]
    page_path = write_report(runs, tmp_path / "out" / "report", title="Title <b>")
    page = page_path.read_text(encoding="utf-8")
    assert page_path == tmp_path / "out" / "report" / "report.html"
    assert_stands_alone(page)
    assert "<title>Title &lt;b&gt;</title>" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<h1>warmup: 1.808 nats in 350 steps, 30% fewer than _$\\frac{$ &lt;/style" in page
    for cell in ("+0.013", "350", "30.0%", "128k", "17.5"):
        assert f">{cell}</td>" in page
    assert '<tr class="differs"><th scope="row">adamw.b1</th><td>0.9</td><td>0.8</td></tr>' in page
    assert '<tr><th scope="row">schedule.at</th><td>[0.35, 0.65]</td><td>[0.35, 0.65]</td></tr>' in page
    assert '<tr><th scope="row">versions.jax</th><td>0.11.2</td><td>0.11.2</td></tr>' in page
    assert "40%: batch size 2 → 4 at step 200 (staged: 40%)" in page
    assert "100%: loss is &lt;nan&gt; (step 350)" in page
    for chart in PLAIN_CHARTS:
        picture = (page_path.parent / f"{chart.name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
    assert len(list(page_path.parent.iterdir())) == 1 + len(PLAIN_CHARTS)


ODD_RUNS: dict[str, dict] = {
    "no-validation": {"loss": None},
    "no-step": {"seen_until": 0},
    "one-step": {"seen_until": 2},
    "one-step-unvalidated": {"seen_until": 2, "loss": None},
    "diverged": {"loss": math.nan, "train_loss": lambda seen: math.nan if seen > 300 else 3.0},
    "exploded": {"loss": math.inf, "train_loss": lambda seen: min(1e300, 2.0**seen)},
    "never-finite": {"loss": math.nan, "train_loss": lambda seen: math.inf},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD_RUNS)
def test_odd_runs_are_drawn_and_compared(make_run: MakeRun, name: str):
    odd, sound = make_run(name, **ODD_RUNS[name]), make_run("sound")
    for order in ([odd, sound], [sound, odd]):
        found = arms(*order)
        assert all(arm.loss_difference is None or math.isfinite(arm.loss_difference) for arm in found)
        assert headline(found).startswith(("sound: ", f"{name}: "))
        assert name.split("-")[0] in terminal(*order)
        curves = [(arm.name, arm.runs) for arm in found]
        for chart in PLAIN_CHARTS if order[0] == odd else ():
            plots.render(chart, curves, theme="dark", file_format="svg")
    assert ("nan" in terminal(odd)) == (name in ("diverged", "never-finite"))


def test_a_diverged_run_does_not_squash_the_others(make_run: MakeRun):
    sound = make_run("sound", loss=2.0, train_loss=lambda seen: 2.0 + 8 * math.exp(-seen / 40))
    exploded = make_run("exploded", loss=2.5, train_loss=lambda seen: 2.5 if seen < 500 else 1e6)
    axes = Figure().subplots()
    curves = [(folder.name, [read_run(folder)]) for folder in (sound, exploded)]
    plots.CHARTS[0].draw(axes, curves, plots.COLORS["light"][:2])
    low, high = axes.get_ylim()
    assert 1.8 < low < 2.0
    assert 2.5 < high < 4.0


def test_the_batch_size_is_drawn_as_stairs_over_the_tokens_it_covers(make_run: MakeRun):
    run = read_run(make_run("warmup", doublings=(0.4, 0.8), total=1003))
    axes = Figure().subplots()
    plots.CHARTS[2].draw(axes, [("warmup", [run])], ["#000000"])
    (stairs,) = axes.patches
    np.testing.assert_array_equal(stairs.get_data().values, [2, 4, 8])
    np.testing.assert_array_equal(stairs.get_data().edges, np.array([0, 402, 806, 998]) * T)


def test_the_smoothed_loss_of_a_constant_is_that_constant(make_run: MakeRun):
    run = read_run(make_run("flat", doublings=(0.5,), train_loss=lambda seen: 1.25))
    np.testing.assert_allclose(plots.averaged(run, "loss"), 1.25, rtol=1e-12)


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (6.000000001e-4, "6e-4"), (2.5e-3, "2.5e-3"), (1.0, "1e+0")])
def test_learning_rates_are_labelled_briefly(value: float, text: str):
    figure = Figure()
    plots.CHARTS[3].draw(figure.subplots(), [], [])
    assert figure.axes[0].yaxis.get_major_formatter()(value, 0) == text


def test_charts_are_the_same_at_every_drawing(make_run: MakeRun):
    curves = [("run", [read_run(make_run("run"))])]
    first, second = (plots.render(plots.CHARTS[3], curves, theme="light", file_format="svg") for _ in range(2))
    assert first == second


@pytest.mark.parametrize("chart", PLAIN_CHARTS, ids=lambda chart: chart.name)
def test_a_script_is_given_the_curves_that_are_drawn(make_run: MakeRun, chart: plots.Chart):
    runs = [read_run(make_run("small", total=104)), read_run(make_run("warmup", doublings=(0.5,), total=104))]
    found = plots.interactive(chart, [(run.name, [run]) for run in runs])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for arm, run in enumerate(runs):
        traces = [trace for trace in found["traces"] if trace["arm"] == arm]
        assert len(traces) == (2 if chart.name.startswith("loss") else 1)
        last = run.train["step" if chart.name == "loss_steps" else "tokens_seen"][-1]
        assert {trace["x"][-1] for trace in traces} == {last}
        assert all(len(trace["x"]) == len(trace["y"]) for trace in traces)
    if chart.name == "batch_size":
        assert [trace["y"] for trace in found["traces"]] == [[2, 2], [2, 4, 4]]
        assert found["axes"]["ticks"] == [2, 4]
    assert found["axes"]["log"] is (chart.name == "batch_size")


def test_the_noise_scale_is_drawn_where_a_run_has_it(make_run: MakeRun, tmp_path: Path):
    run = make_run("measured")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for i, record in enumerate(r for r in records if r["kind"] == "train"):
        record["noise_scale"] = None if i < 3 else 10.0 + i
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [chart.name for chart in plots.charts_of([("measured", [read_run(run)])])][-1] == "noise_scale"
    noise = plots.averaged(read_run(run), "noise_scale")
    assert np.isnan(noise[2])
    assert noise[3] == 13.0
    page = write_report([run, make_run("plain")], tmp_path / "out").read_text(encoding="utf-8")
    assert len(embedded(page)) == 2 * (len(PLAIN_CHARTS) + 1)
    assert (tmp_path / "out" / "noise_scale.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_the_table_and_writes_beside_the_first_run(make_run: MakeRun, capsys: pytest.CaptureFixture):
    run = make_run("constant-2", loss=1.795)
    report.main([str(run)])
    out = capsys.readouterr().out
    assert "constant-2: 1.795 nats after 500 steps and 128k tokens" in out
    assert out.splitlines()[-1] == str(run / "report" / "report.html")
    assert_stands_alone((run / "report" / "report.html").read_text(encoding="utf-8"))


def test_bad_input_is_one_line_and_exit_code_2(make_run: MakeRun, tmp_path: Path):
    command = [sys.executable, "-m", "crescendo.experiments.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {tmp_path} is not a run folder: .*\n", done.stderr)
    assert done.stdout == ""


def test_a_folder_that_cannot_be_made_is_one_clear_error(make_run: MakeRun):
    run = make_run("run")
    with pytest.raises(UserError, match=r"cannot write .*run.json/report: Not a directory"):
        write_report([run], run / "run.json" / "report")
