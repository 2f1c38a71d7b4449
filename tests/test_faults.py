"""Runs that stop, are killed or starved; environments and files of users."""

import os
import resource
import signal

import numpy as np
import pytest
import torch
from program import (
    PENDULUM,
    SMALL,
    call_cup,
    checkpoint_of,
    finish,
    metrics,
    one_sentence,
    read_csv,
    run_cup,
    same_result,
    started_run,
    steps,
    succeed,
)

import cup

HIDDEN = ["--env-id", "faulty_envs:Hidden-v0", *PENDULUM[2:]]


# ---- resumed equals unbroken ---------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "row", "saved"), [(PENDULUM, 460, 400), (HIDDEN, 60, 0)])
def test_killed_and_resumed_equals_unbroken(tmp_path, kind, row, saved):
    succeed(*kind, "--run-dir", tmp_path / "whole")
    process = started_run(tmp_path / "killed", *kind, row=row)
    process.kill()
    assert finish(process).returncode == -signal.SIGKILL
    checkpoint = checkpoint_of(tmp_path / "killed")
    assert checkpoint["step"] == saved
    weights = (checkpoint["agent"][f"{name}.net.0.weight"] for name in ("actor", "sources.0"))
    assert not torch.equal(*weights)  # no random source is the learner itself
    succeed(*kind, "--run-dir", tmp_path / "killed", "--resume")
    assert same_result(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("first", [400, 600])
def test_a_run_may_become_longer(tmp_path, first):
    """As if it had never ended, if it ended at a checkpoint. Updates come every 200 steps."""
    typed = [*HIDDEN, "--utd-ratio", 0.005, "--eval-interval", 400, "--resume", "--run-dir"]
    for name, total in [("whole", 1000), ("longer", first), ("longer", 1000)]:
        succeed(*typed, tmp_path / name, "--total-timesteps", total)
    assert same_result(tmp_path / "whole", tmp_path / "longer") == (first == 400)
    taken = steps(tmp_path / "longer")
    assert taken == sorted(set(taken)) and taken[-1] == 1000
    rows = read_csv(tmp_path / "longer" / "metrics.csv")
    seconds = [float(row["time/seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_ctrl_c_in_an_evaluation(pendulum, tmp_path, monkeypatch):
    """And while that went on, a second command in the same directory was refused."""
    typed, refused = [*PENDULUM, "--resume", "--run-dir", tmp_path], []

    def interrupt(*arguments):
        refused.append(call_cup(*typed))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cup, "evaluate", interrupt)
        result = call_cup(*typed)
    assert one_sentence(*refused, f"another process trains in {tmp_path}"), refused
    assert (result.returncode, result.stderr) == (130, "")
    assert "--resume" in result.stdout.splitlines()[-1]
    succeed(*typed)
    assert same_result(pendulum[0], tmp_path)


def test_a_full_disk_is_a_sentence_and_the_old_checkpoint_stays(pendulum, tmp_path):
    """No file may be as large as the later checkpoints."""
    typed, (soft, hard) = [*PENDULUM, "--resume"], resource.getrlimit(resource.RLIMIT_FSIZE)
    size = int(0.8 * (pendulum[0] / "checkpoint.pt").stat().st_size)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        result = call_cup(*typed, "--run-dir", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert one_sentence(result, "cannot write .*checkpoint.pt", "disk"), result.stderr
    assert checkpoint_of(tmp_path)["step"] == 400
    succeed(*typed, "--run-dir", tmp_path)  # the user made room
    assert same_result(pendulum[0], tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """Its checkpoint is that of the beginning; the networks there depend on the seed."""
    typed, weights = [*PENDULUM[2:], "--env-id", "faulty_envs:Huge-v0"], []
    for seed in (1, 2):
        run_dir = tmp_path / str(seed)
        result = call_cup(*typed, "--seed", seed, "--run-dir", run_dir)
        assert one_sentence(result, "loss is not finite at step 22"), result.stderr
        assert {path.name for path in run_dir.glob("*.pt")} == {"checkpoint.pt"}
        weights.append(checkpoint_of(run_dir)["agent"]["actor.net.0.weight"])
    assert not torch.equal(*weights)


# ---- environments and files of users -------------------------------------------------------------
def test_an_environment_of_many_peculiarities(tmp_path, monkeypatch):
    """`faulty_envs.Odd`, with a buffer that forgets most contexts and a seed of 128 bits."""
    monkeypatch.setenv("HOME", str(tmp_path))
    typed = ["--env-id", "faulty_envs:Odd-v0", "--sources", *SMALL, "--buffer-size", 40]
    typed += ["--total-timesteps", 320, "--eval-interval", 160, "--eval-episodes", 6]
    succeed(*typed, "--seed", 2**128 - 1, "--run-dir=~/run")
    run_dir = tmp_path / "run"
    policy, rows = cup.load_policy(run_dir / "policy.pt"), metrics(run_dir)
    scale = policy.standardize.scale
    assert (scale > 0).all() and scale[4] == pytest.approx(scale[5])  # a Unix time counts steps

    # the saved policy is the one that was scored
    seed = cup.derive_seed(2**128 - 1, 1, 320, 0)
    evaluation = np.array(cup.evaluate(policy, "faulty_envs:Odd-v0", 6, seed))
    assert evaluation[:, 0].mean() == pytest.approx(float(rows[-1]["eval/return"]), rel=1e-12)
    # an episode that says nothing of success is a failure, as others do
    training = np.array(checkpoint_of(run_dir)["episodes"])
    for prefix, scores in (("train", training), ("eval", evaluation)):
        assert set(scores[:, 1]) >= {1} and np.isnan(scores[:, 1]).any()
        assert float(rows[-1][f"{prefix}/success_rate"]) == np.mean(scores[:, 1] == 1)
    assert [row["step"] for row in rows if row["eval/success_rate"]] == ["160", "320"]

    torch.set_default_dtype(torch.float64)  # as a module of the user's may do
    obs = torch.ones(1, 6)
    in_double = cup.load_policy(run_dir / "policy.pt")(obs)
    torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(in_double, policy(obs), check_dtype=False)


def save_policy(path, seed=0):
    torch.manual_seed(seed)
    cup.save(cup.policy_content(cup.Actor(3, 1, [8])), path)
    return path


def test_the_sources_of_the_checkpoint_decide(tmp_path):
    """Whatever has become of their files between a stop and --resume."""
    for name, seed in [("whole", 0), ("replaced", 1)]:
        typed = [*PENDULUM, "--sources", save_policy(tmp_path / "source.pt"), "--resume"]
        typed += ["--eval-interval", 400, "--run-dir", tmp_path / name, "--total-timesteps"]
        succeed(*typed, 400)
        save_policy(tmp_path / "source.pt", seed)
        succeed(*typed, 600)
    assert same_result(tmp_path / "whole", tmp_path / "replaced")


def test_metrics_are_utf_8_in_any_locale(tmp_path):
    source, run_dir = save_policy(tmp_path / "drücken.pt"), tmp_path / "run"
    typed = ["--env-id", "Pendulum-v1", "--sources", source, *SMALL, "--total-timesteps", 60]
    ascii_only = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    result = run_cup(*typed, "--run-dir", run_dir, **ascii_only)
    assert result.returncode == 0, result.stderr
    assert 0 <= float(metrics(run_dir)[-1]["guidance/selected/drücken"]) <= 1


class Touch:
    """Unpickling this creates a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_is_no_policy_is_refused_and_its_code_does_not_run(tmp_path):
    path, marker = save_policy(tmp_path / "policy.pt"), tmp_path / "executed"
    content = torch.load(path, weights_only=True)
    contents = [content | {name: Touch(marker)} for name in ("actor", "weights", "env_id")]
    contents += [Touch(marker), None, [content], {"actor": content["actor"]}]
    contents += [content | {"weights": content["weights"] | {"net.0.bias": torch.zeros(9)}}]
    for wrong in contents:
        torch.save(wrong, path)
        with pytest.raises(cup.UserError, match="policy.pt is not a policy file"):
            cup.load_policy(path)
    assert not marker.exists()
