"""Weak scaling of sampling: 1, 2 and 4 env runner actors, each with the same number of environments, on a local cluster.

    python -m benchmarks.scaling

Each runner adds the same work, so that on cores enough the steps a second would grow with the runners.  What is sent: the weights to
every runner, and every runner's rollout back.  Results: benchmarks/results/scaling.{json,md}.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch

from mobula.algorithms.policy_gradient.baselines.ppo import PPOConfig
from mobula.cluster.local import LocalCluster
from mobula.files import write_json, write_text
from mobula.joining import start_ray
from mobula.versions import machine, versions

RESULTS = Path(__file__).parent / "results"
RUNNERS, ENVS, LENGTH, ROUNDS = (1, 2, 4), 256, 128, 9


def bytes_of(tensors: Any) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)


def measure(runners: int) -> dict[str, float]:
    """Steps a second of sampling alone and of whole PPO iterations, and the bytes of one iteration."""
    config = (
        PPOConfig().environment("cartpole").training(rollout_length=LENGTH, minibatch_size=8192, num_epochs=1)
    )
    config.env_runners(num_env_runners=runners, num_envs_per_env_runner=ENVS, num_cpus_per_env_runner=1)
    algorithm = config.debugging(seed=0, log_level="ERROR").build_algo()
    sampling, whole = [], []
    rollouts: list[Any] = []
    for _ in range(ROUNDS + 2):
        began = time.perf_counter()
        rollouts = algorithm.sample(num_timesteps=ENVS * LENGTH)
        sampling.append(runners * ENVS * LENGTH / (time.perf_counter() - began))
        began = time.perf_counter()
        algorithm.train()
        whole.append(runners * ENVS * LENGTH / (time.perf_counter() - began))
    back = sum(bytes_of(rollout.values()) for rollout in rollouts)
    weights = bytes_of(algorithm.rl_module.state_dict().values())
    algorithm.stop()
    return {
        "sampling": median(sampling[2:]),
        "iteration": median(whole[2:]),
        "bytes_back": back,
        "bytes_weights": weights * runners,
    }


def main() -> None:
    torch.set_num_threads(1)
    found: dict[int, dict[str, float]] = {}
    with LocalCluster(len(RUNNERS) + 1, cpus_per_node=1) as cluster:
        start_ray(cluster.address)
        for runners in RUNNERS:
            found[runners] = measure(runners)
        ray.shutdown()
    cores = int(machine()["cores"])
    lines = [
        f"PPO on CartPole, {ENVS} environments and {LENGTH} steps a runner and iteration, median of {ROUNDS}; {cores} cores"
        f" ({machine()['architecture']}), a local cluster of {len(RUNNERS) + 1} nodes with one CPU each, torch {torch.__version__}.",
        "",
        "| env runners | sampling, steps/s | times one runner's | a core that works | whole iteration, steps/s | sent back, MB | weights, MB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    one = found[1]["sampling"]
    for runners, row in found.items():
        ratio = row["sampling"] / one
        row["efficiency_per_core"] = ratio / min(runners, cores)
        lines.append(
            f"| {runners} | {row['sampling']:,.0f} | {ratio:.2f} | {row['efficiency_per_core']:.2f} | {row['iteration']:,.0f} |"
            f" {row['bytes_back'] / 1e6:.2f} | {row['bytes_weights'] / 1e6:.3f} |"
        )
    lines += [
        "",
        f'"A core that works": speed over that of one runner, divided by the cores in use (at most {cores}). More runners than cores'
        " cannot be faster here; they show what their number itself costs. The main process, which concatenates the rollouts and"
        " learns, needs a core too: with as many runners as cores it takes its time from theirs.",
    ]
    write_json(RESULTS / "scaling.json", {"runners": found, "machine": machine(), "versions": versions()})
    write_text(RESULTS / "scaling.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
