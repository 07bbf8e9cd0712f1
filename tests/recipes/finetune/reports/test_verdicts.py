"""What a report says first, for each outcome, and which weights a run began with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from finetune.judging.obuchowski_rockette import Difference
from finetune.judging.verdict import Question, judge
from finetune.options import Options
from finetune.reports.verdicts import origin_text, plain_sentence
from finetune.training.models import bare_model, origin_of


def sentence(mean: float | None, error: float, seeds: int = 5, arm: str = "inmerge", identical: bool = False) -> str:
    difference = Difference(mean, seeds, error**2 * seeds, 0.0, error, seeds - 1.0)
    if seeds == 1:
        difference = Difference(mean, seeds)
    verdict = judge(Question(arm, "baseline", "AUROC", 500), difference, identical)
    return plain_sentence({"arm": arm, "reference": "baseline", "metric": "auroc", **asdict(verdict)})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (sentence(0.0001, 0.0005), "Merging made no difference that matters: it moved test AUROC by +0.0001"),
        (
            sentence(0.02, 0.001),
            "Merging helped: it moved test AUROC by +0.0200 [0.0172, 0.0228], more than",
        ),
        (sentence(-0.02, 0.001, arm="ema"), "ema did harm: it moved test AUROC by -0.0200"),
        (sentence(0.006, 0.002), "by how much is open"),
        (sentence(0.004, 0.004), "Whether merging helps is undecided: it moved test AUROC by +0.004"),
        (sentence(0.02, 0.001, identical=True), "Merging changed nothing: the weights are the same in every seed."),
        (sentence(0.01, 0.1, seeds=1), "Merging is not judged: +0.0100 in one seed says too little"),
    ],
)
def test_one_plain_sentence_says_the_outcome(found: str, words: str) -> None:
    assert words in found
    assert found.endswith(".")
    assert found.count(". ") == 0


def test_the_exact_tag_of_the_weights_is_kept(tmp_path: Path) -> None:
    options = Options(model="resnet18")
    found = origin_of(bare_model(options), options)
    assert found["name"] == "resnet18.a1_in1k"
    assert found["weights"] == "timm/resnet18.a1_in1k"

    def told(model: dict[str, object] | None, **settings: object) -> str:
        chosen = {"pretrained": True, "checkpoint": None, **settings}
        return origin_text(SimpleNamespace(options=chosen, versions={"model": model}))

    assert told(found) == "timm's pretrained weights resnet18.a1_in1k (timm/resnet18.a1_in1k)"
    assert told(None) == "timm's pretrained weights"
    assert told(found, pretrained=False) == "random weights"
    assert told(found, checkpoint="x/y.safetensors") == "weights from y.safetensors"
