"""Estimates against what was published, against counting by hand, and against what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vidaccel.api import DEFAULT_SCHEDULE
from vidaccel.caching import CGTaylor
from vidaccel.errors import InstallError, PatternError, UsageError
from vidaccel.grid import VideoGrid
from vidaccel.lab import traffic as counted
from vidaccel.lab.estimate import GPUS, Parts, choosing_ms, estimate, flops, gpu_key, kept_pairs, planned, spread
from vidaccel.lab.traffic import selection, traffic
from vidaccel.patterns import (
    Ann,
    Dense,
    FlashBlock,
    FreeSwim,
    Neighborhood,
    Pattern,
    PerLayer,
    Radial,
    TopK,
    sparse_rate,
)
from vidaccel.pipelines.zoo import REAL_MODELS, real_model
from vidaccel.recipe import pattern_from
from vidaccel.schedule import Schedule

ROOT = Path(__file__).parents[3]
RECORDS = [json.loads(path.read_text()) for path in sorted(ROOT.glob("*/bench/results/*.json"))]


def measured(what: str) -> list[tuple[str, dict[str, Any]]]:
    """Every row with a figure in the committed records of this command, beside the GPU that it was measured on."""
    found = [record for record in RECORDS if record.get("what") == what and record["device"].get("gpu")]
    return [(record["device"]["gpu"], row) for record in found for row in record["rows"] if row["ok"]]


MEASURED = measured("model")


@pytest.mark.parametrize(
    ("gpu", "row"),
    [(gpu, row) for gpu, row in MEASURED if not row["compiled"] and row["kind"] in ("dense", "sparse")],
    ids=lambda value: value if isinstance(value, str) else value["key"],
)
def test_agrees_with_measured_calls(gpu: str, row: dict[str, Any]) -> None:
    """The fastest dense backend, sparse patterns at the visited density that they had, and what a call holds."""
    model, grid = real_model(row["model"]), VideoGrid(*row["grid"])
    parts = Parts.of(model, grid, GPUS[gpu_key(gpu)])
    if row["kind"] == "dense":
        same = [
            other
            for name, other in MEASURED
            if name == gpu and all(other[key] == row[key] for key in ("kind", "model", "grid", "compiled"))
        ]
        assert parts.call == pytest.approx(min(other["call_ms"] for other in same), rel=0.15)
    else:
        name, density = row["variant"].split()
        pattern, key = pattern_from(name), gpu_key(gpu)
        found = estimate(model, tuple(row["size"]), attention=pattern, density=float(density), gpu=key)
        call = found["sparse_ms"]
        if found["visited"] != pytest.approx(row["visited"], rel=0.02):
            # Orders of tokens have become better since: pairs as they were visited then.
            plan = planned(model, grid, pattern, float(density))
            rate, selection = sparse_rate(plan, parts.rate), choosing_ms(plan, model, GPUS[key])
            call = parts.sparse(min(1.0, row["visited_pairs"]), rate, selection)
        assert call == pytest.approx(row["call_ms"], rel=0.15)
    if row.get("whole_ms") is not None:
        assert row["call_ms"] == pytest.approx(row["whole_ms"], rel=0.05), "layers add up to the model"
    # Masks of padded text are the stock model's alone, and only where its caller does not trim.
    if not model.padded:
        held = traffic(model.name).held * (grid.tokens + model.joint_text) * model.width * model.batch / 2**30
        assert held == pytest.approx(row["activations_gib"], rel=0.15)


@pytest.mark.parametrize(
    ("gpu", "row"),
    [(gpu, row) for gpu, row in measured("parallel") if row["kind"] == "call"],
    ids=lambda value: value if isinstance(value, str) else value["key"],
)
def test_agrees_with_calls_that_several_gpus_were_compared_with(gpu: str, row: dict[str, Any]) -> None:
    model, grid = real_model(row["model"]), VideoGrid(*row["grid"])
    parts = Parts.of(model, grid, GPUS[gpu_key(gpu)])
    dense = row["variant"] == "dense"
    call = parts.call if dense else parts.sparse(kept_pairs(grid, model.joint_text, row["visited"]))
    assert call == pytest.approx(row["one"]["call_ms"], rel=0.15)


@pytest.mark.parametrize(
    ("gpu", "row"),
    [(gpu, row) for gpu, row in MEASURED if row["kind"] == "trajectory"],
    ids=lambda value: value if isinstance(value, str) else value["key"],
)
def test_agrees_with_measured_videos(gpu: str, row: dict[str, Any]) -> None:
    """All steps of a video, some of them forecast."""
    said = row["variant"].split(", ")[1:]
    name, _, density = next((each for each in said if each != "without guidance"), "").partition(" ")
    found = estimate(
        real_model(row["model"]),
        tuple(row["size"]),
        attention=pattern_from(name) if name else None,
        density=float(density) if density else None,
        schedule=DEFAULT_SCHEDULE,
        cache=CGTaylor(),
        computed=row["computed_steps"],
        steps=row["steps"],
        gpu=gpu_key(gpu),
        guidance="without guidance" not in said,
    )
    assert found["calls_a_step"] * row["steps"] == row.get("calls", found["calls_a_step"] * row["steps"])
    assert found["video_s"] == pytest.approx(row["seconds"], rel=0.15)


def test_there_is_something_to_agree_with() -> None:
    """A GPU that was measured on has its own rates."""
    assert MEASURED
    for gpu, _ in MEASURED:
        assert GPUS[gpu_key(gpu)].gib > 0


@pytest.mark.parametrize(
    ("name", "size", "share"),
    # Radial Attention's setting and others: shares of attention in the FLOPs of a call, from the models' dimensions.
    [
        ("wan2.1-1.3b", (480, 832, 81), 0.71),
        ("wan2.1-14b", (480, 832, 81), 0.53),
        ("wan2.1-14b", (720, 1280, 81), 0.72),
        ("hunyuan-video", (768, 1280, 117), 0.86),
        ("cogvideox-5b", (480, 720, 49), 0.49),
        ("cogvideox-1.5", (768, 1360, 81), 0.71),
    ],
)
def test_shares_of_attention(name: str, size: tuple[int, int, int], share: float) -> None:
    model = real_model(name)
    attention, linear = flops(model, model.grid(*size))
    assert attention / (attention + linear) == pytest.approx(share, abs=0.006)


def test_hunyuan_attention_flops_as_published() -> None:
    """Radial Attention, table 1: 612 PFLOP for 50 steps at 768x1280, 117 frames, of which attention is 491."""
    model = real_model("hunyuan-video")
    attention, linear = flops(model, model.grid(768, 1280, 117))
    assert 50 * attention / 1e15 == pytest.approx(491, rel=0.01)
    assert 50 * (attention + linear) / 1e15 == pytest.approx(612, rel=0.07)


def test_linear_flops_as_torch_counts_them(small: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from vidaccel.pipelines.zoo import build

    model = replace(small("wan2.1-14b"), ffn=64)
    grid = VideoGrid(4, 8, 8)
    found = {}
    for layers in (1, 2):
        deep = model.with_layers({"blocks": layers})
        with FlopCounterMode(display=False) as counter:
            build(deep, "cpu", torch.float32)(**deep.inputs(grid, "cpu", torch.float32))
        found[layers] = counter.get_total_flops()
    # One layer more. Keys and values of the text are not in the formula, attention is not in torch's count on a CPU.
    text = 2 * 2 * 512 * 64**2
    assert found[2] - found[1] - text == flops(model.with_layers({"blocks": 1}), grid)[1]


def test_kept_pairs_by_hand() -> None:
    grid = VideoGrid(1, 2, 3)
    keep = torch.ones(10, 10)
    keep[:6, :6] = 0
    keep[:6, :3] = 1  # half of the video's pairs
    assert kept_pairs(grid, 4, 0.5) == pytest.approx(float(keep.mean()))


def test_what_a_sparse_layer_saves_beside_attention() -> None:
    """Norms, RoPE and reordering, which one kernel does: less than everything else, more than nothing."""
    for name in ("wan2.1-14b", "cogvideox-5b", "hunyuan-video"):
        model = real_model(name)
        parts = Parts.of(model, model.grid(*model.size), GPUS["h200"])
        assert 0 < parts.saved < parts.other
        assert parts.sparse(1.0) > parts.bound(1.0) == pytest.approx(parts.call - parts.saved)
    # CogVideoX alone normalises each head by itself: two rows of 64 channels a head and token, q and k.
    assert set(traffic("wan2.1-14b").rows.values()) == {0.0}
    assert traffic("cogvideox-5b").rows["transformer_blocks"] == pytest.approx(2 / 64, rel=0.01)


def test_masks_over_all_pairs_are_counted_by_themselves() -> None:
    """HunyuanVideo 1.5 repeats its mask of keys for every query, and meets it with its transpose."""
    assert traffic("hunyuan-video-1.5").masks == {"transformer_blocks": 2.0}
    assert set(traffic("hunyuan-video").masks.values()) == {0.0}
    model = real_model("hunyuan-video-1.5")
    parts = Parts.of(model, model.grid(*model.size), GPUS["h200"])
    quick = Parts.of(model, model.grid(*model.size), replace(GPUS["h200"], masks=1e30))
    assert parts.call > quick.call
    assert parts.sparse(0.25) == pytest.approx(quick.sparse(0.25)), "sparse layers make none"


def test_choosing_blocks_is_counted() -> None:
    """Sorting q, k, v and the output moves more than means of blocks; fixed masks move nothing."""
    model, grid = real_model("wan2.1-1.3b"), VideoGrid(5, 16, 16)
    found = [selection(planned(model, grid, pattern, 0.3), model)[0] for pattern in (Radial(), TopK(), Ann())]
    one = 2 * grid.tokens * model.width  # bytes of q
    assert found[0] == 0 < 2 * one < found[1]
    # Ann reads and writes q, k, v and the output once more each.
    assert found[2] > 2 * 4 * one


def test_what_flashblock_keeps_is_counted() -> None:
    """An output in 16 bits and its log-sum-exp in 32, for each sparse layer and branch; and where it looked."""
    model = real_model("wan2.1-14b")
    found = estimate(model, model.size, attention=FlashBlock(), density=0.5, schedule=DEFAULT_SCHEDULE)
    rest = 39 * 2 * 40 * 75_600 * (2 * 128 + 4) / 2**30
    lists = 39 * 2 * 40 * 4 * 591**2 * 0.375 / 2**30
    assert found["kept_gib"] == pytest.approx(rest + lists, rel=0.01)
    stays = found["weights_gib"] + found["activations_gib"]
    assert found["peak_gib"] == pytest.approx(stays + found["kept_gib"])
    assert not found["fits"]
    each = estimate(model, model.size, attention=TopK(), density=0.5)
    assert each["kept_gib"] == 0 < estimate(model, model.size, attention=TopK(reselect=5), density=0.5)["kept_gib"]


def test_a_second_path_is_counted_in_layers_of_its_own_too() -> None:
    """A dense call more where it runs, its rows, and what it keeps of the layers that it guides."""
    model = real_model("wan2.1-1.3b")
    size = (720, 1280, 17)
    one = 5 * 45 * 80 * 1536 * 2 / 2**30

    def found(pattern: Pattern, dense_steps: int = 0) -> dict[str, Any]:
        return estimate(model, size, attention=pattern, schedule=Schedule(dense_steps=dense_steps))

    alone = found(FreeSwim())
    for pattern, layers in (
        (FreeSwim(guide=2), 30),
        (PerLayer({0: FreeSwim(), 20: FreeSwim(guide=2)}), 10),
        (FreeSwim(guide=2, guide_gib=2.5 * one), 2),
        (FreeSwim(guide=1), 0),
    ):
        guided = found(pattern)
        assert guided["kept_gib"] == pytest.approx(layers * one)
        assert guided["activations_gib"] == 2 * alone["activations_gib"]
        assert guided["peak_gib"] == pytest.approx(
            guided["weights_gib"] + guided["activations_gib"] + guided["kept_gib"]
        )
    # Of 50 steps: both branches of all, the conditional one of every third, and of every third after 12 dense ones.
    for pattern, dense_steps, calls in (
        (FreeSwim(guide=1), 0, 100),
        (FreeSwim(guide=3), 0, 17),
        (FreeSwim(guide=3), 12, 13),
    ):
        more = found(pattern, dense_steps)["video_s"] - found(FreeSwim(), dense_steps)["video_s"]
        assert more == pytest.approx(calls * alone["dense_ms"] / 1e3)
    assert found(FreeSwim(guide=2), 50)["kept_gib"] == 0
    hunyuan = real_model("hunyuan-video")
    with pytest.raises(InstallError, match="knows no cross-attention of HunyuanVideoTransformer3DModel"):
        estimate(hunyuan, hunyuan.size, attention=PerLayer({0: Radial(), 9: FreeSwim(guide=1)}), density=0.3)
    with pytest.raises(InstallError, match=r"two experts.*use guide=1"):
        estimate(real_model("wan2.2-a14b"), size, attention=FreeSwim(guide=2))


def test_an_all_dense_schedule_is_told() -> None:
    model = real_model("wan2.1-14b")
    found = estimate(model, model.size, attention=Radial(), density=0.25, schedule=Schedule(dense_layers=99))
    assert any("dense_layers=99 is all of the 40 layers" in note for note in found["notes"])


def test_dense_is_estimated_as_it_is() -> None:
    model = real_model("wan2.1-14b")
    assert estimate(model, model.size, attention=Dense()) == estimate(model, model.size)


def test_who_would_lose_is_estimated_dense() -> None:
    model = real_model("wan2.1-14b")
    found = estimate(model, (480, 832, 81), attention=Neighborhood(), density=0.6, gpu="h200")
    assert found["video_speedup"] == pytest.approx(1)
    assert any("Dense attention runs instead" in note for note in found["notes"])


def test_layers_are_estimated_as_the_first_one() -> None:
    """FreeSwim's windows run even where they would lose, in layers of their own too."""
    model = real_model("wan2.1-14b")
    alone, layers = (
        estimate(model, (480, 832, 81), attention=pattern) for pattern in (FreeSwim(), PerLayer({0: FreeSwim()}))
    )
    assert layers["video_speedup"] == alone["video_speedup"] != 1
    with pytest.raises(PatternError, match="this transformer has 40 layers"):
        estimate(model, model.size, attention=PerLayer({0: Radial(), 40: TopK()}), density=0.3)


