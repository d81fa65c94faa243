"""`bench model` on small copies of every model: figures add up, failures are rows, interruptions cost nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vidaccel.caching import CGTaylor
from vidaccel.errors import BackendError, UsageError
from vidaccel.kernels import bench
from vidaccel.lab import pieces, steps_bench
from vidaccel.lab.estimate import spread
from vidaccel.lab.model_bench import Job, ModelBench
from vidaccel.lab.rivals import FlashAttention3
from vidaccel.lab.rows import Rows
from vidaccel.lab.sides import Side, shapes, twin
from vidaccel.patterns import Radial, TopK
from vidaccel.pipelines.zoo import RealModel, build

RADIAL = Radial(block=16)


@pytest.fixture
def job(size_of: Any) -> Callable[..., Job]:
    def make(model: RealModel, **how: Any) -> Job:
        return Job(model, size_of(model), "cpu", torch.float32, **{"layers": 2, "repeats": 1, **how})

    return make


def by_kind(rows: Rows) -> dict[str, dict[str, Any]]:
    return {row["kind"]: row for row in rows.rows}


def test_every_model_has_figures_that_add_up(any_model: RealModel, job: Any) -> None:
    rows = Rows({"commit": "abc"})
    lab = ModelBench(job(any_model, whole=True), rows)
    lab.run([(RADIAL, 0.4)])
    steps_bench.cache(lab, CGTaylor())
    assert [row["reason"] for row in rows.rows] == [None] * len(rows.rows)
    dense, sparse, cached = (by_kind(rows)[kind] for kind in ("dense", "sparse", "cache"))
    layers = any_model.layers
    for row in (dense, sparse):
        rest = sum((count - 1) * row["layer_ms"][name] for name, count in layers.items())
        assert row["call_ms"] == pytest.approx(row["base_ms"] + rest, rel=1e-5)
        assert row["whole_ms"] > 0
        for name in layers:
            assert sum(row["split"][name].values()) == pytest.approx(row["watched_layer_ms"][name], rel=1e-5)
            assert row["split"][name]["attention"] > 0
        assert row["commit"] == "abc"
    assert sparse["kernels"] == ["cpu"]
    assert sparse["speedup"] == pytest.approx(sparse["against_ms"] / sparse["call_ms"], rel=1e-5)
    assert sparse["bound_ms"] == pytest.approx(
        sparse["against_ms"] - (1 - sparse["visited_pairs"]) * sparse["dense_attention_ms"], rel=1e-5
    )
    assert sparse["delivered"] == pytest.approx(0.4, rel=0.1)
    assert cached["skipped_share"] > 0
    # cond and uncond hold a ladder of two terms each, the branch that decides a gate of four more at most.
    term = 5 * 8 * 8 * any_model.width * 4 * any_model.batch
    branches = len(any_model.contexts)
    assert 2 * branches * term <= cached["cache_bytes"] <= (2 * branches + 4) * term


def test_every_model_takes_its_inputs_in_bf16(small_model: RealModel, size_of: Any) -> None:
    transformer = build(small_model, "cpu", torch.bfloat16)
    grid = small_model.grid(*size_of(small_model))
    kept = [name for name, p in transformer.named_parameters() if p.dtype == torch.float32]
    assert bool(kept) == bool(transformer._keep_in_fp32_modules)
    for trimmed in (False, True):
        out = transformer(**small_model.inputs(grid, "cpu", torch.bfloat16, trimmed=trimmed))[0]
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()


def test_a_compiled_layer_is_split_by_its_ops(wan_model: RealModel, job: Any) -> None:
    rows = Rows({})
    ModelBench(job(wan_model, compiled=True), rows).run([(TopK(block=16), 0.4)])
    compiled = next(row for row in rows.rows if row["kind"] == "sparse" and row["compiled"])
    assert compiled["ok"], compiled["reason"]
    split = compiled["split"]["blocks"]
    assert sum(split.values()) == pytest.approx(compiled["layer_ms"]["blocks"], rel=1e-5)
    assert split["attention"] == pytest.approx(compiled["kernel_ms"])
    assert split["attention"] > 0
    dense = next(row for row in rows.rows if row["kind"] == "dense" and row["compiled"])
    assert sum(dense["split"]["blocks"].values()) == pytest.approx(dense["layer_ms"]["blocks"], rel=1e-5)
    assert dense["split"]["blocks"]["attention"] > 0
    # Attention to text is not among it.
    assert compiled["dense_attention_ms"] == pytest.approx(
        wan_model.layers["blocks"] * dense["split"]["blocks"]["attention"], rel=1e-5
    )


def test_padded_text_is_also_trimmed_for_the_rivals(small: Any, job: Any) -> None:
    rows = Rows({})
    ModelBench(job(small("hunyuan-video-1.5")), rows).run([])
    assert [row["variant"] for row in rows.rows] == ["torch's choice", "torch's choice (text trimmed)"]


def test_a_failure_is_a_row(wan_model: RealModel, job: Any) -> None:
    rows = Rows({})
    ModelBench(job(wan_model), rows).run([(TopK(block=16), 0.01), (RADIAL, 0.4)])
    _, failed, sparse = rows.rows
    assert not failed["ok"]
    assert "ask for" in failed["reason"]
    assert sparse["ok"]


def test_an_interrupted_run_goes_on(wan_model: RealModel, job: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"

    def stop(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ModelBench(job(wan_model), Rows(bench.about(), path), stop).run([(RADIAL, 0.4)])
    first = json.loads(path.read_text())
    assert [row["kind"] for row in first["rows"]] == ["dense"]
    said: list[str] = []
    ModelBench(job(wan_model), Rows(bench.about(), path), lambda row: said.append(row["kind"])).run([(RADIAL, 0.4)])
    second = json.loads(path.read_text())
    assert said == ["sparse"]
    assert second["rows"][0] == first["rows"][0]
    ModelBench(job(wan_model), Rows(bench.about(), path), stop).run([(RADIAL, 0.4)])
    assert json.loads(path.read_text()) == second
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_two_machines_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    Rows({"device": {"gpu": "A"}, "versions": {}}, path).add({"key": "x"})
    assert Rows({"device": {"gpu": "A"}, "versions": {}, "commit": "new"}, path).find("x")
    with pytest.raises(UsageError, match="another device"):
        Rows({"device": {"gpu": "B"}, "versions": {}}, path)
    Rows({"device": {"gpu": "A", "cores": 2}}, path.with_name("other.json")).add({"key": "x"})
    with pytest.raises(UsageError) as told:
        Rows({"device": {"gpu": "A", "cores": 4}}, path.with_name("other.json"))
    assert "({'cores': 2}), this is {'cores': 4}" in str(told.value), "what is the same is left out"
    path.write_text("{}")
    with pytest.raises(UsageError, match="not a record"):
        Rows({}, path)


def test_a_trajectory_computes_what_it_should(wan_model: RealModel, job: Any) -> None:
    rows = Rows({})
    lab = ModelBench(job(wan_model, videos=True), rows)
    lab.run([])
    steps_bench.trajectory(lab, 10, spread(10, 7), RADIAL, 0.4)
    steps_bench.trajectory(lab, 10, spread(10, 7))
    dense, sparse, alone = rows.rows
    term = 5 * 8 * 8 * wan_model.width * 4
    for row in (sparse, alone):
        assert row["ok"], row["reason"]
        assert (row["computed_steps"], row["calls"]) == (7, 20)
        assert row["dense_seconds"] == pytest.approx(20 * dense["call_ms"] / 1e3, rel=1e-5)
        assert row["cache_bytes"] == 2 * 2 * term
    assert dense["whole_ms"] is None


def test_a_trajectory_without_guidance_calls_once_a_step(wan_model: RealModel, job: Any) -> None:
    rows = Rows({})
    lab = ModelBench(job(replace(wan_model, contexts=("cond",)), whole=True, videos=True), rows)
    lab.run([])
    steps_bench.trajectory(lab, 10, spread(10, 7))
    dense, alone = rows.rows
    assert alone["variant"] == "7 of 10 steps, without guidance"
    assert (alone["computed_steps"], alone["calls"]) == (7, 10)
    assert alone["dense_seconds"] == pytest.approx(10 * dense["whole_ms"] / 1e3, rel=1e-5)


def test_twins_share_weights_and_leave_the_model_alone(wan_model: RealModel, size_of: Any) -> None:
    full = build(wan_model, "cpu", torch.float32)
    before = dict(full.attn_processors)
    depths = shapes(wan_model, 1)
    assert depths == {"base": {"blocks": 1}, "blocks": {"blocks": 2}}
    copied = twin(full, depths["blocks"])
    assert {p.data_ptr() for p in copied.parameters()} <= {p.data_ptr() for p in full.parameters()}
    inputs = wan_model.inputs(wan_model.grid(*size_of(wan_model)), "cpu", torch.float32)
    side = Side(copied, wan_model, inputs, torch.no_grad, attention=RADIAL, density=0.4)
    side()
    assert full.attn_processors == before
    assert side.run is not None
    assert len(side.run.trace.calls[0].kernels) == 2


def test_watches_are_gone_afterwards(wan_model: RealModel, size_of: Any) -> None:
    from vidaccel import wrapping

    grid = wan_model.grid(*size_of(wan_model))
    side = Side(
        build(wan_model, "cpu", torch.float32), wan_model, wan_model.inputs(grid, "cpu", torch.float32), torch.no_grad
    )
    own = wrapping.attend, wrapping.attention
    with pytest.raises(AttributeError), pieces.watched(side.transformer, grid.tokens):
        side(timestep=None)
    assert (wrapping.attend, wrapping.attention) == own
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in side.transformer.modules())


def test_flash3_serves_the_video_and_refuses_masks(wan_model: RealModel, size_of: Any) -> None:
    """Any function on (b, l, h, d) can stand below the model: torch's own attention must then change nothing."""
    served: list[int] = []

    def flash(q: Any, k: Any, v: Any, softmax_scale: float | None = None) -> Any:
        served.append(q.shape[1])
        views = (x.transpose(1, 2) for x in (q, k, v))
        with torch._C.DisableTorchFunction():
            return torch.nn.functional.scaled_dot_product_attention(*views, scale=softmax_scale).transpose(1, 2)

    grid = wan_model.grid(*size_of(wan_model))
    inputs = wan_model.inputs(grid, "cpu", torch.float32)
    model = build(wan_model, "cpu", torch.float32)
    stock = Side(model, wan_model, inputs, torch.no_grad)()[0]
    other = Side(model, wan_model, inputs, lambda: FlashAttention3(flash, grid.tokens, False))()[0]
    torch.testing.assert_close(stock, other)
    assert served == [grid.tokens] * 6  # Self- and cross-attention of three layers.
    side = Side(model, wan_model, inputs, lambda: FlashAttention3(flash, grid.tokens, False))
    with pieces.watched(side.transformer, grid.tokens) as found:
        side()
    assert (
        sum(len(watches) for (_, label), watches in found.times.items() if label == "kernel") == 6
    )  # So little video that the text is longer, and counts as well.
    assert all(found.split(name)["attention"] > 0 for name in wan_model.layers)
    query = torch.randn(1, 2, 64, 32)
    with FlashAttention3(flash, 64, True), pytest.raises(BackendError, match="no mask"):
        torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=torch.ones(64, 64))


def test_flash3_is_one_call_of_a_compiled_graph() -> None:
    """Its package holds what a compiler cannot look into, here a break of the graph."""

    def flash(q: Any, k: Any, v: Any, softmax_scale: float | None = None) -> Any:
        torch._dynamo.graph_break()
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
        return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v).contiguous()

    def attend(x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)  # As models do.
        return torch.nn.functional.scaled_dot_product_attention(heads, heads.sin(), heads.cos()) + 1

    x = torch.randn(1, 64, 32)
    expected = attend(x)
    with torch.no_grad(), FlashAttention3(flash, 64, False):
        found = torch.compile(attend, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected)


def test_patterns_that_fail_together_are_rows(wan_model: RealModel, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows({})
    lab = ModelBench(job(wan_model), rows)
    lab.dense(False)

    def broken(*args: Any) -> Any:
        raise RuntimeError("no memory for all of them")

    monkeypatch.setattr(lab, "_beside", broken)
    lab.run([(RADIAL, 0.4), (TopK(block=16), 0.4)])
    assert [(row["kind"], row["ok"]) for row in rows.rows] == [("dense", True), ("sparse", False), ("sparse", False)]
    assert all("no memory for all" in row["reason"] for row in rows.rows[1:])
