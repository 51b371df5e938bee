"""Sampling and whole-PPO-loop throughput on CartPole: mobula, RLlib's stock runner, stable-baselines3, a plain torch loop.

    python -m benchmarks.throughput [--quick] [--out benchmarks/results]

The same network (two hidden layers of 64, tanh, for policy and value each) and, for the PPO loop, the same batch (32,768
transitions), epochs (4) and minibatches (8,192) everywhere.  One torch thread.  The peers are measured in turn, round after
round; medians over rounds are reported, and ratios between them.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn

from mobula.algorithms.policy_gradient.baselines.ppo import PPOConfig
from mobula.envs.classic import CartPole
from mobula.files import write_json, write_text
from mobula.learning.advantages import gae
from mobula.learning.modules import mlp
from mobula.sampling.actions import act
from mobula.versions import machine, versions

BATCH, EPOCHS, MINIBATCH, LR = 32_768, 4, 8_192, 1e-3
Measure = Callable[[], int]
"""Does a piece of work and returns the environment steps that it took."""


class Plain:
    """The upper limit: PPO written out over the tensor environment, nothing between."""

    def __init__(self, num_envs: int) -> None:
        torch.manual_seed(0)
        self.env, self.num_envs = CartPole(num_envs), num_envs
        self.pi, self.vf = mlp([4, 64, 64, 2], last_gain=0.01), mlp([4, 64, 64, 1])
        self.optimizer = torch.optim.Adam([*self.pi.parameters(), *self.vf.parameters()], lr=LR, fused=True)
        self.obs, _ = self.env.reset(seed=0)

    @torch.no_grad()
    def sample(self, steps: int) -> dict[str, Tensor]:
        shape = (steps, self.num_envs)
        obs, new_obs = torch.empty(*shape, 4), torch.empty(*shape, 4)
        actions, logits = torch.empty(shape, dtype=torch.int64), torch.empty(*shape, 2)
        rewards = torch.empty(shape)
        terminated, truncated = torch.empty(shape, dtype=torch.bool), torch.empty(shape, dtype=torch.bool)
        for t in range(steps):
            obs[t] = self.obs
            logits[t] = self.pi(self.obs)
            actions[t] = torch.multinomial(logits[t].softmax(-1), 1).squeeze(1)
            self.obs, rewards[t], terminated[t], truncated[t], info = self.env.step(actions[t])
            new_obs[t] = info["final_obs"]
        columns = (obs, actions, logits, rewards, terminated, truncated, new_obs)
        names = ("obs", "actions", "logits", "rewards", "terminated", "truncated", "new_obs")
        return dict(zip(names, columns, strict=True))

    def iterate(self, steps: int) -> None:
        rows = self.sample(steps)
        with torch.no_grad():
            values = self.vf(rows["obs"]).squeeze(-1)
            following = self.vf(rows["new_obs"]).squeeze(-1)
            done = rows["terminated"] | rows["truncated"]
            advantage = gae(rows["rewards"], values, following, rows["terminated"], done, 0.99, 0.95)
            target = (advantage + values).flatten()
            advantage = ((advantage - advantage.mean()) / (advantage.std() + 1e-4)).flatten()
            obs, actions = rows["obs"].flatten(0, 1), rows["actions"].flatten()
            log_p = rows["logits"].flatten(0, 1).log_softmax(-1).gather(-1, actions[:, None]).squeeze(1)
        for _ in range(EPOCHS):
            for index in torch.randperm(len(obs)).split(MINIBATCH):
                log_pi = self.pi(obs[index]).log_softmax(-1)
                ratio = (log_pi.gather(-1, actions[index, None]).squeeze(1) - log_p[index]).exp()
                gain = torch.min(ratio * advantage[index], ratio.clamp(0.8, 1.2) * advantage[index])
                error = (self.vf(obs[index]).squeeze(-1) - target[index]).square()
                self.optimizer.zero_grad()
                (-gain + 0.5 * error).mean().backward()
                nn.utils.clip_grad_norm_([*self.pi.parameters(), *self.vf.parameters()], 0.5)
                self.optimizer.step()


def mobula_ppo(num_envs: int) -> Any:
    """PPO on tensors through RLlib."""
    config = PPOConfig().environment("cartpole").debugging(seed=0, log_level="ERROR")
    config.env_runners(num_envs_per_env_runner=num_envs)
    config.training(rollout_length=BATCH // num_envs, num_epochs=EPOCHS, minibatch_size=MINIBATCH, lr=LR)
    return config.build_algo()


def stock_ppo(num_envs: int) -> Any:
    """RLlib's own PPO, its runner and its learner."""
    from ray.rllib.algorithms.ppo import PPOConfig as StockConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    config = StockConfig().environment("CartPole-v1").debugging(seed=0, log_level="ERROR")
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=num_envs)
    config.training(
        train_batch_size_per_learner=BATCH,
        num_epochs=EPOCHS,
        minibatch_size=MINIBATCH,
        lr=LR,
        use_kl_loss=False,
    )
    config.rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[64, 64], vf_share_layers=False))
    return config.build_algo()


