"""The layer swap on models whose blocks pass two streams, by position or by name, from one list to another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vidaccel.caching.layer_swap import LayerSwap, Place
from vidaccel.errors import InstallError
from vidaccel.family import Stack

STACK = Stack(("dual", "single"), ("hidden_states", "encoder_hidden_states"), 4, 0, 4, "two-streams")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states + self.linear(hidden_states), encoder_hidden_states + 1


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dual = nn.ModuleList(Block() for _ in range(2))
        self.single = nn.ModuleList(Block() for _ in range(3))

    def forward(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for block in self.dual:
            video, text = block(video, text, "temb")
        for block in self.single:
            video, text = block(encoder_hidden_states=text, temb=None, hidden_states=video)
        return video


@pytest.fixture
def model() -> TwoStreams:
    torch.manual_seed(0)
    return TwoStreams().eval().requires_grad_(False)


def test_blocks_are_visited_in_order_and_put_back(model: TwoStreams) -> None:
    video, text, seen = torch.randn(1, 3, 4), torch.randn(1, 2, 4), []

    def visit(place: Place, block: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append((place.number, place.name, place.first, place.last))
        return block(*args, **kwargs)

    swap = LayerSwap(model, STACK, visit)
    expected, lists = model(video, text), (model.dual, model.single)
    for _ in range(2):
        seen.clear()
        swap.swap()
        assert torch.equal(model(video, text), expected)
        assert swap.restore() == []
        assert (model.dual, model.single) == lists
        names = ["dual.0", "dual.1", "single.0", "single.1", "single.2"]
        assert seen == [(n, name, n == 0, n == 4) for n, name in enumerate(names)]
        assert swap.reached == 5


def test_skipped_blocks_hand_both_streams_on(model: TwoStreams) -> None:
    video, text = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    streams = []

    def visit(place: Place, block: nn.Module, args: Any, kwargs: Any) -> Any:
        streams.append(swap.video(args, kwargs))
        output = swap.output(swap.video(args, kwargs) + 1, args, kwargs)
        assert swap.video_of(output) is output[0]
        assert output[1] is text
        return output

    swap = LayerSwap(model, STACK, visit)
    swap.swap()
    assert torch.equal(model(video, text), video + 1 + 1 + 1 + 1 + 1)
    swap.restore()
    assert streams[0] is video


def test_stand_ins_are_kept_until_the_blocks_change(model: TwoStreams) -> None:
    swap = LayerSwap(model, STACK, lambda place, block, args, kwargs: block(*args, **kwargs))
    swap.swap()
    first = list(model.single)
    swap.restore()
    swap.swap()
    assert list(model.single) == first
    swap.restore()
    model.single[1] = Block()
    swap.swap()
    assert list(model.single) != first
    swap.restore()


def test_a_stand_in_shows_what_its_block_holds(model: TwoStreams) -> None:
    names, state = [name for name, _ in model.named_parameters()], model.state_dict()
    swap = LayerSwap(model, STACK, lambda place, block, args, kwargs: block(*args, **kwargs))
    swap.swap()
    assert [name for name, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == state.keys()
    assert model.get_submodule("single.2.linear") is not None
    swap.restore()


def test_somebody_elses_list_is_left_alone(model: TwoStreams) -> None:
    swap = LayerSwap(model, STACK, lambda place, block, args, kwargs: block(*args, **kwargs))
    swap.swap()
    model.dual = theirs = nn.ModuleList()
    assert swap.restore() == ["dual"]
    assert model.dual is theirs
    assert isinstance(model.single[0], Block)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InstallError, match="Linear has no blocks in dual, single"):
        LayerSwap(nn.Linear(1, 1), STACK, lambda *_: None)
