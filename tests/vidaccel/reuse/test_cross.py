"""Prompts: padding is one token exactly, short prompts stay whole, long ones keep what hashes like the queries."""

from __future__ import annotations

import math

import pytest
import torch

from vidaccel.errors import UsageError
from vidaccel.kernels.attention import attention
from vidaccel.reuse import AnnCross
from vidaccel.reuse.cross import PromptChoice, attend_merged, merged_padding

HEADS, D, WIDTH, TOKENS = 2, 16, 12, 20


def prompt(words: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States (b, tokens, width) of prompts with so many words and padding behind, and keys and values made of them."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(len(words), TOKENS, WIDTH, generator=generator)
    pad = torch.randn(WIDTH, generator=generator)
    for sample, count in enumerate(words):
        text[sample, count:] = pad
    weights = torch.randn(2, WIDTH, HEADS * D, generator=generator) / 3
    key, value = ((text @ weight).unflatten(2, (HEADS, D)) for weight in weights)
    return text, key, value


def queries(batch: int) -> torch.Tensor:
    return torch.randn(batch, 30, HEADS, D, generator=torch.Generator().manual_seed(9))


def choice(density: float, block: int = 4) -> PromptChoice:
    return PromptChoice.of(AnnCross(density, block=block), torch.device("cpu"))


def test_padding_is_one_token_with_the_logarithm_of_their_number() -> None:
    text, _, _ = prompt((3, 20))
    found = merged_padding(text + 1e-3 * torch.randn(text.shape))
    assert found[0, :4].tolist() == pytest.approx([0, 0, 0, math.log(17)])
    assert found[0, 4:].isneginf().all()
    assert (found[1] == 0).all()


@pytest.mark.parametrize("words", [(5,), (9, 2)], ids=str)
def test_a_padded_prompt_of_few_words_is_exact_and_not_hashed(words: tuple[int, ...]) -> None:
    """Hashed as it stands, copies of the padding would take the places of words."""
    text, key, value = prompt(words)
    made = choice(0.5).prepare(text, key, value)
    assert not made.is_hashed
    # Whole blocks of four, as many as the longest prompt needs, and no more than half of it.
    room = {5: 8, 9: 10}[max(words)]
    assert made.tensors[0].shape == (len(words), room, HEADS, D)
    assert f"{max(words) + 1} of {TOKENS}" in made.note
    assert f"density {room / TOKENS:.3f}" in made.note
    q = queries(len(words))
    torch.testing.assert_close(attend_merged(q, *made.tensors), attention(q, key, value)[0], atol=1e-5, rtol=0)


def test_a_prompt_that_is_too_short_to_pay_is_attended_to_whole() -> None:
    text, key, value = prompt((18,))
    for least in (TOKENS, TOKENS + 1):
        chooser = PromptChoice.of(AnnCross(0.5, block=4), torch.device("cpu"), least=least)
        made = chooser.prepare(text, key, value)
        assert made.is_hashed == (least == TOKENS)
    assert made.tensors == (key, value)
    assert f"fewer than {TOKENS + 1} takes longer" in made.note


def test_a_long_prompt_keeps_its_padding_and_what_the_queries_look_for() -> None:
    text, key, value = prompt((18,))
    made = choice(0.5).prepare(text, key, value)
    assert made.is_hashed
    # The queries of each head look for one word.
    q = key[:, [7]].expand(-1, 30, -1, -1) + 0.1 * queries(1)
    kept_key, _, bias = choice(0.5)(q, *made.tensors)
    assert kept_key.shape == (1, 10, HEADS, D)
    assert bias.shape == (1, HEADS, 10)
    assert bias.isfinite().all()
    assert (bias.amax(-1) == math.log(2)).all()
    assert all((kept_key[0, :, head] == key[0, 7, head]).all(-1).any() for head in range(HEADS))
    whole = attention(q, key, value)[0]

    def error(*kept: torch.Tensor) -> float:
        return float((attend_merged(q, *kept) - whole).norm() / whole.norm())

    lots = [[*torch.randperm(18, generator=torch.Generator().manual_seed(n))[:9].tolist(), 18] for n in range(20)]
    drawn = [error(*(made.tensors[0][:, lot], made.tensors[1][:, lot], made.tensors[2][..., lot])) for lot in lots]
    assert error(*choice(0.5)(q, *made.tensors)) < 0.6 * sum(drawn) / len(drawn)


def test_samples_of_a_batch_choose_for_themselves() -> None:
    text, key, value = prompt((18, 20))
    made, q = choice(0.5).prepare(text, key, value), queries(2)
    both = choice(0.5)(q, *made.tensors)
    for sample in range(2):
        one = slice(sample, sample + 1)
        alone = choice(0.5)(q[one], *(x[one] for x in made.tensors))
        assert all(torch.equal(x[one], y) for x, y in zip(both, alone, strict=True))


def test_no_prompt_is_cut_below_a_block_and_that_is_said() -> None:
    made = choice(0.1, block=64).prepare(*prompt((18,)))
    assert not made.is_hashed
    assert len(made.tensors) == 2
    assert made.tensors[0].shape[1] == TOKENS
    assert "all 20 prompt tokens" in made.note
    assert "one block of keys has 64" in made.note


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="block 1 or more"):
        AnnCross(block=0)
