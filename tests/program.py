"""How the tests start the real programs and read what they wrote."""

import contextlib
import csv
import io
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch

import cup

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# A run that is small in everything and still learns, logs, evaluates and saves.
SMALL = "--num-envs 2 --batch-size 8 --buffer-size 2000 --learning-starts 20 --guidance-starts 20"
SMALL += " --hidden-sizes 16 16 --log-interval 20 --eval-episodes 2 --threads 1"
SMALL = SMALL.split()

# 1,000 steps of Pendulum with guidance, two seconds after the imports; checkpoints at steps 0, 400
# and 800, after two episodes of 200 steps in each of the two environments.
PENDULUM = "--env-id Pendulum-v1 --sources --num-random-sources 2"
PENDULUM += " --total-timesteps 1000 --eval-interval 500 --checkpoint-interval 400"
PENDULUM = [*PENDULUM.split(), *SMALL]


def start_cup(*arguments, script=cup.__file__, **environment: str) -> subprocess.Popen:
    """Start `python cup.py ...`; the `faulty_envs` can be its --env-id."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"} | environment
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **options)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for it, at most five minutes."""
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_cup(*arguments, **options) -> subprocess.CompletedProcess:
    return finish(start_cup(*arguments, **options))


def call_cup(*arguments, script=cup.__file__) -> subprocess.CompletedProcess:
    """The same in this process, which has made the imports already."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [Path(script).name, *map(str, arguments)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            if script == cup.__file__:
                cup.main()  # with what a test has put in place of cup.evaluate, say
            else:
                runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        finally:
            torch.set_flush_denormal(False)
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def succeed(*arguments, **options) -> subprocess.CompletedProcess:
    """`call_cup` where nothing may go wrong."""
    result = call_cup(*arguments, **options)
    assert not result.returncode, result
    return result


def one_sentence(result: subprocess.CompletedProcess, *patterns: str) -> bool:
    """Whether the program ended with one line that holds these patterns, and with exit code 2."""
    is_line = re.fullmatch(r"\w+\.py: [^\n]+\n", result.stderr) is not None
    found = [re.search(pattern, result.stderr) for pattern in patterns]
    return result.returncode == 2 and is_line and all(found)


def started_run(run_dir: Path, *arguments, row: int = 0) -> subprocess.Popen:
    """A run that has written a checkpoint and this row of metrics.csv, and is on its way."""
    process, end = start_cup(*arguments, "--run-dir", run_dir), time.monotonic() + 240
    while not (run_dir / "checkpoint.pt").exists() or max(steps(run_dir), default=0) < row:
        assert process.poll() is None and time.monotonic() < end, finish(process).stderr
        time.sleep(0.005)
    return process


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without what the clock wrote into them."""
    rows = read_csv(run_dir / "metrics.csv")
    return [{k: row[k] for k in row if k is None or "time/" not in k} for row in rows]


def steps(run_dir: Path) -> list[int]:
    return [int(row["step"]) for row in metrics(run_dir)]


def checkpoint_of(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def same_policy(one: Path, other: Path) -> bool:
    ours, theirs = (torch.load(x / "policy.pt", weights_only=True)["weights"] for x in (one, other))
    return all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def same_result(one: Path, other: Path) -> bool:
    """Whether two runs logged the same numbers and ended with the same policy."""
    return metrics(one) == metrics(other) and same_policy(one, other)
