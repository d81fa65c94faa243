"""What vidaccel must know about a model family, and which families there are.

A family is one file in `pipelines/src`. It says where attention sits, how to read a call of the transformer, and how to
get q, k and v out of an attention layer in kernel order. It never copies a `forward`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import nn

from .errors import InstallError
from .exchange import Exchange
from .grid import Site, TokenLayout, VideoGrid

# transformer class -> "module:object" of its family
FAMILIES = {
    "CogVideoXTransformer3DModel": "vidaccel.pipelines.cogvideox:COGVIDEOX",
    "HunyuanVideo15Transformer3DModel": "vidaccel.pipelines.hunyuan15:HUNYUAN15",
    "HunyuanVideoTransformer3DModel": "vidaccel.pipelines.hunyuan:HUNYUAN",
    "LTXVideoTransformer3DModel": "vidaccel.pipelines.ltx:LTX_VIDEO",
    "MochiTransformer3DModel": "vidaccel.pipelines.mochi:MOCHI",
    "SkyReelsV2Transformer3DModel": "vidaccel.pipelines.skyreels:SKYREELS",
    "WanTransformer3DModel": "vidaccel.pipelines.wan:WAN",
    "WanVACETransformer3DModel": "vidaccel.pipelines.wan:WAN",
}
# attention class -> family, for processors that are built without a transformer. Joint attention is not among them: its
# layers are all of one class, and cannot say which text is padding.
ATTENTION_FAMILIES = {
    "LTXAttention": "vidaccel.pipelines.ltx:LTX_VIDEO",
    "SkyReelsV2Attention": "vidaccel.pipelines.skyreels:SKYREELS",
    "WanAttention": "vidaccel.pipelines.wan:WAN",
}


class Call(NamedTuple):
    """What the arguments of one transformer call say.

    Attributes:
        grid: latent tokens after patching.
        text: text tokens in joint attention, 0 where text has its own cross-attention.
        timestep: the scheduler's value, as given.
        embeds: the text embeddings; their identity tells guidance branches apart where nothing else does.
        device: where the call runs.
        latents: the transformer's input, (b, channels, ...); only caches that work on it look here.
        valid: valid text tokens of each sample, the first ones, where the others are padding that nobody must see;
            one number where all samples have as many.
        notes: what the user should know about attention in this call.
        text_slots: text tokens that the model holds, where only the first `text` of them attend; 0 where all do.
    """

    grid: VideoGrid
    text: int
    timestep: torch.Tensor
    embeds: torch.Tensor | None
    device: torch.device
    latents: torch.Tensor | None = None
    valid: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    text_slots: int = 0


class Stack(NamedTuple):
    """The transformer blocks that one call runs through, for what acts on all of them.

    Attributes:
        lists: attributes of the transformer that hold the blocks, in the order in which they run.
        streams: names of the residual streams, video first: a block takes them as its first arguments or by these
            names, and returns them in this order. Of what the last block returns, only the video is used.
        width: channels of the video stream.
        modulation: elements of `Family.modulation`, one sample; of one video token where it is per token.
        latent: elements of the transformer's output for one video token.
        model: the model's name in tables of published parameters, such as "wan-t2v-14b".
        modulation_per_token: what is modulated is looked at, rather than the time embedding alone.
    """

    lists: tuple[str, ...]
    streams: tuple[str, ...]
    width: int
    modulation: int
    latent: int
    model: str
    modulation_per_token: bool = False


class Family(Protocol):
    """One model family. Families inherit from it what is the same for nearly all.

    Attributes:
        name: what errors and tables call it.
        text_first: joint attention holds [text | video] rather than [video | text].
        rope_of_samples: blocks are given a rotary embedding, by name, that has a row for each sample.
    """

    name: str
    text_first: ClassVar[bool] = False
    rope_of_samples: ClassVar[bool] = False

    def sites(self, transformer: Any) -> list[Site]:
        """Every video self-attention (or joint attention) layer, in the order in which they run."""
        ...

    def cross_sites(self, transformer: Any) -> list[str]:
        """Names of the layers in which video attends to text alone, in `attn_processors`.

        None in joint attention, nor where their inputs are not known well enough to act on them.
        """
        return []

    def read(self, transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Read the arguments of one call of the transformer."""
        ...

    def is_video(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None) -> bool:
        """This call of an attention layer is video self-attention (or joint attention)."""
        ...

    def layout(self, call: Call, block: int) -> TokenLayout:
        """The call's tokens in raster order."""
        ...

    def project(self, attn: Any, layout: TokenLayout, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v: (b, slots, h, d) in kernel order, normalised and rotated, from the inputs of an attention layer.

        Args:
            attn: the layer.
            layout: the order.
            inputs: hidden states, encoder hidden states, attention mask, rotary embedding, and what ranks swap where
                they share the video: these are one rank's own tokens then, the result all tokens of its own heads.
        """
        ...

    def output(self, attn: Any, out: torch.Tensor, *inputs: Any) -> Any:
        """What the layer returns, from (b, tokens, h, d) in model order: the model's own output projection."""
        ...

    def split_plan(self, transformer: Any) -> dict[str, Any] | None:
        """How diffusers splits tokens over ranks, in its own terms; None where the class says it itself, or nobody.

        Raises:
            InstallError: this very transformer cannot be split.
        """
        return None

    def dense(
        self,
        attn: Any,
        processor: Any,
        valid: tuple[torch.Tensor, ...] | None,
        exchange: Exchange | None,
        *inputs: Any,
        **kwargs: Any,
    ) -> Any:
        """A dense call of an attention layer: whatever stood there before runs it, on the user's own backend.

        On several ranks the family runs it, on that backend.

        Args:
            attn: the layer.
            processor: the processor that stood there.
            valid: numbers (n,) of the valid text tokens of each sample, as in `Call`.
            exchange: what ranks swap around attention, where they share the video.
            inputs: hidden states, encoder hidden states, attention mask and rotary embedding.
            kwargs: what else the layer was given.
        """
        return processor(attn, *inputs, **kwargs)

    def defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Frames a second, and whatever size and length of a video the pipeline's own signature leaves open.

        Args:
            config: the transformer's configuration.
        """
        ...

    def native(self, config: Mapping[str, Any]) -> tuple[int, int] | None:
        """(height, width) in latent tokens of the frames that the model was trained on; None where nobody says.

        Args:
            config: as above. Without another word it is the size of `defaults`, of 16 pixels a token.
        """
        size = self.defaults(config)
        return (size["height"] // 16, size["width"] // 16) if "height" in size else None

    def stack(self, transformer: Any) -> Stack:
        """The blocks of a transformer."""
        ...

    def modulation(self, block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """(b, ...): what a block makes of the time embedding, from its arguments; TeaCache watches it change."""
        ...


def family_of(transformer: nn.Module) -> Family:
    """The family of a transformer.

    Raises:
        InstallError: no family serves this class.
    """
    return family_named(type(transformer).__name__)


def family_named(transformer_class: str) -> Family:
    """The family of a transformer class, by the class's name.

    Raises:
        InstallError: no family serves this class.
    """
    if transformer_class not in FAMILIES:
        raise InstallError(
            f"{transformer_class} is not a transformer that vidaccel knows; it knows {', '.join(sorted(FAMILIES))}. "
            "A new family is one file in pipelines/src, which says where attention sits, how to read a call, and how "
            "to get q, k and v out of a layer (see pipelines/README.md)"
        )
    return _load(FAMILIES[transformer_class])


def attention_family_of(attn: Any) -> Family:
    """The family of an attention layer, for processors that are built without a transformer.

    Raises:
        InstallError: no family serves this class, or several share it.
    """
    name = type(attn).__name__
    if name not in ATTENTION_FAMILIES:
        raise InstallError(
            f"{name} is not an attention layer that tells its model; {', '.join(sorted(ATTENTION_FAMILIES))} do. Build "
            "the processor as RadialAttnProcessor(pipe.transformer, ...), or any other of them, instead of with grid="
        )
    return _load(ATTENTION_FAMILIES[name])


def _load(place: str) -> Family:
    module, _, attribute = place.partition(":")
    return cast(Family, getattr(importlib.import_module(module), attribute))


def attn_processors_of(transformer: Any) -> dict[str, Any]:
    """Every attention processor of a transformer, by name; Mochi has no `attn_processors` of its own."""
    if hasattr(transformer, "attn_processors"):
        return dict(transformer.attn_processors)
    return {f"{name}.processor": m.processor for name, m in transformer.named_modules() if hasattr(m, "processor")}


def place_processors(transformer: Any, processors: Mapping[str, Any]) -> None:
    """Set every attention processor of a transformer, by name."""
    if hasattr(transformer, "set_attn_processor"):
        transformer.set_attn_processor(dict(processors))  # it empties the dict that it is given
        return
    for name, processor in processors.items():
        transformer.get_submodule(name.removesuffix(".processor")).processor = processor


def unwrap(transformer: nn.Module) -> nn.Module:
    """The module itself, where torch.compile has wrapped it."""
    return cast(nn.Module, getattr(transformer, "_orig_mod", transformer))
