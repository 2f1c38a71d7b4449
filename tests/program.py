"""How the tests start the real programs and read what they wrote."""

import contextlib
import csv
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

import cup

ROOT = Path(cup.__file__).parent

# A run that is small in everything and still learns, logs, evaluates and saves.
SMALL = "--num-envs 2 --batch-size 8 --buffer-size 2000 --learning-starts 20 --guidance-starts 20"
SMALL += " --hidden-sizes 16 16 --log-interval 20 --eval-episodes 2 --threads 1"
SMALL = SMALL.split()

# 1,000 steps with guidance; checkpoints at 0, 400, 800: two environments, episodes of 200 steps
PENDULUM = "--env-id Pendulum-v1 --sources --num-random-sources 2"
PENDULUM += " --total-timesteps 1000 --eval-interval 500 --checkpoint-interval 400"
PENDULUM = [*PENDULUM.split(), *SMALL]


def run_cup(*arguments, script=cup.__file__, **variables: str) -> subprocess.CompletedProcess:
    """`python cup.py ...`; the `faulty_envs` can be its --env-id."""
    tests = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": tests, "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


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


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without what the clock wrote into them."""
    rows = read_csv(run_dir / "metrics.csv")
    return [{k: row[k] for k in row if k is None or "time/" not in k} for row in rows]


def checkpoint_of(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def same_policy(one: Path, other: Path) -> bool:
    ours, theirs = (torch.load(x / "policy.pt", weights_only=True)["weights"] for x in (one, other))
    return all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def same_result(one: Path, other: Path) -> bool:
    """Whether two runs logged the same numbers and ended with the same policy."""
    return metrics(one) == metrics(other) and same_policy(one, other)
