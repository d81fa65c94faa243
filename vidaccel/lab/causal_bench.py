"""Frames a second of an autoregressive Wan at real size, with random weights: every method beside dense.

All rivals share one transformer. Dense runs first, alone; then each rival takes turns with it, chunk by chunk, so that
whatever else the machine does falls on both alike (or runs alone, where that is asked for: half the time). Times of the
steady state are medians over the chunks in which the window is full and nothing is loaded, compiled or recorded any
more. Random weights say nothing about content: FlashBlock's rate is set from outside (`Rival.reuse`), the scene is
still, and the record says so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch

from ..pipelines.causal_attention import CausalTransformer
from ..pipelines.streaming_vae import StreamingDecoder
from ..streaming import Replays
from .causal_bound import Rates, chunk_flops
from .causal_cases import Case, Rival
from .timing import synchronize, why

# Timed chunks of dense attention alone.
ALONE = 12


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
            replays=Replays() if case.graphs else None,
        )
        self.device = device
        self.ms: list[float] = []
        self.attention_ms: list[float] = []
        self.gib: list[float] = []
        self.failed: str | None = None
        self.peak_gib: float | None = None
        self.reuse: float | None = None
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

    def open_attention(self) -> Callable[[], None]:
        """Self-attention of the middle layer in all forwards of a chunk, as one call; recorded where graphs are."""
        model = self.model
        model.begin(self.case.rollout.chunk)
        chunk, memories = model.chunk, model.memories["cond"]
        assert chunk is not None
        memory, turn = memories[len(memories) // 2], model.turns["cond"]
        shape = next(iter(model.caches.values())).shape
        size = (3, 1, chunk.plan.layout.slots, shape.heads, shape.d)
        given = torch.randn(size, generator=self._generator, device=self.device).to(shape.dtype)
        replays = Replays() if self.case.graphs else None

        def forward(qkv: torch.Tensor) -> torch.Tensor:
            for call in range(len(self.case.rollout.timesteps) + 1):
                turn.calls, turn.writes = call, call == len(self.case.rollout.timesteps)
                out = memory.attend(*qkv)
            return out

        def attend() -> None:
            # As if a new chunk began: what is chosen once a chunk is chosen anew.
            memory.open(chunk.plan)
            if replays is None:
                forward(given)
            else:
                replays.run("attention", None, forward, given)

        return attend

    def _noise(self, frames: int) -> torch.Tensor:
        channels, height, width = self.size
        dtype = next(iter(self.model.caches.values())).shape.dtype
        size = (1, channels, frames, height, width)
        return torch.randn(size, generator=self._generator, device=self.device).to(dtype)


@torch.no_grad()
def run(
    case: Case,
    chosen: Sequence[Rival],
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float = float("inf"),
    say: Callable[[str], None] = lambda text: None,
    find: Callable[[str], dict[str, Any] | None] = lambda key: None,
) -> Iterator[dict[str, Any]]:
    """Measure one case.

    Args:
        case: model, size and length, and how it runs.
        chosen: rivals, dense first.
        device: where.
        dtype: of weights and activations.
        seconds: after them videos are cut short, and no further rival begins.
        say: is told what is being done.
        find: the row of a key that is there already; it is not measured again.

    Yields:
        One row a rival, as soon as it is measured: `key`, `fps` (pixel frames a second of the transformer in the steady
        state), `fps_with_vae`, `chunk_ms` (median), `attention_ms` (self-attention of one layer over a chunk, what it
        remembers included), `speedup` and `attention_speedup` over dense beside it, `first_ms` and `last_ms` (medians
        of the first and last tenth of the timed chunks: flat or not), `tenths_ms` (of all ten), `first_gib` and
        `last_gib` (likewise, of what is allocated after a chunk), `warm_up_s` (of the first chunk), `tflop` and
        `bound_ms` (see `causal_bound`), `cache_mib`, `peak_gib` (with dense, where that runs beside it), `density`,
        `reuse_rate`; or `reason` where it could not run.
    """
    end = time.monotonic() + seconds
    known = {rival: find(_key(case, rival)) for rival in chosen}
    if all(known.values()):
        return
    say("making the model")
    transformer = _transformer(case, device, dtype)
    embeds = torch.randn(1, case.text, transformer.config.text_dim, device=device, dtype=dtype)
    rates = Rates.measured(transformer, case, case.dense, device, dtype)
    say(f"matrix products and dense attention alone reach {rates}")
    for block in transformer.blocks:
        # Self-attention alone: that to the prompt has few keys, and its backend would be compiled.
        block.attn1.processor._attention_backend = rates.backend
    if case.compiled:
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    decode_ms: float | None = None
    dense: dict[str, Any] = {}
    for number, rival in enumerate(chosen):
        if (before := known[rival]) is not None:
            if number == 0:
                dense, decode_ms = before, before.get("decode_ms")
            continue
        if number and time.monotonic() > end:
            say(f"out of time before {rival.name}")
            return
        pair = [rival] if number == 0 or case.alone else [chosen[0], rival]
        lengths = case.chunks()
        if number == 0:
            # A few chunks tell its speed; beside every rival it runs again.
            lengths = lengths[: case.steady + ALONE]
        raced = _race(case, pair, lengths, transformer, embeds, device, dtype, end, say)
        if number == 0 and case.vae is not None:
            say("timing the decoder")
            decode_ms = _decoding(case, device, dtype)
        for each in raced:
            row = _row(each, case, transformer, decode_ms, rates, dense)
            if each.rival is chosen[0]:
                dense = row
        # What it held is no part of what the next one takes.
        del raced, each
        gc.collect()
        yield row


def _race(
    case: Case,
    pair: Sequence[Rival],
    lengths: Sequence[int],
    transformer: Any,
    embeds: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    end: float,
    say: Callable[[str], None],
) -> list[Contestant]:
    """Dense and a rival, chunk by chunk in turn; a video is cut short where time is out."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    contestants = [Contestant(rival, case, transformer, device, dtype) for rival in pair]
    for number, frames in enumerate(lengths):
        if time.monotonic() > end and number >= case.steady + 2:
            say(f"out of time after {number} chunks")
            break
        for each in contestants:
            if each.failed is None:
                each.ms.append(_timed(partial(each.chunk, frames, embeds), each, device))
                each.gib.append(torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0)
                if number <= case.steady:
                    say(f"{each.rival.name}, chunk {number}: {each.ms[-1]:.0f} ms")
    for each in contestants:
        each.reuse = each.model.reuse_rate
    calls = {each: each.open_attention() for each in contestants if each.failed is None}
    for turn in range(7):
        for each, call in calls.items():
            taken = _timed(call, each, device)
            if turn > 1:  # the first loads, the second records
                each.attention_ms.append(taken)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    for each in contestants:
        each.peak_gib = peak
    return contestants


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
    transformer: Any,
    decode_ms: float | None,
    rates: Rates,
    dense: dict[str, Any],
) -> dict[str, Any]:
    size = {"case": case.name, "height": case.height, "width": case.width, "latent_frames": case.frames}
    row: dict[str, Any] = {"key": _key(case, each.rival)} | size
    row |= {"rival": each.rival.name, "ok": each.failed is None, "reason": each.failed}
    row |= {"compiled": case.compiled, "graphs": case.graphs, "layers": transformer.config.num_layers}
    row |= {"rollout": case.rollout.to_dict(), "methods": [_plain(method) for method in each.rival.methods]}
    row |= {"set_reuse": each.rival.reuse}
    if each.failed is not None:
        return row
    # A video too short for a steady state has its last chunk.
    first = min(case.steady, len(each.ms) - 1)
    timed, gib = each.ms[first:], each.gib[first:] if each.model.device.type == "cuda" else None
    chunk_ms, pixels = median(timed), 4 * case.rollout.chunk
    tenth = max(1, len(timed) // 10)
    chunk = each.model.chunk
    assert chunk is not None
    attention_ms = median(each.attention_ms)
    flops = chunk_flops(transformer, case, chunk.density, each.reuse, each.model.methods)
    bound_ms = rates.milliseconds(flops)
    row |= {
        "chunk_ms": chunk_ms,
        "attention_ms": attention_ms,
        "fps": 1e3 * pixels / chunk_ms,
        "fps_with_vae": None if decode_ms is None else 1e3 * pixels / (chunk_ms + decode_ms),
        "decode_ms": decode_ms,
        "speedup": dense.get("chunk_ms", chunk_ms) / chunk_ms,
        "attention_speedup": dense.get("attention_ms", attention_ms) / attention_ms,
        "warm_up_s": each.ms[0] / 1e3,
        "first_ms": median(timed[:tenth]),
        "last_ms": median(timed[-tenth:]),
        "tenths_ms": [median(timed[at : at + tenth]) for at in range(0, len(timed) - tenth + 1, tenth)],
        "first_gib": gib and median(gib[:tenth]),
        "last_gib": gib and median(gib[-tenth:]),
        "timed_chunks": len(timed),
        "tflop": {name: amount / 1e12 for name, amount in flops._asdict().items()},
        "rates": asdict(rates),
        "bound_ms": bound_ms,
        "bound_fps": 1e3 * pixels / bound_ms,
        "density": chunk.density,
        "note": chunk.note,
        "reuse_rate": each.reuse,
        "cache_mib": each.model.bytes / 2**20,
        "peak_gib": each.peak_gib,
    }
    return row


def _key(case: Case, rival: Rival) -> str:
    """What two rows of one record differ by."""
    how = ("compiled " if case.compiled else "") + ("graphs " if case.graphs else "") + ("alone " if case.alone else "")
    window = f"window {case.rollout.window} sink {case.rollout.sink}"
    return f"{case.name} {case.frames} frames {window} {case.transformer['num_layers']} layers {how}{rival.name}"


def _plain(method: Any) -> dict[str, Any]:
    return {"method": type(method).__name__} | {k: v for k, v in asdict(method).items() if k != "calibrated"}


def _transformer(case: Case, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        transformer = WanTransformer3DModel(**{"cross_attn_norm": True} | case.transformer).eval()
    # As `from_pretrained` has it, some parts stay in fp32.
    precise = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if not precise & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return transformer


def _decoding(case: Case, device: torch.device, dtype: torch.dtype) -> float | None:
    """Milliseconds to decode one chunk in the middle of a stream."""
    if case.vae is None:
        return None
    from diffusers import AutoencoderKLWan

    with torch.device(device):
        vae = AutoencoderKLWan(**case.vae).to(dtype).eval()
    if case.compiled:
        vae.decoder.compile(dynamic=False)
    decode = StreamingDecoder(vae)
    latents = torch.randn(1, 16, case.rollout.chunk, case.height // 8, case.width // 8, device=device)
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        decode(latents)
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    # The first two load, and compile for what is kept by then.
    return median(times[2:])
