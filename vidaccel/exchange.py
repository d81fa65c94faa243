"""Tokens of one video on several ranks: each has its own tokens, and in attention its own heads of all tokens.

Idea: everything but attention works token by token, so a rank keeps a part of the tokens; attention works head by head,
    so before it ranks swap tokens for heads, and after it heads for tokens (Ulysses). Between the two, a rank holds
    whole sequences, and any mask, kernel or choice of blocks runs as it does on one GPU.
Math, for n ranks, l tokens, h heads: (b, l / n, h, d) -> (b, l, h / n, d) -> (b, l / n, h, d). Uneven parts are those
    of `torch.tensor_split`; heads that n does not divide are filled up with empty ones, which are never attended with.
Cost: an all-to-all each for q, k, v and the output; a rank sends 4 b l h d (n - 1) / n^2 elements a layer. v travels
    while k is made, k while q is; what leaves is written so by norm and RoPE, what arrives is gathered once. Every rank
    has all rows of its heads, those of text too, so work is even.
Source: DeepSpeed Ulysses, arXiv 2309.14509; the split of tokens is that of diffusers' context parallelism.
Limits: as many heads as leave no rank without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from .grid import TokenLayout, VideoGrid
from .kernels.elementwise import take
from .ranks import HeadPart, Ranks, all_to_all, wait


@dataclass(frozen=True, eq=False)
class Exchange:
    """What ranks swap before and after the attention of one grid. Build it with `Exchange.of`.

    Attributes:
        ranks: who.
        layout: this rank's own tokens, [video | text] without holes.
        whole: all tokens in model order, as one stream.
        text: tokens of all ranks that are text.
        sizes: tokens of each rank.
        start: (tokens,) int64 in model order, where the part of the rank that holds the token starts.
        size: (tokens,) int64, how long that part is.
        place: (tokens,) int64, where in it the token is.
        sent: (tokens,) int64, the model-order index of each token, one rank's after the other's.
    """

    ranks: Ranks
    layout: TokenLayout
    whole: TokenLayout
    text: int
    sizes: tuple[int, ...]
    start: torch.Tensor
    size: torch.Tensor
    place: torch.Tensor
    sent: torch.Tensor

    @classmethod
    def of(
        cls,
        ranks: Ranks,
        video: int,
        text: int = 0,
        slots: int = 0,
        *,
        text_first: bool = False,
        device: torch.device | str = "cpu",
    ) -> Exchange:
        """Plan the swaps.

        Args:
            ranks: who.
            video: tokens of the grid.
            text: text tokens that attend with it.
            slots: text tokens that the model holds and splits, of which the first `text` attend; 0 for as many.
            text_first: model order is [text | video].
            device: of the hidden states.

        Raises:
            InstallError: parts that diffusers does not make.
        """
        videos = ranks.parts(video, "video tokens")
        held = ranks.parts(slots or text, "text tokens")
        # Of the text slots only the first attend, so the last ranks may hold none of them.
        texts = [max(0, min(many, text - before)) for many, before in zip(held, _starts(held), strict=True)]
        sizes = tuple(a + b for a, b in zip(videos, texts, strict=True))
        video_at, text_at = (text, 0) if text_first else (0, video)
        sent = torch.cat(
            [
                torch.cat([torch.arange(many) + at + before for many, at, before in pair])
                for pair in zip(
                    zip(videos, [video_at] * ranks.count, _starts(videos), strict=True),
                    zip(texts, [text_at] * ranks.count, _starts(texts), strict=True),
                    strict=True,
                )
            ]
        )
        length = torch.tensor(sizes)
        owner = torch.arange(ranks.count).repeat_interleave(length)
        starts = torch.tensor(_starts(sizes))
        back = torch.empty_like(sent)
        back[sent] = torch.arange(len(sent))
        start, size = starts[owner][back], length[owner][back]
        own = _flat_layout(videos[ranks.rank], texts[ranks.rank], text_first)
        tables = (start, size, back - start, sent)
        whole = _flat_layout(video + text, 0, False)
        return cls(ranks, own.to(device), whole.to(device), text, sizes, *(table.to(device) for table in tables))

    def arrive(self, *tensors: torch.Tensor, order: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Own tokens, all heads -> all tokens, own heads.

        Args:
            tensors: (b, own tokens, h, d), [video | text].
            order: (slots,) int64, model-order index of the token in each slot of the result; None for model order.

        Returns:
            (b, slots, own h, d) each.
        """
        heads = self.ranks.heads(tensors[0].shape[2])
        return self.receive([self.send(self.packed(x)) for x in tensors], heads, order)

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        """(b, own tokens, h, d) -> (ranks, b, own tokens, heads of a rank, d): what goes to each rank, side by side."""
        n, part = self.ranks.count, self.ranks.heads(x.shape[2])
        x = torch.nn.functional.pad(x, (0, 0, 0, n * part.each - part.total)) if part.total % n else x
        packed: torch.Tensor = x.unflatten(2, (n, part.each)).movedim(2, 0).contiguous()
        return packed

    def send(self, sent: torch.Tensor) -> Sent:
        """Begin to swap what `packed` gave: what is computed until `receive` runs beside it.

        Args:
            sent: (ranks, b, own tokens, heads of a rank, d), contiguous; equal heads from every rank.
        """
        n, b, length, each, d = sent.shape
        row = b * each * d
        moving = all_to_all(sent.flatten(), [size * row for size in self.sizes], [length * row] * n, self.ranks)
        return Sent(moving, b, each, d)

    def receive(
        self, sent: Sequence[Sent], heads: HeadPart, order: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Wait for each, and put the tokens of all ranks in order while the next is on its way.

        Args:
            sent: what `send` gave.
            heads: those of this rank.
            order: as in `arrive`.

        Returns:
            (b, slots, own h, d) each.
        """
        # A rank sends all its tokens of each sample; one gather puts those of all ranks in order.
        tables = (self.start, self.size, self.place)
        start, size, place = tables if order is None else (table.index_select(0, order) for table in tables)
        b = sent[0].batch
        row = (b * start + place + torch.arange(b, device=place.device)[:, None] * size).flatten()
        found = []
        for each in sent:
            x = take(wait(each.moving).view(1, -1, each.heads, each.width), row)
            found.append(x.view(b, -1, each.heads, each.width)[:, :, : heads.end - heads.first])
        return tuple(found)

    def leave(self, out: torch.Tensor, heads: int, slot_of: torch.Tensor | None = None) -> torch.Tensor:
        """All tokens, own heads -> own tokens, all heads.

        Args:
            out: (b, slots, own h, d), what attention gave.
            heads: of the layer.
            slot_of: (tokens,) int64, the slot of each model-order token; None for model order.

        Returns:
            (b, own tokens, h, d), in model order.
        """
        (b, slots, own, d), n = out.shape, self.ranks.count
        each, mine = self.ranks.heads(heads).each, self.sizes[self.ranks.rank]
        if own < each:
            out = torch.nn.functional.pad(out, (0, 0, 0, each - own))
        at = self.sent if slot_of is None else slot_of.index_select(0, self.sent)
        sample = torch.arange(b, device=out.device)[:, None]
        rows = torch.cat([(sample * slots + part).flatten() for part in at.split(self.sizes)])
        row = b * each * d
        sent = take(out.reshape(1, b * slots, each, d), rows)
        moving = all_to_all(sent.flatten(), [mine * row] * n, [size * row for size in self.sizes], self.ranks)
        # Each rank's heads of a token come from that rank; here they stand side by side again.
        token = (sample * mine + self.layout.slot_of).flatten()
        rows = (token[:, None] + torch.arange(n, device=out.device) * (b * mine)).flatten()
        found = take(wait(moving).view(1, n * b * mine, each, d), rows)
        return found.view(b, mine, n * each, d)[:, :, :heads]


class Sent(NamedTuple):
    """One tensor on its way.

    Attributes:
        moving: what `all_to_all` gave, flat.
        batch, heads, width: samples, heads of a rank and channels of a head.
    """

    moving: torch.Tensor
    batch: int
    heads: int
    width: int


def _starts(sizes: Any) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


def _flat_layout(video: int, text: int, text_first: bool) -> TokenLayout:
    """Blocks of one token, so that no slot is empty."""
    tokens = video + text
    order = (torch.arange(tokens) + (text if text_first else 0)) % tokens
    slot_of = order.argsort()
    ones = torch.ones(tokens, dtype=torch.int32)
    identity = not (text_first and text)
    return TokenLayout(VideoGrid(1, 1, video), text, 1, None, order, ones, ones, slot_of, text_first, identity)
