"""What `mobula doctor` looks at."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version


def examine() -> Iterator[tuple[str, bool, str]]:
    """(what, whether it is well, what was found or how to mend it), one after another."""
    yield "python", sys.version_info >= (3, 11), sys.version.split()[0]
    for name in ("ray", "torch", "gymnasium", "mlflow", "safetensors", "scipy"):
        try:
            importlib.import_module(name)
            yield name, True, version(name)
        except (ImportError, PackageNotFoundError) as error:
            yield name, False, f"{error}; install mobula again"
    import torch

    cards = torch.cuda.device_count()
    yield (
        "accelerators",
        True,
        f"{cards} CUDA device(s)" if cards else "none; everything runs on the processor",
    )
    yield "cores", True, f"{os.cpu_count()}"
    free = shutil.disk_usage(".").free / 2**30
    yield (
        "disk",
        free > 1,
        f"{free:.1f} GiB free here" + ("" if free > 1 else "; free some: checkpoints need it"),
    )
    yield _films()
    yield _cluster()
    yield from _entry_points()


def _films() -> tuple[str, bool, str]:
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        return "films", False, f"no ffmpeg ({error}); gifs still work"
    return (
        "films",
        True,
        "mp4 and gif; MuJoCo draws with MUJOCO_GL=egl (Debian: libegl1) or osmesa (libosmesa6)",
    )


def _cluster() -> tuple[str, bool, str]:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return "cluster", True, "RAY_ADDRESS is not set: runs start a Ray of their own"
    from mobula.errors import ClusterError
    from mobula.joining import start_ray

    try:
        start_ray(address)
    except ClusterError as error:
        return "cluster", False, str(error)
    import ray

    return "cluster", True, f"{address}: {ray.cluster_resources().get('CPU', 0):g} cores"


def _entry_points() -> Iterator[tuple[str, bool, str]]:
    from mobula import registry

    for group in (registry.METHODS, registry.ENVS):
        for entry in registry._entries(group).values():
            try:
                registry._load(entry)
            except Exception as error:  # an entry point of anybody may fail in any way; it is reported
                yield entry.name, False, f"{entry.target} of {entry.source} cannot be imported: {error}"
        yield group, True, f"{len(registry._entries(group))} found"
