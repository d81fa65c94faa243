"""Compile the kernels for GPUs that are not here, and read what became of them.

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
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from vidaccel.kernels import gluon, gluon_kernel, portable, portable_kernel, tma, tma_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INSTRUCTIONS = r"\b(HGMMA|HMMA|FFMA|LDGSTS|UTMALDG|STL|LDL|WARPGROUP\.DEPBAR)\b"


def portable_health(
    capability: int, d: int, block: int, dtype: torch.dtype, *, window: int = 0, bias: bool = False
) -> dict[str, Any]:
    """Registers, stack, shared memory (bytes) and instruction counts of one configuration."""
    chosen = portable.config(d, block, dtype, window > 0)
    constants = {"D": d, "BLOCK": block, "KEYS": chosen.keys, "WINDOW": window, "BIAS": bias, "UPCAST": False}
    source = _source(ASTSource, portable_kernel.block_sparse, constants | {"bias_l": 1} if bias else constants, dtype)
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    about = {"kernel": "portable", "d": d, "block": block, "dtype": NAMES[dtype], "window": window, "bias": bias}
    return about | {"config": chosen._asdict()} | _compiled(capability, source, options)


def tma_health(
    capability: int, d: int, block: int, dtype: torch.dtype, *, window: int = 0, bias: bool = False
) -> dict[str, Any]:
    """The same of the kernel on tensor maps."""
    chosen = tma.config(d, block, dtype, window > 0)
    constants = {"D": d, "BLOCK": block, "KEYS": chosen.keys, "WINDOW": window, "BIAS": bias, "UPCAST": False}
    maps = {
        name: f"tensordesc<{NAMES[dtype]}[1, 1, {slots}, {d}]>"
        for name, slots in {"Q": block, "K": chosen.keys, "V": chosen.keys, "OUT": block}.items()
    }
    source = _source(ASTSource, tma_kernel.block_sparse, constants | {"bias_l": 1} if bias else constants, dtype, maps)
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    about = {"kernel": "tma", "d": d, "block": block, "dtype": NAMES[dtype], "window": window, "bias": bias}
    return about | {"config": chosen._asdict()} | _compiled(capability, source, options)


def gluon_health(d: int, block: int, dtype: torch.dtype, *, window: int = 0, bias: bool = False) -> dict[str, Any]:
    """The same of the Gluon kernel, for Hopper."""
    chosen = gluon.config(d, block, window=window > 0, bias=bias)
    constants = {
        "D": d,
        "KEYS": block,
        "UNITS": 2 if chosen.streams == 1 else 1,
        "STREAMS": chosen.streams,
        "SLOTS": chosen.slots,
        "AHEAD": chosen.ahead,
        "REGISTERS": chosen.registers,
        "WINDOW": window,
        "BIAS": bias,
    }
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    tiles = {name: [1, 1, gluon.UNIT, d] for name in ("q_tma", "out_tma")}
    tiles |= {name: [1, 1, 1, block, d] for name in ("k_tma", "v_tma")}
    maps = {}
    for name, box in tiles.items():
        maps[name] = f"tensordesc<{NAMES[dtype]}{box},{gl.NVMMASharedLayout.get_default_for(box, element)!r}>"
    source = _source(GluonASTSource, gluon_kernel.block_sparse, constants, dtype, maps)
    about = {"kernel": "gluon", "d": d, "block": block, "dtype": NAMES[dtype], "window": window, "bias": bias}
    return about | {"config": chosen._asdict()} | _compiled(90, source, {"num_warps": 4})


def table(capability: int) -> Iterator[dict[str, Any]]:
    """Every bf16 configuration, those of 64 slots with windows, of 128 with each extra, and in fp16.

    Of Gluon every form in bf16: with windows of one and of two words, with a bias, with both and with neither.
    """
    bf16 = torch.bfloat16
    for d in (64, 128):
        for block in (16, 32, 64, 128):
            yield portable_health(capability, d, block, bf16)
        yield portable_health(capability, d, 64, bf16, window=1)
        yield portable_health(capability, d, 128, bf16, window=2)
        yield portable_health(capability, d, 128, bf16, window=1, bias=True)
        yield portable_health(capability, d, 128, torch.float16)
        if capability >= 90:
            yield tma_health(capability, d, 64, bf16)
            yield tma_health(capability, d, 128, bf16)
            yield tma_health(capability, d, 64, bf16, window=1)
            yield tma_health(capability, d, 128, torch.float16, window=2, bias=True)
    if capability == 90:
        fp16 = {}
        for (d, block), window, bias in product(gluon.CONFIGS, (0, 1, 2), (False, True)):
            yield gluon_health(d, block, bf16, window=window, bias=bias)
            fp16[gluon.config(d, block, window=window > 0, bias=bias).streams] = (d, block, window, bias)
        # fp16 changes only the type in the instructions, and every form would take a minute more: there is one for each
        # number of streams, with both extras.
        for d, block, window, bias in fp16.values():
            yield gluon_health(d, block, torch.float16, window=window, bias=bias)


def _source(
    kind: Any,
    kernel: Any,
    constants: dict[str, Any],
    dtype: torch.dtype,
    maps: dict[str, str] | None = None,
) -> Any:
    """What Triton compiles: the kernel, and the types that a real call gives its arguments."""
    types = dict.fromkeys(("Q", "K", "V", "OUT"), f"*{NAMES[dtype]}") | {"LSE": "*fp32", "KEY_BIAS": "*fp32"}
    types |= dict.fromkeys(("TICKET", "PTR", "IDX", "N_FULL", "Q_LEN", "K_LEN", "LO", "HI", "POS"), "*i32")
    types |= {"scale": "fp32"} | (maps or {}) | dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    # Pointers and strides that a real call has are multiples of 16, and Triton compiles for that where it may.
    even = [
        n
        for n, name in enumerate(names)
        if (signature[name][0] == "*" or re.fullmatch(r"(q|k|v|out)_[blh]", name))
        and not kernel.params[n].do_not_specialize_on_alignment
    ]
    return kind(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(n,): [["tt.divisibility", 16]] for n in even},
    )


def _compiled(capability: int, source: Any, options: dict[str, int]) -> dict[str, Any]:
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        counts = Counter(re.findall(INSTRUCTIONS, _tool("nvdisasm", file.name)))
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    numbers = {"registers": int(registers), "stack": int(stack), "shared": built.metadata.shared}
    return {"capability": capability, "triton": triton.__version__, **numbers, **counts}


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(TOOLS / name), *args], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for target in sys.argv[1:] or ["sm_90"]:
        for row in table(int(target.removeprefix("sm_"))):
            print(json.dumps(row), flush=True)
