"""benchmark/plot.py on small csv files whose tables can be computed by hand."""

import csv
import random
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest

pytest.importorskip("matplotlib")
from benchmark import plot

RUNS = {"cup": "CUP", "sac": "SAC", "ptf": "PTF", "ratio": "CUP / SAC"}


def run_of(method, seed, *evaluations) -> list[dict]:
    """evaluations: (success rate, return) at 100, 200, ... steps."""
    rows, about = [], {"env_id": "hammer-v2", "method": method, "seed": str(seed)}
    for number, (success, score) in enumerate(evaluations, start=1):
        row = {"step": str(100 * number), "success_rate": str(success), "return": str(score)}
        rows.append(about | row)
    return rows


def table_of(rows: list[dict]) -> str:
    return plot.table({task: plot.read_curves(rows, task) for task in plot.TASKS})


def hammer(rows: list[dict], method: str) -> list[str]:
    """The line of the table on hammer and this method.

    Seeds, steps, areas under success and return, final and best success, steps to half of it.
    """
    lines = [line.strip("| ").split(" | ") for line in table_of(rows).splitlines()]
    (line,) = [line for line in lines if line[:2] == ["hammer-v2", RUNS[method]]]
    return line[2:]


def area(heights) -> float:
    """Mean height of the polygon through equally spaced points."""
    return mean((a + b) / 2 for a, b in pairwise(heights))


def test_table_of_one_seed():
    cup = [(0.0, 10), (0.6, 40), (0.9, 100), (0.7, 90)]
    sac = [(0.0, 20), (0.0, 30), (0.5, 25), (0.2, 20)]
    rows = run_of("cup", 1, *cup) + run_of("sac", 1, *sac)
    success, returns = (area([e[k] for e in cup]) for k in (0, 1))
    expected = ["1", "400", f"{100 * success:.1f}", f"{returns:.0f}", "70", "90", "200"]
    assert hammer(rows, "cup") == expected
    ratios = [f"{success / area([e[0] for e in sac]):.2f}"]
    ratios += [f"{returns / area([e[1] for e in sac]):.2f}, CUP ahead at 1 of 1 seeds"]
    assert hammer(rows, "ratio")[2:] == [*ratios, "3.50", "1.80", "0.67"]
    assert "| shelf-place-v2 | not run yet |" in table_of(rows)


def test_a_ratio_to_almost_nothing_is_not_spelt_out():
    rows = run_of("cup", 1, (0.0, 50), (0.0, 50)) + run_of("sac", 1, (0.0, 0.001), (0.0, 0.001))
    assert hammer(rows, "ratio")[2:4] == ["–", "over 100, CUP ahead at 1 of 1 seeds"]


def test_cup_and_sac_are_compared_at_equal_steps():
    """SAC went on to 400 steps, CUP to 200: what SAC did after 200 does not count.

    A method beside them is cut there as well, and one that is shorter is no reason to cut them.
    """
    rows = run_of("cup", 1, (0.0, 10), (0.2, 30))
    rows += run_of("sac", 1, (0.0, 10), (0.1, 20), (0.8, 900), (1, 999))
    sac = hammer(rows, "sac")
    assert sac[1:] == ["200", "5.0", "15", "10", "10", "never"]
    longer = rows + run_of("ptf", 1, (0.0, 10), (0.1, 30), (0.8, 900))
    assert hammer(longer, "ptf")[1:4] == ["200", "5.0", "20"]
    shorter = rows + run_of("ptf", 1, (0.0, 10))
    assert hammer(shorter, "ptf")[1:4] == ["100", "0.0", "10"]
    assert hammer(shorter, "sac") == sac


def test_a_seed_on_its_way_is_left_out_until_it_is_there():
    rows = run_of("cup", 2, (1.0, 1000), (1.0, 1000))
    for method in ("cup", "sac"):
        rows += run_of(method, 1, (0.0, 10), (0.5, 20), (0.5, 30))
    assert hammer(rows, "cup") == ["1", "300", "37.5", "20", "50", "50", "200"]


