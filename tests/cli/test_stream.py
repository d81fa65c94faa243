"""`vidaccel render --stream`: a file that plays while it grows, with methods, interrupted, and what cannot be."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vidaccel.errors import RenderError, UsageError, VidaccelError, VideoError
from vidaccel.render import stream, video, weights
from vidaccel.render.video_stream import VideoStream


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer alone, random; the rest is wan-tiny's."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("causal")
    WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=24, in_channels=48, out_channels=48,
        text_dim=64, freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    (folder / "rollout.json").write_text(json.dumps({"chunk": 2, "window": 6, "sink": 1, "steps": [1000, 500]}))
    (folder / "defaults.json").write_text(json.dumps({"height": 64, "width": 64, "num_frames": 25, "fps": 12}))
    return folder


def test_a_saved_causal_pipeline_knows_its_rollout(model: Path, tmp_path: Path) -> None:
    pipe, _ = stream.open_stream(stream.StreamJob("a circle", str(model), device="cpu"))
    pipe.save_pretrained(tmp_path)
    assert stream.is_causal(str(tmp_path))
    loaded, job = stream.open_stream(stream.StreamJob("a circle", str(tmp_path), device="cpu"))
    assert loaded.rollout == pipe.rollout
    assert (job.height, job.fps) == (480, 16)
    other, _ = stream.open_stream(stream.StreamJob("a circle", str(tmp_path), rollout="longlive", device="cpu"))
    assert other.rollout.window == 12


def test_a_folder_that_is_dropped_in_is_the_sample(
    model: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ships is a transformer and two settings files; words, text encoder and VAE are wan-tiny's, without links."""
    monkeypatch.setitem(stream._samples.MODELS, "sample-causal", str(model))
    done = run("-m", "sample-causal", "-p", "a red circle", "--frames", 5, "-o", tmp_path / "a.mp4", "--format", "json")
    assert done.exit_code == 0, done.output
    assert video.read_frames(tmp_path / "a.mp4", 9).shape == (5, 64, 64, 3)
    stream.check_weights("sample-causal")
    from diffusers import WanTransformer3DModel

    from vidaccel.pipelines.causal_wan import CausalWanPipeline

    # The same by hand, as its card says.
    pipe = CausalWanPipeline.from_pretrained(
        stream._samples.path("wan-tiny"),
        transformer=WanTransformer3DModel.from_pretrained(model / "transformer"),
        rollout=json.loads((model / "rollout.json").read_text()),
        dtype=torch.float32,
    )
    assert pipe.rollout.window == 6
    assert pipe("a red circle", height=64, width=64, num_frames=5).frames.shape == (1, 5, 64, 64, 3)


