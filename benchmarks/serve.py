"""The act route beside a bare Serve deployment that returns a constant: requests a second, p50 and p99, with and without batching.

    python -m benchmarks.serve

All arms run in one Serve, asked in turn by the same load generator on the same machine, so the ratios are what counts: on two cores the
generator, the proxy and the replica share them.  Done once behind HAProxy (what `mobula serve` starts) and once behind Serve's
Python proxy.  Results: benchmarks/results/serve.{json,md}.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mobula.files import write_json, write_text
from mobula.versions import machine, versions

RESULTS = Path(__file__).parent / "results"
CONCURRENCY, ROUNDS, SECONDS = (1, 16, 128), 5, 2.0
ARMS = {"bare": "/bare", "batched": "/v1/policies/p/act", "unbatched": "/unbatched/v1/policies/p/act"}
TOKEN = "mob_benchmark"


async def load(url: str, token: str, body: bytes, concurrency: int, seconds: float) -> list[float]:
    """Seconds of every answer that `concurrency` clients got, each asking again as soon as it was answered."""
    import aiohttp

    taken: list[float] = []
    header = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=header) as session:
        end = time.perf_counter() + seconds

        async def one() -> None:
            while (begun := time.perf_counter()) < end:
                async with session.post(url, data=body) as response:
                    await response.read()
                    if response.status != 200:
                        raise RuntimeError(f"{url}: {response.status} {await response.text()}")
                taken.append(time.perf_counter() - begun)

        await asyncio.gather(*(one() for _ in range(concurrency)))
    return taken


def measure(proxy: str) -> dict[str, Any]:
    """{arm: {concurrency: {rps, p50_ms, p99_ms}}} behind one kind of proxy, medians over rounds that take the arms in turn."""
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if proxy == "haproxy" else "0"
    from mobula.joining import free_port, start_ray
    from mobula.serving.starting import prepare

    prepare()
    from ray import serve

    from mobula.algorithms.policy_gradient.baselines.ppo import PPOConfig
    from mobula.artifact import export_policy
    from mobula.serving import tokens
    from mobula.serving.app import MAX_ONGOING, build

    start_ray()
    folder = tempfile.mkdtemp()
    algorithm = PPOConfig().environment("pendulum").training(hidden=[256, 256]).build_algo()
    export_policy(algorithm, Path(folder) / "p")
    algorithm.stop()

    quiet = {"enable_access_log": False}

    @serve.deployment(
        max_ongoing_requests=MAX_ONGOING, logging_config=quiet, ray_actor_options={"num_cpus": 0}
    )
    class Bare:
        async def __call__(self, request: Any) -> bytes:
            return b"0"

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args: dict[str, Any] = {
        "artefacts": {"p": str(Path(folder) / "p")},
        "tokens": tokens.as_table({tokens.digest(TOKEN): tokens.Grant("benchmark", frozenset({"*"}))}),
        "cpus": 0,
    }
    serve.run(Bare.bind(), name="bare", route_prefix="/bare")
    serve.run(build(args), name="batched", route_prefix="/")
    serve.run(build({**args, "max_batch_size": 1}), name="unbatched", route_prefix="/unbatched")
    body = json.dumps({"obs": [0.6, -0.8, 1.0], "explore": False}).encode()
    url = f"http://127.0.0.1:{port}"
    found: dict[str, Any] = {arm: {} for arm in ARMS}
    for concurrency in CONCURRENCY:
        rounds: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
        for path in ARMS.values():
            asyncio.run(load(url + path, TOKEN, body, concurrency, 1.0))
        for _ in range(ROUNDS):
            for arm, path in ARMS.items():
                rounds[arm].append(asyncio.run(load(url + path, TOKEN, body, concurrency, SECONDS)))
        for arm, taken in rounds.items():
            found[arm][str(concurrency)] = {
                "rps": median(len(one) / SECONDS for one in taken),
                "p50_ms": 1000 * median(float(np.percentile(one, 50)) for one in taken),
                "p99_ms": 1000 * median(float(np.percentile(one, 99)) for one in taken),
            }
    return found


def page(found: dict[str, Any]) -> str:
    lines = [
        "# The act route beside a bare deployment",
        "",
        "`python -m benchmarks.serve`: one replica, a 256x256 policy, JSON, tokens and access log on; medians of"
        f" {ROUNDS} rounds that take the arms in turn.",
        f"Machine: {found['machine']['cores']} cores, shared by load generator, proxy and replicas.",
        "",
    ]
    for proxy, arms in found["proxies"].items():
        lines += [
            f"## Behind {'HAProxy (the default of `mobula serve`)' if proxy == 'haproxy' else 'the Python proxy of Serve'}",
            "",
            "| clients | arm | requests/s | of bare | p50 ms | of bare | p99 ms |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for concurrency in map(str, CONCURRENCY):
            bare = arms["bare"][concurrency]
            for arm in ARMS:
                one = arms[arm][concurrency]
                lines.append(
                    f"| {concurrency} | {arm} | {one['rps']:.0f} | {one['rps'] / bare['rps']:.2f} | {one['p50_ms']:.2f} |"
                    f" {one['p50_ms'] / bare['p50_ms']:.2f} | {one['p99_ms']:.2f} |"
                )
        gain = arms["batched"]["128"]["rps"] / arms["unbatched"]["128"]["rps"]
        lines += [
            "",
            f"Batching at 128 clients: {gain:.2f} times the requests of the same service without.",
            "",
        ]
    a, b = (found["proxies"][proxy]["batched"]["16"]["rps"] for proxy in ("haproxy", "python"))
    lines.append(f"HAProxy against the Python proxy, batched, 16 clients: {a / b:.1f} times the requests.")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    if arguments:
        write_json(arguments[1], measure(arguments[0]))
        return
    found: dict[str, Any] = {"machine": machine(), "versions": versions(), "proxies": {}}
    for proxy in ("haproxy", "python"):
        # A process of its own: Serve reads which proxy it has when it is imported.
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            subprocess.run([sys.executable, "-m", "benchmarks.serve", proxy, str(out)], check=True)
            found["proxies"][proxy] = json.loads(out.read_text())
    write_json(RESULTS / "serve.json", found)
    write_text(RESULTS / "serve.md", page(found))
    print(page(found))


if __name__ == "__main__":
    main(sys.argv[1:])
