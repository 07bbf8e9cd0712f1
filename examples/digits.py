"""What the examples train: a ResNet-18 of a quarter of the width, on scikit-learn's 1,797 handwritten digits."""

from __future__ import annotations

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from inmerge_optim import InMergeOptimizer

# A network without pretrained weights has no pairs of kernels with a cosine of 0.3, the paper's threshold: here it is
# the most similar tenth of the pairs that are drawn.
SETTINGS = {"similarity_threshold": "q0.9"}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return images (1, 8, 8) and labels to train on, and others to test on."""
    images, labels = load_digits(return_X_y=True)
    everything = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    return TensorDataset(*(part[:1500] for part in everything)), TensorDataset(*(part[1500:] for part in everything))


def network(seed: int = 0) -> nn.Module:
    """Return the network, with random weights."""
    torch.manual_seed(seed)
    return timm.create_model("resnet18", channels=(16, 32, 64, 128), in_chans=1, num_classes=10)


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the share of images whose label the model finds."""
    images, labels = data.tensors
    model.eval()
    with torch.inference_mode():
        found = model(images.to(next(model.parameters()).device)).argmax(1).cpu()
    model.train()
    return float((found == labels).float().mean())


def say(optimizer: InMergeOptimizer, found: float) -> None:
    """Print what was merged, and the accuracy on the test images."""
    counts = optimizer.merge_counts().values()
    merged, drawn = (sum(count[name] for count in counts) for name in ("merged", "drawn"))
    print(f"merged {merged} of {drawn} drawn pairs of kernels in {len(counts)} layers; test accuracy {found:.3f}")
