"""The report's numbers follow from the records, and its page stands alone, whatever the runs hold."""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from crescendo.experiments import report
from crescendo.experiments.reports import charts, page, plots, seconds
from crescendo.experiments.reports.compare import Arm, arms_table, compare, comparison_table, headline
from crescendo.experiments.reports.equal_loss import equal_loss_table
from crescendo.experiments.reports.held_out import held_out_table
from crescendo.experiments.reports.write import write_report
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError

T = 128  # tokens an example in `make_run`
MakeRun = Callable[..., Path]


def arms(*folders: Path) -> list[Arm]:
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
    assert headline([first, second]) == (
        "constant-2 wins (one seed each): 1.795 nats, 0.013 below warmup (1.808); "
        "warmup took 35% fewer steps (325 against 500)"
    )


def test_the_headline_names_the_winner_and_what_it_took(make_run: MakeRun):
    base, worse = make_run("base", loss=1.8), make_run("worse", loss=1.9)
    assert headline(arms(base)) == "base: 1.800 nats after 500 steps and 128k tokens"
    assert headline(arms(base, worse)) == (
        "base wins (one seed each): 1.800 nats, 0.100 below worse (1.900); both took 500 steps"
    )
    better = make_run("better", loss=1.7, batch_size=1)
    assert headline(arms(base, worse, better)) == (
        "better wins (one seed each): 1.700 nats, 0.100 below base (1.800); "
        "base took 50% fewer steps (500 against 1,000)"
    )
    half = make_run("half", loss=1.6, seen_until=500)
    assert headline(arms(base, half)) == (
        "half wins (one seed each): 1.600 nats, 0.200 below base (1.800); half saw 64k tokens, base 128k"
    )
    alike = headline(arms(base, make_run("alike", loss=1.8)))
    assert alike.startswith("No clear winner (one seed each): base (1.800 nats) and alike (1.800) differ by 0.000; ")
    new, diverged = make_run("new", loss=None), make_run("diverged", loss=math.nan)
    assert headline(arms(new)) == "new: no validation loss yet after 500 steps and 128k tokens"
    assert headline(arms(new, worse)) == "worse: 1.900 nats; no other run has a finite validation loss"
    assert headline(arms(diverged, worse, base)).startswith("base wins (one seed each): 1.800 nats, 0.100 below worse")


@pytest.mark.parametrize(("gap", "wins"), [(0.0, False), (0.5, True)])
def test_a_difference_within_the_spread_of_seeds_has_no_winner(make_run: MakeRun, gap: float, wins: bool):
    folders = [make_run(f"small-seed{i}", loss=2.0 + 0.1 * i) for i in range(2)]
    folders += [make_run(f"large-seed{i}", loss=2.0 - gap + 0.02 * i) for i in range(2)]
    said = headline(arms(*folders))
    assert said.startswith("large wins: " if wins else "No clear winner: large (2.010")
    assert ("within the spread of their seeds" in said) != wins


def with_time(run: Path, **seconds: float) -> Path:
    """The run with a record of where its seconds went."""
    record = {
        "kind": "time",
        "step": 500,
        "examples_seen": 1000,
        **{f"{part}_seconds": x for part, x in seconds.items()},
    }
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(record | {"seconds": 25.0}) + "\n")
    return run


