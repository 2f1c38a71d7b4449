"""Draw the paper's figures, and compute the tables, from the csv files beside this one.

    python benchmark/plot.py

transfer.csv gives figure2_success.png, figure2_return.png and transfer.md; selection.csv gives
figure3.png and figure3_all.png; figure4.csv, by diagnose.py --figure4, figure4.png.
sources/<task>.csv, the metrics.csv of train_sources.py's runs, give sources.png; tuning.csv gives
tuning.md.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high

import matplotlib
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.transfer import STEPS, TASKS, read_csv

# Okabe and Ito's colours, which the colour-blind can tell apart
BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW = "#E69F00", "#56B4E9", "#F0E442"
METHODS = {"cup": ("CUP", BLUE, "-"), "sac": ("SAC", RED, "--")}
METHODS |= {"multipolar": ("MULTIPOLAR", YELLOW, "-."), "mamba": ("MAMBA", PINK, "-.")}
METHODS |= {"ptf": ("PTF", ORANGE, ":"), "haar": ("HAAR", SKY, ":")}
CANDIDATES = {"reach-v2": SKY, "push-v2": ORANGE, "pick-place-v2": PINK, "target": "0.35"}
CANDIDATES |= {"success rate": GREEN}
SPARE = (BLUE, RED, YELLOW, "0") * 9  # for other candidates
SOURCES = ("reach-v2", "push-v2", "pick-place-v2")
SOURCES += ("drawer-close-v2", "push-wall-v2", "coffee-button-v2")

Seeds = dict[int, np.ndarray]  # by seed, (3, evaluations): step, success, return


@dataclass
class Args:
    """Draw the figures of the transfer study and print its table."""

    dir: Path = Path(__file__).resolve().parent  # where the csv files are, and the figures go


def number(text: str) -> float:
    return float(text) if text else np.nan


def interval(values: np.ndarray) -> np.ndarray:
    """95 % bootstrap interval of the mean over seeds, (seeds, ...) -> (2, ...); of 3, the range."""
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    return np.percentile(values[draws].mean(axis=1), [2.5, 97.5], axis=0)


def sheet(title: str, ylabel: str, tasks: tuple[str, ...]):
    """The figure and its panels by task, one, two or six of them."""
    rows, columns = (2, 3) if len(tasks) == 6 else (1, len(tasks))
    size = (10.5, 6) if len(tasks) == 6 else (6.5 if len(tasks) == 1 else 10.5, 4.4)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=11)
    for task, axes in zip(tasks, panels.flat, strict=True):
        axes.set_title(task.removesuffix("-v2"), loc="left", fontsize=11)
    plt.setp(panels[-1], xlabel="environment steps")
    plt.setp(panels[:, 0], ylabel=ylabel)
    return figure, dict(zip(tasks, panels.flat, strict=True))


def finish_panel(axes, steps: float, note: str = "") -> None:
    """The axis of steps; without any, the panel says so."""
    if not steps:
        axes.text(0.5, 0.5, "not run yet", transform=axes.transAxes, ha="center", color="0.5")
        axes.set(xticks=[], yticks=[])
        return
    axes.set_xlim(0, steps)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k
    axes.set_title(note, loc="right", fontsize=8, color="0.4")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def finish(figure, lines: dict, path: Path) -> None:
    """One legend for all panels; write the file."""
    style = {"loc": "outside lower center", "ncols": 6, "frameon": False, "fontsize": 9}
    if lines:
        figure.legend(lines.values(), lines.keys(), columnspacing=1.2, **style)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(path)


# ----------------------------------- Figure 2 and the tables ------------------------------------


def read_curves(rows: list[dict[str, str]], env_id: str) -> dict[str, Seeds]:
    """The evaluations of a task to STEPS, by method and seed, in the order of METHODS."""
    points, curves = defaultdict(list), defaultdict(dict)
    for row in (row for row in rows if row["env_id"] == env_id and int(row["step"]) <= STEPS):
        point = [number(row[name]) for name in ("step", "success_rate", "return")]
        points[row["method"], int(row["seed"])].append(point)
    for method, seed in sorted(points, key=lambda run: ([*METHODS, run[0]].index(run[0]), run[1])):
        curves[method][seed] = np.array(sorted(points[method, seed])).T
    return curves


def cut(curves: dict[str, Seeds]) -> dict[str, Seeds]:
    """CUP and SAC up to equal steps: as many as half of the seeds of both have.

    Other methods are cut there as well, or where half of their own seeds are. Seeds that are not
    there yet are left out.
    """
    ends = {m: median_high(curve[0, -1] for curve in seeds.values()) for m, seeds in curves.items()}
    common = min([ends[m] for m in ("cup", "sac") if m in ends] or ends.values(), default=0)
    result = {}
    for method, seeds in curves.items():
        end = min(ends[method], common)
        there = {s: curve[:, curve[0] <= end] for s, curve in seeds.items() if curve[0, -1] >= end}
        # a run that once ended elsewhere has an evaluation of its own there
        shared = set.intersection(*(set(curve[0]) for curve in there.values()))
        result[method] = {
            s: curve[:, np.isin(curve[0], list(shared))] for s, curve in there.items()
        }
    return result


def figure2(curves: dict[str, dict[str, Seeds]], what: str, path: Path) -> None:
    """Mean over seeds with its interval; a thin line for every seed."""
    scale, column = (100, 1) if what == "success" else (1, 2)
    title = f"Figure 2: {what} of the mean action; 95 % bootstrap intervals, of 3 seeds their range"
    label = "success, %" if what == "success" else "return of an episode"
    figure, panels = sheet(title, label, TASKS)
    lines = {}
    for task, axes in panels.items():
        counts, last = [], 0
        for method, seeds in cut(curves[task]).items():
            name, colour, style = METHODS.get(method, (method, "0.5", "-"))
            for curve in curves[task][method].values():
                axes.plot(curve[0], scale * curve[column], style, color=colour, lw=0.7, alpha=0.5)
                last = max(last, curve[0, -1])
            all_seeds = np.stack([*seeds.values()])  # (seeds, 3, evaluations)
            steps, values = all_seeds[0, 0], scale * all_seeds[:, column]
            (lines[name],) = axes.plot(steps, values.mean(axis=0), style, color=colour, lw=2)
            if len(values) > 1:
                axes.fill_between(steps, *interval(values), color=colour, alpha=0.2, lw=0)
            counts.append(len(seeds))
        finish_panel(axes, last, f"seeds: {', '.join(map(str, counts))}")
        axes.set_ylim((-3, 103) if what == "success" else (0, None))
    finish(figure, lines, path)


def scores(curve: np.ndarray) -> list[float]:
    """Success area, return area, final and best success, steps to 50 % of one seed.

    An area is the mean of the evaluations, which are at equal distances.
    """
    steps, success, returns = curve
    half = steps[success >= 0.5]
    to_half = half[0] if len(half) else np.nan
    return [success.mean(), returns.mean(), success[-1], success.max(), to_half]


def markdown(titles: list[str], lines: list[list]) -> str:
    cells = [titles, ["---"] * len(titles), *lines]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in cells)


def table(curves: dict[str, dict[str, Seeds]]) -> str:
    """A line for every task and method, and the ratios of CUP's and SAC's."""

    def cell(values, scale=1, digits=1):
        """Mean over seeds [95 % interval]."""
        numbers = scale * values.mean(), *(scale * interval(values))
        mean, low, high = (f"{number:,.{digits}f}" for number in numbers)
        return f"{mean} [{low}, {high}]" if len(values) > 1 else mean

    def ratio(a, b):
        if not (b.mean() > 0 and np.isfinite(a.mean())):
            return "–"
        return f"{a.mean() / b.mean():.2f}" if a.mean() < 100 * b.mean() else "over 100"

    lines = []
    for task in TASKS:
        by_seed, found = cut(curves[task]), {}  # (5, seeds) scores of each method
        for method, seeds in by_seed.items():
            found[method] = np.array([scores(curve) for curve in seeds.values()]).T
            success, returns, final, best, half = found[method]
            reached = half[np.isfinite(half)]
            to_half = f"{reached.mean():,.0f}" if len(reached) else "never"
            if 0 < len(reached) < len(half):
                to_half += f" ({len(reached)} of {len(half)} seeds)"
            steps = next(iter(seeds.values()))[0, -1]
            line = [task, METHODS.get(method, (method,))[0], len(seeds), f"{steps:,.0f}"]
            line += [cell(success, 100), cell(returns, 1, 0), cell(final, 100, 0)]
            line += [f"{100 * best.mean():.0f}", to_half]
            lines.append(line)
        if {"cup", "sac"} <= found.keys():
            line = [task, "CUP / SAC", "", ""]
            line += [ratio(*pair) for pair in zip(found["cup"], found["sac"], strict=True)]
            cup, sac = by_seed["cup"], by_seed["sac"]
            both = cup.keys() & sac.keys()
            ahead = sum(scores(cup[seed])[1] > scores(sac[seed])[1] for seed in both)
            line[5] += f", CUP ahead at {ahead} of {len(both)} seeds"
            lines.append(line)
        if not found:
            lines.append([task, "not run yet", *[""] * 7])
    titles = ["task", "method", "seeds", "steps", "success area, %", "return area"]
    titles += ["final success, %", "best success, %", "steps to 50 % success"]
    return markdown(titles, lines)


def tuning_table(rows: list[dict[str, str]]) -> str:
    """A line for every run of tuning.csv."""
    keys, runs, lines = ["env_id", "tag", "method", "seed", "beta1", "beta2"], defaultdict(list), []
    for row in rows:
        point = [number(row[name]) for name in ("step", "return", "success_rate")]
        runs[tuple(row[name] for name in keys)].append(point)
    for key, points in sorted(runs.items()):
        step, returns, success = np.array(points).T
        parts = returns[step <= 100_000], returns[step > 100_000]
        means = [f"{part.mean():,.0f}" if len(part) else "–" for part in parts]
        lines.append([*key, f"{step[-1]:,.0f}", *means, f"{100 * success.max():.0f}"])
    titles = ["task", "run", *keys[2:], "steps", "return to 100,000 steps, mean"]
    return markdown([*titles, "return after that, mean", "best success, %"], lines)


# -------------------------------------- the other figures ---------------------------------------


def figure3(rows, tasks: tuple[str, ...], path: Path) -> None:
    """Share of every candidate as guidance policy, and the success, in training."""
    title = "Figure 3: candidates selected as guidance policy during training"
    figure, panels = sheet(title, "share of states; success, %", tasks)
    lines, colours = {}, dict(CANDIDATES)
    for task, axes in panels.items():
        points = defaultdict(lambda: defaultdict(list))  # by candidate and seed: (step, value)
        for row in (row for row in rows if row["env_id"] == task):
            step, seed, name = int(row["step"]), row["seed"], row["candidate"]
            points[name][seed].append((step, 100 * number(row["selected"])))
            if name == "target":
                points["success rate"][seed].append((step, 100 * number(row["success_rate"])))
        ends = {seed: max(curve)[0] for seed, curve in points.get("target", {}).items()}
        end = min(STEPS, median_high(ends.values())) if ends else 0
        start, _ = min(map(min, points.get("target", {}).values()), default=(0, 0))
        grid = np.linspace(start, end, 100)
        whole = [seed for seed in ends if ends[seed] >= end]
        for name in sorted(points, key=lambda name: ([*CANDIDATES, name].index(name), name)):
            curves = [np.array(sorted(c)).T for seed, c in points[name].items() if seed in whole]
            known = [curve[:, np.isfinite(curve[1])] for curve in curves]
            values = np.stack([np.interp(grid, *curve, left=np.nan) for curve in known])
            colour = colours.setdefault(name, SPARE[len(colours) - len(CANDIDATES)])
            style = "--" if name == "success rate" else "-"
            (lines[name],) = axes.plot(grid, values.mean(axis=0), style, color=colour, lw=1.6)
            if len(values) > 1:
                axes.fill_between(grid, *interval(values), color=colour, alpha=0.15, lw=0)
        finish_panel(axes, end, f"seeds: {len(whole)}")
        axes.set_ylim(-3, 103)
    finish(figure, lines, path)


def figure4(rows: list[dict[str, str]], path: Path) -> None:
    """Every candidate's advantage along one episode."""
    about, size = rows[0], np.mean([abs(float(row["value"])) for row in rows])
    title = f"Figure 4: one episode of seed {about['seed']} after {int(about['trained']):,} steps"
    figure, panels = sheet(title, f"advantage; mean |V| is {size:.1f}", (about["env_id"],))
    axes, lines, colours = panels[about["env_id"]], {}, dict(CANDIDATES)
    for name in dict.fromkeys(row["candidate"] for row in rows):
        values = [float(row["advantage"]) for row in rows if row["candidate"] == name]
        colour = colours.setdefault(name, SPARE[len(colours) - len(CANDIDATES)])
        style = "--" if name == "target" else "-"
        (lines[name],) = axes.plot(values, style, color=colour, lw=1.3)
    finish_panel(axes, len(values))
    finish(figure, lines, path)


