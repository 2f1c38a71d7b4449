"""Runs that stop, are killed or starved; environments and files of users."""

import resource

import numpy as np
import program
import pytest
import torch
from program import PENDULUM, SMALL, call_cup, checkpoint_of, metrics, one_sentence, succeed

import cup

HIDDEN = ["--env-id", "faulty_envs:Hidden-v0", *PENDULUM[2:], "--resume", "--run-dir"]


def test_killed_and_resumed_equals_unbroken(tmp_path):
    """Killed in step 62, with rows up to step 60; the checkpoint is that of the beginning."""
    assert program.run_cup(*HIDDEN, tmp_path / "killed", DIE_AT="31").returncode == 9
    checkpoint, rows = checkpoint_of(tmp_path / "killed"), metrics(tmp_path / "killed")
    assert (checkpoint["step"], rows[-1]["step"]) == (0, "60")
    weights = (checkpoint["agent"][f"{name}.net.0.weight"] for name in ("actor", "sources.0"))
    assert not torch.equal(*weights)  # no random source is the learner itself
    for name in ("killed", "whole"):
        succeed(*HIDDEN, tmp_path / name)
    assert program.same_result(tmp_path / "whole", tmp_path / "killed")


def test_a_run_that_ended_at_a_checkpoint_may_become_longer(tmp_path):
    """As if it had never ended, whatever has become of its source. Updates come every 200 steps."""
    source = tmp_path / "drücken.pt"
    for name, total, seed in [("whole", 1000, 0), ("longer", 400, 0), ("longer", 1000, 1)]:
        torch.manual_seed(seed)
        cup.save(cup.policy_content(cup.Actor(2, 1, [8])), source)
        typed = ["--utd-ratio", 0.005, "--eval-interval", 400, "--total-timesteps", total]
        succeed(*HIDDEN, tmp_path / name, *typed, "--sources", source)
    assert program.same_result(tmp_path / "whole", tmp_path / "longer")


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
    assert checkpoint_of(tmp_path)["step"] == 400
    succeed(*typed)
    assert program.same_result(pendulum[0], tmp_path)


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
    assert program.same_result(pendulum[0], tmp_path)


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


def test_an_environment_of_many_peculiarities(tmp_path, monkeypatch):
    """`faulty_envs.Odd`, a seed of 128 bits, and a buffer that forgets the first context. The saved
    policy is the one that was scored."""
    monkeypatch.setenv("HOME", str(tmp_path))
    typed = ["--env-id", "faulty_envs:Odd-v0", "--sources", *SMALL, "--seed", 2**128 - 1]
    typed += ["--total-timesteps", 800, "--eval-episodes", 6, "--buffer-size", 40]
    succeed(*typed, "--run-dir=~/run")
    policy, last = cup.load_policy(tmp_path / "run/policy.pt"), metrics(tmp_path / "run")[-1]
    assert policy.net[0].weight.dtype == torch.get_default_dtype() == torch.float32
    scale = policy.standardize.scale  # 0 for what is never there; a Unix time counts steps
    assert (scale > 0).tolist() == [True, True, False, True, True, True]
    assert scale[4] == pytest.approx(scale[5])
    seed = cup.derive_seed(2**128 - 1, 1, 800, 0)
    evaluation = np.array(cup.evaluate(policy, "faulty_envs:Odd-v0", 6, seed))
    training = np.array(checkpoint_of(tmp_path / "run")["episodes"])[-20:]
    for prefix, scores in (("train", training), ("eval", evaluation)):
        # an episode that says nothing of success is a failure, as others do
        assert set(scores[:, 1]) >= {1} and np.isnan(scores[:, 1]).any()
        assert float(last[f"{prefix}/success_rate"]) == np.mean(scores[:, 1] == 1)
        assert float(last[f"{prefix}/return"]) == pytest.approx(scores[:, 0].mean(), rel=1e-12)


def test_a_file_that_is_no_policy_is_refused_and_its_code_does_not_run(tmp_path):
    """A stored Path would be made by its code."""
    path, content = tmp_path / "policy.pt", cup.policy_content(cup.Actor(3, 1, [8]))
    contents = [content | {name: path} for name in ("actor", "weights", "env_id")]
    contents += [path, None, {"actor": content["actor"]}]
    contents += [content | {"weights": content["weights"] | {"net.0.bias": torch.zeros(9)}}]
    for wrong in contents:
        torch.save(wrong, path)
        with pytest.raises(cup.UserError, match="policy.pt is not a policy file"):
            cup.load_policy(path)
