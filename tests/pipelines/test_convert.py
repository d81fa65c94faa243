"""Original checkpoints: real names, real shapes (on the meta device), real wrappers; nothing is executed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vidaccel.errors import ModelError
from vidaccel.pipelines import convert


def original_names(
    layers: int, width: int, ffn: int, text: int = 4096, channels: int = 16
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Wan 2.1 text-to-video as its authors released it."""
    linear = {
        "text_embedding.0": (width, text), "text_embedding.2": (width, width), "time_embedding.0": (width, 256),
        "time_embedding.2": (width, width), "time_projection.1": (6 * width, width), "head.head": (4 * channels, width),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (width, channels, 1, 2, 2)}
    shapes |= {"patch_embedding.bias": (width,), "head.modulation": (1, 2, width)}
    for n in range(layers):
        for attention in ("self_attn", "cross_attn"):
            linear |= {f"blocks.{n}.{attention}.{part}": (width, width) for part in "qkvo"}
            shapes |= {f"blocks.{n}.{attention}.norm_{part}.weight": (width,) for part in "qk"}
        linear |= {f"blocks.{n}.ffn.0": (ffn, width), f"blocks.{n}.ffn.2": (width, ffn)}
        shapes |= {f"blocks.{n}.norm3.{part}": (width,) for part in ("weight", "bias")}
        shapes[f"blocks.{n}.modulation"] = (1, 6, width)
    for name, size in linear.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return shapes


def tiny_transformer(**config: Any) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2, "text_dim": 16,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
    }  # fmt: skip
    return WanTransformer3DModel(**settings | config)


def tiny_weights(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = original_names(2, 24, 40, text=16)
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def test_the_map_is_bijective_on_the_real_model() -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        real = WanTransformer3DModel(
            num_attention_heads=12, ffn_dim=8960, num_layers=30, text_dim=4096, cross_attn_norm=True
        )
    own = {name: tuple(value.shape) for name, value in real.state_dict().items()}
    theirs = original_names(30, 1536, 8960)
    found = {convert.rename(name): shape for name, shape in theirs.items()}
    assert len(theirs) == len(found) == 825
    assert found == own
    assert {name: convert.rename(name) for name in own} == {name: name for name in own}, "own names do not stay"


def test_image_names() -> None:
    names = {
        "blocks.3.cross_attn.k_img.bias": "blocks.3.attn2.add_k_proj.bias",
        "blocks.3.cross_attn.v_img.weight": "blocks.3.attn2.add_v_proj.weight",
        "blocks.3.cross_attn.norm_k_img.weight": "blocks.3.attn2.norm_added_k.weight",
        "img_emb.proj.0.weight": "condition_embedder.image_embedder.norm1.weight",
        "img_emb.proj.1.bias": "condition_embedder.image_embedder.ff.net.0.proj.bias",
        "img_emb.proj.3.weight": "condition_embedder.image_embedder.ff.net.2.weight",
        "img_emb.proj.4.bias": "condition_embedder.image_embedder.norm2.bias",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    }
    assert {name: convert.rename(name) for name in names} == names


# How each project's file looks from outside.
FILES = {
    "self-forcing": lambda w: {"generator": {}, "generator_ema": {f"model.{k}": v for k, v in w.items()}},
    "self-forcing, not averaged": lambda w: {"generator": {f"model.{k}": v for k, v in w.items()}},
    "causvid": lambda w: {"generator": {f"model._fsdp_wrapped_module.{k}": v for k, v in w.items()}},
    "fsdp inside": lambda w: {
        "generator_ema": {f"model.{k.replace('blocks.0.', 'blocks.0._fsdp_wrapped_module.')}": v for k, v in w.items()}
    },
    "light-forcing": lambda w: {"generator_ema": {f"model.{k}": v for k, v in w.items()}, "step": 1000},
    "averages that have not begun": lambda w: {"generator_ema": {}, "generator": w},
    "plain": lambda w: w,
}


@pytest.mark.parametrize("kind", FILES)
def test_every_wrapper_is_taken_off(kind: str, tmp_path: Path) -> None:
    weights, transformer = tiny_weights(), tiny_transformer()
    content = FILES[kind](weights)
    if kind.startswith("self-forcing") and "generator_ema" in content:
        content["generator"] = {f"model.{k}": torch.zeros_like(v) for k, v in weights.items()}
    torch.save(content, tmp_path / "model.pt")
    convert.load_checkpoint(transformer, tmp_path / "model.pt")
    own = transformer.state_dict()
    assert len(own) == len(weights)
    for name, value in weights.items():
        assert torch.equal(own[convert.rename(name)], value)


def test_files_of_old_torch_and_files_of_something_else(tmp_path: Path) -> None:
    weights = tiny_weights()
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert convert.read(tmp_path / "old.pt").keys() == weights.keys()
    for content in ([torch.ones(1)], torch.ones(2), {"step": 1}, {"generator": {}}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ModelError, match="holds no weights"):
            convert.read(tmp_path / "other.pt")


def test_safetensors_too(tmp_path: Path) -> None:
    weights, transformer = tiny_weights(), tiny_transformer()
    save_file({f"model.{name}": value for name, value in weights.items()}, tmp_path / "model.safetensors")
    convert.load_checkpoint(transformer, tmp_path / "model.safetensors")
    assert torch.equal(transformer.proj_out.weight, weights["head.head.weight"])


def test_hybrid_forcing_has_one_projection_more(tmp_path: Path) -> None:
    weights = tiny_weights()
    extra = {f"blocks.{n}.self_attn.linear_proj.{part}": torch.ones(1) for n in (0, 1) for part in ("weight", "bias")}
    torch.save({"generator_ema": weights | extra}, tmp_path / "model.pt")
    found = convert.load_checkpoint(tiny_transformer(), tmp_path / "model.pt")
    assert set(found.linear) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    "style", ["base_model.model.model.{}.lora_{}.weight", "base_model.model.{}.lora_{}.default.weight"]
)
def test_longlive_is_a_lora_on_every_linear_of_the_blocks(style: str, tmp_path: Path) -> None:
    base = tiny_weights()
    torch.save({"generator": base}, tmp_path / "base.pt")
    linear = [n.removesuffix(".weight") for n, v in base.items() if n.startswith("blocks") and v.ndim == 2]
    generator = torch.Generator().manual_seed(2)
    lora, expected = {}, {}
    for name in linear:
        out, into = base[f"{name}.weight"].shape
        a, b = torch.randn(4, into, generator=generator), torch.randn(out, 4, generator=generator)
        lora |= {style.format(name, "A"): a, style.format(name, "B"): b}
        expected[name] = base[f"{name}.weight"] + b @ a
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    transformer = tiny_transformer()
    convert.load_checkpoint(transformer, tmp_path / "base.pt")
    assert convert.load_lora(transformer, tmp_path / "lora.pt") == len(linear) == 2 * 10
    own = transformer.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(own[convert.rename(f"{name}.weight")], value)
    convert.load_checkpoint(transformer, tmp_path / "base.pt")
    convert.load_lora(transformer, tmp_path / "lora.pt", alpha=2)
    name = linear[0]
    half = base[f"{name}.weight"] + 0.5 * (expected[name] - base[f"{name}.weight"])
    torch.testing.assert_close(transformer.state_dict()[convert.rename(f"{name}.weight")], half)


