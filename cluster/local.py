"""`LocalCluster`: several Ray nodes on this machine, for tests and for trying what a cluster does."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mobula.errors import ConfigError
from mobula.joining import free_port


class LocalCluster:
    """A head and `nodes` - 1 workers, each with its own resources, started with Ray's cluster utilities.

    The nodes listen at the machine's own address (Ray's processes do not find each other on loopback); token authentication is on: the
    token is the user's (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, which Ray makes
    where there is none).  `with LocalCluster(2) as cluster: mobula.train(config, address=cluster.address)`.

    nodes, cpus_per_node, gpus_per_node  how many, and what each claims to have (the machine's cores are shared)
    resources                            Ray's custom resources of each node
    dashboard                            with Ray's dashboard, which jobs are submitted to, on loopback; `jobs_address`
    """

    def __init__(
        self,
        nodes: int = 1,
        cpus_per_node: int = 1,
        gpus_per_node: int = 0,
        *,
        resources: Mapping[str, float] | None = None,
        dashboard: bool = False,
    ) -> None:
        if nodes < 1 or cpus_per_node < 0 or gpus_per_node < 0:
            raise ConfigError("a local cluster has at least one node, and no negative number of CPUs or GPUs")
        self.nodes, self.dashboard = nodes, dashboard
        self._asked: dict[str, Any] = {
            "num_cpus": cpus_per_node,
            "num_gpus": gpus_per_node,
            "resources": dict(resources or {}),
        }
        self._cluster: Any = None
        self._workers: list[Any] = []
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> Self:
        from ray._private.authentication.authentication_token_setup import (
            _enable_token_auth,
            ensure_token_if_auth_enabled,
        )
        from ray.cluster_utils import Cluster

        self._before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "PATH")}
        # The `python` of jobs is the one that runs here.
        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        _enable_token_auth()
        ensure_token_if_auth_enabled(create_token_if_missing=True)
        head = {
            "include_dashboard": self.dashboard,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": free_port(),
            "dashboard_agent_listen_port": free_port(),
        }
        self._cluster = Cluster(initialize_head=True, head_node_args={**self._asked, **head})
        try:
            for _ in range(self.nodes - 1):
                self.add_node()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """host:port, as --address and RAY_ADDRESS take it."""
        return str(self._cluster.address)

    @property
    def jobs_address(self) -> str:
        """http://host:port of the dashboard, as `mobula submit --address` takes it."""
        if not self.dashboard:
            raise ConfigError("this cluster has no dashboard: LocalCluster(dashboard=True)")
        return f"http://{self._cluster.webui_url}"

    def add_node(self, **more: Any) -> int:
        """Starts a worker like the others (`more`: other arguments of Ray's `add_node`); returns its index, from 1."""
        self._workers.append(self._cluster.add_node(**{**self._asked, **more}))
        return len(self._workers)

    def remove_node(self, index: int, *, kill: bool = False) -> None:
        """Ends worker `index` (from 1) with everything on it; `kill`: at once, as a machine that loses power."""
        node, self._workers[index - 1] = self._workers[index - 1], None
        if node is None:
            raise ConfigError(f"node {index} has been removed already")
        self._cluster.remove_node(node, allow_graceful=not kill)

    def close(self) -> None:
        """Ends all nodes."""
        if self._cluster is None:
            return
        import ray

        if ray.is_initialized() and ray.get_runtime_context().gcs_address == self.address:
            ray.shutdown()
        self._cluster.shutdown()
        self._cluster = None
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
