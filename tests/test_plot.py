"""benchmark/plot.py on small csv files whose tables can be computed by hand."""

import csv
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest

PLOT = Path(__file__).parents[1] / "benchmark" / "plot.py"


def write(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(directory: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, PLOT, "--dir", directory]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def cells(path: Path, *start: str) -> list[str]:
    """The line of a table that starts with these cells, as its cells."""
    lines = [line.strip("| ").split(" | ") for line in path.read_text().splitlines()]
    (line,) = [line for line in lines if line[: len(start)] == list(start)]
    return line


def run_of(env_id, method, seed, evaluations) -> list[dict]:
    """evaluations: (success rate, return) at 100, 200, ... steps."""
    rows = []
    for number, (success, score) in enumerate(evaluations, start=1):
        row = {"env_id": env_id, "method": method, "seed": seed, "step": 100 * number}
        rows.append(row | {"success_rate": success, "return": score})
    return rows


def area(heights) -> float:
    """Mean height of the polygon through equally spaced points."""
    trapezoids = [(a + b) / 2 for a, b in pairwise(heights)]
    return sum(trapezoids) / len(trapezoids)


def test_table_of_one_seed(tmp_path):
    cup = [(0.0, 10), (0.6, 40), (0.9, 100), (0.7, 90)]
    sac = [(0.0, 20), (0.0, 30), (0.5, 25), (0.2, 20)]
    rows = run_of("hammer-v2", "cup", 1, cup) + run_of("hammer-v2", "sac", 1, sac)
    write(tmp_path / "transfer.csv", rows)
    plot(tmp_path)
    table = tmp_path / "transfer.md"
    success, returns = ([e[k] for e in cup] for k in (0, 1))
    expected = ["1", "400", f"{100 * area(success):.1f}", f"{area(returns):.0f}"]
    assert cells(table, "hammer-v2", "CUP")[2:] == [*expected, "70", "90", "200"]
    ratio = cells(table, "hammer-v2", "CUP / SAC")
    of_success = area([e[0] for e in cup]) / area([e[0] for e in sac])
    of_return = area([e[1] for e in cup]) / area([e[1] for e in sac])
    assert ratio[4] == f"{of_success:.2f}"
    assert ratio[5] == f"{of_return:.2f}, CUP ahead at 1 of 1 seeds"
    assert ratio[6:] == ["3.50", "1.80", "0.67"]  # 70/20, 90/50, 200/300
    assert cells(table, "shelf-place-v2")[1] == "not run yet"


def test_a_ratio_to_almost_nothing_is_not_spelt_out(tmp_path):
    rows = run_of("hammer-v2", "cup", 1, [(0.0, 50), (0.0, 50)])
    rows += run_of("hammer-v2", "sac", 1, [(0.0, 0.001), (0.0, 0.001)])
    write(tmp_path / "transfer.csv", rows)
    plot(tmp_path)
    ratio = cells(tmp_path / "transfer.md", "hammer-v2", "CUP / SAC")
    assert ratio[4:6] == ["–", "over 100, CUP ahead at 1 of 1 seeds"]


def test_both_methods_are_compared_at_equal_steps(tmp_path):
    """SAC went on to 400 steps, CUP to 200: what SAC did after 200 does not count."""
    rows = run_of("hammer-v2", "cup", 1, [(0.0, 10), (0.2, 30)])
    rows += run_of("hammer-v2", "sac", 1, [(0.0, 10), (0.1, 20), (0.8, 900), (1, 999)])
    write(tmp_path / "transfer.csv", rows)
    plot(tmp_path)
    sac = cells(tmp_path / "transfer.md", "hammer-v2", "SAC")
    assert sac[3:] == ["200", "5.0", "15", "10", "10", "never"]


def test_a_seed_on_its_way_is_left_out_until_it_is_there(tmp_path):
    rows = []
    for method in ("cup", "sac"):
        rows += run_of("hammer-v2", method, 1, [(0.0, 10), (0.5, 20), (0.5, 30)])
    rows += run_of("hammer-v2", "cup", 2, [(1.0, 1000), (1.0, 1000)])
    write(tmp_path / "transfer.csv", rows)
    plot(tmp_path)
    cup = cells(tmp_path / "transfer.md", "hammer-v2", "CUP")
    assert cup[2:] == ["1", "300", "37.5", "20", "50", "50", "200"]


def test_a_seed_that_went_further_waits_for_the_others(tmp_path):
    """Of three seeds one is at 300 steps, two at 200: that is where they are compared."""
    rows = []
    for method in ("cup", "sac"):
        for seed in (1, 2):
            rows += run_of("hammer-v2", method, seed, [(0.0, 10), (0.5, 30)])
        rows += run_of("hammer-v2", method, 3, [(0.0, 10), (0.2, 30), (0.9, 900)])
    write(tmp_path / "transfer.csv", rows)
    plot(tmp_path)
    cup = cells(tmp_path / "transfer.md", "hammer-v2", "CUP")
    assert cup[2:4] == ["3", "200"]
    assert cup[5].startswith("20 ")


def test_intervals_are_those_of_the_mean_over_seeds(tmp_path):
    """Against a bootstrap by hand; both are random, hence the tolerance."""
    areas = {1: 100.0, 2: 160.0, 3: 400.0}
    rows = []
    for seed, height in areas.items():
        rows += run_of("hammer-v2", "cup", seed, [(0, height), (0, height)])
        ahead = height - 20 if seed < 3 else height + 20
        rows += run_of("hammer-v2", "sac", seed, [(0, ahead), (0, ahead)])
    write(tmp_path / "transfer.csv", rows)
    plot(tmp_path)
    line = cells(tmp_path / "transfer.md", "hammer-v2", "CUP")
    middle, low, high = line[5].replace("[", "").replace("]", "").split()
    rng = random.Random(0)
    means = [mean(rng.choices(list(areas.values()), k=3)) for _ in range(20_000)]
    means.sort()
    assert line[2] == "3" and middle == "220"
    assert float(low.rstrip(",")) == pytest.approx(means[500], rel=0.05)
    assert float(high) == pytest.approx(means[-500], rel=0.05)
    ratio = cells(tmp_path / "transfer.md", "hammer-v2", "CUP / SAC")
    assert ratio[5].endswith("CUP ahead at 2 of 3 seeds")


def test_tuning_table(tmp_path):
    rows = []
    about = {"tag": "x", "env_id": "hammer-v2", "seed": 100, "beta1": 1, "beta2": 0.03}
    for step, score, success in (
        (50_000, 10, 0.0),
        (100_000, 30, 0.4),
        (150_000, 700, 0.2),
    ):
        rows.append(about | {"step": step, "return": score, "success_rate": success})
    write(tmp_path / "tuning.csv", rows)
    plot(tmp_path)
    expected = ["hammer-v2", "x", "100", "1", "0.03", "150,000", "20", "700", "40"]
    assert cells(tmp_path / "tuning.md", "hammer-v2") == expected


def test_every_figure_is_drawn(tmp_path):
    rows = run_of("push-wall-v2", "cup", 1, [(0.0, 10), (0.2, 30)])
    write(tmp_path / "transfer.csv", rows)
    rows = []
    for step in (1000, 2000):
        for name, share in (("reach-v2", 0.25), ("my-own", 0.25), ("target", 0.5)):
            row = {"env_id": "push-wall-v2", "seed": 1, "step": step}
            row |= {"candidate": name, "selected": share, "advantage": 0}
            rows.append(row | {"success_rate": 0.1})
    write(tmp_path / "selection.csv", rows)
    printed = plot(tmp_path).stdout
    figures = ("figure2_success", "figure2_return", "figure3", "figure3_all")
    for name in figures:
        assert str(tmp_path / f"{name}.png") in printed
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
