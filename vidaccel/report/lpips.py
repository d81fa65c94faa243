"""LPIPS: the distance of two pictures in the features of AlexNet, where AlexNet's trained weights are on this machine.

Math: sum over five layers of mean over places of sum over channels of w_c (x_c / |x| - y_c / |y|)^2, where x and y are
    the features of the two pictures, scaled as its authors did, and w the weights they fitted to people's judgement.
Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", version 0.1. The w
    come with torchmetrics; AlexNet's own weights come with no package and are downloaded by nobody here.
Limits: without these very weights there is no figure, only the reason why: random ones would give a number too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

# torchvision's file; its name ends with the first digits of its SHA-256.
BACKBONE = "alexnet-owt-7be5be79.pth"
# Below this the last pooling has nothing left to pool.
SMALLEST = 32
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Number in `features`, stride, padding, and whether pooling comes before it: Krizhevsky 2014, one tower.
_LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))

Weights = Mapping[str, torch.Tensor]


def backbone() -> Path:
    """Where torch keeps AlexNet's weights once `torchvision.models.alexnet(weights="DEFAULT")` has fetched them."""
    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE


def missing() -> str | None:
    """Why LPIPS cannot be computed on this machine; None where it can."""
    path = backbone()
    if not path.is_file():
        return f"AlexNet's weights are not on this machine; {BACKBONE} belongs into checkpoints/ of torch.hub.get_dir()"
    wanted = path.stem.rpartition("-")[2]
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(wanted):
        return f"{path.name} here is not the file that its name says: its SHA-256 does not begin with {wanted}"
    try:
        _fitted()
    except (ImportError, OSError):
        return "the weights of its layers come with torchmetrics; pip install 'vidaccel[quality]'"
    return None


def lpips(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> list[float]:
    """Distance of each frame, 0 for the same; call it only where `missing()` is None.

    Args:
        a: (f, h, w, 3), sides of at least `SMALLEST`.
        b: likewise.
    """
    weights = torch.load(backbone(), map_location="cpu", weights_only=True)
    return [_distance(*pair, weights, _fitted()) for pair in zip(a, b, strict=True)]


@lru_cache(maxsize=1)
def _fitted() -> Weights:
    """The w of the five layers."""
    file = resources.files("torchmetrics") / "functional" / "image" / "lpips_models" / "alex.pth"
    with file.open("rb") as opened:
        found: Weights = torch.load(opened, map_location="cpu", weights_only=True)
    return found


def _distance(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8], weights: Weights, fitted: Weights) -> float:
    """Of one pair of pictures, (h, w, 3)."""
    x = torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = (x - torch.tensor(_SHIFT).view(3, 1, 1)) / torch.tensor(_SCALE).view(3, 1, 1)
    total = 0.0
    for number, (name, stride, padding, pooled) in enumerate(_LAYERS):
        x = functional.max_pool2d(x, 3, 2) if pooled else x
        weight, bias = weights[f"features.{name}.weight"], weights[f"features.{name}.bias"]
        x = functional.conv2d(x, weight, bias, stride, padding).relu()
        unit = x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
        apart = (unit[:1] - unit[1:]).square()
        total += float(functional.conv2d(apart, fitted[f"lin{number}.model.1.weight"]).mean())
    return total
