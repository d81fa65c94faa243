"""Compile the kernels around attention for a GPU that is not here, at the sizes of real models, and read the result.

    python kernels/bench/compile_around.py [sm_90 ...]          prints one JSON object a line

Every launch is taken down from the very functions that make it, on tensors that nobody touches. Not to be run with
TRITON_INTERPRET=1: there is then nothing to compile.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vidaccel.kernels import compact, elementwise, forecast, hashing, pool
from vidaccel.kernels.bench_around import SHAPES, Shape

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int32: "i32",
    torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip
# Numbers that are 1 are compiled in.
ONE = Shape("one block", (1, 4, 4), 1, 64, "rms", block=16)
INSTRUCTIONS = r"\b(STL|LDL|LDG\.E[.\w]*|STG\.E[.\w]*|LDS|STS|BAR)\b"
OPTIONS = ("num_warps", "num_stages")


class Launch:
    """Stands where a Triton kernel stood: compiles what it would run."""

    def __init__(self, kernel: Any, capability: int, found: list[dict[str, Any]]) -> None:
        self.kernel, self.capability, self.found = kernel, capability, found
        self.seen: set[str] = set()

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """As Triton has it."""
        return self._compile

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in OPTIONS}
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        plain = {p.name for p in self.kernel.params if p.do_not_specialize}
        # As Triton does, which makes a number that is 1 part of the program, and tells it of multiples of 16.
        constants |= {name for name in names if given[name] is None or (name not in plain and _is_one(given[name]))}
        types = {name: "constexpr" if name in constants else _type(given[name]) for name in names}
        key = str((types, {name: given[name] for name in constants}, kwargs.get("num_warps")))
        if key in self.seen:
            return
        self.seen.add(key)
        even = [name for name in names if name not in constants | plain and _is_even(given[name])]
        source = ASTSource(
            fn=self.kernel,
            signature=types,
            constexprs={(names.index(name),): given[name] for name in constants},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
        )
        options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
        built = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        tensors = [str(x.dtype).removeprefix("torch.") for x in args if isinstance(x, torch.Tensor)]
        what = {"kernel": self.kernel.__name__, "capability": self.capability, "dtype": tensors[0]}
        self.found.append(what | {name: given[name] for name in constants} | usage(built))


def usage(built: Any) -> dict[str, Any]:
    """Registers, stack, shared memory (bytes) and instruction counts of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = _tool("cuobjdump", "-res-usage", file.name)
        counts = Counter(re.findall(INSTRUCTIONS, _tool("nvdisasm", file.name)))
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[0]
    limits = {"warps": built.metadata.num_warps, "shared": built.metadata.shared}
    return {"registers": int(registers), "stack": int(stack), **limits, **counts}


def table(capability: int) -> Iterator[dict[str, Any]]:
    """Each kernel at the sizes of Wan, HunyuanVideo and CogVideoX, and at the smallest there is."""
    found: list[dict[str, Any]] = []

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    for module in (compact, elementwise, forecast, hashing, pool):
        real = module._kernels()
        named = {n: Launch(x, capability, found) for n, x in inspect.getmembers(real) if hasattr(x, "arg_names")}
        module._kernels = lambda named=named: SimpleNamespace(**named)
    feature = empty(1, 75_600, 5120)
    for terms in (2, 4):
        forecast.weighted_sum([feature] * terms, [1.0] * terms, torch.bfloat16)
        forecast.error_sums([feature] * terms, [1.0] * terms, feature, None)
    yield from found
    found.clear()
    for shape in (*SHAPES, ONE):
        layout = shape.layout()
        n = layout.video_blocks
        video, text, rope = shape.streams(empty)
        q, *_ = elementwise.to_kernel(layout, video, text, rope)
        torch.ops.vidaccel.to_model(q, layout.slot_of)
        streams = [stream for stream in (video, text) if stream is not None]
        norms = [elementwise.OneNorm.of(stream.norm, 0) for stream in streams]
        elementwise.to_ranks([stream.q for stream in streams], norms, rope, 2, -(-shape.heads // 2))
        compact.block_means(q, layout.q_len[:n], layout.block)
        scores, forced = empty(shape.heads, n, n, dtype=torch.float32), torch.zeros(n, n, dtype=torch.bool)
        compact.best_blocks(scores, forced, n // 4, layout)
        compact.likeliest_blocks(scores, forced, n // 4, layout)
        pool.means_behind(q, layout.q_len, layout.block, n)
        hashing.sign_codes(q, empty(*q.shape[2:], dtype=torch.float32), empty(256, 8, dtype=torch.float32))
        hashing.in_order(empty(shape.heads, n * layout.block, dtype=torch.int64), 258)
        places = empty(1, n * layout.block, shape.heads, dtype=torch.int64)
        hashing.moved(hashing.moved(q[:, : n * layout.block], places, back=False), places, back=True)
        few = empty(shape.heads, 75, n, dtype=torch.float32)
        starts = torch.zeros(shape.heads * 75 + 1, dtype=torch.int32)
        compact.keep_best(few, None, starts, None, None, few.numel())
        yield from ({"shape": shape.name} | row for row in found)
        found.clear()


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i64" if abs(value) >= 2**31 else "i32"


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def _is_even(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(TOOLS / name), *args], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for target in sys.argv[1:] or ["sm_90"]:
        for row in table(int(target.removeprefix("sm_"))):
            print(json.dumps(row), flush=True)
