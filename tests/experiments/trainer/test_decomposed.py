"""A run over pieces of growing length: what its records say, and that it goes on as it was."""

import json

import pytest

from crescendo.experiments.reports.charts import charts_of
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError


@pytest.fixture
def bindings(tmp_path):
    texts = [f"{i} " + "of the warm batches "[: i % 20] * (1 + i % 4) for i in range(500)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return [
        f"text_files.paths = ['{tmp_path}/texts.jsonl']",
        "text_data.packing = @decomposed()",
        "decomposed.shortest = 8",
        "decomposed.cycle = 128",
        "decomposed.group = 16",
    ]


@pytest.mark.slow
def test_each_step_has_one_length_and_a_resumed_run_the_same(bindings, train_small, records, tmp_path):
    train_small(tmp_path / "whole", *bindings)
    train_small(tmp_path / "cut", *bindings, "train.stop_after_tokens = 3072")  # 96 rows of 32
    train_small(tmp_path / "cut", *bindings)
    found = [
        {each["examples_seen"]: each for each in records(tmp_path / name) if each["kind"] == "train"}
        for name in ("whole", "cut")
    ]
    lengths = [each["piece_length"] for each in found[0].values()]
    assert set(lengths) == {8, 16, 32}
    assert lengths == lengths[:8] * 4
    assert lengths[7] == 32
    for clock, each in found[0].items():
        assert (each["piece_length"], each["loss"]) == (found[1][clock]["piece_length"], found[1][clock]["loss"])
    charts = [chart.title for chart in charts_of([("whole", [read_run(tmp_path / "whole")])])]
    assert "Length of pieces" in charts
    with pytest.raises(UserError, match="data"):
        train_small(tmp_path / "whole", *bindings, "decomposed.odds = 1.0")


def test_a_run_that_sees_short_pieces_alone_is_refused_before_the_start(bindings, train_small, tmp_path):
    with pytest.raises(UserError, match=r"512 examples are less than one cycle of 1,024.* decomposed\.cycle = 64"):
        train_small(tmp_path / "a", *bindings, "decomposed.cycle = 1024")
    assert not (tmp_path / "a").exists()
