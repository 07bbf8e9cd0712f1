"""The points of a sweep: from texts to arms, and arms that tell their settings by their names."""

from __future__ import annotations

import pytest
from finetune.errors import InputError
from finetune.options import Options
from finetune.training.arms import ARMS, Arm, arm_of, check_arms, merge_settings
from finetune.training.points import read_sweeps, sweep_arms


def test_sweeps_are_lists_and_ranges_with_both_ends() -> None:
    texts = ["skip-layers=0:15:5,0.6", "similarity_threshold=dissimilar, -0.1,4sd,q0.9", "merge_weight=0.5:0.95:0.15"]
    assert read_sweeps(texts) == [
        ("skip_layers", [0, 5, 10, 15, 0.6]),
        ("similarity_threshold", ["dissimilar", -0.1, "4sd", "q0.9"]),
        ("merge_weight", [0.5, 0.65, 0.8, 0.95]),
    ]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "there is nothing to sweep over: give such as --sweep"),
        (["skip_layer=1"], "unknown setting 'skip_layer': did you mean skip_layers"),
        (["lr=0.1,0.2"], "unknown setting 'lr': choose from skip_layers, merge_prob"),
        (["merge_prob="], "leaves a value empty"),
        (["merge_prob"], "leaves a value empty"),
        (["merge_prob=0.1,,0.2"], "leaves a value empty"),
        (["merge_prob=0.1,1.5"], "merge_prob is 1.5, but it must be a number from 0 to 1"),
        (["merge_prob=nan"], "merge_prob is nan"),
        (["merge_prob=dissimilar"], "merge_prob is 'dissimilar', but it must be a number"),
        (["similarity_threshold=4dd"], "similarity_threshold is '4dd'"),
        (["skip_layers=-1"], "skip_layers is -1, but it must be an int from 0 or a float from 0 to below 1"),
        (["skip_layers=1.5"], "skip_layers is 1.5"),
        (["merge_weight=0.5:0.9"], "has the range 0.5:0.9: expected first:last:step"),
        (["merge_weight=0.5:0.9:0"], "has the range"),
        (["merge_weight=0.9:0.5:0.1"], "has the range"),
        (["merge_weight=0:1:1e-9"], "has the range"),
        (["merge_prob=0.1", "merge_prob=0.2"], "names merge_prob twice"),
        (["merge_prob=0.1,0.10"], "names a value twice"),
    ],
)
def test_what_is_no_sweep_is_told(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as error:
        read_sweeps(texts)
    assert "\n" not in str(error.value)


def test_one_setting_at_a_time_around_the_options_own_values() -> None:
    """The point in the middle is the plain arm, and is trained once."""
    sweeps = read_sweeps(["skip_layers=5,10", "merge_prob=0.1,0.3", "similarity_threshold=dissimilar,q0.9"])
    assert sweep_arms(sweeps, Options(skip_layers=10), crossed=False) == (
        "baseline",
        "inmerge@skip_layers=5",
        "inmerge",
        "inmerge@merge_prob=0.1",
        "dissimilar",
        "inmerge@similarity_threshold=q0.9",
    )


def test_crossed_sweeps_have_every_combination() -> None:
    sweeps = read_sweeps(["similarity_threshold=dissimilar,0.3", "merge_prob=0.1,0.3"])
    arms = sweep_arms(sweeps, Options(), crossed=True)
    assert arms == ("baseline", "dissimilar@merge_prob=0.1", "dissimilar", "inmerge@merge_prob=0.1", "inmerge")


def test_an_arms_name_tells_its_settings() -> None:
    options = Options(arms=("baseline", "inmerge@skip_layers=5,similarity_threshold=q0.9"))
    arm = arm_of(options.arms[1])
    assert arm == Arm(criterion="similar", settings={"skip_layers": 5, "similarity_threshold": "q0.9"})
    assert merge_settings(arm, options) == {
        "skip_layers": 5,
        "merge_prob": 0.3,
        "merge_weight": 0.8,
        "similarity_threshold": "q0.9",
    }
    assert arm_of("random-pairs@merge_prob=1.0").criterion == "random_pairs"
    assert arm_of("validation-rounds@merge_prob=1.0").rounds


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inmerg@merge_prob=0.1", "unknown arm 'inmerg': did you mean inmerge"),
        ("baseline@merge_prob=0.1", "an arm that merges nothing has no use for merge_prob"),
        ("inmerge@", "'' sets none of skip_layers"),
        ("inmerge@lr=0.1", "'lr=0.1' sets none of skip_layers"),
        ("inmerge@merge_prob=.1", "must be written as inmerge@merge_prob=0.1"),
        ("inmerge@merge_prob=0.1,skip_layers=1", "must be written as inmerge@skip_layers=1,merge_prob=0.1"),
        ("inmerge@merge_prob=../..", "merge_prob is '../..', but it must be a number"),
        ("inmerge@similarity_threshold=../..", "similarity_threshold is '../..', but it must be"),
    ],
)
def test_what_is_no_arm_is_told(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_arms(Options(arms=("baseline", name)))


def test_rounds_belong_to_arms_that_merge_without_steps() -> None:
    rounds = ["validation-rounds", "norm-matched-rounds", "noise-matched-rounds"]
    assert [name for name, arm in ARMS.items() if arm.rounds] == rounds
    with pytest.raises(ValueError, match="merges nothing has no use for rounds"):
        Arm(rounds=True)
    with pytest.raises(InputError, match="--merge-rounds has no effect on --arms baseline inmerge: add validation"):
        check_arms(Options(merge_rounds=10))
