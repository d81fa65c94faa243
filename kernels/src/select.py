"""Choosing key blocks from q and k, at every call: block means, their scores, and the best of each row as a mask.

Idea: the mean of a block's keys tells whether its queries will care for it.
Math: score[i, j] = <mean q of block i, mean k of block j>; a row keeps what must be kept and then its best, `kept` in
    all. So every row is as long as the next, and nothing has to be read back to know how long.
Cost: one pass over q and k, 2 d blocks^2 flops a head, and the scores: 63 MB for 40 heads of 75,600 tokens.
    On CUDA the kernels of `compact.py` do all but the product, without sorting; what stands here defines them.
Source: the block top-k of MoBA (arXiv 2502.13189) and VSA (arXiv 2505.13389).
Limits: one sample at a time, so batches come folded into heads. All shapes are fixed, so that nothing waits for a
    device and torch.compile traces it whole. Of equal scores the first in its row wins.
"""

from __future__ import annotations

import torch

from ..blocks import BlockMask
from ..grid import TokenLayout
from . import compact, fused, hashing, pool


def block_means(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Means over the tokens of each video block.

    Args:
        x: (1, slots, h, d) in kernel order. Holes may hold anything.
        layout: that order.

    Returns:
        (h, video blocks, d) fp32.
    """
    blocks, block = layout.video_blocks, layout.block
    if compact.can_run(x, blocks):
        means: torch.Tensor = compact.block_means(x, layout.q_len[:blocks], block)
        return means
    # The last block may end with its tokens, not with its slots.
    whole = min(x.shape[1] // block, blocks)
    # Not `layout.filled`: what is cached on first use cannot be asked for inside a compiled graph.
    token = (torch.arange(block, device=x.device) < layout.q_len[:whole, None])[..., None, None]
    sums = torch.where(token, x[0, : whole * block].unflatten(0, (whole, block)), 0).sum(1, dtype=torch.float32)
    if whole < blocks:
        sums = torch.cat([sums, x[0, whole * block :].sum(0, dtype=torch.float32, keepdim=True)])
    return (sums / layout.q_len[:blocks, None, None]).transpose(0, 1)


def with_means(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """What was given, the means of its neighbours and an empty block.

    Args:
        x: (1, slots, h, d) in kernel order. Holes may hold anything.
        layout: that order, in blocks of a multiple of 16.

    Returns:
        (1, slots, h, d) of whole blocks, zeros in their holes; then for level 2, 4 and 8 block / level means for each
        video block, and for as many more as fill groups of 8, whose means are 0; then an empty block. Sums and their
        division by the tokens of each mean are fp32.
    """
    length, block, video = layout.q_len, layout.block, layout.video_blocks
    if fused.can_run(x):
        made: torch.Tensor = pool.means_behind(x, length, block, video)
        return made
    slots, start, tiles = x.shape[1], layout.blocks * block, 8 * -(-video // 8)
    out = pool.empty(x, length, block, video)
    filled = torch.arange(block, device=x.device) < length[:, None]
    out[0, :slots] = x[0]
    out[0, :start].masked_fill_(~filled.flatten()[:, None, None], 0)
    sums, count = out[0, : video * block], filled[:video].float()
    for level in pool.LEVELS:
        sums = sums.unflatten(0, (-1, 2)).sum(1, dtype=torch.float32)
        count = count.unflatten(1, (-1, 2)).sum(2)
        out[0, start : start + len(sums)] = sums / count.flatten().clamp(min=1)[:, None, None]
        out[0, start + len(sums) : start + tiles * block // level] = 0
        start += tiles * block // level
    out[0, start:] = 0
    return out


def block_scores(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """(h, video blocks, video blocks) fp32: products of the means of query and key blocks; q, k (1, slots, h, d)."""
    # Under autocast torch would give them in 16 bits.
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        return block_means(q, layout) @ block_means(k, layout).transpose(1, 2)


def best_blocks(scores: torch.Tensor, forced: torch.Tensor, kept: int, layout: TokenLayout) -> BlockMask:
    """A mask of the best key blocks of each row.

    Text sees all and is seen by all.

    Args:
        scores: (h, video blocks, video blocks); -inf is chosen last.
        forced: (video blocks, video blocks) bool, kept whatever their score; at most `kept` in a row.
        kept: video blocks in a row.
        layout: the order of the blocks.
    """
    if compact.can_run(scores, layout.video_blocks):
        return compact.best_blocks(scores, forced, kept, layout)
    ranked = scores.masked_fill(forced, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return rows_of(ranked[..., :kept].sort(dim=-1).values, layout)


def likeliest_blocks(scores: torch.Tensor, forced: torch.Tensor, kept: int, layout: TokenLayout) -> BlockMask:
    """A mask of the blocks with the highest probabilities of all rows and heads: as many as rows of `kept` would have.

    One threshold for all is top-p turned round: it cuts every row where the next block adds as little. Only how the
    blocks are shared out depends on q and k, not how many there are, so that nothing has to be read back.

    Args:
        scores: (h, video blocks, video blocks), logits of blocks.
        forced: (video blocks, video blocks) bool, kept whatever their score; at most `kept` in a row.
        kept: video blocks in a row, on average.
        layout: the order of the blocks.
    """
    heads, video, _ = scores.shape
    blocks, device = layout.blocks, scores.device
    likely = scores.softmax(-1)
    if compact.can_run(scores, video) and scores.numel() <= compact.MOST_RANKED:
        return compact.likeliest_blocks(likely, forced, kept, layout)
    ranked = likely.masked_fill(forced, torch.inf).flatten().sort(descending=True, stable=True).indices
    chosen = ranked[: kept * video * heads].sort().values
    begin = torch.searchsorted(chosen, torch.arange(heads * video + 1, device=device) * video)
    count = begin.diff().view(heads, video)
    text = torch.arange(video, blocks, device=device)
    ptr, n_full = compact.bounds(count, layout)
    first = ptr[:-1].long().view(heads, blocks)
    owner, every = chosen // video, torch.arange(blocks, device=device)
    places = [
        first[:, :video].flatten()[owner] + torch.arange(len(chosen), device=device) - begin[owner],
        (first[:, :video] + count)[..., None] + every[: len(text)],
        first[:, video:, None] + every,
    ]
    found = [chosen % video, text.expand(heads, video, -1), every.expand(heads, len(text), -1)]
    place, block = (torch.cat([part.flatten() for part in parts]) for parts in (places, found))
    return BlockMask(ptr, torch.zeros_like(block).scatter(0, place, block).int(), n_full, layout)


def rows_of(chosen: torch.Tensor, layout: TokenLayout) -> BlockMask:
    """The mask of equally long rows of whole blocks.

    Args:
        chosen: (h, video blocks, kept) int64, ascending video blocks.
        layout: the order of the blocks.
    """
    heads, video, kept = chosen.shape
    blocks, device = layout.blocks, chosen.device
    text = torch.arange(video, blocks, device=device)
    seen = torch.cat([chosen, text.expand(heads, video, -1)], -1).flatten(1)
    every = torch.arange(blocks, device=device).repeat(blocks - video).expand(heads, -1)
    idx = torch.cat([seen, every], 1)
    ptr, n_full = compact.bounds(torch.full((heads, video), kept, device=device), layout)
    return BlockMask(ptr, idx.flatten().int(), n_full, layout)


def sign_codes(x: torch.Tensor, mean: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """On which sides of planes tokens lie, as places in Gray order.

    Args:
        x: (1, tokens, h, d).
        mean: (h, d) fp32, what the planes go through.
        planes: (d or more, bits) fp32, their normals; up to 8 bits.

    Returns:
        (h, tokens) int64: bit n of the Gray code of a place says that the token lies on the side of normal n.
    """
    if fused.can_run(x):
        found: torch.Tensor = hashing.sign_codes(x, mean, planes)
        return found
    # Under autocast torch would multiply in 16 bits.
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        sides = (x[0].float() - mean) @ planes[: x.shape[-1]] > 0
    code: torch.Tensor = (sides.long() << torch.arange(sides.shape[-1], device=x.device)).sum(-1)
    for shift in (1, 2, 4):
        code = code ^ (code >> shift)
    return code.T


def in_order(codes: torch.Tensor, kinds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens by code; of equal codes the first comes first.

    Args:
        codes: (h, tokens) int64, each at least 0 and less than `kinds`.
        kinds: how many codes there are.

    Returns:
        (h, tokens) int64, the token of each place, and (h, kinds) int32, the first place of each code.
    """
    if fused.on_gpu(codes):
        order, start = hashing.in_order(codes, kinds)
        return order, start
    many = codes.new_zeros(codes.shape[0], kinds, dtype=torch.int32)
    many = many.scatter_add(1, codes, torch.ones_like(codes, dtype=torch.int32))
    return codes.argsort(dim=1, stable=True), many.cumsum(1, dtype=torch.int32) - many


def taken(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Tokens of each head in an order of its own.

    Args:
        x: (1, slots, h, d).
        order: (1, places, h) int64, the slot whose token goes to each place.

    Returns:
        (1, places, h, d).
    """
    if fused.can_run(x):
        found: torch.Tensor = hashing.moved(x, order, back=False)
        return found
    return x.gather(1, order[..., None].expand(*order.shape, x.shape[3]))


def put_back(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """What `taken` took from every slot, (1, slots, h, d), in its slots again."""
    if fused.can_run(x):
        found: torch.Tensor = hashing.moved(x, order, back=True)
        return found
    return torch.empty_like(x).scatter(1, order[..., None].expand(x.shape), x)
