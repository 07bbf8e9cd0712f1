"""What merging did to the weights: the kernels of a merging arm's kept models beside the baseline's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open

from ..files import read_json
from ..judging.metrics import mean_of_known
from .layout import MERGES, RESULT, WEIGHTS

FIGURES = ("displacement", "norm", "effective_rank")

OfLayers = dict[str, dict[str, float | None]]


def compare_kernels(arm: Sequence[Path], baseline: Sequence[Path]) -> OfLayers:
    """Per layer that an arm merges, in one seed: FIGURES, each a mean over the folds where there are any.

    "displacement" is the mean of the recorded ones, over the epochs that drew pairs. "norm" and "effective_rank" are
    the arm's over the baseline's, of the kept models: of the mean norm of a layer's kernels, and of its effective rank.
    None where one is not known.

    Args:
        arm, baseline: stage folders, one each or one per fold.
    """
    pairs = [_compare(*folders) for folders in zip(arm, baseline, strict=True)]
    return {
        layer: {figure: mean_of_known([found[layer][figure] for found in pairs]) for figure in FIGURES}
        for layer in pairs[0]
    }


def _compare(arm: Path, baseline: Path) -> OfLayers:
    table = _tally(arm)
    layers = list(dict.fromkeys(table["layer"]))
    of_arm, of_baseline = ((_norms(folder, layers), _kept_ranks(folder)) for folder in (arm, baseline))
    drew = table[table["drawn"] > 0]
    return {
        layer: {
            "displacement": _mean(drew[drew["layer"] == layer]["displacement"]),
            **{
                name: _ratio(own.get(layer), reference.get(layer))
                for name, own, reference in zip(("norm", "effective_rank"), of_arm, of_baseline, strict=True)
            },
        }
        for layer in layers
    }


def _tally(stage: Path) -> pd.DataFrame:
    """merges.csv; the baseline has none where all merging arms were added later, and old ones have no displacement."""
    columns = ["epoch", "layer", "drawn", "merged", "mean_cosine", "effective_rank", "displacement"]
    if not (stage / MERGES).exists():
        return pd.DataFrame(columns=columns)
    return pd.read_csv(stage / MERGES).reindex(columns=columns)


def _kept_ranks(stage: Path) -> dict[str, float]:
    table = _tally(stage)
    kept = table[table["epoch"] == read_json(stage / RESULT)["epoch"]]
    return dict(zip(kept["layer"], kept["effective_rank"], strict=True))


def _norms(stage: Path, layers: Sequence[str]) -> dict[str, float]:
    """The mean norm of each layer's kernels; the other weights are not read."""
    with safe_open(stage / WEIGHTS, "pt") as file:
        weights = {layer: file.get_tensor(f"{layer}.weight").double().flatten(1) for layer in layers}
    return {layer: float(weight.norm(dim=1).mean()) for layer, weight in weights.items()}


def _ratio(own: float | None, reference: float | None) -> float | None:
    found = own / reference if own is not None and reference else np.nan
    return float(found) if np.isfinite(found) else None


def _mean(values: pd.Series) -> float | None:
    found = pd.to_numeric(values).mean()
    return float(found) if np.isfinite(found) else None
