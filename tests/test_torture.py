"""Twenty kills, each followed by the same command. Runs with `-m torture` alone, for 20 minutes."""

import random
import time

import pytest
from program import PENDULUM, SMALL, finish, same_result, start_cup, steps, succeed

KILLS = 20
REACH = [*SMALL, "--env-id", "reach-v2", "--sources", "--eval-interval", "5000"]


@pytest.mark.torture
@pytest.mark.parametrize(("arguments", "interval"), [
    (PENDULUM, 400), ([*PENDULUM, "--env-id", "faulty_envs:Hidden-v0"], 400), (REACH, 1000),
])
def test_after_twenty_kills_the_result_is_that_of_an_unbroken_run(tmp_path, arguments, interval):
    """One kill in every interval between two checkpoints, at a random row or in a checkpoint."""
    arguments = [*arguments, "--total-timesteps", (KILLS + 2) * interval]
    arguments += ["--checkpoint-interval", interval, "--resume", "--run-dir"]
    succeed(*arguments, tmp_path / "whole")
    run_dir, rng = tmp_path / "killed", random.Random(0)
    for kill in range(KILLS):
        process = start_cup(*arguments, run_dir)
        row, is_in_checkpoint = interval * (kill + 1 + 0.8 * rng.random()), kill % 2
        while not (run_dir / "metrics.csv").exists() or max(steps(run_dir), default=0) < row:
            assert process.poll() is None, finish(process).stderr
            time.sleep(0.002)
        while is_in_checkpoint and not (run_dir / "checkpoint.tmp").exists():
            assert process.poll() is None, finish(process).stderr
        process.kill()
        assert finish(process).returncode == -9
        assert steps(run_dir) == sorted(set(steps(run_dir)))
    result = finish(start_cup(*arguments, run_dir))
    assert result.returncode == 0, result.stderr
    assert same_result(tmp_path / "whole", run_dir)
