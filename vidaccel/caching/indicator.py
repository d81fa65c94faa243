"""What a gate looks at: how much something cheap has changed, or how wrong a forecast of it would have been.

Every indicator measures (2, b) sums, see `forecast.absolute_error`; `gate.relative` makes them a number.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch

from .forecast import Form, Ladder, absolute_error

Signal = Literal["latent", "modulation", "first", "residual"]
"""Where an indicator looks: the transformer's input, the modulation of the first layer (a function of the time
embedding), the output of the first layer, or what that layer has added to its input."""


class Sizes(NamedTuple):
    """How large one call's features are.

    Attributes:
        batch: samples.
        tokens: tokens of the residual stream.
        width: its channels.
        modulation: elements of the modulation of the first layer, one sample.
        latent: elements of the transformer's output, one sample.
        itemsize: bytes of an element.
    """

    batch: int
    tokens: int
    width: int
    modulation: int
    latent: int
    itemsize: int


class Indicator(Protocol):
    """Measures one signal along one branch of a trajectory."""

    signal: Signal

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def estimate(self, sizes: Sizes) -> int:
        """Bytes that it will hold."""
        ...

    def measure(self, x: float, value: torch.Tensor) -> torch.Tensor | None:
        """Look at the signal of a step at coordinate x, (b, ...). None while there is no history."""
        ...

    def computed(self, x: float, value: torch.Tensor, output: torch.Tensor) -> None:
        """The step was computed; `output` (b, ...) is what the mechanism forecasts on other steps."""
        ...


class ForecastError:
    """The relative error of a forecast of the signal, measured where the truth is cheap (CG-Taylor).

    It is updated on computed steps only, so that this forecast looks as far ahead as the one that is trusted.

    Args:
        order: highest order of the forecast.
        form: its form.
        storage: type of its stored terms.
        stride: look at every n-th token, which divides the memory by n.
        reach: see `Ladder`.
    """

    signal: Signal = "first"

    def __init__(
        self, order: int, form: Form, storage: torch.dtype | None, stride: int = 1, reach: float | None = None
    ) -> None:
        self.ladder = Ladder(order, form, storage, reach)
        self.stride = stride

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.ladder.nbytes

    def estimate(self, sizes: Sizes) -> int:
        """One tensor an order."""
        tokens = -(-sizes.tokens // self.stride)
        return self.ladder.estimate(sizes.batch * tokens * sizes.width, sizes.itemsize)

    def measure(self, x: float, value: torch.Tensor) -> torch.Tensor | None:
        """Sum |forecast - value| over sum |value|."""
        value = value[:, :: self.stride]
        return self.ladder.error(x, value) if self.ladder.fits(value) else None

    def computed(self, x: float, value: torch.Tensor, output: torch.Tensor) -> None:
        """Learn the value."""
        self.ladder.update(x, value[:, :: self.stride])


class Change:
    """The relative change of the signal since a step before: sum |now - before| over sum |before|.

    Args:
        signal: what to look at.
        every_step: since the previous step (TeaCache) rather than since the last computed one (first block cache).
    """

    def __init__(self, signal: Signal, every_step: bool) -> None:
        self.signal = signal
        self.every_step = every_step
        self._before: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self._before is None else self._before.nbytes

    def estimate(self, sizes: Sizes) -> int:
        """The signal, once."""
        elements = sizes.modulation if self.signal == "modulation" else sizes.tokens * sizes.width
        return sizes.batch * elements * sizes.itemsize

    def measure(self, x: float, value: torch.Tensor) -> torch.Tensor | None:
        """Compare with what was remembered."""
        before = self._before
        if self.every_step:
            self._before = value.clone()
        return None if before is None else absolute_error([value], [1.0], before)

    def computed(self, x: float, value: torch.Tensor, output: torch.Tensor) -> None:
        """Remember a computed step."""
        if not self.every_step:
            self._before = value.clone()


class OutputChange:
    """The change of the output as the change of the latent foretells it (EasyCache, arXiv 2507.02860).

    Math: k = |v_a - v_b| / |x_a - x_b| over the last two computed steps a and b; the change at a step is
        k |x - x_previous| / |v_a|, with x the transformer's input and v its output.
    """

    signal: Signal = "latent"

    def __init__(self) -> None:
        self._previous: torch.Tensor | None = None
        self._anchor: tuple[torch.Tensor, torch.Tensor] | None = None
        self._rate: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [self._previous, *(self._anchor or ()), self._rate]
        return sum(x.nbytes for x in held if x is not None)

    def estimate(self, sizes: Sizes) -> int:
        """Two latents, an output, and the rate in fp64."""
        return 3 * sizes.batch * sizes.latent * sizes.itemsize + 8

    def measure(self, x: float, value: torch.Tensor) -> torch.Tensor | None:
        """Compare the latent with that of the previous step."""
        before, self._previous = self._previous, value.clone()
        if before is None or self._anchor is None or self._rate is None:
            return None
        sums = absolute_error([value], [1.0], before, self._anchor[1])
        sums[0] *= self._rate
        return sums

    def computed(self, x: float, value: torch.Tensor, output: torch.Tensor) -> None:
        """Learn how strongly the output follows the latent."""
        if self._anchor is not None:
            latent, velocity = self._anchor
            moved = absolute_error([value], [1.0], latent)[0].sum()
            self._rate = absolute_error([output], [1.0], velocity)[0].sum() / moved
        self._anchor = value.clone(), output.clone()
