"""Commands under a launcher: prompts over processes, one video on two of them, the bench; what happens if one dies."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import Result

from vidaccel.cli.output import Format, Screen
from vidaccel.cli.world import World
from vidaccel.lab.link import Link, predict
from vidaccel.render.video import read_frames

WORKER = Path(__file__).with_name("parallel_worker.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo"),
]


def free_ports(many: int) -> int:
    """The first of so many ports that nobody uses."""
    while True:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            first = one.getsockname()[1]
        if first + many < 65536:
            return int(first)


@pytest.fixture(scope="module")
def ranks(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, Any]]]]:
    """Where two processes worked, and what each of them wrote, by command; the second dies in the last."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, two_processes(folder, wan, [0, 9])


def two_processes(folder: Path, model: Path, statuses: list[int], *dead: int) -> list[dict[str, dict[str, Any]]]:
    """What each of two processes wrote, by command."""
    (folder / "prompts.txt").write_text("a cat\ntwo dogs\na bird\n")
    port = free_ports(16)
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(port), str(model), *map(str, dead)],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        done = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == statuses, done[0][1][-3000:] + done[1][1][-3000:]
    lines = [[json.loads(line) for line in stdout.splitlines() if line.startswith('{"name"')] for stdout, _ in done]
    return [{found["name"]: found for found in each} for each in lines]


def test_prompts_are_divided_and_told_once(ranks: Any) -> None:
    folder, (first, second) = ranks
    assert first["many"]["status"] == second["many"]["status"] == 0, first["many"]["err"]
    told = json.loads(first["many"]["out"])
    names = ["001-a-cat", "002-two-dogs", "003-a-bird"]
    assert [Path(video["file"]).stem for video in told["videos"]] == names
    assert not any(video["skipped"] for video in told["videos"])
    assert second["many"]["out"] == ""
    assert "videos finished" in first["many"]["err"]
    assert "step" not in second["many"]["err"]
    assert sorted(path.name for path in (folder / "reports").iterdir()) == names


def test_a_rerun_makes_what_is_missing(ranks: Any) -> None:
    _, (first, second) = ranks
    told = json.loads(first["rerun"]["out"])["videos"]
    assert [video["skipped"] for video in told] == [True, False, True]
    assert first["rerun"]["status"] == second["rerun"]["status"] == 0


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("in the way", 2, "num_inference_steps"),
        ("two for one", 2, "--context-parallel 2"),
        ("two for one stream", 2, "--context-parallel 2"),
        ("three of two", 2, "torchrun --nproc-per-node 3"),
    ],
)
def test_all_processes_end_where_one_cannot_go_on(ranks: Any, name: str, status: int, words: str) -> None:
    _, (first, second) = ranks
    assert first[name]["status"] == second[name]["status"] == status
    assert words in first[name]["err"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("together", ("-a", "radial", "-d", 0.6, "--set", "attention.block=16")),
        ("stream", ("--stream", "--rollout", "self-forcing", "--frames", 25)),
    ],
)
def test_one_video_on_two_processes(
    ranks: Any, wan: Path, invoke: Callable[..., Result], tmp_path: Path, name: str, arguments: tuple[object, ...]
) -> None:
    folder, (first, second) = ranks
    assert first[name]["status"] == second[name]["status"] == 0, first[name]["err"]
    assert second[name]["out"] == ""
    job = ["render", "-m", wan, "--device", "cpu", "--seed", 1, "-p", "a cat", "-o", "alone.mp4", *arguments]
    assert invoke(*job).exit_code == 0
    alone, together = (read_frames(path, 25) for path in (tmp_path / "alone.mp4", folder / f"{name}.mp4"))
    assert np.abs(alone.astype(int) - together.astype(int)).max() <= 2


def test_the_report_says_how_many_processes_made_it(ranks: Any) -> None:
    folder, _ = ranks
    assert "2 processes share the video" in (folder / "report" / "report.json").read_text()


def test_a_dead_process_ends_the_other_with_a_message(ranks: Any) -> None:
    folder, (first, second) = ranks
    assert "death" not in second
    assert first["death"]["status"] == 1
    assert "another process of this command has stopped" in first["death"]["err"]
    assert not (folder / "dog.mp4").exists()


def test_prompts_of_a_dead_process_are_left_for_a_rerun(wan: Path, tmp_path: Path) -> None:
    left = two_processes(tmp_path, wan, [0, 9], 1)[0]["many"]
    assert left["status"] == 1
    assert "another process of this command has stopped" in left["err"]
    assert "1 of 3 videos were not made" in left["err"]
    told = json.loads(left["out"])
    made = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert len(made) == 2
    assert [Path(video["file"]).name for video in told["videos"]] == made
    assert told["failed"] == sorted({"001-a-cat.mp4", "002-two-dogs.mp4", "003-a-bird.mp4"} - set(made))


