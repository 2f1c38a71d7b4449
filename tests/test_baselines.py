"""What the four baselines have in common: runs, checkpoints, the command line."""

from pathlib import Path
from unittest import mock

import pytest
from program import ROOT, SMALL, call_cup, checkpoint_of, metrics, same_policy, succeed

SCRIPTS = {name: ROOT / f"baselines/{name}.py" for name in ("haar", "mamba", "multipolar", "ptf")}
# episodes of up to 40 steps: checkpoints cut them, and the buffers are full at the second
SHORT = "--env-id faulty_envs:Hidden-v0 --sources --total-timesteps 320 --checkpoint-interval 130"
SHORT = [*SHORT.split(), *SMALL, "--buffer-size", 30, "--eval-interval", 300]
FLAGS = {"haar": "--k 7", "mamba": "--first-rollouts 2 --value-updates 5 --rollout-share 0.8"}


def arguments(name: str, run_dir: Path) -> list:
    return [*SHORT, "--num-random-sources", 2, *FLAGS.get(name, "").split(), "--run-dir", run_dir]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path: Path, name: str):
    whole, other = tmp_path / "whole", tmp_path / "other"
    succeed(*arguments(name, whole), script=SCRIPTS[name])
    with mock.patch("cup.evaluate", side_effect=KeyboardInterrupt):
        assert call_cup(*arguments(name, other), script=SCRIPTS[name]).returncode == 130
    assert checkpoint_of(other)["step"] == 260
    succeed(*arguments(name, other), "--resume", script=SCRIPTS[name])
    rows = metrics(whole)
    assert rows == metrics(other)
    assert all(rows[-1][column] for column in rows[-1] if "success" not in column)  # all is known
    assert checkpoint_of(whole)["args"]["method"] == name
    assert call_cup(*SHORT, "--run-dir", whole, "--resume").returncode == 2  # SAC: another's run
    is_policy = name in ("mamba", "ptf")  # whose actor is SAC's
    assert (whole / "policy.pt").exists() == is_policy
    assert not is_policy or same_policy(whole, other)


@pytest.mark.parametrize(("name", "flags", "is_sac"), [
    ("mamba", "--gae-lambda 1 --first-rollouts 0 --rollout-share 0", True),
    ("ptf", "--c 0", True), ("ptf", "--guidance-starts 319", True), ("ptf", "", False),
])
def test_without_its_part_a_method_is_sac_to_the_last_digit(tmp_path, name, flags, is_sac):
    succeed(*SHORT, "--run-dir", tmp_path / "sac")
    succeed(*arguments(name, tmp_path / name), *flags.split(), script=SCRIPTS[name])
    sac, ours = metrics(tmp_path / "sac"), metrics(tmp_path / name)
    same = [{column: row[column] for column in sac[0]} for row in ours] == sac
    assert len(sac) > 10 and same == is_sac == same_policy(tmp_path / "sac", tmp_path / name)


@pytest.mark.parametrize(("name", "flags", "complaint"), [
    *((name, "--sources", name.upper()) for name in SCRIPTS),
    ("mamba", "--gae-lambda 1.5", "from 0 to 1"), ("mamba", "--rollout-share 2", "from 0 to 1"),
    ("mamba", "--first-rollouts 0", "--first-rollouts 0 needs"),
    ("haar", "--k 0", "--k times"), ("haar", "--k 1251", "--k times"),
])
def test_bad_input_is_a_usage_error(name: str, flags: str, complaint: str):
    result = call_cup("--env-id", "Pendulum-v1", *flags.split(), script=SCRIPTS[name])
    assert result.returncode == 2 and complaint in result.stderr
