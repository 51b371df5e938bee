"""The command line, as a user types it: what it prints, what it leaves behind, its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mobula import cli
from mobula.errors import MobulaError

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> Any:
    """`mobula ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-c", "from mobula.cli import main; main()", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "COLUMNS": "160", **(env or {})}, capture_output=True, text=True
    )


def fails(*arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """The one line of a user's mistake: exit code 2, no traceback."""
    done = run(*arguments, cwd=cwd, env=env)
    lines = [line for line in done.stderr.splitlines() if line.startswith("mobula:")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture
def typed(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """`mobula ARGUMENTS` in this process and on its Ray, which spares the imports and the start of another."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["mobula", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    return call


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls the command line in this process; returns the message of a user's mistake."""

    def call(*arguments: str) -> str:
        with pytest.raises(MobulaError) as caught:
            cli.app(list(arguments), standalone_mode=False)
        return str(caught.value)

    return call


def test_lists_need_neither_ray_nor_torch() -> None:
    for arguments in (["--help"], ["methods"], ["envs"], ["train", "--help"]):
        code = (
            "import sys\n"
            "from mobula.cli import app\n"
            f"try: app({arguments!r})\n"
            "except SystemExit: pass\n"
            "print('HEAVY', [name for name in ('ray', 'torch', 'mlflow') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith("HEAVY []"), arguments


def test_methods_and_envs_have_a_line_each(typed: Any) -> None:
    listed = typed("methods").stdout
    for name in ("mac", "ppgae", "PPO", "SAC", "DQN", "rllib:PPO", "DreamerV3"):
        assert any(line.split()[:1] == [name] for line in listed.splitlines()), name
    assert "arXiv 2403.11925" in listed
    listed = typed("envs").stdout
    assert all(name in listed for name in ("cartpole", "goal_grid", "queue", "gymnasium:HalfCheetah-v5"))


def test_help_of_a_method_shows_every_hyper_parameter(typed: Any) -> None:
    from mobula.algorithms.policy_gradient.mac import MACConfig

    shown = typed("train", "mac", "--help").stdout
    for name, knob in MACConfig.hyperparameters().items():
        assert f"--{name.replace('_', '-')}" in shown
        assert str(knob.default) in shown
        assert knob.help.split()[0] in shown
    assert "Examples" in shown
    assert "--twin-q" in typed("train", "SAC", "--help").stdout


def test_cite(typed: Any) -> None:
    assert "2403.11925" in typed("cite", "mac").stdout
    assert "liang2018rllib" in typed("cite", "SAC").stdout


def test_train_evaluate_export_film(typed: Any, in_tmp: Path) -> None:
    """The whole way: train, look at what is left behind, evaluate, film, train again from the YAML."""
    arguments = (
        "--env-set",
        "size=3",
        "--stop",
        "env_steps=2000",
        "--seed",
        "1",
        "--t-max=8",
        "--set",
        "c_actor=5",
    )
    done = typed("train", "mac", "--env", "goal_grid", *arguments)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stdout
    assert "evaluation reward per step" in done.stdout
    (folder,) = (path for path in (in_tmp / "runs").iterdir() if path.name.endswith("mac-goal_grid-s1"))
    rows = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    assert rows[-1]["env_steps"] >= 2000
    about = json.loads((folder / "run.json").read_text())
    assert (about["status"], about["seed"], about["env_config"]) == ("done", 1, {"size": 3})
    assert {"config.yaml", "checkpoint", "policy", "learning_curve.png"} <= {p.name for p in folder.iterdir()}
    assert yaml.safe_load((folder / "config.yaml").read_text())["settings"]["t_max"] == 8

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{in_tmp / 'runs' / 'mlflow.db'}")
    (tracked,) = client.search_runs([client.get_experiment_by_name("mac").experiment_id])
    assert tracked.data.params["c_actor"] == "5.0"
    assert len(client.get_metric_history(tracked.info.run_id, "env_runners/reward_sum")) == len(rows)
    assert {"policy", "checkpoint", "learning_curve.png"} <= {
        file.path for file in client.list_artifacts(tracked.info.run_id)
    }

    done = typed("evaluate", str(folder), "--steps", "3000", "--video", "film.gif")
    assert done.returncode == 0, done.stderr
    assert "reward per step" in done.stdout
    assert (in_tmp / "film.gif").read_bytes()[:4] == b"GIF8"
    # The same settings from the YAML give the same run.
    done = typed(
        "train", "--config", str(folder / "config.yaml"), "--stop", "env_steps=2000", "--no-track", "-q"
    )
    again = [
        json.loads(line)
        for line in (in_tmp / done.stdout.strip() / "progress.jsonl").read_text().splitlines()
    ]
    assert [row["env_runners/reward_sum"] for row in again] == [row["env_runners/reward_sum"] for row in rows]


def test_rllib_s_own_algorithms_train_too(typed: Any, in_tmp: Path) -> None:
    done = typed("train", "DQN", "--env", "CartPole-v1", "--iterations", "1", "--no-track")
    assert done.returncode == 0, done.stderr
    assert "run folder" in done.stdout


def test_mac_takes_an_episodic_gymnasium_environment(typed: Any, in_tmp: Path) -> None:
    arguments = ("--stop", "env_steps=600", "--hidden", "[16, 16]", "--no-track")
    done = typed("train", "mac", "--env", "gymnasium:Acrobot-v1", *arguments)
    assert done.returncode == 0, done.stderr
    (folder,) = (in_tmp / "runs").iterdir()
    done = typed("evaluate", str(folder), "--episodes", "2")
    assert "2 episodes" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "macc", "--env", "goal_grid"], "Did you mean 'mac'"),
        (["train", "mac", "--env", "goal_gird"], "Did you mean 'goal_grid'"),
        (["train", "mac", "--env", "goal_grid", "--tmax", "8"], "Did you mean 't-max'"),
        (["train", "mac", "--env", "goal_grid", "--t-max", "1"], "at least 2"),
        (["train", "mac", "--env", "goal_grid", "--set", "gamma=0.9"], "no discount"),
        (["train", "mac", "--env", "goal_grid", "--set", "gamma"], "key=value"),
        (["train", "mac", "--env", "goal_grid", "--stop", "env_steps=many"], "numbers"),
        (["train", "PPO"], "no environment is set"),
        (["train", "mac", "--config", "nowhere.yaml"], "does not exist"),
        (["train", "SAC", "--env", "Pendulum-v1", "--taau", "1"], "Did you mean 'tau'"),
        (["evaluate", "nowhere"], "is no exported policy"),
        (["reproduce", "SAC"], "declares no experiment"),
        (["reproduce", "mac", "--budget", "tiny"], "'paper' or 'smoke'"),
        (["cite", "nothing"], "unknown method"),
    ],
)
def test_mistakes_end_in_one_line(quick: Any, arguments: list[str], says: str) -> None:
    message = quick(*arguments)
    assert says in message
    assert "\n" not in message


def test_mistakes_found_while_building_end_in_one_line(ray_session: None, quick: Any, in_tmp: Path) -> None:
    arguments = ("train", "mac", "--no-track", "-q", "--stop", "env_steps=100")
    for more, says in (
        (("--env", "pendulum"), "discrete actions"),
        (("--env", "cartpole", "--no-continuing-wrapper"), "wrap resets as transitions"),
        (("--env", "cartpole", "--features", "tabular"), "features='tabular'"),
        (("--env", "goal_grid", "--env-set", "sizes=3"), "sizes"),
    ):
        message = quick(*arguments, *more)
        assert says in message and "\n" not in message
    # The whole way, as a user sees it.
    assert "outside [r_min, r_max]" in fails(
        *arguments, "--env", "goal_grid", "--r-max", "0.5", "--stop", "env_steps=4000"
    )
    failed = [json.loads((path / "run.json").read_text())["status"] for path in (in_tmp / "runs").iterdir()]
    assert set(failed) == {"failed"} and len(failed) == 5


def test_a_ray_address_that_does_not_answer(in_tmp: Path) -> None:
    start = time.monotonic()
    arguments = ("train", "mac", "--env", "goal_grid", "--no-track")
    assert "does not answer" in fails(*arguments, env={"RAY_ADDRESS": "127.0.0.1:9"})
    assert time.monotonic() - start < 60


def test_an_unwritable_run_folder(typed: Any, in_tmp: Path) -> None:
    (in_tmp / "file").write_text("")
    done = typed("train", "mac", "--env", "goal_grid", "--out", "file/runs")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mobula:")]
    assert done.returncode == 2 and "cannot write" in line and "Traceback" not in done.stderr


def test_a_full_disk_is_named_and_leaves_what_was_there(in_tmp: Path) -> None:
    """A write that runs out of space keeps the old file and says what to do."""
    import errno

    from mobula import files
    from mobula.errors import StorageError

    files.write_text("a.txt", "old")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(StorageError, match="no space left"):
            files.write_text("a.txt", "new")
    assert Path("a.txt").read_text() == "old"
    assert [path.name for path in in_tmp.iterdir()] == ["a.txt"]


def test_doctor(typed: Any) -> None:
    done = typed("doctor")
    assert done.returncode == 0, done.stdout
    assert "mobula.methods" in done.stdout


def test_the_plug_in_example_of_the_readme(tmp_path: Path) -> None:
    """The example, installed as any distribution would be, trains by name and learns."""
    example = ROOT / "examples" / "plugin"
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    source.mkdir()
    for file in example.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    subprocess.run([*install, "--target", str(site), str(source)], check=True, capture_output=True)
    env = {"PYTHONPATH": str(site)}
    assert "Walk right" in run("envs", env=env).stdout
    assert "Cross-entropy method" in run("methods", env=env).stdout
    arguments = (
        "--env",
        "corridor",
        "--seed",
        "0",
        "--no-track",
        "--elite",
        "0.3",
        "--stop",
        "env_steps=50000",
    )
    done = run("train", "crossing", *arguments, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    final = json.loads((folder / "run.json").read_text())
    # The shortest way is nine steps.
    assert final["evaluation"]["episode_return_mean"] == 1.0
    assert final["evaluation"]["episode_len_mean"] == 9.0
    code = "from mobula.sampling.conformance import check_env; from mobula_example import Corridor; check_env(Corridor)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **env})


def test_the_readme_shows_the_example_that_is_tested() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "examples/plugin/mobula_example.py").read_text(encoding="utf-8").strip() in readme
