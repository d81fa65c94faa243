"""Pictures of the patterns, beside their descriptions: `python -m vidaccel.lab.pictures [--check]`.

On the left all pairs of tokens, queries down and keys across, frame by frame: the darker, the more of them is kept. On
the right what one query (orange) sees of each frame. Keys that are merged into a mean are as pale as they are many.

Idea: attention with logits of 0 and with one channel a token as values gives the share that each query takes from each
    key, whatever a pattern does to masks, orders and keys.
Limits: patterns that choose are shown choosing from made-up q and k: places, and an object that moves to the right.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ..files import replacing
from ..grid import Site, TokenLayout
from ..kernels import attention
from ..patterns import (
    Ann,
    Choice,
    Dense,
    FreeSwim,
    LightForcing,
    Neighborhood,
    Pattern,
    PerHead,
    Plan,
    Pyramid,
    Radial,
    SlidingWindow,
    SparseVideoGen,
    TempCache,
    TopK,
    Union,
)

FOLDER = Path(__file__).resolve().parents[1] / "patterns" / "pictures"
GRID, BLOCK = (6, 8, 16), 16
# The query that is shown: frame, row, column.
QUERY = (3, 4, 9)
_TILES = SlidingWindow(window=(3, 1, 3), tile=(1, 4, 4), block=BLOCK)
# Name of the picture: pattern, density, and how many of its heads are shown.
PICTURES: dict[str, tuple[Pattern, float | None, int]] = {
    "ann": (Ann(block=BLOCK), 0.3, 1),
    "dense": (Dense(), 1.0, 1),
    "freeswim": (FreeSwim(native=(6, 10), block=BLOCK), None, 1),
    "light-forcing": (LightForcing(block=BLOCK), 0.3, 1),
    "neighborhood": (Neighborhood(window=(3, 5, 7), block=BLOCK), None, 1),
    "per-head": (PerHead((Radial(block=BLOCK), SlidingWindow(block=BLOCK)), (0, 1)), 0.4, 2),
    "pyramid": (Pyramid(block=BLOCK), 0.3, 1),
    "radial": (Radial(block=BLOCK), 0.4, 1),
    "sliding-window": (_TILES, None, 1),
    "svg": (SparseVideoGen(block=BLOCK), 0.4, 2),
    "tempcache": (TempCache(block=BLOCK), 0.4, 1),
    "topk": (TopK(block=BLOCK), 0.3, 1),
    "union": (Union((TopK(block=BLOCK), _TILES)), 0.5, 1),
}
_PIXEL, _GAP, _DOT = 4, 12, 5
_PAPER, _INK, _MARK = (255, 255, 255), (28, 63, 122), (230, 120, 20)
_OUTSIDE = (236, 238, 242)

Shares = npt.NDArray[np.float64]


def shares(plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Shares:
    """What each query takes from each key where all logits are 0, in multiples of what it takes at most from one.

    Args:
        plan: the plan.
        q: (1, tokens, h, d), in model order; what the plan chooses from.
        k: likewise.
        v: likewise.

    Returns:
        (h, tokens, tokens) in [0, 1]: 1 for a key of its own, 1/8 for one of eight in a mean, 0 for none.
    """
    layout, heads, tokens = plan.layout, q.shape[2], q.shape[1]
    one_hot = torch.eye(tokens)[None, :, None].expand(1, tokens, heads, tokens)
    values = layout.to_kernel(one_hot).contiguous()
    zeros, order, mask = torch.zeros_like(values), None, plan.mask
    keys = zeros
    if plan.select is not None:
        choice: Choice = plan.select.choose(*(layout.to_kernel(x) for x in (q, k, v)))
        chosen = plan.select.apply(choice, zeros, values)
        mask, keys, values, order = chosen.mask, chosen.k, chosen.v, chosen.order
    out, _ = attention(zeros, torch.zeros_like(keys), values, mask, backend="reference")
    if order is not None:
        out = torch.zeros_like(out).scatter(1, order[..., None].expand(out.shape), out)
    found = layout.to_model(out)[0].transpose(0, 1).double()
    return np.asarray(found / found.amax(-1, keepdim=True))


def world(heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v (1, tokens, heads, 16) of a made-up video: an object that moves right, before places that stay.

    One head looks around itself and for the object. Of two, the first looks at its own frame, the second at its place.
    """
    t, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in GRID), indexing="ij")
    thing = (((y - 4) ** 2 + (x - 2 - 2 * t) ** 2) < 6).float()
    found = []
    generator = torch.Generator().manual_seed(0)
    around = [0.7 * y, 0.35 * x, 0.9 * t, 0.35 * y + 0.2 * x]
    frame, place = [0.2 * y, 0.1 * x, 0.9 * t, 2.0 * t], [0.7 * y, 0.35 * x, 1.5 * y, 1.1 * x]
    for angles, loud in [(around, 3)] if heads == 1 else [(frame, 0), (place, 0)]:
        waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
        noise = torch.rand((*GRID, 7), generator=generator) - 0.5
        found.append(torch.cat([torch.stack([*waves, loud * thing], -1), noise], -1).flatten(0, 2))
    made = 1.5 * torch.stack(found, 1)[None]
    return made, made, torch.rand(made.shape, generator=generator)


