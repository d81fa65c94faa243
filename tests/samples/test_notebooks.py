"""The notebooks run, with a model of nothing; what is kept of their last run is whole and small."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).parents[2] / "samples" / "notebooks"
SETTINGS: dict[str, dict[str, Any]] = {
    "long_video": {"FRAMES": 29, "SIDE": 64},
    "switch_prompts": {"BEFORE": 2, "AFTER": 2, "SIDE": 64},
}


@pytest.fixture(scope="module")
def execute() -> Any:
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal transformer of one layer; the rest is wan-tiny's."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("causal")
    WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=24, in_channels=48, out_channels=48,
        text_dim=64, freq_dim=32, ffn_dim=48, num_layers=1, cross_attn_norm=True, rope_max_seq_len=64,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    (folder / "rollout.json").write_text(json.dumps({"chunk": 2, "window": 6, "sink": 0, "steps": [1000, 500]}))
    return folder


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def kinds(notebook: dict[str, Any]) -> list[str]:
    """What the outputs are, in order."""
    return [next(iter(output.get("data", {"text": 0}))) for output in outputs(notebook)]


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_notebook_runs_and_what_it_shows_is_kept(execute: Any, model: Path, name: str) -> None:
    file = FOLDER / f"{name}.ipynb"
    made = execute.run(file, {**SETTINGS[name], "MODEL": str(model)})
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kinds(made) == kinds(kept)
    assert {"text/html", "image/jpeg", "text"} == set(kinds(kept))
    assert [cell["source"] for cell in made["cells"]] == [cell["source"] for cell in kept["cells"]]
    assert file.stat().st_size < 2**18
    for output in outputs(kept):
        if "image/jpeg" in output.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/jpeg"])))
            assert len(picture.getcolors(2**24) or ()) > 50
        if "text/html" in output.get("data", {}):
            assert output["data"]["text/html"].count("<polyline") >= 3
    assert not any(str(Path.home()) in json.dumps(output) for output in outputs(kept))


def test_a_prompt_that_switches_comes_back_to_the_moment(execute: Any, model: Path) -> None:
    made = execute.run(FOLDER / "switch_prompts.ipynb", {**SETTINGS["switch_prompts"], "MODEL": str(model)})
    assert "".join(outputs(made)[-1]["text"]) == "True\n"


def test_an_unknown_setting_is_named(execute: Any) -> None:
    with pytest.raises(KeyError, match="NOTHING"):
        execute.run(FOLDER / "long_video.ipynb", {"NOTHING": 1})
