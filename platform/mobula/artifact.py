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
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mobula import registry
from mobula.errors import ArtifactError, ConfigError, DataError
from mobula.files import replaced_folder, write_json
from mobula.method import MethodConfig
from mobula.sampling.actions import act, action_map, log_probability, to_space
from mobula.versions import versions

FORMAT, FORMAT_VERSION = "mobula-policy", 1
MANIFEST, WEIGHTS = "policy.json", "weights.safetensors"
LARGEST_MANIFEST = 16 * 2**20

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
        "observation_space": space_to_json(module.observation_space),
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
    manifest["digest"] = _digest(manifest)
    with replaced_folder(path) as folder:
        (folder / WEIGHTS).write_bytes(weights)
        write_json(folder / MANIFEST, manifest)
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


def load_policy(path: str | Path) -> Policy:
    """The policy in the folder `path` (an exported policy, or a run folder that holds one).

    No Ray cluster is needed and nothing is unpickled.  Raises ArtifactError where the folder is truncated, has been
    changed, or does not fit the method that it names.
    """
    path = Path(path)
    folder = path / "policy" if (path / "policy" / MANIFEST).is_file() else path
    manifest_file, weights_file = folder / MANIFEST, folder / WEIGHTS
    for file in (manifest_file, weights_file):
        if not file.is_file():
            raise ArtifactError(f"{folder} is no exported policy: {file.name} is missing")
    if manifest_file.stat().st_size > LARGEST_MANIFEST:
        raise ArtifactError(
            f"{manifest_file} is larger than {LARGEST_MANIFEST} bytes; it is no policy of ours"
        )
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{manifest_file} is truncated or damaged ({error}): export the policy again"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{manifest_file} does not describe a {FORMAT}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{manifest_file} has format version {manifest.get('format_version')}; this mobula reads {FORMAT_VERSION}"
        )
    if manifest.get("digest") != _digest(manifest):
        raise ArtifactError(
            f"{manifest_file} has been changed since it was exported: export the policy again"
        )
    weights = weights_file.read_bytes()
    if hashlib.sha256(weights).hexdigest() != manifest["weights_sha256"]:
        raise ArtifactError(f"{weights_file} is truncated or has been changed: export the policy again")
    try:
        module = _build(manifest)
        state = load_tensors(weights)
    except (ConfigError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder} cannot be loaded: {error}") from error
    expected = module.state_dict()
    for name, value in expected.items():
        found = state.get(name)
        if found is None or found.shape != value.shape or found.dtype != value.dtype:
            have = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise ArtifactError(
                f"{weights_file}: {name} is {have}; the module has {value.dtype} {tuple(value.shape)}"
            )
    module.load_state_dict({name: state[name] for name in expected})
    return Policy(module, manifest)


