"""The report in a real browser: no network, no complaint, every chart drawn, at a phone's and a desktop's width."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crescendo.experiments.reports.write import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"


class Browser:
    """Headless Chromium, spoken to in the DevTools protocol over a pair of pipes."""

    def __init__(self, profile: Path):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # The browser reads from descriptor 3 and writes to 4.
        shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", shell, CHROMIUM or "", *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out, self._number, self._torn = ours_in, ours_out, 0, b""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session: str | None = None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._torn:
            part = os.read(self._in, 1 << 20)
            assert part, "the browser went away"
            self._torn += part
        message, _, self._torn = self._torn.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, page: Path, *, width: int, theme: str = "light", touch: bool = False) -> None:
        """Loads the page and waits until it has drawn."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + 60
        while self.value("document.documentElement?.dataset.drawn ?? ''") == "" and time.monotonic() < deadline:
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """What the console said, and every address but the page's own that was asked for."""
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            if event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(json.dumps(parameters)[:4000])
            elif event["method"] == "Network.requestWillBeSent":
                address = parameters["request"]["url"]
                if not address.startswith(("file:", "data:", "blob:")):
                    found.append(address)
        return found

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.process.terminate()
    opened.process.wait(timeout=30)


@pytest.fixture
def compared(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    """The report of two runs, one of them with all that a run may record."""
    rich = make_run("warmup", loss=1.75, doublings=(0.4, 0.8), config="train.seed = 1\nlamb.b1 = 0.8\n")
    plain = make_run("constant-2 <img src=x onerror=alert(1)>", loss=1.795)
    records = [json.loads(line) for line in (rich / "metrics.jsonl").read_text().splitlines()]
    for i, record in enumerate(record for record in records if record["kind"] == "train"):
        record |= {"noise_scale": None if i < 3 else 10.0 + i, "norm_layers_noise_scale": 8.0 + i}
        record |= {"trust_ratio_min": 0.02, "trust_ratio_median": 0.3 + i / 1000, "trust_ratio_max": 4.0}
        record |= {"tokens_per_second": 5000.0 + i % 7, "mfu": 0.4}
    for folder in (rich, plain):
        info = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(info | {"flops_per_token": 6e6}))
    (rich / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return write_report([plain, rich], tmp_path / "out")


DRAWN = (
    "[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.scatterlayer .trace path.js-line').length)"
)
INK = "getComputedStyle(document.querySelectorAll('.plot .scatterlayer .js-line')[{0}]).stroke"


@pytest.mark.parametrize(("width", "touch"), [(390, True), pytest.param(1280, False, marks=pytest.mark.slow)])
def test_the_page_draws_every_chart_without_network_or_complaint(browser: Browser, compared: Path, width: int, touch):
    browser.open(compared, width=width, touch=touch)
    # loss four times, with validation; batch size, rate, norms twice, throughput; MFU, noise twice and ratios thrice
    # for the run that has them
    assert browser.value(DRAWN) == [4, 4, 4, 4, 2, 2, 4, 2, 1, 2, 3]
    light = browser.value(INK.format(0))
    assert browser.value("document.documentElement.scrollWidth") <= width  # nothing hangs out of the page
    buttons = browser.value("[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)")
    assert buttons
    assert not any("Share" in title or "cloud" in title for title in buttons)  # nothing leaves the machine
    browser.open(compared, width=width, theme="dark", touch=touch)
    assert browser.value(INK.format(0)) != light
    assert browser.complaints() == []


TICKS = "[...document.querySelectorAll('.plot')[{0}].querySelectorAll('.ytick text')].map(tick => tick.textContent)"


def test_the_ticks_of_a_log_axis_are_whole_numbers_apart_from_each_other(browser: Browser, compared: Path):
    browser.open(compared, width=390)
    for chart, wanted in ((9, ["10", "20", "50", "100", "200"]), (10, ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"])):
        ticks = browser.value(TICKS.format(chart))
        assert ticks[: len(wanted)] == wanted, ticks
        assert len(ticks) <= 9


def test_the_complaints_of_a_page_are_seen(browser: Browser, tmp_path: Path):
    page = tmp_path / "bad.html"
    page.write_text("<html data-drawn=1><img src='http://127.0.0.1:9/x.png'><script>fail()</script></html>")
    browser.open(page, width=400)
    browser.value("new Promise(done => setTimeout(done, 300))")
    assert any("http://127.0.0.1:9/x.png" in line for line in browser.complaints())
    assert any("fail is not defined" in line for line in browser.complaints())


def test_a_run_can_be_hidden_and_a_chart_zoomed_and_pointed_at(browser: Browser, compared: Path):
    browser.open(compared, width=1280)
    browser.value("document.querySelector('button[data-arm=\"0\"]').click()")
    browser.value("new Promise(done => setTimeout(done, 300))")
    assert browser.value(DRAWN) == [2, 2, 2, 2, 1, 1, 2, 1, 1, 2, 3]
    browser.value("document.querySelector('button[data-arm=\"0\"]').click()")
    browser.value("document.querySelector('.plot').scrollIntoView({block: 'center'})")
    browser.value("new Promise(done => setTimeout(done, 300))")
    box = "(({x, y, width, height}) => [x, y, width, height])"
    x, y, wide, high = browser.value(f"{box}(document.querySelector('.plot .nsewdrag').getBoundingClientRect())")

    def mouse(kind: str, at: float, **more: Any) -> None:
        browser.call("Input.dispatchMouseEvent", type=kind, x=x + at * wide, y=y + high / 2, **more)

    for at in (0.45, 0.5):
        mouse("mouseMoved", at)
    browser.value("new Promise(done => setTimeout(done, 300))")
    hover = browser.value("document.querySelector('.plot .hoverlayer').textContent")
    assert "warmup" in hover
    assert "<img" in hover  # as text
    before = browser.value("document.querySelector('.plot').layout.xaxis.range")
    mouse("mousePressed", 0.25, button="left", clickCount=1)
    for at in (0.3, 0.5, 0.75):
        mouse("mouseMoved", at, button="left", buttons=1)
    mouse("mouseReleased", 0.75, button="left", clickCount=1)
    browser.value("new Promise(done => setTimeout(done, 500))")
    after = browser.value("document.querySelector('.plot').layout.xaxis.range")
    assert after[1] - after[0] == pytest.approx((before[1] - before[0]) / 2, rel=0.05)
    assert browser.complaints() == []
