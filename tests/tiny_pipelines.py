"""Tiny but complete pipelines of every family: random weights, tokenizers included.

Each has grids of 7x8x8, 7x7x9 and 7x5x11 tokens at the sizes that tests render.
"""

from __future__ import annotations

import inspect
import string
from typing import Any

import torch

CHARACTERS = string.ascii_letters + string.digits + string.punctuation


def t5_tokenizer() -> Any:
    """A T5 tokenizer over printable characters."""
    from transformers import T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in CHARACTERS)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def llama_tokenizer() -> Any:
    """Characters as a byte-pair encoding; HunyuanVideo wants its padding on the right."""
    from transformers import LlamaTokenizer

    vocabulary = {token: n for n, token in enumerate(("<unk>", "<s>", "</s>", "<pad>"))}
    for token in (*(f"<0x{byte:02X}>" for byte in range(256)), *("\u2581" + CHARACTERS)):
        vocabulary.setdefault(token, len(vocabulary))
    return LlamaTokenizer(
        vocab=vocabulary, merges=[], pad_token="<pad>", padding_side="right", model_max_length=512
    )  # fmt: skip


def byte_vocabulary(*more: str) -> dict[str, int]:
    """Bytes as GPT-2 writes them, then `more`."""
    from tokenizers.pre_tokenizers import ByteLevel

    return {token: n for n, token in enumerate((*sorted(ByteLevel.alphabet()), *more))}


def clip_tokenizer() -> Any:
    """Bytes, with and without an end of word; as in CLIP, start and end of text have the highest numbers."""
    from transformers import CLIPTokenizer

    ends = [f"{byte}</w>" for byte in byte_vocabulary()]
    return CLIPTokenizer(
        vocab=byte_vocabulary(*ends, "<|startoftext|>", "<|endoftext|>"), merges=[], model_max_length=77
    )


def qwen_tokenizer() -> Any:
    """Bytes, with a chat template that leaves out all but what users say."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        vocab=byte_vocabulary("<|endoftext|>", "<|im_start|>", "<|im_end|>"), merges=[], model_max_length=512
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}{% endif %}{% endfor %}"
    )
    return tokenizer


def t5(vocabulary: int, kind: str = "T5") -> Any:
    """An encoder of 32 channels; `kind` is "T5" or "UMT5"."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=8, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def finished(pipe: Any) -> Any:
    """A pipeline that shows no progress."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels that turn with time, height and width."""
    return (head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8)


def wan(
    cls: str = "WanPipeline", *, layers: int = 3, heads: int = 2, head_dim: int = 32, experts: bool = False,
    ti2v: bool = False, in_channels: int = 16, seed: int = 0, **extra: Any,
) -> Any:  # fmt: skip
    """A complete Wan pipeline of random weights; its VAE is 8x in space and 4x in time, patches are 1x2x2."""
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
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
    return finished(getattr(diffusers, cls)(**parts))


