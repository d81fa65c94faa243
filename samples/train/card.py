"""Writes a sample's model card from what its training and its reports say.

    python -m samples.train.card --model samples/models/hunyuan-tiny --training build/hunyuan/training.json

Numbers come from all `reports/*.json` in the model's folder but `repeat*.json`, the few prompts that CI repeats;
tables of sweeps stand between marks, as `curves.py` makes them. Everything else is here and in `findings.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from samples.models import world
from samples.train import curves
from samples.train.curves import table
from samples.train.findings import FOUND, LIMITS

ABOUT = {
    "hunyuan-tiny": (
        "A small text-to-video model in the format of HunyuanVideo: parts of a real `HunyuanVideoPipeline`, which "
        "draws 33 frames of 256x256 on a CPU. Joint attention over video and text, guidance as an input, one call "
        "a step. Its tokenizer makes as many tokens of the pipeline's instructions for a language model as "
        "Llama's does, so that the pipeline's defaults work.",
        "HunyuanVideoPipeline",
        "3 dual and 4 single layers, 2 heads of 64, one token a latent place: 9x16x16 = 2,304 tokens beside the text",
    ),
    "cogvideox-tiny": (
        "A small text-to-video model in the format of CogVideoX: parts of a real `CogVideoXPipeline`, which draws "
        "33 frames of 256x256 on a CPU. Joint attention with the text in front, rotary positions, guidance as two "
        "samples of one call. It predicts velocities and is sampled by UniPC, where the released CogVideoX "
        "predict v and take DDIM steps. Its weights hold guidance of 2.5 already: 1.6 makes it 4.",
        "CogVideoXPipeline",
        "8 layers, 2 heads of 64, one token a latent place: 9x16x16 = 2,304 tokens behind the text",
    ),
    "wan-causal-tiny": (
        "A small autoregressive text-to-video model in the format of Wan 2.x: chunks of three latent frames, each "
        "drawn in a few steps beside the keys and values of the nine frames before it, for as long as one likes. "
        "Here is the transformer alone; autoencoder, words and text encoder are those of `wan-tiny`. "
        '`vidaccel render --model sample-causal --frames 241 -p "a red circle moves right"` streams a video of it.',
        "CausalWanPipeline",
        "5 layers, 3 heads of 64, one token a latent place: 768 queries, at most 3,072 keys",
    ),
}
_CURVES = """Not measured yet: what sparse attention and caches cost here. On a GPU, about five minutes each:

```
R=samples/models/{name}/reports
python -m samples.train.evaluate --model {name} --sweep attention --report $R/attention-h200.json
python -m samples.train.evaluate --model {name} --sweep caches --steps 50 --report $R/caches-h200.json
```
"""
REPEATED = "repeat"
_LONG = re.compile(r"(?<=\b[0-9a-f]{7})[0-9a-f]{33}\b")
_PATTERNS = (
    "How many are right, and PSNR to the dense clip; in parentheses the density of the steps that are not dense, where "
    "it is not the one asked for:"
)
_CACHES = (
    "A step counts as computed when the last layer attends. A column goes from the share of computed steps before it "
    "to its own; of a method's thresholds in it that with the highest PSNR is shown: clips right, PSNR to the dense "
    "clip, how many times faster the transformer was. Below, what is best where at most so many steps may be computed:"
)
ASPECTS = ("colour", "shape", "direction", "speed", "texture", "camera")
_STOCK = """import torch
from diffusers import {pipeline}
from vidaccel._samples import path
from vidaccel._samples.shared import shared_parts

folder = path("{name}")
pipe = {pipeline}.from_pretrained(folder, **shared_parts(folder), dtype=torch.float32)"""
_CAUSAL = """from vidaccel.render.stream import StreamJob, open_stream

pipe, _ = open_stream(StreamJob("", "{name}"))"""


def main(words: list[str] | None = None) -> None:
    """Write `README.md` into the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the exported folder")
    parser.add_argument("--training", type=Path, nargs="+", required=True, help="training.json of each stage")
    args = parser.parse_args(words)
    (args.model / "README.md").write_text(card(args.model, [json.loads(file.read_text()) for file in args.training]))


def card(folder: Path, trainings: list[dict[str, Any]]) -> str:
    """Return the text of a card."""
    name = folder.resolve().name
    about, pipeline, shape = ABOUT[name]
    is_causal = pipeline == "CausalWanPipeline"
    opening = (_CAUSAL if is_causal else _STOCK).format(pipeline=pipeline, name=name)
    script = "samples/train/evaluate_causal.py" if is_causal else "samples/train/evaluate.py"
    settings = json.loads((folder / "defaults.json").read_text())
    call = "".join(f"    {key}={value!r},\n" for key, value in settings.items() if key != "fps")
    size = sum(file.stat().st_size for file in (folder / "transformer").iterdir()) / 2**20
    stages = ", then ".join(
        f"{stage['steps']:,} steps of batch {stage['batch']} in {stage['seconds']} s" for stage in trainings
    )
    parts = f"Transformer: {shape}; {size:.2f} MiB. Autoencoder: that of `wan-tiny`, in whose folder its weights are."
    made = f"On {trainings[0]['device']}: {stages}. Commands and ideas: `samples/train/README.md`. Trained on "
    made += "procedurally drawn clips (CC0, `LICENSE-DATA`). Weights: Apache-2.0, as the repository."
    files = [file for file in sorted((folder / "reports").glob("*.json")) if not file.stem.startswith(REPEATED)]
    reports = {file.stem: json.loads(file.read_text()) for file in files}
    swept = {stem for stem, report in reports.items() if curves.is_sweep(report["cells"])}
    single = chr(10).join(section(report) + found(name, stem) for stem, report in reports.items() if stem not in swept)
    about += (
        " It exists so that sparse attention and caching can be tried, tested and shown without a download or a GPU. It"
        " knows one toy world and nothing else: what it can be asked for is in the card of `wan-tiny`."
    )
    return f"""# {name}

{textwrap.fill(about, 120)}

```python
{opening}
video = pipe(
    "a large striped red circle moves up-left quickly, cloudy grey background",
{call}).frames[0]
```
`defaults.json` holds these settings. Weights are stored in bf16; compute in fp32 on a CPU.

{textwrap.fill(parts, 120)}

## How good it is

`{script}` asks for triples of colour, shape and direction that training never showed ({world_size()}),
and `samples/models/checker.py` reads the answers off the frames. Intervals are of 95 %: Wilson's of a share, Agresti
and Min's of a paired difference. `reports/` holds every number, with settings, versions and hardware.

{single or "Not measured yet."}{limits(name, list(reports.values()))}
{"".join(sweep(name, stem, reports[stem]) for stem in sorted(swept))}## How it was made, and licences

{textwrap.fill(made, 120)}
"""


