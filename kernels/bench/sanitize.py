"""Attention kernels on small problems under NVIDIA's compute-sanitizer, on a machine with a GPU.

    python kernels/bench/sanitize.py [--tools memcheck racecheck synccheck initcheck] [--backends gluon tma portable]
                                     [--dims 128 64] [--blocks 128 64]

The problems have what makes kernels reach too far: short blocks of video and text, an empty row, a window, a bias.
Results are compared with the reference as well. Exit code 1 if a tool finds anything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from vidaccel.blocks import BlockMask, Window
from vidaccel.grid import TokenLayout
from vidaccel.kernels import attention, gluon

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
BACKENDS = ("gluon", "tma", "portable")
FOUND = 9


def _forms() -> Iterator[tuple[int, int, int, bool]]:
    for d, block in gluon.CONFIGS:
        both = gluon.config(d, block, window=True, bias=True)
        for window, bias in ((0, False), (1, True), (2, True), (1, False), (0, True)):
            # One of the two by itself is another form where it is launched in another way than both.
            if (window > 0) == bias or gluon.config(d, block, window=window > 0, bias=bias) != both:
                yield d, block, window, bias


# Head dim, block, words of a window, with a bias: the forms of `gluon`, which the others have too.
FORMS = tuple(_forms())


def solve(backend: str, d: int, block: int, window: int, bias: bool) -> float:
    """Run one problem; how far the result is from the reference, as a part of it."""
    generator = torch.Generator().manual_seed(d + block)
    layout = TokenLayout.of((3, 9, 13), 20, block)
    n, position = layout.blocks, layout.positions
    keep = torch.rand(2, n, n, generator=generator) < 0.6
    keep[:, 1] = False
    keep[1, 0] = True
    partial = torch.rand(keep.shape, generator=generator) < 0.5 if window else None
    rule = Window.of(position - 2, position + 2 + position % window, position, layout.grid) if window else None
    mask = BlockMask.of(keep, layout, partial=partial, window=rule)
    q, k, v = (torch.randn(1, layout.slots, 2, d, generator=generator).bfloat16() for _ in range(3))
    key_bias = torch.randn(1, 2, layout.slots, generator=generator) if bias else None
    near, _ = attention(q.float(), k.float(), v.float(), mask, key_bias=key_bias, backend="reference")
    # Copied to the GPU, so that every byte a kernel may read is known to be written.
    given = (q.cuda(), k.cuda(), v.cuda(), mask.to("cuda"))
    out, _ = attention(*given, key_bias=None if key_bias is None else key_bias.cuda(), backend=backend)
    return float((out.cpu().float() - near).norm() / near.norm())


def watch(tool: str, backend: str, sizes: list[str]) -> str:
    """Run problems of a backend under a tool; what the tool said of them, "" if it found nothing."""
    command = [shutil.which("compute-sanitizer") or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    command += ["--print-limit", "5"]
    if tool != "initcheck":
        # That one must see torch's kernels write.
        command += ["--kernel-name", "kns=block_sparse"]
    command += [sys.executable, __file__, "--inside", backend, *sizes]
    # Each tensor has an allocation of its own, whose end the tools know.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    if "PYTHONPATH" in os.environ:
        env["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def main() -> int:
    """Watch what is asked for; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--dims", nargs="+", type=int, choices=(128, 64), default=[128, 64])
    parser.add_argument("--blocks", nargs="+", type=int, choices=(128, 64), default=[128, 64])
    parser.add_argument("--inside", choices=BACKENDS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    forms = [form for form in FORMS if form[0] in asked.dims and form[1] in asked.blocks]
    sizes = ["--dims", *map(str, asked.dims), "--blocks", *map(str, asked.blocks)]
    if asked.inside:
        far = {form: solve(asked.inside, *form) for form in forms}
        print(far)
        return int(not all(x < 0.02 for x in far.values()))
    bad = 0
    for backend in asked.backends:
        # Compiled before any tool watches: it would watch the compiler too, slowly.
        for form in forms:
            solve(backend, *form)
        for tool in asked.tools:
            said = watch(tool, backend, sizes)
            bad += bool(said)
            print(f"{tool}, {backend}: {said or 'nothing found'}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
