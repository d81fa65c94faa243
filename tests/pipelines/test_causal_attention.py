"""The stock Wan transformer with a memory: against one forward of the whole clip under a block-causal mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional

import vidaccel
from vidaccel.errors import InstallError, StreamError
from vidaccel.pipelines.causal_attention import CausalTransformer
from vidaccel.pipelines.rotary import rotate_pairs
from vidaccel.streaming import Rollout

FRAMES, HEIGHT, WIDTH = 6, 4, 6
GRID = (HEIGHT // 2, WIDTH // 2)


def tiny_transformer(seed: int = 0, **config: Any) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "num_layers": 3, "cross_attn_norm": True,
        "rope_max_seq_len": 64,
    }  # fmt: skip
    return WanTransformer3DModel(**settings | config).double().eval()


@pytest.fixture(scope="module")
def transformer() -> Any:
    return tiny_transformer()


def clip(frames: int = FRAMES, batch: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and text embeddings."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, frames, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    return latents, torch.randn(batch, 7, 16, generator=generator, dtype=torch.float64)


class MaskedProcessor:
    """Stock attention under a mask; the oracle."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    def __call__(self, attn: Any, x: Any, encoder: Any = None, mask: Any = None, rotary_emb: Any = None) -> Any:
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (q, k, v))
        q, k = rotate_pairs(q, *rotary_emb), rotate_pairs(k, *rotary_emb)
        out = functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), attn_mask=self.mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@contextmanager
def under_mask(transformer: Any, mask: torch.Tensor) -> Iterator[None]:
    """Every query token (rows) attends to the key tokens (columns) that the mask keeps."""
    stock = [block.attn1.processor for block in transformer.blocks]
    for block in transformer.blocks:
        block.attn1.set_processor(MaskedProcessor(mask))
    try:
        yield
    finally:
        for block, processor in zip(transformer.blocks, stock, strict=True):
            block.attn1.set_processor(processor)


