"""`mobula serve`: artefacts behind an address on this machine, or on a Ray cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from mobula.errors import ClusterError, ConfigError
from mobula.serving import tokens
from mobula.serving.starting import Service, name_of, reason, serve

app = typer.Typer(
    help="Serves policies, mechanisms, planners and language models over HTTP and gRPC.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
token_app = typer.Typer(help="Makes, lists and revokes tokens.", no_args_is_help=True)
app.add_typer(token_app, name="token")

Artefacts = Annotated[
    list[str],
    typer.Argument(
        metavar="ARTEFACT...",
        help="run folder, exported folder, models:/NAME/VERSION or runs:/ID/policy; NAME=... names it",
    ),
]
Name = Annotated[str | None, typer.Option("--name", help="name of the artefact, where there is one")]
TokensFile = Annotated[Path, typer.Option("--tokens", help="file of tokens")]
Dashboard = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="dashboard of the cluster, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, this machine)",
    ),
]


def named(entries: Sequence[str], name: str | None = None) -> dict[str, str]:
    """{name: URI} of what the command line says.  Raises ConfigError for names that clash or that no address can hold."""
    found: dict[str, str] = {}
    if name is not None and len(entries) != 1:
        raise ConfigError(f"--name {name}: there are {len(entries)} artefacts; write NAME=ARTEFACT")
    for entry in entries:
        given, sign, uri = entry.partition("=")
        if not sign or "/" in given or ":" in given:
            given, uri = name or name_of(entry), entry
        if given in found:
            raise ConfigError(f"two artefacts are called {given!r}: write NAME=ARTEFACT")
        found[given] = uri
    return found


@app.command()
def run(
    artefacts: Artefacts,
    name: Name = None,
    host: Annotated[str, typer.Option("--host", help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="port for HTTP", min=1, max=65535)] = 8000,
    grpc_port: Annotated[
        int | None, typer.Option("--grpc-port", help="port for gRPC (default: no gRPC)", min=1, max=65535)
    ] = None,
    tokens_file: TokensFile = tokens.TOKENS_FILE,
    no_token: Annotated[bool, typer.Option("--no-token", help="ask for no token; on loopback alone")] = False,
    replicas: Annotated[int, typer.Option("--replicas", help="replicas of the gateway", min=1)] = 1,
    gpus: Annotated[float, typer.Option("--gpus", help="GPUs of each replica", min=0)] = 0.0,
    max_batch_size: Annotated[
        int, typer.Option("--max-batch-size", help="requests of one forward pass; 1: no batches", min=1)
    ] = 128,
    timeout: Annotated[float, typer.Option("--timeout", help="seconds until a request is given up")] = 60.0,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Ray cluster to deploy on (default: RAY_ADDRESS, else local)"),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="leave it running on the cluster and return")
    ] = False,
) -> None:
    """Serves artefacts until Ctrl-C.

    Example: mobula serve run runs/mac_goal_grid_1 --name grid
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if detach and address is None:
        raise ConfigError(
            "--detach: a Ray of its own ends with this command; give the --address of a cluster"
        )
    wanted = named(artefacts, name)
    typer.echo(f"loading {', '.join(wanted)} ...")
    service = serve(
        wanted,
        host=host,
        port=port,
        grpc_port=grpc_port,
        tokens_file=None if no_token else tokens_file,
        replicas=replicas,
        gpus=gpus,
        max_batch_size=max_batch_size,
        timeout_s=timeout,
        address=address,
        say=typer.echo,
    )
    typer.echo(f"serving at {service.url}  (schemas and examples: {service.url}/docs)")
    if service.grpc:
        typer.echo(f"gRPC at {service.grpc}, mobula.PolicyService/Act")
    if service.token:
        typer.echo(f"token: {service.token}  (shown once; {tokens_file.expanduser()} keeps its digest)")
    typer.echo(f"status, deploy, stop: --address {service.dashboard}")
    header = "" if no_token else ' -H "Authorization: Bearer $MOBULA_TOKEN"'
    typer.echo(f"try: curl{header} {service.url}/v1/models")
    if detach:
        return
    _wait(service)


