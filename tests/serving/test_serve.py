"""The whole service as a user has it: started by `mobula serve run`, asked over HTTP and gRPC, hurt while it answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import yaml
from safetensors.torch import load, save

from mobula.artifact import load_policy, sealed
from mobula.client import AccessError, AsyncPolicyClient, PolicyClient, RequestError
from mobula.errors import MobulaError
from mobula.joining import free_port
from mobula.serving import grpc as wire_grpc
from mobula.serving import tokens

MOBULA = [sys.executable, "-m", "mobula.cli"]


def _clean() -> dict[str, str]:
    """The environment of a fresh shell: what this process has set of Ray's does not help."""
    kept = ("RAY_raylet_start_wait_time_s", "RAY_USAGE_STATS_ENABLED")
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name in kept}


@dataclass
class Running:
    """A service in another process."""

    url: str
    grpc: str
    token: str
    tokens: Path
    dashboard: str
    mark: str
    process: subprocess.Popen[str]

    @property
    def header(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"}

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*MOBULA, "serve", *arguments], capture_output=True, text=True, timeout=240, env=_clean()
        )

    def replicas(self, deployment: str) -> list[int]:
        """Process ids of the replicas of a deployment of this service (and of no other on this machine)."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                name = (folder / "cmdline").read_bytes().split(b"\0")[0].decode()
                mine = self.mark.encode() in (folder / "environ").read_bytes()
            except OSError:
                continue
            if mine and name.startswith("ray::ServeReplica") and f":{deployment}" in name:
                found.append(int(folder.name))
        return found


@pytest.fixture(scope="module")
def running(artefacts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    port, grpc_port, mark = free_port(), free_port(), uuid.uuid4().hex
    tokens_file = folder / "tokens.json"
    # Copies, so that replacing one below leaves the others' alone.
    copies = {name: str(shutil.copytree(path, folder / name)) for name, path in artefacts.items()}
    arguments = [f"{name}={path}" for name, path in copies.items()]
    options = ["--port", str(port), "--grpc-port", str(grpc_port), "--tokens", str(tokens_file)]
    process = subprocess.Popen(
        [*MOBULA, "serve", "run", *arguments, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**_clean(), "MOBULA_TEST_MARK": mark, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    said: list[str] = []
    ready = threading.Event()

    def listen() -> None:
        for line in process.stdout or ():
            said.append(line)
            if line.startswith("try:"):
                ready.set()
        ready.set()

    threading.Thread(target=listen, daemon=True).start()
    assert ready.wait(240) and process.poll() is None, "".join(said)
    text = "".join(said)
    token, dashboard = re.search(r"token: (mob_\S+)", text), re.search(r"--address (http://\S+)", text)
    assert token and dashboard, text
    yield Running(
        f"http://127.0.0.1:{port}",
        f"127.0.0.1:{grpc_port}",
        token[1],
        tokens_file,
        dashboard[1],
        mark,
        process,
    )
    process.send_signal(signal.SIGINT)
    try:
        process.wait(90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def client(running: Running) -> Iterator[PolicyClient]:
    with PolicyClient(running.url, running.token) as found:
        yield found


# Each client of the README ----------------------------------------------------------------------------------


def test_curl(running: Running) -> None:
    base = ["curl", "--silent", "--show-error", "--write-out", "\n%{http_code}"]
    address = f"{running.url}/v1/policies/cart/act"
    header = ["-H", f"Authorization: Bearer {running.token}"]
    body = ["-d", '{"obs": [0.01, 0.02, 0.03, 0.04], "explore": true, "seed": 1}']
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run([*base, *header, address, *body], capture_output=True, text=True, timeout=60)
    text, _, status = done.stdout.rpartition("\n")
    assert status == "200", done.stdout
    assert json.loads(text)["action"] in (0, 1)
    done = subprocess.run([*base, address, *body], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("401")


def test_the_python_clients(running: Running, client: PolicyClient, artefacts: dict[str, str]) -> None:
    policy = load_policy(artefacts["swing"])
    obs = np.array([[0.6, -0.8, 3.0], [1.0, 0.0, -8.0]], dtype=np.float32)
    wanted = policy.answer(obs, explore=True, seed=9)
    found = client.act("swing", obs, explore=True, seed=9)
    np.testing.assert_allclose(found.action, wanted["action"], rtol=1e-5)
    np.testing.assert_allclose(found.log_probability, wanted["log_probability"], rtol=1e-4)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.value, wanted["value"], rtol=1e-5)  # type: ignore[arg-type]
    assert found.version == policy.version and {card.id for card in client.models()} == set(artefacts)
    assert client.run("auction", {"bids": {"a": 3, "b": 5, "c": 4}}).payments == {"a": 0, "b": 4, "c": 0}
    plan = client.plan("(2, 0)", "(0, 0)")
    assert plan.cost == 8 and plan.safety.verdict == "safe"
    assert list(client.stream_plan("(2, 0)", "(0, 0)"))[-1].plan.plan == plan.plan  # type: ignore[union-attr]

    async def ask() -> None:
        async with AsyncPolicyClient(running.url, running.token) as other:
            answers = await asyncio.gather(
                *(other.act("swing", obs, explore=True, seed=9) for _ in range(20))
            )
            for answer in answers:
                np.testing.assert_allclose(answer.action, wanted["action"], rtol=1e-5)
            pieces = [piece async for piece in other.stream_plan("(2, 0)")]
            assert pieces[-1].plan is not None and (await other.plan("(2, 0)")).cost == 8
            assert (await other.run("auction", {"bids": {"a": 3}})).outcome == {"winner": "a"}
            assert len(await other.models()) == len(artefacts)

    asyncio.run(ask())
    with pytest.raises(RequestError, match=r"obs has shape \(3,\); \(4,\)"):
        client.act("cart", [1, 2, 3])
    with pytest.raises(RequestError, match="goal"):
        list(client.stream_plan("nowhere"))
    with pytest.raises(AccessError), PolicyClient(running.url, "mob_none") as stranger:
        stranger.models()


def test_recurrent_state_through_the_client(client: PolicyClient, artefacts: dict[str, str]) -> None:
    policy, state, expected = load_policy(artefacts["bandit"]), None, None
    for obs in ([0.3, -0.2], [np.nan, np.nan], [0.1, 0.4]):
        found = client.act("bandit", np.array(obs), explore=False, state=state)
        wanted = policy.answer(np.array(obs), explore=False, state=expected)
        state, expected = found.state, wanted["state"]
        np.testing.assert_allclose(found.fields["x_hat"], wanted["x_hat"], rtol=1e-9)


def test_openai_s_client(running: Running) -> None:
    from openai import AuthenticationError, NotFoundError, OpenAI, UnprocessableEntityError

    client = OpenAI(base_url=f"{running.url}/v1", api_key=running.token, max_retries=0)
    assert "tiny" in {model.id for model in client.models.list()}
    messages: Any = [{"role": "user", "content": "hello"}]
    settings: Any = {"model": "tiny", "messages": messages, "temperature": 0.0, "max_tokens": 12}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert text and whole.usage and whole.usage.completion_tokens == 12
    assert whole.choices[0].logprobs and len(whole.choices[0].logprobs.content or []) == 12
    stream = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == whole.usage
    plain = client.completions.create(model="tiny", prompt="ab", max_tokens=5, seed=3, n=2)
    again = client.completions.create(model="tiny", prompt="ab", max_tokens=5, seed=3, n=2)
    assert [c.text for c in plain.choices] == [c.text for c in again.choices] and len(plain.choices) == 2
    with pytest.raises(NotFoundError, match="tiny"):
        client.completions.create(model="huge", prompt="x")
    with pytest.raises(UnprocessableEntityError) as wrong:
        client.completions.create(model="tiny", prompt="x" * 400)
    assert wrong.value.param == "prompt"
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0).models.list()


def test_grpc(running: Running, artefacts: dict[str, str]) -> None:
    policy = load_policy(artefacts["bandit"])
    metadata = [("authorization", f"Bearer {running.token}"), ("application", "mobula")]
    with grpc.insecure_channel(running.grpc) as channel:
        act = wire_grpc.stub(channel)
        state, expected = {}, None
        for obs in ([0.3, -0.2], [0.1, 0.4]):
            request = wire_grpc.ActRequest(
                policy="bandit", obs=wire_grpc.to_message(np.array(obs)), explore=True, seed=4, state=state
            )
            found = act(request, metadata=metadata, timeout=60)
            wanted = policy.answer(np.array(obs), explore=True, seed=4, state=expected)
            state, expected = found.state, wanted["state"]
            assert found.version == policy.version
            for name in ("action", "x_hat", "log_probability"):
                np.testing.assert_allclose(
                    wire_grpc.from_message(found.fields[name], name), wanted[name], rtol=1e-5
                )
        good = wire_grpc.to_message(np.zeros(4, dtype=np.float32))
        for request, data, code, said in (
            (wire_grpc.ActRequest(policy="cart", obs=good), metadata[1:], "UNAUTHENTICATED", "token"),
            (wire_grpc.ActRequest(policy="cat", obs=good), metadata, "NOT_FOUND", "cat"),
            (wire_grpc.ActRequest(policy="auction", obs=good), metadata, "NOT_FOUND", "auction"),
            (wire_grpc.ActRequest(policy="cart"), metadata, "INVALID_ARGUMENT", "obs"),
            (wire_grpc.ActRequest(policy="swing", obs=good), metadata, "INVALID_ARGUMENT", "obs"),
            (wire_grpc.ActRequest(policy="cart", obs=good, seed=-1), metadata, "INVALID_ARGUMENT", "seed"),
            (
                wire_grpc.ActRequest(
                    policy="cart", obs=wire_grpc.Array(dtype="|O", shape=[1], data=b"12345678")
                ),
                metadata,
                "INVALID_ARGUMENT",
                "obs",
            ),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                act(request, metadata=data, timeout=60)
            assert caught.value.code().name == code and said in caught.value.details()


def test_the_proto_file_says_what_the_messages_are(tmp_path: Path) -> None:
    from google.protobuf import descriptor_pb2
    from grpc_tools import protoc

    source = Path(wire_grpc.__file__).with_name("policy_service.proto")
    out = tmp_path / "set"
    assert protoc.main(["", f"-I{source.parent}", f"--descriptor_set_out={out}", source.name]) == 0
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    file.name = wire_grpc.FILE
    for message in file.message_type:
        for field in [*message.field, *(f for nested in message.nested_type for f in nested.field)]:
            field.json_name = field.name
    ours = wire_grpc._file()
    assert ours == file


# Operation --------------------------------------------------------------------------------------------------


def test_metrics_count_what_was_asked(running: Running) -> None:
    for _ in range(3):
        httpx.post(
            f"{running.url}/v1/policies/cart/act", headers=running.header, json={"obs": [0] * 4}, timeout=60
        )
    deadline, found = time.monotonic() + 60, ""
    while time.monotonic() < deadline and "ray_mobula_serve_requests" not in found:
        time.sleep(1)
        found = httpx.get(f"{running.url}/metrics", headers=running.header, timeout=60).text
    counted = [
        line
        for line in found.splitlines()
        if line.startswith("ray_mobula_serve_requests") and 'scope="policies"' in line
    ]
    assert any('status="200"' in line and float(line.split()[-1]) >= 3 for line in counted), counted
    assert "ray_serve_deployment_processing_latency_ms_bucket" in found and len(
        set(found.splitlines())
    ) == len(found.splitlines())


def test_it_listens_on_loopback_alone(running: Running) -> None:
    if shutil.which("ss") is None:
        pytest.skip("ss (iproute2) is not installed")
    port = int(running.url.rpartition(":")[2])
    grpc_port = int(running.grpc.rpartition(":")[2])
    listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, timeout=30).stdout
    for wanted in (port, grpc_port):
        places = [
            line.split()[3] for line in listening.splitlines() if line.split()[3].endswith(f":{wanted}")
        ]
        assert places and all(place.startswith(("127.", "[::1]")) for place in places)


def test_without_the_cluster_s_token_one_line_says_so(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for command in (["status"], ["stop"]):
        done = running.command(*command, "--address", running.dashboard)
        assert done.returncode == 2 and "asks for a token" in done.stderr and done.stderr.count("\n") == 1
        assert running.token not in done.stderr + done.stdout


def test_status_lists_the_deployments(running: Running) -> None:
    done = running.command("status", "--address", running.dashboard)
    assert done.returncode == 0, done.stderr
    for name in ("Gateway", "service-planner", "service-auction", "service-tiny"):
        assert name in done.stdout


async def _under_load(
    running: Running,
    requests: int,
    seconds: float,
    expected: list[list[int]],
    meanwhile: Any,
    client: AsyncPolicyClient | None = None,
) -> tuple[int, list[str]]:
    """(right answers, what failed) of `requests` spread over `seconds` while `meanwhile()` happens on a thread.

    With a client: sent again where that helps.  Without: every request has one try.
    """
    failures: list[str] = []
    right = 0
    limits = httpx.Limits(max_connections=200)
    plain = httpx.AsyncClient(base_url=running.url, headers=running.header, timeout=90, limits=limits)

    async def one(index: int) -> None:
        nonlocal right
        await asyncio.sleep(seconds * index / requests)
        obs = observations(index)
        try:
            if client is not None:
                found = (await client.act("cart", obs, explore=True, seed=index)).action.tolist()
            else:
                body = {"obs": obs, "explore": True, "seed": index}
                response = await plain.post("/v1/policies/cart/act", json=body)
                response.raise_for_status()
                found = response.json()["action"]
        except (httpx.HTTPError, MobulaError) as error:
            failures.append(repr(error))
            return
        # Every answer belongs to its request: drawn by its own seed.
        right += found == expected[index]

    work = asyncio.to_thread(meanwhile)
    await asyncio.gather(work, *(one(index) for index in range(requests)))
    await plain.aclose()
    return right, failures


def observations(index: int) -> list[list[float]]:
    return [[0.01 * (index % 100 - 50), 0.0, 0.01, 0.0]] * (1 + index % 3)


@pytest.fixture(scope="module")
def expected(artefacts: dict[str, str]) -> list[list[int]]:
    """The actions of every request, from the policy itself."""
    policy = load_policy(artefacts["cart"])
    return [
        policy.answer(np.array(observations(index), dtype=np.float32), explore=True, seed=index)[
            "action"
        ].tolist()
        for index in range(1000)
    ]


@pytest.mark.timeout(420)
def test_replacing_an_artefact_under_load_fails_no_request(
    running: Running, artefacts: dict[str, str], expected: list[list[int]], tmp_path: Path
) -> None:
    """A new version of one policy: the others answer as before, nobody is refused, and a bad version changes nothing."""
    grid, other = tmp_path / "grid", tmp_path / "other"
    shutil.copytree(artefacts["grid"], grid)
    _another_version(grid, other)
    assert load_policy(grid).version != load_policy(other).version
    table = tokens.as_table(tokens.read(running.tokens))
    port = int(running.url.rpartition(":")[2])

    def config(path: Path) -> Path:
        application = {
            "name": "mobula",
            "route_prefix": "/",
            "import_path": "mobula.serving.app:build",
            # One policy at a time in a replica: every other one is loaded when it is asked for.
            "args": {
                "artefacts": {**artefacts, "grid": str(path)},
                "tokens": table,
                "cpus": 0,
                "policies_per_replica": 1,
            },
            "deployments": [
                {"name": "Gateway", "autoscaling_config": {"min_replicas": 1, "max_replicas": 2}}
            ],
        }
        file = tmp_path / f"{path.name}.yaml"
        file.write_text(
            yaml.safe_dump(
                {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
            )
        )
        return file

    def replace() -> None:
        time.sleep(1)
        done = running.command("deploy", str(config(other)), "--address", running.dashboard)
        assert done.returncode == 0, done.stdout + done.stderr

    right, failures = asyncio.run(_under_load(running, 800, 40, expected, replace))
    assert failures == [] and right == 800
    with PolicyClient(running.url, running.token) as client:
        for _ in range(2):
            assert client.act("grid", 0).version == load_policy(other).version
            assert client.act("swing", [1.0, 0.0, 0.0]).version == load_policy(artefacts["swing"]).version
        # In place, as people do it: the deployed version is pinned, so the same config is another one now.
        third = _another_version(other, tmp_path / "third")
        shutil.copytree(third, other, dirs_exist_ok=True)
        done = running.command("deploy", str(config(other)), "--address", running.dashboard)
        assert done.returncode == 0 and client.act("grid", 0).version == load_policy(third).version
        bad = _another_version(other, tmp_path / "bad")
        (bad / "weights.safetensors").write_bytes(b"spoilt")
        done = running.command("deploy", str(config(bad)), "--address", running.dashboard)
        assert done.returncode == 2 and "changed" in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert client.act("grid", 0).version == load_policy(third).version


def test_what_a_cluster_cannot_load_is_refused_there_too(running: Running, tmp_path: Path) -> None:
    """An artefact that only the cluster's machines see is verified by them; what is served stays."""
    table = tokens.as_table(tokens.read(running.tokens))
    application = {
        "name": "mobula",
        "route_prefix": "/",
        "import_path": "mobula.serving.app:build",
        "args": {"artefacts": {"grid": "models:/nobody/1"}, "tokens": table, "cpus": 0},
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"applications": [application]}))
    done = running.command("deploy", str(file), "--address", running.dashboard)
    assert done.returncode == 2 and "MLflow" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    with PolicyClient(running.url, running.token) as client:
        assert client.act("cart", [0.0] * 4).policy == "cart"


