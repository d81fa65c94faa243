"""The past and the own chunk in one launch are two attentions, wherever the own chunk begins."""

from __future__ import annotations

import pytest
import torch

from vidaccel.kernels.attention import attention
from vidaccel.reuse.parts import Parts

HEADS, D = 3, 16


def draw(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, HEADS, D, generator=generator) for length in lengths]


@pytest.mark.parametrize(
    ("queries", "past", "own"), [(70, 40, 70), (130, 256, 130), (200, 300, 200), (5, 257, 200), (128, 128, 128)]
)
@pytest.mark.parametrize("wanted", [(True,), (True, False, True), (False, False, False)], ids=str)
def test_one_launch_is_two(queries: int, past: int, own: int, wanted: tuple[bool, ...]) -> None:
    q, k, v = draw(queries, past + own, past + own)
    bias = torch.randn(1, HEADS, past + own, generator=torch.Generator().manual_seed(1))
    parts = Parts(queries, past, own, torch.device("cpu"))
    for key_bias in (None, bias):
        cut = (slice(None, past), slice(past, None))
        expected = [
            attention(q, k[:, at], v[:, at], key_bias=None if key_bias is None else key_bias[..., at]) for at in cut
        ]
        gone = [not wanted[head % len(wanted)] for head in range(HEADS)]
        expected[0][0][:, :, gone], expected[0][1][:, gone] = 0, -torch.inf
        # Known beforehand, or not before the call.
        for given in (wanted, torch.tensor(wanted)):
            for found, right in zip(parts(q, k, v, given, key_bias), expected, strict=True):
                torch.testing.assert_close(found[0], right[0], atol=1e-5, rtol=0)
                torch.testing.assert_close(found[1], right[1], atol=1e-5, rtol=0)


def test_what_is_known_beforehand_is_made_once() -> None:
    """CUDA graphs read it where it was when they were recorded."""
    parts = Parts(70, 40, 70, torch.device("cpu"))
    first, again, other = (parts._mask(wanted) for wanted in ((True, False), (True, False), (False, True)))
    assert first is again
    assert first is not other
    assert first.ptr.diff().view(2, -1).tolist() == [[1, 1], [1, 0]]
