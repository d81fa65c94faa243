"""Shared fixtures: tiny real pipelines, and fresh memory that is full of NaN."""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """`torch.empty` gives NaN, so that a slot which nobody wrote is seen. Tests that measure time do without."""
    if request.node.get_closest_marker("slow") or request.node.get_closest_marker("gpu"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tiny_tokenizer() -> Any:
    """A T5 tokenizer over printable characters."""
    from transformers import T5Tokenizer

    characters = string.ascii_letters + string.digits + string.punctuation
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in characters)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def tiny_wan(
    cls: str = "WanPipeline", *, layers: int = 3, heads: int = 2, head_dim: int = 32, experts: bool = False,
    ti2v: bool = False, in_channels: int = 16, seed: int = 0, **extra: Any,
) -> Any:  # fmt: skip
    """A complete Wan pipeline of random weights; its VAE is 8x in space and 4x in time, patches are 1x2x2."""
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0,
            relative_attention_num_buckets=8, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        )
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()

    def transformer(seed: int) -> Any:
        torch.manual_seed(seed)
        kind = diffusers.WanVACETransformer3DModel if "VACE" in cls else diffusers.WanTransformer3DModel
        return kind(
            patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=head_dim, in_channels=in_channels,
            out_channels=16, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=layers, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=64, **extra,
        ).eval()  # fmt: skip

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": vae,
        "scheduler": scheduler,
        "transformer": transformer(seed + 1),
    }
    if cls == "WanPipeline":
        parts |= {"expand_timesteps": ti2v}
    if cls == "WanImageToVideoPipeline":
        parts |= {"image_encoder": None, "image_processor": None}
    if experts:
        parts |= {"transformer_2": transformer(seed + 2), "boundary_ratio": 0.875}
    pipe = getattr(diffusers, cls)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def wan() -> Any:
    """A tiny Wan 2.1 text-to-video pipeline."""
    return tiny_wan()


@pytest.fixture
def make_wan() -> Callable[..., Any]:
    """Builds tiny Wan pipelines of any kind."""
    return tiny_wan


# 7 latent frames of 8x8, and two sizes that 16 does not divide: 7 x 7x9 = 441 and 7 x 5x11 = 385 tokens.
SIZES = {"even": (128, 128), "ragged": (112, 144), "wide": (80, 176)}


@pytest.fixture
def render() -> Callable[..., torch.Tensor]:
    """Runs a pipeline on a fixed seed and gives its latents: (b, channels, frames, height, width)."""

    def run(pipe: Any, size: str = "even", *, steps: int = 4, frames: int = 25, **kwargs: Any) -> torch.Tensor:
        height, width = SIZES[size]
        arguments: dict[str, Any] = {
            "prompt": "a cat",
            "negative_prompt": "bad",
            "height": height,
            "width": width,
            "num_frames": frames,
            "num_inference_steps": steps,
            "guidance_scale": 3.0,
            "max_sequence_length": 16,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(1),
        }
        given = {name: value for name, value in (arguments | kwargs).items() if value is not None}
        latents: torch.Tensor = pipe(**given).frames
        return latents

    return run