def test_weights_are_checked_before_they_are_opened(model: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text((model / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(UsageError, match="no safetensors"):
        stream.check_weights(str(tmp_path))


@pytest.fixture
def run() -> Callable[..., Any]:
    def call(*arguments: object) -> Any:
        from vidaccel.cli.main import app

        return CliRunner().invoke(app, ["render", *map(str, arguments)])

    return call


def test_a_stream_is_a_video_with_its_record(model: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    done = run("-m", model, "-p", "a red circle", "--stream", "--seed", 3, "-o", out, "--format", "json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [chunk["frames"] for chunk in result["chunks"]] == [5, 13, 21, 25]
    frames = video.read_frames(out, 100)
    assert frames.shape == (25, 64, 64, 3)
    said = video.read_record(out)
    assert said["stream"]["seed"] == 3
    assert said["stream"]["rollout"]["window"] == 6
    # The same as the pipeline by hand, up to what the encoder loses.
    pipe, job = stream.open_stream(stream.StreamJob("a red circle", str(model), seed=3, device="cpu"))
    whole = pipe(
        "a red circle", height=64, width=64, num_frames=25, max_sequence_length=job.max_sequence_length,
        generator=torch.Generator().manual_seed(3),
    ).frames[0]  # fmt: skip
    assert video.psnr(video.to_uint8(whole), frames) > 30
    again = run("-m", model, "-p", "a red circle", "--seed", 3, "-o", out)
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    from vidaccel.cli.main import app

    rerun = CliRunner().invoke(app, ["rerun", str(out), "-o", str(tmp_path / "b.mp4")])
    assert rerun.exit_code == 2
    assert "this is a stream" in rerun.output + str(rerun.exception)


def test_methods_and_their_settings(model: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    arguments = ("-m", model, "-p", "a circle", "-o", out, "--method", "flashblock", "--method", "tempcache")
    more = ("--set", "flashblock.threshold=10", "--set", "tempcache.frames=2", "--frames", 17, "--seed", 1)
    done = run(*arguments, *more, "--format", "json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["reuse_rate"] == 1
    assert video.read_record(out)["methods"]["tempcache"]["frames"] == 2


def test_a_stream_begins_with_a_picture_or_goes_on_with_a_video(
    model: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    how = ("-m", model, "-p", "a circle", "--seed", 1, "--device", "cpu", "--format", "json")
    guided = ("--steps", 2, "--guidance", 3, "--negative-prompt", "a dog")
    done = run(*how, *guided, "--image", tmp_path / "red.png", "--frames", 9, "-o", tmp_path / "a.mp4")
    assert done.exit_code == 0, done.output
    first = video.read_frames(tmp_path / "a.mp4", 99)
    assert len(first) == 9
    assert video.read_record(tmp_path / "a.mp4")["stream"]["negative_prompt"] == "a dog"
    assert first[0, ..., 0].mean() > first[0, ..., 2].mean() + 50
    # Of 9 frames all go on, of 8 the last 5.
    for frames in (8, 9):
        video.write(tmp_path / "b.mp4", first[:frames], 12, {})
        done = run(*how, "--video", tmp_path / "b.mp4", "--frames", 25, "-o", tmp_path / f"{frames}.mp4")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["frames"] == 25
    whole = video.read_frames(tmp_path / "9.mp4", 99)
    assert video.psnr(whole[:9], first) > video.psnr(whole[-9:], first)
    done = run(*how, "--video", tmp_path / "b.mp4", "--frames", 9, "-o", tmp_path / "c.mp4")
    assert "ask for more with --frames" in done.output + str(done.exception)


def test_the_file_plays_before_the_stream_ends(tmp_path: Path) -> None:
    """What is on disk after the first chunk is a video already; so is what an error or a signal leaves."""
    path = tmp_path / "a.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    with VideoStream(path, (64, 64), 16, {"a": 1}) as file:
        file.write(frames)
        for _ in range(200):
            time.sleep(0.05)
            try:
                if len(video.read_frames(path, 10)) >= 4:
                    break
            except VideoError:
                pass
        else:
            pytest.fail("the first chunk cannot be played while the second one is made")
        file.write(frames)
    assert len(video.read_frames(path, 20)) == 10
    with VideoStream(path, (64, 64), 16, {}) as file:
        file.write(frames)
    assert len(video.read_frames(path, 20)) == 5


def test_an_interrupted_stream_keeps_its_chunks(model: Path, tmp_path: Path) -> None:
    pipe, job = stream.open_stream(stream.StreamJob("a circle", str(model), seed=3, device="cpu"))

    def stop(done: stream.ChunkDone) -> None:
        if done.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.stream(pipe, job, tmp_path / "a.mp4", stop)
    assert len(video.read_frames(tmp_path / "a.mp4", 100)) == 13


def test_a_file_is_replaced_when_the_first_chunk_is_there(model: Path, tmp_path: Path) -> None:
    pipe, job = stream.open_stream(stream.StreamJob("a circle", str(model), seed=3, device="cpu"))
    (tmp_path / "a.mp4").write_bytes(b"an older video")

    def interrupted(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    pipe.transformer.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        stream.stream(pipe, job, tmp_path / "a.mp4", lambda done: None)
    assert (tmp_path / "a.mp4").read_bytes() == b"an older video"


@pytest.mark.parametrize(("good", "says"), [(0, "no file was written"), (1, "the 5 frames before them are in")])
def test_frames_that_hold_nothing_end_a_stream(model: Path, tmp_path: Path, good: int, says: str) -> None:
    pipe, job = stream.open_stream(stream.StreamJob("a circle", str(model), seed=3, device="cpu"))

    def spoil(done: stream.ChunkDone | None) -> None:
        for weight in pipe.transformer.parameters():
            weight.data.fill_(torch.nan)

    if not good:
        spoil(None)
    with pytest.raises(RenderError, match=f"frames of chunk {good} hold NaN; {says}"):
        stream.stream(pipe, job, tmp_path / "a.mp4", spoil)
    assert (tmp_path / "a.mp4").exists() == bool(good)


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    frames = np.zeros((400, 64, 64, 3), np.uint8)
    with (
        pytest.raises(VideoError, match="could not be"),
        VideoStream(tmp_path / "no" / "a.mp4", (64, 64), 16, {}) as file,
    ):
        file.write(frames)
    with VideoStream(tmp_path / "a.mp4", (64, 64), 16, {}) as file:
        file.write(frames[:1])
        with pytest.raises(VideoError, match="video of"):
            file.write(np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--attention", "radial"), "--attention was given, which a stream"),
        (("--strength", "0"), "--strength was given, which a stream"),
        (("--density", "0.5", "--method", "flashblock"), "none of the methods has one"),
        (("--negative-prompt", "a dog"), "guidance is off"),
        (("--image", "a.png", "--video", "a.mp4"), "begins with one of them"),
        (("--image", "no.png"), "no.png was given, which is not a file"),
        (("--video", "no.mp4"), "no.mp4 was given, which is not a file"),
        (("--offload", "model"), "--offload model was given"),
        (("--offload", "cache"), "needs a GPU"),
        (("--steps", "0"), "steps 0 was asked for"),
        (("--steps", "-3"), "in 1 to 1000"),
        (("--steps", "5000"), "steps 5000 was asked for"),
        (("--guidance", "nan"), "guidance nan was asked for"),
        (("--max-sequence-length", "100000"), "in 1 to 4096"),
        (("--seed", "-1"), "seed -1 was asked for"),
        (("--seed", "99999999999999999999"), "seed 99999999999999999999 was asked for"),
        (("--frames", "0"), "num_frames 0 was asked for"),
        (("--fps", "0"), "fps 0.0 was asked for"),
        (("--method", "tempcache", "--set", "tempcache.frames=abc"), "it takes int"),
        (("--method", "tempcache", "--set", "tempcache.frames=1.5"), "it takes int"),
        (("--method", "flashblock", "--set", "flashblock.threshold=high"), "it takes float"),
        (("--method", "flashblock", "--set", "flashblock.calibrated=true"), "which only Python can give"),
        (("--method", "hybrid", "--set", "hybrid.linear=x"), "which only Python can give"),
        (("--method", "ann", "--set", "ann.block=0"), "block"),
        (("--method", "flashbock"), "flashblock"),
        (("--method", "flashblock", "--set", "flashblock.tau=1"), "threshold"),
        (("--set", "flashblock.threshold=1"), "none of the methods"),
        (("--rollout", "self-forced"), "longlive"),
        (("--frames", "24"), "21 or 25"),
        (("--height", "50"), "multiples of 16"),
        (("--graphs", "--device", "cpu"), "needs a GPU"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    model: Path, run: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    done = run("-m", model, "-p", "a circle", "-o", tmp_path / "a.mp4", *arguments)
    text = done.output + str(done.exception)
    assert done.exit_code == 2 or isinstance(done.exception, VidaccelError)
    assert says in text
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("option", ["--image", "--video"])
def test_a_beginning_is_looked_at_before_weights_load(
    model: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    (tmp_path / "torn").write_text("nothing of the kind")
    monkeypatch.setattr(weights, "load_as", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    done = run("-m", model, "-p", "a circle", "-o", tmp_path / "a.mp4", option, tmp_path / "torn")
    said = done.output + str(done.exception)
    assert "torn" in said
    assert "weights were loaded" not in said


def test_who_insists_has_blocks_chosen_where_dense_is_as_fast(model: Path, tmp_path: Path) -> None:
    ann = stream.methods_from(["ann"], {"ann.density": 0.9, "ann.block": 16})
    densities = []
    for forced in (False, True):
        job = stream.StreamJob("a circle", str(model), methods=ann, seed=1, device="cpu", even_if_slower=forced)
        made = stream.stream(*stream.open_stream(job), tmp_path / f"{forced}.mp4", lambda done: None)
        densities.append([chunk["density"] for chunk in made["chunks"]])
        assert any("by estimate" in chunk["note"] for chunk in made["chunks"]) != forced
    assert densities[0] == [1] * 4
    assert min(densities[1]) < 1


def test_graphs_are_for_streams(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("-m", "wan-tiny", "-p", "a circle", "--graphs", "-o", tmp_path / "a.mp4")
    assert done.exit_code == 2
    assert "wan-tiny sees all frames at once" in " ".join(done.output.split())


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["graphs", "offload_cache"])
def test_the_same_video_is_made(model: Path, how: str) -> None:
    frames = []
    for asked in (False, True):
        job = stream.StreamJob("a circle", str(model), seed=3, num_frames=81, device="cuda", **{how: asked})
        pipe, job = stream.open_stream(job)
        frames.append(np.concatenate([video.to_uint8(chunk.frames[0]) for chunk in stream.begin(pipe, job)]))
    assert len(frames[0]) == 81
    assert video.psnr(*frames) > 40


def test_a_model_that_sees_all_frames_needs_a_rollout(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--rollout"):
        stream.open_stream(stream.StreamJob("a circle", "wan-tiny"))
    assert not stream.is_causal("wan-tiny")
    assert stream.is_causal("sample-causal")
