"""plot.py: what the results table and the aggregates say of known runs, and that figures appear."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmark"))
import plot


def run(success: list[float]) -> np.ndarray:
    """Evaluations every 50,000 steps; the return is ten times the success."""
    return np.array([[50_000 * (k + 1), 10 * x, x] for k, x in enumerate(success)])


def test_final_performance_is_the_mean_of_the_last_100000_steps():
    assert plot.final(run([9, 9, 9, 0.2, 0.4])).tolist() == pytest.approx([3, 0.3])


def test_aggregates_of_known_runs():
    """CUP is better in 7 of 8 pairs on one task, and level on the other."""
    better = {"cup": {"1": run([1, 1]), "2": run([0, 0])}, "sac": {"1": run([0, 0])}}
    better["sac"]["2"] = run([-1, -1])
    level = {method: {"1": run([0.5, 0.5]), "2": run([0.5, 0.5])} for method in ("cup", "sac")}
    cup, sac = plot.aggregates({"a": better, "b": level}).splitlines()
    # the pairs of the first task: 1 > 0, 1 > -1, 0 = 0, 0 > -1
    assert f"better {((3 + 0.5) / 4 + 0.5) / 2:.2f} [" in sac
    assert "mean of success 0.50 [" in cup  # of 0, 0.5, 0.5, 1 the middle two
    assert "mean of success 0.25 [" in sac  # of -1, 0, 0.5, 0.5


def test_every_figure_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot.py", "--figures", str(tmp_path)])
    plot.main()
    names = ("figure2_return", "figure2_success", "figure3")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in names)
    printed = capsys.readouterr().out
    with open(plot.HERE / "results" / "study.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["env_id"] == "push-wall-v2"]
    last = [row for row in rows if row["method"] == "cup" and 400_000 < int(row["step"]) <= 500_000]
    mean = np.mean([float(row["eval/return"]) for row in last if row["seed"] == "1"])
    assert f"| push-wall | CUP | {mean:,.0f}, " in printed
