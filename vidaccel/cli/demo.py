"""`vidaccel demo`: one prompt, dense and sparse, side by side."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Format, FormatOption, Screen


def demo(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to show.")] = "a red circle moves right",
    model: Annotated[str, typer.Option("--model", "-m", help="A shipped sample, a folder, or a hub id.")] = "wan-tiny",
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="What runs sparse.")] = "wan-tiny",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for videos and reports.")] = Path("out/demo"),
    format: FormatOption = Format.human,
) -> None:
    """Render one prompt densely and with sparse attention, and compare times, densities and pictures."""
    from ..recipe import Recipe
    from ..render import DENSE, RenderJob, find, open_pipeline, save, video, weights
    from .batch import measured, render_with_progress
    from .compare import write_page
    from .output import prepare

    screen = Screen(format)
    prepare(screen)
    found = find(model)
    dense = RenderJob(prompt, model, seed=seed, num_inference_steps=steps).complete(found)
    jobs = {"dense": replace(dense, recipe=DENSE), "sparse": replace(dense, recipe=Recipe.load(recipe))}
    video.check_writable(output / "dense.mp4")
    screen.say(f"loading {found.reference} on {dense.device}, {dense.dtype}")
    pipe, mark = open_pipeline(dense, found), weights.fingerprint(found)
    results: dict[str, dict[str, Any]] = {}
    frames = {}
    for name, job in jobs.items():
        _warm_up(pipe, job)
        rendering = render_with_progress(screen, pipe, job, name)
        path = output / f"{name}.mp4"
        save(path, rendering, job, found, mark)
        rendering.report.save(output / f"{name}-report")
        frames[name] = rendering.frames
        results[name] = {
            "file": str(path),
            "report": str(output / f"{name}-report" / "report.html"),
            **measured(rendering),
        }
    speedup = results["dense"]["seconds"]["denoise"] / results["sparse"]["seconds"]["denoise"]
    page = output / "compare.html"
    write_page(screen, [output / f"{name}.mp4" for name in jobs], page)
    data = {**results, "denoising_speedup": speedup, "psnr_db": video.psnr(frames["dense"], frames["sparse"])}
    data |= {"page": str(page)}
    if screen.json(data) or screen.names(result["file"] for result in results.values()):
        return
    screen.table(
        [
            {
                "": name,
                "denoising s": result["seconds"]["denoise"],
                "decoding s": result["seconds"]["decode"],
                "requested": result["requested_density"],
                "delivered": result["delivered_density"],
                "visited": result["visited_density"],
                "effective": result["effective_density"],
                "video": result["file"],
                "report": result["report"],
            }
            for name, result in results.items()
        ],
        title=f"{prompt!r}, {dense.width}x{dense.height}, {dense.num_frames} frames, "
        f"{dense.num_inference_steps} steps, seed {seed}",
    )
    screen.pairs({"denoising speed-up": f"{speedup:.2f}x", "PSNR sparse against dense": f"{data['psnr_db']:.1f} dB"})
    screen.line(f"side by side: {page}")


def _warm_up(pipe: Any, job: Any) -> None:
    """Two steps without decoding, so that memory, kernels and their first checks are not counted as denoising."""
    from ..api import accelerate
    from ..schedule import Schedule

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = accelerate(pipe, recipe=replace(job.recipe, schedule=Schedule()))
    with run:
        pipe(
            job.prompt,
            height=job.height,
            width=job.width,
            num_frames=job.num_frames,
            num_inference_steps=2,
            max_sequence_length=job.max_sequence_length,
            output_type="latent",
        )