def hunyuan(image: str | None = None, *, layers: int = 1, heads: int = 2, head_dim: int = 32, seed: int = 0) -> Any:
    """HunyuanVideo with as many layers of two streams as of one; `image` is the kind of image conditioning."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = llama_tokenizer(), clip_tokenizer()
    text_encoder = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_attention_heads=4,
            num_hidden_layers=3, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        )
    ).eval()  # fmt: skip
    end = len(tokenizer_2) - 1
    text_encoder_2 = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=end + 1, hidden_size=8, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1,
            projection_dim=8, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
        )
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4,
    ).eval()  # fmt: skip
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=9 if image == "latent_concat" else 4, out_channels=4, num_attention_heads=heads,
        attention_head_dim=head_dim, num_layers=layers, num_single_layers=layers, num_refiner_layers=1, mlp_ratio=2.0,
        guidance_embeds=image is None, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=rope_axes(head_dim),
        image_condition_type=image,
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    if image:  # its text encoder is a large vision model; tests give embeddings
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_processor")
        return finished(diffusers.HunyuanVideoImageToVideoPipeline(**parts, **dict.fromkeys(names)))
    return finished(
        diffusers.HunyuanVideoPipeline(
            text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2,
            **parts,
        )
    )  # fmt: skip


def hunyuan15(*, layers: int = 2, heads: int = 2, head_dim: int = 32, seed: int = 0) -> Any:
    """HunyuanVideo-1.5 with 124 text slots rather than 1985; texts of up to 64 tokens leave some of them out."""
    import diffusers
    from diffusers.guiders import ClassifierFreeGuidance
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = qwen_tokenizer(), ByT5Tokenizer()
    text_encoder = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        )
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16,) * 5, layers_per_block=1,
        spatial_compression_ratio=16, temporal_compression_ratio=4, downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()  # fmt: skip
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=32, image_embed_dim=12,
        rope_axes_dim=rope_axes(head_dim), target_size=64, task_type="t2v",
    ).eval()  # fmt: skip
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=t5(len(tokenizer_2)),
        tokenizer_2=tokenizer_2, guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )  # fmt: skip
    pipe.prompt_template_encode_start_idx = 1
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 100, 16, 8
    return finished(pipe)


def cogvideox(
    kind: str = "5b", *, image: bool = False, layers: int = 2, heads: int = 2, head_dim: int = 32, seed: int = 0
) -> Any:  # fmt: skip
    """CogVideoX; `kind` is "2b" (no RoPE), "5b" or "1.5" (patches of two frames)."""
    import diffusers

    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    ).eval()  # fmt: skip
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=8 if image else 4, out_channels=4,
        time_embed_dim=8, text_embed_dim=32, num_layers=layers, sample_width=32, sample_height=32, sample_frames=25,
        patch_size_t=2 if kind == "1.5" else None, max_text_seq_length=16,
        use_rotary_positional_embeddings=kind != "2b", ofs_embed_dim=8 if image and kind == "1.5" else None,
        patch_bias=kind != "1.5",
    ).eval()  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True,
        snr_shift_scale=3.0, timestep_spacing="trailing",
    )  # fmt: skip
    cls = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    return finished(
        cls(
            tokenizer=tokenizer, text_encoder=t5(len(tokenizer)), vae=vae, transformer=transformer,
            scheduler=scheduler,
        )
    )  # fmt: skip


def skyreels(*, layers: int = 2, heads: int = 2, head_dim: int = 32, seed: int = 0, forcing: bool = False) -> Any:
    """SkyReels-V2, as a bidirectional model or with diffusion forcing."""
    import diffusers

    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=head_dim, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=64, num_layers=layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    ).eval()  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    cls = diffusers.SkyReelsV2DiffusionForcingPipeline if forcing else diffusers.SkyReelsV2Pipeline
    return finished(
        cls(
            tokenizer=tokenizer, text_encoder=t5(len(tokenizer), "UMT5"), vae=vae, transformer=transformer,
            scheduler=scheduler,
        )
    )  # fmt: skip


def ltx(*, layers: int = 2, heads: int = 2, head_dim: int = 32, seed: int = 0) -> Any:
    """LTX-Video, whose VAE is 32x in space and 8x in time."""
    import diffusers

    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1, 1, 1, 1), patch_size=4, patch_size_t=1,
        encoder_causal=True, decoder_causal=False,
    ).eval()  # fmt: skip
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=heads, attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim, num_layers=layers, caption_channels=32,
    ).eval()  # fmt: skip
    return finished(
        diffusers.LTXPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=t5(len(tokenizer)),
            tokenizer=tokenizer, transformer=transformer,
        )
    )  # fmt: skip


def mochi(*, layers: int = 2, heads: int = 2, head_dim: int = 32, seed: int = 0) -> Any:
    """Mochi; its last layer has no text output."""
    import diffusers

    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    vae = diffusers.AutoencoderKLMochi(
        out_channels=3, encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
    ).eval()  # fmt: skip
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=32, time_embed_dim=8, max_sequence_length=16,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(transformer.pos_frequencies, std=0.1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return finished(
        diffusers.MochiPipeline(
            scheduler=scheduler, vae=vae, text_encoder=t5(len(tokenizer)), tokenizer=tokenizer,
            transformer=transformer,
        )
    )  # fmt: skip


# What a call of each pipeline needs beyond prompt, size, steps and seed, or has otherwise.
CALLS: dict[str, dict[str, Any]] = {
    "HunyuanVideoPipeline": {"prompt_template": {"template": "{}", "crop_start": 0}},
    "LTXPipeline": {"num_frames": 49},
    "MochiPipeline": {"num_frames": 37},
    "SkyReelsV2DiffusionForcingPipeline": {"ar_step": 0},
}
# Pixels of a token's side over the 16 of most pipelines.
SCALES = {"LTXPipeline": 2}
# 7 latent frames of 8x8, and two sizes that 16 does not divide: 7 x 7x9 = 441 and 7 x 5x11 = 385 tokens.
SIZES = {"even": (128, 128), "ragged": (112, 144), "wide": (80, 176)}


def render(pipe: Any, size: str = "even", *, steps: int = 4, frames: int = 25, **kwargs: Any) -> torch.Tensor:
    """Latents of a pipeline on a fixed seed, such as (b, channels, frames, height, width)."""
    name = type(pipe).__name__
    height, width = (side * SCALES.get(name, 1) for side in SIZES[size])
    possible = inspect.signature(pipe.__call__).parameters
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
    arguments = {key: value for key, value in arguments.items() if key in possible}
    arguments |= CALLS.get(name, {}) | kwargs
    given = {key: value for key, value in arguments.items() if value is not None}
    latents: torch.Tensor = pipe(**given).frames
    return latents