def test_the_others_end_with_a_message_where_the_first_dies(wan: Path, tmp_path: Path) -> None:
    other = two_processes(tmp_path, wan, [9, 0], 0)[1]["many"]
    assert other["status"] == 1
    assert "another process of this command has stopped" in other["err"]
    assert "Traceback" not in other["err"]
    # What it was at is finished.
    assert len(list((tmp_path / "many").glob("*.mp4"))) == 1


def test_the_bench_writes_measurements_and_marks_predictions(ranks: Any) -> None:
    folder, (first, second) = ranks
    assert first["bench"]["status"] == second["bench"]["status"] == 0, first["bench"]["err"]
    assert second["bench"]["out"] == ""
    record = json.loads((folder / "bench.json").read_text())
    assert (record["what"], record["ranks"]) == ("parallel", 2)
    link, dense, sparse, cached = record["rows"]
    assert [row["kind"] for row in record["rows"]] == ["link", "call", "call", "cache"]
    # 40 tokens of q, k, v and the output; of 4 heads, one of them empty, 2 leave; 64 channels of 4 bytes.
    assert link["sent_bytes"] == 40 * 4 * 2 * 64 * 4
    for row in (dense, sparse):
        assert row["apart"] < 1e-5
        assert row["speedup"] == pytest.approx(row["one"]["call_ms"] / row["all"]["call_ms"], rel=1e-5)
        assert row["efficiency"] == pytest.approx(row["speedup"] / 2, rel=1e-5)
        assert row["exchange_share"] == pytest.approx(6 * link["exchange_ms"] / row["all"]["call_ms"], rel=1e-5)
        assert set(row["predicted"]) == {"2", "4", "8"}
    assert cached["skipped_ms"]["uncond"] > 0


def test_a_prediction_is_the_measurement_where_there_is_one() -> None:
    link = Link(2, 800_000_000, 2.2, 0.1, 3.0)
    found = predict(1000.0, 530.0, 10, link, 2)
    assert found["call_ms"] == pytest.approx(530.0)
    assert found["efficiency"] == pytest.approx(1000 / 530 / 2)
    # On 4: a quarter of the compute, 3/4 of the bytes of 2 ranks, half the reordering, and what did not shrink.
    layer = 0.2 + 2.0 * 0.75 + 0.8 / 2
    assert predict(1000.0, 530.0, 10, link, 4)["call_ms"] == pytest.approx(250 + 10 * layer)


def test_a_prediction_hides_as_much_of_the_exchange_as_the_measurement() -> None:
    link = Link(2, 800_000_000, 2.2, 0.1, 3.0)
    assert predict(1000.0, 515.0, 10, link, 2)["call_ms"] == pytest.approx(515.0)
    assert predict(1000.0, 515.0, 10, link, 4)["call_ms"] == pytest.approx(250 + 0.5 * 10 * link.of(4))
    # Two GPUs that are more than twice as fast, for their caches or clocks, promise nothing for four.
    assert predict(1000.0, 490.0, 10, link, 4)["call_ms"] == pytest.approx(250)


def test_who_is_free_takes_the_next() -> None:
    store = torch.distributed.HashStore()
    quick, other, slow = (World(rank, 3, together=1, store=store) for rank in range(3))
    first = [next(world.shared(9)) for world in (slow, other)]
    assert (first, list(quick.shared(9))) == ([0, 1], [2, 3, 4, 5, 6, 7, 8])


def test_a_team_takes_the_same() -> None:
    store = torch.distributed.HashStore()
    teams = [World(rank, 4, together=2, store=store).shared(5) for rank in range(4)]
    taken = [[next(teams[rank]) for rank in ranks] for ranks in ((2, 3), (0, 1), (2, 3), (2, 3))]
    assert taken == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert list(teams[0]) == list(teams[1]) == [4]


def test_what_one_process_warned_of_others_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    store = torch.distributed.HashStore()
    for rank in range(2):
        screen = Screen(Format.quiet, World(rank, 2, store=store).is_news)
        screen.warn("nothing is sparse")
        screen.warn(f"rank {rank} has black frames")
    said = ["nothing is sparse", "rank 0 has black frames", "rank 1 has black frames"]
    assert capsys.readouterr().err.splitlines() == [f"warning: {text}" for text in said]
