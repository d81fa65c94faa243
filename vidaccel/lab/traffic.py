"""Bytes that a model moves outside its matrix products, and memory that it holds: counted on a narrow copy of it.

The stock class is run once on a CPU, a few hundred tokens and channels small, and every operation's tensors are added
up. Both grow as tokens x channels, so that the count holds for the real size: no weights and no GPU are needed, and no
constant has to be kept up to date. Layer norms of single heads are counted in rows too: a GPU gives each row a thread
block, which for 64 channels takes longer than their bytes do. Masks over all pairs of tokens grow as tokens x tokens,
and are counted by themselves. What a pattern does to choose its blocks is counted likewise, on one head.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..family import family_of
from ..grid import VideoGrid
from ..kernels.select import put_back, taken
from ..patterns import Plan
from ..pipelines.zoo import RealModel, build, real_model

_GRID = VideoGrid(4, 8, 8)
_HEADS, _HEAD_DIM, _TEXT = 8, 16, 8
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "convolution", "linear")
_NOTHING = ("empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided", "detach", "lift_fresh")


class Traffic(NamedTuple):
    """Of one block of a list, per token and channel.

    Attributes:
        moved: bytes read and written by everything but matrix products and attention.
        around: those of them inside video attention layers: norms, RoPE, reordering.
        rows: of layer norms over single heads, there.
        masks: elements of masks over pairs of tokens that are made, per pair and sample.
        held: most bytes of activations at a time, over the whole call.
    """

    moved: dict[str, float]
    around: dict[str, float]
    rows: dict[str, float]
    masks: dict[str, float]
    held: float


class Counter(TorchDispatchMode):
    """Adds up the bytes of operations, and follows how much of what they made is alive.

    Args:
        given: tensors that are there anyhow, weights and inputs.

    Attributes:
        inside: a video attention layer runs.
        moved: bytes read and written so far, matrix products, attention and `masks` left out.
        calls: operations that did so.
        around: those of them inside.
        rows: of layer norms inside.
        masks: elements of masks over all pairs of tokens.
        most: most bytes alive at a time.
    """

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.inside = False
        self.moved = 0
        self.calls = 0
        self.around = 0
        self.rows = 0
        self.masks = 0
        self.most = 0
        self._alive: dict[int, int] = {}
        self._held = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        result = func(*args, **(kwargs or {}))
        made = [x for x in _flat(result) if isinstance(x, torch.Tensor)]
        for tensor in made:
            self._follow(tensor)
        name = func.overloadpacket.__name__
        if any(_is_mask(x) for x in made):
            self.masks += 0 if func.is_view else sum(x.numel() for x in made)
        elif not (func.is_view or name in _PRODUCTS or name in _NOTHING or "scaled_dot_product" in name):
            given = [x for x in _flat([args, kwargs or {}]) if isinstance(x, torch.Tensor)]
            moved = sum(x.numel() * x.element_size() for x in (*given, *made))
            self.moved += moved
            self.calls += 1
            if self.inside:
                self.around += moved
                self.rows += args[0].numel() // math.prod(args[1]) if name == "native_layer_norm" else 0
        return result

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._given:
            return
        if not self._alive.get(place):
            self._held += size
        self._alive[place] = self._alive.get(place, 0) + 1
        self.most = max(self.most, self._held)
        weakref.finalize(tensor, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._alive[place] -= 1
        if not self._alive[place]:
            self._held -= size


def _is_mask(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bool and tensor.ndim > 1 and tensor.shape[-1] == tensor.shape[-2]


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [y for x in value for y in _flat(x)]
    return _flat(list(value.values())) if isinstance(value, dict) else [value]


@lru_cache(maxsize=16)
def traffic(name: str) -> Traffic:
    """The traffic of a released model, in bf16 and not compiled."""
    model = narrow(real_model(name))
    base = dict.fromkeys(model.layers, 1)
    start = _count(model, base)
    tokens = _GRID.tokens + model.joint_text
    elements = tokens * model.width * model.batch
    more = {each: _count(model, {**base, each: 2}) for each in model.layers}
    # As many heads of the real width have fewer rows to a channel.
    narrower = _HEAD_DIM / real_model(name).head_dim
    return Traffic(
        {each: (count.moved - start.moved) / elements for each, count in more.items()},
        {each: (count.around - start.around) / elements for each, count in more.items()},
        {each: (count.rows - start.rows) / elements * narrower for each, count in more.items()},
        {each: (count.masks - start.masks) / (tokens**2 * model.batch) for each, count in more.items()},
        start.most / elements,
    )


def narrow(model: RealModel) -> RealModel:
    """The same architecture with few channels and little text."""
    width = _HEADS * _HEAD_DIM
    config: dict[str, Any] = {"num_attention_heads": _HEADS, "attention_head_dim": _HEAD_DIM}
    if "ffn_dim" in model.config:
        config["ffn_dim"] = round(model.ffn / model.width * width)
    if model.transformer.startswith("HunyuanVideo"):
        config["rope_axes_dim"] = (4, 6, 6)
    if model.transformer.startswith("CogVideoX"):  # Its first version adds positions of one size to its tokens.
        frames, rows, columns = (tokens * side for tokens, side in zip(_GRID, model.patch, strict=True))
        config |= {"sample_height": rows, "sample_width": columns, "sample_frames": 4 * (frames - 1) + 1}
        config["max_text_seq_length"] = _TEXT
    # What HunyuanVideo 1.5 has beside its prompt falls away when its inputs are trimmed.
    text = model.text - model.valid + _TEXT
    return replace(model, config={**model.config, **config}, text=text, valid=_TEXT)


def _count(model: RealModel, layers: dict[str, int]) -> Counter:
    transformer = build(model.with_layers(layers), "cpu", torch.bfloat16)
    inputs = model.inputs(_GRID, "cpu", torch.bfloat16, trimmed=True)
    there = [*transformer.parameters(), *transformer.buffers(), *_flat(inputs)]
    counter = Counter(x for x in there if isinstance(x, torch.Tensor))
    for site in family_of(transformer).sites(transformer):
        attn = transformer.get_submodule(site.name.removesuffix(".processor"))
        attn.register_forward_pre_hook(lambda *_: setattr(counter, "inside", True))
        attn.register_forward_hook(lambda *_: setattr(counter, "inside", False))
    with torch.no_grad(), counter:
        transformer(**inputs)
    return counter


def selection(plan: Plan, model: RealModel) -> tuple[float, int]:
    """Bytes that one layer moves in one call to choose its blocks, and to sort what attends, and its operations.

    Both are 0 where a mask says it all.

    One head of the real size goes through what `wrapping.attend` does around its kernel on a GPU; nothing is computed.
    """
    if plan.select is None:
        return 0.0, 0
    shape = (model.batch, plan.layout.slots, 1, model.head_dim)
    # Tensors without memory, which take the way of tensors on a GPU.
    select = plan.select.to("meta")
    inputs = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    with torch.no_grad(), Counter(inputs) as counter:
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in inputs)
        order = select.apply(select.choose(query, key, value), key, value).order
        if order is not None:
            put_back(taken(query, order), order)
    return float(counter.moved * model.heads), counter.calls


def mask_bytes(model: RealModel, grid: VideoGrid) -> float:
    """What the stock model holds for its masks: HunyuanVideo 1.5 makes three of (tokens, tokens) in every layer."""
    return 3.0 * math.prod((grid.tokens + model.text,) * 2) if model.padded else 0.0
