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
        "Of the patterns that see one step alone light-forcing has the highest PSNR at every density, and the "
        "most right but at 0.5, where TempCache has three more (chance) at 4.2 dB less; down to 0.35 topk, "
        "pyramid and svg come next. None is within two points of dense, not even at 0.5 (100 against 107): 2,304 "
        "tokens are few. TempCache needs that half: at 0.35 it is level with random blocks.",
        "FlashBlock, on topk, takes what topk leaves out from an earlier step. Of the steps that are not dense it"
        " computes 0.51, 0.37 and 0.29 where 0.5, 0.35 and 0.25 were asked for, and stays nearest to dense by "
        "far: 35.1, 31.3 and 28.9 dB, topk alone 26.8, 24.0 and 21.5 (at 0.5, 0.36 and 0.25). By the prompt it is"
        " the best at 0.35 and 0.25 (93 and 82 right, light-forcing 86 and 58, topk 74 and 49) and level with "
        "light-forcing at 0.5 (95 and 97). Below 0.25 nothing is left for its dense calls.",
        "The controls fail, as they should: at every density the best pattern is 20 to 55 points ahead of both. "
        "Fixed patterns are another matter: radial is told from both controls at no density. At 0.35 it has 46 "
        "right, and random blocks have 46.",
        "Why radial does so little here was not found. On two prompts, a third of the way, its blocks hold 0.81 "
        "of a query's attention at 0.35, random ones 0.59, and the best for each query 0.92. On `wan-tiny` and "
        "`cogvideox-tiny` these are 0.72, 0.52, 0.86 and 0.74, 0.55, 0.86, and there radial has about twice as "
        "many right as random blocks. So it is not that it keeps too little, and its blocks are the same squares "
        "of 8x8.",
        "Sliding-window has more right at 0.35 than at 0.5, as on `wan-tiny`: the window nearest to 0.35 is three"
        " whole frames, that nearest to 0.5 is half of every frame.",
    ),
    ("hunyuan-tiny", "caches-h200"): (
        "A quarter of the steps is enough: EasyCache at a threshold of 0.2 without its computed last step "
        "(`last=0`: 12 of 50, 4.2 times fewer) has as many right as dense, 110 (95 %: -0.03 to +0.03), at 36.5 dB, "
        "at 0.21 108 and 36.3 dB. Both were picked from twelve rows that were tried on these prompts. On 128 other "
        "prompts with other noise (`--skip 128 --seed 1`) none of five loses any of dense's 111: without the last step "
        "0.21 (0.24 of the steps, 37.3 dB) and 0.2 (0.25, 37.5 dB), with it 0.25 (0.24, 36.4 dB), 0.22 (0.26) and 0.2 "
        "(0.27).",
        "With the last step computed EasyCache has all of dense's 110 with 13 steps (0.2: 37.0 dB), 106 with 12. "
        "Others that lose at most two compute 16 steps (cg-taylor at 0.05: 108, 43.2 dB) and 17 (`placed`: 108, "
        "45.6 dB; EasyCache at 0.1: 109, 41.6 dB), the first of the rivals 26 (diffusers' taylorseer: 110, 41.4 "
        "dB). With 12 steps cg-taylor has 106 in Newton's form, at 0.24, and 105 in both forms at 0.18: on 128 "
        "clips not told from dense (-0.09 to +0.03, -0.08 to +0.00). `last=0` changes nothing for it at 0.1 (107 "
        "with 13 steps).",
        "By PSNR `placed`, chosen on `wan-tiny`, is best at 12 steps, 38.5 dB, or 38.7 with the model's output "
        "repeated between them, but with the fewest right: 101 to 104. Its steps with EasyCache's reuse have 101 "
        "and 104 as well, at 36.4 and 36.3 dB: what tells is which steps are computed (EasyCache chooses "
        "them for each batch of 64 clips), not what is done between them. EasyCache has 36.5 dB, cg-taylor 35.3 in "
        "Newton's form and 34.0 in Taylor's.",
        "From 0.26 to 0.32 cg-taylor leads every other gate and every rival by PSNR: 37.4 dB at 0.26 (EasyCache "
        "37.0, with three more right, which may be chance), 39.2 at 0.28 (Newton's form, 107 right) and 43.2 at 0.32 "
        "(108) against 34.9 of the first-block caches, ours and diffusers', at 0.30 (96 right), and 34.7 of cache-"
        "dit at 0.32 (97). At 0.34 Newton's form has 45.4 dB and 107 right, `placed` 45.6 and 108. Beyond, EasyCache "
        "at 0.48 (110, 47.6 dB) and `placed` at 0.50 (110, 51.5) are the best there are; cg-taylor has no threshold "
        "there that was measured: Newton's form at 0.02 computes every step.",
        "The first twelve steps alone, repeated, have 98 right: objects and paths are settled early here, too. "
        "What is named above at 12 steps is 2 to 9 points and 3 to 9 dB ahead of that, random steps have 30. The "
        "first 18 and 25, repeated, have 110 and 113 right: there a cache is told from repeating by PSNR alone, by "
        "up to 11 and 13 dB. With six steps computed nothing works.",
        "diffusers' first-block cache failed in its own hook at 0.2, the report has the message; TeaCache at 0.05 "
        "computes every step and is left out.",
    ),
    ("cogvideox-tiny", "attention-h200"): (
        "Of the patterns that see one step alone light-forcing and svg have the most right, at 0.5 with TempCache"
        " (89 each, TempCache at 2.4 dB less), then radial (87 of dense's 113) and topk. At 0.25 TempCache is "
        "level with random blocks, and at 0.15 nothing works (17 at best).",
        "FlashBlock, on topk, takes what topk leaves out from an earlier step. At 0.5 (0.54 computed in the steps"
        " that are not dense) it is level with light-forcing by the prompt, 90 right, and 2.3 dB nearer to dense,"
        " at 26.9. Asked for 0.35 and 0.25 it computes 0.43 and 0.50, since its check turns more calls dense than"
        " were planned: 88 right each, at 25.5 and 26.5 dB, with half of the pairs computed six more than topk "
        "alone (82, 23.9 dB). So on this model, in 20 steps, it does not become sparser than 0.43.",
        "The controls fail, as they should: the best pattern is 10 points ahead of both at 0.15, and 23 to 41 at "
        "higher densities. Radial is 11 to 27 points ahead of them down to 0.25; at 0.15 it is not told from "
        "them.",
    ),
    ("cogvideox-tiny", "caches-h200"): (
        "A quarter of the steps is enough: with 12 of 50 computed (4.2 times fewer), cg-taylor, as it comes (0.18), "
        "has 117 right where dense has 118 (95 % of the difference: -0.03 to +0.01), at 34.9 dB. EasyCache "
        "computes 14 steps for 117, at 0.2, cache-dit 17 for 116 (with 12 and 13 it has 112 and 113, with 11 105).",
        "By PSNR `placed`, chosen on `wan-tiny`, is ahead at 12 steps, 37.8 dB, with three clips fewer (114; all "
        "that it has right cg-taylor has, too). The loss of four clips to dense is more than two points, but not "
        "told from none (-0.06 to +0.00). At 0.34 it has 46.0 dB and loses none.",
        "From 0.26 to 0.34 cg-taylor leads every other gate and every rival, now in Taylor's form and now in "
        "Newton's: 37.0 dB at 0.26 (cache-dit 34.9), 39.0 at 0.28 (EasyCache 36.6), 41.4 at 0.30 (first-block 30.4 "
        "at 0.32), 43.5 at 0.34 (EasyCache 40.6, cache-dit 39.4). Beyond, EasyCache has 45.1 dB at 0.42, cg-taylor "
        "in Newton's form 52.9 at 0.44, TeaCache 47.8 at 0.48, cache-dit 46.2 and `placed` 51.0 at 0.50, all with "
        "117 or 118 right.",
        "Repeating the first twelve steps has 103 right, 11 points and 5.2 dB less than cg-taylor, random steps "
        "have 21. The first 18 and 25, repeated, have 116 and 118 right: there a cache is told from repeating by "
        "PSNR alone, by up to 12 and 13 dB. With six steps `placed` has two more right than six steps repeated (60 "
        "and 58): nothing works there.",
        "TeaCache, for which nobody has published a polynomial for this model, computes every step at 0.05 and is "
        "left out there.",
    ),
    ("wan-causal-tiny", "causal-h200"): (
        "No history, and what is drawn by lot, loses to what a method chooses in the last stretch: Light "
        "Forcing's blocks by 19 and 12 clips of 32, TempCache's keys by 15 and 7, those of hybrid memory by 7, "
        "AnnSA's tokens by 8 at 0.1 and by 10 at 0.06, AnnCA's words by 5 at 0.15, all together by 7 at 0.3 and by 11 "
        "at 0.1.",
        "FlashBlock at 0.05, its default, and 0.03 (31 and 16 % reused) are 8 and 10 dB nearer to dense in the second "
        "stretch than with random heads (41.0 and 49.6 dB against 33.1 and 39.4), and 15 and 22 dB nearer than with "
        "the history dropped where it would be reused (in fewer calls, 22 and 11 %); by the prompt they all "
        "have 25 to 27 right where dense has 26, for a shorter history is enough here. At "
        "0.1 an old past is still 4.6 dB better than none.",
        "Not told from their controls, by 10 points or 3 dB: FlashBlock's choice of heads at 0.1 and 0.3 (63 and "
        "92 % reused; 29.3 and 24.8 dB, random heads 27.8 and 26.5), and at 0.3 its old past (24.8 dB, none 23.6; "
        "22 and 19 right); AnnSA's tokens at 0.3, 0.2 and 0.15 (23, 20 and 20 right, random ones 24, 22 and 19), "
        "where, with the own chunk always whole, it matters little which tokens of the past are kept; and at 0.03 (5 "
        "and 3), one block of 36, where both fail.",
        "By the prompt a window of 4 frames is as good as all 12, so that no method can win there against a "
        "shorter window. By PSNR TempCache stays nearer to dense than a window of the same bytes (31.5 and 25.0 "
        "dB against 28.8 and 24.3 in the second stretch), and the substitute of hybrid memory nearer than its "
        "window alone (39.6 and 33.2 against 28.8).",
        "The first frame alone, with the own chunk, has more right than Light Forcing at the same 0.33 from the "
        "second stretch on, at 8 dB less: it draws another video of the same prompt. Light Forcing may leave out "
        "blocks of the own chunk too, as published, and at 0.3 that shows.",
        "AnnCA at 0.5 has room for all words and costs nothing; at 0.15 words are lost, and clips with them: more"
        " are right than with words drawn by lot, at 5 dB less, as another video of the prompt.",
        "All together (merged keys, AnnSA, FlashBlock, AnnCA) keep 25 of 32 at 0.3; at 0.1, 0.34 with the own "
        "chunk, 18.",
    ),
}
"""By model and report."""
