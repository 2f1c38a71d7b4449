"""Nothing lost, nothing let in: runs that stop, are killed, starved or fed garbage."""

import contextlib
import os
import pickle
import re
import resource
import shutil
import signal
import time

import faulty_envs
import pytest
import torch
from program import (
    PENDULUM, SMALL, call_cup, finish, metrics, same_policy, same_result, start_cup, started_run,
    steps,
)

import cup

PENDULUM = [*PENDULUM, "--resume"]  # starts, goes on, or says that it is finished
WALK = [*SMALL, "--total-timesteps", 60, "--eval-interval", 40, "--checkpoint-interval", 20]
WALK += ["--resume", "--sources", "--env-id"]


def checkpoint_of(run_dir) -> dict:
    """One that is whole and loads."""
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def one_sentence(result, words: str = "") -> bool:
    pattern = rf"cup\.py: [^\n]*{words}[^\n]*\n"
    return result.returncode == 2 and re.fullmatch(pattern, result.stderr) is not None


# ---- the same command, again and again -----------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_resume_equals_no_stop(pendulum, tmp_path, number):
    process = started_run(tmp_path / "run", *PENDULUM, rows=5)
    process.send_signal(number)
    result = finish(process)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"stopped at step \S+: the same command with --resume goes on", result.stdout)
    assert call_cup(*PENDULUM, "--run-dir", tmp_path / "run").returncode == 0
    assert same_result(pendulum[0], tmp_path / "run")


