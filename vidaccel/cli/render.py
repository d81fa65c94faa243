"""`vidaccel render`: one prompt, or a file of them, to mp4."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Format, FormatOption, Screen

_INPUT, _SPARSE, _MACHINE, _RESULT = "What to show", "What runs sparse", "Where and how", "Result"


def render(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to show.", rich_help_panel=_INPUT)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file with a prompt a line; # starts a comment. Run again after an interruption, it goes on.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="A shipped sample, a diffusers folder, or a hub id.", rich_help_panel=_INPUT
        ),
    ] = "wan-tiny",
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.", rich_help_panel=_INPUT)] = None,
    image: Annotated[
        Path | None, typer.Option(help="First frame, for image-to-video models and streams.", rich_help_panel=_INPUT)
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(help="Video to start from (Wan), or that a stream goes on with.", rich_help_panel=_INPUT),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much of --video, or of the enlarged video, is made anew.", rich_help_panel=_INPUT),
    ] = None,
    upscale: Annotated[
        str | None,
        typer.Option(
            help="Render, enlarge (2x, 3x, 4x) and refine with FreeSwim, or what --attention names (Wan).",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=_INPUT)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=_INPUT)] = None,
    frames: Annotated[int | None, typer.Option(help="Frames: 4k+1 for most models.", rich_help_panel=_INPUT)] = None,
    fps: Annotated[float | None, typer.Option(help="Frames in a second.", rich_help_panel=_INPUT)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=_INPUT)] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is none.", rich_help_panel=_INPUT)
    ] = None,
    max_sequence_length: Annotated[int | None, typer.Option(help="Text tokens.", rich_help_panel=_INPUT)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the noise; random without one, always recorded.", rich_help_panel=_INPUT)
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            "--attention", "-a", help="A pattern (radial, ...), dense, or my_module:MyPattern.", rich_help_panel=_SPARSE
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", "-d", help="Fraction of video pairs kept, in (0, 1].", rich_help_panel=_SPARSE),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option("--cache", "-c", help="What is kept from step to step: cg-taylor, ...", rich_help_panel=_SPARSE),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A preset or a .yaml file.", rich_help_panel=_SPARSE)
    ] = None,
    dense_steps: Annotated[
        str | None, typer.Option(help="First steps that run dense: a count or a fraction.", rich_help_panel=_SPARSE)
    ] = None,
    dense_last_steps: Annotated[
        str | None, typer.Option(help="Last steps that run dense.", rich_help_panel=_SPARSE)
    ] = None,
    dense_layers: Annotated[
        str | None,
        typer.Option(help="Layers that run dense: the first n, or numbers such as 0,1,-1.", rich_help_panel=_SPARSE),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change one value of the recipe: --set attention.block=64.", rich_help_panel=_SPARSE
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Write chunk by chunk; causal models always do.", rich_help_panel=_SPARSE),
    ] = False,
    rollout: Annotated[
        str | None,
        typer.Option(help="How a causal model was trained: self-forcing, longlive, ...", rich_help_panel=_SPARSE),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="Of streams, one or more: ann, ann-cross, flashblock, hybrid, light-forcing, tempcache.",
            rich_help_panel=_SPARSE,
        ),
    ] = None,
    graphs: Annotated[
        bool,
        typer.Option("--graphs", help="Of streams: play repeated forwards as CUDA graphs.", rich_help_panel=_SPARSE),
    ] = False,
    even_if_slower: Annotated[
        bool,
        typer.Option(
            "--even-if-slower",
            help="Sparse also where dense attention is as fast, by estimate; else dense runs there, and says so.",
            rich_help_panel=_SPARSE,
        ),
    ] = False,
    dense_backend: Annotated[
        str | None,
        typer.Option(
            help="Attention backend of diffusers for dense layers, such as xformers.", rich_help_panel=_MACHINE
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=_MACHINE)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", rich_help_panel=_MACHINE)] = None,
    offload: Annotated[
        str, typer.Option(help="none, model, sequential or group; of streams cache.", rich_help_panel=_MACHINE)
    ] = "none",
    context_parallel: Annotated[
        int,
        typer.Option(help="Processes (GPUs) that make one video together, under torchrun.", rich_help_panel=_MACHINE),
    ] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The mp4, or a folder for --prompts.", rich_help_panel=_RESULT)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files.", rich_help_panel=_RESULT)
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.json, .md and .html.", rich_help_panel=_RESULT)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; load no weights.", rich_help_panel=_RESULT)
    ] = False,
    format: FormatOption = Format.human,
) -> None:
    """Render videos from text, densely or with sparse attention, and write how each was made into its mp4."""
    from ..errors import UsageError
    from ..render import DENSE, RenderJob, find, preview, recipe_for
    from ..render.stream import StreamJob, is_causal
    from .batch import read_prompts, run_jobs, targets
    from .output import prepare
    from .settings import build_recipe, guard, read_factor
    from .stream import run_stream
    from .world import joined

    world = ctx.with_resource(joined(context_parallel, device))
    screen = Screen(format if world.is_first else Format.quiet, world.is_news)
    if (prompt is None) == (prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE")
    texts = [prompt] if prompt is not None else read_prompts(prompts)
    if not all(text.strip() for text in texts):
        raise UsageError("the prompt is empty; say what to show")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"density {density:g} was asked for; it is the fraction of pairs kept, in (0, 1], 1 is dense")
    if stream or rollout or methods or is_causal(model):
        if prompts is not None:
            raise UsageError("a stream takes one --prompt; a prompts file is for models that see all frames at once")
        job = StreamJob(
            texts[0],
            model,
            rollout,
            density=density,
            height=height,
            width=width,
            num_frames=frames,
            fps=fps,
            steps=steps,
            guidance=guidance,
            max_sequence_length=max_sequence_length,
            seed=seed,
            dtype=dtype,
            device=world.device(device),
            negative_prompt=negative_prompt,
            image=None if image is None else str(image),
            video=None if video is None else str(video),
            graphs=graphs,
            offload_cache=offload == "cache",
            even_if_slower=even_if_slower,
        )
        unused: dict[str, Any] = {"strength": strength, "upscale": upscale}
        unused |= {"attention": attention, "cache": cache, "recipe": recipe, "report": report}
        unused |= {"dense_steps": dense_steps, "dense_last_steps": dense_last_steps, "dense_layers": dense_layers}
        unused |= {
            "dense_backend": dense_backend,
            "dry_run": dry_run,
            f"offload {offload}": offload not in ("none", "cache"),
        }
        path = targets(texts, output, is_batch=False)[0]
        run_stream(
            screen,
            job,
            methods=methods or (),
            settings=settings or (),
            output=path,
            overwrite=overwrite,
            unused=unused,
            world=world,
        )
        return
    if graphs:
        raise UsageError(
            f"--graphs was asked for, but {model} sees all frames at once; only streams repeat forwards. Leave it "
            "out, or name a causal model with --model (sample-causal)"
        )
    prepare(screen)
    found = find(model)
    schedule = {"dense_steps": dense_steps, "dense_last_steps": dense_last_steps, "dense_layers": dense_layers}
    factor = read_factor(upscale)
    settings = [*(settings or ()), *(["schedule.even_if_slower=true"] if even_if_slower else ())]
    asked = recipe or attention or density or cache or settings or any(schedule.values())
    chosen = build_recipe(
        found,
        recipe=recipe,
        attention=attention,
        density=density,
        cache=cache,
        schedule=schedule,
        settings=settings,
    )
    if factor and not asked:
        size = {"height": height, "width": width, "num_frames": frames}
        chosen = recipe_for(found, **{name: value or found.defaults()[name] for name, value in size.items()})
    first = RenderJob(
        texts[0],
        model,
        chosen,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_frames=frames,
        fps=fps,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=max_sequence_length,
        seed=seed,
        image=None if image is None else str(image),
        video=None if video is None else str(video),
        strength=strength,
        upscale=factor,
        dtype=dtype,
        device=world.device(device),
        dense_backend=dense_backend,
        offload=offload,
    ).complete(found)
    if not (asked or factor):
        own = "dense; for speed add --attention radial --density 0.3, or --recipe" if chosen == DENSE else ""
        screen.say(f"attention: {own or f'preset {model}; --attention dense renders without it'}")
    paths = targets(texts, output, is_batch=prompts is not None)
    # Planned before any weight is loaded: a pattern that cannot be had here is told in seconds.
    planned = guard("the recipe", lambda: preview(first, found))
    if planned["memory_gib"] is not None:
        screen.say(f"refining at {first.size[1]}x{first.size[0]} needs {_in_words(planned['memory_gib'])}")
    if dry_run:
        if world.is_first:
            _show(screen, first, found, planned, paths)
        return
    for note in planned["notes"]:
        screen.say(f"note: {note}")
    if first.recipe.cache is not None:
        screen.say(f"cache {first.recipe.cache.name} holds at most {planned['cache_gib']:.3g} GiB")
    run_jobs(
        screen,
        found,
        first,
        texts,
        paths,
        is_batch=prompts is not None,
        seed_given=seed is not None,
        overwrite=overwrite,
        report=report,
        world=world,
    )


def _in_words(memory: dict[str, float | None]) -> str:
    """GiB by what needs it; None is not known yet."""
    from ..render.upscale import most

    parts = [f"{name} {'unknown' if gib is None else f'{gib:.3g}'}" for name, gib in memory.items()]
    return f"{most(memory):.3g} GiB on the device and more: {', '.join(parts)}"


def _show(screen: Screen, job: Any, model: Any, planned: dict[str, Any], paths: list[Path]) -> None:
    from ..lab.trials import describe

    data = planned | {"outputs": [str(path) for path in paths]}
    if screen.json(data) or screen.names(paths):
        return
    cache = job.recipe.cache
    shape = f"{job.size[1]}x{job.size[0]}, {job.num_frames} frames at {job.fps:g} a second"
    if job.upscale:
        shape += f", from {job.width}x{job.height}"
    screen.pairs(
        {
            "model": f"{model.reference} ({model.kind}, {model.pipeline}, {model.layers} layers)",
            "video": shape,
            "grid": f"{data['grid']} = {data['tokens']} tokens",
            "recipe": f"{data['recipe_hash']}, {describe(job.recipe)}",
            "steps": f"{data['dense_steps']} dense, {data['sparse_steps']} with {data['sparse_layers']} sparse layers",
            "effective density": data["effective_density"],
            "cache": "none" if cache is None else f"{cache.name}, at most {data['cache_gib']:.3g} GiB",
            "seed": job.seed,
            "runs on": f"{job.device}, {job.dtype}, offload {job.offload}",
            "dense backend": job.dense_backend or "the default of diffusers",
            "would write": paths[0] if len(paths) == 1 else f"{len(paths)} files, {paths[0]} to {paths[-1].name}",
        }
    )
    if data["plans"]:
        screen.table(data["plans"], title="plans")
    for note in data["notes"]:
        screen.line(f"note: {note}")
