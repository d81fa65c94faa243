"""LPIPS: its formula on any weights, and never a figure from weights that are not AlexNet's own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vidaccel.report import lpips, quality


def alexnet() -> nn.Sequential:
    """The features of torchvision's AlexNet, whose state dict has the names of its file; weights are random."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(),
    )  # fmt: skip


def pictures() -> Any:
    return np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)


@torch.no_grad()
def test_the_formula() -> None:
    net = alexnet()
    weights = {f"features.{name}": value for name, value in net.state_dict().items()}
    fitted = lpips._fitted()
    maps = []
    for picture in pictures():
        x = torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 255 * 2 - 1
        for channel, (shift, scale) in enumerate(((-0.030, 0.458), (-0.088, 0.448), (-0.188, 0.450))):
            x[:, channel] = (x[:, channel] - shift) / scale
        x, seen = x.float(), []
        for layer in net:
            x = layer(x)
            seen += [x[0].numpy()] if isinstance(layer, nn.ReLU) else []
        maps.append(seen)
    expected = 0.0
    for number, (one, other) in enumerate(zip(*maps, strict=True)):
        w = fitted[f"lin{number}.model.1.weight"].flatten().numpy()
        total = 0.0
        for y, x in np.ndindex(one.shape[1:]):
            a, b = one[:, y, x], other[:, y, x]
            total += float((w * (a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2).sum())
        expected += total / one[0].size
    assert lpips._distance(*pictures(), weights, fitted) == pytest.approx(expected, rel=1e-4)
    assert lpips._distance(pictures()[0], pictures()[0], weights, fitted) == 0


def test_without_its_weights_there_is_a_reason_and_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = quality.measure(pictures(), pictures())
    assert found["lpips"] is None
    assert found["mean"]["lpips"] is None
    assert lpips.BACKBONE in found["notes"][0]


def test_other_weights_of_that_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    lpips.backbone().parent.mkdir(parents=True)
    torch.save({f"features.{name}": value for name, value in alexnet().state_dict().items()}, lpips.backbone())
    assert "does not begin with 7be5be79" in str(lpips.missing())
    assert quality.measure(pictures(), pictures())["lpips"] is None


def test_with_its_weights_every_frame_has_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way from the file to the report; the file here is ours, under a name that says its own digest."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = lpips.backbone().parent
    folder.mkdir(parents=True)
    weights = {f"features.{name}": value for name, value in alexnet().state_dict().items()}
    torch.save(weights, folder / "made")
    digest = hashlib.sha256((folder / "made").read_bytes()).hexdigest()
    monkeypatch.setattr(lpips, "BACKBONE", f"alexnet-{digest[:8]}.pth")
    (folder / "made").rename(lpips.backbone())
    assert lpips.missing() is None
    found = quality.measure(pictures(), pictures()[::-1])
    expected = lpips._distance(*pictures(), weights, lpips._fitted())
    assert found["lpips"] == pytest.approx([expected] * 2)
    assert found["mean"]["lpips"] == pytest.approx(expected)
    assert found["notes"] == []
    small = pictures()[:, :16]
    assert quality.measure(small, small)["notes"] == ["LPIPS was not computed: frames of 16x48 are too small for it"]
