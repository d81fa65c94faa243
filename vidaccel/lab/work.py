"""Work that really ran, counted: times depend on the machine and on who else uses it, this does not.

Math: a linear layer is 2 x rows x inputs x outputs, attention 4 x pairs x channels; sparse attention counts the pairs
    that it visits (whole tiles), those with text included.
Limits: everything else (norms, embeddings, choosing blocks, the VAE) is left out, so a ratio of two counts bounds the
    speed-up, and is no time. Counting takes some microseconds an operation, which models that are small for their GPU
    feel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .. import wrapping
from ..patterns import Plan
from .estimate import kept_pairs


class Work(TorchFunctionMode):
    """Adds up while it is entered; `counted` enters it.

    Attributes:
        flops: floating-point operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self._sparse = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count dense attention; kernels of sparse attention may call it for a part, and are counted as a whole."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and not self._sparse:
            query, key = args[:2] if len(args) > 1 else (kwargs["query"], kwargs["key"])
            self.flops += 4.0 * query.numel() * key.shape[-2]
        return func(*args, **kwargs)

    def linear(self, layer: nn.Linear, inputs: Any, output: Any) -> None:
        """A forward hook of linear layers."""
        self.flops += 2.0 * output.numel() * layer.in_features

    def sparse(self, plan: Plan, query: torch.Tensor, *rest: Any) -> Any:
        """Stands for `wrapping.attend`."""
        grid, text = plan.layout.grid, plan.layout.text
        pairs = kept_pairs(grid, text, min(1.0, plan.visited)) * (grid.tokens + text) ** 2
        self.flops += 4.0 * pairs * query.shape[0] * query.shape[2] * query.shape[3]
        self._sparse = True
        try:
            return self._attend(plan, query, *rest)
        finally:
            self._sparse = False

    def __enter__(self) -> Work:
        """Begin; sparse attention is caught where processors find it."""
        self._attend = wrapping.attend
        setattr(wrapping, "attend", self.sparse)  # noqa: B010
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        setattr(wrapping, "attend", self._attend)  # noqa: B010


@contextlib.contextmanager
def counted(transformers: Sequence[nn.Module]) -> Iterator[Work]:
    """Count what these transformers, not compiled, do while this lasts."""
    work = Work()
    linear = [layer for each in transformers for layer in each.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(work.linear) for layer in linear]
    try:
        with work:
            yield work
    finally:
        for hook in hooks:
            hook.remove()
