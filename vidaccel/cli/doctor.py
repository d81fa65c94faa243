"""`vidaccel doctor`: what can run here, why the rest cannot, and what to do about it."""

from __future__ import annotations

from typing import Any

from .output import Format, FormatOption, Screen

_REMEDIES = {
    "portable": "needs a GPU and triton: pip install 'vidaccel[triton]'",
    "tma": "needs an NVIDIA GPU of compute capability 9.0 or later, and triton: pip install 'vidaccel[triton]'",
    "flex": "needs a CUDA GPU",
    "_native_cudnn": "needs a CUDA GPU",
    "_native_efficient": "needs a CUDA GPU",
    "xformers": "pip install 'vidaccel[xformers]', on a machine with a CUDA GPU",
    "flash": "pip install flash-attn, on a machine with a CUDA GPU",
    "flash_varlen": "pip install flash-attn, on a machine with a CUDA GPU",
    "sage": "pip install sageattention, on a machine with a CUDA GPU",
    "sage_varlen": "pip install sageattention, on a machine with a CUDA GPU",
}


def doctor(format: FormatOption = Format.human) -> None:
    """Show versions, devices, and which kernels can run here; for the others the reason and what to do."""
    from .output import prepare

    screen = Screen(format)
    prepare(screen)
    data = examine()
    if screen.json(data):
        return
    if screen.names(row["kernel"] for row in data["kernels"] if row["ok"]):
        return
    screen.pairs(data["versions"] | data["device"] | {"ffmpeg": data["ffmpeg"]})
    for key, title in (
        ("kernels", "sparse attention kernels"),
        ("dense_backends", "dense backends of diffusers (--dense-backend)"),
        ("models", "sample models"),
    ):
        screen.table([row | {"ok": "yes" if row["ok"] else "no"} for row in data[key]], title=title)
    if data["tuned"]:
        screen.table(data["tuned"], title="launch parameters timed on this machine")
    if not any(row["ok"] for row in data["kernels"]):
        screen.warn("no sparse kernel can run here")


def examine() -> dict[str, Any]:
    """Everything that `doctor` shows, as plain data."""
    import warnings

    from .. import env
    from ..encode import ffmpeg
    from ..errors import VidaccelError
    from ..render.job import check_device

    device = check_device(None)
    try:
        encoder = ffmpeg().replace("\\", "/").rpartition("/")[2]
    except VidaccelError as error:
        encoder = f"missing: {error}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = _dense(device)
    return {
        **env.environment(),
        "ffmpeg": encoder,
        "kernels": _kernels(device),
        "tuned": _tuned(),
        "dense_backends": dense,
        "models": _models(),
    }


def _kernels(device: str) -> list[dict[str, Any]]:
    import torch

    from .. import kernels

    rows = []
    for place, dtype in {"cpu": torch.float32, device: torch.float32 if device == "cpu" else torch.bfloat16}.items():
        # A Wan 1.3B layer at 480p, in blocks of 128.
        problem = kernels.Problem(1, 12, 32768, 32768, 128, dtype, torch.device(place), block=128)
        try:
            verdicts = kernels.backends(problem)
        except ImportError as error:  # a broken installation is what this command is for
            rows.append(_row("kernel", "all", place, f"a part of vidaccel is missing: {error}; install vidaccel again"))
            continue
        rows += [
            _row("kernel", name, place, None if verdict.ok else verdict.reason) for name, verdict in verdicts.items()
        ]
    return rows


def _tuned() -> list[dict[str, Any]]:
    """Launch parameters that were timed here. On GPUs that the kernels' own tables were measured on there are none."""
    from ..kernels import tune

    return [
        key._asdict() | {"window": "yes" if key.window else "no", "chosen": " ".join(map(str, chosen))}
        for key, chosen in tune.stored().items()
    ]


def _dense(device: str) -> list[dict[str, Any]]:
    import importlib.util

    import torch

    from ..render import dense

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    rows = []
    for name in dense.dense_backends():
        if "hub" in name and importlib.util.find_spec("kernels") is not None:
            reason: str | None = "not tried: it would be fetched from the hub"
        else:
            reason = dense.why_not(name, device, dtype, 128)
        rows.append(_row("backend", name, device, reason))
    return sorted(rows, key=lambda row: not row["ok"])


def _row(kind: str, name: str, device: str, reason: str | None) -> dict[str, Any]:
    remedy = "" if reason is None or "install" in reason else _REMEDIES.get(name, "")
    return {kind: name, "device": device, "ok": reason is None, "why not": reason or "", "what to do": remedy}


def _models() -> list[dict[str, Any]]:
    from .. import _samples
    from ..errors import VidaccelError
    from ..render.stream import check_weights

    rows = []
    for name in _samples.MODELS:
        try:
            check_weights(name)
            reason = ""
        except VidaccelError as error:
            reason = str(error)
        remedy = "install vidaccel again, or see samples/train" if reason else ""
        rows.append({"model": name, "ok": not reason, "why not": reason, "what to do": remedy})
    return rows
