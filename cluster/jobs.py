"""`mobula submit`: a command of mobula as a job of a Ray cluster, with the working tree that it is submitted from."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobula.errors import ClusterError, ConfigError
from mobula.joining import NO_TOKEN

COMMANDS_WITH_FOLDERS = ("train", "tune", "reproduce")

AGENT_SECONDS = 60.0
"""How long a cluster that has just started is given until an agent of it takes jobs."""


def source_tree(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (default: here) whose pyproject.toml is mobula's, else the one that runs now.

    Raises ConfigError where mobula was installed without its source.
    """
    import tomllib

    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        file = folder / "pyproject.toml"
        if (
            file.is_file()
            and tomllib.loads(file.read_text(encoding="utf-8")).get("project", {}).get("name") == "mobula"
        ):
            return folder
    raise ConfigError(
        "there is no source tree of mobula here to ship: submit from a checkout, or with --no-wheel where the cluster's machines have"
        " mobula installed"
    )


@contextmanager
def shipped(tree: Path) -> Iterator[list[str]]:
    """Builds a wheel of `tree` and yields its folders (the package and its metadata) as Ray's py_modules.

    They are shipped unpacked: a wheel among py_modules is installed with pip on every machine, with all that it depends on, though
    the machines have that.
    """
    with tempfile.TemporaryDirectory(prefix="mobula-wheel-") as name:
        folder = Path(name)
        # A build folder of our own: the tree's may hold modules that have been deleted since.
        settings = folder / "settings.cfg"
        settings.write_text(f"[build]\nbuild_base = {folder / 'build'}\n", encoding="utf-8")
        isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation]
        done = subprocess.run(
            [*command, "--wheel-dir", str(folder / "wheel"), str(tree)],
            env={**os.environ, "DIST_EXTRA_CONFIG": str(settings)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip()).split("\n")[-1]
            raise ConfigError(f"no wheel could be built of {tree}: {said}")
        (wheel,) = (folder / "wheel").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "unpacked")
        yield sorted(str(path) for path in (folder / "unpacked").iterdir())


def client(address: str | None) -> Any:
    """Ray's job client.  Raises ClusterError in one line where no job server answers, or it refuses the token."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    logging.getLogger("ray").setLevel(logging.WARNING)
    place = where(address)
    try:
        found = JobSubmissionClient(place)
        found.list_jobs()
    except (AuthenticationError, RuntimeError, OSError, ValueError) as error:
        raise in_words(error, place) from error
    return found


def where(address: str | None) -> str:
    """The dashboard's address: what is given, what the environment says, this machine's."""
    found = (
        address
        or os.environ.get("RAY_API_SERVER_ADDRESS")
        or os.environ.get("RAY_ADDRESS")
        or "http://127.0.0.1:8265"
    )
    return found if "://" in found else f"http://{found}"


def in_words(error: Exception, where: str) -> ClusterError:
    """What went wrong with the dashboard at `where`, in one line."""
    said = " ".join(str(error).split())
    refused = re.search(
        r"status(?: code)?:? (?:401|403)\b|\b(?:401|403)\b[^0-9]{0,20}(?:client error|unauthorized|forbidden)",
        said,
        re.I,
    )
    about = re.search(r"auth\w*[ _-]?token|unauthorized|forbidden", said, re.I)
    if type(error).__name__ == "AuthenticationError" or refused or about:
        return ClusterError(f"{where}: {NO_TOKEN}")
    return ClusterError(
        f"no dashboard of Ray answers at {where} ({said[:150]}): give the address of the cluster's dashboard, http://HEAD:8265, with"
        " --address or RAY_API_SERVER_ADDRESS"
    )


def entrypoint(arguments: Sequence[str]) -> str:
    """The job's command line; runs go to mobula-runs in the home of the head unless an absolute --out says otherwise."""
    if not arguments:
        raise ConfigError("nothing to submit: mobula submit -- train mac --env goal_grid")
    words = list(arguments[1:]) if arguments[0] == "mobula" else list(arguments)
    line = f"python -m mobula.cli {shlex.join(words)}"
    given = [w for i, w in enumerate(words) if words[i - 1 : i] == ["--out"] or w.startswith("--out=")]
    for folder in (w.removeprefix("--out=") for w in given):
        if not Path(folder).is_absolute():
            raise ConfigError(
                f"--out {folder}: a job's working folder vanishes with it; give an absolute folder of the cluster's storage"
            )
    if words[0] in COMMANDS_WITH_FOLDERS and not given and "--resume" not in words:
        line += ' --out "$HOME/mobula-runs"'
    return line


def submit(
    arguments: Sequence[str],
    *,
    address: str | None = None,
    wheel: bool = True,
    working_dir: Path | None = None,
    env_vars: Mapping[str, str] | None = None,
    submission_id: str | None = None,
    num_cpus: float | None = None,
    wait: bool = True,
    stop_on_interrupt: bool = False,
) -> tuple[str, int]:
    """Runs `mobula ARGUMENTS` on a cluster; prints its output as it comes.  Returns (the job's ID, its exit status).

    Without `wait` the status is 0 as soon as the job is accepted.  Ctrl-C leaves the job running, or stops it when
    `stop_on_interrupt`.
    """
    line = entrypoint(arguments)
    tree = source_tree() if wheel else None
    jobs = client(address)
    environment: dict[str, Any] = {"env_vars": dict(env_vars or {})}
    if working_dir is not None:
        environment["working_dir"] = str(working_dir)

    def send() -> str:
        deadline = time.monotonic() + AGENT_SECONDS
        while True:
            try:
                return str(
                    jobs.submit_job(
                        entrypoint=line,
                        runtime_env=environment,
                        submission_id=submission_id,
                        entrypoint_num_cpus=num_cpus,
                        metadata={"command": shlex.join(arguments)},
                    )
                )
            except (RuntimeError, ValueError) as error:
                said = " ".join(str(error).split())
                if "No available agent" not in said or time.monotonic() > deadline:
                    raise ClusterError(f"the cluster refused the job: {said[:300]}") from error
                time.sleep(1.0)

    if tree is None:
        job = send()
    else:
        with shipped(tree) as modules:
            environment["py_modules"] = modules
            job = send()
    print(f"job {job}: {line}", file=sys.stderr)
    if not wait:
        return job, 0
    try:
        asyncio.run(_follow(jobs, job))
    except KeyboardInterrupt:
        if stop_on_interrupt:
            jobs.stop_job(job)
            print(f"job {job} is stopped", file=sys.stderr)
        else:
            print(
                f"job {job} goes on: `ray job logs {job}` shows it, `ray job stop {job}` ends it (both with --address)",
                file=sys.stderr,
            )
        return job, 1
    info = jobs.get_job_info(job)
    if info.status == "SUCCEEDED":
        return job, 0
    if info.driver_exit_code is None:
        print(f"job {job} {str(info.status).lower()}: {info.message}", file=sys.stderr)
    return job, info.driver_exit_code or 1


async def _follow(jobs: Any, job: str) -> None:
    async for text in jobs.tail_job_logs(job):
        print(text, end="", flush=True)
    # The log may end a moment before the job's status does.
    while not jobs.get_job_status(job).is_terminal():
        await asyncio.sleep(0.2)