def _wait(service: Service) -> None:
    """Until Ctrl-C, or until the application has been stopped from elsewhere."""
    import ray

    try:
        while service.running():
            time.sleep(2.0)
        typer.echo("stopped")
    except ray.exceptions.RayActorError:
        # Serve itself has gone.
        typer.echo("stopped")
    except KeyboardInterrupt:
        typer.echo("stopping ...")
        service.stop()
    finally:
        ray.shutdown()


@app.command()
def config(
    artefacts: Artefacts,
    name: Name = None,
    tokens_file: TokensFile = tokens.TOKENS_FILE,
    host: Annotated[str, typer.Option("--host", help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="port for HTTP")] = 8000,
    replicas: Annotated[int, typer.Option("--replicas", help="replicas of the gateway")] = 1,
) -> None:
    """Prints a Serve config for these artefacts, to be edited and given to `mobula serve deploy`.

    Example: mobula serve config cart=models:/cart/3 > serve.yaml
    """
    table = tokens.as_table(tokens.read(tokens_file))
    application = {
        "name": "mobula",
        "route_prefix": "/",
        "import_path": "mobula.serving.app:build",
        "args": {
            "artefacts": named(artefacts, name),
            "tokens": table or str(tokens_file),
            "replicas": replicas,
        },
    }
    document = {"http_options": {"host": host, "port": port}, "applications": [application]}
    typer.echo(yaml.safe_dump(document, sort_keys=False).rstrip())


# A cluster's Serve, through its dashboard -------------------------------------------------------------------


def _with_token() -> None:
    """Clusters of Ray 2.60 ask for a token; Ray reads whether to send one when it is imported."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")


def _asked(address: str | None, what: Callable[[Any], Any]) -> Any:
    """The answer to a call of Serve's client.  Raises ClusterError in one line."""
    _with_token()
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
    from ray.exceptions import AuthenticationError

    from mobula.cluster.jobs import in_words, where

    place = where(address)
    try:
        client = ServeSubmissionClient(place)
    except (AuthenticationError, RuntimeError, OSError, ValueError) as error:
        raise in_words(error, place) from error
    try:
        return what(client)
    except (RuntimeError, OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ClusterError(f"{place} did not do it: {said[-400:]}") from error


@app.command()
def deploy(
    file: Annotated[Path, typer.Argument(help="Serve config (`mobula serve config` prints one)")],
    address: Dashboard = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="return when it runs or was refused")] = True,
    timeout: Annotated[float, typer.Option("--timeout", help="seconds to wait")] = 600.0,
) -> None:
    """Deploys a Serve config on a cluster; what is served now is replaced without a dropped request.

    Example: mobula serve deploy serve.yaml --address http://head:8265
    """
    _with_token()
    document = _document(file)
    _asked(address, lambda client: client.deploy_applications(document))
    names = [application["name"] for application in document["applications"]]
    if not wait:
        typer.echo(f"sent: {', '.join(names)}; `mobula serve status` tells how it goes")
        return
    _await_deployment(address, names, timeout)


