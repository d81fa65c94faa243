"""One video on two processes is the video of one: patterns, caches, families, both orders of enabling, odd sizes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("parallel_worker.py")
_spec = importlib.util.spec_from_file_location("parallel_worker", WORKER)
assert _spec is not None
assert _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo"),
]
CASES = [name for name, *_ in worker.cases()]
GRIDS = {"even": 448, "ragged": 441, "wide": 385}
REFUSED = {
    "odd": "441 video tokens were given to 2 ranks",
    "few heads": "leaves none for the last",
    "other noise": "different noise",
    "part adaptive": "adaptive=False",
    "cache alone": 'accelerate(pipe, "dense", ...)',
    "ltx": "mask of its cross-attention",
    "no plan": "MochiTransformer3DModel",
    "token replace": "token_replace cannot be split",
    "degree": "divisor of 2",
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each of the two processes printed, by case. A rank that waits for ever runs into the limit."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(store)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        done = [process.communicate(timeout=400) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, stderr) in zip(running, done, strict=True):
        assert process.returncode == 0, stderr[-3000:]
    lines = [[json.loads(line) for line in stdout.splitlines() if line.startswith("{")] for stdout, _ in done]
    return [{found["name"]: found for found in each} for each in lines]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_make_the_video_of_one(ranks: list[dict[str, dict[str, Any]]], case: str) -> None:
    first, second = (rank[case] for rank in ranks)
    assert max(first["apart"], second["apart"]) <= 1e-5
    assert first["two"] == second["two"] == first["one"]
    forecast, sparse = first["one"]
    assert bool(forecast) == ("and cache" in case)
    assert bool(sparse) == ("dense" not in case)
    size = next(size for name, _, size, _ in worker.cases() if name == case)
    frames = 4 / 7 if "1.5" in case else 1  # Its tokens hold two latent frames.
    assert first["tokens"] + second["tokens"] == GRIDS[size] * frames


@pytest.mark.parametrize("case", worker.STREAMS)
def test_two_ranks_stream_as_one(ranks: list[dict[str, dict[str, Any]]], case: str) -> None:
    first, second = (rank[case] for rank in ranks)
    assert max(first["apart"], second["apart"]) <= 1e-5
    assert first["tokens"] + second["tokens"] == pytest.approx(1)
    assert first["bytes"] == second["bytes"] == 0.5


@pytest.mark.parametrize("case", REFUSED)
def test_what_ranks_cannot_do_is_said_by_all(ranks: list[dict[str, dict[str, Any]]], case: str) -> None:
    assert all(REFUSED[case] in rank[case]["refused"] for rank in ranks)


def test_rings_are_refused(wan: Any, render: Any) -> None:
    import vidaccel

    class Config:
        context_parallel_config = type("Context", (), {"ring_degree": 2})()

    wan.transformer._parallel_config = Config()
    with (
        vidaccel.accelerate(wan, "radial", density=0.4),
        pytest.raises(vidaccel.VidaccelError, match="ulysses_degree instead"),
    ):
        render(wan)