class Policy:
    """A trained policy that acts: `act(obs)`."""

    def __init__(self, module: TorchRLModule, manifest: dict[str, Any]) -> None:
        self.module, self.manifest = module, manifest
        self.observation_space: gymnasium.Space[Any] = module.observation_space
        self.action_space: gymnasium.Space[Any] = module.action_space
        self.explore: bool = manifest["explore"]
        self.generator = torch.Generator()
        self.generator.manual_seed(torch.seed())
        self._to_space = to_space(self.action_space, manifest["action_map"], "cpu")

    def __repr__(self) -> str:
        m = self.manifest
        return f"Policy({m['method']}, env={m['env']}, {self.observation_space} -> {self.action_space})"

    def seed(self, seed: int) -> None:
        """Fixes the stream of sampled actions."""
        self.generator.manual_seed(seed)

    def _checked(self, obs: Any) -> tuple[Tensor, tuple[int, ...]]:
        """(obs [N, ...], leading shape).  Raises DataError for a wrong shape, a value out of the space, or NaN."""
        shape = tuple(self.observation_space.shape or ())
        try:
            array = np.asarray(obs)
            tensor = torch.as_tensor(array.astype(self.observation_space.dtype, copy=False))
        except (TypeError, ValueError) as error:
            raise DataError(f"obs is no array of numbers: {error}") from error
        if array.shape[array.ndim - len(shape) :] != shape or array.ndim < len(shape):
            raise DataError(f"obs has shape {array.shape}; {shape} is expected, or a batch of them")
        # Filters take a NaN (null in JSON) as a missing observation.
        missing = getattr(self.module, "takes_missing", False)
        if tensor.is_floating_point() and not (tensor.isfinite() | (tensor.isnan() & missing)).all():
            raise DataError("obs holds a NaN or an infinity")
        if isinstance(self.observation_space, spaces.Discrete):
            low, n = int(self.observation_space.start), int(self.observation_space.n)
            if not np.array_equal(array, tensor.numpy()) or bool(
                ((tensor < low) | (tensor >= low + n)).any()
            ):
                raise DataError(f"obs is {array!r}; whole numbers from {low} to {low + n - 1} are expected")
        leading = array.shape[: array.ndim - len(shape)]
        return tensor.reshape(-1, *shape), leading

    @torch.no_grad()
    def answer(self, obs: Any, *, explore: bool | None = None, state: Any = None) -> dict[str, Any]:
        """Everything that is served for observations [..., *obs_shape]: NumPy arrays with the same leading shape.

        action, the fields that the method serves, log_probability where the action was sampled, and the next recurrent
        `state` for recurrent modules (pass it in with the next observation).
        """
        explore = self.explore if explore is None else explore
        tensor, leading = self._checked(obs)
        batch: dict[str, Any] = {Columns.OBS: tensor}
        recurrent = self.module.is_stateful()
        if recurrent:
            if state is None:
                initial = self.module.get_initial_state()
                state = {k: torch.as_tensor(v).expand(len(tensor), *v.shape) for k, v in initial.items()}
            state = {k: torch.as_tensor(np.asarray(v)) for k, v in state.items()}
            batch = {Columns.OBS: tensor.unsqueeze(1), Columns.STATE_IN: state}
        out = act(self.module, batch, explore=explore, generator=self.generator)
        new_state = out.pop(Columns.STATE_OUT, None)
        if recurrent:
            out = {name: value.squeeze(1) for name, value in out.items()}
        actions = out[Columns.ACTIONS]
        fields = {"action": self._to_space(actions)}
        if explore and Columns.ACTION_DIST_INPUTS in out:
            cls = self.module.get_exploration_action_dist_cls()
            fields["log_probability"] = log_probability(cls, out[Columns.ACTION_DIST_INPUTS], actions)
        served = getattr(self.module, "served", None)
        if served is not None:
            fields |= served({Columns.OBS: tensor, **({Columns.STATE_OUT: new_state} if recurrent else {})})
        answer: dict[str, Any] = {
            name: value.reshape((*leading, *value.shape[1:])).numpy() for name, value in fields.items()
        }
        if recurrent:
            answer["state"] = {name: value.numpy() for name, value in new_state.items()}
        return answer

    def act(self, obs: Any, *, explore: bool | None = None) -> Any:
        """Actions for observations [..., *obs_shape], drawn as in `algo.evaluate()` (or as `explore` says)."""
        return self.answer(obs, explore=explore)["action"][()]

    def example(self) -> dict[str, Any]:
        """A request and its answer, as JSON would carry them."""
        self.observation_space.seed(0)
        obs = np.clip(self.observation_space.sample(), -10, 10) if _is_float(self.observation_space) else 0
        if not _is_float(self.observation_space):
            obs = self.observation_space.sample()
        answer = self.answer(obs)
        return {
            "request": {"obs": np.asarray(obs).tolist()},
            "answer": {k: _listed(v) for k, v in answer.items()},
        }

    def export_onnx(self, path: str | Path) -> float:
        """Writes an ONNX model obs [N, ...] -> (action_dist_inputs, action of highest density) and checks it.

        Returns the largest difference between ONNX Runtime and torch on random observations.  Raises ArtifactError
        where the module cannot be exported or the two differ by more than 1e-4.
        """
        return _export_onnx(self, Path(path))


def _is_float(space: gymnasium.Space[Any]) -> bool:
    return isinstance(space, spaces.Box) and bool(np.issubdtype(space.dtype, np.floating))


def _listed(value: Any) -> Any:
    return (
        {k: _listed(v) for k, v in value.items()} if isinstance(value, dict) else np.asarray(value).tolist()
    )


class _Inference(torch.nn.Module):
    """What goes into an ONNX file."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.module = policy.module
        self.categorical = isinstance(policy.action_space, spaces.Discrete)
        self.map = policy._to_space

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.module._forward_inference({Columns.OBS: obs})[Columns.ACTION_DIST_INPUTS]
        mode = inputs.argmax(-1) if self.categorical else inputs.chunk(2, dim=-1)[0]
        return inputs, self.map(mode)


def _export_onnx(policy: Policy, path: Path) -> float:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"ONNX export needs the extra: pip install 'mobula[onnx]' ({error.name} is missing)"
        ) from None
    if policy.module.is_stateful():
        raise ArtifactError("a recurrent policy cannot be exported to ONNX")
    model = _Inference(policy).eval()
    generator = np.random.default_rng(0)
    space = policy.observation_space
    if isinstance(space, spaces.Discrete):
        sample: Any = int(space.start) + generator.integers(int(space.n), size=7)
    else:
        sample = generator.normal(size=(7, *(space.shape or ()))).astype(np.float32)
    obs = torch.as_tensor(sample)
    with replaced_folder(path.with_suffix(".onnx.tmp")) as folder:
        file = folder / path.name
        program = torch.onnx.export(
            model,
            (obs,),
            input_names=["obs"],
            output_names=["action_dist_inputs", "action"],
            dynamic_shapes={"obs": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(file))
        session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
        given = session.run(None, {"obs": sample})
        with torch.no_grad():
            wanted = [value.numpy() for value in model(obs)]
        worst = max(
            float(np.abs(a.astype(float) - b.astype(float)).max()) for a, b in zip(given, wanted, strict=True)
        )
        if worst > 1e-4:
            raise ArtifactError(f"the ONNX model differs from torch by {worst:g}: it was not written")
    made = path.with_suffix(".onnx.tmp") / path.name
    made.replace(path)
    made.parent.rmdir()
    return worst