def test_cut_tiles_are_estimated_slower() -> None:
    """Windows cut most of the tiles: measured 1.36 times as fast as dense, where a stride of one tile had more."""
    model = real_model("wan2.1-14b")
    found = estimate(model, (480, 832, 81), attention=Neighborhood(), density=0.25, gpu="h200")
    assert found["dense_ms"] / found["sparse_ms"] == pytest.approx(1.36, rel=0.15)


def test_without_guidance_a_step_is_one_call() -> None:
    model = real_model("wan2.1-14b")
    both, one = (estimate(model, model.size, guidance=guidance) for guidance in (True, False))
    assert both["dense_video_s"] == pytest.approx(2 * one["dense_video_s"])


def test_bounds_hold_together() -> None:
    model = real_model("wan2.1-14b")
    found = estimate(model, model.size, attention=Radial(), density=0.25, schedule=DEFAULT_SCHEDULE)
    assert 1 < found["video_speedup"] < found["schedule_bound"] < found["bound"] < found["free_attention_speedup"]
    assert found["delivered"] == pytest.approx(0.25, rel=0.05)
    assert found["tokens"] == 75600
    # 12 of 50 steps and one of 40 layers are dense.
    assert found["sparse_share"] == pytest.approx(38 / 50 * 39 / 40)
    whole = estimate(model, model.size, attention=Radial(), density=0.25, schedule=Schedule())
    assert whole["schedule_bound"] == pytest.approx(whole["bound"])


