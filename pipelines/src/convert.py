"""Original causal checkpoints -> the stock `WanTransformer3DModel` of diffusers.

Serves Self-Forcing, CausVid and Light Forcing (whole models in Wan's own names, each wrapped in its way), LongLive (the
same, and a LoRA of rank 256 on the blocks), and Hybrid Forcing (one more projection a layer). Files are read as
safetensors, or with torch's `weights_only`, which runs no code.

Example:
    >>> load_checkpoint(pipe.transformer, "self_forcing_dmd.pt")
    >>> load_lora(pipe.transformer, "longlive_lora.pt")
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch

from ..errors import ModelError

Weights = dict[str, torch.Tensor]

# Where a checkpoint holds its weights, the best first: averaged ones make better videos.
WRAPPERS = ("generator_ema", "generator", "generator_lora", "model_ema", "model", "state_dict")
PREFIXES = ("module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "base_model.model.")
# Wan's names -> diffusers'. The block's third norm is the second one there, and the only one with weights.
NAMES = (
    (r"text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"time_projection\.1\.", "condition_embedder.time_proj."),
    (r"head\.modulation$", "scale_shift_table"),
    (r"head\.head\.", "proj_out."),
    (r"img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
    (r"(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
    (r"(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
    (r"(blocks\.\d+)\.self_attn\.norm_([qk])\.", r"\1.attn1.norm_\2."),
    (r"(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
    (r"(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
    (r"(blocks\.\d+)\.cross_attn\.norm_([qk])\.", r"\1.attn2.norm_\2."),
    (r"(blocks\.\d+)\.cross_attn\.([kv])_img\.", r"\1.attn2.add_\2_proj."),
    (r"(blocks\.\d+)\.cross_attn\.norm_k_img\.", r"\1.attn2.norm_added_k."),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"patch_embedding\.", "patch_embedding."),
)
_HYBRID = re.compile(r"blocks\.(\d+)\.self_attn\.linear_proj\.(weight|bias)")
_LORA = re.compile(r"(.+)\.lora_(A|B|down|up)(?:\.default)?\.weight")


class Converted(NamedTuple):
    """A checkpoint in the names of diffusers.

    Attributes:
        weights: of the transformer.
        linear: Hybrid Forcing's projection of each layer's linear state, "<layer>.weight" and "<layer>.bias"; empty
            for others.
    """

    weights: Weights
    linear: Weights


def read(path: str | Path) -> Weights:
    """The weights in a file, unwrapped, under their own names without the prefixes of training frameworks.

    Args:
        path: .safetensors, or what torch.save wrote; that is read with `weights_only`, so a file that holds more than
            tensors and plain containers is refused.

    Raises:
        ModelError: no such file, unsafe content, or no weights in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path} is not a file; give the checkpoint itself, .safetensors or .pt")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            # Files from before torch 1.6 are no archives, and cannot be mapped.
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:
        kind, line = type(error).__name__, str(error).strip().split("\n")[0][:160]
        raise ModelError(
            f"{path} could not be read safely ({kind}: {line}); only tensors are loaded, no code: save its state dict "
            "as .safetensors"
        ) from error
    return unwrap(found, str(path))


