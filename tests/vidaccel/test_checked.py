"""Lists from elsewhere: sound ones pass as they are, and each kind of fault is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from vidaccel.blocks import BlockMask, Window
from vidaccel.checked import checked
from vidaccel.errors import MaskError
from vidaccel.grid import TokenLayout


def lists() -> BlockMask:
    """Two heads of three rows; the second row of each keeps nothing, the third one full and one partial block."""
    layout = TokenLayout.of((3, 4, 4), block=16)
    keep = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool).expand(2, 3, 3)
    partial = torch.zeros_like(keep)
    partial[:, 2, 0] = True
    position = layout.positions
    return BlockMask.of(
        keep, layout, partial=partial, window=Window.of(position - 1, position + 2, position, layout.grid)
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sound_lists_pass(device: str) -> None:
    mask = lists().to(device)
    assert checked(mask) is mask
    # What lies past the last row means nothing.
    longer = dataclasses.replace(mask, idx=torch.cat([mask.idx, mask.idx.new_full((5,), -7)]))
    assert checked(longer) is longer
    nothing = BlockMask.of(torch.zeros(3, 3, dtype=torch.bool), mask.layout.to("cpu"))
    assert checked(nothing) is nothing
    own = dataclasses.replace(mask, k_len=mask.lengths.new_full((2, 9), 16), idx=mask.idx + 6)
    assert checked(own) is own


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"idx": lambda x: x.long()}, r"idx is torch\.int64 on cpu; make it torch\.int32"),
    "device": ({"n_full": lambda x: x.to("meta")}, r"n_full is torch\.int32 on meta"),
    "float lengths": ({"k_len": lambda x: torch.full((3,), 16.0)}, r"k_len is torch\.float32"),
    "long lengths": ({"k_len": lambda x: torch.full((3,), 17, dtype=torch.int32)}, "k_len .* from 17 to 17"),
    "negative lengths": ({"k_len": lambda x: torch.full((3,), -1, dtype=torch.int32)}, "of the 16 slots"),
    "float window": ({"window": lambda x: x._replace(pos=x.pos.float())}, r"pos is torch\.float32"),
    "short window": ({"window": lambda x: x._replace(lo=x.lo[1:])}, r"lo \(47,\) was given for 48 slots"),
    "rows": ({"n_full": lambda x: x[:4]}, "4 rows and 7 starts"),
    "starts": ({"ptr": lambda x: x[:-1]}, "6 rows and 6 starts"),
    "begin": ({"ptr": lambda x: x + 1}, "ptr goes from 1 to 9, and idx has 8 places"),
    "falls": ({"ptr": lambda x: x - torch.tensor([0, 0, 1, 0, 0, 0, 0], dtype=torch.int32)}, "never falls"),
    "too full": ({"n_full": lambda x: x + 1}, "n_full is negative somewhere"),
    "no window": ({"window": lambda x: None}, "there is no window"),
    "range": (
        {"idx": lambda x: x + 1},
        r"query block 0 in head 0 is \[1, 3\]: a block that does not exist; there are 3",
    ),
    "negative": ({"idx": lambda x: x - 1}, "a block that does not exist"),
    "order": ({"idx": lambda x: x[[0, 1, 2, 3, 5, 4, 6, 7]]}, r"in head 1 is \[2, 0\]: blocks out of order"),
    "twice": ({"idx": lambda x: x[[0, 0, 2, 3, 4, 5, 6, 7]]}, r"is \[0, 0\]: blocks out of order"),
    "both": ({"idx": lambda x: x[[0, 1, 2, 2, 4, 5, 6, 7]]}, r"query block 2 in head 0 is \[1, 1\]: a block both"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str) -> None:
    changes, words = FAULTS[fault]
    mask = lists()
    bad = dataclasses.replace(mask, **{name: change(getattr(mask, name)) for name, change in changes.items()})
    with pytest.raises(MaskError, match=words):
        checked(bad)
