"""The first thing that is broken is found and named: a layer, a kernel, the scheduler or the VAE."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vidaccel
from vidaccel.errors import BackendError
from vidaccel.kernels import cpu
from vidaccel.lab.trouble import finite, watched
from vidaccel.patterns import Radial


def sparse(pipe: Any) -> Any:
    return vidaccel.accelerate(pipe, Radial(block=16), density=0.4, schedule=vidaccel.Schedule(dense_steps=1))


def test_a_whole_run_is_left_alone(wan: Any, render: Any) -> None:
    with sparse(wan):
        expected = render(wan, output_type="np")
        with watched(wan):
            assert (render(wan, output_type="np") == expected).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in wan.transformer.modules())
    assert "decode" not in vars(wan.vae)


def test_the_first_broken_layer_is_named(wan: Any, render: Any) -> None:
    with torch.no_grad():
        wan.transformer.blocks[1].attn1.to_out[0].weight[0, 0] = torch.nan
    with (
        sparse(wan),
        finite(wan.transformer),
        pytest.raises(BackendError, match=r"step 0 \(cond\), attention blocks\.1\.attn1 .* its input was finite"),
    ):
        render(wan)
    assert not any(module._forward_hooks for module in wan.transformer.modules())


def test_broken_feed_forwards_and_inputs_are_told_apart(wan: Any, render: Any) -> None:
    with torch.no_grad():
        wan.transformer.blocks[2].ffn.net[2].weight[0, 0] = torch.inf
    with finite(wan.transformer), pytest.raises(BackendError, match=r"block blocks\.2 .* its input was finite"):
        render(wan)
    with torch.no_grad():
        wan.transformer.patch_embedding.bias[0] = torch.nan
    with finite(wan.transformer), pytest.raises(BackendError, match=r"blocks\.0.* broken already"):
        render(wan)


@pytest.mark.parametrize("kind", ["wrong", "nan"])
def test_a_kernel_that_goes_wrong_late_is_named(
    wan: Any, render: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The check of the first call passed: only looking at every call finds this one."""
    own, calls = cpu.run, 0

    def run(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        out, lse = own(*args)
        return (out * (1.5 if kind == "wrong" else torch.nan), lse) if calls == 9 else (out, lse)

    monkeypatch.setattr(cpu, "run", run)
    with sparse(wan):
        render(wan)
    calls = 0
    # Step 0 is dense; three layers and two branches make the ninth call the last layer's in step 2.
    words = r"step 2 \(cond\), the cpu kernel in blocks\.2\.attn1\.processor .* is wrong: out is off by"
    with pytest.raises(BackendError, match=words), sparse(wan), finite(wan.transformer):
        render(wan)


def test_flat_features_are_found(wan: Any, render: Any) -> None:
    with torch.no_grad():
        wan.transformer.patch_embedding.weight.zero_()
        for block in wan.transformer.blocks:
            block.attn1.to_out[0].weight.zero_()
    words = r"step 0 .*block blocks\.0 gives every token the same"
    with sparse(wan), finite(wan.transformer), pytest.raises(BackendError, match=words):
        render(wan)


def test_a_vae_that_makes_black_frames_is_named(wan: Any, render: Any) -> None:
    with torch.no_grad():
        wan.vae.decoder.conv_out.weight.zero_()
        wan.vae.decoder.conv_out.bias.fill_(-1)
    with (
        watched(wan),
        pytest.raises(BackendError, match="the VAE makes black frames of latents that are finite"),
    ):
        render(wan, output_type="np")
    assert "decode" not in vars(wan.vae)


def test_a_vae_that_makes_nan_is_named(wan: Any, render: Any) -> None:
    with torch.no_grad():
        wan.vae.decoder.conv_out.bias.fill_(torch.nan)
    with watched(wan), pytest.raises(BackendError, match="the VAE makes frames that are no finite numbers"):
        render(wan, output_type="np")
