"""Where a model looks: Grad-CAM beside boxes drawn by people, scored by the pointing game.

Grad-CAM: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization" (2017),
from captum. Pointing game: Zhang et al., "Top-down Neural Attention by Excitation Backprop" (2016), here without their
tolerance of some pixels around the object: a hit is a map's maximum in a box.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from captum.attr import LayerGradCam
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from ..data.images import BoxedFinding, ImageData
from ..options import Options
from ..runs.finished import FinishedRun
from ..runs.layout import PLOTS, WEIGHTS
from ..runs.sections import Section
from ..training.batches import channel_statistics, crop, model_input
from ..training.models import load_model
from .style import in_lines, write_figure

_BATCH = 32


@dataclass(frozen=True)
class Target:
    """A label to look for in an image of the test set.

    Attributes:
        row: of the image in the test set.
        label: its place among the task's classes.
        boxes: where it is, (B, 4): left, top, right and bottom in pixels of what the model sees.
        share: of what the model sees, how much lies in the boxes, above 0 to 1: a random point's chance of a hit.
    """

    row: int
    label: int
    boxes: np.ndarray
    share: float


def localisation_section(
    run: FinishedRun, options: Options, data: ImageData, findings: Sequence[BoxedFinding]
) -> Section:
    """The hit rate per label and arm, with a picture per label; pictures are written to plots/ in the run folder."""
    found = targets(data, findings)
    counts = _counts(data, findings, found)
    if not found:
        return Section("Localisation", f"{counts} So there is nothing to score.")
    maps = {
        arm: [_grad_cams(run.stage(seed, arm) / WEIGHTS, options, data, found) for seed in run.finished_seeds(arm)]
        for arm in run.arms
    }
    hits = {
        arm: np.array([[hit(*pair, data.size) for pair in zip(cams, found, strict=True)] for cams in seeds])
        for arm, seeds in maps.items()
    }
    places = {name: [target.label == label for target in found] for label, name in enumerate(data.task.classes)}
    rows = []
    for name, chosen in (*places.items(), ("all", [True] * len(found))):
        if any(chosen):
            chance = np.mean([target.share for target in found], where=chosen)
            rates = (_rate_text(hits[arm][:, chosen].mean(axis=1)) for arm in run.arms)
            rows.append([name, str(sum(chosen)), f"{chance:.3f}", *rates])
    return Section(
        title="Localisation",
        text=f"{counts} {_method(data, maps)}",
        header=["label", "images", "chance", *run.arms],
        rows=rows,
        figures=_pictures(run, data, found, {arm: seeds[0] for arm, seeds in maps.items()}),
    )


def targets(data: ImageData, findings: Sequence[BoxedFinding]) -> list[Target]:
    """The findings of test images, as far as their boxes reach into what the model sees, by label and image."""
    rows = {case: row for row, case in enumerate(data.test.cases)}
    side, size = data.test.images.shape[-1], data.size
    centres = np.arange(size) + 0.5
    found = []
    for finding in findings:
        if finding.case in rows:
            boxes = np.clip(finding.boxes * side - (side - size) // 2, 0, size)
            share = float(in_boxes(boxes, *np.meshgrid(centres, centres)).mean())
            if share > 0:
                found.append(Target(rows[finding.case], finding.label, boxes, share))
    return sorted(found, key=lambda target: (target.label, target.row))


def in_boxes(boxes: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie in any of the boxes (B, 4), bool in the shape of x and y."""
    left, top, right, bottom = boxes.T
    x, y = x[..., None], y[..., None]
    return ((left <= x) & (x < right) & (top <= y) & (y < bottom)).any(axis=-1)


def hit(cam: np.ndarray, target: Target, size: int) -> bool:
    """Whether the map's maximum lies in a box; a map that is positive nowhere points nowhere, which is a miss."""
    return bool(cam.max() > 0 and in_boxes(target.boxes, *maximum(cam, size)))


