"""Data sets: loaders on small files in the published layouts, recipes, transforms, scores, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mobula.envs import datasets
from mobula.envs.datasets import dataset as schema
from mobula.envs.datasets import hdf5, recipes, sac, scores, transforms
from mobula.errors import ConfigError, DataError

N = 10


def raw() -> dict[str, Any]:
    """Two episodes: rows 0-3 end by a terminal, rows 4-9 by a timeout."""
    obs = np.arange(2 * N, dtype=np.float32).reshape(N, 2)
    following = obs + 2
    following[3], following[9] = -1.0, -2.0
    terminals, timeouts = np.zeros(N, bool), np.zeros(N, bool)
    terminals[3] = timeouts[9] = True
    return {
        "observations": obs,
        "next_observations": following,
        "actions": np.linspace(-1, 1, N, dtype=np.float32).reshape(N, 1),
        "rewards": np.arange(N, dtype=np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def write(path: Path, arrays: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file[name] = value
    return path


def test_d4rl_with_next_observations(tmp_path: Path) -> None:
    found = datasets.load(str(write(tmp_path / "hopper_medium-v2.hdf5", raw())))
    assert len(found) == N
    assert found["terminated"].nonzero()[0].tolist() == [3]
    assert found["truncated"].nonzero()[0].tolist() == [9]
    assert found["episode_id"].tolist() == [0] * 4 + [1] * 6
    assert found["t"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(found["next_obs"][9], [-2, -2])
    assert np.abs(found["action"]).max() == np.float32(1 - 1e-5)
    assert found.returns().tolist() == [6.0, 39.0]
    assert found.metadata["reference"] == {"scale": "d4rl:hopper", "random": -20.272305, "expert": 3234.3}
    assert set(found["behaviour"]) == {"medium"}


def test_d4rl_without_next_observations_drops_rows_that_end_by_timeout(tmp_path: Path) -> None:
    arrays = raw()
    del arrays["next_observations"]
    arrays["timeouts"][6] = True
    found = hdf5.load_d4rl(write(tmp_path / "antmaze.hdf5", arrays))
    # Rows 6 and 9 are gone: their successors are first states of other episodes, or unknown.
    np.testing.assert_array_equal(found["obs"][:, 0], [0, 2, 4, 6, 8, 10, 14, 16])
    np.testing.assert_array_equal(found["next_obs"][5], arrays["observations"][6])
    assert found["episode_id"].tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert found["terminated"].tolist() == [False] * 3 + [True] + [False] * 4
    assert found["truncated"].nonzero()[0].tolist() == [5, 7]


def test_d4rl_v0_is_cut_at_the_step_limit(tmp_path: Path) -> None:
    arrays = raw()
    del arrays["timeouts"]
    arrays["next_observations"] = np.concatenate([arrays["observations"][1:], [[0, 0]]]).astype(np.float32)
    found = hdf5.load_d4rl(write(tmp_path / "walker2d.hdf5", arrays), step_limit=4)
    # The clock restarts after the terminal of row 3: rows 4-7, then 8-9.
    assert found["truncated"].nonzero()[0].tolist() == [7, 9]
    assert found["terminated"].nonzero()[0].tolist() == [3]


def test_a_jump_of_the_state_is_the_end_of_an_episode(tmp_path: Path) -> None:
    arrays = raw()
    arrays["observations"][6:] += 100
    arrays["next_observations"][6:9] += 100
    found = hdf5.load_d4rl(write(tmp_path / "x.hdf5", arrays))
    assert found["truncated"].nonzero()[0].tolist() == [5, 9]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.pop("rewards"), "lacks rewards; it holds actions, next_observations"),
        (lambda a: a.update(rewards=a["rewards"][:5]), "has 10 rows and rewards has 5"),
        (lambda a: a["rewards"].__setitem__(7, np.nan), "reward is not finite in row 7"),
        (lambda a: a.update(actions=a["actions"] * 2), "look un-normalised"),
    ],
)
def test_bad_d4rl_files(tmp_path: Path, change: Any, says: str) -> None:
    arrays = raw()
    change(arrays)
    with pytest.raises(DataError, match=says):
        hdf5.load_d4rl(write(tmp_path / "bad.hdf5", arrays))


def test_files_that_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "cut.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n12345")
    with pytest.raises(DataError, match="truncated"):
        datasets.load(str(tmp_path / "cut.hdf5"))
    with pytest.raises(DataError, match="no such file"):
        datasets.load(str(tmp_path / "gone.hdf5"))
    with pytest.raises(DataError, match=r"no \.parquet file"):
        datasets.load(str(tmp_path))


def minari(path: Path, dictionary: bool) -> Path:
    folder = path / "point" / "umaze-v2" / "data"
    folder.mkdir(parents=True)
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        # "episode_10" comes before "episode_2" by name.
        for k, steps in ((2, 3), (10, 2)):
            group = file.create_group(f"episode_{k}")
            base = np.arange((steps + 1) * 2, dtype=np.float64).reshape(-1, 2) + 100 * k
            if dictionary:
                for name, shift in (("desired_goal", 0.3), ("achieved_goal", 0.2), ("observation", 0.1)):
                    group[f"observations/{name}"] = base + shift
            else:
                group["observations"] = base
            group["actions"] = np.full((steps, 1), 0.5 * k / 10)
            group["rewards"] = np.ones(steps)
            group["terminations"] = np.zeros(steps, bool)
            group["truncations"] = np.r_[np.zeros(steps - 1, bool), True]
        file.attrs["env_spec"] = json.dumps({"id": "PointMaze_UMaze-v3"})
        file.attrs["dataset_id"] = "D4RL/pointmaze/umaze-v2"
    return folder.parent


@pytest.mark.parametrize("dictionary", [False, True])
def test_minari(tmp_path: Path, dictionary: bool) -> None:
    found = datasets.load(str(minari(tmp_path, dictionary)))
    assert len(found) == 5
    assert found["episode_id"].tolist() == [0, 0, 0, 1, 1]
    assert found["truncated"].tolist() == [False, False, True, False, True]
    assert found["action"][:, 0].round(6).tolist() == pytest.approx([0.1] * 3 + [0.5] * 2)
    first = [200.1, 201.1, 200.2, 201.2, 200.3, 201.3] if dictionary else [200.0, 201.0]
    np.testing.assert_allclose(found["obs"][0], first, rtol=1e-6)
    np.testing.assert_array_equal(found["next_obs"][:2], found["obs"][1:3])
    assert found.metadata["env"] == "gymnasium:PointMaze_UMaze-v3"
    assert found.name == "D4RL/pointmaze/umaze-v2"


def test_minari_errors(tmp_path: Path) -> None:
    folder = minari(tmp_path, False)
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        del file["episode_2/rewards"]
        file["episode_2/rewards"] = np.ones(7)
    with pytest.raises(DataError, match="4 observations for 7 rewards; 8 are needed"):
        datasets.load(str(folder))


RECIPES = [
    "pendulum/scripted-mixed-0.25,size=1000",
    "point_maze/medium,size=1000,layout=medium",
    "four_rooms/mixed-0.1,size=1000",
]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_deterministic_and_survive_the_disk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOBULA_DATA", str(tmp_path))
    first = datasets.load(name)
    assert recipes.generate(name).digest() == first.digest()
    assert recipes.generate(name + ",seed=1").digest() != first.digest()
    again = datasets.load(name)
    assert again.digest() == first.digest()
    assert again.metadata["sha256"] == first.digest()
    assert again.observation_space() == first.observation_space()
    assert again.metadata["env"] == name.split("/")[0]
    for key in schema.REQUIRED:
        assert len(first[key]) == len(first)
    ends = first["terminated"] | first["truncated"]
    last = np.r_[first.starts()[1:], len(first)] - 1
    assert ends[last].all()
    assert ends.sum() == len(last)
    inside = np.ones(len(first), bool)
    inside[last] = False
    np.testing.assert_array_equal(first["next_obs"][:-1][inside[:-1]], first["obs"][1:][inside[:-1]])


SMALL = {"steps": 300, "random_steps": 60, "snapshot_every": 60, "hidden": (8,), "batch": 16}


@pytest.mark.parametrize("env", ["pendulum", "gymnasium:Hopper-v5"])
def test_a_run_that_was_killed_goes_on_behind_its_whole_shards(
    env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}

    settings = {**SMALL, "evaluation_episodes": 2}
    sac.train(env, 1, tmp_path / "unbroken", **settings)
    run = sac.read_run(tmp_path / "unbroken")
    assert [step for step, *_ in run.snapshots] == [60, 120, 180, 240, 300]
    assert len(run.columns["reward"]) == 300
    calls, step = [0], sac.polyak

    def counted(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == die_at:
            raise KeyboardInterrupt
        step(*args)

    monkeypatch.setattr(sac, "polyak", counted)
    # In the middle of the third shard; then in the fifth, its learner file being one shard behind (a kill between the two).
    die_at = 95
    with pytest.raises(KeyboardInterrupt):
        sac.train(env, 1, tmp_path / "killed", **settings)
    behind = (tmp_path / "killed" / sac.LEARNER).read_bytes()
    assert sorted(contents(tmp_path / "killed")) == [
        sac.LEARNER,
        "shard-000000060.safetensors",
        "shard-000000120.safetensors",
    ]
    calls[0], die_at = 0, 130
    with pytest.raises(KeyboardInterrupt):
        sac.train(env, 1, tmp_path / "killed", **settings)
    assert len(contents(tmp_path / "killed")) == 5
    (tmp_path / "killed" / sac.LEARNER).write_bytes(behind)
    calls[0], die_at = 0, 0
    sac.train(env, 1, tmp_path / "killed", **settings)
    assert calls[0] == 180
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")
    sac.train(env, 1, tmp_path / "killed", **settings)
    assert calls[0] == 180


def test_a_run_is_not_continued_in_another_world(tmp_path: Path) -> None:
    settings = {**SMALL, "evaluation_episodes": 2}
    sac.train("pendulum", 1, tmp_path / "run", **{**settings, "steps": 60})
    with pytest.raises(DataError, match=r"does not repeat itself at step 0; delete the folder"):
        sac.train("pendulum", 2, tmp_path / "run", **settings)


def test_mujoco_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBULA_DATA", str(tmp_path))
    monkeypatch.setattr(recipes, "REFERENCE_EPISODES", 3)
    monkeypatch.setattr(sac, "USUAL", {"hidden": (8,), "batch": 16, "evaluation_episodes": 2})
    half = datasets.load("hopper/mixed-0.5,size=200,steps=100")
    assert (half["behaviour"] == "expert").sum() >= 100
    assert half.metadata["env"] == "gymnasium:Hopper-v5"
    assert half.metadata["reference"]["scale"] == "gymnasium:Hopper-v5:sac"
    assert half["obs"].shape[1:] == (11,)
    assert half["action"].shape[1:] == (3,)
    # Every quality of a seed comes from the run that is kept.
    monkeypatch.setattr(sac, "polyak", lambda *args: pytest.fail("trained again"))
    mixed = datasets.load("hopper/replaced-0.5,size=200,steps=100")
    assert (mixed["behaviour"] == "expert").nonzero()[0].tolist() == list(range(150, 200))
    other = datasets.load("hopper/random,size=100,steps=100")
    assert set(other["behaviour"]) == {"random"}
    with pytest.raises(ConfigError, match="steps is 3; a whole number of at least 20"):
        datasets.load("hopper/random,steps=3")


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    folder = recipes.generate("four_rooms/mixed-0.5,size=200").save(tmp_path / "kept")
    about = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({**about, "sha256": "0" * 64}))
    with pytest.raises(DataError, match=r"not those that metadata\.json"):
        datasets.load(str(folder))


def test_shares_of_mixtures() -> None:
    rooms = recipes.generate("four_rooms/mixed-0.3,size=1000")
    assert (rooms["behaviour"] == "expert").sum() == 300
    assert len(rooms) == 1000
    assert rooms["t"].max() < 200
    swing = recipes.generate("pendulum/scripted-mixed-0.1,size=4000")
    assert (swing["behaviour"] == "scripted").sum() == 400
    by_return = swing.returns()
    good = swing["behaviour"][swing.starts()] == "scripted"
    assert by_return[good].mean() > by_return[~good].mean() + 300
    half = recipes.generate("pendulum/scripted,size=4000,sub=0.5")
    assert len(half.starts()) == 10


def test_the_last_rows_are_replaced() -> None:
    """420 of 2,000 rows, (1 - 0.3) 0.3 of them; both parts end where they are cut."""
    good, poor = (recipes.generate(f"pendulum/{kind},size=2000") for kind in ("scripted", "random"))
    found = recipes.replaced(good, poor, 0.3, "replaced-0.3")
    assert len(found) == 2000
    np.testing.assert_array_equal(found["obs"][:1580], poor["obs"][:1580])
    np.testing.assert_array_equal(found["obs"][1580:], good["obs"][:420])
    # Twenty worlds of 100 rows each.
    ends = [*range(99, 1580, 100), 1579, *(1580 + n for n in (99, 199, 299, 399, 419))]
    assert found["truncated"].nonzero()[0].tolist() == ends
    assert not poor["truncated"][1579]
    assert found["episode_id"][1580] == found["episode_id"][1579] + 1
    for ratio in (0.0, 1.0):
        np.testing.assert_array_equal(recipes.replaced(good, poor, ratio, "x")["obs"], poor["obs"])


def test_thinning_near_the_goal_keeps_by_distance() -> None:
    whole = recipes.generate("point_maze/medium,size=20000")
    thin = recipes.thin_near_goal(whole, 1.0, 0)
    gap = np.linalg.norm(whole["next_obs"][:, :2] - whole["next_obs"][:, 4:], axis=1)
    assert len(thin) == pytest.approx(np.minimum(1, gap / gap.max()).sum(), rel=0.03)
    # Episodes of what is left are runs without a gap.
    last = np.r_[thin.starts()[1:], len(thin)] - 1
    assert (thin["terminated"] | thin["truncated"])[last].all()
    inside = np.setdiff1d(np.arange(len(thin) - 1), last)
    np.testing.assert_array_equal(thin["next_obs"][inside], thin["obs"][inside + 1])


def test_reward_transforms() -> None:
    found = recipes.generate("pendulum/random,size=2000")
    returns = found.returns()
    a, b = transforms.reward_scale(found, "reward_range")
    assert (a * returns).max() - (a * returns).min() == pytest.approx(1000.0)
    assert b == 0.0
    assert transforms.reward_scale(found, "reward_shift(-1)") == (1.0, -1.0)
    assert transforms.reward_scale(found, "shift(0.5)") == (1.0, 0.5)
    a, _ = transforms.reward_scale(found, "reward_unit")
    assert np.abs(a * found["reward"]).max() == pytest.approx(1.0)
    mean, scale = transforms.obs_statistics(found)
    np.testing.assert_allclose(scale, found["obs"].std(0, dtype=np.float64) + 1e-3)
    np.testing.assert_allclose(mean, found["obs"].mean(0, dtype=np.float64))
    constant = schema.Dataset({**found.columns, "reward": np.zeros(len(found), np.float32)}, {"name": "flat"})
    for transform in ("reward_range", "reward_unit"):
        with pytest.raises(DataError, match="divide by zero"):
            transforms.reward_scale(constant, transform)
    with pytest.raises(ConfigError, match="there are none, reward_range"):
        transforms.reward_scale(found, "bigger")


def test_scores() -> None:
    hopper = scores.d4rl_reference("hopper_medium_expert-v2.hdf5")
    assert hopper is not None
    assert scores.normalised(3234.3, hopper) == pytest.approx(100.0)
    assert scores.normalised(-20.272305, hopper) == pytest.approx(0.0)
    maze = scores.d4rl_reference("antmaze-umaze-v2.hdf5")
    assert maze is not None
    assert maze["scale"] == "d4rl:antmaze"
    assert scores.d4rl_reference("somebody.hdf5") is None
    with pytest.raises(DataError, match="no width"):
        scores.normalised(1.0, {"scale": "x", "random": 1.0, "expert": 1.0})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pendulun/random", "Did you mean 'pendulum'"),
        ("pendulum/best", "no quality 'best'; pendulum has random"),
        ("pendulum/random,sized=3", "no option 'sized'"),
        ("pendulum/random,size", "key=value"),
        ("pendulum", "write pack/quality"),
        ("pendulum/mixed-1.5", "no quality"),
    ],
)
def test_bad_names(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        datasets.load(name)


def test_missing_columns_and_kinds_of_action() -> None:
    columns = dict(recipes.generate("four_rooms/mixed-0.5,size=100").columns)
    with pytest.raises(DataError, match="has discrete actions"):
        schema.make(columns, {}, where="x", continuous=True)
    del columns["next_obs"], columns["terminated"]
    with pytest.raises(DataError, match="lacks the columns next_obs, terminated"):
        schema.make(columns, {}, where="x")


def test_the_head_of_large_files_knows_the_whole(tmp_path: Path) -> None:
    whole = recipes.generate("pendulum/random,size=20400")
    part = datasets.head(str(whole.save(tmp_path / "kept")), rows=10_000)
    assert len(part) == 10_000
    np.testing.assert_array_equal(part["obs"], whole["obs"][:10_000])
    assert transforms.reward_scale(part, "reward_range") == pytest.approx(
        transforms.reward_scale(whole, "reward_range")
    )
    for mine, all_of in zip(transforms.obs_statistics(part), transforms.obs_statistics(whole), strict=True):
        np.testing.assert_allclose(mine, all_of)
    (tmp_path / "kept" / "metadata.json").unlink()
    with pytest.raises(DataError, match=r"needs Parquet files with a metadata\.json"):
        datasets.head(str(tmp_path / "kept"))


def test_ray_data_streams_every_row_once_an_epoch(ray_session: None, tmp_path: Path) -> None:
    whole = recipes.generate("pendulum/random,size=400")
    whole.save(tmp_path / "kept")
    batches = datasets.stream(tmp_path / "kept", 100, seed=1)
    epoch = [next(batches) for _ in range(4)]
    seen = np.concatenate([batch["obs"] for batch in epoch])
    assert not np.array_equal(seen, whole["obs"])
    np.testing.assert_array_equal(np.sort(seen[:, 2]), np.sort(whole["obs"][:, 2]))
    assert epoch[0]["action"].shape == (100, 1)