def limits(name: str, reports: list[dict[str, Any]]) -> str:
    """Say what a model cannot do, and which measurements of it are missing."""
    if name not in LIMITS:
        return ""
    is_swept = any(len(report["cells"]) > 1 for report in reports)
    missing = "" if is_swept else "\n" + _CURVES.format(name=name)
    return f"\n{textwrap.fill(LIMITS[name], 120)}\n{missing}"


def world_size() -> str:
    """Say how many triples are held out."""
    held = len({scene.things[0] for scene in world.unseen()})
    return f"{held} of {len(world.COLOURS) * len(world.SHAPES) * len(world.DIRECTIONS)}"


def sweep(name: str, stem: str, report: dict[str, Any]) -> str:
    """Return a sweep's tables with a line on how it was measured, and what is found in them."""
    cells, steps = report["cells"], report["settings"]["num_inference_steps"]
    sparse = any("attention" in cell for cell in cells.values())
    first = round(report["settings"]["dense_steps"] * steps)
    about = f"the first {first} of them dense, blocks of 64; " if sparse else ""
    opening = f"{steps} steps, {about}{_measured(report)}. Dense has {cells['dense']['right']} right. "
    opening += _PATTERNS if sparse else _CACHES
    return (
        f"### Under every {'pattern' if sparse else 'cache'}\n\n{textwrap.fill(opening, 120)}\n\n"
        f"<!-- {stem} -->\n{curves.tables(cells)}<!-- end -->\n{found(name, stem)}\n"
    )


def found(name: str, stem: str) -> str:
    """Say what is found in a report."""
    lines = "\n".join(textwrap.fill(f"- {line}", 120, subsequent_indent="  ") for line in FOUND.get((name, stem), ()))
    return lines and f"\n{lines}\n"


def section(report: dict[str, Any]) -> str:
    """Return a table of a report with a line on how it was measured."""
    settings, cells, measured = report["settings"], report["cells"], _measured(report)
    if "stretches" in cells["dense"]:
        header = ["", "density", *_columns(cells), "last to dense", "PSNR, dB: 2", "last"]
        swept = table(header, [_stretches(name, cell) for name, cell in cells.items()])
        opening = f"Right in each stretch of 40 frames, one after the other; {measured}. In the last one, the share "
        opening += "right lost or won against dense, with its interval; and PSNR to dense in the second and the last."
        return f"{textwrap.fill(opening, 120)}\n\n{swept}"
    failed = "".join(f"Did not run: {name} ({cell['failed']}).\n" for name, cell in cells.items() if "failed" in cell)
    opening = f"{settings['num_inference_steps']} steps; {measured}. {_aspects(cells['dense'])}"
    return f"{textwrap.fill(opening, 120)}\n\n{curves.rows(cells)}{failed}"


def _measured(report: dict[str, Any]) -> str:
    """Say with what and where a report was measured."""
    settings, device = report["settings"], report["device"].get("gpu") or report["device"]["cpu"]
    measured = f"{settings['prompts']} prompts, seed {settings['seed']}, {device}, torch {report['versions']['torch']}"
    # Seven letters are enough to find a commit; the report has the whole name.
    return f"{measured}, commit {_LONG.sub('', report['commit'])}"


def _aspects(dense: dict[str, Any]) -> str:
    """Say what the dense clips have right; a camera can be seen only where the background has a pattern."""
    counts = [f"{name} {dense[name]} of {dense.get(f'{name}_of', dense['clips'])}" for name in ASPECTS]
    return f"Dense: {', '.join(counts)}."


def _columns(cells: dict[str, Any]) -> list[str]:
    return [str(number + 1) for number in range(len(cells["dense"]["stretches"]["right"]))]


def _stretches(name: str, cell: dict[str, Any]) -> list[str]:
    reused = f", {cell['reuse_rate']:.0%} reused" if "reuse_rate" in cell else ""
    found = cell["stretches"]
    row = [name, f"{cell['density']:.2f}{reused}", *map(str, found["right"])]
    if "right_to_dense" not in found:
        return [*row, "", "", ""]
    difference, low, high = found["right_to_dense"][-1]
    row.append(f"{difference:+.2f} ({low:+.2f} to {high:+.2f})")
    return [*row, *(f"{psnr:.1f}" for psnr in (found["psnr_to_dense"][:2][-1], found["psnr_to_dense"][-1]))]


if __name__ == "__main__":
    main()
