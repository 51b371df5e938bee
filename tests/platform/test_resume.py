"""A run that was interrupted and goes on gives the metrics of one that never was."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kill_and_resume import RUNS, Shape, comparable
from mobula import running
from mobula.errors import ArtifactError, ConfigError
from mobula.settings import make_config


def config(name: str) -> Any:
    given, _ = RUNS[name]
    return make_config(**{**given, "seed": 3})


# Shapes that are killed at a random moment, with their iterations; the other ones of RUNS are interrupted between two.
KILLED = {"continuing": 25, "on-policy, two runners": 15, "offline": 20}


@pytest.mark.parametrize("name", [name for name in RUNS if name not in KILLED])
def test_an_interrupted_run_goes_on_exactly(ray_session: None, tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"out": tmp_path, "track": False, "evaluate": False}
    whole = running.train(config(name), stop={"iterations": 5}, **options)
    part = running.train(config(name), stop={"iterations": 3}, **options)
    assert comparable(part.rows) == comparable(whole.rows[:3])
    resumed = running.resume(part.path, stop={"iterations": 5})
    assert comparable(resumed.rows) == comparable(whole.rows)
    lines = [json.loads(line) for line in (part.path / "progress.jsonl").read_text().splitlines()]
    assert comparable(lines) == comparable(whole.rows)
    assert json.loads((part.path / "run.json").read_text())["status"] == "done"


@pytest.mark.parametrize(("shape", "iterations"), KILLED.items())
def test_a_killed_run_goes_on_exactly(ray_session: None, tmp_path: Path, shape: str, iterations: int) -> None:
    """SIGKILL at a random moment; the checkpoint that is picked is whole, and the metrics are those of the unbroken run."""
    runs = Shape(shape, tmp_path, iterations)
    times: list[float] = []
    runs.rows = running.train(
        config(shape),
        stop={"iterations": iterations},
        out=tmp_path / "whole",
        checkpoint_every=1,
        keep=2,
        track=False,
        evaluate=False,
        progress=lambda row, share: times.append(time.time()),
    ).rows
    runs.seconds = times[-1] - times[0]
    found = runs.round(0, random.Random(), running.resume)
    assert found["equal"], found
    assert found["resumed from"] <= found["killed after"] + 1
    (path,) = (runs.folder / "killed0").glob("2*")
    if not found["ended before the kill"]:
        # Two checkpoints are kept: the last, and one before it.
        assert len(list((path / "checkpoints").iterdir())) == 1
    assert running.newest_checkpoint(path)[1] == runs.iterations


def test_a_checkpoint_that_is_not_whole_is_never_picked(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "algorithm_state.pkl").write_bytes(b"half")
    assert running.newest_checkpoint(tmp_path) == (None, 0)
    old = tmp_path / ".checkpoint.old.x" / "checkpoint"
    old.mkdir(parents=True)
    (old / running.CHECKPOINT_MARK).write_text('{"training_iteration": 4}')
    assert running.newest_checkpoint(tmp_path) == (old, 4)


def test_what_a_kill_left_half_written_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    class Saved:
        training_iteration = 0

        def save_to_path(self, path: str) -> None:
            (Path(path) / "state").write_text(str(self.training_iteration))

    algorithm: Any = Saved()
    for name in (".checkpoint.a1", ".checkpoint.old.b2/checkpoint", "checkpoints/.000003.c3"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "state").write_text("half")
    for iteration in (4, 5, 6):
        algorithm.training_iteration = iteration
        running.save_checkpoint(algorithm, tmp_path, keep=2)
        assert {p.name for p in tmp_path.iterdir()} == {"checkpoint", "checkpoints"}
        assert running.newest_checkpoint(tmp_path) == (tmp_path / "checkpoint", iteration)
        kept = [p.name for p in (tmp_path / "checkpoints").iterdir()]
        assert kept == ([] if iteration == 4 else [f"{iteration - 1:06d}"])


def test_simulators_that_cannot_be_copied_begin_new_episodes(ray_session: None, tmp_path: Path) -> None:
    """MuJoCo's are made anew when they are copied: a resumed run must not take such a one for the one that it left."""
    hopper = make_config(
        "PPO", "gymnasium:Hopper-v5", settings={"train_batch_size": 64}, seed=3, num_envs_per_env_runner=2
    )
    part = running.train(hopper, stop={"iterations": 1}, out=tmp_path, track=False, evaluate=False)
    resumed = running.resume(part.path, stop={"iterations": 2})
    assert [row["training_iteration"] for row in resumed.rows] == [1, 2]
    assert resumed.rows[1]["env_steps"] == 2 * resumed.rows[0]["env_steps"]


def test_what_cannot_go_on(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no run folder"):
        running.resume(tmp_path / "nowhere")
    done = running.train(config("game"), stop={"iterations": 1}, out=tmp_path, track=False, evaluate=False)
    with pytest.raises(ConfigError, match="has reached its end"):
        running.resume(done.path)
    with pytest.raises(ConfigError, match="keep is 0"):
        running.train(config("game"), keep=0, out=tmp_path)
