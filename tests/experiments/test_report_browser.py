"""The report in a real browser: headless Chromium, with no network."""

import json
import math
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from crescendo.experiments import plots
from crescendo.experiments.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")


def make_run(folder: Path, name: str, batch_size: int) -> Path:
    """A run of 100 steps that records all that can be drawn."""
    folder.mkdir()
    records = []
    for step in range(1, 101):
        at = {"step": step, "examples_seen": batch_size * step, "tokens_seen": 128 * batch_size * step}
        loss = 2.0 + 3.0 * math.exp(-step / 20)
        further = {"noise_scale": 5.0 + step, "norm_layers_noise_scale": 4.0 + step / 2}
        further |= {"trust_ratio_min": 0.1, "trust_ratio_median": 1.0 + 0.01 * step, "trust_ratio_max": 8.0}
        rest = {"microbatches": 1, "gradient_norm": 1.0, "skipped_steps": 0, "tokens_per_second": 1e5, "mfu": None}
        timed = {"seconds": 0.1 * step, "learning_rate": 1e-3, "batch_size": batch_size}
        records.append({"kind": "train", "loss": loss, **at, **timed, **rest, **further})
        if step % 20 == 0:
            records.append({"kind": "validation", "loss": loss + 0.05, "seconds": 0.1 * step, **at})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "run.json").write_text(json.dumps({"name": name, "total_examples": 100 * batch_size}))
    (folder / "config.gin").write_text(f"train.batch_size = {batch_size}\n")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / f"{size}", name, size) for name, size in (("small", 2), ("<b>large</b> & 界", 8))]
    return write_report(runs, folder / "out")


def chromium(page: Path, *arguments: str) -> tuple[str, list[str]]:
    """What it prints, and what the page's console said."""
    command = [
        *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        # No name resolves: whatever asks for the network fails, and says so on the console.
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}"),
        *("--virtual-time-budget=5000", *arguments, page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def test_every_chart_is_drawn_and_the_console_stays_empty(page: Path):
    dom, console = chromium(page, "--dump-dom")
    assert console == []
    assert len(re.findall(r'class="chart drawn', dom)) == len(plots.CHARTS)
    assert len(re.findall(r'<g class="cartesianlayer"', dom)) == len(plots.CHARTS)
    lines = len(re.findall(r'<path class="js-line"', dom))
    drawn = json.loads(re.search(r'id="curves">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1])  # type: ignore[index]
    assert lines == sum(len(chart["traces"]) for chart in drawn["charts"])
    assert "<b>large</b>" not in dom.replace(json.dumps(drawn), "")


@pytest.mark.parametrize(("width", "theme"), [(500, "light"), (1280, "dark")])
def test_it_fits_the_screen_in_the_colours_of_the_reader(page: Path, width: int, theme: str, tmp_path: Path):
    picture = tmp_path / "page.png"
    scheme = "--blink-settings=preferredColorScheme=" + {"dark": "0", "light": "1"}[theme]
    _, console = chromium(page, f"--window-size={width},1500", "--hide-scrollbars", scheme, f"--screenshot={picture}")
    assert console == []
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (width, 1500)
    from PIL import Image

    corner = Image.open(picture).convert("RGB").getpixel((2, 2))
    assert corner == {"light": (0xF6, 0xF7, 0xF9), "dark": (0x12, 0x16, 0x1C)}[theme]