def maximum(cam: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a map (h, w), upsampled to `size` bilinearly, is largest: x and y in pixels.

    Such a map is largest at the centre of one of its cells, so that is where it is looked up. Among the pixels of the
    upsampled map, those from a border cell's centre to the border tie, and the first of them is at the very edge.
    """
    row, column = np.unravel_index(cam.argmax(), cam.shape)
    return (column + 0.5) * size / cam.shape[1], (row + 0.5) * size / cam.shape[0]


def feature_map_layer(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """The module that gives the last map of more than one cell each way, which is what Grad-CAM weighs.

    Found in a forward pass: timm's models have no common name for it. Passed over are a map that was only pooled,
    which is coarser than it need be (VGG ends its features so), and a module that is called several times in a pass.
    """
    found: list[nn.Module] = []
    pooled: list[object] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        is_map = isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1
        if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
            pooled.append(output)
        elif is_map and not any(output is other for other in pooled):  # a container gives the tensor of its last module
            found.append(module)

    with torch.no_grad(), register_module_forward_hook(note):
        model(inputs)
    return next(module for module in reversed(found) if found.count(module) == 1)


def grad_cam(model: nn.Module, layer: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Grad-CAM of one label per image, at least 0, float32 (N, h, w) with the cells of the layer's map."""
    maps = LayerGradCam(model, layer).attribute(inputs, target=labels, relu_attributions=True)
    return maps.detach()[:, 0].cpu().numpy()


def _grad_cams(weights: Path, options: Options, data: ImageData, found: Sequence[Target]) -> np.ndarray:
    """The maps of all targets, (N, h, w), from an arm's kept weights."""
    device = PartialState().device
    model = load_model(options, data, weights).eval().to(device)
    mean, std = (values.to(device) for values in channel_statistics(model.pretrained_cfg, options.in_chans))
    maps = []
    for start in range(0, len(found), _BATCH):
        batch = found[start : start + _BATCH]
        images = torch.from_numpy(data.test.images[[target.row for target in batch]]).to(device)
        inputs = model_input(crop(images, data.size), mean, std)
        if not start:
            layer = feature_map_layer(model, inputs)
        maps.append(grad_cam(model, layer, inputs, torch.tensor([target.label for target in batch], device=device)))
    return np.concatenate(maps)


def _counts(data: ImageData, findings: Sequence[BoxedFinding], found: Sequence[Target]) -> str:
    cases = set(data.test.cases)
    there = sum(finding.case in cases for finding in findings)
    text = f"Of {len(findings):,} findings with boxes, {there:,} are of images in this test set."
    if there > len(found):
        text += f" {there - len(found):,} of them lie wholly outside what the model sees and are left out."
    return text


def _method(data: ImageData, maps: dict[str, list[np.ndarray]]) -> str:
    every = np.concatenate([cams for seeds in maps.values() for cams in seeds])
    blank = int((every.max(axis=(1, 2)) <= 0).sum())
    cells = f"{every.shape[2]} x {every.shape[1]} cells on {data.size} x {data.size} pixels"
    return (
        f"Grad-CAM of the finding's label ({cells}, upsampled bilinearly) by each arm's kept weights: a hit is a "
        "maximum in a box of that label, without a tolerance around it. Boxes that reach beyond what the model sees "
        "are cut at its border. The table has the share of hits, over several seeds as mean ± standard deviation; "
        "chance is the mean share of what is seen that lies in the boxes, which a random point would hit."
        + (f" Maps that are positive nowhere count as misses: {blank:,} of {len(every):,}." if blank else "")
        + "\n\nThe pictures show the first image of each label by the first seed that each arm finished, each map on a "
        "scale of its own from transparent to yellow. The cross is its maximum, the rectangle the box, p the predicted "
        "probability."
    )


def _rate_text(rates: np.ndarray) -> str:
    spread = f" ± {rates.std(ddof=1):.3f}" if len(rates) > 1 else ""
    return f"{rates.mean():.3f}{spread}"


def _pictures(
    run: FinishedRun, data: ImageData, found: Sequence[Target], maps: dict[str, np.ndarray]
) -> list[tuple[str, str]]:
    """One picture per label, of its first target; their paths in the run folder and what they show."""
    figures = []
    for label in sorted({target.label for target in found}):
        k, target = next((k, target) for k, target in enumerate(found) if target.label == label)
        name, case = data.task.classes[label], data.test.cases[target.row]
        image = crop(torch.from_numpy(data.test.images[[target.row]]), data.size)[0].permute(1, 2, 0).numpy()
        likely = {arm: seeds[0].probabilities[target.row, label] for arm, seeds in run.predictions.items()}
        picture = overlays(image, {arm: cams[k] for arm, cams in maps.items()}, target, likely, f"{name}, {case}")
        path = f"{PLOTS}/grad_cam_{name}.png"
        write_figure(run.folder / path, picture)
        arms = " and ".join(run.arms)
        figures.append((path, f"{name} in {case}: the image with its box, and the Grad-CAM of {arms}"))
    return figures


def overlays(
    image: np.ndarray, cams: dict[str, np.ndarray], target: Target, likely: dict[str, float], title: str
) -> Figure:
    """An image (side, side, 1 or 3) alone and under the map of each arm, with the boxes in all."""
    size = len(image)
    figure = Figure(figsize=(3.2 * (1 + len(cams)), 3.9), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 1 + len(cams))
    for panel, arm in zip(panels, [None, *cams], strict=True):
        panel.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(0, size, size, 0))
        panel.set_axis_off()
        if arm is None:
            panel.set_title("image and box")
        else:
            cam = torch.from_numpy(cams[arm])[None, None]
            heat = F.interpolate(cam, (size, size), mode="bilinear")[0, 0].numpy() / max(cams[arm].max(), 1e-12)
            panel.imshow(heat, cmap="viridis", vmin=0, vmax=1, alpha=0.65 * heat, extent=(0, size, size, 0))
            outcome = "hit" if hit(cams[arm], target, size) else "miss"
            panel.set_title(f"{in_lines(arm)}: p {likely[arm]:.2f}, {outcome}")
            if cams[arm].max() > 0:
                panel.plot(*maximum(cams[arm], size), "x", ms=9, mew=2, color="white", path_effects=_outline(4))
        for left, top, right, bottom in target.boxes:
            corner = Rectangle((left, top), right - left, bottom - top, fill=False, color="white", lw=1.5)
            corner.set_path_effects(_outline(3.5))
            panel.add_patch(corner)
    return figure


def _outline(width: float) -> list[AbstractPathEffect]:
    """What sets white lines off from bright images."""
    return [withStroke(linewidth=width, foreground="black")]
