"""FlashInfer's block-sparse attention with blocks of varying length, for comparison. Chosen only by name.

Idea: it wants tensors without holes, (h, tokens, d), and the length of each block; so tokens are gathered where there
    are holes, and results are put back into their slots. It works on one sample at a time.
Cost: a plan lists every kept key of every row by number, and copies the list to the host. The first call of each head
    dim and dtype compiles for minutes, with the machine's own nvcc and ninja.
Limits: sm_90 and up; fp16, bf16; head dim 64, 128; 32,768 rows of blocks over all heads; no windows, no bias.
Source: FlashInfer (arXiv 2501.01005), version 0.6.6. Its LSE is a logarithm to base 2, ours a natural one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module

import torch

from .external import filled, kept_blocks, usable
from .problem import Problem, Rows, Verdict

HEAD_DIMS = (64, 128)
# What the wrapper has room for.
MOST_ROWS = 32_768
WORKSPACE_BYTES = 128 * 2**20


def can_run(problem: Problem) -> Verdict:
    """16-bit floats, whole blocks, not too many of them."""
    dtypes = (torch.float16, torch.bfloat16)
    if not (verdict := usable(problem, "flashinfer-python", dtypes, HEAD_DIMS, newer=True)).ok:
        return verdict
    if not problem.block:
        return Verdict(False, "it is used with masks only")
    if (rows := problem.heads * -(-problem.lq // problem.block)) > MOST_ROWS:
        return Verdict(False, f"it has room for {MOST_ROWS:,} rows of blocks over all heads, not {rows:,}")
    return verdict


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows | None, scale: float, key_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vidaccel.kernels.attention` for shapes; `rows` is given, `key_bias` is None."""
    assert rows is not None
    return prepare(q, k, rows, scale)(q, k, v)


def prepare(
    q: torch.Tensor, k: torch.Tensor, rows: Rows, scale: float
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Plan a mask, for tensors like q and k. Waits for the device."""
    lengths = rows.k_len.reshape(-1, rows.k_blocks)
    plans = [Plan(q, k, rows, length, scale) for length in lengths]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = q.new_zeros(q.shape)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32)
        for sample in range(q.shape[0]):
            plans[sample % len(plans)].run(q[sample], k[sample], v[sample], out[sample], lse[sample])
        return out, lse

    return call


class Plan:
    """The plan of one sample's mask, whose key blocks hold `k_len` (k_blocks,) tokens; for tensors like q and k."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, rows: Rows, k_len: torch.Tensor, scale: float) -> None:
        heads, d = q.shape[2:]
        queries = filled(rows.q_len, rows.block, q.shape[1])
        keys = filled(k_len, rows.block, k.shape[1])
        self.queries, self.keys = (None if bool(x.all()) else x.nonzero()[:, 0] for x in (queries, keys))
        row_sizes, column_sizes = _sizes(queries, rows.block), _sizes(keys, rows.block)
        kept = kept_blocks(rows).expand(heads, -1, -1)
        nothing = (kept * column_sizes).sum(-1) == 0
        self.nothing = nothing.repeat_interleave(row_sizes, dim=1)
        self.wrapper = None
        if bool(nothing.all()):
            return
        with torch.cuda.device_of(q):
            self.wrapper = import_module("flashinfer").VariableBlockSparseAttentionWrapper(_workspace(q.device))
            self.wrapper.plan(
                kept.contiguous(),
                row_sizes.expand(heads, -1).contiguous(),
                column_sizes.expand(heads, -1).contiguous(),
                num_qo_heads=heads,
                num_kv_heads=heads,
                head_dim=d,
                sm_scale=scale,
                q_data_type=q.dtype,
            )

    def tokens(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What stands in q (lq, h, d), k and v (lk, h, d), without their holes: each (h, tokens, d)."""
        if self.queries is not None:
            q = q.index_select(0, self.queries)
        if self.keys is not None:
            k, v = k.index_select(0, self.keys), v.index_select(0, self.keys)
        return tuple(x.transpose(0, 1) for x in (q, k, v))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (h, tokens, d) to what they see (h, tokens, d) and its LSE (h, tokens) to base 2."""
        assert self.wrapper is not None
        with torch.cuda.device_of(q):
            found: tuple[torch.Tensor, torch.Tensor] = self.wrapper.run(q, k, v, return_lse=True)
        return found

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Attend with q (lq, h, d) to k and v (lk, h, d), into out (lq, h, d) and lse (h, lq)."""
        if self.wrapper is None:
            return
        found, base2 = self.attend(*self.tokens(q, k, v))
        self.place(found.masked_fill(self.nothing[..., None], 0), out)
        natural = (base2 * 0.6931471805599453).masked_fill(self.nothing, -torch.inf)
        if self.queries is None:
            lse.copy_(natural)
        else:
            lse.index_copy_(1, self.queries, natural)

    def place(self, found: torch.Tensor, out: torch.Tensor) -> None:
        """Put results (h, tokens, d) into the slots of out (lq, h, d)."""
        if self.queries is None:
            out.copy_(found.transpose(0, 1))
        else:
            out.index_copy_(0, self.queries, found.transpose(0, 1))


def _sizes(tokens: torch.Tensor, block: int) -> torch.Tensor:
    """(blocks,) int32, how many of a block's slots hold tokens."""
    padded = torch.nn.functional.pad(tokens, (0, -len(tokens) % block))
    return padded.view(-1, block).sum(1).int()


@lru_cache(maxsize=8)
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