def test_a_cache_is_counted_in_bytes_and_steps() -> None:
    model = real_model("wan2.1-14b")
    found = estimate(model, model.size, cache=CGTaylor(), computed=12)
    # Two branches hold two terms each; the gate of the one that decides holds four.
    assert found["cache_gib"] == pytest.approx(8 * 75600 * 5120 * 2 / 2**30, rel=0.01)
    assert 50 / 13 < found["video_speedup"] < 50 / 12
    assert "video_s" not in estimate(model, model.size, cache=CGTaylor())


def test_two_experts_weigh_twice() -> None:
    one, two = (real_model(name) for name in ("wan2.1-14b", "wan2.2-a14b"))
    weights = [estimate(model, model.size)["weights_gib"] for model in (one, two)]
    assert weights[1] == pytest.approx(2 * weights[0])


@pytest.mark.parametrize("name", sorted(REAL_MODELS))
def test_every_model_at_its_default_size(name: str) -> None:
    model = real_model(name)
    found = estimate(model, model.size)
    assert 0 < found["attention_share"] < 1
    assert found["activations_gib"] > 0
    assert "pattern" not in found


def test_what_cannot_be_says_so() -> None:
    model = real_model("wan2.1-14b")
    with pytest.raises(UsageError, match="h100"):
        estimate(model, model.size, gpu="tpu")
    with pytest.raises(PatternError, match="ask for"):
        estimate(model, model.size, attention=TopK(), density=0.0001)
    for steps, computed in ((0, None), (50, 0), (50, 51)):
        with pytest.raises(UsageError, match="give 1"):
            estimate(model, model.size, cache=CGTaylor(), steps=steps, computed=computed)
    with pytest.raises(UsageError, match="multiples"):
        estimate(model, (721, 1280, 81))


