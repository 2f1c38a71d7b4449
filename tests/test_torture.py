"""What a run survives; tests/README.md has the table. The long versions: -m torture."""

import contextlib
import subprocess
import time
from pathlib import Path

import pytest
import torture
from program import PENDULUM, call_cup, same_result, started_run, steps

import cup

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="measures on Linux")


def long(*values):
    return pytest.param(*values, marks=pytest.mark.torture)


@pytest.mark.parametrize(("chains", "number", "total"), [(1, 3, 1000), long(5, 10, 4000)])
def test_killed_anywhere_nothing_is_lost(tmp_path, chains, number, total):
    arguments, whole = [*PENDULUM, "--total-timesteps", total], tmp_path / "whole"
    assert call_cup(*arguments, "--run-dir", whole).returncode == 0
    for chain in range(chains):
        run_dir = tmp_path / str(chain)
        for outcome in torture.kills(run_dir, number, arguments, 0.3, seed=chain):
            assert outcome == "resumed"
        assert same_result(whole, run_dir)
        assert steps(run_dir) == list(range(20, total + 1, 20))
        assert not list(run_dir.glob("*.tmp"))


@pytest.mark.parametrize("number", [100, long(1000)])
def test_corrupted_policy_files(tmp_path, number):
    for kind, outcome in torture.corruptions(tmp_path / "policy.pt", number):
        assert outcome in ("refused", "valid"), kind


@pytest.mark.parametrize(("updates", "samples"), [(100, 3), long(2000, 1)])
def test_impossible_numbers(updates, samples):
    """Only a reward whose square overflows is too much; train stops at the next row."""
    for case, finite in torture.numerics(updates, num_guidance_samples=samples):
        assert finite == (case != "reward 1e30"), case


@pytest.mark.parametrize("rows", [200_000, long(1_000_000)])
def test_a_checkpoint_costs_no_second_buffer(tmp_path, rows):
    sources = {str(k): cup.Actor(39, 4, (256, 256)) for k in range(3)}
    agent = cup.Agent(cup.Args(env_id="x", buffer_size=rows), 39, 4, sources)
    for column in agent.buffer.columns:
        column.normal_()
    agent.buffer.size = rows
    before = torture.peak_memory(reset=True)
    cup.save(agent.state_dict(), tmp_path / "checkpoint.pt")
    full = sum(column.nbytes for column in agent.buffer.columns) / 2**20
    assert torture.peak_memory() - before < 0.3 * full


@pytest.mark.parametrize("total", [long(200_000)])
def test_memory_and_files_of_a_long_run(tmp_path, total):
    """The buffer is full after a tenth of the steps; from then on nothing grows."""
    arguments = ["--env-id", "reach-v2", "--sources", "--num-random-sources", 3, "--threads", 1]
    arguments += ["--total-timesteps", total, "--buffer-size", total // 10, "--no-cuda"]
    arguments += ["--eval-interval", total // 10, "--checkpoint-interval", total // 20]
    process = started_run(tmp_path / "run", *arguments, rows=1, stdout=subprocess.DEVNULL)
    place, seen = Path(f"/proc/{process.pid}"), []
    while process.poll() is None:
        with contextlib.suppress(OSError):  # it has just ended
            memory, files = (place / "statm").read_text().split()[1], list((place / "fd").iterdir())
            seen.append((steps(tmp_path / "run")[-1], int(memory), len(files)))
        time.sleep(0.5)
    second = max(memory for step, memory, _ in seen if 0.12 * total < step < 0.2 * total)
    assert max(memory for step, memory, _ in seen if step > 0.9 * total) < 1.05 * second
    assert len({files for step, _, files in seen if 0.12 * total < step < total}) <= 2
