"""Two processes: one video on both ranks decides as one process does, two videos on one rank each decide alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vidaccel
from vidaccel.caching import CachePolicy, CGTaylor, FirstBlock
from vidaccel.errors import InstallError

WORKER = Path(__file__).with_name("parallel_worker.py")
_spec = importlib.util.spec_from_file_location("parallel_worker", WORKER)
assert _spec is not None
assert _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")


def alone(make_wan: Any, policy: CachePolicy | float, steps: int = 12, prompt: str = "a cat") -> dict[str, Any]:
    pipe, cache = make_wan(), CGTaylor(threshold=policy, warmup=2) if isinstance(policy, float) else policy
    with vidaccel.accelerate(pipe, cache=cache) as run:
        return worker.outcome(run, worker.video(pipe, steps, prompt))


def two_ranks(mode: str, tmp_path: Path, thresholds: list[float]) -> list[list[dict[str, Any]]]:
    """What each rank printed. A rank that waits for another one for ever runs into the limit."""
    command = [sys.executable, str(WORKER), mode]
    values = [repr(value) for value in thresholds]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), *values],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        done = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, stderr) in zip(running, done, strict=True):
        assert process.returncode == 0, stderr
    return [[json.loads(line) for line in stdout.splitlines() if line.startswith("{")] for stdout, _ in done]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["context before", "context after"])
def test_context_parallel_ranks_decide_as_one_process(make_wan: Any, tmp_path: Path, mode: str) -> None:
    """At thresholds a hair above a step's error: that is a mean over shards, and the ranks' own lie around it."""
    first = alone(make_wan, 0.0)["errors"][2]
    later = next(error for error in alone(make_wan, 0.05)["errors"][2:] if error >= 0.05)
    thresholds = [first * (1 + 1e-4), later * (1 + 1e-4)]
    expected = [alone(make_wan, policy) for policy in (*thresholds, *worker.OUTPUTS)]
    ranks = two_ranks(mode, tmp_path, thresholds)
    assert ranks[0] == ranks[1]
    for found, single in zip(ranks[0], expected, strict=True):
        assert found["forecast"] == single["forecast"] != []
        assert found["errors"][2:] == pytest.approx(single["errors"][2:], rel=1e-3)
        assert found["sum"] == pytest.approx(single["sum"], rel=1e-3)


@pytest.mark.slow
def test_replicas_are_independent(make_wan: Any, tmp_path: Path) -> None:
    ranks = two_ranks("replicas", tmp_path, [0.05])
    for rank, (found,) in enumerate(ranks):
        single = alone(make_wan, 0.05, 10 + 2 * rank, f"a cat {rank}")
        assert found["forecast"] == single["forecast"] != []
        assert found["sum"] == pytest.approx(single["sum"], rel=1e-4)


def test_caches_that_cannot_be_split_are_refused(wan: Any) -> None:
    class Mesh:
        def get_group(self) -> str:
            return "group"

    class Config:
        context_parallel_config = type("Context", (), {"_flattened_mesh": Mesh()})()

    wan.transformer._parallel_config = Config()
    with (
        vidaccel.accelerate(wan, cache=FirstBlock()),
        pytest.raises(InstallError, match="context parallelism is on: first-block"),
    ):
        worker.video(wan, 12, "a cat")
