"""How the tests start the real program and read what it wrote."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

TESTS = Path(__file__).parent
CUP = TESTS.parent / "cup.py"

# A run that is small in everything and still learns, logs, evaluates and saves.
SMALL = "--num-envs 2 --batch-size 8 --buffer-size 2000 --learning-starts 20"
SMALL += " --guidance-starts 20 --hidden-sizes 16 16 --log-interval 20"
SMALL += " --eval-episodes 2 --threads 1 --no-cuda"
SMALL = SMALL.split()

# 1,000 steps of Pendulum with guidance, about one second after the imports.
PENDULUM = "--env-id Pendulum-v1 --sources --num-random-sources 2"
PENDULUM += " --total-timesteps 1000 --eval-interval 500 --checkpoint-interval 40"
PENDULUM = [*PENDULUM.split(), *SMALL]


def start_cup(*arguments, **options) -> subprocess.Popen:
    """Start `python cup.py ...`; the `faulty_envs` can be its --env-id."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CUP), *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, text=True, env=environment, **options)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for it. Two minutes are a hang: what is small takes seconds."""
    try:
        stdout, stderr = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_cup(*arguments, **options) -> subprocess.CompletedProcess:
    return finish(start_cup(*arguments, **options))


def wait_for(condition, seconds: float = 60.0) -> bool:
    """Whether `condition()` became true in time."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.005)
    return bool(found)


def started_run(run_dir: Path, *arguments, **options) -> subprocess.Popen:
    """A run that has written its first checkpoint, and is now on its way."""
    process = start_cup(*arguments, "--run-dir", run_dir, **options)
    checkpoint = run_dir / "checkpoint.pt"
    wait_for(lambda: checkpoint.exists() or process.poll() is not None)
    assert process.poll() is None, finish(process).stderr
    return process


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without what the clock wrote into them."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: row[k] for k in row if k is None or "time/" not in k} for row in rows]


def steps(run_dir: Path) -> list[int]:
    return [int(row["step"]) for row in metrics(run_dir)]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "policy.pt", weights_only=True)["weights"]


def same_result(one: Path, other: Path) -> bool:
    """Whether two runs logged the same numbers and ended with the same policy."""
    ours, theirs = weights(one), weights(other)
    same_policy = all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    return metrics(one) == metrics(other) and same_policy


def processes_of(run_dir: Path) -> list[int]:
    """Every process with this run directory on its command line, workers included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run_dir).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def all_gone(run_dir: Path) -> bool:
    """Whether no process of that run is left, a moment after it should have ended."""
    return wait_for(lambda: not processes_of(run_dir), seconds=20)
