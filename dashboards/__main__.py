"""`mobula dashboards`: writes the files for Prometheus and Grafana."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mobula.dashboards.files import PROMETHEUS, RAY_FOLDER, files
from mobula.files import write_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes them below --out and says how to start both servers."""
    parser = argparse.ArgumentParser(
        prog="mobula dashboards",
        description="Writes what Prometheus and Grafana need to show runs, their workers and the service.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("mobula-dashboards"), help="folder to write to (%(default)s)"
    )
    parser.add_argument(
        "--ray-folder", default=RAY_FOLDER, help="Ray's temporary folder on the head node (%(default)s)"
    )
    parser.add_argument("--prometheus", default=PROMETHEUS, help="address for Grafana (%(default)s)")
    parser.add_argument(
        "--boards-at",
        help="where Grafana will find the dashboards, if they are copied (default: OUT/grafana/dashboards)",
    )
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    boards = given.boards_at or str(out / "grafana" / "dashboards")
    for path, text in files(ray_folder=given.ray_folder, boards=boards, prometheus=given.prometheus).items():
        write_text(out / path, text)
    print(
        f"prometheus --config.file={out / 'prometheus' / 'prometheus.yml'} --web.listen-address=127.0.0.1:9090"
    )
    print(
        f"GF_PATHS_PROVISIONING={out / 'grafana' / 'provisioning'} grafana server --homepath /usr/share/grafana"
    )


if __name__ == "__main__":
    main()
