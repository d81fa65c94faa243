"""The dense attention backends of diffusers: which there are, and whether one runs here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..errors import BackendError, UsageError


def dense_backends() -> list[str]:
    """Names of diffusers' attention backends, those that cannot run here too."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [backend.value for backend in AttentionBackendName]


def why_not(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int = 64) -> str | None:
    """Try a backend on a few tokens. Returns the reason why it cannot run, or None where it can.

    Backends that diffusers fetches from the hub (names with `hub`) are fetched by this.
    """
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    query = torch.zeros(1, 128, 2, head_dim, device=device, dtype=dtype)
    try:
        with torch.no_grad(), attention_backend(name):
            out = dispatch_attention_fn(query, query, query)
        if out.shape != query.shape:
            return f"it returned the shape {tuple(out.shape)} for {tuple(query.shape)}"
    # Backends fail in as many ways as there are packages behind them.
    except Exception as error:
        lines = str(error).strip().splitlines()
        return lines[0].strip()[:160] if lines else type(error).__name__
    return None


@contextlib.contextmanager
def use(name: str | None, device: torch.device | str, dtype: torch.dtype, head_dim: int = 64) -> Iterator[None]:
    """Dense attention runs on the named backend in this block; diffusers' own default comes back after it.

    Raises:
        UsageError: no backend of this name.
        BackendError: it cannot run here; the message says why.
    """
    if name is None:
        yield
        return
    check_name(name)
    if reason := why_not(name, device, dtype, head_dim):
        raise BackendError(
            f"dense backend {name} cannot run on {device} with {str(dtype).removeprefix('torch.')}: {reason}"
        )
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend(name):
        yield


def check_name(name: str) -> None:
    """Raise UsageError where diffusers has no backend of this name."""
    if name not in dense_backends():
        raise UsageError(f"dense backend {name!r} is unknown; diffusers has {', '.join(dense_backends())}")
