"""Nothing lost, nothing let in: runs that stop, are killed, starved or fed garbage."""

import os
import pickle
import re
import resource
import shutil
import signal

import faulty_envs
import pytest
import torch
from program import (
    PENDULUM, SMALL, call_cup, checkpoint_of, finish, metrics, one_sentence, same_policy,
    same_result, start_cup, started_run, steps, succeed,
)

import cup

PENDULUM = [*PENDULUM, "--resume"]  # starts, goes on, or is finished
WALK = [*SMALL, "--total-timesteps", 60, "--eval-interval", 40, "--checkpoint-interval", 20]
WALK += ["--resume", "--sources", "--env-id"]


# ---- the same command, again and again -----------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_resume_equals_no_stop(pendulum, tmp_path, number):
    process = started_run(tmp_path / "run", *PENDULUM, rows=5)
    process.send_signal(number)
    result = finish(process)
    assert (result.returncode, result.stderr) == (128 + number, "")
    assert re.search(r"stopped at step \S+: the same command with --resume goes on", result.stdout)
    checkpoint = checkpoint_of(tmp_path / "run")
    succeed(*PENDULUM, "--run-dir", tmp_path / "run")
    assert same_result(pendulum[0], tmp_path / "run")
    next_row = checkpoint_of(tmp_path / "run")["rows"][len(checkpoint["rows"])]
    assert next_row["time/seconds"] > checkpoint["seconds"]  # also the clock goes on


