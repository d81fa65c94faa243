"""The dense attention that a sparse one must beat: every fast one that runs here, under the stock model.

Each is a context in which the unmodified model runs. torch's own backends and FlashAttention 3 are chosen below
`scaled_dot_product_attention`, so that models which call it directly (CogVideoX) get them as well. A rival that is
not installed is simply not here; one that cannot run a model fails in its row, with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..errors import BackendError

Context = Callable[[], AbstractContextManager[Any]]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "float | None"], torch.Tensor]

# Packages of FlashAttention 3 for Hopper, by the module that holds `flash_attn_func`.
_FLASH3 = ("fa3_fwd_interface", "flash_attn_interface")


def rivals(device: torch.device, tokens: int, padded: bool) -> dict[str, Context]:
    """The dense backends to try, by name.

    Args:
        device: where.
        tokens: video tokens; attention over fewer queries (text refiners) stays on torch's own.
        padded: the text has padding, so that the model's masks really hide something.
    """
    found: dict[str, Context] = {"torch's choice": contextlib.nullcontext}
    if device.type != "cuda":
        return found
    # These alone: where one of them cannot run a model's mask, its row says so.
    found["cudnn"] = lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    found["flash2"] = lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    if flash := _flash3():
        found["flash3"] = lambda: FlashAttention3(flash, tokens, padded)
    return found


def _flash3() -> Callable[..., Any] | None:
    for module in _FLASH3:
        # A wheel for another torch or CUDA fails when its library is loaded.
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            found: Callable[..., Any] = importlib.import_module(module).flash_attn_func
            return found
    return None


class OverVideo(TorchFunctionMode):
    """Sends attention over the video's tokens elsewhere, and lets everything else pass.

    Args:
        attend: takes query, key, value (b, h, l, d) and the scale (None: 1 / sqrt(d)), gives (b, h, l, d). It takes no
            mask: without padding a model's mask hides nothing, and leaving it out changes nothing but time.
        name: of what attends, for errors.
        tokens: video tokens; attention of fewer queries (text refiners) passes.
        padded: masks hide something.
        cross: attention to keys that are text alone goes there too.
    """

    def __init__(self, attend: Attend, name: str, tokens: int, padded: bool = False, cross: bool = False) -> None:
        super().__init__()
        self._attend = attend
        self._name = name
        self._tokens = tokens
        self._padded = padded
        self._cross = cross

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Catch `scaled_dot_product_attention`, let everything else pass."""
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:
            # Its Python half asks `super()`, which torch.compile cannot follow below a mode.
            return torch.unflatten(*args, **kwargs)
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3] if len(args) >= 3 else (kwargs[name] for name in ("query", "key", "value"))
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        if query.shape[2] < self._tokens or (key.shape[2] < self._tokens and not self._cross):
            return func(*args, **kwargs)
        if mask is not None and self._padded:
            raise BackendError(f"{self._name} takes no mask, and this model masks padded text")
        return self._attend(query, key, value, kwargs.get("scale"))


class FlashAttention3(OverVideo):
    """FlashAttention 3 for everything that the video's tokens look at.

    Args:
        flash: `flash_attn_func`, on (b, l, h, d).
        tokens: video tokens.
        padded: masks hide something.
    """

    def __init__(self, flash: Callable[..., Any], tokens: int, padded: bool) -> None:
        if flash not in _PACKAGES:
            _PACKAGES.append(flash)
        number = _PACKAGES.index(flash)

        def attend(*inputs: Any) -> torch.Tensor:
            # Compilers cannot look into every package; looked up at each call, so that `pieces` can watch it.
            return opaque(*inputs, number) if torch.compiler.is_compiling() else flash3_attention(flash, *inputs)

        super().__init__(attend, "FlashAttention 3", tokens, padded, cross=True)


_PACKAGES: list[Callable[..., Any]] = []


def flash3_attention(
    flash: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """FlashAttention 3 on (b, h, l, d) tensors."""
    out = flash(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), softmax_scale=scale)
    result: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return result.transpose(1, 2)


@torch.library.custom_op("vidaccel::dense_flash3", mutates_args=())
def opaque(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, number: int
) -> torch.Tensor:
    """`flash3_attention` as one call of a compiled graph; `number` is the package's in `_PACKAGES`."""
    return flash3_attention(_PACKAGES[number], query, key, value, scale)


@opaque.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, number: int) -> torch.Tensor:
    return query.transpose(1, 2).new_empty(query.transpose(1, 2).shape).transpose(1, 2)
