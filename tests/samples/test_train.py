"""The pieces of training: the renderer, the two-piece autoencoder, the padding trick, Muon."""

from __future__ import annotations

import torch

from samples.models import world
from samples.models.world import Scene, Thing
from samples.train import stream
from samples.train.clips import render
from samples.train.muon import orthogonal
from samples.train.padding import PaddedTextProcessor, padding_bias
from samples.train.parts import build_transformer, build_vae


def test_clips_repeat_and_wrap_around() -> None:
    scene = Scene((Thing("red", "square", "right", "quickly"),), tone="grey")
    video, again = render([scene], [5], 4)[0], render([scene, scene], [5, 6], 4)
    assert torch.equal(video, again[0])
    assert not torch.equal(video, again[1])
    areas = (video[..., 0] - video[..., 1] > 0.3).sum((1, 2)).float()
    assert (areas / areas.mean() - 1).abs().max() < 0.02


def test_every_shape_is_at_least_48_pixels_wide() -> None:
    for shape in world.SHAPES:
        video = render([Scene((Thing("red", shape, "up", size="small"),))], [2], 1)[0, 0]
        mask = video[..., 0] - video[..., 1] > 0.3
        # On the torus a shape can lie across the frame's edge, so its columns are counted, not spanned.
        assert mask.any(0).sum() >= 48
        assert mask.any(1).sum() >= 48


def test_two_pieces_give_what_the_stock_loop_gives() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    video = torch.rand(1, 3, 13, 32, 32) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(video).latent_dist.mean
        torch.testing.assert_close(stream.encode(vae, video)[0], mean, atol=1e-4, rtol=1e-4)
        decoded = stream.decode(vae, mean).clamp(-1, 1)
        torch.testing.assert_close(decoded, vae.decode(mean).sample, atol=1e-4, rtol=1e-4)


def test_a_few_weighted_pads_equal_many() -> None:
    torch.manual_seed(0)
    model = build_transformer(layers=1).eval()
    latents, time = torch.randn(1, 48, 2, 4, 4), torch.tensor([300.0])
    words = torch.randn(1, 6, 64)
    padded = torch.cat((words, torch.zeros(1, 58, 64)), dim=1)
    short = torch.cat((words, torch.zeros(1, 2, 64)), dim=1)
    mask = torch.tensor([[1.0] * 6 + [0.0] * 2])
    with torch.no_grad():
        expected = model(latents, time, padded, return_dict=False)[0]
        processor = PaddedTextProcessor(padding_bias(mask, torch.tensor([64])))
        stock = model.attn_processors
        model.set_attn_processor({name: processor if ".attn2." in name else stock[name] for name in stock})
        torch.testing.assert_close(model(latents, time, short, return_dict=False)[0], expected, atol=1e-5, rtol=1e-4)


def test_muon_updates_are_nearly_orthogonal() -> None:
    stack = torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(stack).float())
    assert values.min() > 0.5
    assert values.max() < 1.4
