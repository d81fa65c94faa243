"""Compile the Triton kernels for GPUs that are not here, and read what became of them.

    python kernels/bench/compile_health.py [sm_90 ...]          prints one JSON object a line

A configuration that spills, or whose matrix instructions wait for one another, is dead however right its results are.
Not to be run with TRITON_INTERPRET=1: there is then nothing to compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vidaccel.kernels import portable
from vidaccel.kernels.portable_kernel import block_sparse

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INSTRUCTIONS = r"\b(HGMMA|HMMA|FFMA|LDGSTS|STL|LDL|WARPGROUP\.DEPBAR)\b"


def health(capability: int, d: int, block: int, dtype: torch.dtype, *, window: bool, bias: bool) -> dict[str, Any]:
    """Registers, stack, shared memory (bytes) and instruction counts of one configuration."""
    chosen = portable.config(d, block, dtype, window)
    constants = {
        "D": d,
        "BLOCK": block,
        "KEYS": chosen.keys,
        "AXES": 3 if window else 0,
        "BIAS": bias,
        "UPCAST": False,
        "bias_l": 1 if bias else 0,
    }
    pointers = dict.fromkeys(("Q", "K", "V", "OUT"), f"*{NAMES[dtype]}") | {"LSE": "*fp32", "KEY_BIAS": "*fp32"}
    pointers |= dict.fromkeys(("PTR", "IDX", "N_FULL", "Q_LEN", "K_LEN", "LO", "HI", "POS"), "*i32")
    names = block_sparse.arg_names
    types = {
        name: "constexpr" if name in constants else "fp32" if name == "scale" else pointers.get(name, "i32")
        for name in names
    }
    # Pointers and strides that a real call has are multiples of 16, and Triton compiles for that.
    even = [n for n, name in enumerate(names) if name in pointers or re.fullmatch(r"(q|k|v|out)_[blh]", name)]
    source = ASTSource(
        fn=block_sparse,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(n,): [["tt.divisibility", 16]] for n in even},
    )
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        counts = Counter(re.findall(INSTRUCTIONS, _tool("nvdisasm", file.name)))
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return {
        "capability": capability,
        "d": d,
        "block": block,
        "dtype": NAMES[dtype],
        "window": window,
        "bias": bias,
        **chosen._asdict(),
        "registers": int(registers),
        "stack": int(stack),
        "shared": built.metadata.shared,
        **counts,
    }


def table(capability: int) -> Iterator[dict[str, Any]]:
    """Every bf16 configuration, and those of the largest blocks with each extra, and in fp16."""
    for d in (64, 128):
        for block in (16, 32, 64, 128):
            yield health(capability, d, block, torch.bfloat16, window=False, bias=False)
        yield health(capability, d, 128, torch.bfloat16, window=True, bias=False)
        yield health(capability, d, 128, torch.bfloat16, window=True, bias=True)
        yield health(capability, d, 128, torch.float16, window=False, bias=False)


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(TOOLS / name), *args], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for target in sys.argv[1:] or ["sm_90"]:
        for row in table(int(target.removeprefix("sm_"))):
            print(json.dumps(row), flush=True)
