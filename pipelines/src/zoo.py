"""Real models by name: their published configurations, and inputs of their real shapes, without any weights.

Source of the configurations: diffusers' conversion scripts (scripts/convert_wan_to_diffusers.py,
convert_hunyuan_video_to_diffusers.py, convert_hunyuan_video1_5_to_diffusers.py, convert_cogvideox_to_diffusers.py,
0.42.1); a test compares the number of parameters with the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ..errors import UsageError
from ..grid import VideoGrid

Guidance = Literal["two calls", "one batch", "embedded"]


@dataclass(frozen=True)
class RealModel:
    """A released model.

    Attributes:
        name: what commands call it.
        transformer: class in diffusers.
        config: its arguments.
        lists: the lists of blocks, and the argument that says how many each has, in the order in which they run.
        patch: latent pixels in a token, (t, y, x).
        vae: frames and pixels in one latent pixel, (t, y, x).
        size: (height, width, frames) that its pipeline renders by default.
        ffn: width of the feed-forward layer.
        cross: text has its own cross-attention, with projections of q and output for every video token.
        text: text tokens that a pipeline passes, padding included.
        valid: text tokens of a usual prompt, the rest is padding; equal to `text` where the model does not mask.
        guidance: how classifier-free guidance runs: two calls a step, one of batch 2, or none (an embedded scale).
        contexts: what its pipeline names those calls.
        steps: denoising steps by default.
        parameters: published number of the transformer's parameters, in billions.
        experts: transformers of this kind that a pipeline holds; one of them works at a step.
    """

    name: str
    transformer: str
    config: Mapping[str, Any]
    lists: Mapping[str, str]
    patch: tuple[int, int, int]
    vae: tuple[int, int, int]
    size: tuple[int, int, int]
    ffn: int
    cross: bool
    text: int
    valid: int
    guidance: Guidance
    contexts: tuple[str, ...]
    steps: int
    parameters: float
    experts: int = 1

    @property
    def batch(self) -> int:
        """Samples in one call of the transformer."""
        return 2 if self.guidance == "one batch" else 1

    @property
    def heads(self) -> int:
        """Attention heads."""
        return int(self.config["num_attention_heads"])

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return int(self.config["attention_head_dim"])

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def joint_text(self) -> int:
        """Text tokens that attend together with the video; 0 where text has its own cross-attention."""
        return 0 if self.cross else self.valid

    @property
    def layers(self) -> dict[str, int]:
        """How many blocks each list has."""
        return {name: int(self.config[argument]) for name, argument in self.lists.items()}

    def with_layers(self, layers: Mapping[str, int]) -> RealModel:
        """The same model of other depth."""
        changed = {argument: layers[name] for name, argument in self.lists.items()}
        return replace(self, config={**self.config, **changed})

    def grid(self, height: int, width: int, frames: int) -> VideoGrid:
        """Video tokens of a size in pixels.

        Raises:
            UsageError: a size that VAE and patches do not divide.
        """
        for axis, size, stride in (
            ("height", height, self.vae[1] * self.patch[1]),
            ("width", width, self.vae[2] * self.patch[2]),
        ):
            if size < 1 or size % stride:
                raise UsageError(f"{axis} {size} does not fit {self.name}: it takes multiples of {stride}")
        if frames < 1 or (frames - 1) % self.vae[0]:
            raise UsageError(f"{frames} frames do not fit {self.name}: it takes {self.vae[0]}k+1 frames")
        # CogVideoX-1.5 repeats a latent frame where its patches do not divide their number.
        t = -(-((frames - 1) // self.vae[0] + 1) // self.patch[0])
        return VideoGrid(t, height // self.vae[1] // self.patch[1], width // self.vae[2] // self.patch[2])

    @property
    def padded(self) -> bool:
        """Its pipeline passes padded text and hides the padding with a mask."""
        return self.valid < self.text

    def inputs(
        self, grid: VideoGrid, device: torch.device | str, dtype: torch.dtype, *, trimmed: bool = False
    ) -> dict[str, Any]:
        """Keyword arguments of one call of the transformer: noise of the real shapes, the same in every run.

        Args:
            grid: video tokens.
            device: where.
            dtype: of the tensors.
            trimmed: without padded text, as a caller could who knows the model.
        """
        generator = torch.Generator(device).manual_seed(0)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        def valid(slots: int, many: int) -> torch.Tensor:
            return (torch.arange(slots, device=device) < many).expand(self.batch, -1)

        t, y, x = (tokens * side for tokens, side in zip(grid, self.patch, strict=True))
        channels, time = self.config["in_channels"], torch.full((self.batch,), 500.0, device=device)
        given: dict[str, Any] = {"return_dict": False, "timestep": time}
        if self.transformer == "WanTransformer3DModel":
            given["encoder_hidden_states"] = noise(self.batch, self.text, self.config["text_dim"])
            if self.name == "wan2.2-ti2v-5b":  # Its pipeline gives every token a timestep of its own.
                given["timestep"] = time[:, None].expand(-1, grid.tokens)
        elif self.transformer == "HunyuanVideoTransformer3DModel":
            given["encoder_hidden_states"] = noise(self.batch, self.text, self.config["text_embed_dim"])
            given["encoder_attention_mask"] = valid(self.text, self.valid).to(dtype)
            given["pooled_projections"] = noise(self.batch, self.config["pooled_projection_dim"])
            given["guidance"] = torch.full((self.batch,), 6000.0, device=device, dtype=dtype)
        elif self.transformer == "HunyuanVideo15Transformer3DModel":
            given["timestep"] = time.to(dtype)
            # Text to video: image tokens of zeros, glyph tokens of padding, and the prompt.
            image, glyphs = (0, 0) if trimmed else (729, 256)
            prompt = self.valid if trimmed else self.text - image - glyphs
            given["encoder_hidden_states"] = noise(self.batch, prompt, self.config["text_embed_dim"])
            given["encoder_attention_mask"] = valid(prompt, self.valid).to(dtype)
            given["encoder_hidden_states_2"] = noise(self.batch, glyphs, self.config["text_embed_2_dim"])
            given["encoder_attention_mask_2"] = valid(glyphs, 0).to(dtype)
            given["image_embeds"] = noise(self.batch, image, self.config["image_embed_dim"]) * 0
        else:
            given["encoder_hidden_states"] = noise(self.batch, self.text, self.config["text_embed_dim"])
            if self.config.get("use_rotary_positional_embeddings"):
                angle = noise(grid.tokens, self.head_dim).float()
                given["image_rotary_emb"] = (angle.cos(), angle.sin())
            return {**given, "hidden_states": noise(self.batch, t, channels, y, x)}
        return {**given, "hidden_states": noise(self.batch, channels, t, y, x)}


def _wan(name: str, heads: int, layers: int, ffn: int, size: tuple[int, int, int], billions: float) -> RealModel:
    small = name.endswith("5b")
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "num_layers": layers,
        "ffn_dim": ffn,
        "in_channels": 48 if small else 16,
        "out_channels": 48 if small else 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "patch_size": (1, 2, 2),
    }
    return RealModel(
        name,
        "WanTransformer3DModel",
        config,
        {"blocks": "num_layers"},
        (1, 2, 2),
        (4, 16, 16) if small else (4, 8, 8),
        size,
        ffn,
        cross=True,
        text=512,
        valid=512,
        guidance="two calls",
        contexts=("cond", "uncond"),
        steps=50,
        parameters=billions,
        experts=2 if "a14b" in name else 1,
    )


def _cogvideox(
    name: str, heads: int, layers: int, size: tuple[int, int, int], billions: float, **config: Any
) -> RealModel:
    # The second version patches along time too.
    second = name.startswith("cogvideox-1.5")
    return RealModel(
        name,
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": heads,
            "attention_head_dim": 64,
            "num_layers": layers,
            "in_channels": 16,
            "out_channels": 16,
            "time_embed_dim": 512,
            "text_embed_dim": 4096,
            "patch_size": 2,
            **config,
        },
        {"transformer_blocks": "num_layers"},
        (2 if second else 1, 2, 2),
        (4, 8, 8),
        size,
        4 * 64 * heads,
        cross=False,
        text=224 if second else 226,
        valid=224 if second else 226,
        guidance="one batch",
        contexts=("cond_uncond",),
        steps=50,
        parameters=billions,
    )


_HUNYUAN = RealModel(
    "hunyuan-video",
    "HunyuanVideoTransformer3DModel",
    {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "num_refiner_layers": 2,
        "in_channels": 16,
        "out_channels": 16,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "patch_size": 2,
        "patch_size_t": 1,
    },
    {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
    (1, 2, 2),
    (4, 8, 8),
    (720, 1280, 129),
    4 * 3072,
    cross=False,
    text=256,
    valid=256,
    guidance="embedded",
    contexts=("cond",),
    steps=50,
    parameters=12.82,
)
_HUNYUAN15 = RealModel(
    "hunyuan-video-1.5",
    "HunyuanVideo15Transformer3DModel",
    {
        "num_attention_heads": 16,
        "attention_head_dim": 128,
        "num_layers": 54,
        "num_refiner_layers": 2,
        "in_channels": 65,
        "out_channels": 32,
        "text_embed_dim": 3584,
        "text_embed_2_dim": 1472,
        "image_embed_dim": 1152,
        "patch_size": 1,
        "patch_size_t": 1,
        "task_type": "t2v",
    },
    {"transformer_blocks": "num_layers"},
    (1, 1, 1),
    (4, 16, 16),
    (720, 1280, 121),
    4 * 2048,
    cross=False,
    text=729 + 256 + 1000,
    valid=100,
    guidance="two calls",
    contexts=("pred_cond", "pred_uncond"),
    steps=50,
    parameters=8.33,
)

_TINY = replace(
    _wan("wan-tiny", 3, 6, 384, (256, 256, 33), 0.003),
    config={
        "num_attention_heads": 3,
        "attention_head_dim": 64,
        "num_layers": 6,
        "ffn_dim": 384,
        "in_channels": 48,
        "out_channels": 48,
        "text_dim": 64,
        "freq_dim": 64,
        "patch_size": (1, 1, 1),
        "rope_max_seq_len": 256,
    },
    patch=(1, 1, 1),
    vae=(4, 16, 16),
    text=64,
    valid=64,
    steps=20,
)

REAL_MODELS: dict[str, RealModel] = {
    model.name: model
    for model in (
        _TINY,
        _wan("wan2.1-1.3b", 12, 30, 8960, (480, 832, 81), 1.42),
        _wan("wan2.1-14b", 40, 40, 13824, (720, 1280, 81), 14.29),
        _wan("wan2.2-a14b", 40, 40, 13824, (720, 1280, 81), 14.29),
        _wan("wan2.2-ti2v-5b", 24, 30, 14336, (704, 1280, 121), 5.00),
        _HUNYUAN,
        _HUNYUAN15,
        _cogvideox("cogvideox-2b", 30, 30, (480, 720, 49), 1.69),
        _cogvideox("cogvideox-5b", 48, 42, (480, 720, 49), 5.57, use_rotary_positional_embeddings=True),
        _cogvideox(
            "cogvideox-1.5",
            48,
            42,
            (768, 1360, 81),
            5.57,
            use_rotary_positional_embeddings=True,
            patch_size_t=2,
            patch_bias=False,
            sample_height=96,
            sample_width=170,
            sample_frames=81,
            max_text_seq_length=224,
        ),
    )
}


def real_model(name: str) -> RealModel:
    """A released model by its name.

    Raises:
        UsageError: no such model.
    """
    if name not in REAL_MODELS:
        raise UsageError(f"model {name!r} is unknown here; known: {', '.join(REAL_MODELS)}")
    return REAL_MODELS[name]


def build(model: RealModel, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The stock diffusers class with random weights, made where it will run, in the types that loading would give it.

    Args:
        model: which.
        device: where.
        dtype: of the weights; what diffusers keeps in fp32 stays so.
    """
    import diffusers

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            transformer = getattr(diffusers, model.transformer)(**model.config)
    finally:
        torch.set_default_dtype(before)
    keep = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if keep & set(name.split(".")):
            parameter.data = parameter.data.float()
    return transformer.eval().requires_grad_(False)


def parameters(model: RealModel) -> int:
    """How many parameters it has, counted without memory for them."""
    return sum(p.numel() for p in build(model, "meta", torch.bfloat16).parameters())
