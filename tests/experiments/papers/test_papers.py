"""Papers are modules that state themselves; pages and tests have their names."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from crescendo.experiments import papers

ROOT = Path(__file__).resolve().parents[3]
by_name = pytest.mark.parametrize("name", papers.names())


def test_every_module_of_the_folder_is_a_paper():
    assert {"batch_warmup", "critical_batch", "large_batch", "refine_schedule"} <= set(papers.names())
    assert set(papers.papers()) == set(papers.names())


@by_name
def test_a_paper_states_itself(name):
    paper = papers.papers()[name]
    assert isinstance(paper, papers.Paper)
    assert all(part.strip() for part in paper)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
    assert re.search(r"\d", paper.claim + paper.expected), "a claim or what is expected has a figure"


@by_name
def test_its_command_is_understood(name):
    module, paper = importlib.import_module(f"{papers.__name__}.{name}"), papers.papers()[name]
    typed, command, *words = shlex.split(paper.command)
    assert (typed, command) == ("crescendo", name)
    parser = module.parser()
    assert isinstance(parser, argparse.ArgumentParser)
    parser.parse_args(words)
    assert f"crescendo {name}" in parser.format_help()
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0


@by_name
def test_pages_and_a_test_have_its_name(name):
    assert (Path(__file__).parent / f"test_{name}.py").exists()
    paper, page = papers.papers()[name], (ROOT / "docs" / "papers" / f"{name}.md").read_text()
    assert paper.title.lower() in page.lower()
    assert f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" in page
    # What was measured has a page of its own, to which this one leads; or nothing was.
    measured = (ROOT / "docs" / "results" / f"{name}.md").exists()
    assert measured == (f"(../results/{name}.md)" in page)
    assert measured or "**Measured**: nothing yet." in page
