"""The scripts of benchmark/: study.py, plot.py and play.py."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from program import ROOT, SMALL, call_cup, one_sentence, read_csv, run_cup

import cup

sys.path.append(str(ROOT / "benchmark"))
import plot

STUDY, run_process = ROOT / "benchmark" / "study.py", subprocess.run
FILM, SHARE = "faulty_envs:Film-v0", "guidance/selected/target"
TYPED = "--eval-interval 100 --checkpoint-interval 400 --sources --num-random-sources 2"
TYPED = [*SMALL, *TYPED.split()]


def arguments(folder: Path, *more: str, task="Pendulum-v1", steps=400, extra=TYPED) -> list[str]:
    typed = ["--tasks", task, "--seeds", "7", "--runs-dir", str(folder / "runs")]
    typed += ["--csv", str(folder / "x.csv"), "--total-timesteps", str(steps)]
    return [*typed, *more, "--", *extra]


def run_here(command: list[str], **options) -> subprocess.CompletedProcess:
    """In place of subprocess.run: a script runs in this process, which has made the imports."""
    if command[0] == "git":
        return run_process(command, **options)
    result = call_cup(*command[2:], script=command[1])
    result.check_returncode()
    return result


def study(*typed, **options) -> subprocess.CompletedProcess:
    with mock.patch("subprocess.run", run_here):
        return call_cup(*arguments(*typed, **options), script=STUDY)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """CUP and SAC on Pendulum-v1, collected; no test changes it."""
    folder = tmp_path_factory.mktemp("study")
    assert study(folder).returncode == study(folder, "--collect").returncode == 0
    return folder


def test_the_csv_has_every_evaluation_with_its_settings_and_commit(done):
    rows = read_csv(done / "x.csv")
    found, sac = ([row for row in rows if row["method"] == method] for method in ("cup", "sac"))
    assert len(sac) == 4 and not any(row[SHARE] for row in sac)  # it has no sources
    logged = read_csv(done / "runs" / "Pendulum-v1__cup__7" / "metrics.csv")
    evaluated = [row for row in logged if row["eval/return"]]
    assert [row["step"] for row in found] == [row["step"] for row in evaluated]
    for row, there in zip(found, evaluated):
        assert float(row["eval/return"]) == pytest.approx(float(there["eval/return"]), rel=1e-4)
        settings = json.loads(row["settings"])
        assert settings["batch_size"] == 8 and settings["hidden_sizes"] == [16, 16]
        assert "gamma" not in settings and row["commit"].endswith(" cup.py")
    # the shares are means over the rows since the evaluation before
    since = [float(x[SHARE]) for x in logged if 100 < int(x["step"]) <= 200]
    assert float(found[1][SHARE]) == pytest.approx(sum(since) / len(since), rel=1e-3)


@pytest.mark.parametrize("steps, more", [(200, []), (400, ["--gamma", "0.9"])])
def test_a_shorter_run_or_one_with_other_settings_replaces_nothing(done, tmp_path, steps, more):
    before = (done / "x.csv").read_text()
    (tmp_path / "x.csv").write_text(before)
    options = {"steps": steps, "extra": [*TYPED, *more]}
    assert study(tmp_path, "--methods", "cup", **options).returncode == 0
    assert (tmp_path / "x.csv").read_text() == before  # a run changes no results
    result = study(tmp_path, "--methods", "cup", "--collect", **options)
    assert result.returncode == 1 and "Pendulum-v1__cup__7 left out" in result.stdout
    assert (tmp_path / "x.csv").read_text() == before


def test_a_failed_run_fails_the_study_and_the_others_go_on(tmp_path):
    """Here in processes of their own; the id has a colon and a slash."""
    task = "faulty_envs:faulty/Walk-v0"
    typed = arguments(tmp_path, "--methods", "nobody", "haar-frozen", task=task, steps=200)
    assert run_cup(*typed, script=STUDY).returncode == 1
    result = study(tmp_path, "--methods", "haar-frozen", "--collect", task=task, steps=200)
    frozen = [json.loads(x["settings"])["freeze_skills"] for x in read_csv(tmp_path / "x.csv")]
    assert (result.returncode, frozen) == (0, [True, True])


def test_ctrl_c_starts_no_further_run(tmp_path, monkeypatch):
    started = []

    def interrupted(command, **options):
        if command[0] == "git":
            return run_process(command, **options)
        started.append(command)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(1)  # Ctrl-C reaches the run too, which takes a moment to stop
        raise subprocess.CalledProcessError(130, command)

    monkeypatch.setattr(subprocess, "run", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it
    result = call_cup(*arguments(tmp_path), script=STUDY)
    signal.signal(signal.SIGINT, before)
    assert (result.returncode, len(started)) == (130, 1) and "goes on" in result.stdout


def run(*success: float) -> np.ndarray:
    """Evaluations every 50,000 steps; the return is ten times the success."""
    return np.array([[50_000 * (k + 1), 10 * x, x] for k, x in enumerate(success)])


def test_table_and_aggregates_of_known_runs():
    """CUP is better on one task, where the pairs are 1 > 0, 1 > -1, 0 = 0, 0 > -1; else level."""
    better = {"cup": {"1": run(7, 1, 1), "2": run(0, 0)}}
    better["sac"] = {"1": run(0, 0), "2": run(-1, -1)}
    level = dict.fromkeys(("cup", "sac"), {"1": run(0.5, 0.5), "2": run(0.5, 0.5)})
    assert "| a | CUP | 10, 0 | 100, 0 | 30, 0 |" in plot.results_table({"a": better})
    cup, sac = plot.aggregates({"a": better, "b": level}).splitlines()
    assert f"better {((3 + 0.5) / 4 + 0.5) / 2:.2f} [" in sac
    assert "mean of success 0.50 [" in cup  # of 0, 0.5, 0.5, 1 the middle two
    assert "mean of success 0.25 [" in sac  # of -1, 0, 0.5, 0.5


def test_every_figure_is_drawn(tmp_path):
    call_cup("--figures", tmp_path, script=plot.__file__)
    assert {path.name[:7] for path in tmp_path.glob("*.png")} == {"figure2", "figure3"}


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Run play.py beside a policy file and without a display."""
    content = cup.policy_content(cup.Actor(2, 1, (8,)), env_id=FILM)
    cup.save(content, tmp_path / "my.pt")
    monkeypatch.chdir(tmp_path)
    for name, value in ("MUJOCO_GL", "glfw"), ("DISPLAY", ""), ("WAYLAND_DISPLAY", ""):
        monkeypatch.setenv(name, value)
    return lambda typed: call_cup(*typed.split(), script=ROOT / "benchmark" / "play.py")