def test_traffic_counts_reads_writes_and_what_is_alive() -> None:
    x = torch.ones(1000)
    with counted.Counter([x]) as counter:
        y = x + 1  # reads and writes 4000 bytes each; 4000 are alive
        z = y.view(10, 100).mul(2)  # a view moves nothing; 8000 are alive
        del y
        del z
        (x + 1).dot(x)  # matrix products are not counted; 4000 are alive
    assert counter.moved == 3 * 8000
    assert counter.most == 8000


def test_traffic_grows_as_tokens_and_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    counted.traffic.cache_clear()
    one = counted.traffic("wan2.1-14b")
    monkeypatch.setattr(counted, "_GRID", VideoGrid(6, 10, 12))
    monkeypatch.setattr(counted, "_HEADS", 16)
    counted.traffic.cache_clear()
    other = counted.traffic("wan2.1-14b")
    counted.traffic.cache_clear()
    assert other.moved["blocks"] == pytest.approx(one.moved["blocks"], rel=0.03)
    assert other.held == pytest.approx(one.held, rel=0.15)


@pytest.mark.parametrize(("steps", "computed"), [(50, 12), (10, 7), (4, 4), (5, 1), (30, 29)])
def test_spread_keeps_its_count_and_the_last_step(steps: int, computed: int) -> None:
    chosen = spread(steps, computed)
    assert len(set(chosen)) == computed
    assert chosen[-1] == steps - 1
    assert min(chosen) >= 0
