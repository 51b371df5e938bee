"""mobula data list | info NAME | fetch NAME [--out FOLDER]: the logged data that offline methods learn from."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mobula.envs.datasets import cached, load
from mobula.errors import MobulaError


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; `arguments` default to those of the process.  Raises MobulaError for what the user can mend."""
    parser = argparse.ArgumentParser(prog="mobula data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the recipes")
    for name, text in (
        ("info", "metadata of a data set"),
        ("fetch", "makes a recipe, or converts files, and keeps it"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("name", help="recipe, .hdf5 file, Minari folder or Parquet folder")
        if name == "fetch":
            command.add_argument("--out", type=Path, help="writes Parquet and metadata.json to this folder")
    options = parser.parse_args(arguments)
    if options.command == "list":
        from mobula.envs.datasets import recipes

        print((recipes.__doc__ or "").strip())
        return
    dataset = load(options.name)
    if options.command == "info":
        print(json.dumps({**dataset.metadata, **dataset.summary()}, indent=2))
        return
    print(dataset.save(options.out) if options.out else cached(options.name))


if __name__ == "__main__":
    try:
        main()
    except MobulaError as error:
        print(f"mobula: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
