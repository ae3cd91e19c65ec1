"""The documentation: the site builds, its Python runs, its commands exist, and each guide works as it stands."""

import argparse
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from crescendo import optim
from crescendo.experiments import __main__ as command_table
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.training import train

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
# What was measured stays as it was: its Python is not run again.
LIVING = [page for page in PAGES if page.parent.name != "results"]
GUIDES = [page for page in PAGES if page.parent.name == "guides"]
MARK = "<!-- not run by the tests: "
# Named after one module and run by another.
RUN_BY = {f"crescendo.{leaf}.describe": "crescendo.experiments.describe" for leaf in ("models", "parallel")}


ARGUMENTS = r"""((?:'[^'`]*'|"[^"`]*"|[^`\n|>'"])*)"""
BY_MODULE, BY_NAME = r"python -m (crescendo[\w.]+)", r"(?:^|`|/bin/)crescendo ([a-z]\w*)"


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    run: bool
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks, and whether a comment before them says that they can't run here."""
    found, before, opened = [], "", None
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if opened is None and line.startswith("```"):
            opened = (line.removeprefix("```"), number, not before.startswith(MARK))
            lines: list[str] = []
        elif opened is not None and line == "```":
            language, start, run = opened
            found.append(Block(language, "\n".join(lines) + "\n", run, start))
            opened, before = None, ""
        elif opened is not None:
            lines.append(line)
        before = line or before
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(pages: Sequence[Path] = PAGES) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command on the pages, but for placeholders in capitals and what a page makes.

    A command by the one name, `crescendo NAME`, is of the module that runs them all.
    """
    found = {}
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        written = re.findall(r"cat > (\S+)\.py", text)
        made = {word for path in written for word in (*path.split("/")[1:], f"{path}.py")}
        for match in re.finditer(rf"{BY_MODULE}{ARGUMENTS}|{BY_NAME}{ARGUMENTS}", text, flags=re.MULTILINE):
            by_module = match[1] is not None
            module = match[1] if by_module else command_table.__name__
            typed = re.split(" && ", match[2] if by_module else match[3] + match[4])[0]
            if text[match.end() : match.end() + 1] == ">":  # of `2>&1` the number is not an argument
                typed = re.sub(r" \d$", "", typed)
            words = shlex.split(typed, comments=True)
            placeholders = any(re.fullmatch(r"[A-Z]{1,9}", word) for word in words)
            if not placeholders and not made & {module.split(".")[-1], *words}:
                found[module, tuple(words)] = page
    return [(module, list(words)) for module, words in found]


def of_the_readme() -> list[list[str]]:
    """The README's commands, however they stand there, by the one name."""
    names = {command.module: name for name, command in command_table.commands().items()}
    return [
        words if module == command_table.__name__ else [names[RUN_BY.get(module, module)], *words]
        for module, words in commands([ROOT / "README.md"])
    ]


class Parsed(Exception):  # noqa: N818
    """The arguments were understood."""


