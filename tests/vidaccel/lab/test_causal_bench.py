"""The benchmark of autoregressive video, at no size: every rival runs, and rows say what a reader needs."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vidaccel.kernels import bench
from vidaccel.lab import causal_bench, causal_cases
from vidaccel.lab.causal_bound import chunk_flops
from vidaccel.reuse import FlashBlock, Methods
from vidaccel.streaming import Rollout

SHAPE = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32, "num_layers": 2, "text_dim": 16}


def case(frames: int = 12) -> causal_cases.Case:
    rollout = Rollout(chunk=2, window=6, sink=2, steps=(1000, 500))
    return causal_cases.Case("tiny", 32, 48, frames, rollout, SHAPE, 8, None)


def test_every_rival_has_a_row() -> None:
    rivals = causal_cases.rivals(12)
    rows = list(causal_bench.run(case(), rivals, torch.device("cpu"), torch.float32))
    assert [row["rival"] for row in rows] == [rival.name for rival in rivals]
    assert all(row["ok"] for row in rows), [row["reason"] for row in rows]
    dense, reused = rows[0], rows[1]
    assert dense["speedup"] == dense["attention_speedup"] == 1
    assert dense["fps"] == pytest.approx(8e3 / dense["chunk_ms"])
    # Six chunks: three fill the window, two more are recorded or compiled.
    assert dense["timed_chunks"] == 1
    assert reused["tflop"]["attention"] < dense["tflop"]["attention"]
    assert reused["tflop"]["linear"] == dense["tflop"]["linear"]
    assert dense["bound_fps"] == pytest.approx(8e3 / dense["bound_ms"])
    assert len({row["chunk_ms"] for row in rows}) == len(rows)
    # 0.65 of two heads is one, at the steps in between; the last rival but one reuses as much.
    assert reused["reuse_rate"] == 0.5
    assert reused["set_reuse"] == 0.65
    assert dense["reuse_rate"] is None
    json.dumps(rows)


def test_out_of_time_the_first_row_is_written_and_no_other() -> None:
    said: list[str] = []
    chosen = causal_cases.rivals(60)[:3]
    rows = list(causal_bench.run(case(60), chosen, torch.device("cpu"), torch.float32, seconds=0, say=said.append))
    assert [row["rival"] for row in rows] == ["dense"]
    assert rows[0]["timed_chunks"] == 2
    assert said[-1] == f"out of time before {chosen[1].name}"


def test_alone_a_rival_is_compared_with_dense_before_it() -> None:
    chosen = causal_cases.rivals(12)[:2]
    alone = replace(case(), alone=True)
    dense, reused = causal_bench.run(alone, chosen, torch.device("cpu"), torch.float32)
    for what in ("speedup", "attention_speedup"):
        ms = "chunk_ms" if what == "speedup" else what.replace("speedup", "ms")
        assert reused[what] == dense[ms] / reused[ms]
    assert reused["layers"] == 2
    # Memory is a GPU's.
    assert reused["first_gib"] is reused["last_gib"] is None


def test_what_a_rival_held_is_gone_when_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its memory would be counted as the next one's."""
    made: list[weakref.ref[Any]] = []
    build = causal_bench.Contestant.__init__

    def seen(self: causal_bench.Contestant, *args: Any) -> None:
        assert not any(cache() for cache in made)
        build(self, *args)
        made.append(weakref.ref(self.model.caches["cond"]))

    monkeypatch.setattr(causal_bench.Contestant, "__init__", seen)
    alone = replace(case(8), alone=True)
    rows = list(causal_bench.run(alone, causal_cases.rivals(8)[:3], torch.device("cpu"), torch.float32))
    assert len(rows) == len(made) == 3


def test_operations_of_a_chunk_are_those_of_the_paper_model() -> None:
    """Wan 2.1 1.3B at 480p: of a layer and forward, 0.39 TFLOP are products, 0.54 attention, 0.015 the prompt."""
    config = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
    transformer = SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 2), **config))
    real = causal_cases.Case("480p", 480, 832)
    flops = chunk_flops(transformer, real, 1.0, None, Methods())
    each = [amount / (30 * 5) / 1e12 for amount in flops]
    assert each == pytest.approx([0.39, 0.54, 0.0147], abs=5e-3)
    # Of five forwards three reuse 65 % of what 9 of 12 frames take, with the clean pass four: 1.41 and 1.64 times less.
    for refresh, times in ((False, 1.41), (True, 1.64)):
        reusing = chunk_flops(transformer, real, 1.0, 0.65, Methods(flash=FlashBlock(refresh=refresh)))
        assert flops.attention / reusing.attention == pytest.approx(times, abs=0.01)


def test_a_set_rate_is_spread_over_heads_and_layers() -> None:
    rival = causal_cases.Rival("", (FlashBlock(refresh=True),), 0.65)
    flash = rival.methods_for(steps=4, layers=30, heads=12, frames=240).flash
    assert flash is not None
    assert flash.refresh
    assert flash.calibrated is not None
    fresh = torch.tensor(flash.calibrated).float()
    assert fresh.shape == (4, 30, 12)
    assert float(fresh.mean()) == pytest.approx(0.35)
    assert set(fresh.sum(2).flatten().tolist()) == {4, 5}
    # The layer whose attention is timed reuses no more than was said.
    assert 0.64 < 1 - float(fresh[:, 15].mean()) < 0.65


def test_a_rival_that_fails_is_a_row_and_the_others_go_on() -> None:
    chosen = [causal_cases.Rival("dense"), causal_cases.Rival("broken", (FlashBlock(),), 0.5)]
    running = causal_bench.run(case(8), chosen, torch.device("cpu"), torch.float32)
    original = causal_bench.Contestant.chunk

    def fails(self: causal_bench.Contestant, frames: int, embeds: torch.Tensor) -> torch.Tensor:
        if self.rival.name == "broken":
            raise torch.OutOfMemoryError("out of memory")
        return original(self, frames, embeds)

    causal_bench.Contestant.chunk = fails  # type: ignore[method-assign]
    try:
        rows = list(running)
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
        "--alone",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, [*words, "-o", str(out), "--format", "quiet"])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert [row["rival"] for row in record["rows"]] == ["dense", "flashblock, probed"]
    assert {row["commit"] for row in record["rows"]} == {bench.about()["commit"]}
    assert {"dtype", "versions"} <= set(record)
    # What is there is not measured again, and more can be added to it.
    more = CliRunner().invoke(app, [*words, "--only", "ann 0.3", "-o", str(out), "--format", "quiet"])
    assert more.exit_code == 0, more.output
    grown = json.loads(out.read_text())
    assert grown["rows"][:2] == record["rows"]
    assert [row["rival"] for row in grown["rows"][2:]] == ["ann 0.3"]
    assert grown["rows"][2]["speedup"] == pytest.approx(
        record["rows"][0]["chunk_ms"] / grown["rows"][2]["chunk_ms"], rel=1e-5
    )
    assert CliRunner().invoke(app, ["bench", "causal", "--size", "8k"]).exit_code != 0
