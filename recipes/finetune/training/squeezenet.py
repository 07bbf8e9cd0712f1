"""SqueezeNet 1.1 of torchvision under timm's registry: small and fast, with deep convolutions, and timm has none."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torchvision.models import SqueezeNet, SqueezeNet1_1_Weights

default_cfgs = generate_default_cfgs(
    {
        "squeezenet1_1.tv_in1k": {
            "url": SqueezeNet1_1_Weights.IMAGENET1K_V1.url,
            "input_size": (3, 224, 224),
            "num_classes": 1000,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "features.0",
            "classifier": "classifier.1",
        }
    }
)


class _SqueezeNet(SqueezeNet):
    """torchvision's network, with timm's `in_chans`."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.5) -> None:
        super().__init__("1_1", num_classes, drop_rate)
        if in_chans != 3:
            first = nn.Conv2d(in_chans, 64, kernel_size=3, stride=2)
            nn.init.kaiming_uniform_(first.weight)
            nn.init.zeros_(first.bias)  # type: ignore[arg-type]  # as torchvision begins the others
            self.features[0] = first


@register_model
def squeezenet1_1(pretrained: bool = False, **settings: Any) -> nn.Module:
    """SqueezeNet 1.1 (Iandola et al., arXiv 1602.07360), its layers named as in torchvision.

    Args:
        pretrained: whether to fetch torchvision's ImageNet weights.
        settings: `num_classes`, `in_chans`, `drop_rate`, and timm's `pretrained_cfg_overlay`.
    """
    model: nn.Module = build_model_with_cfg(_SqueezeNet, "squeezenet1_1", pretrained, **settings)
    return model
