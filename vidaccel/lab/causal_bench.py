"""Frames a second of an autoregressive Wan at real size, with random weights: every method beside dense, in one run.

All rivals share one transformer, and take turns chunk by chunk, so that whatever else the machine does falls on all of
them alike. Times of the steady state are medians over the chunks in which the window is full. Random weights say
nothing about content: FlashBlock's rate is set from outside (`Rival.reuse`), the scene is still, and the record says
so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

from ..pipelines.causal_attention import CausalTransformer
from ..pipelines.streaming_vae import StreamingDecoder
from ..reuse import AnnCross, CausalAnn, CausalLightForcing, FlashBlock, Methods, TempCache
from ..streaming import ROLLOUTS, Rollout
from .timing import synchronize, why


@dataclass(frozen=True)
class Rival:
    """One way to make the video.

    Attributes:
        name: as printed.
        methods: for the stream.
        reuse: fraction of heads that FlashBlock reuses, set by a calibrated table, as random weights drift at random.
    """

    name: str
    methods: tuple[Any, ...] = ()
    reuse: float | None = None

    def methods_for(self, steps: int, layers: int, heads: int, frames: int) -> Methods:
        """Its methods, tables and horizons filled in."""
        found = []
        for method in self.methods:
            if isinstance(method, FlashBlock) and self.reuse is not None:
                fresh = round((1 - self.reuse) * heads)
                # Other heads in every layer, so that no layer has it easier.
                table = tuple(
                    tuple(tuple((head + layer) % heads < fresh for head in range(heads)) for layer in range(layers))
                    for _ in range(steps)
                )
                method = FlashBlock(calibrated=table, refresh=method.refresh)
            found.append(method)
        return Methods.of(found)


def rivals(frames: int) -> list[Rival]:
    """Dense first; then each method alone, at its published setting, and together."""
    light = CausalLightForcing(density=0.15, base_density=0.05, frames=frames)
    return [
        Rival("dense"),
        Rival("flashblock, reuse 0.65", (FlashBlock(),), 0.65),
        Rival("flashblock, reuse 0.65, clean pass too", (FlashBlock(refresh=True),), 0.65),
        Rival("flashblock, probed", (FlashBlock(),)),
        Rival("light-forcing 0.15", (light,)),
        Rival("ann 0.3", (CausalAnn(0.3),)),
        Rival("tempcache 3", (TempCache(frames=3),)),
        Rival("ann-cross 0.5", (AnnCross(0.5),)),
        Rival("light-forcing 0.15 + flashblock 0.65", (light, FlashBlock()), 0.65),
        Rival("tempcache 3 + flashblock 0.65", (TempCache(frames=3), FlashBlock()), 0.65),
    ]


@dataclass(frozen=True)
class Case:
    """A model, a size and a length.

    Attributes:
        name: as printed.
        height, width: pixels.
        frames: latent frames; chunks beyond those that fill the window are timed.
        rollout: chunks and window.
        transformer: settings of `WanTransformer3DModel`; default Wan 2.1 1.3B.
        text: prompt tokens.
        vae: settings of `AutoencoderKLWan`, for the time of decoding; None leaves it out.
    """

    name: str
    height: int
    width: int
    frames: int = 240
    rollout: Rollout = ROLLOUTS["longlive"]
    transformer: dict[str, Any] = field(
        default_factory=lambda: {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096}
    )
    text: int = 512
    vae: dict[str, Any] | None = field(default_factory=dict)

    def chunks(self) -> list[int]:
        """Lengths of its chunks."""
        return list(self.rollout.chunks(self.frames))


# Rivals that are in memory at a time, beside dense: at 720p the cache of each takes 7 GiB.
TOGETHER = 4
SIZES = {"480p": (480, 832), "720p": (720, 1280)}


class Contestant:
    """A rival at work: a stream of its own on the shared transformer."""

    def __init__(self, rival: Rival, case: Case, transformer: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.rival = rival
        self.case = case
        config = transformer.config
        steps = len(case.rollout.timesteps)
        patch = config.patch_size[1]
        self.size = (config.in_channels, case.height // 8, case.width // 8)
        self.model = CausalTransformer(
            transformer,
            case.rollout,
            (self.size[1] // patch, self.size[2] // patch),
            dtype=dtype,
            device=device,
            methods=rival.methods_for(steps, config.num_layers, config.num_attention_heads, case.frames),
        )
        self.device = device
        self.ms: list[float] = []
        self.attention_ms: list[float] = []
        self.failed: str | None = None
        self._generator = torch.Generator(device).manual_seed(0)
        self._still = self._noise(case.rollout.chunk)

    def chunk(self, frames: int, embeds: torch.Tensor) -> torch.Tensor:
        """Make one chunk: every step and the clean pass."""
        model = self.model
        model.begin(frames)
        # A still scene with a little noise: what TempCache is for, and no easier for the others.
        latents = self._still[:, :, :frames] + 0.05 * self._noise(frames)
        for timestep in self.case.rollout.timesteps:
            model.flow(latents, latents.new_full((1,), timestep, dtype=torch.float32), embeds)
        model.flow(latents, torch.zeros(1, device=self.device), embeds, writes=True)
        model.commit()
        return latents

    def attention(self) -> float:
        """Milliseconds of self-attention in the middle layer, over all forwards of a chunk."""
        model = self.model
        model.begin(self.case.rollout.chunk)
        chunk, memories = model.chunk, model.memories["cond"]
        assert chunk is not None
        memory, turn = memories[len(memories) // 2], model.turns["cond"]
        shape = next(iter(model.caches.values())).shape
        size = (1, chunk.plan.layout.slots, shape.heads, shape.d)
        q, k, v = (torch.randn(size, generator=self._generator, device=self.device).to(shape.dtype) for _ in range(3))
        synchronize(self.device)
        start = time.perf_counter()
        for call in range(len(self.case.rollout.timesteps) + 1):
            turn.calls, turn.writes = call, call == len(self.case.rollout.timesteps)
            memory.attend(q, k, v)
        synchronize(self.device)
        return 1e3 * (time.perf_counter() - start)

    def _noise(self, frames: int) -> torch.Tensor:
        channels, height, width = self.size
        dtype = next(iter(self.model.caches.values())).shape.dtype
        size = (1, channels, frames, height, width)
        return torch.randn(size, generator=self._generator, device=self.device).to(dtype)


@torch.no_grad()
def run(
    case: Case, chosen: Sequence[Rival], device: torch.device, dtype: torch.dtype, *, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """Measure one case.

    Args:
        case: model, size and length.
        chosen: rivals, dense first.
        device: where.
        dtype: of weights and activations.
        compiled: compile the transformer's blocks.

    Yields:
        One row a rival: `fps` (pixel frames a second of the transformer in the steady state), `fps_with_vae`,
        `chunk_ms` (median), `attention_ms` (self-attention of one layer over a chunk, what it remembers included),
        `speedup` and `attention_speedup` over dense, `first_ms` and `last_ms` (medians of the first and last tenth of
        the timed chunks: flat or not), `cache_mib`, `peak_gib` (of rivals in memory together), `density`,
        `reuse_rate`; or `reason` where it could not run.
    """
    transformer = _transformer(case, device, dtype)
    if compiled:
        transformer.compile_repeated_blocks(fullgraph=True)
    embeds = torch.randn(1, case.text, transformer.config.text_dim, device=device, dtype=dtype)
    decode_ms = _decoding(case, device, dtype)
    dense, *others = chosen
    groups = [others[start : start + TOGETHER] for start in range(0, len(others), TOGETHER)] or [[]]
    for number, group in enumerate(groups):
        rows = _together(case, [dense, *group], transformer, embeds, device, dtype, decode_ms, compiled)
        yield from rows[min(number, 1) :]


def _together(
    case: Case,
    chosen: Sequence[Rival],
    transformer: Any,
    embeds: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    decode_ms: float | None,
    compiled: bool,
) -> list[dict[str, Any]]:
    """One row for each of some rivals, dense first."""
    contestants = [Contestant(rival, case, transformer, device, dtype) for rival in chosen]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    lengths = case.chunks()
    for frames in lengths:
        for each in contestants:
            if each.failed is None:
                each.ms.append(_timed(partial(each.chunk, frames, embeds), each, device))
    for _ in range(5):
        for each in contestants:
            if each.failed is None:
                each.attention_ms.append(each.attention())
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    window = case.rollout.window or 0
    # The first chunk of full length after the window has filled, and one more for what is made once.
    steady = min(len(lengths) - 1, -(-window // case.rollout.chunk) + 1)
    rows: list[dict[str, Any]] = []
    for each in contestants:
        rows.append(_row(each, case, steady, decode_ms, peak, rows[0] if rows else {}, compiled))
    return rows


def _timed(call: Callable[[], object], each: Contestant, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    try:
        call()
        synchronize(device)
    except Exception as error:  # out of memory, no kernel: a result, not the end of the run
        each.failed = why(error)
    return 1e3 * (time.perf_counter() - start)


def _row(
    each: Contestant,
    case: Case,
    steady: int,
    decode_ms: float | None,
    peak: float | None,
    dense: dict[str, Any],
    compiled: bool,
) -> dict[str, Any]:
    size = {"case": case.name, "height": case.height, "width": case.width, "latent_frames": case.frames}
    row: dict[str, Any] = size | {"rival": each.rival.name, "compiled": compiled, "ok": each.failed is None}
    row |= {"rollout": case.rollout.to_dict(), "methods": [_plain(method) for method in each.rival.methods]}
    row |= {"set_reuse": each.rival.reuse, "reason": each.failed}
    if each.failed is not None:
        return row
    timed = each.ms[steady:]
    chunk_ms, pixels = median(timed), 4 * case.rollout.chunk
    tenth = max(1, len(timed) // 10)
    chunk = each.model.chunk
    assert chunk is not None
    attention_ms = median(each.attention_ms)
    row |= {
        "chunk_ms": chunk_ms,
        "attention_ms": attention_ms,
        "fps": 1e3 * pixels / chunk_ms,
        "fps_with_vae": None if decode_ms is None else 1e3 * pixels / (chunk_ms + decode_ms),
        "decode_ms": decode_ms,
        "speedup": dense.get("chunk_ms", chunk_ms) / chunk_ms,
        "attention_speedup": dense.get("attention_ms", attention_ms) / attention_ms,
        "first_ms": median(timed[:tenth]),
        "last_ms": median(timed[-tenth:]),
        "timed_chunks": len(timed),
        "density": chunk.density,
        "note": chunk.note,
        "reuse_rate": each.model.reuse_rate,
        "cache_mib": each.model.bytes / 2**20,
        "peak_gib": peak,
    }
    return row


def _plain(method: Any) -> dict[str, Any]:
    return {"method": type(method).__name__} | {k: v for k, v in asdict(method).items() if k != "calibrated"}


def _transformer(case: Case, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        return WanTransformer3DModel(**{"cross_attn_norm": True} | case.transformer).to(dtype).eval()


def _decoding(case: Case, device: torch.device, dtype: torch.dtype) -> float | None:
    """Milliseconds to decode one chunk in the middle of a stream."""
    if case.vae is None:
        return None
    from diffusers import AutoencoderKLWan

    with torch.device(device):
        decode = StreamingDecoder(AutoencoderKLWan(**case.vae).to(dtype).eval())
    latents = torch.randn(1, 16, case.rollout.chunk, case.height // 8, case.width // 8, device=device)
    times = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        decode(latents)
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return median(times[1:])
