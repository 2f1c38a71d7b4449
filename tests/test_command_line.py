"""The real command line, past the first gradient steps, and everything it writes."""

import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from program import (
    PENDULUM,
    SMALL,
    finish,
    metrics,
    run_cup,
    same_result,
    started_run,
    steps,
    weights,
)

import cup

METAWORLD = [*SMALL, "--total-timesteps", "60", "--eval-interval", "60"]


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Two policies for Meta-World, of different sizes, as files."""
    directory = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    for name, hidden_sizes in {"reach-v2": [16], "push-v2": [24, 8]}.items():
        actor = cup.Actor(39, 4, hidden_sizes)
        torch.save(cup.policy_file(actor, env_id=name), directory / f"{name}.pt")
    return [directory / "reach-v2.pt", directory / "push-v2.pt"]


@pytest.fixture(scope="session")
def pendulum(tmp_path_factory):
    """A finished run on Pendulum-v1, and what it said."""
    run_dir = tmp_path_factory.mktemp("pendulum") / "run"
    result = run_cup(*PENDULUM, "--run-dir", run_dir)
    assert result.returncode == 0, result.stderr
    return run_dir, result


# ------------------------------------ training runs ------------------------------------


@pytest.mark.parametrize("guidance", ["sources", "random sources", "no sources"])
def test_metaworld(tmp_path, sources, guidance):
    flags = {
        "sources": ["--sources", *sources],
        "random sources": ["--sources", "--num-random-sources", "3"],
        "no sources": ["--sources"],
    }[guidance]
    names = {
        "sources": ["reach-v2", "push-v2", "target"],
        "random sources": ["random-1", "random-2", "random-3", "target"],
        "no sources": [],
    }[guidance]
    task = ["--env-id", "peg-insert-side-v2"]
    result = run_cup(*task, *flags, *METAWORLD, cwd=tmp_path)  # the default --run-dir
    assert result.returncode == 0, result.stderr
    method = "cup" if names else "sac"
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name == f"peg-insert-side-v2__{method}__1"
    assert f"runs/{run_dir.name}/policy.pt" in result.stdout
    assert "success" in result.stdout

    rows = metrics(run_dir)
    assert steps(run_dir) == [20, 40, 60]
    first, last = rows[0], rows[-1]
    for name in ("selected", "advantage"):
        columns = [key for key in last if key.startswith(f"guidance/{name}/")]
        assert columns == [f"guidance/{name}/{source}" for source in names]
    losses = ["loss/critic", "loss/actor", "alpha", "entropy"]
    losses += ["loss/kl", "guidance/weight", "guidance/kl"] if names else []
    for name in losses:
        assert first[name] == ""  # nothing was learned yet
        assert math.isfinite(float(last[name]))
    if names:
        shares = [float(last[f"guidance/selected/{source}"]) for source in names]
        assert sum(shares) == pytest.approx(1)
        assert float(last["guidance/advantage/target"]) == 0
    assert 0 <= float(last["eval/success_rate"]) <= 1
    assert 0 <= float(last["eval/return"]) <= 5000


def test_outputs_of_a_run(pendulum):
    run_dir, result = pendulum
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"args.json", "metrics.csv", "policy.pt", "checkpoint.pt"}
    assert result.stderr == ""
    assert "finished 1,000 steps" in result.stdout
    assert "success" not in result.stdout  # Pendulum has no such thing

    about = json.loads((run_dir / "args.json").read_text())
    assert about["args"]["env_id"] == "Pendulum-v1"
    assert about["args"]["hidden_sizes"] == [16, 16]
    assert about["args"].keys() == cup.Args.__dataclass_fields__.keys()
    assert about["versions"]["torch"] == torch.__version__
    assert {"python", "metaworld", "mujoco", "gymnasium"} < about["versions"].keys()

    rows = metrics(run_dir)
    assert steps(run_dir) == list(range(20, 1001, 20))
    evaluated = [int(row["step"]) for row in rows if row["eval/return"]]
    assert evaluated == [500, 1000]
    # two environments: their first episodes, of 200 steps each, end at step 400
    first = next(int(row["step"]) for row in rows if row["train/return"])
    assert first == 400
    assert not any(row["train/success_rate"] for row in rows)

    policy = torch.load(run_dir / "policy.pt", weights_only=True)
    assert policy["env_id"] == "Pendulum-v1"
    assert policy["step"] == 1000
    assert str(policy["return"]) == rows[-1]["eval/return"]
    actor = cup.load_policy(run_dir / "policy.pt")
    mean, log_std = actor(torch.randn(5, 3))
    assert mean.shape == log_std.shape == (5, 1)


def test_a_policy_of_one_run_is_a_source_of_the_next(pendulum, tmp_path):
    policy, run_dir = pendulum[0] / "policy.pt", tmp_path / "run"
    arguments = ["--env-id", "Pendulum-v1", "--sources", policy, policy, *SMALL]
    result = run_cup(*arguments, "--total-timesteps", 60, "--run-dir", run_dir)
    assert result.returncode == 0, result.stderr
    assert {"guidance/kl", "guidance/selected/policy"} < metrics(run_dir)[-1].keys()


def test_one_seed_one_result(pendulum, tmp_path):
    run_cup(*PENDULUM, "--run-dir", tmp_path / "same")
    run_cup(*PENDULUM, "--seed", "2", "--run-dir", tmp_path / "other")
    assert same_result(pendulum[0], tmp_path / "same")
    assert not same_result(pendulum[0], tmp_path / "other")


def test_a_loss_of_infinity_stops_the_run(tmp_path):
    arguments = ["--env-id", "faulty_envs:Huge-v0", "--sources", *SMALL]
    result = run_cup(*arguments, "--run-dir", tmp_path / "run")
    assert result.returncode == 1
    assert re.search("loss/critic is (inf|nan) at step 40: stopped", result.stderr)
    assert len(result.stderr.splitlines()) == 1
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(w.isfinite().all() for w in checkpoint["agent"]["actor"].values())


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    arguments = ["--env-id", "Pendulum-v1", "--sources", *SMALL, "--tensorboard"]
    result = run_cup(
        *arguments, "--total-timesteps", "60", "--run-dir", tmp_path / "run"
    )
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


# --------------------------------- stopping and resuming --------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_resume_equals_no_stop(pendulum, tmp_path, number):
    run_dir = tmp_path / "run"
    process = started_run(run_dir, *PENDULUM)
    process.send_signal(number)
    result = finish(process)
    assert result.returncode == 0
    assert result.stderr == ""
    assert re.search(rf"stopped at step \d+: --resume {run_dir} goes on", result.stdout)

    assert run_cup("--resume", run_dir).returncode == 0
    assert same_result(pendulum[0], run_dir)


def test_metaworld_resumes_in_the_middle_of_an_episode(tmp_path, sources):
    arguments = ["--env-id", "reach-wall-v2", "--sources", *sources, *METAWORLD]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_cup(*arguments, "--run-dir", whole)
    run_cup(*arguments, "--run-dir", parts, "--total-timesteps", "40")
    result = run_cup("--resume", parts, "--total-timesteps", "60")
    assert result.returncode == 0, result.stderr
    assert metrics(whole)[2] == metrics(parts)[2]  # step 60, with the evaluation
    ours, theirs = weights(whole), weights(parts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resume_of_a_finished_run(pendulum, tmp_path):
    run_dir = tmp_path / "copy"  # a run directory may also be moved
    shutil.copytree(pendulum[0], run_dir)
    before = metrics(run_dir)

    result = run_cup("--resume", run_dir)
    assert result.returncode == 0
    assert "is finished" in result.stdout
    assert metrics(run_dir) == before

    result = run_cup("--resume", run_dir, "--total-timesteps", "1040")
    assert result.returncode == 0, result.stderr
    assert metrics(run_dir)[:50] == before
    assert steps(run_dir) == list(range(20, 1041, 20))
    assert "finished 1,040 steps" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--resume", ""], "has no checkpoint.pt"),
        (["--resume", "nowhere"], "nowhere has no checkpoint.pt"),
        (["--resume", "{run}", "--run-dir", "other"], "leave --run-dir out"),
        (["--resume", "{run}", "--seed", "9"], "was started with --seed 1, not 9"),
    ],
)
def test_resume_of_something_else(pendulum, tmp_path, arguments, sentence):
    arguments = [word.format(run=pendulum[0]) for word in arguments]
    result = run_cup(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


# --------------------------------------- --evaluate -------------------------------------


def test_evaluate_names_success_with_its_interval(sources, tmp_path):
    arguments = ["--evaluate", sources[0], "--eval-episodes", "3", "--num-envs", "2"]
    result = run_cup(*arguments, "--threads", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{sources[0]} on reach-v2: 3 episodes" in result.stdout
    for kind in ("mean", "sampled"):
        pattern = rf"{kind} action: success ([\d.]+) \[([\d.]+), ([\d.]+)\], return \d+"
        rate, low, high = map(float, re.search(pattern, result.stdout).groups())
        assert 0 <= low <= rate <= high <= 1
        assert high - low > 0.3  # three episodes prove little
    assert not list(tmp_path.iterdir())  # it only looks


def test_evaluate_without_success_and_on_another_task(pendulum):
    policy = pendulum[0] / "policy.pt"
    result = run_cup("--evaluate", policy, "--eval-episodes", "2")
    assert result.returncode == 0, result.stderr
    assert "return -" in result.stdout
    assert "success" not in result.stdout

    result = run_cup("--evaluate", policy, "--env-id", "reach-v2")
    assert result.returncode == 2
    assert "(3, 1), but reach-v2 has (39, 4)" in result.stderr


def test_capture_video(pendulum, tmp_path):
    policy = shutil.copy(pendulum[0] / "policy.pt", tmp_path)
    arguments = ["--evaluate", policy, "--env-id", "reach-v2", "--capture-video"]
    torch.save(cup.policy_file(cup.Actor(39, 4, [8])), policy)
    result = run_cup(*arguments, "--eval-episodes", "1")
    if result.returncode == 0:
        assert (tmp_path / "policy.gif").read_bytes().startswith(b"GIF")
    else:  # no display here, and no OpenGL library
        assert result.returncode == 2
        assert "MUJOCO_GL" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr


def test_opengl_that_does_not_load(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    result = run_cup("--env-id", "reach-v2")
    assert result.returncode == 2
    assert result.stderr.startswith("cup.py: MUJOCO_GL=nonsense does not load (")
    assert len(result.stderr.splitlines()) == 1


# ---------------------------------------- bad input -------------------------------------


class Payload:
    """Unpickling this writes a file: a policy from a stranger must not."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def files_for_bad_input(directory: Path, pendulum_run: Path) -> None:
    """What the cases below name."""
    policy = (pendulum_run / "policy.pt").read_bytes()
    (directory / "pendulum.pt").write_bytes(policy)
    (directory / "truncated.pt").write_bytes(policy[: len(policy) // 2])
    (directory / "text.pt").write_text("these are not weights\n")
    (directory / "plain-pickle.pt").write_bytes(pickle.dumps(Payload()))
    torch.save({"actor": Payload(), "weights": {}}, directory / "code.pt")
    torch.save({"weights": {}}, directory / "other.pt")
    (directory / "empty").mkdir()
    shutil.copytree(pendulum_run, directory / "finished")
    (directory / "broken").mkdir()
    (directory / "broken" / "checkpoint.pt").write_bytes(policy[:99])


PEG = "--env-id peg-insert-side-v2 --sources"
# what was typed: what the one sentence must hold
BAD_INPUT = {
    "": ["no environment is named", "--env-id peg-insert-side-v2"],
    "--env-id peg-insert-sid-v2": ["'peg-insert-sid-v2'", "peg-insert-side-v2"],
    "--env-id Pendulun-v1": ["'Pendulun-v1'", "did you mean Pendulum-v1"],
    "--env-id Pendulum-v7": ["'Pendulum-v7'", "Pendulum-v1"],
    "--env-id nothing_installed:Robot-v0": ["nothing_installed"],
    "--env-id CartPole-v1": ["CartPole-v1", "Discrete(2)", "Box"],
    "--env-id faulty_envs:NoBounds-v0": ["no bounds"],
    "--env-id faulty_envs:CannotBeMade-v0": ["no robot is connected"],
    f"{PEG} nowhere.pt": ["no policy file nowhere.pt"],
    f"{PEG} empty": ["empty is not a policy file"],
    f"{PEG} text.pt": ["text.pt is not a policy file"],
    f"{PEG} other.pt": ["other.pt is not a policy file"],
    f"{PEG} truncated.pt": ["truncated.pt is not a policy file"],
    f"{PEG} code.pt": ["code.pt is not a policy file"],
    f"{PEG} plain-pickle.pt": ["plain-pickle.pt is not a policy file"],
    f"{PEG} finished/checkpoint.pt": ["checkpoint.pt is not a policy file"],
    f"{PEG} pendulum.pt": ["size 3", "size 1", "39 and 4"],
    "--evaluate code.pt": ["code.pt is not a policy file"],
    "--evaluate nowhere.pt": ["no policy file nowhere.pt"],
    f"{PEG} --batch-size 0": ["--batch-size must be positive, not 0"],
    f"{PEG} --batch-size 9 --buffer-size 8": ["--batch-size", "--buffer-size"],
    f"{PEG} --total-timesteps 5000": ["--learning-starts", "--total-timesteps"],
    f"{PEG} --run-dir finished": ["finished already exists", "--resume finished"],
    f"{PEG} --run-dir empty": ["empty already exists"],
    f"{PEG} --run-dir text.pt/run": ["cannot create the run directory", "text.pt"],
    f"{PEG} --run-dir /proc/run": ["cannot create the run directory", "/proc/run"],
    f"{PEG} --track": ["--track needs a package", "pip install wandb"],
    f"{PEG} --cuda": ["--cuda was asked for", "--no-cuda"],
    f"{PEG} --capture-video": ["--capture-video", "--evaluate"],
    "--resume nowhere": ["nowhere has no checkpoint.pt"],
    "--resume empty": ["empty has no checkpoint.pt"],
    "--resume broken": ["broken/checkpoint.pt is not a checkpoint"],
    "--resume finished --gamma 0.5": [
        "finished was started with --gamma 0.99, not 0.5"
    ],
    "--resume finished --seed 2 --tau 0.1": ["--seed 1, not 2", "--tau 0.005, not 0.1"],
}
if torch.cuda.is_available():
    del BAD_INPUT[f"{PEG} --cuda"]
if find_spec("wandb"):
    del BAD_INPUT[f"{PEG} --track"]


@pytest.fixture(scope="module")
def bad_files(pendulum, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bad-input")
    files_for_bad_input(directory, pendulum[0])
    return directory


def contents(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.mark.parametrize("typed", BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(
    typed, bad_files, monkeypatch, capfd
):
    """In this process, which has made the imports already: there are many of these."""
    before = contents(bad_files)
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(sys, "argv", ["cup.py", *typed.split()])
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as stop:
        cup.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    stdout, stderr = capfd.readouterr()
    assert stop.value.code == 2, stderr
    assert stdout == ""
    assert re.fullmatch(r"cup\.py: [^\n]+\n", stderr), stderr
    for words in BAD_INPUT[typed]:
        assert words in stderr
    assert contents(bad_files) == before


@pytest.mark.parametrize(
    "typed", [f"{PEG} pendulum.pt", f"{PEG} code.pt", "--env-id Pendulun-v1"]
)
def test_bad_input_in_a_process_of_its_own(typed, bad_files):
    before = contents(bad_files)
    result = run_cup(*typed.split(), cwd=bad_files)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"cup\.py: [^\n]+\n", result.stderr), result.stderr
    assert contents(bad_files) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({name: value}, f"--{name.replace('_', '-')} must be positive")
        for name in ["total_timesteps", "num_envs", "buffer_size", "learning_starts"]
        + ["threads", "policy_lr", "q_lr", "alpha_lr", "init_alpha", "eval_episodes"]
        + ["num_guidance_samples", "log_interval", "eval_interval"]
        + ["checkpoint_interval", "source_mean_bound"]
        for value in (0, -1, math.nan, math.inf)
    ]
    + [
        ({name: value}, f"--{name.replace('_', '-')} must not be negative")
        for name in ["seed", "utd_ratio", "beta1", "beta2", "num_random_sources"]
        for value in (-1, math.nan, math.inf)
    ]
    + [({"gamma": value}, "--gamma must be between") for value in (-0.1, 1.1, math.nan)]
    + [({"tau": value}, "--tau must be between") for value in (-0.1, 1.1, math.nan)]
    + [({"hidden_sizes": sizes}, "--hidden-sizes") for sizes in [(), (0,), (8, -8)]]
    + [({"source_log_std_min": value}, "--source-log-std") for value in (2, math.nan)]
    + [({"num_envs": 5000}, "--num-envs must be below --learning-starts")]
    + [({"num_random_sources": 10**9}, "--num-random-sources and --num-guidance")]
    + [({"num_guidance_samples": 10**9}, "--num-random-sources and --num-guidance")]
    + [({"policy_lr": 1e300}, "--policy-lr, --q-lr and --alpha-lr")]
    + [({"seed": 2**64}, "--seed")],
)
def test_numbers_that_make_no_sense(change, sentence):
    with pytest.raises(cup.UserError, match=sentence):
        cup.check(cup.Args(env_id="reach-v2", cuda=False, **change))


def test_words_instead_of_numbers():
    result = run_cup("--env-id", "reach-v2", "--seed", "one")
    assert result.returncode == 2
    assert "--seed" in result.stderr
    assert "Traceback" not in result.stderr
