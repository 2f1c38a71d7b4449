"""study.py and speed.py: real runs, in small, and what the csv files say of them."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARE = "guidance/selected/"
SMALL = "--num-envs 2 --batch-size 8 --learning-starts 20 --guidance-starts 20 --hidden-sizes 8"
SMALL += " --log-interval 20 --eval-interval 100 --eval-episodes 1 --checkpoint-interval 400"
SMALL = [*SMALL.split(), "--sources", "--num-random-sources", "2"]


def study(folder: Path, *arguments: str, task="Pendulum-v1", steps=400, extra=SMALL):
    command = [sys.executable, str(ROOT / "benchmark" / "study.py"), "--tasks", task]
    command += ["--seeds", "7", "--runs-dir", str(folder / "runs"), "--csv", str(folder / "x.csv")]
    command += ["--total-timesteps", str(steps), *arguments, "--", *extra]
    return subprocess.run(command, capture_output=True, text=True)


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """CUP and SAC on Pendulum-v1, collected; no test changes it."""
    folder = tmp_path_factory.mktemp("study")
    assert study(folder).returncode == 0
    assert study(folder, "--collect").returncode == 0
    return folder


def test_the_csv_has_every_evaluation_with_its_settings_and_commit(done):
    logged = read(done / "runs" / "Pendulum-v1__cup__7" / "metrics.csv")
    found = [row for row in read(done / "x.csv") if row["method"] == "cup"]
    assert [int(row["step"]) for row in found] == [100, 200, 300, 400]
    for row in found:
        (there,) = [x for x in logged if x["step"] == row["step"]]
        assert float(row["eval/return"]) == pytest.approx(float(there["eval/return"]), rel=1e-4)
        names = ("random-1", "random-2", "target")
        assert sum(float(row[SHARE + name]) for name in names) == pytest.approx(1, abs=1e-3)
        settings = json.loads(row["settings"])
        assert settings["batch_size"] == 8 and settings["hidden_sizes"] == [8]
        assert "gamma" not in settings and row["commit"].endswith(" cup.py")
    # the shares are means over the rows since the evaluation before
    since = [float(x[SHARE + "target"]) for x in logged if 100 < int(x["step"]) <= 200]
    assert float(found[1][SHARE + "target"]) == pytest.approx(sum(since) / len(since), rel=1e-3)


def test_sac_has_no_sources(done):
    sac = [row for row in read(done / "x.csv") if row["method"] == "sac"]
    assert len(sac) == 4 and not any(row[SHARE + "target"] for row in sac)


@pytest.mark.parametrize("steps, more", [(200, []), (400, ["--gamma", "0.9"])])
def test_a_shorter_run_or_one_with_other_settings_replaces_nothing(done, tmp_path, steps, more):
    before = (done / "x.csv").read_text()
    (tmp_path / "x.csv").write_text(before)
    options = {"steps": steps, "extra": [*SMALL, *more]}
    assert study(tmp_path, "--methods", "cup", **options).returncode == 0
    assert (tmp_path / "x.csv").read_text() == before  # a run changes no results
    result = study(tmp_path, "--methods", "cup", "--collect", **options)
    assert result.returncode == 1 and "Pendulum-v1__cup__7 left out" in result.stdout
    assert (tmp_path / "x.csv").read_text() == before


def test_a_longer_run_replaces_a_shorter_one(done, tmp_path):
    shorter = [row for row in read(done / "x.csv") if int(row["step"]) < 300]
    with open(tmp_path / "x.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, shorter[0])
        writer.writeheader()
        writer.writerows(row | {"eval/return": "0"} for row in shorter)
    command = "--runs-dir", str(done / "runs"), "--methods", "cup", "--collect"
    assert "4 evaluations replace 2" in study(tmp_path, *command).stdout
    cup = [row for row in read(done / "x.csv") if row["method"] == "cup"]
    sac = [row | {"eval/return": "0"} for row in shorter if row["method"] == "sac"]
    assert read(tmp_path / "x.csv") == cup + sac


def test_an_id_with_a_colon_and_a_slash_is_collected(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "gym.register('mine/Swing-v0', PendulumEnv, max_episode_steps=50)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    task = "my_tasks:mine/Swing-v0"
    for arguments in (["--methods", "sac"], ["--methods", "sac", "--collect"]):
        assert study(tmp_path, *arguments, task=task).returncode == 0
    assert {row["env_id"] for row in read(tmp_path / "x.csv")} == {task}


def test_a_failed_run_fails_the_study_and_the_others_go_on(tmp_path):
    result = study(tmp_path, "--methods", "nobody", "none", "sac", steps=200)
    assert result.returncode == 1
    assert (tmp_path / "runs" / "Pendulum-v1__sac__7" / "policy.pt").exists()


def test_speed_writes_every_measurement(tmp_path):
    pytest.importorskip("stable_baselines3")
    command = [sys.executable, str(ROOT / "benchmark" / "speed.py"), "--env-id", "Pendulum-v1"]
    command += ["--programs", "sac", "sb3", "--threads", "1", "--rounds", "1", "--steps", "100"]
    result = subprocess.run([*command, "--out", str(tmp_path / "x.csv")], capture_output=True)
    assert result.returncode == 0, result.stderr
    rows = read(tmp_path / "x.csv")
    assert [row["program"] for row in rows] == ["sac", "sb3"]
    assert all(float(row["steps_per_second"]) > 0 for row in rows)
