"""Adapters of other projects: they run on a real pipeline, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vidaccel.errors import BackendError, UsageError
from vidaccel.grid import VideoGrid
from vidaccel.lab.peers import PEERS, named
from vidaccel.lab.peers.fastvideo import tiled
from vidaccel.lab.rivals import OverVideo

GRID = VideoGrid(7, 8, 8)


def blocks_run(pipe: Any, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Latents, and how often the last layer ran."""
    ran: list[int] = []
    hook = pipe.transformer.blocks[-1].attn1.to_q.register_forward_hook(lambda *_: ran.append(1))
    latents = run()
    hook.remove()
    return latents, len(ran)


@pytest.mark.parametrize(
    "name",
    ["diffusers taylorseer:interval=2", "diffusers broadcast:interval=2", "cache-dit:threshold=10+first=1+warmup=1"],
)
def test_caches_skip_layers_and_are_gone_afterwards(
    name: str, make_wan: Callable[..., Any], render: Callable[..., torch.Tensor]
) -> None:
    (peer,), pipe = named(name), make_wan()
    plain, whole = blocks_run(pipe, lambda: render(pipe, steps=8))
    with peer.around(pipe, GRID):
        cached, some = blocks_run(pipe, lambda: render(pipe, steps=8))
    assert some < whole
    assert cached.isfinite().all()
    assert not torch.equal(cached, plain)
    again, all_of_them = blocks_run(pipe, lambda: render(pipe, steps=8))
    assert all_of_them == whole
    assert torch.equal(again, plain)


def test_attention_of_others_sees_the_video_alone(wan: Any, render: Callable[..., torch.Tensor]) -> None:
    """Dense attention put in the way changes nothing; cross-attention to the text passes it by."""
    seen: list[tuple[int, int]] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        seen.append((query.shape[2], key.shape[2]))
        weight = (query @ key.mT * (scale or query.shape[-1] ** -0.5)).softmax(-1)
        return weight @ value

    plain = render(wan, steps=2)
    with OverVideo(attend, "somebody", GRID.tokens):
        other = render(wan, steps=2)
    assert set(seen) == {(GRID.tokens, GRID.tokens)}
    assert len(seen) == 2 * 2 * len(wan.transformer.blocks)
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)


def test_tokens_are_sorted_into_tiles_and_back() -> None:
    grid, tile = VideoGrid(4, 4, 8), (2, 2, 4)
    place = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).view(1, 1, -1, 3).double()
    given: list[torch.Tensor] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        given.append(query)
        return value

    out = tiled(attend, grid, tile)(place, place, place, None)
    assert torch.equal(out, place), "everything is where it was"
    for block in given[0][0, 0].unflatten(0, (-1, 16)):
        assert (block.amax(0) - block.amin(0)).tolist() == [1, 1, 3]
    with pytest.raises(BackendError, match="text"):
        tiled(attend, VideoGrid(4, 4, 4), tile)(place, place, place, None)
    with pytest.raises(BackendError, match="scale"):
        tiled(attend, grid, tile)(place, place, place, 0.5)


def test_natten_is_dense_where_its_window_is_the_video(wan: Any, render: Callable[..., torch.Tensor]) -> None:
    pytest.importorskip("natten")
    plain = render(wan, steps=2)
    (whole,), (some,) = named("natten:density=1"), named("natten:density=0.3")
    with whole.around(None, GRID):
        torch.testing.assert_close(render(wan, steps=2), plain, rtol=1e-3, atol=1e-3)
    with some.around(None, GRID):
        assert not torch.allclose(render(wan, steps=2), plain, atol=1e-3)


def test_peers_are_named_with_settings() -> None:
    first, second = named("cache-dit:threshold=0.2+first=4,fastvideo-sta")
    assert dict(first.settings) == {"threshold": 0.2, "first": 4, "last": 0, "warmup": 8}
    assert str(second) == "fastvideo-sta (window 3)"
    assert [peer.name for peer in named("installed")] == [peer.name for peer in PEERS.values() if peer.is_here]
    assert "diffusers first-block" in {peer.name for peer in named("installed")}


@pytest.mark.parametrize(
    ("text", "words"),
    [("nosuch", "cache-dit"), ("cache-dit:speed=1", "no setting 'speed'"), ("cache-dit:fast", "key=value")],
)
def test_what_is_no_peer_says_so(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        named(text)
