"""Every mistake a user can make: one line that names what is possible, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vidaccel.cli.batch import read_prompts
from vidaccel.errors import VidaccelError
from vidaccel.patterns import PATTERNS
from vidaccel.render import video

FRAMES = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3)).astype(np.uint8)
RED = ("render", "--prompt", "a red circle")


@pytest.fixture
def copy(wan: Path, tmp_path: Path) -> Path:
    """A model of one's own, to be broken."""
    folder = tmp_path / "copy"
    shutil.copytree(wan, folder)
    return folder


@pytest.fixture
def record(invoke: Callable, wan: Path) -> dict:
    from vidaccel.recipe import Recipe

    return {
        "vidaccel": 1,
        "job": {"prompt": "x", "seed": 1, "device": "cpu"},
        "model": {"reference": str(wan), "revision": None},
        "recipe": Recipe.load("wan-tiny").to_dict(),
    }


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--height", "70"], 2, ["height 70", "multiples of 16", "64 and 80"]),
        (["--width", "0"], 2, ["width 0", "nearest: 16"]),
        (["--frames", "10"], 2, ["10 frames", "4k+1", "9 and 13"]),
        (["--frames", "-3"], 2, ["4k+1", "nearest: 1"]),
        (["--height", "16384"], 2, ["too large", "256"]),
        (["--density", "0"], 2, ["density 0", "(0, 1]"]),
        (["--density", "1.5"], 2, ["density 1.5", "(0, 1]"]),
        (["--density", "nan"], 2, ["(0, 1]"]),
        (["--density", "0.3"], 2, ["--attention radial"]),
        (["--attention", "spiral"], 2, ["'spiral'", "dense", "radial"]),
        (["--attention", "nowhere:Spiral"], 2, ["nowhere:Spiral", "imported"]),
        (["--attention", "dense", "--density", "0.3"], 2, ["dense"]),
        (["--recipe", "nothing"], 2, ["'nothing'", "wan-tiny"]),
        (["--recipe", "nothing.yaml"], 2, ["nothing.yaml"]),
        (["--recipe", "wan-tiny", "--set", "attention.colour=red"], 2, ["attention.colour", "attention.block"]),
        (["--recipe", "wan-tiny", "--set", "attention.block"], 2, ["key=value"]),
        (["--recipe", "wan-tiny", "--set", "attention.block=17"], 2, ["17", "128"]),
        (["--recipe", "wan-tiny", "--dense-steps", "many"], 2, ["--dense-steps", "'many'"]),
        (["--attention", "topk"], 2, ["topk has no density of its own", "--density"]),
        (["--attention", "union"], 2, ["union needs parts", "--set attention.parts="]),
        (["--cache", "replay"], 2, ["replay needs computed", "--set cache.computed="]),
        (["--cache", "replay", "--set", "cache.colour=red"], 2, ["'colour'", "computed"]),
        (["--steps", "0"], 2, ["num_inference_steps 0", "1 to 1000"]),
        (["--guidance", "nan"], 2, ["guidance_scale"]),
        (["--fps", "0"], 2, ["fps"]),
        (["--seed", "-1"], 2, ["seed -1"]),
        (["--dtype", "int4"], 2, ["'int4'", "bfloat16"]),
        (["--dtype", "float16", "--device", "cpu"], 2, ["float16", "float32"]),
        (["--device", "tpu"], 2, ["'tpu'", "cpu"]),
        (["--offload", "moon"], 2, ["'moon'", "sequential"]),
        (["--offload", "model", "--device", "cpu"], 2, ["needs a GPU"]),
        (["--dense-backend", "magic"], 2, ["'magic'", "native", "xformers"]),
        (["--image", __file__], 2, ["takes no image", "image-to-video"]),
        (["--strength", "0.5"], 2, ["strength", "video"]),
        (["--video", "missing.mp4"], 2, ["missing.mp4"]),
        (["-o", "out.avi"], 2, ["out.avi", ".mp4"]),
        (["--frames", "x"], 2, ["--frames"]),
        (["--colour", "red"], 2, ["--colour"]),
        (["--format", "xml"], 2, ["human"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_options(
    invoke: Callable, failed: Callable, wan: Path, tmp_path: Path, options: list[str], status: int, words: list[str]
) -> None:
    failed(invoke(*RED, "--model", wan, *options), status, *words)
    assert not list(tmp_path.iterdir())


# A pattern, what is set wrongly, and the nearest that would be right on the 9x16x16 tokens of wan-tiny.
WRONG = [
    ("ann", ["density=0.01"], "ask for 0.111 or more"),
    ("ann", ["attention.bits=99"], "give 1 to 8"),
    ("flashblock", ["density=0.1"], "one in 5, take 0.200 already; ask for more, or for every=20"),
    ("freeswim", ["attention.native=[0,4]"], "2 whole numbers from 1 on"),
    ("freeswim", ["attention.sink_frames=10"], "give 0 to 9"),
    ("light-forcing", ["attention.keep_frames=99"], "it lies in 4 to 9"),
    ("light-forcing", ["density=0.01"], "ask for 0.056 or more"),
    ("neighborhood", ["attention.window=[10,3,3]"], "use 9, or 0 for the whole axis"),
    ("neighborhood", ["attention.window=[3,9,9]", "attention.dilation=[1,8,1]"], "room for 2 with dilation 8; use 2"),
    ("neighborhood", ["attention.dilation=[10,1,1]"], "at most 9 fits"),
    ("neighborhood", ["density=0.0001"], "they have 0.000434 to 1"),
    ("per-head", ["attention.heads=[0,2]", "attention.parts=[radial,topk]"], "0 to 1, and each part a head"),
    ("per-layer", ["attention.layers={1: topk}"], "begins at layer 0"),
    ("pyramid", ["density=0.01"], "ask for 0.222 or more"),
    ("radial", ["attention.decay=-1"], "finite number from 0"),
    ("radial", ["attention.rule=released", "density=0.1"], "it reaches 0.877 to 0.877"),
    ("sliding-window", ["attention.window=[3,9,9]"], "there are 2 tiles of 2x8x8; use 2, or 0"),
    ("sliding-window", ["attention.window=99"], "use 18, or 0 for all"),
    ("svg", ["density=0.01"], "ask for 0.167 or more"),
    ("tempcache", ["density=0.01"], "ask for 0.111 or more"),
    ("topk", ["density=0.01"], "ask for 0.167 or more"),
    ("topk", ["attention.top_p=2"], "such as 0.9"),
    ("union", ["attention.parts=[topk,svg]"], "drop one"),
]


@pytest.mark.parametrize(("pattern", "wrong", "words"), WRONG, ids=lambda value: "".join(value))
def test_parameters_that_do_not_fit(
    invoke: Callable, failed: Callable, pattern: str, wrong: list[str], words: str
) -> None:
    """In a second, before any weight is loaded."""
    settings = [word for setting in wrong for word in ("--set", setting)]
    failed(invoke(*RED, "--attention", pattern, *settings), 2, words)


def test_every_pattern_has_parameters_that_do_not_fit() -> None:
    assert {pattern for pattern, *_ in WRONG} == set(PATTERNS) - {"dense"}


def test_bad_models(invoke: Callable, failed: Callable, tmp_path: Path) -> None:
    failed(invoke(*RED, "--model", "wan-huge"), 2, "wan-huge", "wan-tiny", "hub id")
    failed(invoke(*RED, "--model", "nobody/nothing"), 1, "nobody/nothing", "hub", "wan-tiny")
    failed(invoke(*RED, "--model", "/dev/null"), 2, "/dev/null", "wan-tiny")
    (tmp_path / "empty").mkdir()
    failed(invoke(*RED, "--model", "empty"), 2, "model_index.json", "wan-tiny")
    failed(invoke(*RED, "--model", "../../etc/passwd"), 2, "possible")


def test_prompts_that_are_none(invoke: Callable, failed: Callable, wan: Path, tmp_path: Path) -> None:
    failed(invoke("render"), 2, "--prompt", "--prompts")
    failed(invoke("render", "--prompt", "  ", "-m", wan), 2, "empty")
    failed(invoke("render", "--prompts", "missing.txt", "-m", wan), 2, "missing.txt")
    (tmp_path / "none.txt").write_text("# nothing\n\n")
    failed(invoke("render", "--prompts", "none.txt", "-m", wan), 2, "0 prompts")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    failed(invoke("render", "--prompts", "binary.txt", "-m", wan), 2, "UTF-8")
    failed(invoke("render", "--prompt", "x", "--prompts", "none.txt"), 2, "either")


def test_prompts_of_an_editor_that_marks_its_files(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# a comment\na red circle\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "prompts.txt") == ["a red circle"]


def test_prompts_too_long_for_a_record_are_told_before_any_is_rendered(
    invoke: Callable, failed: Callable, wan: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text(f"a red circle\n{'long ' * 12_000}\n")
    failed(invoke("render", "--prompts", "prompts.txt", "-m", wan, "--attention", "dense"), 2, "'long long", "shorten")
    failed(invoke("render", "--prompt", "long " * 12_000, "-m", wan), 2, "'long long", "shorten")
    assert not (tmp_path / "out").exists()


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_pickled_weights_are_refused_unread(invoke: Callable, failed: Callable, copy: Path, tmp_path: Path) -> None:
    import pickle

    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    weights = copy / "transformer" / "diffusion_pytorch_model.bin"
    weights.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    failed(invoke(*RED, "-m", copy), 2, "diffusion_pytorch_model.bin", "safetensors")
    weights.unlink()
    failed(invoke(*RED, "-m", copy), 2, "transformer has no weights")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights at all")
    failed(invoke(*RED, "-m", copy), 1, "could not be loaded")
    assert not (tmp_path / "exploded").exists()
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, ["FluxTransformer2DModel", "WanTransformer3DModel"]),
        ({"transformer": None}, ["no transformer", "WanTransformer3DModel"]),
        ({"vae": ["subprocess", "Popen"]}, ["subprocess", "diffusers and transformers"]),
        ({"../vae": ["diffusers", "AutoencoderKLWan"]}, ["../vae"]),
        ({"_class_name": "MysteryPipeline"}, ["MysteryPipeline"]),
        ({"_class_name": "AutoencoderKLWan"}, ["AutoencoderKLWan"]),
        ({"_class_name": 7}, ["no pipeline class"]),
    ],
    ids=str,
)
def test_index_of_a_model(invoke: Callable, failed: Callable, copy: Path, change: dict, words: list[str]) -> None:
    index = json.loads((copy / "model_index.json").read_text()) | change
    (copy / "model_index.json").write_text(json.dumps(index))
    (copy / "defaults.json").unlink()
    result = invoke(*RED, "-m", copy)
    failed(result, result.exit_code or -1, *words)


@pytest.mark.parametrize(
    "text", ["[]", "{", "[" * 100_000, '{"patch_size": [1, 0, 2]}', '{"patch_size": "big"}'], ids=range(5)
)
def test_config_of_a_model(invoke: Callable, failed: Callable, copy: Path, text: str) -> None:
    (copy / "transformer" / "config.json").write_text(text)
    failed(invoke(*RED, "-m", copy), 2, "config")


HOSTILE = {
    "code": "attention: !!python/object/apply:os.system [touch exploded]",
    "module": "attention: {name: 'os:system'}",
    "unknown": "attention: radial\nsecrets: yes",
    "bomb": "a: &a [x, x]\nattention: [*a, *a]",
    "deep": "attention: " + "[" * 2_000,
    "list": "[1, 2, 3]",
    "kinds": "attention: radial\nschedule: {dense_steps: [1]}",
    "layers": "attention: radial\nschedule: {dense_layers: [a, b]}",
    "branch": "attention: radial\nschedule: {branch: {uncond: x}}",
    "infinite": "attention: {name: radial, decay: .inf}",
    "negative": "attention: radial\ndensity: -0.5",
    "long": "attention: radial\nabout: " + "x" * 100_000,
    "bytes": "attention: \x00\x01",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_recipes(invoke: Callable, failed: Callable, wan: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "recipe.yaml").write_text(HOSTILE[name])
    failed(invoke(*RED, "-m", wan, "--recipe", "recipe.yaml"), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_records(invoke: Callable, failed: Callable, wan: Path, name: str, record: dict) -> None:
    import yaml

    try:
        recipe = (
            yaml.safe_load(HOSTILE[name]) if name not in ("deep", "long") else {"attention": HOSTILE[name][:50_000]}
        )
    except yaml.YAMLError:
        recipe = HOSTILE[name]
    video.write(Path("bad.mp4"), FRAMES, 8, record | {"recipe": recipe})
    failed(invoke("rerun", "bad.mp4"), 2)


@pytest.mark.parametrize(
    "change",
    [
        {"vidaccel": 2},
        {"job": None},
        {"job": {"prompt": "x", "seed": 1, "__class__": "os"}},
        {"job": {"prompt": ["x"], "seed": 1}},
        {"job": {"prompt": "x", "seed": "1"}},
        {"job": {"prompt": "x", "seed": 1, "image": "/dev/zero"}},
        {"job": {"prompt": "x", "seed": 1, "height": 17}},
        {"model": {"reference": "nobody/nothing", "revision": "../../x"}},
        {"model": {"reference": "\x1b[2J"}},
        {"model": {"reference": "/nowhere"}},
        {"model": {"reference": 5}},
    ],
    ids=str,
)
def test_bad_records(invoke: Callable, failed: Callable, record: dict, change: dict) -> None:
    video.write(Path("bad.mp4"), FRAMES, 8, record | change)
    result = invoke("rerun", "bad.mp4")
    failed(result, 2)
    assert "\x1b" not in result.output
    assert not Path("bad.rerun.mp4").exists()


@pytest.mark.parametrize("command", ["render", "explain", "demo"])
def test_an_empty_prompt(invoke: Callable, failed: Callable, command: str) -> None:
    failed(invoke(command, "--prompt", " "), 2, "the prompt is empty")


def test_files_without_a_record(invoke: Callable, failed: Callable, tmp_path: Path) -> None:
    failed(invoke("rerun", "missing.mp4"), 2, "missing.mp4", "no such file")
    (tmp_path / "text.mp4").write_text("#EXTM3U\nfile:///etc/passwd\n")
    failed(invoke("rerun", "text.mp4"), 1, "not an mp4")
    video.write(tmp_path / "list.mp4", FRAMES, 8, {})
    failed(invoke("rerun", "list.mp4"), 2, "version")


def test_existing_files_stay(invoke: Callable, failed: Callable, wan: Path, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("precious")
    failed(invoke(*RED, "-m", wan, "-o", "out.mp4"), 2, "out.mp4", "--overwrite")
    assert (tmp_path / "out.mp4").read_text() == "precious"


def test_no_permission(invoke: Callable, failed: Callable, wan: Path, tmp_path: Path) -> None:
    # Modes do not stop root, a file in the path stops everybody.
    (tmp_path / "file").write_text("x")
    failed(invoke(*RED, "-m", wan, "-o", "file/out.mp4"), 1, "file/out.mp4", "-o")
    if Path("/proc/self").exists():
        failed(invoke(*RED, "-m", wan, "-o", "/proc/out.mp4"), 1, "/proc/out.mp4")
    # Told before the render, not after it.
    failed(invoke(*RED, "-m", wan, "-o", "out.mp4", "--report", "file"), 1, "file/report.json", "--report")
    failed(invoke("tune", "-t", "2x", "-o", "file/tune"), 1, "file/tune", "-o")
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_output_that_cannot_be_written(tmp_path: Path, environment: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vidaccel", "presets"],
            cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "error: the output could not be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's")
def test_full_disk(start: Callable, wan: Path, tmp_path: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    process = start(*RED, "-m", wan, "--attention", "dense", "-o", "out.mp4", "--format", "quiet", preexec_fn=limit)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    assert errors.startswith("error: out.mp4 could not be written")
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_full_device() -> None:
    with pytest.raises(VidaccelError, match="could not be written"):
        video.write(Path("/dev/full/out.mp4"), FRAMES, 8, {})


def test_long_records(tmp_path: Path) -> None:
    with pytest.raises(VidaccelError, match="shorten the prompt"):
        video.write(tmp_path / "out.mp4", FRAMES, 8, {"prompt": "x" * 100_000})
    assert not list(tmp_path.iterdir())
