"""Runs that are killed with SIGKILL at a random moment and resumed, beside the same runs left alone: are the metrics equal?

    python -m benchmarks.kill_and_resume --rounds 20

One run of every shape of method.  Writes results/kill_and_resume.{json,md}; exits 1 where a resumed run differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mobula import running
from mobula.files import write_json, write_text
from mobula.versions import machine, versions

RESULTS = Path(__file__).parent / "results"

# Shape -> (what a config file holds, iterations of the run).
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "on-policy": (
        {
            "method": "PPO",
            "env": "cartpole",
            "num_envs_per_env_runner": 8,
            "settings": {"rollout_length": 32},
        },
        60,
    ),
    "on-policy, two runners": (
        {
            "method": "PPO",
            "env": "cartpole",
            "num_envs_per_env_runner": 4,
            "num_env_runners": 2,
            "placement": {"env_runners": {"cpus": 0.5}},
            "settings": {"rollout_length": 32},
        },
        60,
    ),
    "simulators": (
        {
            "method": "PPO",
            "env": "gymnasium:Acrobot-v1",
            "num_envs_per_env_runner": 2,
            "settings": {"rollout_length": 64},
        },
        30,
    ),
    "offline": (
        {"method": "sql", "settings": {"data": "four_rooms/mixed-0.1,size=2000", "steps": 3000, "block": 50}},
        60,
    ),
    "mean field": (
        {"method": "gmfg_ppo", "settings": {"source": "known", "T": 200, "M": 10, "horizon": 5}},
        40,
    ),
    "bilevel": ({"method": "stackelberg_congestion"}, 20),
    "continuing": ({"method": "mac", "env": "goal_grid"}, 100),
    # Ended between two refits, so that what the last one found must be in the state.
    "closed form": ({"method": "emkf_bandit", "settings": {"report_every": 80, "em_iters": 10}}, 25),
    "population": ({"method": "mrpg", "settings": {"batch": 50, "inner_iters": 20, "chunk": 50}}, 20),
    "game": ({"method": "fictitious_play_po", "settings": {"episodes": 400, "report_every": 10}}, 40),
    "networks of a game": (
        {
            "method": "fictitious_play_po",
            "settings": {"episodes": 200, "report_every": 5, "approximation": "networks"},
        },
        40,
    ),
}


def comparable(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rows without clocks and the count of iterations since a restore."""
    clocks = ("time", "throughput", "second", "since_restore", "env_runners/sample")
    return [{k: v for k, v in row.items() if not any(word in k for word in clocks)} for row in rows]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def resume_in_a_process(path: Path) -> None:
    """The run of folder `path`, as `mobula train --resume` goes on with it."""
    command = [sys.executable, "-m", "mobula.cli", "train", "--resume", str(path), "-q"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


class Shape:
    """A run of one shape: `whole` is left alone, `round` is killed and resumed.  iterations: None for those of RUNS."""

    def __init__(self, name: str, folder: Path, iterations: int | None = None) -> None:
        self.name, self.folder = name, folder / name.replace(" ", "-").replace(",", "")
        self.folder.mkdir(parents=True)
        given, usual = RUNS[name]
        self.iterations = iterations or usual
        write_text(self.folder / "config.yaml", yaml.safe_dump({**given, "seed": 3}))
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0

    def _command(self, out: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "mobula.cli", "train", "--config", str(self.folder / "config.yaml")),
            *("--iterations", str(self.iterations), "--checkpoint-every", "1", "--keep", "2"),
            *("--no-track", "-q", "--out", str(out)),
        ]

    def _start(self, out: Path) -> subprocess.Popen[bytes]:
        """The run, in a process group of its own, when its first iteration is written."""
        process = subprocess.Popen(
            self._command(out),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.time() + 300
        while not list(out.glob("*/progress.jsonl")) and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        return process

    def whole(self) -> None:
        """The run that nobody disturbs."""
        out = self.folder / "whole"
        process = self._start(out)
        began = time.time()
        if process.wait(600) != 0:
            raise RuntimeError(f"{self.name}: the undisturbed run ended with {process.returncode}")
        (path,) = out.glob("2*")
        self.rows = running.read_progress(path)
        # From its first iteration to its last: a kill before has nothing to go on with, one after finds the run done.
        self.seconds = (path / "progress.jsonl").stat().st_mtime - began

    def round(
        self, index: int, rng: random.Random, resume: Callable[[Path], object] = resume_in_a_process
    ) -> dict[str, Any]:
        """Killed at a random moment of its training, then resumed."""
        out = self.folder / f"killed{index}"
        process = self._start(out)
        time.sleep(rng.uniform(0.0, self.seconds))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        (path,) = out.glob("2*")
        at = len(running.read_progress(path))
        _, checkpoint = running.newest_checkpoint(path)
        ended = json.loads((path / "run.json").read_text())["status"] == "done"
        if not ended:
            resume(path)
        rows = running.read_progress(path)
        return {
            "shape": self.name,
            "iterations": self.iterations,
            "killed after": at,
            "resumed from": checkpoint,
            "ended before the kill": ended,
            "equal": len(rows) == self.iterations and comparable(rows) == comparable(self.rows),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=20, help="kills; the shapes take turns")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, default=RESULTS / "kill_and_resume.json")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        shapes: dict[str, Shape] = {}
        for index in range(given.rounds):
            name = list(RUNS)[index % len(RUNS)]
            if name not in shapes:
                shapes[name] = Shape(name, Path(folder))
                shapes[name].whole()
            rounds.append(shapes[name].round(index, rng))
            print(json.dumps(rounds[-1]), flush=True)
            write_json(given.out, {"rounds": rounds, "versions": versions(), "machine": machine()})
    equal = sum(entry["equal"] for entry in rounds)
    lines = [
        f"{equal} of {len(rounds)} runs that were killed (SIGKILL) at a random moment and resumed have the metrics of the run that",
        "was left alone, iteration by iteration, to the last bit (clocks aside).",
        "",
        "| shape | iterations | killed after | resumed from | equal |",
        "| --- | ---: | ---: | ---: | --- |",
        *(
            f"| {e['shape']} | {e['iterations']} | {e['killed after']} | {e['resumed from'] or 'its start'} |"
            f" {'yes' if e['equal'] else '**no**'} |"
            for e in rounds
        ),
    ]
    write_text(given.out.with_suffix(".md"), "\n".join(lines) + "\n")
    return 0 if equal == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