def figure_sources(directory: Path, path: Path) -> None:
    """Success and return of the training of each source, a panel each."""
    title = "Training of the source policies: success (left) and return (right)"
    figure, panels = sheet(title, "success, %", SOURCES)
    lines = {}
    for task, axes in panels.items():
        right, last = axes.twinx(), 0
        # a source that was trained by CUP has plain SAC beside it
        for file, note, style in (task, "", ".-"), (f"{task}-sac", " of plain SAC", ".:"):
            rows = [row for row in read_csv(directory / f"{file}.csv") if row["eval/return"]]
            steps = [int(row["step"]) for row in rows]
            success = [100 * number(row["eval/success_rate"]) for row in rows]
            returns = [float(row["eval/return"]) for row in rows]
            curves = ("success", axes, GREEN, success), ("return", right, BLUE, returns)
            for name, side, colour, values in curves if rows else ():
                (lines[name + note],) = side.plot(steps, values, style, color=colour, lw=1.2)
            last = max([last, *steps])
        finish_panel(axes, last)
        axes.set_ylim(-3, 103)
        right.set_ylim(0, None)
        right.spines[["top", "left"]].set_visible(False)
    finish(figure, lines, path)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    figure_sources(args.dir / "sources", args.dir / "sources.png")
    if rows := read_csv(args.dir / "figure4.csv"):
        figure4(rows, args.dir / "figure4.png")
    if rows := read_csv(args.dir / "selection.csv"):
        figure3(rows, ("push-wall-v2",), args.dir / "figure3.png")
        figure3(rows, TASKS, args.dir / "figure3_all.png")
    if rows := read_csv(args.dir / "transfer.csv"):
        curves = {task: read_curves(rows, task) for task in TASKS}
        for what in ("success", "return"):
            figure2(curves, what, args.dir / f"figure2_{what}.png")
        (args.dir / "transfer.md").write_text(table(curves))
        print(table(curves), end="")
    if rows := read_csv(args.dir / "tuning.csv"):
        (args.dir / "tuning.md").write_text(tuning_table(rows))


if __name__ == "__main__":
    main()
