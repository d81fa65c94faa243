"""`vidaccel estimate`: what a model would cost and could gain, before anything is downloaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .output import Format, FormatOption, Screen


def estimate(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A released model; without one, a table of all.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    attention: Annotated[str | None, typer.Option("--attention", "-a", help="A pattern, such as radial.")] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", "-d", help="Share of video-video pairs that the pattern keeps, in (0, 1]."),
    ] = None,
    cache: Annotated[str | None, typer.Option("--cache", "-c", help="A caching policy, such as cg-taylor.")] = None,
    computed: Annotated[int | None, typer.Option(min=1, help="Steps that the cache computes, such as 12.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="A preset or a .yaml file.")] = None,
    guidance: Annotated[bool, typer.Option(help="Without it, every step is one call.")] = True,
    gpu: Annotated[str, typer.Option(help="h100 or h200.")] = "h100",
    format: FormatOption = Format.human,
) -> None:
    """Predict tokens, times, the bound on the speed-up and memory from a model's configuration alone."""
    from ..api import DEFAULT_SCHEDULE
    from ..errors import UsageError
    from ..lab.estimate import estimate as predict
    from ..pipelines.zoo import REAL_MODELS, real_model
    from ..recipe import Recipe, pattern_from, policy_from
    from .output import prepare

    screen = Screen(format)
    prepare(screen)
    base = Recipe.load(recipe) if recipe else Recipe(schedule=DEFAULT_SCHEDULE)
    whole = base.merge(attention=pattern_from(attention), density=density, cache=policy_from(cache))
    if density is not None and whole.attention is None:
        raise UsageError(f"density {density} was asked for without a pattern; add --attention, such as radial")
    if density not in (None, 1) and whole.attention is not None and whole.attention.name == "dense":
        raise UsageError(f"density {density} was asked for with --attention dense, which keeps all; drop one")
    if computed is not None and whole.cache is None:
        raise UsageError("--computed counts the steps that a cache computes; add --cache, such as cg-taylor")
    if model is None and (height, width, frames) != (None, None, None):
        raise UsageError("a size was given without a model; add --model, such as wan2.1-14b")
    models = [real_model(model)] if model else [m for name, m in REAL_MODELS.items() if name != "wan-tiny"]
    found = [
        predict(
            each,
            (height or each.size[0], width or each.size[1], frames or each.size[2]),
            attention=whole.attention,
            density=whole.density,
            schedule=whole.schedule,
            cache=whole.cache,
            computed=computed,
            steps=steps,
            gpu=gpu,
            guidance=guidance,
        )
        for each in models
    ]
    if screen.json(found[0] if model else found) or screen.names(each["model"] for each in found):
        return
    if model is None:
        screen.table([_cells(each) for each in found], title=f"default sizes on an {gpu.upper()}")
        return
    screen.pairs(_pairs(found[0]))
    for note in found[0].get("notes", ()):
        screen.line(f"note: {note}")


def _cells(found: dict[str, Any]) -> dict[str, object]:
    height, width, frames = found["size"]
    return {
        "model": found["model"],
        "size": f"{height}x{width}x{frames}",
        "tokens": found["tokens"],
        "attention": f"{100 * found['attention_share']:.0f} %",
        "dense call s": found["dense_ms"] / 1e3,
        "visited": found.get("visited"),
        "bound": found.get("bound"),
        "with schedule": found.get("schedule_bound"),
        "video x": found.get("video_speedup") if "pattern" in found or "cache" in found else None,
        "cache GiB": found.get("cache_gib"),
        "peak GiB": found["peak_gib"],
    }


def _pairs(found: dict[str, Any]) -> dict[str, object]:
    height, width, frames = found["size"]
    parts = ", ".join(f"{name} {ms:.0f}" for name, ms in found["dense_parts_ms"].items())
    said: dict[str, object] = {
        "video": f"{height}x{width}, {frames} frames: {'x'.join(map(str, found['grid']))} = {found['tokens']} tokens"
        + (f" and {found['text']} of text" if found["text"] else ""),
        "model": f"{found['model']}, {found['layers']} layers of {found['heads']} heads x {found['head_dim']}",
        "dense call": f"{found['dense_ms']:.0f} ms on an {found['gpu'].upper()} ({parts})",
        "dense video": f"{found['dense_video_s']:.0f} s for {found['steps']} steps of {found['calls_a_step']} calls",
        "attention's share": f"{100 * found['attention_share']:.0f} % of the time; were it free, "
        f"{found['free_attention_speedup']:.2f} times faster",
    }
    if "pattern" in found:
        asked = "" if found["requested"] is None else f"requested {found['requested']:.3f}, "
        said |= {
            "pattern": f"{found['pattern']} ({found['rule']}): {asked}delivered {found['delivered']:.3f}, visited "
            f"{found['visited']:.3f}, {100 * found['padding']:.1f} % of the slots empty",
            "sparse call": f"{found['sparse_ms']:.0f} ms, {found['selection_ms']:.0f} of them to choose blocks",
            "speed-up, at most": f"{found['bound']:.2f} for a call, {found['schedule_bound']:.2f} with "
            f"{100 * found['sparse_share']:.0f} % of layers and steps sparse",
        }
    if "cache" in found:
        said["cache"] = f"{found['cache']} holds {found['cache_gib']:.2f} GiB"
    if "video_s" in found and ("pattern" in found or "cache" in found):
        said["video, predicted"] = f"{found['video_s']:.0f} s, {found['video_speedup']:.2f} times faster"
    said["memory"] = (
        f"{found['peak_gib']:.1f} GiB: weights {found['weights_gib']:.1f}, activations {found['activations_gib']:.1f}"
        + (f", cache {found['cache_gib']:.1f}" if "cache" in found else "")
        + (f", kept from step to step {found['kept_gib']:.1f}" if found.get("kept_gib", 0) >= 0.05 else "")
        + ("" if found["fits"] else f"; more than an {found['gpu'].upper()} has")
    )
    return said
