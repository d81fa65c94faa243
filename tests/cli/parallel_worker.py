"""One of two processes of `test_parallel.py`; not a test itself. Usage: parallel_worker.py RANK PORT MODEL [DEAD]

With DEAD, the prompts only, and the process of that rank dies in its first video.
Runs commands one after another as torchrun would start them, each in a process group of its own. Prints, a line a
command, its exit status and what it wrote.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

import torch

from vidaccel.cli.main import app


def commands(model: str) -> list[tuple[str, list[str]]]:
    job = ["render", "-m", model, "-a", "radial", "-d", "0.6", "--set", "attention.block=16", "--device", "cpu"]
    many = [*job, "--prompts", "prompts.txt", "-o", "many", "--format", "json", "--report", "reports"]
    tiny = ["--height", "64", "--width", "64", "--frames", "17", "--layers", "1", "--repeats", "1", "-d", "0.5"]
    bench = ["bench", "parallel", "-m", "wan-tiny", "--device", "cpu", *tiny, "--cache", "-o", "bench.json"]
    together = [*job, "--seed", "1", "--context-parallel", "2"]
    stream = ["render", "-m", model, "--stream", "--rollout", "self-forcing", "--device", "cpu", "-p", "a cat"]
    return [
        ("many", [*many, "--seed", "1"]),
        ("rerun", many),
        ("in the way", [*many, "--steps", "2"]),
        ("together", [*together, "-p", "a cat", "-o", "together.mp4", "--report", "report"]),
        ("stream", [*stream, "--frames", "25", "--seed", "1", "--context-parallel", "2", "-o", "stream.mp4"]),
        ("two for one stream", [*stream, "-o", "one.mp4"]),
        ("two for one", [*job, "-p", "a cat", "-o", "one.mp4"]),
        ("three of two", [*job, "-p", "a cat", "-o", "one.mp4", "--context-parallel", "3"]),
        ("bench", bench),
        ("death", [*together, "-p", "a dog", "-o", "dog.mp4"]),
    ]


def die_in_call(number: int) -> None:
    """End this process, as a crash does, when a transformer is called for the n-th time."""
    calls: list[int] = []

    def count(module: torch.nn.Module, inputs: object) -> None:
        calls.append("Transformer3D" in type(module).__name__)
        if sum(calls) == number:
            os._exit(9)

    torch.nn.modules.module.register_module_forward_pre_hook(count)


def main(rank: int, port: int, model: str, dead: int | None = None) -> None:
    torch.set_num_threads(1)
    every = commands(model)
    if dead is not None:
        every = every[:1]
        if rank == dead:
            die_in_call(3)
    for n, (name, arguments) in enumerate(every):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port + n)}
        if name == "rerun" and rank == 0:
            Path("many/002-two-dogs.mp4").unlink()  # As if the second process had died before it was finished.
        if name == "death" and rank == 1:
            die_in_call(3)
        out, err, status = io.StringIO(), io.StringIO(), None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                app(arguments)
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc()
        found = {"name": name, "status": status, "out": out.getvalue(), "err": err.getvalue()}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
