"""The parts of the sample model, built from numbers and literals: nothing is downloaded.

Together they take less than 9 MiB in bf16. The transformer has three heads of 64 channels, which makes attention more
than half of its work at 2,304 tokens, as in a large video model.
"""

from __future__ import annotations

import string

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from samples.models import world

LATENT_CHANNELS = 48
TEXT_WIDTH = 64
FLOW_SHIFT = 3.0
PATCH = 4


def build_vae() -> AutoencoderKLWan:
    """Build the autoencoder: the residual shape of Wan 2.2, 16x in space and 4x in time.

    Its finest level works on 4x4 patches, not 2x2: fewer places with more channels train fast and decode fast on a CPU.
    """
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        is_residual=True,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
    )


def build_transformer(heads: int = 3, layers: int = 6, ffn: int = 384) -> WanTransformer3DModel:
    """Build the transformer: one token for each latent place, (9, 16, 16) for 33 frames of 256x256."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=ffn,
        num_layers=layers,
        rope_max_seq_len=256,
    )


def build_tokenizer(*more: str) -> T5Tokenizer:
    """Build a tokenizer with one token for each word of the captions and of `more`, and letters for all other words."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0), (",", -2.0)]
    vocab += [(f"\u2581{word}", -2.0) for word in world.words()]
    vocab += [(letter, -6.0) for letter in string.ascii_letters + string.digits + ".-"]
    vocab += [(f"\u2581{word}", -2.0) for word in more]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def build_text_encoder(vocabulary: int, layers: int = 2) -> UMT5EncoderModel:
    """Build the text encoder, which is trained together with the transformer."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=layers,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return UMT5EncoderModel(config)


def build_scheduler() -> UniPCMultistepScheduler:
    """Build the sampler: UniPC on flow-matching velocities, as Wan uses it."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )


def count(module: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