def causal_mask(frames: int, chunk: int, window: int | None = None, sink: int = 0) -> torch.Tensor:
    """Block-causal over tokens; with a window, a chunk sees the first frames and the last ones up to its own end."""
    frame = torch.arange(frames).repeat_interleave(GRID[0] * GRID[1])
    end = (frame // chunk + 1) * chunk
    keep = frame[None] < end[:, None]
    if window is not None:
        keep &= (frame[None] >= end[:, None] - (window - sink)) | (frame[None] < sink) | (end[:, None] <= window)
    return keep[None, None]


@torch.no_grad()
def whole(transformer: Any, latents: torch.Tensor, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with under_mask(transformer, mask):
        out: torch.Tensor = transformer(latents, torch.zeros(len(latents)), embeds).sample
    return out


@torch.no_grad()
def chunked(
    model: CausalTransformer, latents: torch.Tensor, embeds: torch.Tensor, *, noisy: bool = True, **kwargs: Any
) -> torch.Tensor:
    """The predictions of the passes that write clean chunks to the cache."""
    generator = torch.Generator().manual_seed(7)
    outs, start = [], model.start
    for length in model.rollout.chunks(start + latents.shape[2], start):
        model.begin(length)
        own = latents[:, :, model.start - start : model.start - start + length]
        if noisy:  # what a step on the way wrote must be gone
            noise = torch.randn(own.shape, generator=generator, dtype=own.dtype)
            model.flow(noise, torch.full((len(own),), 937.5), embeds, **kwargs)
        outs.append(model.flow(own, torch.zeros(len(own)), embeds, **kwargs))
        model.commit()
    return torch.cat(outs, 2)


def build(transformer: Any, batch: int = 2, **settings: Any) -> CausalTransformer:
    rest = {name: settings.pop(name) for name in ("max_bytes", "host", "branches") if name in settings}
    rollout = Rollout(**{"window": None, "sink": 0} | settings)
    return CausalTransformer(transformer, rollout, GRID, batch=batch, dtype=torch.float64, **rest)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunked_generation_is_one_block_causal_forward(transformer: Any, chunk: int) -> None:
    latents, embeds = clip()
    expected = whole(transformer, latents, embeds, causal_mask(FRAMES, chunk))
    found = chunked(build(transformer, chunk=chunk), latents, embeds)
    assert (found - expected).abs().max() == 0.0


def test_a_last_chunk_may_be_short(transformer: Any) -> None:
    latents, embeds = clip(frames=5)
    expected = whole(transformer, latents, embeds, causal_mask(5, 3))
    assert (chunked(build(transformer, chunk=3), latents, embeds) - expected).abs().max() == 0.0


@pytest.mark.parametrize(("window", "sink", "host"), [(6, 0, False), (6, 2, False), (6, 2, True)])
def test_one_layer_sees_what_the_window_shows(window: int, sink: int, host: bool) -> None:
    """Through more layers a chunk also sees what its window's frames saw; one layer is what a mask can say."""
    transformer = tiny_transformer(num_layers=1)
    latents, embeds = clip(frames=12)
    expected = whole(transformer, latents, embeds, causal_mask(12, 2, window, sink))
    found = chunked(build(transformer, chunk=2, window=window, sink=sink, host=host), latents, embeds)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_host_memory_changes_nothing(transformer: Any) -> None:
    latents, embeds = clip(frames=12)
    settings = {"chunk": 2, "window": 6, "sink": 2, "rope": "sink-shift"}
    on_device = chunked(build(transformer, **settings), latents, embeds)
    on_host = chunked(build(transformer, **settings, host=True), latents, embeds)
    assert torch.equal(on_device, on_host)


@pytest.mark.parametrize("rope", ["relative", "sink-shift"])
def test_moved_first_frames_are_a_window_that_starts_at_zero(rope: str) -> None:
    """The last chunk of a long stream equals the same frames counted from 0: only distances matter."""
    transformer = tiny_transformer(num_layers=1)
    latents, embeds = clip(frames=40)
    long = chunked(build(transformer, chunk=2, window=8, sink=2, rope=rope), latents, embeds)
    seen = torch.cat([latents[:, :, :2], latents[:, :, -6:]], 2)
    short = chunked(build(transformer, chunk=2, window=8, sink=2), seen, embeds)
    torch.testing.assert_close(long[:, :, -2:], short[:, :, -2:], atol=1e-6, rtol=0)
    kept = chunked(build(transformer, chunk=2, window=8, sink=2, rope="absolute"), latents, embeds)
    assert (kept[:, :, -2:] - short[:, :, -2:]).abs().max() > 1e-3


@pytest.mark.parametrize("rope", ["absolute", "sink-shift"])
def test_a_stream_of_1100_frames_goes_on(rope: str) -> None:
    """The model's own table ends at 64 frames here, at 1,024 in real ones."""
    transformer = tiny_transformer(num_layers=1)
    model = build(transformer, batch=1, chunk=20, window=44, sink=4, rope=rope)
    latents, embeds = clip(frames=20, batch=1)
    bytes_before = model.bytes
    for _ in range(55):
        found = chunked(model, latents, embeds, noisy=False)
    assert model.start == 1100
    assert found.isfinite().all()
    assert model.bytes <= bytes_before + 4 * 6 * 2 * 24 * 8  # the first frames' keys as they were written


def test_shifting_all_frames_changes_nothing(transformer: Any) -> None:
    latents, embeds = clip(frames=8)
    later = build(transformer, chunk=2, window=6, rope="relative")
    later.caches["cond"].start = 5000
    expected = chunked(build(transformer, chunk=2, window=6), latents, embeds)
    torch.testing.assert_close(chunked(later, latents, embeds), expected, atol=1e-6, rtol=0)


def test_samples_of_a_batch_do_not_meet(transformer: Any) -> None:
    latents, embeds = clip()
    together = chunked(build(transformer, chunk=2), latents, embeds)
    alone = torch.cat(
        [chunked(build(transformer, batch=1, chunk=2), x[None], e[None]) for x, e in zip(latents, embeds, strict=True)]
    )
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def test_branches_have_caches_of_their_own(transformer: Any) -> None:
    latents, embeds = clip()
    both = build(transformer, chunk=2, branches=("cond", "uncond"))
    generator = torch.Generator().manual_seed(5)
    other = torch.randn(embeds.shape, generator=generator, dtype=torch.float64)
    found: dict[str, list[torch.Tensor]] = {"cond": [], "uncond": []}
    with torch.no_grad():
        for start in range(0, FRAMES, 2):
            both.begin(2)
            for branch, text in (("cond", embeds), ("uncond", other)):
                found[branch].append(both.flow(latents[:, :, start : start + 2], torch.zeros(2), text, branch))
            both.commit()
    for branch, text in (("cond", embeds), ("uncond", other)):
        alone = chunked(build(transformer, chunk=2), latents, text, noisy=False)
        assert torch.equal(torch.cat(found[branch], 2), alone)


def test_frames_of_a_chunk_may_have_timesteps_of_their_own(transformer: Any) -> None:
    latents, embeds = clip(frames=2)
    model = build(transformer, chunk=2)
    timestep = torch.tensor([[250.0, 1000.0]]).expand(2, -1)
    with torch.no_grad():
        model.begin(2)
        found = model.flow(latents, timestep, embeds)
        tokens = timestep.repeat_interleave(GRID[0] * GRID[1], 1)
        expected = transformer(latents, tokens, embeds).sample
        same = model.flow(latents, timestep[:, :1].expand(-1, 2), embeds)
        torch.testing.assert_close(same, model.flow(latents, timestep[:, 0], embeds), atol=1e-12, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_prompt_is_projected_once_and_again_when_it_changes(transformer: Any) -> None:
    latents, embeds = clip(frames=2)
    calls: list[int] = []
    hook = transformer.blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    model = build(transformer, chunk=2)
    try:
        first = chunked(model, latents, embeds)
        assert len(calls) == 1
        model.new_prompt()
        kept = model.prompts["cond"][0].kept
        chunked(model, latents, embeds + 1)
        assert len(calls) == 2
        assert kept is not None
        assert model.prompts["cond"][0].kept is kept, "a captured graph would read the old prompt"
    finally:
        hook.remove()
    fresh = chunked(build(transformer, chunk=2), latents, embeds + 1)
    assert not torch.equal(first, fresh)
    # A forward that ended between two layers has projected it for some.
    model.new_prompt()
    model.prompts["cond"][0].stale = False
    assert model._is_new("cond")


def test_the_transformer_is_given_back_whatever_happens(transformer: Any) -> None:
    before = dict(transformer.attn_processors)
    latents, embeds = clip(frames=2)
    model = build(transformer, chunk=2)
    model.begin(2)
    with pytest.raises(RuntimeError):
        model.flow(latents[:, :, :, :3], torch.zeros(2), embeds)
    assert transformer.attn_processors == before
    assert not transformer.rope._forward_hooks


def test_an_accelerated_transformer_is_refused() -> None:
    transformer = tiny_transformer()
    transformer.set_attn_processor(vidaccel.attn_processors(transformer, "topk", density=0.5))
    with pytest.raises(InstallError, match="accelerated"):
        build(transformer, chunk=2)
    vidaccel.remove(transformer)
    build(transformer, chunk=2)


def test_no_window_ends_at_the_hard_cap(transformer: Any) -> None:
    latents, embeds = clip(frames=12, batch=1)
    frame = build(transformer, batch=1, chunk=3, window=3).bytes // 3
    with pytest.raises(StreamError, match="smaller window"):
        chunked(build(transformer, batch=1, chunk=3, max_bytes=6 * frame), latents, embeds, noisy=False)
