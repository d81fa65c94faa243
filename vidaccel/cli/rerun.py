"""`vidaccel rerun`: make a video again from the record in its mp4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Format, FormatOption, Screen, clean


def rerun(
    video: Annotated[Path, typer.Argument(help="An mp4 that vidaccel wrote.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The new mp4; default NAME.rerun.mp4.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the model is now, if not where the record says.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Where the first frame's image is now.")] = None,
    source: Annotated[Path | None, typer.Option("--video", help="Where the video it started from is now.")] = None,
    attention: Annotated[
        str | None,
        typer.Option("--attention", "-a", help="my_module:MyPattern, for a video made with a pattern of your own."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Another device; frames will differ.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when the frames differ.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the record and what would be loaded; load nothing.")
    ] = False,
    format: FormatOption = Format.human,
) -> None:
    """Make a video again from the recipe, seed and settings in its mp4, and say whether the frames are identical.

    The record is data: it names a model, it never brings code. What will be loaded is printed first.
    """
    from .. import env
    from ..errors import RenderError, UsageError
    from ..render import find, open_pipeline, preview, save, weights
    from ..render import video as files
    from .batch import measured, render_with_progress
    from .output import prepare
    from .settings import guard

    screen = Screen(format)
    if not video.is_file():
        raise UsageError(f"{video} was to be made again, but there is no such file; give an mp4 that vidaccel wrote")
    data = files.read_record(video)
    job, reference, revision = read_job(data, attention)
    job = replace(
        job,
        model=model or reference,
        device=device or job.device,
        image=str(image) if image else job.image,
        video=str(source) if source else job.video,
    )
    screen.say(
        f"record: model {job.model}, recipe {job.recipe.hash}, {job.width}x{job.height}, {job.num_frames} frames, "
        f"{job.num_inference_steps} steps, seed {job.seed}, prompt {clean(job.prompt)!r:.80}"
    )
    if dry_run:
        if not screen.json(data) and not screen.names([job.model]):
            screen.pairs(
                {"model": job.model, **job.to_dict(), "recipe": job.recipe.hash, **_flat(data.get("versions"))}
            )
        return
    path = output or video.with_name(f"{video.stem}.rerun.mp4")
    if path.suffix != ".mp4":
        raise UsageError(f"-o {path} is not an .mp4 file; vidaccel writes mp4")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; --overwrite replaces it, -o names another file")
    prepare(screen)
    asked = dict(job.inputs)
    found = find(job.model, None if model else revision)
    job = job.complete(found)
    guard("the record", lambda: preview(job, found))
    for name in asked.keys() | job.inputs.keys():
        if asked.get(name) != job.inputs.get(name):
            raise UsageError(
                f"{name} {getattr(job, name)} is not the file that this video was made from; give it with --{name}"
            )
    mark = weights.fingerprint(found)
    if mark != data["model"].get("fingerprint"):
        screen.warn(f"{job.model} is not the model that made this video: its files have changed since")
    for name, before, now in _changes(data, env.environment()):
        screen.warn(f"{name} was {before}, is {now}: frames may differ")
    files.check_writable(path)
    screen.say(f"loading {found.reference} ({found.kind}, {found.pipeline}) from {found.folder}")
    rendering = render_with_progress(screen, open_pipeline(job, found), job, path.name)
    save(path, rendering, job, found, mark)
    identical = rendering.sha256 == data.get("frames_sha256")
    result = {"file": str(path), "identical": identical, "frames_sha256": rendering.sha256, **measured(rendering)}
    if not screen.json(result) and not screen.names([path]):
        screen.line(f"{path}: {'frames are identical' if identical else 'frames differ'}")
    if strict and not identical:
        raise RenderError(f"the frames of {path} differ from those of {video}")


def read_job(data: Mapping[str, Any], attention: str | None = None) -> tuple[Any, str, str | None]:
    """The job in a record, the model it names, and that model's revision on the hub.

    The record is untrusted: only known keys of the right types pass, and a recipe is built from the patterns that come
    with vidaccel, or from the one that the user has named.

    Raises:
        UsageError: a record of another version, or one that does not hold a job.
        RecipeError: a recipe that cannot be.
    """
    from ..errors import UsageError
    from ..recipe import Recipe
    from ..render import RenderJob
    from .settings import guard, load_pattern

    if data.get("vidaccel") != 1:
        raise UsageError(f"the record has version {data.get('vidaccel')!r:.20}; this vidaccel reads version 1")
    if "stream" in data:
        raise UsageError(
            "this is a stream, which rerun does not make again; `vidaccel render` with the model, the prompt, the seed "
            "and the methods of its record does"
        )
    job, model, recipe = data.get("job"), data.get("model"), data.get("recipe")
    if not (isinstance(job, dict) and isinstance(model, dict) and isinstance(recipe, dict)):
        raise UsageError("the record holds no job, model and recipe")
    kinds = {f.name: _kinds(str(f.type)) for f in fields(RenderJob) if f.name not in ("model", "recipe")}
    for name, value in job.items():
        if name not in kinds or type(value) not in kinds[name]:
            raise UsageError(
                f"the record has {clean(name)!r:.40} = {clean(value)!r:.60}, which is no setting of a render"
            )
    if not isinstance(job.get("prompt"), str) or type(job.get("seed")) is not int:
        raise UsageError("the record holds no prompt and seed")
    reference, revision = model.get("reference"), model.get("revision")
    if not isinstance(reference, str) or not reference.isprintable():
        raise UsageError("the record names no model")
    if revision is not None and not (isinstance(revision, str) and len(revision) == 40 and revision.isalnum()):
        raise UsageError("the record names a revision that is no commit of the hub")
    pattern = recipe.get("attention")
    if attention and isinstance(pattern, dict):
        own = load_pattern(attention, {key: value for key, value in pattern.items() if key != "name"})
        made = guard("the record", lambda: Recipe.from_dict({**recipe, "attention": None}).merge(attention=own))
    else:
        made = guard("the record", lambda: Recipe.from_dict(recipe))
    return RenderJob(**job, recipe=made), reference, revision


def _kinds(annotation: str) -> tuple[type, ...]:
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "None": (type(None),)}
    if annotation.startswith("dict"):
        return (dict,)
    return tuple(kind for part in annotation.split(" | ") for kind in kinds[part])


def _changes(data: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, object, object]]:
    before = _flat(data.get("versions")) | _flat(data.get("machine"))
    after = _flat(now["versions"]) | _flat(now["device"])
    return [(name, before[name], after.get(name)) for name in sorted(before) if before[name] != after.get(name)]


def _flat(values: object) -> dict[str, Any]:
    return {str(name): value for name, value in values.items()} if isinstance(values, Mapping) else {}