def test_killed_before_its_first_checkpoint(pendulum, tmp_path):
    shutil.copytree(pendulum[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    succeed(*PENDULUM, "--run-dir", tmp_path / "run")
    assert same_result(pendulum[0], tmp_path / "run")


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
        succeed(*arguments, tmp_path / name, "--total-timesteps", total)
    # step 60, with the evaluation; the shorter run has made one at its end, at step 40
    assert metrics(tmp_path / "whole")[2] == metrics(tmp_path / "parts")[2]
    assert same_policy(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_says_so_and_a_longer_one_goes_on(pendulum, tmp_path):
    """Also without the GPU that it began with."""
    run_dir = tmp_path / "copy"
    shutil.copytree(pendulum[0], run_dir)
    before = metrics(run_dir)
    result = succeed(*PENDULUM, "--run-dir", run_dir)
    assert "finished 1,000 steps" in result.stdout
    assert metrics(run_dir) == before

    checkpoint = checkpoint_of(run_dir)
    checkpoint["args"]["cuda"] = True
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    result = succeed(*PENDULUM, "--run-dir", run_dir, "--total-timesteps", 1040)
    assert metrics(run_dir)[:50] == before
    assert steps(run_dir) == list(range(20, 1041, 20))
    assert "finished 1,040 steps" in result.stdout


def test_a_run_may_move_with_its_sources(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "sources").mkdir(parents=True)
    for name in ("expert.pt", "novice.pt"):
        cup.save(cup.policy_content(cup.Actor(3, 1, [8])), here / "sources" / name)

    def arguments(folder, total):
        pendulum = [*SMALL, "--env-id", "Pendulum-v1", "--eval-interval", 40, "--resume"]
        pendulum += ["--total-timesteps", total, "--run-dir", folder / "run"]
        return [*pendulum, "--sources", folder / "sources" / "expert.pt"]

    succeed(*arguments(here, 40))
    here.rename(there)
    succeed(*arguments(there, 60))
    assert steps(there / "run") == [20, 40, 60]
    result = call_cup(*arguments(there, 80)[:-1], there / "sources" / "novice.pt")
    assert one_sentence(result, "was started with sources", "expert.pt"), result.stderr


def test_what_a_broken_pipe_interrupts_is_there_after_resuming(tmp_path, monkeypatch):
    """As in `python cup.py ... | head`: the last line of progress cannot be printed."""

    def print_until_60(text, *more, **options):
        if text.startswith("60 steps"):
            raise BrokenPipeError("the reader is gone")

    run = [*WALK, "faulty_envs:Walk-v0", "--run-dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(cup, "print", print_until_60, raising=False)
        assert call_cup(*run).returncode == 2
    assert "finished" in succeed(*run).stdout
    assert steps(tmp_path / "run") == [20, 40, 60]
    assert torch.load(tmp_path / "run" / "policy.pt")["step"] == 60


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
    succeed(*PENDULUM, "--run-dir", run_dir)  # the user made room
    assert same_result(pendulum[0], run_dir)


def test_the_last_row_comes_after_all_if_there_was_no_room_for_it(tmp_path):
    run = [*WALK, "faulty_envs:Walk-v0", "--log-interval", 60, "--run-dir", tmp_path / "run"]
    (tmp_path / "run").mkdir()  # an empty directory will do
    (tmp_path / "run" / "metrics.csv").symlink_to("/dev/full")
    result = call_cup(*run, "--eval-interval", 60)
    assert one_sentence(result, "No space left"), result.stderr
    (tmp_path / "run" / "metrics.csv").unlink()
    succeed(*run, "--eval-interval", 60)
    assert steps(tmp_path / "run") == [60]


def test_run_directory_removed(tmp_path):
    process = started_run(tmp_path / "run", *PENDULUM, "--total-timesteps", 10**7)
    shutil.rmtree(tmp_path / "run")
    result = finish(process)
    assert one_sentence(result, "cannot write"), result.stderr


# ---- environments that go wrong ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "step", "words"),
    [
        ("Raises", 58, "it fails in step"),
        ("RaisesLate", 40, "it fails in step"),  # in the evaluation
        ("RaisesAtReset", 78, "it fails in reset"),
        ("NotANumber", 58, "NaN or infinity"),
        ("NoReward", 0, "NaN or infinity"),
        ("Huge", 20, r"loss/critic is (inf|nan) at step"),
    ],
)
def test_after_a_fault_there_is_a_checkpoint_of_before(tmp_path, monkeypatch, kind, step, words):
    """What an environment raises comes with its traceback; the rest is one sentence."""
    monkeypatch.setattr(faulty_envs.Walk, "closed", 0)
    walk = [*WALK, f"faulty_envs:{kind}-v0", "--run-dir", tmp_path / "run"]
    walk += ["--total-timesteps", 200, "--checkpoint-interval", 20 if kind == "Huge" else 1000]
    walk += ["--eval-interval", 40 if kind in ("RaisesLate", "Huge") else 1000]
    if "Raises" in kind:
        with pytest.raises(RuntimeError, match=words):
            call_cup(*walk)
    else:
        result = call_cup(*walk)
        assert one_sentence(result, words), result.stderr
    checkpoint = checkpoint_of(tmp_path / "run")
    assert checkpoint["step"] == step
    assert all(torch.isfinite(w).all() for k, w in checkpoint["agent"].items() if "actor" in k)
    assert not (tmp_path / "run" / "policy.pt").exists()  # nor was a good one replaced
    assert faulty_envs.Walk.closed == 3  # two to train in, one to evaluate in


def test_a_simulator_that_dies_and_cannot_be_closed_either(tmp_path):
    walk = [*WALK, "faulty_envs:Dies-v0", "--run-dir", tmp_path / "run"]
    with pytest.raises(RuntimeError, match="it fails in close"):
        call_cup(*walk, "--eval-interval", 1000, "--checkpoint-interval", 1000)
    assert checkpoint_of(tmp_path / "run")["step"] == 58


# ---- policy files from elsewhere -----------------------------------------------------------------
@pytest.fixture
def path(tmp_path):
    """A policy file that is whole."""
    cup.save(cup.policy_content(cup.Actor(3, 1, [8])), tmp_path / "policy.pt")
    return tmp_path / "policy.pt"


def content_of(path):
    return torch.load(path, weights_only=True)


def test_weights_in_double_precision_are_welcome(path):
    content, before = content_of(path), cup.load_policy(path)(torch.ones(3))
    content["weights"] = {name: w.double() for name, w in content["weights"].items()}
    torch.save(content, path)
    assert all(map(torch.equal, before, cup.load_policy(path)(torch.ones(3))))


MISSING = ["actor", "weights", "obs_dim", "action_dim", "hidden_sizes"]
MISSING += ["standardize.scale", "net.0.weight", "net.2.bias"]


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_or_not_finite_is_named(path, name):
    content = content_of(path)
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


def test_a_flipped_bit_in_a_weight_is_noticed(path):
    data = bytearray(path.read_bytes())
    weight = content_of(path)["weights"]["net.0.weight"].numpy().tobytes()
    data[data.find(weight)] ^= 1
    path.write_bytes(data)
    with pytest.raises(cup.UserError, match="is damaged"):
        cup.load_policy(path)


@pytest.mark.parametrize("env_id", [5, ["reach-v2"], "os:Robot-v0"])
def test_a_policy_file_cannot_choose_what_is_imported(path, env_id):
    """--evaluate takes the task from the file: a name, and not a module to import."""
    torch.save(content_of(path) | {"env_id": env_id}, path)
    result = call_cup("--evaluate", path, "--no-cuda")
    assert one_sentence(result, f"{path} names no task"), result.stderr


class Touch:
    """Unpickling this creates a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["actor", "weights", "env_id"])
def test_code_in_a_policy_file_is_not_run(path, place):
    marker = path.with_name("executed")
    torch.save(content_of(path) | {place: Touch(marker)}, path)
    for _ in range(2):
        with pytest.raises(cup.UserError):
            cup.load_policy(path)
        path.write_bytes(pickle.dumps(Touch(marker)))
    assert not marker.exists()
