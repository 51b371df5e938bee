"""Joining a Ray cluster, or starting a Ray of one's own."""

from __future__ import annotations

import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mobula.errors import ClusterError

NO_TOKEN = (
    "the cluster asks for a token and got none, or a wrong one: put the cluster's own into RAY_AUTH_TOKEN, into a file that"
    " RAY_AUTH_TOKEN_PATH names, or into ~/.ray/auth_token (`ray get-auth-token` prints it on the head)"
)


def start_ray(address: str | None = None, *, verbose: bool = False, dashboard: bool = False) -> None:
    """Joins the cluster at `address` (default: RAY_ADDRESS), or starts a local Ray, with its `dashboard` or without.

    Raises ClusterError in one line.
    """
    import ray

    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.rllib", "ray.tune"):
        logging.getLogger(name).setLevel(level)
    if address is None:
        # Without "local", Ray would join a cluster that somebody has started on this machine.
        ray.init(address="local", include_dashboard=dashboard, log_to_driver=verbose, logging_level=level)
        return
    # Clusters of Ray 2.60 ask for a token; a client that sends none is refused.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    match = re.fullmatch(r"(?:ray://|https?://)?([^:/]+):(\d+)", address)
    if match:
        try:
            socket.create_connection((match[1], int(match[2])), timeout=5).close()
        except OSError as error:
            raise ClusterError(
                f"the Ray cluster at {address} does not answer ({error}): start it with `ray start --head`,"
                " or unset RAY_ADDRESS to run on this machine"
            ) from error
    with _native_errors() as native:
        try:
            ray.init(address=address, log_to_driver=verbose, logging_level=level)
        except ray.exceptions.AuthenticationError as error:
            raise ClusterError(f"{address}: {NO_TOKEN}") from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            if "InvalidAuthToken" in native():
                raise ClusterError(f"{address}: {NO_TOKEN}") from error
            first = str(error).strip().split("\n")[0]
            raise ClusterError(f"cannot join the Ray cluster at {address}: {first}") from error


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def _native_errors() -> Iterator[Callable[[], str]]:
    """Keeps what Ray's C++ core writes on standard error off the terminal, and gives it to the caller."""
    with tempfile.TemporaryFile() as kept:
        saved = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:

            def text() -> str:
                kept.seek(0)
                return kept.read().decode(errors="replace")

            yield text
        finally:
            os.dup2(saved, 2)
            os.close(saved)