def test_a_seed_that_went_further_waits_for_the_others():
    """Of three seeds one is at 300 steps, two at 200: that is where they are compared."""
    rows = []
    for method in ("cup", "sac"):
        for seed in (1, 2):
            rows += run_of(method, seed, (0.0, 10), (0.5, 30))
        rows += run_of(method, 3, (0.0, 10), (0.2, 30), (0.9, 900))
    seeds, steps, _, returns, *_ = hammer(rows, "cup")
    assert (seeds, steps, returns.split()[0]) == ("3", "200", "20")


def test_intervals_are_those_of_the_mean_over_seeds():
    """Against a bootstrap by hand; both are random, hence the tolerance."""
    areas, rows = {1: 100.0, 2: 160.0, 3: 400.0}, []
    for seed, height in areas.items():
        rows += run_of("cup", seed, (0, height), (0, height))
        sac = height - 20 if seed < 3 else height + 20
        rows += run_of("sac", seed, (0, sac), (0, sac))
    middle, low, high = hammer(rows, "cup")[3].replace("[", "").replace("]", "").split()
    rng = random.Random(0)
    means = sorted(mean(rng.choices(list(areas.values()), k=3)) for _ in range(20_000))
    assert middle == "220"
    assert float(low.rstrip(",")) == pytest.approx(means[500], rel=0.05)
    assert float(high) == pytest.approx(means[-500], rel=0.05)
    assert hammer(rows, "ratio")[3].endswith("CUP ahead at 2 of 3 seeds")


def test_tuning_table():
    rows, about = [], {"tag": "x", "env_id": "hammer-v2", "seed": "100", "beta1": "1"}
    points = ("50000", "10", "0"), ("100000", "30", "0.4"), ("150000", "700", "0.2")
    for method in ("cup", "sac"):
        for step, score, success in points:
            row = about | {"beta2": "0.03", "method": method, "step": step}
            rows.append(row | {"return": score, "success_rate": success})
    lines = plot.tuning_table(rows).splitlines()[2:]
    assert lines[0] == "| hammer-v2 | x | cup | 100 | 1 | 0.03 | 150,000 | 20 | 700 | 40 |"
    assert lines[1] == lines[0].replace("cup", "sac")


def write(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.filterwarnings("error")
def test_every_figure_is_drawn(tmp_path, monkeypatch, capsys):
    rows = run_of("cup", 1, (0.0, 10), (0.2, 30))
    rows += run_of("ptf", 1, (0.0, 10)) + run_of("another", 1, (0.0, 10))
    write(tmp_path / "transfer.csv", rows)
    rows, candidates = [], (("reach-v2", 0.25), ("my-own", 0.25), ("target", 0.5))
    for seed, step in (1, 1000), (1, 2000), (2, 1000):  # seed 2 is on its way
        for name, share in candidates:
            about = {"env_id": "push-wall-v2", "seed": seed, "step": step, "candidate": name}
            success = 0.1 if step > 1000 else ""  # no episode has ended before
            rows.append(about | {"selected": share, "advantage": 0, "success_rate": success})
    write(tmp_path / "selection.csv", rows)
    about = {"env_id": "push-wall-v2", "seed": 1, "trained": 2000, "step": 0}
    rows = [{"candidate": name, "advantage": x, "value": 2} for name, x in candidates]
    write(tmp_path / "figure4.csv", [about | row for row in rows])
    monkeypatch.setattr(sys, "argv", ["plot.py", "--dir", str(tmp_path)])
    plot.main()
    printed = capsys.readouterr().out
    figures = ["figure2_success", "figure2_return", "figure3", "figure3_all"]
    for name in (*figures, "figure4", "sources"):
        assert str(tmp_path / f"{name}.png") in printed
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
