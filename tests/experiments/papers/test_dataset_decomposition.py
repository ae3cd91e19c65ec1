"""Pieces of one length compared with packed rows."""

import json

import pytest

from crescendo.experiments.configs.statements import Call
from crescendo.experiments.papers.dataset_decomposition import dataset_decomposition, main, make_arms
from crescendo.experiments.runtime.errors import UserError


def test_arms_differ_in_the_order_of_lengths_alone():
    arms = make_arms(960, arms=["packed", "even", "grow", "shrink"], shortest=16, cycles=4, group=8)
    assert arms.pop("packed") == {"text_data.packing": None}
    odds = {name: bindings.pop("decomposed.odds") for name, bindings in arms.items()}
    assert odds == {"even": 1.0, "grow": 2.0, "shrink": 0.5}
    common = {"decomposed.shortest": 16, "decomposed.cycle": 240, "decomposed.group": 8}
    assert list(arms.values()) == [{"text_data.packing": Call("decomposed"), **common}] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "packed", "longest"], r"--arms longest: no such arm; there are packed, even, grow"),
        (["--cycles", "5"], r"--total-examples 6144 must be whole cycles .* multiple of --cycles x --group = 40"),
        (["--group", "0"], r"--cycles 8 and --group 0 must be at least 1"),
        (["--set", "decomposed.odds = 3.0"], r"sets decomposed\.odds itself: give --arms"),
        (["--set", "TOTAL_EXAMPLES = 64"], "give --total-examples 64 instead"),
    ],
)
def test_what_can_t_be_is_one_line(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main(["--run", str(tmp_path / "run"), *arguments])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_every_arm_is_trained_and_compared_on_the_same_rows(small_bindings, tmp_path, capsys):
    texts = [f"{i} " + "of the warm batches "[: i % 20] * (1 + i % 4) for i in range(500)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    own = ("TOTAL_EXAMPLES", "text_files.paths")
    bindings = [
        *(binding for binding in small_bindings if not binding.startswith(own)),
        f"text_files.paths = ['{tmp_path}/texts.jsonl']",
    ]
    records = dataset_decomposition(
        tmp_path / "run", bindings=bindings, shortest=8, cycles=2, group=16, total_examples=256
    )
    assert [arm["arm"] for arm in json.loads((tmp_path / "run" / "comparison.json").read_text())] == [*records]
    assert list(records) == ["packed", "even", "grow"]
    assert all(record["loss"] < 6 for (record,) in records.values())
    assert "to reach" in capsys.readouterr().out
