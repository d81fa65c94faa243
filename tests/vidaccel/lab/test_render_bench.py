"""Whole renders in turn, on a tiny pipeline: who fails is out, the others go on, and nobody changes anybody."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from vidaccel.grid import VideoGrid
from vidaccel.lab.peers import Peer
from vidaccel.lab.render_bench import Entrant, RenderBench
from vidaccel.lab.rows import Rows
from vidaccel.recipe import Recipe
from vidaccel.render.job import ReadyJob

JOB = ReadyJob(
    "a cat", height=64, width=64, num_frames=9, num_inference_steps=3, max_sequence_length=16, device="cpu",
    dtype="float32",
)  # fmt: skip


def test_who_fails_in_a_later_round_is_out_and_the_others_go_on(wan: Any) -> None:
    renders: list[int] = []

    @contextlib.contextmanager
    def moody(pipe: Any, grid: VideoGrid) -> Iterator[None]:
        renders.append(len(renders))
        if len(renders) > 2:
            raise RuntimeError("no more")
        yield

    before = dict(wan.transformer.attn_processors)
    rows = Rows({"versions": {}, "device": {}}, what="render")
    lab = RenderBench(wan, JOB, VideoGrid(3, 4, 4), rows)
    cached = Recipe.from_dict({"cache": {"name": "taylorseer", "interval": 2}})
    entrants = [
        Entrant("dense", "stock", False),
        Entrant("vidaccel", "ours", False, recipe=cached),
        Entrant("peer", "moody", False, peer=Peer("moody", "cache", "torch", moody)),
    ]
    lab.run(entrants, 3)
    found = {row["variant"]: row for row in rows.rows if row["kind"] == "render"}
    assert not found["moody"]["ok"]
    assert found["moody"]["reason"] == "in round 2: RuntimeError: no more"
    rounds = [set(row["seconds"]) for row in rows.rows if row["kind"] == "round"]
    assert rounds == [{"stock", "ours", "moody"}, {"stock", "ours"}, {"stock", "ours"}]
    assert found["ours"]["ok"]
    assert found["ours"]["rounds"] == 3
    assert found["ours"]["computed_steps"] == 2
    assert found["ours"]["speedup"] == pytest.approx(
        sorted(
            row["seconds"]["stock"]["total"] / row["seconds"]["ours"]["total"]
            for row in rows.rows
            if row["kind"] == "round"
        )[1],
        rel=1e-5,
    )
    # The pipeline that was given is as it was.
    assert wan.transformer.attn_processors == before


def test_dense_attention_is_chosen_for_the_transformer_alone(wan: Any) -> None:
    """Text encoder and VAE have masks and types that a fast backend may refuse."""
    chosen = [False]
    seen: dict[str, set[bool]] = {}

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        chosen[0] = True
        yield
        chosen[0] = False

    def look(name: str) -> Any:
        return lambda *_: seen.setdefault(name, set()).add(chosen[0])

    parts = {"text": wan.text_encoder, "block": wan.transformer.blocks[0], "vae": wan.vae.decoder}
    hooks = [module.register_forward_hook(look(name)) for name, module in parts.items()]
    rows = Rows({"versions": {}, "device": {}}, what="render")
    RenderBench(wan, JOB, VideoGrid(3, 4, 4), rows).run([Entrant("dense", "fast", False, context)], 1)
    for hook in hooks:
        hook.remove()
    assert rows.find("render fast")["ok"]  # type: ignore[index]
    assert seen == {"text": {False}, "block": {True}, "vae": {False}}
    assert not chosen[0]
