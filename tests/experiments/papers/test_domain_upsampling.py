"""A domain upsampled at the end of a run."""

import json

import pytest

from crescendo.experiments.papers.domain_upsampling import domain_upsampling, main, make_arms
from crescendo.experiments.runtime.errors import UserError


def test_arms_say_when_the_domain_is_upsampled():
    arms = make_arms(2000, share=0.1, upsampled=0.6, over=[0.05, 0.3])
    weights = {name: bindings["text_mixture.weights"] for name, bindings in arms.items()}
    low, high = {"domain": 0.1, "rest": 0.9}, {"domain": 0.6, "rest": 0.4}
    assert weights == {
        "base": {0: low},
        "last-5": {0: low, 1900: high},
        "last-30": {0: low, 1400: high},
        "throughout": {0: high},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--share", "0.5"], r"--share 0\.5 must be at least 0 and below --upsampled 0\.5"),
        (["--upsampled", "1.5"], r"below --upsampled 1\.5, and that at most 1"),
        (["--over", "0.2", "0.1"], r"--over 0\.2 0\.1: give parts of the run between 0 and 1, increasing"),
        (["--over", "0", "0.1"], r"--over 0\.0 0\.1: give parts"),
        (["--over", "1e-9"], r"--over 1e-09: of 6,144 examples one of these is none or all"),
        (["--over", "0.1", "0.10001"], r"--over 0\.1 0\.10001: .* two are the same: raise --total-examples"),
        (
            ["--set", "text_mixture.weights = {'domain': 1, 'rest': 1}"],
            "sets text_mixture.weights itself: give --share",
        ),
        (["--set", "TOTAL_EXAMPLES = 64"], "give --total-examples 64 instead"),
    ],
)
def test_what_can_t_be_is_one_line(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main(["--run", str(tmp_path / "run"), "--domain", "nowhere.txt", *arguments])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_every_arm_is_trained_and_its_losses_are_told(small_bindings, corpus, tmp_path, capsys):
    own = ("text_data.documents", "text_files.paths", "TOTAL_EXAMPLES")
    records = domain_upsampling(
        tmp_path,
        domain=[f"{corpus}/0*.txt"],
        rest=[f"{corpus}/[123]*.txt"],
        bindings=[binding for binding in small_bindings if not binding.startswith(own)],
        over=[0.5],
        total_examples=128,
    )
    assert [arm["arm"] for arm in json.loads((tmp_path / "comparison.json").read_text())] == [*records]
    assert list(records) == ["base", "last-50", "throughout"]
    for (record,) in records.values():
        assert record["loss"] == pytest.approx((record["domain/loss"] + record["rest/loss"]) / 2)
    assert "domain" in capsys.readouterr().out
