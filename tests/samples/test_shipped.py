"""Every sample that ships draws what its reports say: four prompts again on this CPU, dense, sparse and cached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samples.models import MODELS, path
from samples.train import evaluate
from vidaccel.render import find, weights

SWEEPS = {"attention": "repeat.json", "caches": "repeat-caches.json"}
SHIPPED = sorted(name for name in set(MODELS.values()) if (path(name) / "model_index.json").is_file())
REPORTS = [(sweep, name, file) for sweep, file in SWEEPS.items() for name in SHIPPED]


@pytest.mark.slow
@pytest.mark.parametrize(("sweep", "name", "report"), REPORTS, ids=lambda value: value.removesuffix(".json"))
def test_four_prompts_come_out_as_in_the_report(sweep: str, name: str, report: str, tmp_path: Path) -> None:
    committed = json.loads((path(name) / "reports" / report).read_text())
    given, cells = committed["settings"], committed["cells"]
    options = {
        "--model": name,
        "--prompts": given["prompts"],
        "--seed": given["seed"],
        "--batch": given["batch"],
        "--frames": given["num_frames"],
        "--steps": given["num_inference_steps"],
        "--sweep": sweep,
        "--report": tmp_path / "report.json",
    }
    words = [str(word) for pair in options.items() for word in pair]
    evaluate.main([*words, "--only", *(cell for cell in cells if cell != "dense")])
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["settings"] == given
    assert list(again["cells"]) == list(cells)
    assert len(cells) >= 2
    for cell, before in cells.items():
        now = again["cells"][cell]
        assert now["answers"] == before["answers"], cell
        assert now.get("delivered_density") == before.get("delivered_density"), cell
        assert now["computed"] == before["computed"], cell
        if cell != "dense":
            assert now["psnr_to_dense"] == pytest.approx(before["psnr_to_dense"], abs=0.3), cell
            assert set(now.get("kernels", ())) == ({"cpu"} if sweep == "attention" else set()), cell


@pytest.mark.parametrize("name", sorted(name for name, folder in MODELS.items() if folder in SHIPPED))
def test_every_name_renders(name: str) -> None:
    model = find(name)
    assert model.kind == "sample"
    assert tuple(model.grid(256, 256, 33)) == (9, 16, 16)
    weights.check_weights(model, model.folder)
    assert {"num_inference_steps", "guidance_scale"} <= set(model.defaults())