@pytest.mark.parametrize(("module", "words"), commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_every_command_is_understood(module, words, monkeypatch, capsys):
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises((Parsed, SystemExit)):
        importlib.import_module(RUN_BY.get(module, module)).main(words)
    # In prose a command may stand without all that it needs.
    complaint = capsys.readouterr().err
    assert "error:" not in complaint or "arguments are required" in complaint, complaint


TEXT = "".join(page.read_text() for page in PAGES)
OF_PAGES = [f"@{name}" for name in re.findall(r"def (\w+)\(", TEXT)]  # what a page itself makes
SETTING = [
    (module, words)
    for module, words in commands()
    if "--set" in words and not any(name in " ".join(words) for name in OF_PAGES)
]


@pytest.mark.parametrize(("module", "words"), SETTING, ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_every_setting_that_a_page_shows_is_one(module, words):
    given = argparse.ArgumentParser()
    for option in ("--config", "--set"):
        given.add_argument(option, action="append", default=[])
    known, _ = given.parse_known_args(words)
    shipped = [config for config in known.config if config in configurables.shipped()]
    refused = re.search(re.escape(known.set[-1]) + "' \\|\\| echo", TEXT)
    with pytest.raises(UserError) if refused else contextlib.nullcontext():
        configurables.bind(train, shipped or ["debug.gin"], known.set)


@pytest.mark.parametrize("words", of_the_readme(), ids=" ".join)
def test_every_command_of_the_readme_goes_by_the_one_name(words, monkeypatch, capsys):
    test_every_command_is_understood("crescendo.experiments.__main__", words, monkeypatch, capsys)


DESCRIBED = {" ".join(words): words for module, words in commands() if module.endswith(".describe")}


@pytest.mark.parametrize("words", DESCRIBED.values(), ids=DESCRIBED.keys())
def test_every_plan_that_a_page_shows_can_be_made(words, capsys):
    if "--topology" in words:
        pytest.skip("compiled for a machine by test-aot")
    importlib.import_module("crescendo.experiments.describe").main(words)
    assert "GiB" in capsys.readouterr().out


def test_every_test_that_a_page_names_is_there():
    for page in LIVING:
        for test in re.findall(r"`(tests/[a-z0-9_/]+\.py)`", page.read_text()):
            assert (ROOT / test).exists(), f"{name(page)} names {test}"


def test_the_tree_in_the_design_is_the_real_one():
    specification = importlib.util.spec_from_file_location("file_tree", ROOT / "docs" / "file_tree.py")
    tree = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tree)
    page = tree.PAGE.read_text()
    assert tree.BEGIN in page
    assert tree.written(page) == page, "run `python docs/file_tree.py`"


def test_every_command_of_make_is_a_target():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        used = set(re.findall(r"`make ([\w-]+)", page.read_text()))
        assert used <= targets, f"{name(page)} tells to make {used - targets}"


def test_every_link_of_the_readme_leads_somewhere():
    for page in ROOT.glob("*.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (ROOT / link).exists(), f"{name(page)} links to {link}"


@pytest.mark.parametrize("page", [p for p in LIVING if any(b.language == "python" for b in blocks(p))], ids=name)
def test_the_python_of_a_page_runs(page):
    module = types.ModuleType(page.stem)
    for block in blocks(page):
        if block.language == "python" and block.run:
            if ">>> " in block.text:
                case = doctest.DocTestParser().get_doctest(block.text, vars(module), page.stem, str(page), block.line)
                runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
                assert runner.run(case, clear_globs=False).failed == 0
                vars(module).update(case.globs)
            else:
                exec(compile(block.text, f"{name(page)}:{block.line}", "exec"), vars(module))


def tops() -> set[str]:
    """The package's folders."""
    return {link.name for link in (ROOT / "typings" / "crescendo").iterdir()}


def test_every_folder_of_the_package_has_its_page_in_the_api():
    listed = [
        f for page in (ROOT / "docs" / "api").glob("*.md") for f in re.findall(r"\{modules\} (\w+)", page.read_text())
    ]
    assert sorted(listed) == sorted(tops())


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx_copybutton", reason="pip install '.[docs]'")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "typings")}
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs")]
    done = subprocess.run([*build, str(tmp_path / "site")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "critical batch size" in (tmp_path / "site" / "index.html").read_text()
    assert "copybutton.js" in (tmp_path / "site" / "guides" / "first_run.html").read_text()
    for folder in ("optim", "models", "parallel", "experiments"):  # of the kernels some need the GPU's extra
        page = (tmp_path / "site" / "api" / f"{folder}.html").read_text()
        for path in (path for path in (ROOT / folder).rglob("*.py") if path.stem[0] != "_"):
            module = ".".join(("crescendo", *path.relative_to(ROOT).with_suffix("").parts))
            assert f'id="module-{module}"' in page, f"{folder}.html lacks {module}"
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|link)\b[^>]*(?:src|href)="(https?:[^"]+)', text)
        assert not loaded, f"{page.name} asks the network for {loaded}"
        assert not (raw := re.findall(r"&lt;https?:.*", text)), f"{page.name} shows a link as its source: {raw[0]}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_a_guide_works_as_it_stands(page, tmp_path):
    script = "".join(block.text for block in blocks(page) if block.language == "sh" and block.run)
    if not script:
        pytest.skip("nothing to type")
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", ".*_cache", "__pycache__", "*.egg-info")
    checkout = Path(shutil.copytree(ROOT, tmp_path / "checkout", symlinks=True, ignore=ignored))
    shutil.rmtree(checkout / "runs", ignore_errors=True)
    environment = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(checkout / "typings")
    # The files that a guide writes are as the project wants its own.
    made = re.findall(r"^cat > (\S+\.py) <<", script, flags=re.MULTILINE)
    typed = [f"typings/crescendo/{path}" if path.split("/")[0] in tops() else path for path in made]
    checks = f"ruff format --diff {' '.join(made)}\nruff check {' '.join(made)}\nmypy {' '.join(typed)}\n"
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script + (checks if made else "")],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_pages_of_the_api_show_ranges():
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    lines = inspect.getdoc(optim.lamb).splitlines()
    conf._ranges(None, "function", "lamb", optim.lamb, None, lines)
    assert "  b2: decay of the second moment (at least 0 and below 1)." in lines
    assert "  phi_clip: (lo, hi) of phi; None: phi(x) = x (each at least 0)." in lines
