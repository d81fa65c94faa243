"""`vidaccel estimate`: for one model and for all, without weights."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from typer.testing import Result


def test_one_model(invoke: Callable[..., Result]) -> None:
    result = invoke("estimate", "-m", "wan2.1-14b", "-a", "radial", "-d", 0.25, "-c", "cg-taylor", "--computed", 12)
    assert result.exit_code == 0, result.output
    assert "21x45x80 = 75600 tokens" in result.stdout
    for word in ("speed-up, at most", "cg-taylor holds", "GiB", "times faster"):
        assert word in result.stdout


def test_a_preset_brings_its_schedule(invoke: Callable[..., Result]) -> None:
    result = invoke("estimate", "-m", "wan2.1-14b", "-r", "wan2.1-14b-720p", "--format", "json")
    found = json.loads(result.stdout)
    assert found["sparse_share"] == pytest.approx(38 / 50 * 39 / 40)


def test_what_flashblock_keeps_is_told(invoke: Callable[..., Result]) -> None:
    result = invoke("estimate", "-m", "wan2.1-14b", "-a", "flashblock", "-d", 0.5)
    assert "kept from step to step 5" in result.stdout, result.output


def test_dense_promises_nothing(invoke: Callable[..., Result]) -> None:
    result = invoke("estimate", "-m", "wan2.1-14b", "-a", "dense")
    assert result.exit_code == 0, result.output
    assert "dense call" in result.stdout
    assert "sparse" not in result.stdout
    assert "lower density" not in result.stdout


def test_all_models(invoke: Callable[..., Result]) -> None:
    found = json.loads(invoke("estimate", "--format", "json").stdout)
    assert {"wan2.1-1.3b", "hunyuan-video", "cogvideox-1.5"} <= {each["model"] for each in found}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-m", "sora"), ("sora", "wan2.1-14b")),
        (("-d", "0.5"), ("--attention",)),
        (("--computed", "5"), ("--cache",)),
        (("--height", "480"), ("--model",)),
        (("-m", "wan2.1-14b", "--frames", "80"), ("4k+1",)),
        (("--gpu", "abacus"), ("abacus", "h100")),
        (("-m", "wan2.1-14b", "--frames", "0"), ("--frames", "equal to 1")),
        (("-m", "wan2.1-14b", "--steps", "0"), ("--steps", "equal to 1")),
        (("-m", "wan2.1-14b", "--height", "0"), ("--height", "equal to 1")),
        (("-m", "wan2.1-14b", "-c", "cg-taylor", "--computed", "60"), ("60 computed", "1 to 50")),
        (("-m", "wan2.1-14b", "-a", "topk"), ("topk has no density of its own", "--density")),
        (("-m", "wan2.1-14b", "-a", "dense", "-d", "0.5"), ("0.5", "dense")),
    ],
)
def test_bad_usage(
    invoke: Callable[..., Result], failed: Callable[..., None], arguments: tuple[object, ...], words: tuple[str, ...]
) -> None:
    failed(invoke("estimate", *arguments), 2, *words)
