"""What the four baselines have in common: runs, checkpoints, the command line."""

import signal
from pathlib import Path

import pytest
from program import (
    PENDULUM, call_cup, checkpoint_of, finish, metrics, one_sentence, same_result, started_run,
    succeed, weights,
)

import cup
from baselines import haar, mamba, multipolar, ptf

CLASSES = {
    "haar": (haar.Args, haar.HAAR),
    "mamba": (mamba.Args, mamba.Mamba),
    "multipolar": (multipolar.Args, multipolar.Multipolar),
    "ptf": (ptf.Args, ptf.PTF),
}
FLAGS = {
    "haar": "--k 7 --guidance-starts 200",  # segments do not divide an episode
    "mamba": "--value-updates 5 --rollout-share 0.7",
    "multipolar": "",
    "ptf": "--guidance-starts 200",
}
OWN_POLICY = {"haar": "skills.1.net.4.bias", "multipolar": "theta"}  # no cup.Actor: no source


@pytest.mark.parametrize("name", CLASSES)
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path, name: str):
    """Its one checkpoint is in the middle of the episodes, of 40 steps in both environments."""
    arguments = [*PENDULUM, "--env-id", "faulty_envs:Walk-v0", "--checkpoint-interval", 700]
    arguments += FLAGS[name].split()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    succeed(*arguments, "--run-dir", whole, classes=CLASSES[name])
    script = Path(cup.__file__).parent / f"baselines/{name}.py"
    longer = [*arguments, "--total-timesteps", 1380]  # before it ends there is time for the kill
    process = started_run(killed, *longer, script=script, rows=36)
    process.send_signal(signal.SIGKILL)
    assert finish(process).returncode == -signal.SIGKILL
    checkpoint = checkpoint_of(killed)
    if name == "mamba":  # a source has taken over
        assert any(len(path) for path in checkpoint["agent"]["_extra_state"]["paths"])
    succeed(*arguments, "--run-dir", killed, "--resume", classes=CLASSES[name])
    assert same_result(whole, killed)

    last = metrics(whole)[-1]
    assert all(last.values()) and not any("success" in name for name in last)  # Pendulum has none
    if name in OWN_POLICY:
        assert OWN_POLICY[name] in weights(whole)
        with pytest.raises(cup.UserError, match="not a policy file"):
            cup.load_policy(whole / "policy.pt")
    else:
        assert cup.load_policy(whole / "policy.pt").obs_dim == 2


def test_the_run_of_another_method_is_left_alone(tmp_path: Path):
    arguments = [*PENDULUM, "--total-timesteps", 60, "--run-dir", tmp_path / "run", "--resume"]
    succeed(*arguments, classes=CLASSES["multipolar"])
    result = call_cup(*arguments)
    assert one_sentence(result, "was started with method = multipolar, not cup"), result.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("haar", "--sources", "HAAR's skills"), ("haar", "--k 0", "--k is out"),
        ("haar", "--gamma-h 1.5", "must not exceed"), ("haar", "--k 2000", "--learning-starts"),
        ("mamba", "--sources", "MAMBA improves on source policies"),
        ("mamba", "--gae-lambda 1.5", "--gae-lambda"), ("mamba", "--rollout-share 2", "0 to 1"),
        ("mamba", "--rollout-share 0", "without roll-outs"),
        ("mamba", "--value-updates 0", "--value-updates is out"),
        ("multipolar", "--sources", "MULTIPOLAR aggregates"),
        *((name, "--compile", "--compile knows") for name in CLASSES),
        ("ptf", "--sources", "PTF imitates"), ("ptf", "--c -1", "--c is out"),
        ("ptf", "--xi -1", "--xi is out"),
    ],
)
def test_bad_input_is_a_usage_error(name: str, arguments: str, complaint: str):
    result = call_cup("--env-id", "Pendulum-v1", *arguments.split(), classes=CLASSES[name])
    assert result.returncode == 2
    assert complaint in result.stderr


def test_the_ends_of_mambas_ranges_are_allowed():
    for share in (0.0, 1.0):
        mamba.Args(env_id="x", cuda=False, gae_lambda=1.0 - share, rollout_share=share)
