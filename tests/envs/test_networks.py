"""Networks: the TNTP parser, what it refuses, the instances, the grids."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from mobula.envs.markets import networks
from mobula.envs.markets.design import make_problem
from mobula.envs.markets.networks import by_name, grid_network, load_tntp, network, parse_tntp
from mobula.errors import ConfigError, DataError

NET = """<NUMBER OF ZONES> 2
<NUMBER OF NODES> 3
<FIRST THRU NODE> 3
<NUMBER OF LINKS> {links}
<END OF METADATA>

~ init term capacity length fft b power speed toll type ;
 1 3 10 1 {fft} 0.15 4 0 0 1 ;
 3 2 {capacity} 2 5 0.15 4 0 0 1 ;   ~ a remark
"""
TRIPS = """<NUMBER OF ZONES> 2
<TOTAL OD FLOW> 7
<END OF METADATA>

Origin 1
  1 : 3.0;  2 : {demand};
Origin  2
  1 : 0.0;
"""


def parse(links: int = 2, fft: str = "4", capacity: str = "20", demand: str = "7.5") -> networks.Network:
    return parse_tntp(NET.format(links=links, fft=fft, capacity=capacity), TRIPS.format(demand=demand))


def test_tntp_is_read() -> None:
    n = parse()
    assert (n.nodes, n.num_links, n.num_ods, n.first_thru) == (3, 2, 1, 3)
    assert n.link_names == ["1-3", "3-2"]
    np.testing.assert_array_equal(n.free_flow_time, [4, 5])
    np.testing.assert_array_equal(n.capacity, [10, 20])
    np.testing.assert_array_equal(n.length, [1, 2])
    # Trips within a zone and zero demands are no OD pairs.
    assert n.od_name(0) == "1-2"
    assert n.demand.tolist() == [7.5]


def test_constant_times_may_have_the_power_0() -> None:
    text = NET.format(links=2, fft="4", capacity="20").replace("4 0.15 4", "4 0 0", 1)
    n = parse_tntp(text, TRIPS.format(demand="1"))
    assert (n.b[0], n.power[0]) == (0, 1) and n.power[1] == 4


def test_damaged_files_are_named() -> None:
    with pytest.raises(DataError, match="2 links where <NUMBER OF LINKS> says 3"):
        parse(links=3)
    with pytest.raises(DataError, match=r"link 3-2 \(row 1\) has capacity 0"):
        parse(capacity="0")
    with pytest.raises(DataError, match=r"link 1-3 \(row 0\) has free-flow time -1"):
        parse(fft="-1")
    with pytest.raises(DataError, match="'2 : x' is no demand"):
        parse(demand="x")
    with pytest.raises(DataError, match="numbers are needed"):
        parse(fft="many")
    with pytest.raises(DataError, match="no <END OF METADATA>"):
        parse_tntp("1 2 3", "")
    with pytest.raises(DataError, match="no OD pair"):
        parse(demand="0")


def test_links_beside_each_other_are_allowed(caplog: pytest.LogCaptureFixture) -> None:
    text = NET.format(links=3, fft="4", capacity="20") + " 3 2 5 2 1 0.15 4 0 0 1 ;\n"
    with caplog.at_level(logging.WARNING):
        n = parse_tntp(text, TRIPS.format(demand="1"))
    assert "run beside another" in caplog.text
    assert n.link_names == ["1-3", "3-2", "3-2#2"]
    assert n.links(["3-2#2", 0]).tolist() == [2, 0]


def test_a_missing_folder_says_what_it_should_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"NAME_net.tntp and NAME_trips.tntp.*TransportationNetworks"):
        load_tntp(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has none of them"):
        load_tntp(tmp_path)
    (tmp_path / "X_net.tntp").write_text(NET.format(links=2, fft="4", capacity="20"))
    with pytest.raises(DataError, match=r"no X_trips\.tntp"):
        load_tntp(tmp_path)
    (tmp_path / "X_trips.tntp").write_text(TRIPS.format(demand="2"))
    assert load_tntp(tmp_path).name == "X"
    monkeypatch.delenv("MOBULA_SIOUXFALLS", raising=False)
    with pytest.raises(DataError, match=r"SiouxFalls_net\.tntp, SiouxFalls_trips\.tntp"):
        make_problem("siouxfalls")


def test_names_that_do_not_exist() -> None:
    with pytest.raises(DataError, match=r"Did you mean 'hearn9'"):
        by_name("hearn")
    n = networks.hearn9()
    with pytest.raises(DataError, match=r"no link '1-9'"):
        n.links(["1-9"])
    with pytest.raises(DataError, match="its 18 rows are 0 to 17"):
        n.links([18])
    with pytest.raises(DataError, match="twice"):
        n.links([1, "1-6"])


def test_a_problem_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ConfigError, match=r"investment cost of link 1-3 is -1"):
        make_problem("braess5", cost=[1, -1, 3, 0.5, 1])
    with pytest.raises(ConfigError, match="2 numbers for 5 candidate links"):
        make_problem("braess5", cost=[1, 2])
    with pytest.raises(ConfigError, match="not known"):
        make_problem("braess5", "welfare")
    with pytest.raises(DataError, match="links: hearn9 has no link"):
        make_problem("hearn9", links=["99-1"])
    with pytest.raises(ConfigError, match="link 1-2 is not feasible"):
        make_problem("braess5").feasible([-1, 0, 0, 0, 0], "start")
    with pytest.raises(ConfigError, match="at most 2"):
        make_problem("braess5", upper=2.0).feasible([3, 0, 0, 0, 0], "start")


def test_grids() -> None:
    n = grid_network(4, seed=1)
    assert n.num_links == 2 * 2 * 4 * 3
    # Every street goes both ways.
    pairs = set(zip(n.tail.tolist(), n.head.tolist(), strict=True))
    assert {(j, i) for i, j in pairs} == pairs
    assert n.free_flow_time.min() >= 2 and n.free_flow_time.max() <= 6
    assert n.capacity.min() >= 5 and n.capacity.max() <= 25
    again = by_name("grid4-s1")
    np.testing.assert_array_equal(n.demand, again.demand)
    assert not np.array_equal(n.capacity, grid_network(4, seed=2).capacity)
    assert grid_network(10).num_ods == 40 * 39
    assert by_name("grid6-s1-z5").num_ods == 5 * 4 and by_name("grid6-z5").nodes == 36
    with pytest.raises(DataError, match="2 or more"):
        grid_network(1)


def test_a_demand_must_be_above_zero() -> None:
    with pytest.raises(DataError, match="OD pair 1-2 has demand -1"):
        network("x", 2, [(1, 2)], free_flow_time=1.0, capacity=1.0, demand={(1, 2): -1.0})
