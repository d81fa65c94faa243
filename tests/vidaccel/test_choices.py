"""Choices that serve several steps: when they do, and how drift is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.choices import Choices, drift
from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import Ann, Plan, TopK

SITE = Site("blocks.0.attn1.processor", 0, "self", "wan")
LAYOUT = TokenLayout.of((4, 7, 9), 5, 16)


def plan_of(pattern=None, density=0.4) -> Plan:
    return (pattern or TopK(block=16)).plan(LAYOUT, density, SITE)


def choice_of(plan, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (plan.layout.to_kernel(torch.randn(1, LAYOUT.tokens, 2, 16, generator=generator)) for _ in range(3))
    return plan.select.choose(q, k, v)


@pytest.mark.parametrize(
    ("reselect", "chosen"),
    [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (10, [0]), ((2, 5), [0, 2, 5]), ((), [0]), ((0, 1), [0, 1])],
)
def test_when_blocks_are_chosen_anew(reselect, chosen):
    plan, choices, found = replace(plan_of(), reselect=reselect), Choices(), []
    choice = choice_of(plan)
    for step in range(7):
        if choices.held(plan, "a", "cond", step, 1) is None:
            found.append(step)
            choices.keep(plan, "a", "cond", step, 1, choice)
        else:
            assert choices.held(plan, "a", "cond", step, 1) is choice
    assert found == chosen


def test_nobody_else_uses_a_choice():
    plan = replace(plan_of(), reselect=5)
    choices, choice = Choices(), choice_of(plan)
    choices.keep(plan, "a", "cond", 3, 1, choice)
    assert choices.held(plan, "a", "cond", 4, 1) is choice
    assert choices.held(plan, "b", "cond", 4, 1) is None
    assert choices.held(plan, "a", "uncond", 4, 1) is None
    assert choices.held(plan, "a", None, 4, 1) is None
    assert choices.held(plan, "a", "cond", 4, 2) is None
    assert choices.held(replace(plan), "a", "cond", 4, 1) is None
    choices.keep(plan, "a", None, 4, 1, choice)
    assert choices.held(plan, "a", None, 5, 1) is None


def test_steps_that_were_skipped_count():
    """A cache may stand in for the step at which blocks were to be chosen."""
    plan = replace(plan_of(), reselect=(4,))
    choices, choice = Choices(), choice_of(plan)
    choices.keep(plan, "a", "cond", 2, 1, choice)
    assert choices.held(plan, "a", "cond", 3, 1) is choice
    assert choices.held(plan, "a", "cond", 5, 1) is None


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_drift_is_the_share_of_new_blocks(one, two):
    plan = plan_of()
    old, new = choice_of(plan, one), choice_of(plan, two)
    video = plan.layout.video_blocks
    kept = [{tuple(at) for at in c.mask.block_map()[:, :video, :video].nonzero().tolist()} for c in (old, new)]
    assert float(drift(old, new)) == pytest.approx(len(kept[1] - kept[0]) / len(kept[1]), abs=1e-6)
    assert float(drift(old, old)) == 0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_drift_of_moved_tokens_looks_at_tokens(seed):
    plan = plan_of(Ann(bits=4, block=16))
    old, new = choice_of(plan), choice_of(plan, seed)
    token = torch.linspace(0, LAYOUT.grid.tokens - 1, 32).long().tolist()
    kept = []
    for choice in (old, new):
        rows = choice.mask.block_map()
        pairs = set()
        for head in range(2):
            query = choice.q_order[0, :, head].tolist()
            key = choice.k_order[0, :, head].tolist()
            for each in token:
                row = rows[head, query.index(each) // 16]
                pairs |= {(head, each, key[slot]) for slot in range(len(key)) if row[slot // 16]}
        kept.append(pairs)
    assert float(drift(old, new)) == pytest.approx(len(kept[1] - kept[0]) / len(kept[1]), abs=1e-6)


def test_keep_measures_drift_from_the_choice_before():
    plan = replace(plan_of(), reselect=2)
    choices = Choices()
    old, new = choice_of(plan), choice_of(plan, 1)
    assert choices.keep(plan, "a", "cond", 0, 1, old) is None
    assert float(choices.keep(plan, "a", "cond", 2, 1, new)) == float(drift(old, new)) > 0
    assert choices.keep(plan, "a", "cond", 0, 2, old) is None


def test_what_is_forgotten():
    plan = replace(plan_of(), reselect=5)
    choices, choice = Choices(), choice_of(plan)
    for site in ("a", "b"):
        for branch in ("cond", "uncond"):
            choices.keep(plan, site, branch, 0, 1, choice)
    choices.forget("cond")
    assert choices.held(plan, "a", "cond", 1, 1) is None
    assert choices.held(plan, "b", "uncond", 1, 1) is choice
    choices.forget()
    assert choices.held(plan, "b", "uncond", 1, 1) is None