class Harmful:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code ran')",))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"generator": tiny_weights(), "config": Harmful()}, tmp_path / "model.pt")
    with pytest.raises(ModelError, match="could not be read safely"):
        convert.read(tmp_path / "model.pt")
    (tmp_path / "other.pt").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ModelError, match="could not be read safely"):
        convert.read(tmp_path / "other.pt")


def test_another_model_is_refused_before_anything_changes(tmp_path: Path) -> None:
    transformer, weights = tiny_transformer(), tiny_weights()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    cases = {
        "lacks 1": {name: value for name, value in weights.items() if name != "head.modulation"},
        "names that Wan does not use": weights | {"vae.conv.weight": torch.ones(2)},
        "other sizes": weights | {"head.modulation": torch.ones(1, 2, 25)},
        "holds no weights": {"step": torch.tensor(3).item()},
        "two models": weights | {"proj_out.weight": torch.ones(1)},
    }
    for says, content in cases.items():
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(ModelError, match=says):
            convert.load_checkpoint(transformer, tmp_path / "model.pt")
    torch.save({"blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 24)}, tmp_path / "lora.pt")
    with pytest.raises(ModelError, match="one of the two"):
        convert.load_lora(transformer, tmp_path / "lora.pt")
    pair = {
        "blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 7),
        "blocks.0.self_attn.q.lora_B.weight": torch.ones(24, 4),
    }
    torch.save(pair, tmp_path / "lora.pt")
    with pytest.raises(ModelError, match="does not fit"):
        convert.load_lora(transformer, tmp_path / "lora.pt")
    with pytest.raises(ModelError, match="not a file"):
        convert.read(tmp_path / "nothing.pt")
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