def sb3_ppo(num_envs: int) -> Any:
    """stable-baselines3's PPO."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    env = make_vec_env("CartPole-v1", n_envs=num_envs, seed=0)
    settings = {
        "n_steps": BATCH // num_envs,
        "batch_size": MINIBATCH,
        "n_epochs": EPOCHS,
        "learning_rate": LR,
    }
    model = PPO("MlpPolicy", env, device="cpu", verbose=0, **settings)
    model._setup_learn(10**9)
    return model


def sampling(quick: bool) -> dict[str, Measure]:
    """Measures of sampling alone."""
    found: dict[str, Measure] = {}
    for num_envs, steps in ((1, 2_000), (16, 1_000), (1024, 200)):
        steps = steps // 4 if quick else steps
        plain, runner = Plain(num_envs), mobula_ppo(num_envs).env_runner

        def through_plain(plain: Plain = plain, steps: int = steps) -> int:
            plain.sample(steps)
            return steps * plain.num_envs

        def through_runner(runner: Any = runner, steps: int = steps) -> int:
            (rollout,) = runner.sample(num_timesteps=steps * runner.num_envs)
            runner.get_metrics()
            return rollout.env_steps()

        found[f"plain loop, {num_envs}"] = through_plain
        found[f"TensorEnvRunner, {num_envs}"] = through_runner
    for num_envs in (1, 16):
        runner, wanted = stock_ppo(num_envs).env_runner, 500 if quick else 2_000

        def through_stock(runner: Any = runner, wanted: int = wanted) -> int:
            episodes = runner.sample(num_timesteps=wanted)
            runner.get_metrics()
            return sum(len(episode) for episode in episodes)

        found[f"RLlib stock, {num_envs}"] = through_stock
        model = sb3_ppo(num_envs)
        model.n_steps = (500 if quick else 2_000) // num_envs
        model.rollout_buffer.buffer_size = model.n_steps
        from stable_baselines3.common.callbacks import BaseCallback

        class Silent(BaseCallback):
            def _on_step(self) -> bool:
                return True

        callback = Silent()
        callback.init_callback(model)

        def through_sb3(model: Any = model, callback: Any = callback) -> int:
            model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
            return model.n_steps * model.n_envs

        found[f"stable-baselines3, {num_envs}"] = through_sb3
    return found


def loops() -> dict[str, Measure]:
    """Measures of the whole PPO loop: one iteration each."""
    found: dict[str, Measure] = {}
    plain = Plain(1024)

    def through_plain() -> int:
        plain.iterate(BATCH // 1024)
        return BATCH

    found["plain loop, 1024"] = through_plain
    for name, make, counts in (("mobula PPO", mobula_ppo, (1024,)), ("RLlib stock PPO", stock_ppo, (1, 16))):
        for num_envs in counts:
            algorithm = make(num_envs)

            def through_rllib(algorithm: Any = algorithm) -> int:
                return int(algorithm.train()["env_runners"]["num_env_steps_sampled"])

            found[f"{name}, {num_envs}"] = through_rllib
    for num_envs in (1, 16):
        model = sb3_ppo(num_envs)

        def through_sb3(model: Any = model) -> int:
            model.num_timesteps = 0
            model.learn(BATCH, reset_num_timesteps=False)
            return BATCH

        found[f"stable-baselines3 PPO, {num_envs}"] = through_sb3
    return found


def measure(measures: dict[str, Measure], rounds: int) -> dict[str, float]:
    """Median steps per second of each, measured in turn, after one warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for round_ in range(rounds + 1):
        for name, work in measures.items():
            start = time.perf_counter()
            steps = work()
            if round_:
                rates[name].append(steps / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def breakdown() -> dict[str, float]:
    """Where an iteration of mobula's PPO goes, in milliseconds; and a step of the runner with 1,024 environments, in
    microseconds, each part timed alone."""
    algorithm = mobula_ppo(1024)
    for _ in range(3):
        result = algorithm.train()
    timers = result["timers"]
    found = {
        "iteration_ms": 1e3 * timers["training_iteration"],
        "sampling_ms": 1e3 * timers["env_runner_sampling_timer"],
        "learning_ms": 1e3 * timers["learner_update_timer"],
    }
    found["rest_ms"] = found["iteration_ms"] - found["sampling_ms"] - found["learning_ms"]
    runner = algorithm.env_runner
    obs, _ = runner.env.reset(seed=0)
    actions = torch.zeros(1024, dtype=torch.int64)
    parts: dict[str, Callable[[], Any]] = {
        "module_and_draw_us": lambda: act(
            runner.module, {"obs": obs}, explore=True, generator=runner.generator
        ),
        "environment_us": lambda: runner.env.step(actions),
        "whole_step_us": lambda: runner.sample(num_timesteps=1024 * 200),
    }
    with torch.no_grad():
        for name, work in parts.items():
            work()
            repeats = 5 if name == "whole_step_us" else 500
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            found[name] = 1e6 * (time.perf_counter() - start) / repeats / (200 if repeats == 5 else 1)
    found["bookkeeping_us"] = found["whole_step_us"] - found["module_and_draw_us"] - found["environment_us"]
    return found


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shorter work, for a look")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    import ray

    torch.set_num_threads(1)
    logging.getLogger("ray").setLevel(logging.ERROR)
    gymnasium.logger.min_level = 40
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    rounds = 2 if options.quick else 5
    sampled = measure(sampling(options.quick), rounds)
    looped = measure(loops(), max(2, rounds - 2))
    stock_best = max(sampled["RLlib stock, 1"], sampled["RLlib stock, 16"])
    ratios = {
        "sampling: TensorEnvRunner at 1,024 / RLlib stock at its best": (
            sampled["TensorEnvRunner, 1024"] / stock_best,
            50,
        ),
        "sampling: TensorEnvRunner at 1,024 / RLlib stock at 1": (
            sampled["TensorEnvRunner, 1024"] / sampled["RLlib stock, 1"],
            50,
        ),
        "sampling: TensorEnvRunner at 1,024 / plain loop at 1,024": (
            sampled["TensorEnvRunner, 1024"] / sampled["plain loop, 1024"],
            0.5,
        ),
        "PPO loop: mobula at 1,024 / RLlib stock at its best": (
            looped["mobula PPO, 1024"] / max(looped["RLlib stock PPO, 1"], looped["RLlib stock PPO, 16"]),
            20,
        ),
        "PPO loop: mobula at 1,024 / plain loop at 1,024": (
            looped["mobula PPO, 1024"] / looped["plain loop, 1024"],
            0.5,
        ),
        "PPO loop: mobula at 1,024 / stable-baselines3 at 16": (
            looped["mobula PPO, 1024"] / looped["stable-baselines3 PPO, 16"],
            None,
        ),
    }
    parts = breakdown()
    processor = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown",
    )
    from importlib.metadata import version

    made = {**versions(), "stable-baselines3": version("stable-baselines3")}
    report = {
        "sampling_steps_per_s": sampled,
        "ppo_loop_steps_per_s": looped,
        "ratios": {name: {"ratio": value, "aim": aim} for name, (value, aim) in ratios.items()},
        "breakdown": parts,
        "machine": {**machine(), "processor": processor},
        "versions": made,
        "rounds": rounds,
    }
    write_json(options.out / "throughput.json", json.loads(json.dumps(report)))
    lines = [
        f"Median of {rounds} rounds on {machine()['cores']} cores ({processor}), one torch thread; Ray {made['ray']},"
        f" torch {made['torch']}, stable-baselines3 {made['stable-baselines3']}. CartPole, 2 x 64 tanh.",
        "",
        "| sampling (environments) | steps/s |",
        "| --- | ---: |",
        *(f"| {name} | {rate:,.0f} |" for name, rate in sampled.items()),
        "",
        f"| PPO loop, batch {BATCH:,}, {EPOCHS} epochs, minibatch {MINIBATCH:,} (environments) | steps/s |",
        "| --- | ---: |",
        *(f"| {name} | {rate:,.0f} |" for name, rate in looped.items()),
        "",
        "| ratio | measured | aim |",
        "| --- | ---: | ---: |",
        *(
            f"| {name} | {value:.2f} | {'' if aim is None else aim} |"
            for name, (value, aim) in ratios.items()
        ),
        "",
        f"An iteration of mobula's PPO takes {parts['iteration_ms']:.0f} ms: {parts['sampling_ms']:.0f} ms sampling,"
        f" {parts['learning_ms']:.0f} ms learning, {parts['rest_ms']:.1f} ms everything else of RLlib. A step of 1,024"
        f" environments takes {parts['whole_step_us']:.0f} us: {parts['environment_us']:.0f} us in the environment,"
        f" {parts['module_and_draw_us']:.0f} us in the network and the draw, {parts['bookkeeping_us']:.0f} us in the runner.",
    ]
    write_text(options.out / "throughput.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    ray.shutdown()


if __name__ == "__main__":
    main()