def draw(pattern: Pattern, density: float | None, heads: int) -> Image.Image:
    """One picture, a line for each head."""
    layout = TokenLayout.of(GRID, 0, BLOCK)
    if pattern.name == "dense":
        seen = np.ones((heads, layout.tokens, layout.tokens))
    else:
        plan = pattern.plan(layout, density, Site("blocks.0.attn1.processor", 0, "self", "wan"))
        seen = shares(plan, *world(heads))
    lines = [np.concatenate([_pairs(each), _paper(_side(), 2 * _GAP), _frames(each)], 1) for each in seen]
    gap = _paper(_GAP, lines[0].shape[1])
    stacked = [part for line in lines for part in (line, gap)][:-1]
    return Image.fromarray(np.concatenate(stacked))


def _side() -> int:
    """Pixels of the square of pairs."""
    return _PIXEL * int(np.prod(GRID)) // BLOCK


def _pairs(seen: Shares) -> npt.NDArray[np.uint8]:
    """(side, side, 3): the mean over stretches of `BLOCK` tokens of the raster order, a line between frames."""
    count = seen.shape[0] // BLOCK
    means = seen.reshape(count, BLOCK, count, BLOCK).mean((1, 3))
    picture = np.kron(_shade(means), np.ones((_PIXEL, _PIXEL, 1), np.uint8))
    frame = _PIXEL * GRID[1] * GRID[2] // BLOCK
    picture[frame::frame] = picture[:, frame::frame] = _OUTSIDE
    return picture


def _frames(seen: Shares) -> npt.NDArray[np.uint8]:
    """What the query sees of each frame: two columns of frames, as high as the square of pairs."""
    row = seen[np.ravel_multi_index(QUERY, GRID)].reshape(GRID)
    found = []
    for number, frame in enumerate(row):
        picture = _shade(frame)
        if number == QUERY[0]:
            picture[QUERY[1:]] = _MARK
        large = np.kron(picture, np.ones((_DOT, _DOT, 1), np.uint8))
        found.append(np.pad(large, ((1, 1), (1, 1), (0, 0)), constant_values=200))
    high, wide = found[0].shape[:2]
    canvas = _paper(_side(), 2 * wide + _GAP)
    step = (_side() - high) // (len(found) // 2 - 1)
    for number, picture in enumerate(found):
        top, left = number // 2 * step, number % 2 * (wide + _GAP)
        canvas[top : top + high, left : left + wide] = picture
    return canvas


def _shade(values: Shares) -> npt.NDArray[np.uint8]:
    """(..., 3): paper for 0, ink for 1."""
    mixed = np.array(_PAPER) + values[..., None] * (np.array(_INK) - np.array(_PAPER))
    return np.asarray(mixed.round(), np.uint8)


def _paper(height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.full((height, width, 3), 255, np.uint8)


def stale(folder: Path = FOLDER, names: Iterable[str] = PICTURES) -> list[str]:
    """Pictures that are missing or show something else; few colours are kept, and chips may round a choice."""
    found = []
    for name in names:
        path = folder / f"{name}.png"
        old = np.asarray(Image.open(path).convert("RGB")) if path.is_file() else None
        new = np.asarray(draw(*PICTURES[name]))
        if old is None or old.shape != new.shape or (np.abs(old.astype(int) - new).max(-1) > 24).mean() > 0.01:
            found.append(name)
    return found


def main(arguments: Sequence[str]) -> int:
    """Draw all pictures, or with `--check` only say which are out of date. Returns the exit status."""
    if "--check" in arguments:
        old = stale()
        for name in old:
            print(f"{name}.png is out of date")
        return 1 if old else 0
    FOLDER.mkdir(exist_ok=True)
    for name, how in PICTURES.items():
        target = io.BytesIO()
        draw(*how).quantize(64).save(target, "png", optimize=True)
        with replacing(FOLDER / f"{name}.png") as temporary:
            temporary.write_bytes(target.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
