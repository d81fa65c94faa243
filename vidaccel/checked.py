"""Whether the lists of a `BlockMask` that were made elsewhere can be given to a kernel.

Kernels read lists as they are: a block that does not exist is somebody else's memory. To look at what lists hold is to
wait for the device, so it is done once, where a mask comes from outside. A call of `attention` never does it, and looks
at shapes, dtypes and devices. Masks of `BlockMask.of` and of this package's patterns are sound as they are made.
"""

from __future__ import annotations

import torch

from .blocks import BlockMask
from .errors import MaskError


def checked(mask: BlockMask) -> BlockMask:
    """The mask itself, if every row of it is sound. Waits for the device.

    Raises:
        MaskError: another dtype or device than it takes, lengths that are none, a window of other sizes, starts that do
            not fit, a block out of range, out of order or twice in a row, partial blocks without a window.
    """
    layout, device = mask.layout, mask.layout.device
    lists = {"ptr": mask.ptr, "idx": mask.idx, "n_full": mask.n_full, "q_len": layout.q_len, "k_len": mask.lengths}
    if mask.window is not None:
        lists |= mask.window.words
    for name, given in lists.items():
        if given.dtype != torch.int32 or given.device != device:
            raise MaskError(
                f"{name} is {given.dtype} on {given.device}; make it torch.int32 on {device}, as the layout is"
            )
    for name, length in (("q_len", layout.q_len), ("k_len", mask.lengths)):
        if bool(((length < 0) | (length > layout.block)).any()):
            raise MaskError(
                f"{name} goes from {int(length.min())} to {int(length.max())}; it says how many of the {layout.block} "
                "slots of each block are tokens"
            )
    for name in ("lo", "hi"):
        if name in lists and lists[name].shape != (layout.slots,):
            raise MaskError(
                f"a window's {name} {tuple(lists[name].shape)} was given for {layout.slots} slots; build it from "
                "layout.positions, in kernel order"
            )
    rows, blocks = mask.n_full.shape[0], mask.lengths.shape[-1]
    if not rows or rows % layout.blocks or mask.ptr.shape != (rows + 1,):
        raise MaskError(
            f"{rows} rows and {mask.ptr.shape[0]} starts were given; a layout of {layout.blocks} blocks needs as many "
            "rows a head, and one start more than rows"
        )
    count, end = mask.ptr.diff(), int(mask.ptr[-1])
    if int(mask.ptr[0]) or bool((count < 0).any()) or end > mask.idx.shape[0]:
        raise MaskError(
            f"ptr goes from {int(mask.ptr[0])} to {end}, and idx has {mask.idx.shape[0]} places; "
            "ptr begins with 0, never falls, and ends within idx"
        )
    if bool(((mask.n_full < 0) | (mask.n_full > count)).any()):
        raise MaskError(
            "n_full is negative somewhere, or more than its row holds; it counts the full blocks of each row"
        )
    if mask.window is None and bool((mask.n_full < count).any()):
        raise MaskError("some rows have partial blocks, and there is no window; give `window`, or count them as full")
    row = torch.repeat_interleave(count)
    place = torch.arange(end, device=device) - mask.ptr[row]
    idx = mask.idx[:end].long()
    _refuse((idx < 0) | (idx >= blocks), row, mask, f"a block that does not exist; there are {blocks}")
    # Full blocks in ascending order, then partial ones in ascending order, is one ascending order of these numbers.
    number = 2 * row + (place >= mask.n_full[row])
    falls = (number * blocks + idx).diff() <= 0
    _refuse(
        torch.nn.functional.pad(falls, (1, 0)), row, mask, "blocks out of order; full ones ascend, then partial ones"
    )
    both = (row * blocks + idx).sort()
    twice = torch.zeros(end, dtype=torch.bool, device=device)
    twice[both.indices[1:]] = both.values.diff() == 0
    _refuse(twice, row, mask, "a block both as full and as partial; name it once")
    return mask


def _refuse(bad: torch.Tensor, row: torch.Tensor, mask: BlockMask, what: str) -> None:
    if bool(bad.any()):
        head, query = divmod(int(row[bad.nonzero()[0, 0]]), mask.layout.blocks)
        start, end = (int(x) for x in mask.ptr[head * mask.layout.blocks + query :][:2])
        raise MaskError(f"the row of query block {query} in head {head} is {mask.idx[start:end].tolist()[:12]}: {what}")
