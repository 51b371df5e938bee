"""evaluate, export: trained policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobula.cli.options import TrackingUri, pairs
from mobula.cli.screen import show
from mobula.errors import ConfigError


def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder, or an exported policy")],
    env: Annotated[
        str | None, typer.Option("--env", help="another environment than the one it was trained in")
    ] = None,
    env_set: Annotated[
        list[str] | None, typer.Option("--env-set", help="setting of the environment, key=value")
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="whole episodes to play")] = 10,
    steps: Annotated[int, typer.Option("--steps", min=1, help="steps, where a task never ends")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", help="seed of environments and actions")] = 0,
    explore: Annotated[
        bool | None,
        typer.Option("--explore/--deterministic", help="sampled or likeliest actions (default: as trained)"),
    ] = None,
    video: Annotated[
        Path | None, typer.Option("--video", help="film of one episode: out.mp4 or out.gif")
    ] = None,
) -> None:
    """Plays a trained policy, without Ray; prints what it reaches, with a 95 % interval.

    Examples: mobula evaluate runs/LAST --episodes 100 · mobula evaluate runs/LAST --video film.mp4
    """
    from mobula import evaluation
    from mobula.artifact import load_policy

    policy = load_policy(run)
    world = env or policy.manifest["env"]
    if world is None:
        raise ConfigError("the policy names no environment: give one with --env")
    settings = {
        **(policy.manifest["env_config"] if env is None else {}),
        **pairs(env_set or [], "--env-set"),
    }
    found = evaluation.evaluate_policy(
        policy, world, episodes=episodes, steps=steps, seed=seed, explore=explore, env_config=settings
    )
    if "returns" in found:
        from mobula.experiment.statistics import mean

        estimate = mean(found["returns"])
        show(
            f"return {estimate.value:.2f}  [{estimate.low:.2f}, {estimate.high:.2f}] (95 %), "
            f"{len(found['returns'])} episodes of {sum(found['lengths']) / len(found['lengths']):.1f} steps on {world}"
        )
    else:
        show(f"reward per step {found['reward_per_step']:.4f} over {found['steps']:,} steps on {world}")
    if video is not None:
        frames = evaluation.record_video(
            policy, world, video, seed=seed, explore=explore, env_config=settings
        )
        show(f"film: {video} ({frames} frames)")


def export(
    run: Annotated[Path, typer.Argument(help="run folder, or an exported policy")],
    onnx: Annotated[
        Path | None, typer.Option("--onnx", help="ONNX file to write, checked against torch")
    ] = None,
    register: Annotated[
        str | None,
        typer.Option("--register", help="name in MLflow's model registry to give it a new version of"),
    ] = None,
    service: Annotated[
        str | None, typer.Option("--service", help="registered service that can be made of such a policy")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder of the service's artefact")] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Writes a trained policy as an ONNX model or as the artefact of a service, or registers it with MLflow.

    Example: mobula export runs/mac_goal_grid_1 --register grid, then mobula serve run models:/grid/1
    """
    if onnx is None and register is None and service is None:
        raise ConfigError(
            "nothing to export to: --onnx FILE, --register NAME, or --service NAME --out FOLDER"
        )
    if (service is None) != (out is None):
        raise ConfigError("--service NAME and --out FOLDER go together")
    from mobula.artifact import load_policy

    if onnx is not None:
        worst = load_policy(run).export_onnx(onnx)
        show(f"{onnx}: obs -> (action_dist_inputs, action); differs from torch by at most {worst:.1e}")
    if register is not None:
        from mobula.pyfunc import register_policy

        where, version = register_policy(run, register, tracking_uri)
        typer.echo(f"models:/{register}/{version}  (MLFLOW_TRACKING_URI={where})")
    if service is not None and out is not None:
        from mobula import registry

        make = getattr(registry.service_class(service), "export", None)
        if make is None:
            raise ConfigError(
                f"the service {service!r} is not made of a policy: write its artefact with save_service"
            )
        typer.echo(f"{make(run, out)}  (mobula serve run {out})")
