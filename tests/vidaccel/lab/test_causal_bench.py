"""The benchmark of autoregressive video, at no size: every rival runs, and rows say what a reader needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vidaccel.lab import causal_bench
from vidaccel.reuse import FlashBlock
from vidaccel.streaming import Rollout

SHAPE = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32, "num_layers": 2, "text_dim": 16}


def case(frames: int = 12) -> causal_bench.Case:
    rollout = Rollout(chunk=2, window=6, sink=2, steps=(1000, 500))
    return causal_bench.Case("tiny", 32, 48, frames, rollout, SHAPE, 8, None)


def test_every_rival_has_a_row() -> None:
    rivals = causal_bench.rivals(12)
    rows = list(causal_bench.run(case(), rivals, torch.device("cpu"), torch.float32))
    assert [row["rival"] for row in rows] == [rival.name for rival in rivals]
    assert all(row["ok"] for row in rows), [row["reason"] for row in rows]
    dense, reused = rows[0], rows[1]
    assert dense["speedup"] == dense["attention_speedup"] == 1
    assert dense["fps"] == pytest.approx(8e3 / dense["chunk_ms"])
    assert dense["timed_chunks"] == 2
    assert len({row["chunk_ms"] for row in rows}) == len(rows)
    # 0.65 of two heads is one, at the steps in between; the last rival but one reuses as much.
    assert reused["reuse_rate"] == 0.5
    assert reused["set_reuse"] == 0.65
    assert dense["reuse_rate"] is None
    json.dumps(rows)


def test_a_set_rate_is_spread_over_heads_and_layers() -> None:
    rival = causal_bench.Rival("", (FlashBlock(refresh=True),), 0.65)
    flash = rival.methods_for(steps=4, layers=30, heads=12, frames=240).flash
    assert flash is not None
    assert flash.refresh
    assert flash.calibrated is not None
    fresh = torch.tensor(flash.calibrated).float()
    assert fresh.shape == (4, 30, 12)
    assert float(fresh.mean()) == pytest.approx(0.35, abs=0.02)
    assert float(fresh.sum(2).std()) == 0


def test_a_rival_that_fails_is_a_row_and_the_others_go_on() -> None:
    chosen = [causal_bench.Rival("dense"), causal_bench.Rival("broken", (FlashBlock(),), 0.5)]
    bench = causal_bench.run(case(8), chosen, torch.device("cpu"), torch.float32)
    original = causal_bench.Contestant.chunk

    def fails(self: causal_bench.Contestant, frames: int, embeds: torch.Tensor) -> torch.Tensor:
        if self.rival.name == "broken":
            raise torch.OutOfMemoryError("out of memory")
        return original(self, frames, embeds)

    causal_bench.Contestant.chunk = fails  # type: ignore[method-assign]
    try:
        rows = list(bench)
    finally:
        causal_bench.Contestant.chunk = original  # type: ignore[method-assign]
    assert [row["ok"] for row in rows] == [True, False]
    assert "memory" in rows[1]["reason"]


def test_the_command_writes_its_record(tmp_path: Path) -> None:
    from vidaccel.cli.main import app

    out = tmp_path / "causal.json"
    words = [
        "bench",
        "causal",
        "--tiny",
        "--frames",
        "15",
        "--only",
        "flashblock, probed",
        "--no-vae",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, [*words, "-o", str(out), "--format", "quiet"])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert [row["rival"] for row in record["rows"]] == ["dense", "flashblock, probed"]
    assert {"commit", "versions"} <= set(record)
    assert CliRunner().invoke(app, ["bench", "causal", "--size", "8k"]).exit_code != 0