def test_the_seconds_are_told_apart_and_goodput_leaves_out_what_does_not_count(make_run: MakeRun, tmp_path: Path):
    run = make_run("run")  # 500 steps of 0.05 s
    text = (run / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for record in lines:
        if record["kind"] == "train":
            record["skipped_steps"] = 40 if record["step"] > 100 else 0
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    with_time(run, wall=50.0, compile=10.0, evaluation=5.0, saving=3.0, lost=2.0)
    found = seconds.spent(read_run(run))
    assert found is not None
    assert found[:-1] == (50.0, 25.0, 10.0, 5.0, 3.0, 2.0, 5.0)
    assert found.goodput == pytest.approx((25.0 - 0.05) / 50.0)  # one step of all was skipped where the count rises
    assert seconds.cells(arms(make_run("old"))[0]) is None
    page_text = write_report([run], tmp_path / "out").read_text(encoding="utf-8")
    assert "Where the seconds went" in page_text
    assert '<td data-column="goodput">50%</td>' in page_text
    assert "Where the seconds went" not in write_report([make_run("new")], tmp_path / "new").read_text(encoding="utf-8")


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


CHARTS = {chart.name: chart for chart in charts.CHARTS}
# Those that every run has.
PLAIN_CHARTS = [*(chart for chart in charts.CHARTS if not chart.columns), CHARTS["gradient_norm"]]


def assert_stands_alone(page: str) -> None:
    """Nothing refers to anything outside the page, and nothing but the two scripts that it came with may run."""
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"'sha256-([^']+)'", policy[1]) == hashes
    assert len(hashes) == 2
    rest = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    references = re.findall(r"""<[^>]*?\b(?:src|srcset|href|action|data)\s*=\s*["']?([^"'\s>]*)""", rest)
    references += re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s;]*)""", rest)
    assert references == []


def figures(page: str) -> list[dict]:
    data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, flags=re.DOTALL)
    assert data
    return json.loads(data[1])


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
    text = page_path.read_text(encoding="utf-8")
    assert page_path == tmp_path / "out" / "report" / "report.html"
    assert_stands_alone(text)
    assert "<title>Title &lt;b&gt;</title>" in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<h1>_$\\frac{$ &lt;/style" in text
    assert "1.795 nats, 0.013 below warmup (1.808); warmup took 30% fewer steps (350 against 500)</h1>" in text
    for cell in ("+0.013", "350", "30.0%", "128k", "17.5"):
        assert f">{cell}</td>" in text
    assert '<tr class="differs"><th scope="row">adamw.b1</th><td>0.9</td><td>0.8</td></tr>' in text
    assert '<tr><th scope="row">schedule.at</th><td>[0.35, 0.65]</td><td>[0.35, 0.65]</td></tr>' in text
    assert '<tr><th scope="row">versions.jax</th><td>0.11.2</td><td>0.11.2</td></tr>' in text
    assert "40%: batch size 2 → 4 at step 200 (staged: 40%)" in text
    assert "100%: loss is &lt;nan&gt; (step 350)" in text
    for chart in PLAIN_CHARTS:
        picture = (page_path.parent / f"{chart.name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
    assert len(list(page_path.parent.iterdir())) == 1 + len(PLAIN_CHARTS)


@pytest.mark.filterwarnings("error")
def test_whatever_a_run_holds_is_text_on_the_page_and_on_the_terminal(make_run: MakeRun, tmp_path: Path):
    """Its name, its records, its settings: no tag, no markup, no order to a terminal, one line where there was one."""
    name = "[/b]\x1b[2J</script>\nsecond\x00\u202e line"
    run = make_run(name, warnings=("</script><!-- [bold]\x1b[0m",), config="</td>.b1 = '<img src=x>'\n")
    info = json.loads((run / "run.json").read_text()) | {"versions": {"<b>": "</script>"}, "device": "\x1b]0;x\x07"}
    (run / "run.json").write_text(json.dumps(info))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    at = {"step": 500, "examples_seen": 1000, "seconds": 1.0}
    spent = {f"{part}_seconds": 0.1 for part in ("wall", "compile", "evaluation", "saving", "lost")}
    lines += [{"kind": "validation", **at, "loss": 1.5, "[red]</td>/loss": 2.0}, {"kind": "time", **at, **spent}]
    lines.append({"kind": "sample", **at, "prompt": "<script>", "text": "\x1b[1m[b]"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = "[/b]\ufffd[2J</script> second\ufffd\ufffd line"
    assert read_run(run).name == shown
    page_text = write_report([run], tmp_path / "out", title="<script>").read_text(encoding="utf-8")
    assert_stands_alone(page_text)
    assert page_text.count("<script") == 3
    assert not re.search("[\x00\x07\x1b\u202e]", page_text.partition("<script>")[0])
    assert re.search(r"\[/b\]\ufffd\[2J&lt;/script&gt; second", page_text)
    assert figures(page_text)
    (found,) = arms(run)
    text = io.StringIO()
    console = Console(file=text, width=200, color_system=None)
    for table in (
        arms_table([found]),
        held_out_table([found]),
        seconds.seconds_table([found]),
        equal_loss_table([found]),
    ):
        console.print(table)
    assert text.getvalue().count(shown) == 5  # the held-out sets are two lines
    assert "[red]</td>" in text.getvalue()
    assert "\x1b" not in text.getvalue()


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
def test_odd_runs_are_drawn_and_compared(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: figure.draw_without_rendering())
    odd, sound = make_run(name, **ODD_RUNS[name]), make_run("sound")
    for order in ([odd, sound], [sound, odd]):
        found = arms(*order)
        assert all(arm.loss_difference is None or math.isfinite(arm.loss_difference) for arm in found)
        assert headline(found).startswith(("sound", name, "No clear winner"))
        assert name.split("-")[0] in terminal(*order)
        curves = [(arm.name, arm.runs) for arm in found]
        for chart in PLAIN_CHARTS if order[0] == odd else ():
            plots.render(chart, curves)
            json.dumps(page.figure(chart, curves), allow_nan=False)
    assert ("nan" in terminal(odd)) == (name in ("diverged", "never-finite"))


def test_a_diverged_run_does_not_squash_the_others(make_run: MakeRun):
    sound = make_run("sound", loss=2.0, train_loss=lambda seen: 2.0 + 8 * math.exp(-seen / 40))
    exploded = make_run("exploded", loss=2.5, train_loss=lambda seen: 2.5 if seen < 500 else 1e6)
    limits = charts.loss_limits([(folder.name, [read_run(folder)]) for folder in (sound, exploded)])
    assert limits is not None
    assert 1.8 < limits[0] < 2.0
    assert 2.5 < limits[1] < 4.0


def test_the_batch_size_is_drawn_as_stairs_over_the_tokens_it_covers(make_run: MakeRun):
    run = read_run(make_run("warmup", doublings=(0.4, 0.8), total=1003))
    (curve,) = CHARTS["batch_size"].curves(run)
    assert curve.stairs
    np.testing.assert_array_equal(curve.y, [2, 4, 8, 8])
    np.testing.assert_array_equal(curve.x, np.array([0, 402, 806, 998]) * T)


def test_the_smoothed_loss_of_a_constant_is_that_constant(make_run: MakeRun):
    run = read_run(make_run("flat", doublings=(0.5,), train_loss=lambda seen: 1.25))
    np.testing.assert_allclose(charts.averaged(run, "loss"), 1.25, rtol=1e-12)


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (6.000000001e-4, "6e-4"), (2.5e-3, "2.5e-3"), (1.0, "1e+0")])
def test_learning_rates_are_labelled_briefly(value: float, text: str):
    assert CHARTS["learning_rate"].format(value) == text


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.1), (12.0, 18.0), (0.02, 4.0), (1.0, 3e7)])
def test_a_log_axis_has_ticks_that_can_be_read(make_run: MakeRun, monkeypatch, low: float, high: float):
    """Several in every range, and on the page each written in full."""
    run = read_run(make_run("run"))
    run.train["gradient_norm"] = np.geomspace(low, high, len(run.train["step"]))
    drawn = []
    savefig = plots.Figure.savefig
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, *a, **k: (savefig(self, *a, **k), drawn.append(self)))
    curves = [("run", [run])]
    plots.render(CHARTS["gradient_norm"], curves)
    (axes,) = drawn[0].axes
    bottom, top = axes.get_ylim()
    labels = [label.get_text() for label in axes.get_yticklabels() if bottom <= label.get_position()[1] <= top]
    assert 3 <= len(labels) <= 10, labels
    assert len(set(labels)) == len(labels)
    axis = page.figure(CHARTS["gradient_norm"], curves).layout["yaxis"]
    assert axis["tickformat"] in ("~s", "~g")  # without a format digits alone stand between powers of ten
    assert axis.get("dtick", "D2") == "D2"


def test_the_loss_is_drawn_against_seconds_and_flops(make_run: MakeRun):
    run = read_run(make_run("run"))
    assert CHARTS["loss_seconds"].curves(run)[1].x[-1] == pytest.approx(25.0)
    assert np.isnan(CHARTS["loss_flops"].curves(run)[1].x).all()  # a run that doesn't say what a token takes
    run.info["flops_per_token"] = 6e6
    assert CHARTS["loss_flops"].curves(run)[1].x[-1] == pytest.approx(6e6 * 128_000)


def test_charts_are_the_same_at_every_drawing(make_run: MakeRun):
    curves = [("run", [read_run(make_run("run"))])]
    first, second = (plots.render(CHARTS["learning_rate"], curves) for _ in range(2))
    assert first == second


def test_the_noise_scale_and_trust_ratios_are_drawn_where_a_run_has_them(make_run: MakeRun, tmp_path: Path):
    run = make_run("measured")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for i, record in enumerate(r for r in records if r["kind"] == "train"):
        record["noise_scale"] = None if i < 3 else 10.0 + i
        record |= {"trust_ratio_min": 0.1, "trust_ratio_median": 0.5, "trust_ratio_max": 2.0, "mfu": 0.4}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    noise = charts.averaged(read_run(run), "noise_scale")
    assert np.isnan(noise[2])
    assert noise[3] == 13.0
    found = figures(write_report([run, make_run("plain")], tmp_path / "out").read_text(encoding="utf-8"))
    others = (charts.ROUTER_COLUMNS, charts.PIECE_COLUMNS)
    assert [figure["title"] for figure in found] == [c.title for c in charts.CHARTS if c.columns not in others]
    assert found[-2]["data"][0]["y"][2:4] == [None, 13.0]
    assert [(trace["meta"], trace["y"][-1], trace["line"]["dash"]) for trace in found[-1]["data"]] == [
        (0, 0.5, "solid"),
        (0, 0.1, "dot"),
        (0, 2.0, "dot"),
    ]
    for name in ("noise_scale", "trust_ratio"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_the_table_and_writes_beside_the_first_run(make_run: MakeRun, capsys: pytest.CaptureFixture):
    run = make_run("constant-2", loss=1.795)
    report.main([str(run)])
    out = capsys.readouterr().out
    assert "constant-2: 1.795 nats after 500 steps and 128k tokens" in out
    assert out.splitlines()[-1] == str(run / "report" / "report.html")
    assert_stands_alone((run / "report" / "report.html").read_text(encoding="utf-8"))


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: report.main([str(tmp_path)]))
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert re.fullmatch(rf"error: {tmp_path} is not a run folder: .*\n", said.err)
    assert said.out == ""


def test_a_folder_that_cannot_be_made_is_one_clear_error(make_run: MakeRun):
    run = make_run("run")
    with pytest.raises(UserError, match=r"cannot write .*run.json/report: Not a directory"):
        write_report([run], run / "run.json" / "report")
