"""FreeSwim's second path against its definition: two copies carried through every call, as its authors do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_pipelines
import torch

import vidaccel
from vidaccel import processors
from vidaccel.errors import InstallError, PatternError
from vidaccel.family import family_of
from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import Dense, FreeSwim, PerLayer, TopK
from vidaccel.schedule import Schedule

SITE = Site("", 0, "self", "wan")


def mask_of(pattern: FreeSwim, size: tuple[int, int, int]) -> tuple[torch.Tensor, float]:
    plan = pattern.plan(TokenLayout.of(size, block=16), None, SITE)
    return plan.static.to_dense()[0], plan.scale


class TwoRows:
    """Every call carries (window rows, full rows); `mode` is what the call does, `branches` how many a step has."""

    branches = 2

    def __init__(self, pipe: Any, pattern: FreeSwim, size: tuple[int, int, int], *dense: str) -> None:
        self.mask, self.factor = mask_of(pattern, size)
        self.period, self.mode, self.calls = pattern.guide, "both", 0
        self.kept: dict[str, torch.Tensor] = {}
        self.unguided: tuple[str, ...] = ()
        self.dense = dense
        self.transformer = pipe.transformer
        self.family = family_of(pipe.transformer)
        self.stock = dict(pipe.transformer.attn_processors)
        pipe.transformer.set_attn_processor({name: self.processor(name) for name in self.stock})
        self.hooks = [
            pipe.transformer.register_forward_pre_hook(self.before, with_kwargs=True),
            pipe.transformer.register_forward_hook(lambda _, args, out: (out[0].chunk(2)[0],)),
        ]

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        step, branch = divmod(self.calls, self.branches)
        self.calls += 1
        guided = self.period == 1 or (branch == 0 and step % self.period == 0)
        self.mode = "both" if guided else "kept" if branch == 0 else "alone"
        each = {name for name, x in kwargs.items() if isinstance(x, torch.Tensor)} - {"control_hidden_states_scale"}
        return args, {name: torch.cat([x, x]) if name in each else x for name, x in kwargs.items()}

    def processor(self, name: str) -> Any:
        def own(
            attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
            rotary_emb: Any = None,
        ) -> Any:  # fmt: skip
            if encoder_hidden_states is None and not name.startswith(self.dense):
                return self.video(attn, hidden_states, rotary_emb)
            out = self.stock[name](attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            if encoder_hidden_states is None or name.startswith(self.unguided):
                return out
            if self.mode == "both":
                self.kept[name] = out.chunk(2)[1]
            return out if self.mode == "alone" else torch.cat([self.kept[name]] * 2)

        return own

    def video(self, attn: Any, hidden_states: Any, rope: Any) -> Any:
        layout = TokenLayout.of((1, 1, hidden_states.shape[1]), block=16)
        q, k, v = (x.transpose(1, 2) for x in self.family.project(attn, layout, hidden_states, None, None, rope))
        logits = q @ k.transpose(2, 3) * self.factor / math.sqrt(q.shape[-1])
        windowed = logits.masked_fill(~self.mask, -torch.inf)
        if self.mode == "both":
            windowed = torch.cat([windowed.chunk(2)[0], logits.chunk(2)[1]])
        return self.family.output(attn, (windowed.softmax(-1) @ v).transpose(1, 2), hidden_states)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.transformer.set_attn_processor(self.stock)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(("guide", "gib"), [(1, None), (2, None), (3, 0.0), (2, 3e-4)])
def test_equals_two_rows_in_every_call(wan: Any, render: Any, guide: int, gib: float | None, prompts: int) -> None:
    pattern = FreeSwim((4, 4), block=16, logit_scale=2.0, guide=guide, guide_gib=gib)
    given = {"prompt": ["a cat", "two dogs"][:prompts], "negative_prompt": ["bad", "worse"][:prompts]}
    with vidaccel.accelerate(wan, FreeSwim((4, 4), block=16), schedule=Schedule()):
        unguided = render(wan, "ragged", **given)
    with vidaccel.accelerate(wan, pattern, schedule=Schedule()) as run:
        latents = render(wan, "ragged", **given)
        again = render(wan, "ragged", **given)
        kept = [p.kept for p in run._installations[0]._guide.processors.values()]
        assert kept == [None] * 3, "outputs outlive the last step"
        report = run.report()
    assert torch.equal(latents, again)
    assert (latents - unguided).abs().max() > 1e-3
    naive = TwoRows(wan, pattern, (7, 7, 9))
    torch.testing.assert_close(latents, render(wan, "ragged", **given), atol=5e-5, rtol=1e-4)
    naive.remove()
    modes = {(call.step, call.branch): call.guided for call in run.trace.calls[:8]}
    for (step, branch), mode in modes.items():
        if guide == 1:
            assert mode == "both"
        elif branch == "uncond":
            assert mode == "alone"
        else:
            assert mode == ("kept" if step % guide else "both")
    note = next((note for note in run.trace.notes if "between guided steps" in note), "")
    assert (guide == 1) == (note == "")
    if gib == 0.0:
        assert "0.00 GiB on cpu" in note
    assert report.data["calls"][0]["guided"] == "both"
    assert report.summary["effective_density"] > report.summary["delivered_density"]


def test_skyreels(render: Any) -> None:
    pipe, pattern = tiny_pipelines.skyreels(), FreeSwim((4, 4), block=16, guide=2)
    with vidaccel.accelerate(pipe, pattern, schedule=Schedule()) as run:
        latents = render(pipe, "ragged")
    assert [call.guided for call in run.trace.calls] == ["both", "alone", "kept", "alone"] * 2
    naive = TwoRows(pipe, pattern, (7, 7, 9))
    torch.testing.assert_close(latents, render(pipe, "ragged"), atol=5e-5, rtol=1e-4)
    naive.remove()


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(("guide", "gib", "dense"), [(1, None, (1,)), (2, None, ()), (2, 0.0, (0,)), (3, None, (0, 2))])
def test_ltx_whose_branches_are_one_call(
    render: Any, guide: int, gib: float | None, dense: tuple[int, ...], prompts: int
) -> None:
    """Its rotary embedding has a row for each sample; layers are dense before the first sparse one, and after it."""
    pipe = tiny_pipelines.ltx(layers=4)
    window = FreeSwim((4, 4), block=16, guide=guide, guide_gib=gib)
    given = {"prompt": ["a cat", "two dogs"][:prompts], "negative_prompt": ["bad", "worse words"][:prompts]}
    layers = PerLayer({n: Dense() if n in dense else window for n in range(4)})
    with vidaccel.accelerate(pipe, layers, schedule=Schedule()) as run:
        latents = render(pipe, "ragged", **given)
        assert torch.equal(latents, render(pipe, "ragged", **given))
    naive = TwoRows(pipe, window, (7, 7, 9), *(f"transformer_blocks.{n}." for n in dense))
    naive.branches, naive.unguided = 1, tuple(f"transformer_blocks.{n}." for n in dense)
    torch.testing.assert_close(latents, render(pipe, "ragged", **given), atol=5e-5, rtol=1e-4)
    naive.remove()
    modes = ["both" if step % guide == 0 else "kept" for step in range(4)]
    assert [call.guided for call in run.trace.calls[:4]] == modes
    with vidaccel.accelerate(pipe, FreeSwim((4, 4), block=16), schedule=Schedule()):
        assert (latents - render(pipe, "ragged", **given)).abs().max() > 1e-3


@pytest.mark.parametrize("dense_layers", [1, 2])
def test_copies_part_at_the_first_sparse_layer(wan: Any, render: Any, dense_layers: int) -> None:
    pattern = FreeSwim((4, 4), block=16, guide=2)
    given = {"prompt": ["a cat", "two dogs"], "negative_prompt": ["bad", "worse"]}
    with vidaccel.accelerate(wan, pattern, schedule=Schedule(dense_layers=dense_layers)):
        latents = render(wan, "ragged", **given)
    naive = TwoRows(wan, pattern, (7, 7, 9), *(f"blocks.{layer}." for layer in range(dense_layers)))
    torch.testing.assert_close(latents, render(wan, "ragged", **given), atol=5e-5, rtol=1e-4)
    naive.remove()


def test_layers_of_its_own(wan: Any, render: Any) -> None:
    """Per layer, the window keeps its logit scale and its second path, which guides those layers alone."""
    window, guided = (FreeSwim((4, 4), block=16, logit_scale=2.0, guide=guide) for guide in (0, 2))
    given = {"prompt": ["a cat", "two dogs"], "negative_prompt": ["bad", "worse"]}
    with vidaccel.accelerate(wan, PerLayer({0: window, 1: guided, 2: window}), schedule=Schedule()) as run:
        latents = render(wan, "ragged", **given)
    assert {call.guided for call in run.trace.calls} == {"both", "kept", "alone"}
    naive = TwoRows(wan, guided, (7, 7, 9))
    naive.unguided = ("blocks.0.", "blocks.2.")
    torch.testing.assert_close(latents, render(wan, "ragged", **given), atol=5e-5, rtol=1e-4)
    naive.remove()
    with vidaccel.accelerate(wan, guided, schedule=Schedule()):
        whole = render(wan, "ragged", **given)
    with vidaccel.accelerate(wan, PerLayer({0: guided, 2: guided}), schedule=Schedule()):
        assert torch.equal(render(wan, "ragged", **given), whole)
    before = dict(wan.transformer.attn_processors)
    with pytest.raises(InstallError, match=r"guide=2.*guide=1.*one second path goes through all"):
        vidaccel.accelerate(wan, PerLayer({0: guided, 1: FreeSwim((4, 4), block=16, guide=1)}))
    assert dict(wan.transformer.attn_processors) == before
    assert not wan.transformer._forward_pre_hooks


def test_beside_what_chooses_for_several_steps(wan: Any, render: Any) -> None:
    """A guided call keeps and uses the choices of other layers as all calls do."""
    pattern = PerLayer({0: TopK(block=16, reselect=2), 2: FreeSwim(block=16, guide=1)})
    with vidaccel.accelerate(wan, pattern, density=0.5, schedule=Schedule()) as run:
        render(wan)
    assert [len(call.held) for call in run.trace.calls] == [0, 0, 2, 2] * 2
    assert all(len(call.drift) == (2 if call.step == 2 else 0) for call in run.trace.calls)


def test_control_blocks_of_vace(make_wan: Any, render: Any) -> None:
    """They run before all others, and what they add joins one copy or two, as many as there are at that layer."""
    pipe = make_wan("WanVACEPipeline", vace_layers=[0, 1, 2], vace_in_channels=96)
    # Its controls are zeros until it is trained.
    for block in pipe.transformer.vace_blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.2)
    pattern = FreeSwim((4, 4), block=16, guide=2)
    with vidaccel.accelerate(pipe, pattern, schedule=Schedule(dense_layers=1)):
        latents = render(pipe, "ragged", num_inference_steps=2)
    naive = TwoRows(pipe, pattern, (7, 7, 9), "blocks.0.", "vace_blocks.0.")
    torch.testing.assert_close(latents, render(pipe, "ragged", num_inference_steps=2), atol=5e-5, rtol=1e-4)
    naive.remove()


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_nothing_linear_is_done_twice_for_equal_rows(wan: Any, render: Any, dense_layers: int) -> None:
    """How many rows each linear module of the model is given, in two guided ones of four steps."""
    rows: dict[str, list[int]] = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, out, name=name: rows.setdefault(name, []).append(len(out)))
        for name, module in wan.transformer.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d)
    ]
    schedule = Schedule(dense_last_steps=1, dense_layers=dense_layers)
    with vidaccel.accelerate(wan, FreeSwim((4, 4), block=16, guide=2), schedule=schedule):
        render(wan)
    for hook in hooks:
        hook.remove()
    assert {"patch_embedding", "condition_embedder.text_embedder.linear_1", "blocks.0.attn1.to_q", "proj_out"} < set(
        rows
    )
    for name, found in rows.items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        # What self-attention of the first sparse layer gives back is what tells copies apart.
        parted = layer > dense_layers or (layer == dense_layers and (".attn1.to_out" in name or ".ffn." in name))
        if ".attn2." in name:
            assert found == [1] * 7, name  # step 1, cond: kept
        else:
            assert found == ([2, 1, 1, 1, 2, 1, 1, 1] if parted else [1] * 8), name


def test_memory_is_bounded_and_the_rest_waits_on_the_host(wan: Any, render: Any) -> None:
    one = 7 * 8 * 8 * 64 * 4
    pattern = FreeSwim((4, 4), block=16, guide=2, guide_gib=2.5 * one / 2**30)
    with vidaccel.accelerate(wan, pattern, schedule=Schedule()) as run:
        found = []

        def watch(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            found.append([p.host is not None for p in run._installations[0]._guide.processors.values()])
            return {}

        render(wan, callback_on_step_end=watch)
    assert found[0] == [False, False, True]


def test_a_window_of_everything_is_the_stock_model(wan: Any, render: Any) -> None:
    stock = render(wan)
    with (
        vidaccel.accelerate(wan, FreeSwim(block=16, guide=1), schedule=Schedule()),
        pytest.warns(UserWarning, match="keeps every pair"),
    ):
        torch.testing.assert_close(render(wan), stock, atol=2e-5, rtol=1e-4)


def test_named_processor_and_removal(wan: Any, render: Any) -> None:
    stock, before = render(wan), dict(wan.transformer.attn_processors)
    pattern = FreeSwim((4, 4), block=16, guide=2)
    with vidaccel.accelerate(wan, pattern, schedule=Schedule()):
        expected = render(wan)
    wan.transformer.set_attn_processor(
        processors.FreeSwimAttnProcessor(wan.transformer, native=(4, 4), block=16, guide=2)
    )
    assert torch.equal(render(wan), expected)
    vidaccel.remove(wan.transformer)
    assert dict(wan.transformer.attn_processors) == before
    assert not wan.transformer._forward_pre_hooks
    assert not wan.transformer._forward_hooks
    assert torch.equal(render(wan), stock)


def test_compiles(wan: Any, render: Any) -> None:
    pattern, schedule = FreeSwim((4, 4), block=16, guide=2), Schedule(dense_layers=1)
    with vidaccel.accelerate(wan, pattern, schedule=schedule):
        expected = render(wan)
    torch._dynamo.reset()
    with vidaccel.accelerate(wan, pattern, schedule=schedule):
        wan.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(render(wan), expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_blocks_that_wait_on_the_host(wan: Any, render: Any) -> None:
    pattern, cpu = FreeSwim((4, 4), block=16, guide=2), torch.device("cpu")
    with vidaccel.accelerate(wan, pattern, schedule=Schedule(dense_layers=1)):
        expected = render(wan)
        wan.transformer.enable_group_offload(
            cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
        )
        assert torch.equal(render(wan), expected)


def test_a_failed_call_leaves_the_blocks_in_place(wan: Any, render: Any) -> None:
    blocks = wan.transformer.blocks
    with vidaccel.accelerate(wan, FreeSwim((4, 4), block=16, guide=2), schedule=Schedule()):
        expected = render(wan)
        broken = blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            render(wan)
        assert wan.transformer.blocks is blocks
        broken.remove()
        assert torch.equal(render(wan), expected)


def test_two_experts(make_wan: Any, render: Any) -> None:
    pipe = make_wan(experts=True)
    before = dict(pipe.transformer.attn_processors)
    with pytest.raises(InstallError, match="use guide=1, or guide=0"):
        vidaccel.accelerate(pipe, FreeSwim((4, 4), block=16, guide=2))
    assert dict(pipe.transformer.attn_processors) == before
    assert not pipe.transformer._forward_pre_hooks
    with vidaccel.accelerate(pipe, FreeSwim((4, 4), block=16, guide=1), schedule=Schedule()) as run:
        render(pipe)
    assert {(call.expert, call.guided) for call in run.trace.calls} == {("high", "both"), ("low", "both")}


@pytest.mark.parametrize("family", ["mochi", "cogvideox"])
def test_families_without_cross_attention(family: str) -> None:
    pipe = getattr(tiny_pipelines, family)()
    with pytest.raises(InstallError, match=r"knows no cross-attention of \w+ to guide; it knows that of Wan, Sky"):
        vidaccel.accelerate(pipe, FreeSwim((4, 4), block=16, guide=1))


def test_wrong_parameters_name_right_ones(wan: Any, render: Any) -> None:
    with pytest.raises(PatternError, match="give 1 for none, 2 as its authors"):
        FreeSwim(logit_scale=0.5)
    with pytest.raises(PatternError, match="give 0 for none, 1 for every step, or a period"):
        FreeSwim(guide=-1)
    with pytest.raises(PatternError, match="give GiB from 0 on"):
        FreeSwim(guide_gib=-1.0)
    with pytest.raises(InstallError, match="leave grid= out and name the transformer"):
        processors.FreeSwimAttnProcessor(grid=(7, 8, 8), guide=2)
    with (
        vidaccel.accelerate(wan, FreeSwim((4, 4), block=16, guide=2), cache="taylorseer"),
        pytest.raises(InstallError, match="drop the cache, or use guide=0"),
    ):
        render(wan)