def _another_version(source: Path, folder: Path) -> Path:
    """The same policy with other weights."""
    weights = load((source / "weights.safetensors").read_bytes())
    data = save({name: value + 0.5 for name, value in weights.items()})
    manifest = json.loads((source / "policy.json").read_text())
    manifest.pop("digest")
    manifest["weights_sha256"] = hashlib.sha256(data).hexdigest()
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(data)
    (folder / "policy.json").write_text(json.dumps(sealed(manifest)))
    return folder


@pytest.mark.timeout(420)
def test_a_killed_replica_loses_nothing_that_is_sent_again(
    running: Running, expected: list[list[int]]
) -> None:
    """1,000 requests over a minute; the only replica that could answer them is killed twice."""
    killed: list[int] = []

    def kill() -> None:
        for pause in (10, 25):
            time.sleep(pause)
            for pid in running.replicas("Gateway"):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    async def run() -> tuple[int, list[str]]:
        async with AsyncPolicyClient(running.url, running.token) as client:
            client.http = httpx.AsyncClient(**client.settings, limits=httpx.Limits(max_connections=200))
            return await _under_load(running, 1000, 60, expected, kill, client)

    right, failures = asyncio.run(run())
    assert len(killed) >= 2, "no replica was found to be killed"
    assert failures == [] and right == 1000


AS_IN_A_NOTEBOOK = """
import json, sys
import mobula
from mobula.client import PolicyClient
from mobula.joining import free_port

folder = sys.argv[1]
run = mobula.train(mobula.config("mac").environment("goal_grid"), stop={"env_steps": 500}, out=folder, track=False)
service = mobula.serve(run.path, port=free_port(), tokens_file=f"{folder}/tokens.json", say=lambda said: None)
with PolicyClient(service.url, service.token) as client:
    (card,) = client.models()
    served = client.act(card.id, 0, explore=True, seed=3)
local = mobula.load_policy(run.path).answer(0, explore=True, seed=3)
was = service.running()
service.stop()
found = {"name": card.id, "run": run.path.name, "served": int(served.action), "local": int(local["action"])}
print(json.dumps(found | {"was": was, "is": service.running(), "token": service.token}))
"""


def test_trained_served_and_asked_in_one_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_IN_A_NOTEBOOK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        env=_clean(),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["name"] == found["run"] and found["served"] == found["local"]
    assert found["was"] and not found["is"]
    # The file keeps the token's digest alone.
    kept = (tmp_path / "tokens.json").read_text()
    assert found["token"] not in kept and hashlib.sha256(found["token"].encode()).hexdigest() in kept
