"""What samples cannot do, and what is found in their sweeps: the words of their cards."""

from __future__ import annotations

_IMPERFECT = (
    "An imperfect sample, kept so that methods can be measured on joint attention: compare a method with the dense "
    "clips of this model, not with `wan-tiny`, which has 123 of 128 such prompts right. {} The loss was still falling "
    "when training ended: this is what minutes of training give, not what the model could learn."
)
LIMITS = {
    "hunyuan-tiny": _IMPERFECT.format(
        "Colours are always right, directions nearly so, and shapes in five clips of six: small ones have ragged "
        "edges and may come late or melt before the end, and a checkered background may bend. Textures and cameras "
        "are often lost. Guidance of 3 has 96 right and 5 as many as 4."
    ),
    "cogvideox-tiny": _IMPERFECT.format(
        "Colours are always right, directions nearly so, and shapes in five clips of six: a small cross may first "
        "be a blob, and an object may come late or leave early. Textures and cameras are often lost. Guidance of "
        "1.3 has 102 right, 2.2 has 106: three clips more than 1.6 are chance."
    ),
}
"""By model."""
FOUND = {
    ("hunyuan-tiny", "attention-h200"): (
        "Light-forcing has the highest PSNR at every density, and the most right but at 0.5, where TempCache has three "
        "more (chance) at 4.2 dB less; down to 0.35 topk, pyramid and svg come next. None that keeps to its density is "
        "within two points of dense, not even at 0.5 (100 against 107): 2,304 tokens are few. TempCache needs that "
        "half: at 0.35 it is level with random blocks.",
        "FlashBlock, on topk, did not become sparse in this measurement: its check bounded the error of a rest from an "
        "earlier step so loosely that 0.59 to 0.65 was computed whatever was asked for (100 to 104 right at 39 to 42 "
        "dB). It measures that error since: on one clip 0.51 where 0.5 was asked for, at 40.6 dB, and 0.37 for 0.35, "
        "at 32.0 dB, where topk alone has 21.9 dB at 0.5. Below 0.25 nothing is left for its dense steps.",
        "The controls fail, as they should: at every density the best pattern is 20 to 41 points ahead of both. "
        "Fixed patterns are another matter: radial is told from both controls at no density. At 0.35 it has 46 "
        "right, and random blocks have 46.",
        "Why radial does so little here was not found. On two prompts, a third of the way, its blocks hold 0.81 of "
        "a query's attention at 0.35, random ones 0.59, and the best for each query 0.92. On `wan-tiny` and "
        "`cogvideox-tiny` these are 0.72, 0.52, 0.86 and 0.74, 0.55, 0.86, and there radial has about twice as many "
        "right as random blocks. So it is not that it keeps too little, and its blocks are the same squares of 8x8.",
        "Sliding-window has more right at 0.35 than at 0.5, as on `wan-tiny`: the window nearest to 0.35 is three "
        "whole frames, that nearest to 0.5 is half of every frame.",
    ),
    ("hunyuan-tiny", "caches-h200"): (
        "A third of the steps costs nothing by the prompt: cg-taylor at 0.18 has 109 right where dense has 107 (two "
        "clips are chance), and so have four more of its forms. Of the rivals none is within two clips of dense "
        "below 0.45 (cache-dit, 105).",
        "By PSNR it is not always the best at as many steps: EasyCache has 37.2 dB at 0.33 (and 104 right) where "
        "cg-taylor has 34.9, and the gate in Newton's form 41.8 dB at 0.40 where the default, Taylor's, has 39.1.",
        "A quarter at a loss of two points is reached by nobody: 91 and 90 right at 0.23, where diffusers' "
        "TaylorSeer has 39 and four times fewer steps 29. `placed steps`, made for `wan-tiny`, do not carry over: "
        "with straight lines over such gaps (order 1) 2 to 70 are right, so they have to be placed anew for each "
        "model.",
        "The first steps alone, repeated, have 98 right at 0.27 and 111 at 0.50: objects and paths are settled "
        "early here, too. diffusers' first-block cache failed in its own hook at 0.13 and 0.4; the report has the "
        "message.",
    ),
    ("cogvideox-tiny", "attention-h200"): (
        "Light-forcing and svg have the most right, at 0.5 with TempCache (89 each, TempCache at 2.4 dB less), then "
        "radial (87 of dense's 113) and topk. At 0.25 TempCache is level with random blocks, and at 0.15 nothing works "
        "(17 at best).",
        "FlashBlock, on topk, did not become sparse in this measurement: its check bounded the error of a rest from an "
        "earlier step so loosely that 0.98 was computed, and its 112 right say nothing of what reuse would cost. It "
        "measures that error since: on one clip 0.53 where 0.5 was asked for, at 25.7 dB, and 0.40 for 0.35, at 24.5 "
        "dB, where topk alone has 18.9 and 19.2 dB.",
        "The controls fail, as they should: the best pattern is 10 points ahead of both at 0.15, and 23 to 41 at "
        "higher densities. Radial is 11 to 27 points ahead of them down to 0.25; at 0.15 it is not told from them.",
    ),
    ("cogvideox-tiny", "caches-h200"): (
        "Of 20 steps fewer can be spared than of 50: cg-taylor has 112 right at 0.45 where dense has 113, and 113 "
        "at 0.50; cache-dit needs 0.55 for as many. By PSNR cg-taylor is ahead of every rival from 0.4 "
        "on; its gate in Newton's form is 1.1 and 1.6 dB ahead of the default, Taylor's, at 0.50 and 0.55.",
        "A quarter at a loss of two points is reached by nobody: the first five steps, repeated, have 96 right, and "
        "no policy has more below 0.35, so that nothing is told from this control there. `placed steps` with six or "
        "seven first are the same five; straight lines over such gaps fail (8 right, and 2 of the output).",
        "Teacache, for which nobody has published a polynomial for CogVideoX, computes every step at these "
        "thresholds, and is left out.",
    ),
    ("wan-causal-tiny", "causal-h200"): (
        "No history, and what is drawn by lot, loses to what a method chooses: Light Forcing's blocks by 19 and 12 "
        "clips of 32 in the last stretch, AnnSA's tokens by 8 at 0.1. At 0.3 AnnSA is not told from its control: the "
        "own chunk, always whole, and a third of the rest are enough here whatever they are; at 0.03, one block of "
        "36, both fail.",
        "By the prompt a window of 4 frames is as good as all 12, so that no method can win there against a shorter "
        "window. By PSNR TempCache stays nearer to dense than a window of the same bytes (31.5 and 25.0 dB against "
        "28.8 and 24.3 in the second stretch), and the substitute of hybrid memory nearer than its window alone "
        "(39.6 and 33.2 against 28.8).",
        "The first frame alone, with the own chunk, has more right than Light Forcing at the same 0.33 from the second "
        "stretch on, at 8 dB less: it draws another video of the same prompt. Light Forcing may leave out blocks "
        "of the own chunk too, as published, and at 0.3 that shows.",
        "AnnCA at 0.5 has room for all words and costs nothing; at 0.15 words are lost, and clips with them.",
    ),
}
"""By model and report."""
