"""What the four baselines have in common: runs, checkpoints, the command line."""

import signal
from pathlib import Path
from unittest import mock

import gymnasium as gym
import pytest
from program import SMALL, call_cup, checkpoint_of, metrics, same_policy, started_run, succeed

from baselines import haar, mamba, multipolar, ptf

CLASSES = {
    "haar": (haar.Args, haar.HAAR),
    "mamba": (mamba.Args, mamba.Mamba),
    "multipolar": (multipolar.Args, multipolar.Multipolar),
    "ptf": (ptf.Args, ptf.PTF),
}
gym.register("Short-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=40)
# in two environments: checkpoints cut episodes, and the buffers are full at the second
ENV = "test_baselines:Short-v0"
SHORT = f"--env-id {ENV} --sources --total-timesteps 320 --checkpoint-interval 130"
SHORT = [*SHORT.split(), *SMALL, "--buffer-size", 30, "--eval-interval", 300]
FLAGS = {"haar": "--k 7", "mamba": "--first-rollouts 2 --value-updates 5 --rollout-share 0.8"}


def arguments(name: str, run_dir: Path) -> list:
    return [*SHORT, "--num-random-sources", 2, *FLAGS.get(name, "").split(), "--run-dir", run_dir]


@pytest.mark.parametrize("name", CLASSES)
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path: Path, name: str):
    whole, other = tmp_path / "whole", tmp_path / "other"
    succeed(*arguments(name, whole), classes=CLASSES[name])
    with mock.patch("cup.evaluate", side_effect=KeyboardInterrupt):
        assert call_cup(*arguments(name, other), classes=CLASSES[name]).returncode == 130
    assert checkpoint_of(other)["step"] == 260
    succeed(*arguments(name, other), "--resume", classes=CLASSES[name])
    rows = metrics(whole)
    assert rows == metrics(other)
    assert all(rows[-1][column] for column in rows[-1] if "success" not in column)  # all is known
    assert checkpoint_of(whole)["args"]["method"] == name
    assert call_cup(*SHORT, "--run-dir", whole, "--resume").returncode == 2  # SAC: another's run
    is_policy = name in ("mamba", "ptf")  # whose actor is SAC's
    assert (whole / "policy.pt").exists() == is_policy
    assert not is_policy or same_policy(whole, other)


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    succeed(*arguments("mamba", whole), classes=CLASSES["mamba"])
    longer = [*arguments("mamba", killed), "--total-timesteps", 3000]  # there is time for the kill
    process = started_run(killed, *longer, script=mamba.__file__, rows=8)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    succeed(*arguments("mamba", killed), "--resume", classes=CLASSES["mamba"])
    assert metrics(whole) == metrics(killed) and same_policy(whole, killed)


@pytest.mark.parametrize(
    ("name", "flags"),
    [("mamba", "--gae-lambda 1 --first-rollouts 0 --rollout-share 0"), ("ptf", "--c 0")],
)
def test_without_its_part_a_method_is_sac_to_the_last_digit(tmp_path: Path, name: str, flags: str):
    succeed(*SHORT, "--run-dir", tmp_path / "sac")
    succeed(*arguments(name, tmp_path / name), *flags.split(), classes=CLASSES[name])
    sac, ours = metrics(tmp_path / "sac"), metrics(tmp_path / name)
    assert len(sac) > 10 and sac == [{column: row[column] for column in sac[0]} for row in ours]
    assert same_policy(tmp_path / "sac", tmp_path / name)


@pytest.mark.parametrize(
    ("name", "flags", "complaint"),
    [
        *((name, "--sources", name.upper()) for name in CLASSES),
        ("mamba", "--gae-lambda 1.5", "from 0 to 1"), ("mamba", "--rollout-share 2", "from 0 to 1"),
        ("mamba", "--first-rollouts 0", "--first-rollouts 0 needs"),
    ],
)
def test_bad_input_is_a_usage_error(name: str, flags: str, complaint: str):
    result = call_cup("--env-id", "Pendulum-v1", *flags.split(), classes=CLASSES[name])
    assert result.returncode == 2 and complaint in result.stderr