def _document(file: Path) -> dict[str, Any]:
    """The Serve config in `file`, checked.  Raises ConfigError."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    from mobula.serving.app import checked, identified

    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        schema = ServeDeploySchema.model_validate(document)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{file} is no Serve config: {' '.join(str(error).split())[:300]}") from None
    found: dict[str, Any] = schema.model_dump(exclude_unset=True, mode="json")
    for application, entry in zip(schema.applications, found["applications"], strict=True):
        entry["name"] = application.name
        if application.import_path.startswith("mobula."):
            args = checked(application.args)
            # Serve does nothing where a config is what it was: an artefact that was replaced in place makes it another one.
            here = {n: uri for n, uri in args.artefacts.items() if Path(uri).expanduser().is_dir()}
            versions = {n: identified(n, uri)[1] for n, uri in here.items()} | args.versions
            entry["args"] = {**application.args, **({"versions": versions} if versions else {})}
    return found


def _await_deployment(address: str | None, names: Sequence[str], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        details = _asked(address, lambda client: client.get_serve_details())["applications"]
        states = {name: details.get(name, {}).get("status", "NOT_STARTED") for name in names}
        for name, state in states.items():
            if state in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ClusterError(f"{name} was not deployed: {_reason(details[name])}")
        if all(state == "RUNNING" for state in states.values()):
            typer.echo(f"running: {', '.join(names)}")
            return
        time.sleep(1.0)
    raise ClusterError(f"not running after {timeout:g} s: {states}; `mobula serve status` tells more")


def _reason(details: Mapping[str, Any]) -> str:
    deployments = details.get("deployments", {}).values()
    return reason([str(details.get("message", "")), *(str(d.get("message", "")) for d in deployments)])


@app.command()
def status(address: Dashboard = None) -> None:
    """What is served, and how its replicas are."""
    from rich.console import Console
    from rich.table import Table

    details = _asked(address, lambda client: client.get_serve_details())["applications"]
    if not details:
        typer.echo("nothing is served; `mobula serve run` or `mobula serve deploy` changes that")
        raise typer.Exit(1)
    table = Table("application", "state", "deployment", "replicas", "message")
    for name, application in details.items():
        for deployment, found in application.get("deployments", {}).items():
            states = [replica["state"] for replica in found.get("replicas", [])]
            count = f"{states.count('RUNNING')} of {found.get('target_num_replicas', len(states))}"
            message = " ".join(str(found.get("message", "")).split())[-120:]
            table.add_row(name, found.get("status", ""), deployment, count, message)
        if not application.get("deployments"):
            table.add_row(name, application.get("status", ""), "-", "-", _reason(application)[-120:])
    Console(width=None if os.isatty(1) else 160).print(table)


@app.command()
def stop(address: Dashboard = None) -> None:
    """Stops what is served; requests that are being answered are finished."""
    details = _asked(address, lambda client: client.get_serve_details())["applications"]
    _asked(address, lambda client: client.delete_applications())
    typer.echo(f"stopped: {', '.join(details) or 'nothing was served'}")


# Tokens -----------------------------------------------------------------------------------------------------


@token_app.command("new")
def token_new(
    name: Annotated[str, typer.Argument(help="who or what it is for")],
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help=f"{', '.join(tokens.SCOPES)}; several times (default: all)"),
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="requests a second (default: no limit)")
    ] = None,
    tokens_file: TokensFile = tokens.TOKENS_FILE,
) -> None:
    """Makes a token and prints it: the only time that it can be seen.

    Services take it in when they are deployed.  Example: mobula serve token new robot --scope policies --rate 100
    """
    token, grant = tokens.new(tokens_file, name, scope or ["*"], rate)
    typer.echo(token)
    limit = "no limit" if grant.rate is None else f"{grant.rate:g} requests a second of each replica"
    typer.echo(f"{name}: {', '.join(sorted(grant.scopes))}; {limit}", err=True)


@token_app.command("list")
def token_list(tokens_file: TokensFile = tokens.TOKENS_FILE) -> None:
    """Lists the tokens by name."""
    for key, grant in tokens.read(tokens_file).items():
        limit = "-" if grant.rate is None else f"{grant.rate:g}/s"
        typer.echo(f"{grant.name}  {','.join(sorted(grant.scopes))}  {limit}  sha256:{key[:12]}")


@token_app.command("revoke")
def token_revoke(
    name: Annotated[str, typer.Argument(help="name of the token")],
    tokens_file: TokensFile = tokens.TOKENS_FILE,
) -> None:
    """Takes a token back; services forget it when they are deployed again."""
    tokens.revoke(tokens_file, name)
    typer.echo(f"revoked {name}: deploy again for services to forget it")
