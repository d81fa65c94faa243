"""Where a broken video breaks: the first step and layer that gives NaN, wrong or flat values, or else the VAE.

Idea: a run that looks at everything stops at the first thing that is wrong, while what led to it is still at hand.
    Every sparse attention is compared with the reference on sampled rows, so that a kernel is told from its input.
Cost: each layer waits for the device, and each sparse call costs about 64 rows more: for finding faults, not for work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import trace
from ..errors import BackendError
from ..family import family_of

# Of 255 levels: what a frame at most has everywhere to count as black, as reports count it.
_BLACK = 4


@contextlib.contextmanager
def watched(pipe: Any) -> Iterator[None]:
    """Stop a run of a pipeline at the first broken value, and say where it came from.

    Raises:
        BackendError: in the block, with step, layer and kernel, or with what the VAE did.
    """
    with contextlib.ExitStack() as watches:
        for name in ("transformer", "transformer_2"):
            if (transformer := getattr(pipe, name, None)) is not None:
                watches.enter_context(finite(transformer))
        if getattr(pipe, "vae", None) is not None:
            watches.enter_context(_decoding(pipe.vae))
        yield


@contextlib.contextmanager
def finite(transformer: Any) -> Iterator[None]:
    """Stop a run at the first layer whose values are broken, or whose kernel is wrong.

    Raises:
        BackendError: in the block, with step, layer and kernel.
    """
    family = family_of(transformer)
    undo: list[Callable[[], None]] = []
    where = ""

    def watch(module: Any, name: str, what: str) -> None:
        def before(*_: Any) -> None:
            nonlocal where
            record = trace.current()
            where = "" if record is None else f"step {record.step} ({record.branch or 'one branch'}), "
            if record is not None and record.trace is not None:
                record.trace.checked.clear()  # So that this call is checked, and not the first of its shape alone.

        def after(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            record = trace.current()
            if not _is_finite(output):
                if not _is_finite([*args, *kwargs.values()]):
                    cause = "its input was broken already: the embedding, the text or the latents"
                elif what == "attention" and record is not None and record.kernels:
                    cause = f"its input was finite; the kernel {record.kernels[-1]} was right on sampled rows, which "
                    cause += "leaves the layer's own weights"
                else:
                    cause = "its input was finite: the layer's own weights made it, fp16 overflow is the usual cause"
                raise BackendError(
                    f"{where}{what} {name} gives values that are no finite numbers; {cause}. Try bfloat16"
                )
            if what == "block" and _is_flat(output):
                raise BackendError(
                    f"{where}{what} {name} gives every token the same values: such a video is one flat colour. "
                    "Look at this layer's weights and at what was loaded over them (LoRA, quantisation)"
                )

        undo.append(module.register_forward_pre_hook(before).remove)
        undo.append(module.register_forward_hook(after, with_kwargs=True).remove)

    for site in family.sites(transformer):
        name = site.name.removesuffix(".processor")
        watch(transformer.get_submodule(name), name, "attention")
    for each in family.stack(transformer).lists:
        for number, block in enumerate(getattr(transformer, each)):
            watch(block, f"{each}.{number}", "block")
    try:
        yield
    except BackendError as error:
        # The kernels' own check knows the layer, but not the step.
        raise error if not where or where in str(error) else BackendError(f"{where}{error}") from error
    finally:
        for step in undo:
            step()


@contextlib.contextmanager
def _decoding(vae: Any) -> Iterator[None]:
    """Look at what the VAE gets and what it makes of it."""
    own = vae.decode
    placed = vars(vae).get("decode")

    def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _is_finite(latents):
            raise BackendError(
                "the latents are no finite numbers, though every layer gave finite ones: scheduler or guidance made "
                "them. Try another scheduler, or a smaller guidance scale"
            )
        made = own(latents, *args, **kwargs)
        video = made[0] if isinstance(made, tuple) else made.sample
        fate = None
        if not _is_finite(video):
            fate = "frames that are no finite numbers"
        elif float(video.max()) <= -1 + 2 * _BLACK / 255:
            fate = "black frames"
        if fate and float(latents.std()) > 0:
            raise BackendError(
                f"the VAE makes {fate} of latents that are finite and vary, so no layer before it is to blame; "
                "keep the VAE in float32: pipe.vae.to(torch.float32)"
            )
        return made

    vars(vae)["decode"] = decode
    try:
        yield
    finally:
        del vars(vae)["decode"]
        if placed is not None:
            vars(vae)["decode"] = placed


def _is_finite(value: Any) -> bool:
    found = [x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, torch.Tensor)]
    return all(bool(x.isfinite().all()) for x in found if x.is_floating_point())


def _is_flat(value: Any) -> bool:
    """All tokens of (b, l, channels) are the same."""
    x = value[0] if isinstance(value, (list, tuple)) else value
    if not isinstance(x, torch.Tensor) or x.ndim != 3 or x.shape[1] < 2:
        return False
    return float((x - x[:, :1]).abs().max()) <= 1e-6 * float(x.abs().max())