def test_killed_before_its_first_checkpoint(pendulum, tmp_path):
    shutil.copytree(pendulum[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    assert call_cup(*PENDULUM, "--run-dir", tmp_path / "run").returncode == 0
    assert same_result(pendulum[0], tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle_of_an_evaluation(tmp_path, number):
    """Ctrl-C does not wait for its end; and it comes again, with the same goals."""
    walk = [*WALK, "faulty_envs:Slow-v0", "--eval-episodes", 40, "--run-dir"]
    assert call_cup(*walk, tmp_path / "whole").returncode == 0
    process = started_run(tmp_path / "run", *walk[:-1], rows=1, environment={"SLOW": "0.02"})
    time.sleep(1.5)  # the next 20 steps take 0.4 s, the evaluation 32 s
    process.send_signal(number)
    start = time.monotonic()
    result = finish(process)
    assert time.monotonic() - start < 20
    assert result.returncode == (0 if number == signal.SIGINT else -number)
    assert steps(tmp_path / "run") == [20]
    assert checkpoint_of(tmp_path / "run")["step"] == (40 if number == signal.SIGINT else 20)
    assert call_cup(*walk, tmp_path / "run").returncode == 0
    assert same_result(tmp_path / "whole", tmp_path / "run")


def test_rows_from_after_the_checkpoint_come_again(tmp_path):
    """However often the run goes on, and where it ends before the next row."""
    walk = [*WALK, "faulty_envs:Raises-v0", "--run-dir", tmp_path / "run"]
    walk += ["--total-timesteps", 200, "--eval-interval", 200, "--log-interval", 40]
    for _ in range(3):
        with pytest.raises(RuntimeError):
            call_cup(*walk)  # it fails in step 60, and at once from then on
        assert steps(tmp_path / "run") == [40]
        with open(tmp_path / "run" / "metrics.csv", "a") as file:
            file.write("60,1.0,1.0\n")  # as if it had been killed later


def test_ctrl_c_in_an_evaluation_that_never_ends(tmp_path):
    path = tmp_path / "policy.pt"
    cup.save(cup.policy_content(cup.Actor(2, 1, [8])), path)
    arguments = ["--evaluate", path, "--env-id", "faulty_envs:Endless-v0", "--eval-episodes", 1]
    process = start_cup(*arguments, environment={"PYTHONUNBUFFERED": "1"})
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


def test_metaworld_resumes_in_the_middle_of_an_episode(tmp_path):
    arguments = [*SMALL, "--env-id", "reach-wall-v2", "--sources", "--num-random-sources", 1]
    arguments += ["--eval-interval", 60, "--resume", "--run-dir"]
    for name, total in [("whole", 60), ("parts", 40), ("parts", 60)]:
        result = call_cup(*arguments, tmp_path / name, "--total-timesteps", total)
        assert result.returncode == 0, result.stderr
    # step 60, with the evaluation; the shorter run has made one at its end, at step 40
    assert metrics(tmp_path / "whole")[2] == metrics(tmp_path / "parts")[2]
    assert same_policy(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_says_so_and_a_longer_one_goes_on(pendulum, tmp_path):
    run_dir = tmp_path / "copy"  # a run directory may also be moved
    shutil.copytree(pendulum[0], run_dir)
    before = metrics(run_dir)
    result = call_cup(*PENDULUM, "--run-dir", run_dir)
    assert result.returncode == 0
    assert "is finished" in result.stdout
    assert metrics(run_dir) == before

    result = call_cup(*PENDULUM, "--run-dir", run_dir, "--total-timesteps", 1040)
    assert result.returncode == 0, result.stderr
    assert metrics(run_dir)[:50] == before
    assert steps(run_dir) == list(range(20, 1041, 20))
    assert "finished 1,040 steps" in result.stdout


def test_a_run_from_a_gpu_goes_on_without_one(pendulum, tmp_path):
    shutil.copytree(pendulum[0], tmp_path / "run")
    checkpoint = checkpoint_of(tmp_path / "run")
    checkpoint["args"]["cuda"] = True
    torch.save(checkpoint, tmp_path / "run" / "checkpoint.pt")
    arguments = ["--run-dir", tmp_path / "run", "--total-timesteps", 1040, "--no-cuda"]
    result = call_cup(*PENDULUM, *arguments)
    assert result.returncode == 0, result.stderr
    assert steps(tmp_path / "run")[-1] == 1040


# ---- full disk, lost disk ------------------------------------------------------------------------
def test_full_disk(pendulum, tmp_path):
    """No file may exceed 60 kB: there is room for the first checkpoints only."""

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    run_dir = tmp_path / "run"
    result = finish(start_cup(*PENDULUM, "--run-dir", run_dir, preexec_fn=small_disk))
    assert one_sentence(result, rf"cannot write {run_dir}/checkpoint\.pt .+ intact"), result.stderr
    assert 0 < checkpoint_of(run_dir)["step"] < 1000
    assert not list(run_dir.glob("*.tmp"))
    assert call_cup(*PENDULUM, "--run-dir", run_dir).returncode == 0  # the user made room
    assert same_result(pendulum[0], run_dir)


def test_run_directory_removed(tmp_path):
    process = started_run(tmp_path / "run", *PENDULUM, "--total-timesteps", 10**7)
    shutil.rmtree(tmp_path / "run")
    result = finish(process)
    assert one_sentence(result, "cannot write"), result.stderr


# ---- environments that go wrong ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "step", "words"),
    [
        ("Raises", 58, "the gripper fell off"),
        ("RaisesLate", 40, "the gripper fell off"),  # in the evaluation
        ("RaisesAtReset", 78, "the table is missing"),
        ("NotANumber", 58, "NaN or infinity"),
    ],
)
def test_a_fault_is_the_environments_own_traceback_after_a_checkpoint(tmp_path, kind, step, words):
    walk = [*WALK, f"faulty_envs:{kind}-v0", "--run-dir", tmp_path / "run"]
    walk += ["--total-timesteps", 200, "--checkpoint-interval", 1000]
    walk += ["--eval-interval", 40 if kind == "RaisesLate" else 1000]
    if kind == "NotANumber":
        assert one_sentence(call_cup(*walk), words)
    else:
        with pytest.raises(RuntimeError, match=words):
            call_cup(*walk)
    checkpoint = checkpoint_of(tmp_path / "run")
    assert checkpoint["step"] == step
    assert all(torch.isfinite(w).all() for k, w in checkpoint["agent"].items() if "actor" in k)


def test_environments_are_closed_in_the_end(tmp_path, monkeypatch):
    for kind, total in [("Walk", 60), ("Raises", 200)]:
        monkeypatch.setattr(faulty_envs.Walk, "closed", 0)
        walk = [*WALK, f"faulty_envs:{kind}-v0", "--run-dir", tmp_path / kind]
        with contextlib.suppress(RuntimeError):
            call_cup(*walk, "--total-timesteps", total)
        assert faulty_envs.Walk.closed == 4  # two to train in, two to evaluate in


def test_a_loss_of_infinity_is_one_sentence_and_the_checkpoint_from_before(tmp_path):
    arguments = [*SMALL, "--env-id", "faulty_envs:Huge-v0", "--sources", "--total-timesteps", 80]
    arguments += ["--checkpoint-interval", 20, "--eval-interval", 40]
    result = call_cup(*arguments, "--run-dir", tmp_path / "run")
    assert one_sentence(result, r"loss/critic is (inf|nan) at step 40"), result.stderr
    agent = checkpoint_of(tmp_path / "run")["agent"]
    assert all(w.isfinite().all() for name, w in agent.items() if name.startswith("actor."))
    assert not (tmp_path / "run" / "policy.pt").exists()  # nor was a good one replaced by this


# ---- policy files from elsewhere -----------------------------------------------------------------
def policy_file(path, **changes):
    cup.save(cup.policy_content(cup.Actor(3, 1, [8]), **changes), path)
    return torch.load(path, weights_only=True)


def test_tensors_that_claim_to_be_huge(tmp_path):
    """A tensor may repeat one stored number: this file of 2 kB asks for 4 GB."""
    content = policy_file(tmp_path / "policy.pt")
    content["weights"]["net.0.weight"] = torch.zeros(1).expand(2**32)
    torch.save(content, tmp_path / "policy.pt")
    with pytest.raises(cup.UserError):
        cup.load_policy(tmp_path / "policy.pt")


def test_weights_in_double_precision_are_welcome(tmp_path):
    content = policy_file(tmp_path / "policy.pt")
    before = cup.load_policy(tmp_path / "policy.pt")(torch.ones(3))
    content["weights"] = {name: w.double() for name, w in content["weights"].items()}
    torch.save(content, tmp_path / "policy.pt")
    after = cup.load_policy(tmp_path / "policy.pt")(torch.ones(3))
    assert all(map(torch.equal, before, after))


MISSING = ["actor", "weights", "obs_dim", "action_dim", "hidden_sizes"]
MISSING += ["standardize.scale", "net.0.weight", "net.2.bias"]


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_or_not_finite_is_named(tmp_path, name):
    path = tmp_path / "policy.pt"
    content = policy_file(path)
    weights = content["weights"]
    part = next(d for d in (content, content["actor"], weights) if name in d)
    value = part.pop(name)
    torch.save(content, path)
    with pytest.raises(cup.UserError, match=re.escape(name)) as error:
        cup.load_policy(path)
    assert "\n" not in str(error.value)
    if part is weights:
        weights[name] = value / 0
        torch.save(content, path)
        with pytest.raises(cup.UserError, match="finite"):
            cup.load_policy(path)


@pytest.mark.parametrize("env_id", [5, ["reach-v2"], "os:Robot-v0"])
def test_a_policy_file_cannot_choose_what_is_imported(tmp_path, env_id):
    """--evaluate takes the task from the file: a name, and not a module to import."""
    policy_file(tmp_path / "policy.pt", env_id=env_id)
    result = call_cup("--evaluate", tmp_path / "policy.pt", "--no-cuda")
    assert one_sentence(result, str(tmp_path / "policy.pt")), result.stderr


class Touch:
    """Unpickling this creates a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["actor", "weights", "env_id"])
def test_code_in_a_policy_file_is_not_run(tmp_path, place):
    marker, path = tmp_path / "executed", tmp_path / "policy.pt"
    torch.save(policy_file(path) | {place: Touch(marker)}, path)
    for _ in range(2):
        with pytest.raises(cup.UserError):
            cup.load_policy(path)
        path.write_bytes(pickle.dumps(Touch(marker)))
    assert not marker.exists()
