"""How the tests start the real program and read what it wrote."""

import contextlib
import csv
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch

import cup

TESTS = Path(__file__).parent

# A run that is small in everything and still learns, logs, evaluates and saves.
SMALL = "--num-envs 2 --batch-size 8 --buffer-size 2000 --learning-starts 20 --guidance-starts 20"
SMALL += " --hidden-sizes 16 16 --log-interval 20 --eval-episodes 2 --threads 1"
SMALL = SMALL.split()

# 1,000 steps of Pendulum with guidance, two seconds after the imports; checkpoints at steps 0, 400
# and 800, after two episodes of 200 steps in each of the two environments.
PENDULUM = "--env-id Pendulum-v1 --sources --num-random-sources 2"
PENDULUM += " --total-timesteps 1000 --eval-interval 500 --checkpoint-interval 400"
PENDULUM = [*PENDULUM.split(), *SMALL]


def start_cup(*arguments, script=cup.__file__, environment=None, **options) -> subprocess.Popen:
    """Start `python cup.py ...`; the `faulty_envs` can be its --env-id."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    environment = {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"} | (environment or {})
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, text=True, env=os.environ | environment, **options)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for it, at most five minutes."""
    try:
        stdout, stderr = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_cup(*arguments, **options) -> subprocess.CompletedProcess:
    return finish(start_cup(*arguments, **options))


def call_cup(*arguments, classes=()) -> subprocess.CompletedProcess:
    """The same in this process, which has made the imports already."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["cup.py", *map(str, arguments)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            cup.main(*classes)
        except SystemExit as stop:
            code = stop.code
        finally:
            torch.set_flush_denormal(False)
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def succeed(*arguments, **options) -> subprocess.CompletedProcess:
    """`call_cup` where nothing may go wrong."""
    result = call_cup(*arguments, **options)
    assert result.returncode == 0, result.stderr
    return result


def started_run(run_dir: Path, *arguments, rows: int = 0, **options) -> subprocess.Popen:
    """A run that has written a checkpoint and some rows of metrics.csv, and is on its way."""
    process, end = start_cup(*arguments, "--run-dir", run_dir, **options), time.monotonic() + 120
    while not (run_dir / "checkpoint.pt").exists() or len(steps(run_dir)) < rows:
        assert process.poll() is None and time.monotonic() < end, finish(process).stderr
        time.sleep(0.005)
    return process


def one_sentence(result: subprocess.CompletedProcess, *patterns: str) -> bool:
    """Whether the program ended with one line that holds these patterns, and with exit code 2."""
    is_line = re.fullmatch(r"\w+\.py: [^\n]+\n", result.stderr) is not None
    found = [re.search(pattern, result.stderr) for pattern in patterns]
    return result.returncode == 2 and is_line and all(found)


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without what the clock wrote into them."""
    text = (run_dir / "metrics.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    return [{k: row[k] for k in row if k is None or "time/" not in k} for row in rows]


def steps(run_dir: Path) -> list[int]:
    return [int(row["step"]) for row in metrics(run_dir)]


def checkpoint_of(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "policy.pt", weights_only=True)["weights"]


def same_policy(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def same_result(one: Path, other: Path) -> bool:
    """Whether two runs logged the same numbers and ended with the same policy."""
    return metrics(one) == metrics(other) and same_policy(one, other)
