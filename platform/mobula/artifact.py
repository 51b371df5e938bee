"""The exported policy: `policy.json` and `weights.safetensors`, nothing that can run code.

`export_policy(algorithm, folder)` writes one; `load_policy(folder)` gives an object with `act(obs)` that needs no Ray
cluster.  The JSON names the method; its registered config class builds the module again (so nothing is imported by a
path that the file names), and the weights must fit it name by name.  The way from an observation to an action is that
of the env runner (`mobula.sampling.actions`), and observation statistics are part of the module's weights: a loaded
policy acts as it did in training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, get_args

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mobula import registry
from mobula.errors import ArtifactError, ConfigError
from mobula.files import replaced_folder, write_json
from mobula.method import MethodConfig
from mobula.policy import Policy
from mobula.sampling.actions import ActionMap, action_map
from mobula.sampling.spaces import full_space
from mobula.versions import versions

FORMAT, FORMAT_VERSION = "mobula-policy", 1
MANIFEST, WEIGHTS = "policy.json", "weights.safetensors"
LARGEST_MANIFEST = 16 * 2**20

_FIELDS: dict[str, type] = {
    "method": str,
    "module_class": str,
    "model_config": dict,
    "hyperparameters": dict,
    "observation_space": dict,
    "action_space": dict,
    "action_map": str,
    "explore": bool,
}

# RLlib's own connectors that an exported policy stands in for.  Any other one changes what the module sees or does.
_KNOWN_CONNECTORS = {
    "AddObservationsFromEpisodesToBatch",
    "AddTimeDimToBatchAndZeroPad",
    "AddStatesFromEpisodesToBatch",
    "BatchIndividualItems",
    "NumpyToTensor",
    "RemoveSingleTsTimeRankFromBatch",
    "GetActions",
    "TensorToNumpy",
    "UnBatchToIndividualItems",
    "NormalizeAndClipActions",
    "ListifyDataForVectorEnv",
}


# Spaces ---------------------------------------------------------------------------------------------------


def space_to_json(space: gymnasium.Space[Any]) -> dict[str, Any]:
    """A space as plain JSON.  Raises ArtifactError for one that cannot be described."""
    if isinstance(space, spaces.Box):
        return {
            "type": "Box",
            "low": _numbers(space.low),
            "high": _numbers(space.high),
            "shape": list(space.shape),
            "dtype": str(space.dtype),
        }
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": int(np.prod(space.shape))}
    raise ArtifactError(
        f"a policy over the space {space} cannot be exported: Box, Discrete and Multi* spaces can"
    )


def _numbers(array: np.ndarray[Any, Any]) -> Any:
    """Bounds as one number where all are equal; infinities as words, which strict JSON lacks."""
    words = {math.inf: "inf", -math.inf: "-inf"}
    flat = [words.get(value, value) for value in array.ravel().tolist()]
    return flat[0] if flat and all(value == flat[0] for value in flat) else flat


def space_from_json(data: dict[str, Any]) -> gymnasium.Space[Any]:
    """The space that `space_to_json` described."""
    kind = data["type"]
    if kind == "Box":
        shape, dtype = tuple(data["shape"]), np.dtype(data["dtype"])
        bounds = []
        for name in ("low", "high"):
            value = (
                np.asarray(data[name], dtype=np.float64)
                if isinstance(data[name], list)
                else float(data[name])
            )
            bounds.append(
                np.broadcast_to(np.reshape(value, shape if np.ndim(value) else ()), shape).astype(dtype)
            )
        return spaces.Box(bounds[0], bounds[1], shape, dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(data["n"], start=data["start"])
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(data["nvec"])
    if kind == "MultiBinary":
        return spaces.MultiBinary(data["n"])
    raise ArtifactError(f"unknown space {kind!r}")


# Export ---------------------------------------------------------------------------------------------------


def export_policy(algorithm: Algorithm, path: str | Path) -> Path:
    """Writes the trained policy of `algorithm` to the folder `path` (replaced whole, or not at all).

    Raises ArtifactError where a policy depends on something that the format does not hold (RLlib connectors other than
    the default ones, several modules, spaces that are no tensors).
    """
    config: Any = algorithm.config
    module = algorithm.get_module()
    if not isinstance(module, TorchRLModule):
        raise ArtifactError(
            f"{type(algorithm).__name__} has several modules or none in torch; one torch module can be exported"
        )
    _refuse_connectors(algorithm)
    model_config = module.model_config
    if dataclasses.is_dataclass(model_config) and not isinstance(model_config, type):
        model_config = dataclasses.asdict(model_config)
    evaluation = config.evaluation_config if isinstance(config.evaluation_config, dict) else {}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": registry.name_of(config),
        "module_class": type(module).__name__,
        "model_config": model_config or {},
        "observation_space": space_to_json(full_space(module.observation_space)),
        "action_space": space_to_json(module.action_space),
        "action_map": action_map(
            module.action_space, normalize=config.normalize_actions, clip=config.clip_actions
        ),
        "explore": bool(evaluation.get("explore", config.explore)),
        "hyperparameters": config.knobs() if isinstance(config, MethodConfig) else {},
        "env": config.env if isinstance(config.env, str) else None,
        "env_config": dict(config.env_config),
        "training_iteration": algorithm.training_iteration,
        "versions": versions(),
    }
    try:
        manifest = json.loads(json.dumps(manifest, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{type(algorithm).__name__}: a setting is not plain data: {error}") from error
    # The module that acts; a learner's full module is cut down to what the inference module holds.
    wanted = _build(manifest).state_dict()
    state = module.state_dict()
    weights = save_tensors({name: state[name].detach().cpu().contiguous() for name in wanted})
    manifest["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    with replaced_folder(path) as folder:
        (folder / WEIGHTS).write_bytes(weights)
        write_json(folder / MANIFEST, sealed(manifest))
    return Path(path)


def _refuse_connectors(algorithm: Algorithm) -> None:
    runner = algorithm.env_runner
    for attribute in ("_env_to_module", "_module_to_env"):
        pipeline = getattr(runner, attribute, None)
        for connector in getattr(pipeline, "connectors", []):
            if type(connector).__name__ not in _KNOWN_CONNECTORS:
                raise ArtifactError(
                    f"the policy sees the world through the connector {type(connector).__name__}, which an exported"
                    " policy cannot hold: train without it (PPO has normalize_observations inside the module)"
                )


def _digest(manifest: dict[str, Any]) -> str:
    plain = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _build(manifest: dict[str, Any]) -> TorchRLModule:
    """The module, untrained, from the registered config class of the method."""
    for name, kind in _FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise ArtifactError(
                f"the manifest's {name} is {str(manifest.get(name))[:40]!r}: export the policy again"
            )
    if manifest["action_map"] not in get_args(ActionMap):
        raise ArtifactError(
            f"the manifest's action_map is {manifest['action_map']!r}: export the policy again"
        )
    config: Any = registry.config_class(manifest["method"])()
    if isinstance(config, MethodConfig):
        config.training(**manifest["hyperparameters"])
    spec = config.get_default_rl_module_spec()
    if not isinstance(spec, RLModuleSpec):
        spec = spec[DEFAULT_MODULE_ID]
    if spec.module_class.__name__ != manifest["module_class"]:
        raise ArtifactError(
            f"method {manifest['method']!r} acts with {spec.module_class.__name__}, not {manifest['module_class']!r}"
        )
    spec.observation_space = space_from_json(manifest["observation_space"])
    spec.action_space = space_from_json(manifest["action_space"])
    spec.model_config = manifest["model_config"] or spec.model_config
    spec.inference_only = True
    module: TorchRLModule = spec.build()
    return module.eval()


# Load -----------------------------------------------------------------------------------------------------


def read_manifest(file: Path, format: str, version: int) -> dict[str, Any]:
    """A sealed JSON description (see `sealed`).  Raises ArtifactError where it is missing, damaged, changed or of another format."""
    if not file.is_file():
        what = format.removeprefix("mobula-")
        raise ArtifactError(f"{file.parent} is no exported {what}: {file.name} is missing")
    if file.stat().st_size > LARGEST_MANIFEST:
        raise ArtifactError(f"{file} is larger than {LARGEST_MANIFEST} bytes; it is none of ours")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{file} is truncated or damaged ({error}): export it again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        raise ArtifactError(f"{file} does not describe a {format}")
    if manifest.get("format_version") != version:
        raise ArtifactError(
            f"{file} has format version {manifest.get('format_version')}; this mobula reads {version}"
        )
    if manifest.get("digest") != _digest(manifest):
        raise ArtifactError(f"{file} has been changed since it was exported: export it again")
    return manifest


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with the digest of what it says.  The digest shows damage and mix-ups; it is no signature."""
    return {**manifest, "digest": _digest(manifest)}


