"""Time limits and learning rates: training stops by the clock or by steps, and the rate falls to zero by then."""

from __future__ import annotations

import logging
import sys
import time


def get_logger(name: str) -> logging.Logger:
    """Return a logger that writes progress to stderr."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    return logging.getLogger(name)


class Budget:
    """A stretch of training that ends after `minutes`, or after `steps` if that comes first.

    A run limited by steps alone repeats exactly; one limited by minutes depends on the machine's speed.
    """

    def __init__(self, minutes: float, steps: int) -> None:
        self.seconds = 60 * minutes
        self.steps = steps
        self.start = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def progress(self, step: int) -> float:
        """Return the share of the budget that is spent, in [0, 1]."""
        return min(1.0, max(self.elapsed / self.seconds, step / self.steps))

    def rate(self, step: int, warmup: int = 100, hold: float = 0.3) -> float:
        """Return the factor for the learning rate: a ramp of `warmup` steps, a plateau, then down to zero."""
        rising = min(1.0, (step + 1) / warmup)
        falling = min(1.0, (1 - self.progress(step)) / (1 - hold))
        return rising * falling
