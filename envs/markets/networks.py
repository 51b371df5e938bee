"""Road networks: the schema, the TNTP file format, and instances that ship with the package.

A link's travel time is the BPR curve t(x) = t0 (1 + B (x / c)^P).  Links are numbered by their row (0-based); they are named
"tail-head" by node labels, with "#2", "#3" for further links between the same nodes.

Pigou, Braess's network, the five-link and nine-node design instances and a generator of grids are code.  Sioux Falls, Barcelona and
Chicago-Sketch are not shipped (donated for academic research, the source to be named): `load_tntp` reads their files from a folder.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobula.errors import DataError, nearest

logger = logging.getLogger("mobula")

Array = NDArray[np.float64]
Index = NDArray[np.int64]

SOURCE = "the public repository TransportationNetworks (bstabler/TransportationNetworks on GitHub)"


@dataclass(frozen=True)
class Network:
    """A directed network of A links with W origin-destination (OD) pairs.

    tail, head [A]; origin, destination [W]: nodes 0..nodes-1 (labels are node + 1)
    free_flow_time, capacity, b, power, length [A]
    demand [W]       trips of each OD pair, above 0
    first_thru       nodes with a label below it may start or end a path, never lie inside one (TNTP's FIRST THRU NODE)
    xy               [nodes, 2] positions for figures, or None
    """

    name: str
    nodes: int
    tail: Index
    head: Index
    free_flow_time: Array
    capacity: Array
    b: Array
    power: Array
    length: Array
    origin: Index
    destination: Index
    demand: Array
    first_thru: int = 1
    xy: Array | None = None

    def __post_init__(self) -> None:
        checked(self)

    @property
    def num_links(self) -> int:
        """A."""
        return len(self.tail)

    @property
    def num_ods(self) -> int:
        """W."""
        return len(self.demand)

    @cached_property
    def link_names(self) -> list[str]:
        """ "tail-head" of every link."""
        seen: dict[str, int] = {}
        names = []
        for i, j in zip(self.tail.tolist(), self.head.tolist(), strict=True):
            name = f"{i + 1}-{j + 1}"
            seen[name] = seen.get(name, 0) + 1
            names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
        return names

    def od_name(self, w: int) -> str:
        """ "origin-destination" of OD pair w."""
        return f"{int(self.origin[w]) + 1}-{int(self.destination[w]) + 1}"

    def links(self, which: Sequence[Any], where: str = "links") -> Index:
        """Rows of links given as names ("1-6") or rows.  Raises DataError for one that does not exist."""
        rows = []
        place = {name: row for row, name in enumerate(self.link_names)}
        for item in which:
            if isinstance(item, str):
                if item not in place:
                    raise DataError(
                        f"{where}: {self.name} has no link {item!r}.{nearest(item, place)} Links are named tail-head, or by row"
                    )
                rows.append(place[item])
            else:
                if isinstance(item, bool) or int(item) != item or not 0 <= int(item) < self.num_links:
                    raise DataError(
                        f"{where}: {self.name} has no link {item!r}: its {self.num_links} rows are 0 to {self.num_links - 1}"
                    )
                rows.append(int(item))
        if len(set(rows)) != len(rows):
            raise DataError(f"{where}: a link of {self.name} is named twice")
        return np.asarray(rows, dtype=np.int64)

    def scaled(self, *, demand: float = 1.0, capacity: float = 1.0, time: float = 1.0) -> Network:
        """The same network in other units."""
        return replace(
            self,
            demand=self.demand * demand,
            capacity=self.capacity * capacity,
            free_flow_time=self.free_flow_time * time,
        )


def checked(network: Network) -> Network:
    """`network`.  Raises DataError, naming the link or OD pair, for values that have no meaning."""
    n, A = network, len(network.tail)
    for what in ("head", "free_flow_time", "capacity", "b", "power", "length"):
        if len(getattr(n, what)) != A:
            raise DataError(f"{n.name}: {len(getattr(n, what))} values of {what} for {A} links")
    ends = np.concatenate([n.tail, n.head, n.origin, n.destination])
    if ends.size and (ends.min() < 0 or ends.max() >= n.nodes):
        raise DataError(f"{n.name}: a link or an OD pair names a node beyond its {n.nodes} nodes")
    names = [f"{i + 1}-{j + 1}" for i, j in zip(n.tail.tolist(), n.head.tolist(), strict=True)]
    for bad, says in (
        (
            ~np.isfinite(n.capacity) | ((n.capacity <= 0) & (n.b > 0)),
            "capacity {capacity:g}: above 0 is needed",
        ),
        (~(n.free_flow_time >= 0), "free-flow time {free_flow_time:g}: 0 or more is needed"),
        (~(n.b >= 0), "B {b:g}: 0 or more is needed"),
        (~(n.power >= 1), "power {power:g}: 1 or more is needed"),
    ):
        if bad.any():
            a = int(np.flatnonzero(bad)[0])
            values = {k: float(getattr(n, k)[a]) for k in ("capacity", "free_flow_time", "b", "power")}
            raise DataError(f"{n.name}: link {names[a]} (row {a}) has {says.format(**values)}")
    if not len(n.demand):
        raise DataError(f"{n.name}: no OD pair has a demand above 0")
    if not (np.isfinite(n.demand) & (n.demand > 0)).all():
        w = int(np.flatnonzero(~(np.isfinite(n.demand) & (n.demand > 0)))[0])
        raise DataError(f"{n.name}: OD pair {n.od_name(w)} has demand {n.demand[w]:g}: above 0 is needed")
    return network


def network(
    name: str,
    nodes: int,
    links: Sequence[tuple[int, int]],
    *,
    free_flow_time: Any,
    capacity: Any,
    demand: dict[tuple[int, int], float],
    b: Any = 0.15,
    power: Any = 4.0,
    length: Any = None,
    first_thru: int = 1,
    xy: Any = None,
) -> Network:
    """A network from labels that start at 1; numbers stand for every link."""
    A = len(links)

    def column(value: Any) -> Array:
        return np.broadcast_to(np.asarray(value, dtype=np.float64), (A,)).copy()

    ends = np.asarray(links, dtype=np.int64).reshape(A, 2) - 1
    pairs = np.asarray(list(demand), dtype=np.int64).reshape(-1, 2) - 1
    return Network(
        name=name,
        nodes=nodes,
        tail=ends[:, 0].copy(),
        head=ends[:, 1].copy(),
        free_flow_time=column(free_flow_time),
        capacity=column(capacity),
        b=column(b),
        power=column(power),
        length=column(free_flow_time if length is None else length),
        origin=pairs[:, 0].copy(),
        destination=pairs[:, 1].copy(),
        demand=np.asarray(list(demand.values()), dtype=np.float64),
        first_thru=first_thru,
        xy=None if xy is None else np.asarray(xy, dtype=np.float64),
    )


# TNTP -----------------------------------------------------------------------------------------------------


def load_tntp(folder: str | Path, name: str | None = None) -> Network:
    """The network in `folder`: *_net.tntp, *_trips.tntp and, where there is one, *_node.tntp.

    name: what the files' names begin with, where the folder holds several networks.  Raises DataError where files are missing
    or damaged.
    """
    folder = Path(folder)
    prefix = name or "NAME"
    wanted = f"{prefix}_net.tntp and {prefix}_trips.tntp (and {prefix}_node.tntp for figures)"
    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder: it should hold {wanted}; {SOURCE} has such files, for academic use"
        )
    found = sorted(folder.glob(f"{name or '*'}_net.tntp"))
    if len(found) != 1:
        have = ", ".join(file.name for file in found) or "none of them"
        raise DataError(
            f"{folder} should hold {wanted}; it has {have}"
            + ("" if found else f"; {SOURCE} has such files, for academic use")
        )
    net = found[0]
    stem = net.name.removesuffix("_net.tntp")
    trips, node = folder / f"{stem}_trips.tntp", folder / f"{stem}_node.tntp"
    if not trips.is_file():
        raise DataError(f"{folder} has {net.name} but no {trips.name}; {SOURCE} has both, for academic use")
    return parse_tntp(_text(net), _text(trips), _text(node) if node.is_file() else None, name=stem)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def _split(text: str, what: str) -> tuple[dict[str, str], list[str]]:
    """({metadata name: value}, lines after the metadata without comments)."""
    head, end, body = text.partition("<END OF METADATA>")
    if not end:
        raise DataError(f"{what}: no <END OF METADATA>: the file is truncated, or no TNTP file")
    meta = {key.strip().upper(): value.strip() for key, value in re.findall(r"<([^>]+)>([^\n]*)", head)}
    lines = [line.partition("~")[0].strip() for line in body.splitlines()]
    return meta, [line for line in lines if line]


def _whole(meta: dict[str, str], key: str, what: str, default: int | None = None) -> int:
    value = meta.get(key)
    if value is None and default is not None:
        return default
    try:
        return int(value or "")
    except ValueError:
        raise DataError(f"{what}: <{key}> is {value!r}; a whole number is needed") from None


def parse_tntp(net: str, trips: str, node: str | None = None, *, name: str = "network") -> Network:
    """A network from the texts of its TNTP files."""
    what = f"{name}_net.tntp"
    meta, lines = _split(net, what)
    nodes = _whole(meta, "NUMBER OF NODES", what)
    rows = []
    for line in lines:
        fields = line.rstrip(";").split()
        try:
            rows.append([float(field) for field in fields[:7]])
        except ValueError:
            raise DataError(f"{what}: {line!r} is no link: numbers are needed") from None
        if len(fields) < 7:
            raise DataError(f"{what}: {line!r} is no link: it has {len(fields)} fields, of 7 or more")
    declared = _whole(meta, "NUMBER OF LINKS", what, len(rows))
    if declared != len(rows):
        raise DataError(
            f"{what}: {len(rows)} links where <NUMBER OF LINKS> says {declared}: the file is truncated"
        )
    table = np.asarray(rows, dtype=np.float64).reshape(-1, 7)
    pairs = [(int(i), int(j)) for i, j in table[:, :2]]
    if len(set(pairs)) < len(pairs):
        logger.warning("%s: %d links run beside another one", what, len(pairs) - len(set(pairs)))
    return network(
        name,
        nodes,
        pairs,
        free_flow_time=table[:, 4],
        capacity=table[:, 2],
        demand=_demands(trips, f"{name}_trips.tntp", nodes),
        b=table[:, 5],
        # A constant time is written with any power, 0 too.
        power=np.where(table[:, 5] > 0, table[:, 6], np.maximum(table[:, 6], 1.0)),
        length=table[:, 3],
        first_thru=_whole(meta, "FIRST THRU NODE", what, 1),
        xy=None if node is None else _positions(node, nodes),
    )


def _demands(text: str, what: str, nodes: int) -> dict[tuple[int, int], float]:
    _, lines = _split(text, what)
    demand: dict[tuple[int, int], float] = {}
    origin = None
    for line in lines:
        match = re.match(r"Origin\s+(\d+)\s*(.*)", line, re.IGNORECASE)
        if match:
            origin, line = int(match[1]), match[2]
        for entry in filter(None, (part.strip() for part in line.split(";"))):
            pair = re.fullmatch(r"(\d+)\s*:\s*(\S+)", entry)
            try:
                value = float(pair[2]) if pair else float("nan")
            except ValueError:
                value = float("nan")
            if pair is None or origin is None or not value >= 0:
                raise DataError(f"{what}: {entry!r} is no demand: 'd : q;' in a block 'Origin o' is needed")
            if value > 0 and int(pair[1]) != origin:
                demand[origin, int(pair[1])] = demand.get((origin, int(pair[1])), 0.0) + value
    return demand


def _positions(text: str, nodes: int) -> Array | None:
    xy = np.full((nodes, 2), np.nan)
    for line in text.splitlines():
        fields = line.replace(";", " ").split()
        if len(fields) >= 3 and fields[0].isdigit() and 1 <= int(fields[0]) <= nodes:
            xy[int(fields[0]) - 1] = float(fields[1]), float(fields[2])
    return xy if np.isfinite(xy).all() else None


# Instances ------------------------------------------------------------------------------------------------


def pigou() -> Network:
    """Two links beside each other, t = x and t = 1, demand 1 (Pigou 1920)."""
    return network(
        "pigou",
        2,
        [(1, 2), (1, 2)],
        # t = 1e-8 + x: the curve's constant cannot be 0 where its slope is not.
        free_flow_time=[1e-8, 1.0],
        capacity=1.0,
        b=[1e8, 0.0],
        power=1.0,
        demand={(1, 2): 1.0},
        xy=[(0, 0), (1, 0)],
    )


def braess(bridge: bool = True) -> Network:
    """Braess's network (1968): 1 to 4 over 3 and 2, t = 10 x, 50 + x, 10 + x, demand 6; without the bridge 3-4 if not `bridge`."""
    links = [(1, 3), (1, 4), (3, 2), (3, 4), (4, 2)]
    t0, slope = [1e-8, 50.0, 50.0, 10.0, 1e-8], [10.0, 1.0, 1.0, 1.0, 10.0]
    kept = [0, 1, 2, 3, 4] if bridge else [0, 1, 2, 4]
    return network(
        "braess",
        4,
        [links[i] for i in kept],
        free_flow_time=[t0[i] for i in kept],
        capacity=1.0,
        b=[slope[i] / t0[i] for i in kept],
        power=1.0,
        demand={(1, 2): 6.0},
        xy=[(0, 0), (2, 0), (1, 0.6), (1, -0.6)],
    )


def braess5() -> Network:
    """The five-link network of the design instance of Li et al. (BPR times, demand 6 from 1 to 4)."""
    return network(
        "braess5",
        4,
        [(1, 2), (1, 3), (2, 4), (2, 3), (3, 4)],
        free_flow_time=[1.0, 3.0, 3.0, 0.5, 1.0],
        capacity=[2.0, 4.0, 4.0, 1.0, 2.0],
        demand={(1, 4): 6.0},
        xy=[(0, 0), (1, 0.6), (1, -0.6), (2, 0)],
    )


def hearn9() -> Network:
    """The nine-node network of Hearn and Ramana (1998), 18 links, four OD pairs."""
    links = [
        (1, 5, 12, 5),
        (1, 6, 18, 6),
        (2, 5, 35, 3),
        (2, 6, 35, 9),
        (5, 6, 20, 9),
        (5, 7, 11, 2),
        (5, 9, 26, 8),
        (6, 5, 11, 2.66667),
        (6, 8, 33, 6),
        (6, 9, 32, 7),
        (7, 3, 25, 3),
        (7, 4, 24, 6),
        (7, 8, 19, 2),
        (8, 3, 39, 8),
        (8, 4, 43, 6),
        (8, 7, 36, 4),
        (9, 7, 26, 4),
        (9, 8, 30, 8),
    ]
    return network(
        "hearn9",
        9,
        [(i, j) for i, j, _, _ in links],
        free_flow_time=[t for *_, t in links],
        capacity=[float(c) for _, _, c, _ in links],
        demand={(1, 3): 10.0, (1, 4): 20.0, (2, 3): 30.0, (2, 4): 40.0},
        xy=[(0, 1), (0, 0), (3, 1), (3, 0), (1, 1), (1, 0), (2, 1), (2, 0), (1.5, 0.5)],
    )


def grid_network(n: int, seed: int = 0, *, zones: int | None = None, demand: float | None = None) -> Network:
    """An n x n grid, both directions of every street; free-flow times U[2, 6], capacities U[5, 25].

    zones   nodes between which trips are made, drawn at random (default: all up to 5 x 5, else 4 n)
    demand  total trips (default: 9 a link along shortest ways, some 60 % of the mean capacity); gravity: weights U[0.5, 1.5] of
            both ends over squared distance
    """
    if n < 2:
        raise DataError(f"grid_network: n is {n}; 2 or more is needed")
    rng = np.random.default_rng(seed)
    cell = np.arange(n * n).reshape(n, n) + 1
    streets = [*zip(cell[:, :-1].ravel(), cell[:, 1:].ravel(), strict=True)]
    streets += [*zip(cell[:-1].ravel(), cell[1:].ravel(), strict=True)]
    links = [pair for i, j in streets for pair in ((int(i), int(j)), (int(j), int(i)))]
    xy = np.stack([(cell.ravel() - 1) % n, (cell.ravel() - 1) // n], axis=1).astype(np.float64)
    times = rng.uniform(2, 6, len(links))
    capacities = rng.uniform(5, 25, len(links))
    count = min(n * n, zones if zones is not None else n * n if n <= 5 else 4 * n)
    chosen = np.sort(rng.permutation(n * n)[:count])
    weight = rng.uniform(0.5, 1.5, count)
    squared = ((xy[chosen, None] - xy[None, chosen]) ** 2).sum(-1)
    gravity = weight[:, None] * weight[None, :] / np.where(squared > 0, squared, np.inf)
    gravity /= gravity.sum()
    if demand is None:
        ways = np.abs(xy[chosen, None] - xy[None, chosen]).sum(-1)
        demand = 9.0 * len(links) / float((gravity * ways).sum())
    gravity *= demand
    pairs = {
        (int(chosen[i]) + 1, int(chosen[j]) + 1): float(gravity[i, j])
        for i in range(count)
        for j in range(count)
        if i != j
    }
    return network(f"grid{n}", n * n, links, free_flow_time=times, capacity=capacities, demand=pairs, xy=xy)


def by_name(name: str) -> Network:
    """A shipped network (pigou, braess, braess5, hearn9, gridN[-sSEED][-zZONES]), or one in a folder of TNTP files."""
    made = {"pigou": pigou, "braess": braess, "braess5": braess5, "hearn9": hearn9}
    if name in made:
        return made[name]()
    match = re.fullmatch(r"grid(\d+)(?:-s(\d+))?(?:-z(\d+))?", name)
    if match:
        return grid_network(
            int(match[1]), int(match[2] or 0), zones=None if match[3] is None else int(match[3])
        )
    if Path(name).is_dir() or "/" in name or "\\" in name:
        return load_tntp(name)
    raise DataError(
        f"network {name!r} is neither one of {', '.join([*made, 'gridN'])} nor a folder with NAME_net.tntp and"
        f" NAME_trips.tntp.{nearest(name, made)}"
    )