def policy_folder(path: str | Path) -> Path:
    """The exported policy at `path`: the folder itself, or `policy` in a run's folder."""
    inner = Path(path) / "policy"
    return inner if (inner / MANIFEST).is_file() else Path(path)


def load_policy(path: str | Path, device: torch.device | str = "cpu") -> Policy:
    """The policy in the folder `path` (an exported policy, or a run folder that holds one).

    No Ray cluster is needed and nothing is unpickled.  Raises ArtifactError where the folder is truncated, has been
    changed, or does not fit the method that it names.
    """
    folder = policy_folder(path)
    weights_file = folder / WEIGHTS
    manifest = read_manifest(folder / MANIFEST, FORMAT, FORMAT_VERSION)
    if not weights_file.is_file():
        raise ArtifactError(f"{folder} is no exported policy: {WEIGHTS} is missing")
    weights = weights_file.read_bytes()
    if hashlib.sha256(weights).hexdigest() != manifest.get("weights_sha256"):
        raise ArtifactError(f"{weights_file} is truncated or has been changed: export the policy again")
    try:
        state = load_tensors(weights)
        module = _build(manifest)
        expected = module.state_dict()
        for name, value in expected.items():
            found = state.get(name)
            if found is None or found.shape != value.shape or found.dtype != value.dtype:
                have = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise ArtifactError(
                    f"{weights_file}: {name} is {have}; the module has {value.dtype} {tuple(value.shape)}"
                )
        module.load_state_dict({name: state[name] for name in expected})
        return Policy(module, manifest, device)
    except (
        *(ConfigError, SafetensorError, LookupError, TypeError, ValueError, AttributeError),
        *(ArithmeticError, AssertionError, RuntimeError, MemoryError),
    ) as error:
        # A manifest that somebody wrote by hand can make a module's constructor fail in any way.
        raise ArtifactError(f"{folder} cannot be loaded: {error}") from error
