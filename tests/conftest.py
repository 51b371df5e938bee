"""One torch thread a process (tiny models are fastest so), no display, one Ray for the tests that need one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["SDL_VIDEODRIVER"] = "dummy"
# A busy machine takes longer than half a minute to start a Ray node.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray of four logical cores, started at the first test that asks for it."""
    import ray

    # Socket paths must stay short: not below pytest's own folder.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs the test in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