def unwrap(found: Any, where: str = "the checkpoint") -> Weights:
    """The weights of the innermost wrapper, their prefixes removed.

    Raises:
        ModelError: no weights.
    """
    known: dict[str, Any] = dict(found) if isinstance(found, Mapping) else {}
    # A wrapper may be empty: averages of a training that has not begun to average.
    while inner := [known[name] for name in WRAPPERS if isinstance(known.get(name), Mapping) and known[name]]:
        known = dict(inner[0])
    tensors = {name: value for name, value in known.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ModelError(f"{where} holds no weights; known wrappers: {', '.join(WRAPPERS)}")
    return {_bare(name): value for name, value in tensors.items()}


def convert(weights: Mapping[str, torch.Tensor]) -> Converted:
    """Wan's own names to those of diffusers; names of diffusers stay.

    Raises:
        ModelError: a name that neither has.
    """
    converted, linear, unknown = {}, {}, []
    for name, value in weights.items():
        if found := _HYBRID.fullmatch(name):
            linear[f"{found[1]}.{found[2]}"] = value
        elif (new := rename(name)) is None:
            unknown.append(name)
        elif new in converted:
            raise ModelError(f"{name} and another weight are both {new} in diffusers; the checkpoint holds two models")
        else:
            converted[new] = value
    if unknown:
        raise ModelError(f"{len(unknown)} weights have names that Wan does not use, such as {unknown[0]!r}")
    return Converted(converted, linear)


def rename(name: str) -> str | None:
    """The name in diffusers of one of Wan's weights; None for a name of neither."""
    for pattern, new in NAMES:
        if found := re.match(pattern, name):
            return found.expand(new) + name[found.end() :]
    mine = (
        r"condition_embedder\.|proj_out\.|scale_shift_table$|blocks\.\d+\.(attn[12]|ffn\.net|norm2|scale_shift_table)"
    )
    return name if re.match(mine, name) else None


def load_checkpoint(transformer: Any, path: str | Path) -> Converted:
    """Put a checkpoint's weights into a stock transformer, every one of them.

    Returns:
        What was read; its `linear` part has no place in the transformer.

    Raises:
        ModelError: a file that cannot be read safely, weights that are missing, too many, or of another shape.
    """
    found = convert(read(path))
    own = transformer.state_dict()
    missing, unexpected = sorted(own.keys() - found.weights.keys()), sorted(found.weights.keys() - own.keys())
    wrong = [n for n in own.keys() & found.weights.keys() if own[n].shape != found.weights[n].shape]
    for names, what in (
        (missing, "lacks"),
        (unexpected, "has, and the transformer lacks,"),
        (wrong, "has other sizes of"),
    ):
        if names:
            raise ModelError(f"{path} {what} {len(names)} weights, such as {names[0]}; it is of another model")
    transformer.load_state_dict(found.weights)
    return found


def lora_of(weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name in diffusers -> (A, B) of a LoRA in Wan's names; its update is B A.

    Raises:
        ModelError: half a pair, or a name that Wan does not use.
    """
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in weights.items():
        found = _LORA.fullmatch(_bare(name))
        new = found and rename(f"{_bare(found[1])}.weight")
        if not found or new is None:
            raise ModelError(f"{name!r} is no LoRA weight of a Wan module")
        halves.setdefault(new.removesuffix(".weight"), {})["A" if found[2] in ("A", "down") else "B"] = value
    if half := [name for name, pair in halves.items() if len(pair) != 2]:
        raise ModelError(f"the LoRA has only one of the two matrices of {half[0]}")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def load_lora(transformer: Any, path: str | Path, alpha: float | None = None) -> int:
    """Add a LoRA in Wan's names to the weights of a transformer, for good.

    Args:
        transformer: stock.
        path: of the LoRA.
        alpha: the update counts alpha / rank; None counts it once, as LongLive's 256 / 256.

    Returns:
        How many modules changed.

    Raises:
        ModelError: a file that cannot be read safely, or a LoRA of another model.
    """
    modules = dict(transformer.named_modules())
    pairs = lora_of(read(path))
    for name, (a, b) in pairs.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise ModelError(
                f"{path}: the LoRA of {name} is {tuple(b.shape)} x {tuple(a.shape)}, which does not fit the "
                "transformer; it is of another model"
            )
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            scale = 1.0 if alpha is None else alpha / a.shape[0]
            weight = modules[name].weight
            weight += (scale * (b.float() @ a.float())).to(weight)
    return len(pairs)


def _bare(name: str) -> str:
    before = None
    while before != name:
        before = name
        for prefix in PREFIXES:
            name = name.removeprefix(prefix).replace(f".{prefix}", ".")
        # A raw Self-Forcing file calls the transformer "model".
        name = name.removeprefix("model.")
    return name
