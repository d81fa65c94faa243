"""The clock: steps counted from what pipelines really pass."""

from __future__ import annotations

import pytest
import torch

from vidaccel.frontdoor import Clock


def count(clock: Clock, timesteps: list[float], branches: tuple[str | None, ...] = ("cond", "uncond")) -> list[int]:
    return [clock.step(torch.tensor([t]), branch=b).index for t in timesteps for b in branches][:: len(branches)]


def test_counts_and_starts_again() -> None:
    clock = Clock(3)
    assert count(clock, [999, 700, 300]) == [0, 1, 2]
    assert count(clock, [999, 700, 300]) == [0, 1, 2]
    assert count(clock, [999], (None,)) == [0]


def test_interrupted_run_and_one_step_runs() -> None:
    clock = Clock()
    count(clock, [999, 700])
    assert count(clock, [999, 700, 300]) == [0, 1, 2]
    one = Clock()
    steps = [one.step(torch.tensor([999.0]), branch="cond") for _ in range(3)]
    assert [s.index for s in steps] == [0, 0, 0]
    assert all(s.new_trajectory for s in steps)


def test_second_order_schedulers_repeat_timesteps() -> None:
    assert count(Clock(), [999, 700, 700, 300, 300]) == [0, 1, 2, 3, 4]


def test_two_experts_share_the_count() -> None:
    clock = Clock()
    seen = [
        clock.step(torch.tensor([t]), caller=who, branch=b).index
        for t, who in ((999, 1), (900, 1), (500, 2))
        for b in "cu"
    ]
    assert seen == [0, 0, 1, 1, 2, 2]


def test_a_timestep_per_token_takes_the_largest() -> None:
    step = Clock().step(torch.tensor([[0.0, 0.0, 750.0]]))
    assert step.index == 0
    assert step.sigma == 0.75


def test_the_last_timestep_may_be_1_of_1000() -> None:
    for scale in (1000, 1):
        clock = Clock(3)
        sigmas = [clock.step(torch.tensor([scale * sigma])).sigma for sigma in (1.0, 0.5, 0.001)]
        assert sigmas == pytest.approx([1.0, 0.5, 0.001])


def test_hints_are_believed_and_spare_the_wait() -> None:
    class Unread(torch.Tensor):
        def max(self) -> torch.Tensor:  # type: ignore[override]
            raise AssertionError("the timestep was read although the pipeline had named the step")

    clock = Clock(99)
    hints = [{"step_index": n, "sigma": 1 - n / 4, "num_inference_steps": 4} for n in range(4)]
    value = torch.zeros(1).as_subclass(Unread)
    for _ in range(2):
        steps = [clock.step(value, branch=b, hint=h) for h in hints for b in ("cond", "uncond")]
        assert [s.index for s in steps] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [s.new_trajectory for s in steps] == [True] + [False] * 7
        assert {s.total for s in steps} == {4}


def test_total_is_asked_when_a_run_has_begun() -> None:
    total = {"steps": 8}
    clock = Clock(lambda: total["steps"])
    assert clock.step(torch.tensor([9.0])).total == 8
    total["steps"] = 4
    assert clock.step(torch.tensor([9.0])).total == 4
