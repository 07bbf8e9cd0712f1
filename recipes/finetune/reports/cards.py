"""The model card that lies beside the weights of each arm."""

from typing import Any

import timm

from ..files import write_text
from ..judging.formatting import epoch_text
from ..judging.metrics import operating_points, title_of
from ..runs.finished import FinishedRun
from ..runs.layout import CARD, ONNX, PROGRAM, WEIGHTS
from ..training.arms import COMPACT, reduction_of
from ..training.squeezenet import default_cfgs
from .rendering import template
from .smaller import shares_text, sizes_of
from .style import mean_text, number_text

_PROGRAMS = {PROGRAM: "a program of torch.export", ONNX: "a model for ONNX Runtime"}
_FITS = {"squash": "squashed into", "pad": "padded with black to", "crop": "cut out of their middle as"}


def write_cards(run: FinishedRun) -> None:
    for arm in run.arms:
        for seed in run.finished_seeds(arm):
            write_text(run.stage(seed, arm) / CARD, template("model_card.md.j2").render(_card(run, seed, arm)))


def _card(run: FinishedRun, seed: int, arm: str) -> dict[str, Any]:
    """What the model card's template asks for."""
    scores, place = run.summary["arms"][arm], run.seeds.index(seed)
    config = timm.get_pretrained_cfg(run.options["model"])
    recorded = run.description.get("preprocessing")
    expected = run.versions.get("model") or (config.to_dict() if config else {})
    one = run.options["in_chans"] == 1
    smaller = reduction_of(arm)
    left = run.weights(seed, arm)[0].parent
    statistics = {name: list(expected.get(name) or ()) for name in ("mean", "std")}
    return {
        "run": run,
        "arm": arm,
        "seed": seed,
        "seeds": len(run.finished_seeds(arm)),
        "weights": f"../fold_0/{arm}/{WEIGHTS}" if run.folds else WEIGHTS,
        "torchvision": bool(config) and config.architecture in default_cfgs,  # timm alone doesn't know it
        "smaller": smaller and shares_text(sizes_of([left])),
        "compacted_from": smaller and smaller.way == COMPACT and smaller.needs,
        "programs": [(name, what) for name, what in _PROGRAMS.items() if (left / name).exists()],
        "fixed_size": f", img_size={recorded['image_size']}" if recorded and config and config.fixed_input_size else "",
        "preparing": preparing_lines(recorded) if recorded else None,
        "prepared": _prepared_text(recorded) if recorded else None,
        **{name: [sum(values) / len(values)] if one and values else values for name, values in statistics.items()},
        "thresholds": _thresholds_text(run, seed, arm),
        "epoch": epoch_text(run.summary["epochs"][arm][place]),
        "rates": _rates_text(run, seed, arm),
        "scores": [
            (title_of(metric), number_text(figure["values"][place]), mean_text(figure))
            for metric, figure in scores.items()
        ],
        "verdicts": [
            found["sentence"] for found in run.summary["verdicts"] if arm in (found["arm"], found["reference"])
        ],
    }


def preparing_lines(recorded: dict[str, Any]) -> list[str]:
    """The lines of Python that make of an image file what the model sees, as make_square and crop do."""
    side, size = recorded["side"], recorded["image_size"]
    mode = "L" if recorded["grey"] else "RGB"
    square = f"({side}, {side}), Image.Resampling.BILINEAR"
    fitted = {
        "squash": f"image.resize({square})",
        "pad": f"ImageOps.pad(image, {square})",
        "crop": f"ImageOps.fit(image, {square})",
    }[recorded["fit"]]
    start = (side - size) // 2
    middle = f".crop(({start}, {start}, {start + size}, {start + size}))" if side > size else ""
    return [
        f'image = ImageOps.exif_transpose(Image.open("image.png")).convert("{mode}")',
        f"image = {fitted}{middle}",
    ]


def _prepared_text(recorded: dict[str, Any]) -> str:
    side, size = recorded["side"], recorded["image_size"]
    colours = "made grey, " if recorded["grey"] else ""
    middle = f", of which the model sees the middle {size} x {size}" if side > size else ""
    return f"{colours}{_FITS[recorded['fit']]} {side} x {side} pixels{middle}"


def _thresholds_text(run: FinishedRun, seed: int, arm: str) -> str:
    val = run.validation[arm][run.finished_seeds(arm).index(seed)]
    cuts = operating_points(run.task, val.labels, val.probabilities)
    found = [f"{run.task.classes[k]} from {cut:.4g}" for k, cut in cuts.items()]
    return f": {', '.join(found)}" if found else ", where there are any: here the likeliest class is called"


def _rates_text(run: FinishedRun, seed: int, arm: str) -> str:
    """The learning rates that both stages began with, as they were trained."""
    curves = run.curves(arm)
    rates = curves[curves["seed"] == seed]["lr"].tolist()
    backbone = f"{run.options['lr']:g} in the backbone stage"
    return f"{backbone}, {rates[0]:g} at the start of the arm" if rates else backbone
