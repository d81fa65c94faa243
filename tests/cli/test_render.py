"""Rendering: the pipeline's own frames, a record that makes them again, prompts files, formats, guards."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vidaccel
from vidaccel.cli.progress import StepBar
from vidaccel.errors import VidaccelError
from vidaccel.recipe import Recipe
from vidaccel.render import RenderJob, StepDone, find, open_pipeline, render, video, weights

# A grid of 3x4x4 tokens shows a pattern only in small blocks.
SPARSE = [
    "--attention",
    "radial",
    "--density",
    "0.5",
    "--set",
    "attention.block=16",
    "--dense-steps",
    "1",
    "--dense-layers",
    "0",
]
RED = ["render", "--prompt", "a red circle", "--seed", "7"]
RECIPE = Recipe.from_dict(
    {"attention": {"name": "radial", "block": 16}, "density": 0.5, "schedule": {"dense_steps": 1}}
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_render_is_the_pipeline_itself(wan: Path) -> None:
    model = find(str(wan))
    job = RenderJob("a red circle", str(wan), RECIPE, negative_prompt="blue", seed=5).complete(model)
    pipe = open_pipeline(job, model)
    steps: list[StepDone] = []
    found = render(pipe, job, steps.append)

    with vidaccel.accelerate(pipe, recipe=RECIPE):
        by_hand = pipe(
            "a red circle",
            "blue",
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=3,
            guidance_scale=3.0,
            max_sequence_length=16,
            generator=torch.Generator("cpu").manual_seed(5),
            output_type="np",
        ).frames[0]
    assert np.array_equal(found.frames, video.to_uint8(by_hand))
    assert "decode" not in vars(pipe.vae)
    assert [step.density is None for step in steps] == [True, False, False]
    assert [step[:2] for step in steps] == [(0, 3), (1, 3), (2, 3)]
    assert 0 < found.seconds["denoise"] < found.seconds["total"]
    assert 0 < found.seconds["decode"] < found.seconds["total"]


@pytest.mark.parametrize("options", [[], SPARSE], ids=["alone", "with radial"])
def test_cache(invoke: Callable, wan: Path, tmp_path: Path, options: list[str]) -> None:
    """The memory that it takes is told before it starts."""
    cached = (*RED, "-m", wan, *options, "--cache", "taylorseer", "--steps", "10")
    planned = json.loads(invoke(*cached, "--dry-run", "--format", "json").stdout)["cache_gib"]
    made = invoke(*cached, "-o", "a.mp4", "--report", "told")
    assert made.exit_code == 0, made.output
    assert f"cache taylorseer holds at most {planned:.3g} GiB" in made.stderr
    held = json.loads((tmp_path / "told" / "report.json").read_text())["summary"]["cache_bytes"]
    assert held == round(planned * 2**30) > 0
    assert video.read_record(tmp_path / "a.mp4")["recipe"]["cache"]["name"] == "taylorseer"
    assert invoke("rerun", "a.mp4", "--strict").exit_code == 0


@pytest.mark.parametrize("options", [[], ["--attention", "dense"]], ids=["no attention", "dense"])
def test_a_cache_over_its_limit_is_refused_before_the_model_is_loaded(
    invoke: Callable, wan: Path, options: list[str]
) -> None:
    cached = (*RED, "-m", wan, *options, "--cache", "cg-taylor", "--steps", "10")
    made = invoke(*cached, "--set", "cache.max_gib=0.00001")
    assert made.exit_code == 1, made.output
    assert "more than its limit of 1e-05 GiB" in made.stderr
    assert "loading" not in made.stderr


def test_a_pattern_that_cannot_help_is_told_before_the_run(invoke: Callable, wan: Path) -> None:
    options = ("--attention", "neighborhood", "--set", "attention.block=64", "--density", "0.5", "--steps", "4")
    made = invoke(*RED, "-m", wan, *options, "-o", "a.mp4")
    assert made.exit_code == 0, made.output
    note = made.stderr.index("note: neighborhood cannot help on a 3x4x4 grid")
    assert note < made.stderr.index("loading")


def test_who_insists_has_a_pattern_that_would_lose(invoke: Callable, wan: Path) -> None:
    options = ("--attention", "neighborhood", "--set", "attention.block=64", "--density", "0.5", "--steps", "8")
    plain, forced = (
        json.loads(invoke(*RED, "-m", wan, *options, *more, "--dry-run", "--format", "json").stdout)
        for more in ((), ("--even-if-slower",))
    )
    assert plain["effective_density"] == 1
    assert any("Dense attention runs instead" in note for note in plain["notes"])
    assert forced["effective_density"] < 1
    assert not any("Dense attention runs instead" in note for note in forced["notes"])


def test_few_steps_are_told_before_the_run(invoke: Callable, wan: Path) -> None:
    few, many = (
        invoke(*RED, "-m", wan, "--cache", "cg-taylor", "--steps", steps, "--dry-run", "--format", "json")
        for steps in (4, 9)
    )
    assert any("4 steps are too few for caching to help" in note for note in json.loads(few.stdout)["notes"])
    assert not json.loads(many.stdout)["notes"]


def test_unknown_cache_names_those_there_are(invoke: Callable, failed: Callable, wan: Path) -> None:
    failed(invoke(*RED, "-m", wan, "--cache", "tailor"), 2, "'tailor'", "cg-taylor")


@pytest.mark.parametrize("options", [SPARSE, ["--attention", "dense"]], ids=["sparse", "dense"])
def test_rerun_is_bit_equal(invoke: Callable, wan: Path, tmp_path: Path, options: list[str]) -> None:
    made = invoke(*RED, "-m", wan, *options, "-o", "a.mp4", "--negative-prompt", "blue; a=b\\c")
    assert made.exit_code == 0, made.output
    again = invoke("rerun", "a.mp4", "--strict")
    assert again.exit_code == 0, again.output
    assert again.stdout == "a.rerun.mp4: frames are identical\n"
    assert "warning" not in again.stderr
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "a.rerun.mp4").read_bytes()
    assert names(tmp_path) == ["a.mp4", "a.rerun.mp4"]


def test_record_of_a_video(invoke: Callable, wan: Path, tmp_path: Path) -> None:
    assert invoke(*RED, "-m", wan, *SPARSE, "-o", "a.mp4", "--report", "report").exit_code == 0
    record = video.read_record(tmp_path / "a.mp4")
    assert Recipe.from_dict(record["recipe"]) == Recipe.load("wan-tiny").from_dict(record["recipe"])
    assert record["recipe_hash"] == Recipe.from_dict(record["recipe"]).hash
    assert record["recipe"]["attention"]["block"] == 16
    assert (
        record["job"] | {"prompt": "a red circle", "seed": 7, "height": 64, "fps": 8, "dtype": "float32"}
        == record["job"]
    )
    assert record["model"]["reference"] == str(wan)
    assert record["model"]["fingerprint"] == weights.fingerprint(find(str(wan)))
    assert record["versions"]["torch"] == torch.__version__
    assert video.read_frames(tmp_path / "a.mp4", 99).shape == (9, 64, 64, 3)
    assert names(tmp_path / "report") == ["report.html", "report.json", "report.md"]


def test_rerun_sees_what_changed(invoke: Callable, failed: Callable, wan: Path, tmp_path: Path) -> None:
    assert invoke(*RED, "-m", wan, *SPARSE, "-o", "a.mp4").exit_code == 0
    record = video.read_record(tmp_path / "a.mp4")
    record["frames_sha256"] = "0" * 64
    record["versions"]["torch"] = "0.0.1"
    record["model"]["fingerprint"] = "0" * 16
    video.write(tmp_path / "b.mp4", np.zeros((9, 64, 64, 3), np.uint8), 8, record)
    failed(invoke("rerun", "b.mp4", "-o", "c.avi"), 2, "c.avi", "mp4")
    result = invoke("rerun", "b.mp4", "-o", "c.mp4")
    assert result.exit_code == 0
    assert result.stdout == "c.mp4: frames differ\n"
    assert "torch was 0.0.1" in result.stderr
    assert "is not the model that made this video" in result.stderr
    failed(invoke("rerun", "b.mp4", "-o", "c.mp4"), 2, "c.mp4", "--overwrite")
    strict = invoke("rerun", "b.mp4", "-o", "c.mp4", "--overwrite", "--strict", "--format", "json")
    assert strict.exit_code == 1
    assert json.loads(strict.stdout)["identical"] is False


def test_rerun_dry_run_loads_nothing(invoke: Callable, wan: Path, tmp_path: Path) -> None:
    record = {
        "vidaccel": 1,
        "job": {"prompt": "x", "seed": 1},
        "model": {"reference": "somebody/elses", "revision": None},
        "recipe": RECIPE.to_dict(),
    }
    video.write(tmp_path / "a.mp4", np.zeros((5, 16, 16, 3), np.uint8), 8, record)
    result = invoke("rerun", "a.mp4", "--dry-run", "--format", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == record
    assert names(tmp_path) == ["a.mp4"]


def test_formats(invoke: Callable, wan: Path) -> None:
    quiet = invoke(*RED, "-m", wan, *SPARSE, "-o", "q.mp4", "--format", "quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "q.mp4\n", "")
    result = invoke(*RED, "-m", wan, *SPARSE, "-o", "j.mp4", "--format", "json")
    (made,) = json.loads(result.stdout)["videos"]
    assert made["file"] == "j.mp4"
    assert made["seed"] == 7
    assert made["requested_density"] == 0.5
    assert made["delivered_density"] < made["effective_density"] < 1
    assert made["seconds"]["denoise"] > 0
    assert "step 3/3, density 0." in result.stderr
    assert "step 1/3, density dense" in result.stderr
    assert Path("q.mp4").read_bytes() == Path("j.mp4").read_bytes()


def test_random_seed_is_recorded(invoke: Callable, wan: Path) -> None:
    seeds = set()
    for name in ("a.mp4", "b.mp4"):
        assert invoke("render", "-p", "x", "-m", wan, "--steps", "1", "-o", name).exit_code == 0
        seeds.add(video.read_record(Path(name))["job"]["seed"])
    assert len(seeds) == 2


def test_dry_run(invoke: Callable, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "load", None)
    result = invoke(*RED, "-m", wan, *SPARSE, "--dry-run", "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["grid"], data["tokens"]) == ("3x4x4", 48)
    assert (data["dense_steps"], data["sparse_steps"], data["sparse_layers"]) == (1, 2, 2)
    assert data["outputs"] == ["a-red-circle.mp4"]
    (plan,) = data["plans"]
    assert data["effective_density"] == pytest.approx((1 + 2 * plan["delivered"]) / 3)
    human = invoke(*RED, "-m", wan, *SPARSE, "--dry-run")
    assert "3x4x4 = 48 tokens" in human.stdout
    assert not names(tmp_path)


def test_dry_run_says_that_all_is_dense(invoke: Callable, wan: Path) -> None:
    result = invoke(*RED, "-m", wan, *SPARSE, "--dense-layers", "99", "--dry-run")
    assert "dense_layers=99 is all of the 2 layers" in result.output


def test_orders_are_told_in_words(invoke: Callable, wan: Path) -> None:
    options = [*RED, "-m", wan, "-a", "topk", "-d", "0.5", "--set", "attention.block=16", "--dry-run"]
    size = ["--frames", "25", "--height", "80", "--width", "176"]
    (plan,) = json.loads(invoke(*options, *size, "--format", "json").stdout)["plans"]
    assert plan["tile"] == "rods (1, 5)"


def test_a_cache_is_built_from_its_settings(invoke: Callable, wan: Path) -> None:
    """Replay has no usual values, so that its name alone is no policy."""
    options = [*RED, "-m", wan, "-c", "replay", "--set", "cache.computed=[0, 1, 2]", "--dry-run", "--format", "json"]
    for more in ([], ["-a", "dense"]):
        result = invoke(*options, *more)
        assert result.exit_code == 0, result.output
        recipe = json.loads(result.stdout)["recipe"]
        assert (recipe["cache"]["name"], recipe["cache"]["computed"]) == ("replay", [0, 1, 2])


def test_dry_run_tells_what_the_run_does(invoke: Callable, wan: Path) -> None:
    options = [*RED, "-m", wan, *SPARSE, "--dense-layers", "1", "--format", "json"]
    planned = json.loads(invoke(*options, "--dry-run").stdout)
    (made,) = json.loads(invoke(*options).stdout)["videos"]
    assert made["effective_density"] == pytest.approx(planned["effective_density"])
    assert made["visited_density"] == planned["plans"][0]["visited"]


def test_samples_start_from_their_own_preset(
    invoke: Callable, failed: Callable, wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidaccel._samples.path", lambda name: wan)
    options = [*RED, "--height", "128", "--width", "128", "--dry-run", "--format", "json"]
    plain = json.loads(invoke(*options).stdout)
    assert plain["model"]["kind"] == "sample"
    assert plain["recipe_hash"] == Recipe.load("wan-tiny").hash
    denser = json.loads(invoke(*options, "--density", "0.6", "--attention", "radial").stdout)
    assert denser["recipe"] == plain["recipe"] | {"density": 0.6}
    dense = json.loads(invoke(*options, "--attention", "dense").stdout)
    assert dense["effective_density"] == 1
    assert dense["plans"] == []
    failed(invoke(*RED, "--dry-run"), 2, "on a 3x4x4 grid", "run it dense")


PROMPTS = "# three\na red circle\n\nA Blue   square, moving!\nein grüner Kreis/../..\n"
FILES = ["001-a-red-circle.mp4", "002-a-blue-square-moving.mp4", "003-ein-grüner-kreis.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_prompts_resume_after_an_interruption(start: Callable, invoke: Callable, wan: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    options = ["render", "--prompts", "prompts.txt", "-m", wan, *SPARSE, "--steps", "8", "-o", "out"]
    process = start(*options)
    until = time.monotonic() + 120
    while not (tmp_path / "out" / FILES[0]).exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("error: terminated; ")
    assert "of 3 videos are finished; the same command goes on" in errors
    assert "Traceback" not in errors
    done = names(tmp_path / "out")
    assert FILES[0] in done
    assert set(done) < set(FILES)

    before = {name: (tmp_path / "out" / name).read_bytes() for name in done}
    result = invoke(*options, "--format", "json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)["videos"]
    assert [video["skipped"] for video in made] == [name in done for name in FILES]
    assert names(tmp_path / "out") == FILES
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in before.items())


def test_a_video_is_finished_only_with_its_report(
    invoke: Callable, failed: Callable, wan: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    options = ["render", "--prompts", "prompts.txt", "-m", wan, "--attention", "dense", "-o", "out", "--report", "to"]
    in_the_way = tmp_path / "to" / "001-a-red-circle"
    in_the_way.parent.mkdir()
    in_the_way.write_text("x")
    failed(invoke(*options), 1, "001-a-red-circle could not be")
    in_the_way.unlink()
    assert invoke(*options).exit_code == 0
    assert names(in_the_way) == ["report.html", "report.json", "report.md"]


def test_interrupted_from_the_keyboard(
    invoke: Callable, failed: Callable, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StepBar, "__call__", interrupt)
    failed(invoke(*RED, "-m", wan, *SPARSE, "-o", "out.mp4"), 130, "interrupted; nothing was written")
    assert not names(tmp_path)


def test_prompts_made_otherwise_are_not_replaced(invoke: Callable, failed: Callable, wan: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    options = ["render", "--prompts", "prompts.txt", "-m", wan, "--steps", "1", "-o", "out"]
    assert invoke(*options, "--seed", "1").exit_code == 0
    assert invoke(*options, "--seed", "1", "--format", "quiet").stdout == f"out/{FILES[0]}\n"
    before = (tmp_path / "out" / FILES[0]).read_bytes()
    failed(invoke(*options, "--seed", "2"), 2, "seed 1 rather than 2", "--overwrite")
    failed(invoke(*options, "--guidance", "2"), 2, "guidance_scale 3.0 rather than 2.0")
    failed(invoke(*options, *SPARSE), 2, "recipe")
    assert (tmp_path / "out" / FILES[0]).read_bytes() == before
    assert invoke(*options, "--seed", "2", "--overwrite").exit_code == 0
    assert video.read_record(tmp_path / "out" / FILES[0])["job"]["seed"] == 2
    failed(invoke(*options[:-1], "out.mp4"), 2, "needs a folder")


def change_weights(wan: Path, folder: Path, part: str, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    import shutil

    shutil.copytree(wan, folder)
    (file,) = (folder / part).glob("*.safetensors")
    save_file({name: change(name, weight) for name, weight in load_file(file).items()}, file, {"format": "pt"})
    return folder


def test_nan_is_an_error(invoke: Callable, failed: Callable, wan: Path, tmp_path: Path) -> None:
    broken = change_weights(wan, tmp_path / "model", "vae", lambda name, weight: weight * torch.nan)
    failed(
        invoke(*RED, "-m", broken, "-a", "dense", "-o", "out.mp4"), 1, "9 of 9 frames hold NaN", "no video was written"
    )
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    result = invoke("render", "--prompts", "prompts.txt", "-m", broken, "--steps", "1", "-o", "out")
    assert result.exit_code == 1
    assert "001-one.mp4" in result.stderr
    assert "2 of 2 renders failed" in result.stderr
    assert names(tmp_path) == ["model", "out", "prompts.txt"]
    assert not names(tmp_path / "out")


@pytest.mark.parametrize(("bias", "words"), [(0.0, "one flat colour"), (-1.0, "9 of 9 frames are black")])
def test_blank_frames_are_told(invoke: Callable, wan: Path, tmp_path: Path, bias: float, words: str) -> None:
    def blank(name: str, weight: torch.Tensor) -> torch.Tensor:
        return (
            torch.full_like(weight, bias)
            if name == "decoder.conv_out.bias"
            else weight * (name != "decoder.conv_out.weight")
        )

    broken = change_weights(wan, tmp_path / "model", "vae", blank)
    result = invoke(*RED, "-m", broken, "-a", "dense", "-o", "out.mp4", "--format", "json")
    assert result.exit_code == 0
    assert f"warning: out.mp4: {words}" in result.stderr.replace("all 9 frames are ", "")
    (made,) = json.loads(result.stdout)["videos"]
    assert words in made["problems"][0]
    assert video.read_record(tmp_path / "out.mp4")["problems"] == made["problems"]


def test_image_to_video(
    invoke: Callable, failed: Callable, wan_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    options = [
        "-p",
        "it moves",
        "-m",
        wan_image,
        "--steps",
        "2",
        "--max-sequence-length",
        "512",
        *SPARSE,
        "-o",
        "a.mp4",
    ]
    failed(invoke("render", *options), 2, "needs --image")
    assert invoke("render", *options, "--image", "red.png").exit_code == 0
    assert invoke("rerun", "a.mp4", "--strict").exit_code == 0
    (tmp_path / "red.png").rename(tmp_path / "moved.png")
    failed(invoke("rerun", "a.mp4", "--overwrite"), 2, "red.png")
    assert invoke("rerun", "a.mp4", "--overwrite", "--strict", "--image", "moved.png").exit_code == 0
    Image.new("RGB", (50, 40)).save(tmp_path / "red.png")
    result = invoke("rerun", "a.mp4", "--overwrite")
    assert result.exit_code == 2
    assert "is not the file that this video was made from" in result.stderr
    (tmp_path / "red.png").write_text("no image")
    # Before the weights are loaded.
    monkeypatch.setattr(weights, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    result = invoke("render", *options, "--image", "red.png", "--overwrite")
    assert result.exit_code == 2
    assert "red.png cannot be read" in result.stderr


def test_video_to_video(invoke: Callable, failed: Callable, wan: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3)).astype(np.uint8)
    video.write(tmp_path / "in.mp4", noise, 8, {})
    options = [*RED, "-m", wan, *SPARSE, "--video", "in.mp4", "--strength", "0.7", "-o", "a.mp4"]
    failed(invoke(*options, "--frames", "13", "--format", "quiet"), 2, "has 9 frames")
    assert invoke(*options).exit_code == 0
    assert invoke("rerun", "a.mp4", "--strict").exit_code == 0


def test_own_pattern_only_by_name_on_the_command_line(
    invoke: Callable, failed: Callable, wan: Path, tmp_path: Path
) -> None:
    (tmp_path / "my_patterns.py").write_text(
        "from dataclasses import dataclass\n"
        "from vidaccel.patterns import Radial\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Radial):\n"
        "    name = 'mine'\n"
    )
    options = ["--attention", "my_patterns:Mine"]
    made = invoke(*RED, "-m", wan, *options, *SPARSE[2:], "-o", "a.mp4")
    assert made.exit_code == 0, made.output
    assert video.read_record(tmp_path / "a.mp4")["recipe"]["attention"]["name"] == "mine"
    failed(invoke("rerun", "a.mp4"), 2, "'mine' is unknown")
    assert invoke("rerun", "a.mp4", *options, "--strict").exit_code == 0
    (tmp_path / "recipe.yaml").write_text("attention: my_patterns:Mine")
    failed(invoke(*RED, "-m", wan, "--recipe", "recipe.yaml"), 2, "unknown")


def test_dense_backend(invoke: Callable, failed: Callable, wan: Path) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    result = invoke(*RED, "-m", wan, *SPARSE, "--dense-backend", "_native_math", "-o", "a.mp4")
    assert result.exit_code == 0, result.output
    assert _AttentionBackendRegistry._active_backend == before
    missing = invoke(*RED, "-m", wan, *SPARSE, "--dense-backend", "_native_xla", "-o", "b.mp4")
    assert missing.exit_code == 1
    assert "error: dense backend _native_xla cannot run on cpu with float32: " in missing.stderr
    assert not Path("b.mp4").exists()


def test_full_memory_is_one_line(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = find(str(wan))
    job = RenderJob("x", str(wan), seed=1).complete(model)
    pipe = open_pipeline(job, model)

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(pipe.vae, "decode", full)
    with pytest.raises(VidaccelError, match="ran out of memory; try offload"):
        render(pipe, job)
    assert pipe.vae.decode is full


def test_another_process_makes_the_same_file(start: Callable, invoke: Callable, wan: Path, tmp_path: Path) -> None:
    assert invoke(*RED, "-m", wan, *SPARSE, "-o", "a.mp4").exit_code == 0
    process = start(*RED, "-m", wan, *SPARSE, "-o", "b.mp4", "--format", "quiet")
    assert process.communicate(timeout=120) == ("b.mp4\n", "")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
