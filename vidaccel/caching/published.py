"""What the authors of caching methods have published, model by model: data, each with its source.

Keys are names that a family gives its models, then "experts" (two of them, Wan 2.2 A14B) or the resolution of the
checkpoint where the authors tell them apart. A name that is not here is looked up with its last part left out, so that
"wan" is what every Wan gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

CG_TAYLOR: dict[str, dict[str, Any]] = {
    # PaddlePaddle/PaddleMIX, ppdiffusers/examples/Fast-Diffusers/Training-Free/CG-Taylor (Apache-2.0): 50 steps. That
    # code may never update its gate's history after the warm-up, so its thresholds may be tuned to another gate.
    "wan": {"threshold": 0.18, "warmup": 6, "gate_order": 3, "order": 1},
    "hunyuan": {"threshold": 0.08, "warmup": 6, "gate_order": 2, "order": 1},
}

FIRST_BLOCK: dict[str, dict[str, Any]] = {
    # diffusers' FirstBlockCacheConfig; for HunyuanVideo the default of ParaAttention.
    "": {"threshold": 0.05},
    "hunyuan": {"threshold": 0.06},
}

TEACACHE: dict[str, dict[str, Any]] = {
    # ali-vilab/TeaCache 7c10efc (Apache-2.0), TeaCache4Wan2.1 with use_ret_steps, the "slow" thresholds of its table;
    # TeaCache4HunyuanVideo; TeaCache4CogVideoX1.5.
    "wan-t2v-1.3b": {
        "threshold": 0.05,
        "warmup": 5,
        "coefficients": (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    },
    "wan-t2v-14b": {
        "threshold": 0.1,
        "warmup": 5,
        "coefficients": (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
    },
    "wan-i2v-14b/480p": {
        "threshold": 0.2,
        "warmup": 5,
        "coefficients": (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
    },
    "wan-i2v-14b/720p": {
        "threshold": 0.2,
        "warmup": 5,
        "coefficients": (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
    },
    "hunyuan": {
        "threshold": 0.1,
        "warmup": 1,
        "last": 1,
        "coefficients": (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
    },
    "cogvideox-2b": {
        "threshold": 0.1,
        "last": 1,
        "coefficients": (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03),
    },
    "cogvideox-5b": {
        "threshold": 0.1,
        "last": 1,
        "coefficients": (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02),
    },
    "cogvideox1.5-t2v-5b": {
        "threshold": 0.1,
        "last": 1,
        "coefficients": (2.50210439e02, -1.65061612e02, 3.57804877e01, -7.81551492e-01, 3.58559703e-02),
    },
    "cogvideox1.5-i2v-5b": {
        "threshold": 0.1,
        "last": 1,
        "coefficients": (1.22842302e02, -1.04088754e02, 2.62981677e01, -3.06009921e-01, 3.71213220e-02),
    },
}

EASYCACHE: dict[str, dict[str, Any]] = {
    # H-EmbodVis/EasyCache (Apache-2.0).
    "wan": {"threshold": 0.05, "warmup": 10},
    "hunyuan": {"threshold": 0.025, "warmup": 5},
}

MAGCACHE: dict[str, dict[str, Any]] = {
    # Zehong-Ma/MagCache df81cb1 (Apache-2.0), README of MagCache4Wan2.1 and MagCache4Wan2.2.
    "wan-t2v-1.3b": {"threshold": 0.12, "max_skips": 4, "warmup": 0.2},
    "wan": {"threshold": 0.24, "max_skips": 6, "warmup": 0.2},
    "wan-t2v-14b/experts": {"threshold": 0.06, "max_skips": 2, "warmup": 0.4},
    "wan-i2v-14b/experts": {"threshold": 0.06, "max_skips": 2, "warmup": 0.1},
    "wan-ti2v-5b": {"threshold": 0.06, "max_skips": 2, "warmup": 0.2},
}

# fmt: off
MAGCACHE_RATIOS: dict[str, Sequence[float]] = {
    # The same, cond branch: |R_k| / |R_k-1| of step k, mean over tokens, for the authors' number of steps. Those of
    # Wan 2.2 A14B run through both experts.
    "wan-i2v-14b/480p": (
        1.0, 0.98783, 0.97559, 0.98311, 0.98202, 0.9888, 0.98762, 0.98957, 0.99052, 0.99383, 0.98857, 0.99065,
        0.98845, 0.99057, 0.98957, 0.98601, 0.98823, 0.98756, 0.98808, 0.98721, 0.98571, 0.98543, 0.98157, 0.98411,
        0.97952, 0.98149, 0.9774, 0.97825, 0.97355, 0.97085, 0.97056, 0.96588, 0.96113, 0.9567, 0.94961, 0.93973,
        0.93217, 0.91878, 0.90955, 0.92617,
    ),
    "wan-i2v-14b/720p": (
        1.0, 0.99428, 0.98588, 0.98273, 0.99018, 0.98911, 0.98646, 0.99454, 0.9891, 0.99124, 0.99102, 0.99215,
        0.99515, 0.99576, 0.99068, 0.99097, 0.99166, 0.99041, 0.99201, 0.99101, 0.98599, 0.98845, 0.98848, 0.98862,
        0.98718, 0.98497, 0.98264, 0.98389, 0.97938, 0.97535, 0.97498, 0.973, 0.96827, 0.96261, 0.95335, 0.94649,
        0.93397, 0.91636, 0.89088, 0.8679,
    ),
    "wan-i2v-14b/experts": (
        1.0, 0.99191, 0.99356, 0.99326, 0.99251, 0.99393, 0.9943, 0.99276, 0.99389, 0.99274, 0.99316, 0.99379,
        0.99268, 0.99222, 0.99175, 0.91076, 0.98931, 0.99087, 0.98852, 0.98895, 0.98806, 0.9871, 0.98613, 0.98434,
        0.983, 0.98185, 0.98131, 0.9783, 0.97619, 0.97264, 0.97088, 0.96568, 0.96045, 0.95322, 0.94579, 0.93297,
        0.91699, 0.89174, 0.8541, 0.79823,
    ),
    "wan-t2v-1.3b": (
        1.0, 1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957, 0.99511, 0.99535,
        0.99552, 0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415, 0.99419, 0.99396, 0.99388, 0.99349,
        0.99309, 0.9927, 0.99228, 0.99171, 0.99137, 0.99068, 0.99005, 0.98944, 0.98849, 0.98758, 0.98644, 0.98504,
        0.9836, 0.98202, 0.97977, 0.97717, 0.9741, 0.97003, 0.96538, 0.9593, 0.95086, 0.94013, 0.92402, 0.90241,
        0.86821, 0.81838,
    ),
    "wan-t2v-14b": (
        1.0, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434, 0.99533, 0.99468,
        0.99438, 0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347, 0.99418, 0.99271, 0.99313, 0.99215,
        0.99218, 0.99216, 0.99163, 0.99138, 0.98982, 0.98996, 0.9887, 0.98772, 0.98767, 0.98573, 0.98501, 0.9838,
        0.98177, 0.98037, 0.97678, 0.97546, 0.97184, 0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693,
        0.8796, 0.86111,
    ),
    "wan-t2v-14b/experts": (
        1.0, 1.00124, 0.99822, 0.99696, 0.99703, 0.9966, 0.99602, 0.99578, 0.99484, 0.99633, 0.99659, 0.99534,
        0.99584, 0.99681, 0.99563, 0.9944, 0.99594, 0.99466, 0.99453, 0.99389, 0.99391, 0.99354, 0.99283, 0.99268,
        0.99057, 0.99125, 0.65523, 0.98808, 0.98765, 0.9851, 0.98311, 0.9805, 0.97776, 0.97278, 0.96731, 0.95857,
        0.94385, 0.92118, 0.88108, 0.80263,
    ),
    "wan-ti2v-5b": (
        1.0, 0.99505, 0.99441, 0.99558, 0.99499, 0.99534, 0.99468, 0.99463, 0.9946, 0.99408, 0.9945, 0.99409,
        0.99403, 0.99382, 0.99349, 0.99377, 0.9933, 0.99303, 0.99217, 0.992, 0.99201, 0.99133, 0.99112, 0.99155,
        0.98958, 0.98959, 0.98838, 0.98826, 0.9883, 0.98711, 0.98562, 0.98511, 0.98414, 0.98284, 0.98104, 0.97981,
        0.97849, 0.97557, 0.97398, 0.97171, 0.96917, 0.96511, 0.96263, 0.95839, 0.95483, 0.94942, 0.9468, 0.94583,
        0.94843, 0.96949,
    ),
}
# fmt: on


def published(table: Mapping[str, T], model: str, trait: str = "") -> T | None:
    """What a table has for a model: with its trait, else the model, else a shorter name.

    Args:
        table: one of the tables above.
        model: such as "wan-t2v-14b".
        trait: "480p", "720p", or "experts:" and which of them.
    """
    names = [f"{model}/{trait.partition(':')[0]}", model]
    while "-" in names[-1]:
        names.append(names[-1].rpartition("-")[0])
    return next((table[name] for name in (*names, "") if name in table), None)
