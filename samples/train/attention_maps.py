"""Draws where a sample model looks: attention mass between blocks of tokens, for each layer and head.

    python -m samples.train.attention_maps --prompt "a red circle moves right" --out attention.png

One row a layer, one column a head, and last the blocks that the model's own recipe keeps. A picture has a query block a
row and a key block a column, in the recipe's token order: frame after frame. White is most mass.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image
from torch import Tensor

import vidaccel
from samples.train.budget import get_logger
from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import Plan
from vidaccel.pipelines.wan import WAN

log = get_logger("attention maps")
SCALE = 5
GAP = 6


class Watch:
    """A layer's own processor, which keeps the attention mass of the first sample of the last call."""

    def __init__(self, stock: Any, layout: TokenLayout) -> None:
        self.stock = stock
        self.layout = layout
        self.mass: Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, *inputs: Any) -> Any:
        """Attend as before; on the side, sum the softmax over blocks."""
        q, k, _ = WAN.project(attn, self.layout, hidden_states, *inputs)
        logits = torch.einsum("lhd,mhd->hlm", q[0].float(), k[0].float()) * q.shape[-1] ** -0.5
        logits = logits.masked_fill(~self.layout.filled, -torch.inf)
        n, block = self.layout.blocks, self.layout.block
        self.mass = logits.softmax(-1).unflatten(2, (n, block)).sum(3).unflatten(1, (n, block)).mean(2)
        return self.stock(attn, hidden_states, *inputs)


def main() -> None:
    """Render once, draw the maps of the middle step."""
    args = _arguments()
    pipe = WanPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = json.loads((args.model / "defaults.json").read_text())
    settings.pop("fps")
    plan = planned(args.model.name, settings)
    masses: dict[str, Tensor] = {}
    watches = {n: Watch(p, plan.layout) for n, p in pipe.transformer.attn_processors.items() if ".attn1." in n}
    pipe.transformer.set_attn_processor(pipe.transformer.attn_processors | watches)

    def keep(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == settings["num_inference_steps"] // 2:
            masses.update({name: watch.mass for name, watch in watches.items() if watch.mass is not None})
        return kwargs

    # Without guidance, so that the last call of a step is the one with the prompt.
    settings["guidance_scale"] = 1.0
    noise = torch.Generator().manual_seed(args.seed)
    pipe(args.prompt, generator=noise, output_type="latent", callback_on_step_end=keep, **settings)
    kept = plan.mask.block_map()[0] > 0
    draw(list(masses.values()), kept, args.out)
    for name, mass in masses.items():
        share = (mass * kept).sum(-1).mean(-1)
        log.info("%s: the recipe keeps %s of the mass", name, [round(float(value), 2) for value in share])


def planned(preset: str, settings: dict[str, Any]) -> Plan:
    """Return what the model's own recipe keeps on its default grid."""
    recipe = vidaccel.Recipe.load(preset)
    if recipe.attention is None:
        raise ValueError(f"the preset {preset} has no attention pattern")
    grid = ((settings["num_frames"] - 1) // 4 + 1, settings["height"] // 16, settings["width"] // 16)
    layout = TokenLayout.of(grid, block=recipe.attention.block)
    return recipe.attention.plan(layout, recipe.density, Site("", 0, "self", "wan"))


def draw(masses: list[Tensor], kept: Tensor, out: Path) -> None:
    """Write the picture; brightness is the square root of the mass, so that small shares can be seen."""
    rows = []
    for mass in masses:
        pictures = [*(mass / mass.amax((1, 2), keepdim=True)).sqrt(), kept.float()]
        rows.append(np.concatenate([_tile(picture) for picture in pictures], axis=1))
    Image.fromarray(np.concatenate(rows, axis=0)).quantize(32).save(out, optimize=True)


def _tile(picture: Tensor) -> np.ndarray:
    pixels = (picture.clamp(0, 1) * 255).byte().numpy().repeat(SCALE, 0).repeat(SCALE, 1)
    return np.pad(pixels, GAP // 2, constant_values=60)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("samples/models/wan-tiny"))
    parser.add_argument("--prompt", default="a red circle moves right")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("samples/models/wan-tiny/attention.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
