"""train_sources.py: when a policy is accepted, which one is kept, and the real command line."""

import subprocess
from pathlib import Path

import pytest
from program import one_sentence, run_cup

import cup
import train_sources as script

NAN = float("nan")


def train(tmp_path, monkeypatch, *scores, target_success=0.95):
    """Three intervals of `train` with these scores: the steps of cup.py, the goals, the file."""
    steps, goals, scores = [], [], list(scores)

    def run_cup(command, **_):
        steps.append(int(command[-1]))
        path = Path(command[command.index("--run-dir") + 1]) / "policy.pt"
        cup.save(cup.policy_content(cup.Actor(39, 4, (8,)), step=steps[-1]), path)
        return subprocess.CompletedProcess(command, 0)
    def score(actor, env_id, n, seeds, sample=False):
        goals.append((*seeds[2:], sample))
        return scores.pop(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.subprocess, "run", run_cup)
    monkeypatch.setattr(script, "score", score)
    args = {"total_timesteps": 144_000, "output_dir": tmp_path, "target_success": target_success}
    script.train(script.Args(**args), "reach-v2")
    return steps, goals, cup.load_policy(tmp_path / "reach-v2.pt").about


@pytest.mark.parametrize("stopped, target, scores, steps, best", [
    (False, 0.95, [(0.2, 1), (0.6, 2), (0.4, 3)], [48000, 96000, 144000], 96000),
    (False, 0.95, [(NAN, -9), (NAN, -5), (NAN, -7)], [48000, 96000, 144000], 96000),  # by return
    (False, 0.9, [(0.96, 1), (0.88, 1), (0.9, 1), (0.94, 1)], [48000, 96000], 96000),  # two tests
    (True, 0.95, [(0.5, 1), (0.4, 1)], [96000, 144000], 48000),  # best before the stop
    (True, 0.9, [(0.9, 1), (0.9, 1)], [96000], 96000),  # two tests of 90 % beat one of 93 %
])
def test_the_best_policy_is_kept(tmp_path, monkeypatch, stopped, target, scores, steps, best):
    """Until one passes two tests, or the steps are over; a third scores it. All goals differ."""
    if stopped:  # in the second test, for want of a score
        with pytest.raises(IndexError):
            train(tmp_path, monkeypatch, (0.93, 1.0))
    scores = [*scores, (0.5, 4.0), (0.4, 3.0)]
    taken, goals, about = train(tmp_path, monkeypatch, *scores, target_success=target)
    expected = {"step": best, "success_rate": 0.5, "return": 4.0, "sampled_success_rate": 0.4}
    assert taken == steps and expected.items() < about.items()
    assert goals[-2:] == [(best, 3, False), (best, 3, True)] and len(set(goals)) == len(goals)


def test_a_task_that_fails_leaves_the_others_alone(tmp_path, monkeypatch):
    """And one that has its file is not trained again."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/done-v2.pt").touch()
    typed = "--env-ids rech-v2 Pendulum-v1 done-v2 --output-dir out"
    typed += " --workers 2 --total-timesteps 8100 --test-episodes 2"
    result = run_cup(*typed.split(), script=script.__file__)
    assert result.stdout.startswith("to make in out: rech-v2 Pendulum-v1\n"), result
    assert one_sentence(result, "rech-v2 failed: cup.py: cannot ")
    about = cup.load_policy("out/Pendulum-v1.pt").about
    assert about["step"] == 8112 and -2000 < about["return"] < 0  # 16 environments


def test_a_controller_becomes_a_source(tmp_path):
    args = script.Args(output_dir=tmp_path, test_episodes=2)
    script.clone_controller(args, "drawer-close-v2", episodes=2, updates=300)
    actor = cup.load_policy(tmp_path / "drawer-close-v2.pt")
    assert actor.about["success_rate"] == actor.about["sampled_success_rate"] == 1
    assert actor.standardize.scale.min() == 0  # observations that the task leaves empty
    with pytest.raises(cup.UserError, match="no controller for Pendulum-v1"):
        script.clone_controller(args, "Pendulum-v1")
