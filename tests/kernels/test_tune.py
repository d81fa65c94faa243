"""Launch parameters are timed once, remembered, and never depend on a mask."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from vidaccel.kernels import Verdict, gluon, portable, prepare, tma, tune


class Pair(NamedTuple):
    keys: int
    warps: int


CANDIDATES = (Pair(64, 4), Pair(64, 8), Pair(32, 4))
KEY = tune.Key("portable", 128, 64, "bfloat16", False, "A GPU", "3.9.0")


class Clock:
    """A timing function that counts its calls."""

    def __init__(self, *times: float) -> None:
        self.times, self.calls = list(times), 0

    def __call__(self, candidates: Sequence[Pair]) -> list[float]:
        assert tuple(candidates) == CANDIDATES
        self.calls += 1
        return self.times


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another process."""
    monkeypatch.setattr(tune, "_known", {})


def test_the_fastest_is_timed_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(3.0, 2.0, math.inf)
    for _ in range(2):
        found = tune.fastest(CANDIDATES, KEY, clock)
        assert found == Pair(64, 8)
        assert isinstance(found, Pair)
    forget(monkeypatch)
    assert tune.fastest(CANDIDATES, KEY, clock) == Pair(64, 8)
    assert clock.calls == 1
    assert tune.stored() == {KEY: (64, 8)}
    assert [path.name for path in tune.file().parent.iterdir()] == ["tuned.json"]


def test_each_gpu_and_version_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [KEY, KEY._replace(gpu="Another"), KEY._replace(triton="3.10.0"), KEY._replace(window=True)]
    for n, key in enumerate(keys):
        tune.fastest(CANDIDATES, key, Clock(*(float(n != m % 3) for m in (0, 1, 2))))
    forget(monkeypatch)
    never = Clock()
    assert [tune.fastest(CANDIDATES, key, never) for key in keys[:3]] == list(CANDIDATES)
    assert never.calls == 0
    assert list(tune.stored()) == keys


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_processes_that_work_together_take_what_one_of_them_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    for clock in (Clock(2.0, 1.0, 3.0), Clock(1.0, 2.0, 3.0)):
        tune.file().unlink(missing_ok=True)  # Another host's.
        monkeypatch.setattr(tune, "_known", {})
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            assert tune.fastest(CANDIDATES, KEY, clock) == CANDIDATES[1]
        finally:
            torch.distributed.destroy_process_group()
        assert clock.calls == 1
        assert tune.stored() == {KEY: (64, 8)}
    # A host whose file says something else takes the same.
    tune._store(KEY, tuple(CANDIDATES[2]))
    monkeypatch.setattr(tune, "_known", {})
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert tune.fastest(CANDIDATES, KEY, never := Clock()) == CANDIDATES[1]
    finally:
        torch.distributed.destroy_process_group()
    assert never.calls == 0


def test_nothing_that_runs_is_not_remembered() -> None:
    assert tune.fastest(CANDIDATES, KEY, Clock(math.inf, math.inf, math.inf)) == CANDIDATES[0]
    assert tune.fastest(CANDIDATES, KEY, Clock(2.0, math.inf, 1.0)) == CANDIDATES[2]


@pytest.mark.parametrize("text", ["", "{", '{"for": 1}', "[1]", '[{"for": {"kernel": "x"}, "chosen": [1]}]', "\xff"])
def test_a_broken_file_is_ignored_with_a_warning(text: str, caplog: pytest.LogCaptureFixture) -> None:
    tune.file().parent.mkdir()
    tune.file().write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert tune.fastest(CANDIDATES, KEY, Clock(1.0, 2.0, 3.0)) == CANDIDATES[0]
    assert str(tune.file()) in caplog.text
    assert tune.stored() == {KEY: (64, 4)}


def test_what_is_no_candidate_any_more_is_timed_again() -> None:
    tune.file().parent.mkdir()
    tune.file().write_text(json.dumps([{"for": KEY._asdict(), "chosen": [256, 4]}]))
    assert tune.fastest(CANDIDATES, KEY, Clock(2.0, 1.0, 3.0)) == CANDIDATES[1]
    assert tune.stored() == {KEY: (64, 8)}


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert tune.fastest(CANDIDATES, KEY, Clock(2.0, 1.0, 3.0)) == CANDIDATES[1]
    assert "cannot be written" in caplog.text


def test_who_has_no_home_has_a_file_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", nowhere)
    monkeypatch.setattr(tune.tempfile, "tempdir", str(tmp_path))
    assert tune.fastest(CANDIDATES, KEY, Clock(2.0, 1.0, 3.0)) == CANDIDATES[1]
    assert tune.file().is_relative_to(tmp_path)
    assert tune.stored() == {KEY: (64, 8)}


def test_the_kernel_that_serves_is_tuned_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[bool] = []
    monkeypatch.setattr(gluon, "can_run", lambda problem: Verdict(not problem.partial))
    monkeypatch.setattr(portable, "can_run", lambda problem: Verdict(True))
    monkeypatch.setattr(portable, "config", lambda d, block, dtype, window, device: tuned.append(window))
    prepare(128, 64, torch.bfloat16, torch.device("cuda"))
    prepare(128, 64, torch.bfloat16, torch.device("cpu"))
    assert tuned == [True]


def test_without_a_gpu_the_table_serves() -> None:
    for kernel in (portable, tma):
        assert kernel.config(128, 128, torch.bfloat16, False, torch.device("cpu")) == kernel.CONFIGS[128, 128]
    assert not tune.file().exists()


def test_doctor_shows_them() -> None:
    from typer.testing import CliRunner

    from vidaccel.cli.main import app

    tune.fastest(CANDIDATES, KEY, Clock(2.0, 1.0, 3.0))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    assert "launch parameters" in done.output
    assert "64 8" in done.output
    assert "A GPU" in done.output


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [portable, tma])
@pytest.mark.parametrize("window", [False, True])
def test_gpu_tunes_where_the_table_was_not_measured(
    kernel: object, window: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel is tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    assert kernel in (portable, tma)
    monkeypatch.setattr(kernel, "measured_on", lambda device: False)
    device, before = torch.device("cuda", 0), torch.cuda.get_rng_state()
    chosen = kernel.config(64, 128, torch.bfloat16, window, device)  # type: ignore[attr-defined]
    assert torch.equal(torch.cuda.get_rng_state(), before)
    (key,) = tune.stored()
    assert tune.stored()[key] == chosen
    assert key.window == window

    def measured_again(*_: object) -> None:
        raise AssertionError("it was measured already")

    monkeypatch.setattr(tune, "measure", measured_again)
    assert kernel.config(64, 128, torch.bfloat16, window, device) == chosen  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_gpu_does_not_tune_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "measured_on", lambda device: False)
    q = torch.randn(1, 256, 2, 64, device="cuda").half()
    portable.run(q, q, q, None, 0.1, None, portable.CONFIGS[64, 128])
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        portable.run(q, q, q, None, 0.1, None)
    assert not tune.file().exists()
