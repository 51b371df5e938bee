"""A trained policy that acts: from checked requests to answers, many at a time.

The way from an observation to an action is that of the env runner (`mobula.sampling.actions`), and observation statistics are part
of the module's weights: a loaded policy acts as it did in training.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from mobula.errors import ArtifactError, ConfigError, DataError
from mobula.files import replaced_folder
from mobula.sampling.actions import draw, from_space, log_probability, to_space

_GLOBAL_STREAM = threading.Lock()
"""Held by who borrows torch's global stream: slow policies answer on threads."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A request that has been checked against the policy's spaces: rows of observations, and how to act on them."""

    obs: Tensor
    """[N, *obs_shape]"""
    leading: tuple[int, ...]
    """Shape of the request without obs_shape; N is its product."""
    explore: bool
    seed: int | None = None
    state: dict[str, Tensor] | None = None
    """Of recurrent modules, [N, ...] each."""
    actions: Tensor | None = None
    """Logged actions [N, ...] as the module draws them, to be scored."""


class Policy:
    """A trained policy that acts: `act(obs)`."""

    def __init__(
        self, module: TorchRLModule, manifest: dict[str, Any], device: torch.device | str = "cpu"
    ) -> None:
        self.module: TorchRLModule = module.to(device)
        self.manifest, self.device = manifest, torch.device(device)
        self.observation_space: gymnasium.Space[Any] = module.observation_space
        self.action_space: gymnasium.Space[Any] = module.action_space
        self.explore: bool = manifest["explore"]
        self.slow = False
        """Whether a server should answer on a thread; it finds out by trying."""
        self._shape = tuple(self.observation_space.shape or ())
        self._dtype = np.dtype(self.observation_space.dtype)
        self._floating = bool(np.issubdtype(self._dtype, np.floating))
        self._bounds = _limits(self.observation_space)
        self.recurrent = module.is_stateful()
        self.scores_actions = bool(getattr(module, "scores_actions", False))
        # Draws are made on the CPU: a seed means the same on every device.
        self.generator = torch.Generator()
        self.generator.manual_seed(torch.seed())
        self._to_space = to_space(self.action_space, manifest["action_map"], "cpu")
        self._from_space = from_space(self.action_space, manifest["action_map"])
        self.takes_missing = bool(getattr(module, "takes_missing", False))
        # Modules for inference alone have lost their value networks.
        self._values = isinstance(module, ValueFunctionAPI) and not isinstance(module, InferenceOnlyAPI)

    def __repr__(self) -> str:
        m = self.manifest
        return f"Policy({m['method']}, env={m['env']}, {self.observation_space} -> {self.action_space})"

    @property
    def version(self) -> str:
        """What tells this policy from any other: the beginning of its digest."""
        return str(self.manifest["digest"])[:12]

    def seed(self, seed: int) -> None:
        """Fixes the stream of sampled actions."""
        self.generator.manual_seed(seed)

    def initial_state(self) -> dict[str, Tensor]:
        """The recurrent state of one row before its first observation, by name; empty for other modules."""
        return {
            name: torch.as_tensor(value)
            for name, value in (self.module.get_initial_state() if self.recurrent else {}).items()
        }

    def check(
        self,
        obs: Any,
        *,
        explore: bool | None = None,
        seed: int | None = None,
        state: Mapping[str, Any] | None = None,
        actions: Any = None,
        bounds: bool = False,
    ) -> Asked:
        """The request as tensors.  bounds: refuse observations outside a Box, as a server does.

        Raises DataError, whose text begins with the field's name, for a wrong shape, a value out of the space, or NaN.
        """
        rows, leading = self._observations(obs, bounds)
        return Asked(
            rows,
            leading,
            self.explore if explore is None else explore,
            seed,
            self._state(state, leading, len(rows)),
            None if actions is None else self._logged(actions, leading),
        )

    def _observations(self, obs: Any, bounds: bool) -> tuple[Tensor, tuple[int, ...]]:
        shape = self._shape
        array = _numbers(obs, "obs")
        if array.shape[array.ndim - len(shape) :] != shape or array.ndim < len(shape):
            raise DataError(f"obs has shape {array.shape}; {shape} is expected, or a batch of them")
        low, high = self._bounds if bounds or not self._floating else (None, None)
        # A NaN lies in no interval: one comparison usually says everything, before the cast could overflow.
        if self._floating and low is not None and bool(((array >= low) & (array <= high)).all()):
            cast = array.astype(self._dtype, copy=False)
        else:
            cast = self._examined(array, low, high)
        leading = array.shape[: array.ndim - len(shape)]
        # A copy where the array belongs to somebody else, who may write into it.
        rows = torch.from_numpy(np.require(cast, requirements=["C", "W"]))
        return rows.reshape(-1, *shape), leading

    def _examined(self, array: np.ndarray[Any, Any], low: Any, high: Any) -> np.ndarray[Any, Any]:
        """`array` in the space's type.  Raises DataError that says which of its rules a number breaks."""
        space = self.observation_space
        with np.errstate(invalid="ignore", over="ignore"):
            cast = array.astype(self._dtype, copy=False)
        if self._floating:
            # Filters take a NaN (null in JSON) as a missing observation.
            missing = np.isnan(cast) if self.takes_missing else False
            if not bool((np.isfinite(cast) | missing).all()):
                raise DataError("obs holds a NaN or an infinity")
        elif not np.array_equal(cast, array):
            raise DataError(f"obs holds a number that {space} does not: whole numbers are expected")
        if low is not None and bool(((cast < low) | (cast > high)).any()):
            raise DataError(f"obs lies outside {space}: the numbers go from {_brief(low)} to {_brief(high)}")
        return cast

    def _state(
        self, state: Mapping[str, Any] | None, leading: tuple[int, ...], n: int
    ) -> dict[str, Tensor] | None:
        if not self.recurrent:
            if state is not None:
                raise DataError(f"state: a policy of {self.manifest['method']} keeps none; leave it out")
            return None
        initial = self.initial_state()
        if state is None:
            return {name: value.expand(n, *value.shape) for name, value in initial.items()}
        if not isinstance(state, Mapping) or set(state) != set(initial):
            raise DataError(f"state holds {', '.join(sorted(initial))}: pass on what the last answer gave")
        found = {}
        for name, value in initial.items():
            array, shape = _numbers(state[name], f"state.{name}"), (*leading, *value.shape)
            if array.shape != shape:
                raise DataError(f"state.{name} has shape {array.shape}; {shape} is expected")
            tensor = torch.as_tensor(np.array(array)).to(value.dtype)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise DataError(f"state.{name} holds a NaN or an infinity")
            found[name] = tensor.reshape(n, *value.shape)
        return found

    def _logged(self, actions: Any, leading: tuple[int, ...]) -> Tensor:
        if not self.scores_actions:
            raise DataError(
                f"actions: a policy of {self.manifest['method']} does not score actions; leave them out"
            )
        space = self.action_space
        shape = (*leading, *(space.shape or ()))
        array = _numbers(actions, "actions")
        if array.shape != shape:
            raise DataError(
                f"actions has shape {array.shape}; {shape} is expected, one action an observation"
            )
        cast = array.astype(space.dtype)
        rows = cast.reshape(-1, *(space.shape or ()))
        whole = np.issubdtype(cast.dtype, np.floating) or np.array_equal(cast, array)
        if not whole or not all(space.contains(row) for row in rows):
            raise DataError(f"actions: one lies outside the action space {space}")
        return self._from_space(torch.from_numpy(rows.copy()))

    @torch.no_grad()
    def answers(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """What is served for each request: NumPy arrays with its leading shape.  One forward pass for all that ask alike.

        action, the fields that the method serves, log_probability where the action was sampled, value where the module has one, and the
        next recurrent `state` (pass it in with the next observation).  The draws of a request with a seed depend on the seed alone.
        """
        groups: dict[tuple[bool, bool], list[int]] = {}
        for index, request in enumerate(asked):
            groups.setdefault((request.explore, request.actions is not None), []).append(index)
        found: list[dict[str, Any]] = [{} for _ in asked]
        for (explore, _), members in groups.items():
            requests = [asked[index] for index in members]
            sizes = [len(request.obs) for request in requests]
            try:
                fields, state = self._answer(requests, sizes, explore)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise DataError(f"obs or state: numbers that no computation can use ({error})") from error
            parts = {name: value.split(sizes) for name, value in fields.items()}
            states = {name: value.split(sizes) for name, value in state.items()}
            for place, index in enumerate(members):
                leading = asked[index].leading

                def shaped(value: Tensor, leading: tuple[int, ...] = leading) -> Any:
                    return value.reshape((*leading, *value.shape[1:])).numpy()

                found[index] = {name: shaped(part[place]) for name, part in parts.items()}
                if self.recurrent:
                    found[index]["state"] = {name: shaped(part[place]) for name, part in states.items()}
        return found

    def _answer(
        self, requests: Sequence[Asked], sizes: Sequence[int], explore: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(fields, next state), all rows [N, ...] on the CPU, of requests that ask alike."""
        obs = _joined([request.obs for request in requests]).to(self.device)
        batch: dict[str, Any] = {Columns.OBS: obs}
        if self.recurrent:
            states = [request.state or {} for request in requests]
            state = {name: _joined([s[name] for s in states]).to(self.device) for name in states[0]}
            batch = {Columns.OBS: obs.unsqueeze(1), Columns.STATE_IN: state}
        # As `act` does; the draws come after, on the CPU.
        forward = self.module._forward_exploration if explore else self.module._forward_inference
        out = dict(forward(batch))
        new_state = out.pop(Columns.STATE_OUT, None)
        if self.recurrent:
            out = {name: value.squeeze(1) for name, value in out.items()}
        inputs = out.get(Columns.ACTION_DIST_INPUTS)
        if inputs is not None:
            inputs = inputs.cpu()
        if Columns.ACTIONS in out:
            actions = out[Columns.ACTIONS].cpu()
        else:
            actions = self._drawn(inputs, requests, sizes, explore)
        fields = {"action": self._to_space(actions)}
        if explore and inputs is not None:
            cls = self.module.get_exploration_action_dist_cls()
            fields["log_probability"] = log_probability(cls, inputs, actions)
        served = getattr(self.module, "served", None)
        if served is not None:
            given = {Columns.OBS: obs, **({Columns.STATE_OUT: new_state} if self.recurrent else {})}
            if requests[0].actions is not None:
                given[Columns.ACTIONS] = _joined([r.actions for r in requests if r.actions is not None])
            fields |= served(given)
        if self._values and "value" not in fields:
            fields["value"] = self.module.compute_values({Columns.OBS: obs})
        return {name: value.cpu() for name, value in fields.items()}, {
            name: value.cpu() for name, value in (new_state or {}).items()
        }

    def _drawn(self, inputs: Any, requests: Sequence[Asked], sizes: Sequence[int], explore: bool) -> Tensor:
        module = self.module
        cls = module.get_exploration_action_dist_cls() if explore else module.get_inference_action_dist_cls()
        if not explore or all(request.seed is None for request in requests):
            return draw(cls, inputs, explore=explore, generator=self.generator)
        parts = []
        for request, rows in zip(requests, inputs.split(list(sizes)), strict=True):
            if request.seed is None:
                parts.append(draw(cls, rows, explore=True, generator=self.generator))
                continue
            own = torch.Generator().manual_seed(request.seed)
            # Some distributions draw from torch's global stream.
            with _GLOBAL_STREAM, torch.random.fork_rng(devices=[]):
                torch.manual_seed(request.seed)
                parts.append(draw(cls, rows, explore=True, generator=own))
        return torch.cat(parts)

    def answer(
        self,
        obs: Any,
        *,
        explore: bool | None = None,
        seed: int | None = None,
        state: Any = None,
        actions: Any = None,
    ) -> dict[str, Any]:
        """Everything that is served for observations [..., *obs_shape]; see `answers`.

        actions: logged actions of the action space, one an observation, to be scored by methods that can (offline ones: their
        advantage and weight).  Raises DataError as `check` does.
        """
        return self.answers([self.check(obs, explore=explore, seed=seed, state=state, actions=actions)])[0]

    def act(self, obs: Any, *, explore: bool | None = None) -> Any:
        """Actions for observations [..., *obs_shape], drawn as in `algo.evaluate()` (or as `explore` says)."""
        return self.answer(obs, explore=explore)["action"][()]

    def example(self) -> dict[str, Any]:
        """A request and its answer, as JSON would carry them."""
        self.observation_space.seed(0)
        obs = self.observation_space.sample()
        if np.issubdtype(self.observation_space.dtype, np.floating):
            obs = np.clip(obs, -10, 10)
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


def _numbers(value: Any, name: str) -> np.ndarray[Any, Any]:
    try:
        array = np.asarray(value)
        if array.dtype == object:
            # null in JSON
            array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name} is no array of numbers: {error}") from error
    if array.dtype.kind not in "iuf":
        raise DataError(f"{name} is no array of numbers: it holds {array.dtype}")
    return array


def _limits(space: gymnasium.Space[Any]) -> tuple[Any, Any]:
    """(low, high) that broadcast against observations, finite in a Box; (None, None) where there are none."""
    if isinstance(space, spaces.Discrete):
        return int(space.start), int(space.start) + int(space.n) - 1
    if isinstance(space, spaces.MultiDiscrete):
        start = np.asarray(space.start)
        return start, start + np.asarray(space.nvec) - 1
    if isinstance(space, spaces.MultiBinary):
        return 0, 1
    if not isinstance(space, spaces.Box):
        return None, None
    if not np.issubdtype(space.dtype, np.floating):
        return space.low, space.high
    # So that an infinity lies outside.
    most = np.finfo(space.dtype).max
    return np.maximum(space.low, -most), np.minimum(space.high, most)


def _brief(value: Any) -> Any:
    array = np.asarray(value)
    return (
        array.tolist() if array.size <= 16 else f"{array.min():g} at the least, {array.max():g} at the most"
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