def test_scores_and_film(play):
    result = play(f"my.pt --env-id {FILM} --seed 3 --episodes 20 --gif my.gif")
    scores = cup.evaluate(cup.load_policy("my.pt"), FILM, 20, cup.derive_seed(3, 4, 0))
    returns, low = np.array(scores)[:, 0], 20 / (20 + 1.959964**2)  # Wilson's bound for 20 of 20
    error = 2.093024 * returns.std(ddof=1) / np.sqrt(20)  # t with 19 degrees of freedom
    text = f"success 1.00 [{low:.2f}, 1.00], return {returns.mean():,.1f} ± {error:,.1f}"
    assert f"20 episodes, mean action: {text}" in result.stdout, result
    assert "20 episodes, sampled action: success 1.00" in result.stdout
    assert Image.open("my.gif").n_frames == 15  # to 40 steps after the success


@pytest.mark.parametrize("typed, sentence", [
    ("missing/policy.pt", "missing/policy.pt does not exist; .* first evaluation"),
    ("my.pt", f"give --env-id {FILM}"),
    (f"{ROOT}/sources/reach-v2.pt --env-id Pendulum-v1", r"sizes \(3, 1\), .* \(39, 4\)"),
    (f"{ROOT}/sources/reach-v2.pt --gif reach.gif", "MUJOCO_GL=egl"),
])
def test_a_mistake_is_a_sentence(play, typed, sentence):
    assert one_sentence(play(typed), sentence)
