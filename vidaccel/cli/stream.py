"""`vidaccel render --stream`: an autoregressive video into an mp4 that plays from the first chunk on."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..render import stream, video
from .output import Screen, prepare
from .settings import scalars
from .world import World


def run_stream(
    screen: Screen,
    job: stream.StreamJob,
    *,
    methods: Sequence[str],
    settings: Sequence[str],
    output: Path,
    overwrite: bool,
    unused: Mapping[str, Any],
    world: World,
) -> None:
    """Stream one prompt.

    Args:
        screen: where results go.
        job: what to show, without methods.
        methods: names of methods.
        settings: "method.setting=value".
        output: the mp4.
        overwrite: replace it where it exists.
        unused: options of other renders, by name; none may have been given.
        world: the processes of this command, which all make this one video.

    Raises:
        UsageError: options that do not go together, or a model that does not stream.
    """
    if given := [name for name, value in unused.items() if value is not None and value is not False]:
        raise UsageError(
            f"--{given[0].replace('_', '-')} was given, which a stream on the command line does not take; it takes "
            f"--method ({', '.join(stream.METHODS)}), --density, --set method.setting=value and --offload cache"
        )
    if world.teams > 1:
        raise UsageError(
            f"{world.size} processes were started for one stream; add --context-parallel {world.size}, or start one"
        )
    chosen = stream.methods_from(methods, scalars(settings))

    def decide() -> int:
        if output.exists() and not overwrite:
            raise UsageError(f"{output} exists; --overwrite replaces it, -o names another file")
        video.check_writable(output)
        return random.SystemRandom().randrange(2**31) if job.seed is None else job.seed

    seed = world.decided(decide)
    prepare(screen)
    screen.say(f"loading {job.model}")
    pipe, ready = stream.open_stream(replace(job, methods=chosen, seed=seed), world.together)
    if not world.is_first:
        # Its frames are the first one's, which writes them; what it keeps of them goes with it.
        with tempfile.TemporaryDirectory() as folder:
            stream.stream(pipe, ready, Path(folder) / output.name, lambda done: None)
        return
    rollout = pipe.rollout
    screen.say(
        f"chunks of {rollout.chunk} latent frames, window {rollout.window or 'of all'}, on {ready.device}, "
        f"{ready.dtype}; {output} can be played from the first chunk on"
    )
    notes: set[str] = set()

    def tell(done: stream.ChunkDone) -> None:
        if done.note and done.note not in notes:
            notes.add(done.note)
            screen.say(f"chunk {done.number}: {done.note}")
        screen.say(
            f"{output.name}: {done.frames}/{done.total} frames, chunk {done.number} in {done.seconds:.2f} s, "
            f"density {done.density:.2f}, cache {done.cache_bytes / 2**20:.0f} MiB"
        )

    made = 0

    def count(done: stream.ChunkDone) -> None:
        nonlocal made
        made = done.frames
        tell(done)

    try:
        result = stream.stream(pipe, ready, output, count)
    except KeyboardInterrupt as stop:
        kept = f"{output} holds the {made} frames that are finished" if made else "nothing was written"
        raise KeyboardInterrupt(f"{str(stop) or 'interrupted'}; {kept}") from None
    if not screen.json(result) and not screen.names([result["file"]]):
        reuse = result["reuse_rate"]
        more = "" if reuse is None else f", {reuse:.0%} of attention to the past reused"
        screen.line(
            f"{output}: seed {result['seed']}, {result['frames']} frames in {result['seconds']:.1f} s, "
            f"{result['frames_per_second']:.2f} a second{more}"
        )
