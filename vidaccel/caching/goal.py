"""What somebody wants of a run, in one word: "2x", "psnr>=28", "ssim>=0.9"."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from ..errors import RecipeError

_NUMBER = r"(\d+(?:\.\d+)?)"
_SPEED, _QUALITY = re.compile(rf"(?:speedup>=)?{_NUMBER}x?"), re.compile(rf"(psnr|ssim)>={_NUMBER}")


class Goal(NamedTuple):
    """A lower limit.

    Attributes:
        what: "speedup", or a likeness to the run without acceleration: "psnr" in dB, "ssim".
        least: the limit.
    """

    what: Literal["speedup", "psnr", "ssim"]
    least: float

    @classmethod
    def of(cls, text: str) -> Goal:
        """Read a goal.

        Raises:
            RecipeError: a text that is none, or a limit that nothing can reach or everything does.
        """
        if (found := _SPEED.fullmatch(text)) and (text.startswith("speedup") or text.endswith("x")):
            goal = cls("speedup", float(found[1]))
        elif found := _QUALITY.fullmatch(text):
            goal = cls("psnr" if found[1] == "psnr" else "ssim", float(found[2]))
        else:
            raise RecipeError(f"{text!r} is no goal; write 2x (times faster), psnr>=28 (dB) or ssim>=0.9")
        if goal.what == "ssim" and not goal.least < 1:
            raise RecipeError(f"goal {text}: ssim is at most 1, of equal videos; ask for less, such as ssim>=0.9")
        if not goal.least:
            raise RecipeError(f"goal {text}: everything reaches it; ask for more, such as 2x, psnr>=28 or ssim>=0.9")
        return goal

    def __str__(self) -> str:
        return f"{self.least:g}x" if self.what == "speedup" else f"{self.what}>={self.least:g}"
