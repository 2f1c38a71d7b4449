"""Draw what transfer.py collected; everything is computed from its csv files.

    python benchmark/plot.py                        # all figures and tables
    python benchmark/plot.py --figure4 runs/transfer/pick-place-wall-v2__cup__1

transfer.csv gives figure2_success.png, figure2_return.png and transfer.md; selection.csv
gives figure3.png and figure3_all.png; figure4.csv, which --figure4 makes by playing one
episode, gives figure4.png. Numbers are those of the paper's figures. sources/<task>.csv,
the metrics.csv of train_sources.py's runs, give sources.png; tuning.csv gives tuning.md.
"""

import csv
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high

import numpy as np
import tyro

try:
    import matplotlib
    from scipy.stats import DegenerateDataWarning, bootstrap
except ImportError as missing:
    hint = "pip install -r benchmark/requirements.txt"
    print(f"plot.py: needs a package ({missing}): {hint}", file=sys.stderr)
    sys.exit(2)
matplotlib.use("Agg")
import matplotlib.pyplot as plt

# where all seeds are equal, so are the ends of the interval
warnings.simplefilter("ignore", DegenerateDataWarning)

TASKS = ("hammer-v2", "peg-insert-side-v2", "push-wall-v2")
TASKS += ("pick-place-wall-v2", "push-back-v2", "shelf-place-v2")
SOURCES = ("reach-v2", "push-v2", "pick-place-v2")
SOURCES += ("drawer-close-v2", "push-wall-v2", "coffee-button-v2")
METHODS = {"cup": ("CUP", "#0072B2", "-"), "sac": ("SAC", "#D55E00", "--")}
# Okabe and Ito's colours, which the colour-blind can tell apart; green is the success
COLOURS = {"reach-v2": "#56B4E9", "push-v2": "#E69F00", "pick-place-v2": "#CC79A7"}
COLOURS |= {"target": "#555555"}
SPARE, GREEN = ("#0072B2", "#D55E00", "#F0E442", "#000000"), "#009E73"
NOTE = {"fontsize": 8, "color": "0.4"}
POINTS = 100  # of a line of Figure 3
FIGURE4 = ("env_id", "seed", "trained", "step", "candidate", "advantage", "value")
SAMPLES = 64  # actions per candidate in Figure 4; training takes fewer


@dataclass
class Args:
    """Draw the figures of the transfer study and print its table."""

    dir: Path = Path(__file__).resolve().parent
    """where the csv files are, and the figures go"""
    figure4: Path | None = None
    """run directory: play one episode, plot every source's advantage"""
    episode_seed: int = 1
    """seed of the goal of that episode"""


class UserError(Exception):
    """Something the user can put right; `main` prints it and exits with code 2."""


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def number(text: str) -> float:
    return float(text) if text else np.nan


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean over seeds, (seeds, ...) -> (...) twice."""
    if len(values) < 2:
        return np.full((2, *values.shape[1:]), np.nan)
    result = bootstrap(
        (values,), np.mean, axis=0, method="percentile", n_resamples=2000, rng=0
    )
    return result.confidence_interval.low, result.confidence_interval.high


# ------------------------------- Figure 2 and the table -------------------------------


class Curves:
    """Evaluations of a task: by method and seed, arrays of step, success, return."""

    def __init__(self, rows: list[dict[str, str]], env_id: str):
        points = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row["env_id"] == env_id:
                point = [number(row[n]) for n in ("step", "success_rate", "return")]
                points[row["method"]][int(row["seed"])].append(point)
        self.seeds = {
            method: {seed: np.array(sorted(p)).T for seed, p in sorted(seeds.items())}
            for method, seeds in points.items()
            if method in METHODS
        }
        ends = [[c[0, -1] for c in seeds.values()] for seeds in self.seeds.values()]
        # equal environment steps for all methods, as far as half of their seeds are
        self.horizon = min(map(median_high, ends), default=0)

    def complete(self, method: str) -> dict[int, np.ndarray]:
        """Seeds that reached the horizon, (3, evaluations) each, up to the horizon."""
        seeds = self.seeds.get(method, {}).items()
        seeds = {
            s: c[:, c[0] <= self.horizon] for s, c in seeds if c[0, -1] >= self.horizon
        }
        lengths = [c.shape[1] for c in seeds.values()]
        return {s: c for s, c in seeds.items() if c.shape[1] == max(lengths)}


def empty(axes) -> None:
    axes.text(
        0.5, 0.5, "not run yet", transform=axes.transAxes, ha="center", color="0.5"
    )
    axes.set(xticks=[], yticks=[])


def steps_axis(axes, horizon: float) -> None:
    axes.set_xlim(0, horizon)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(
        lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1000:g}k"
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def sheet(title: str, ylabel: str, tasks: tuple[str, ...] = TASKS):
    """Six panels in the paper's order."""
    figure, panels = plt.subplots(2, 3, figsize=(10.5, 6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    for task, axes in zip(tasks, panels.flat, strict=True):
        axes.set_title(task.removesuffix("-v2"), loc="left", fontsize=11)
    for axes in panels[:, 0]:
        axes.set_ylabel(ylabel)
    for axes in panels[1]:
        axes.set_xlabel("environment steps")
    return figure, dict(zip(tasks, panels.flat, strict=True))


def finish(figure, handles: dict, path: Path) -> None:
    """One legend for all panels; write the file."""
    style = {"loc": "outside lower center", "ncols": 5, "frameon": False}
    if handles:
        figure.legend(
            handles.values(), handles.keys(), fontsize=9, columnspacing=1.2, **style
        )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(path)


def figure2(curves: dict[str, Curves], what: str, path: Path) -> None:
    """Mean over seeds with its interval; a thin line for every seed."""
    scale, column = (100, 1) if what == "success" else (1, 2)
    label = "success, %" if what == "success" else "return of an episode"
    title = f"Figure 2: {what} of the mean action, 95 % bootstrap intervals over seeds"
    figure, panels = sheet(title, label)
    handles = {}
    for task, axes in panels.items():
        if not curves[task].seeds:
            empty(axes)
            continue
        last, counts = 0, []
        for method, (name, colour, style) in METHODS.items():
            for curve in curves[task].seeds.get(method, {}).values():
                axes.plot(
                    curve[0],
                    scale * curve[column],
                    style,
                    color=colour,
                    lw=0.7,
                    alpha=0.5,
                )
                last = max(last, curve[0, -1])
            if complete := list(curves[task].complete(method).values()):
                steps, values = (
                    complete[0][0],
                    scale * np.stack([c[column] for c in complete]),
                )
                (handles[name],) = axes.plot(
                    steps, values.mean(axis=0), style, color=colour, lw=2
                )
                if len(values) > 1:
                    axes.fill_between(
                        steps, *interval(values), color=colour, alpha=0.2, lw=0
                    )
            counts.append(f"{name} {len(complete)}")
        steps_axis(axes, last)
        axes.set_ylim((-3, 103) if what == "success" else (0, None))
        axes.set_title(f"seeds: {', '.join(counts)}", loc="right", **NOTE)
    finish(figure, handles, path)


def scores(curve: np.ndarray) -> list[float]:
    """Success area, return area, final and best success, steps to 50 % of one seed.

    An area is the mean height of the curve between its first and last evaluation.
    """
    steps, success, returns = curve
    span = np.ptp(steps)
    areas = [
        np.trapezoid(y, steps) / span if span else y[0] for y in (success, returns)
    ]
    half = steps[success >= 0.5]
    return [*areas, success[-1], success.max(), half[0] if len(half) else np.nan]


def table(curves: dict[str, Curves]) -> str:
    titles = "task | method | seeds | steps | success area, % | return area | "
    titles += "final success, % | best success, % | steps to 50 % success"
    lines = [f"| {titles} |", "|" + " --- |" * 9]

    def cell(values, scale=1, digits=1):
        """Mean over seeds [95 % interval]."""
        text = f"{scale * values.mean():,.{digits}f}"
        low, high = interval(values)
        if len(values) < 2:
            return text
        return f"{text} [{scale * low:,.{digits}f}, {scale * high:,.{digits}f}]"

    def ratio(a, b):
        a, b = a.mean(), b.mean()
        if not (b > 0 and np.isfinite(a)):
            return "–"
        return f"{a / b:.2f}" if a < 100 * b else "over 100"

    for task, curve in curves.items():
        if not curve.seeds:
            lines.append(f"| {task} | not run yet |" + " |" * 7)
            continue
        by_seed = {
            m: {s: scores(c) for s, c in curve.complete(m).items()} for m in METHODS
        }
        columns = {m: np.array(list(s.values())).T for m, s in by_seed.items()}
        for method, values in columns.items():
            if not len(values):
                continue
            success, returns, final, best, half = values
            reached = np.isfinite(half)
            to_half = f"{half[reached].mean():,.0f}" if reached.any() else "never"
            if reached.any() and not reached.all():
                to_half += f" ({reached.sum()} of {len(half)} seeds)"
            line = [task, METHODS[method][0], len(half), f"{curve.horizon:,.0f}"]
            line += [cell(success, 100), cell(returns, 1, 0), cell(final, 100, 0)]
            line += [f"{100 * best.mean():.0f}", to_half]
            lines.append("| " + " | ".join(map(str, line)) + " |")
        if all(len(values) for values in columns.values()):
            both = by_seed["cup"].keys() & by_seed["sac"].keys()
            ahead = sum(by_seed["cup"][s][1] > by_seed["sac"][s][1] for s in both)
            ratios = [ratio(*pair) for pair in zip(*columns.values(), strict=True)]
            line = [task, "CUP / SAC", "", "", *ratios]
            line[5] += f", CUP ahead at {ahead} of {len(both)} seeds"
            lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def tuning_table(rows: list[dict[str, str]]) -> str:
    """A line for every run of tuning.csv."""
    titles = "task | run | seed | beta1 | beta2 | steps | return to 100,000 steps, mean"
    titles += " | return after that, mean | best success, %"
    lines, runs = [f"| {titles} |", "|" + " --- |" * 9], defaultdict(list)
    for row in rows:
        key = row["env_id"], row["tag"], row["seed"], row["beta1"], row["beta2"]
        runs[key].append([float(row[c]) for c in ("step", "return", "success_rate")])
    for key, evaluations in sorted(runs.items()):
        step, returns, success = np.array(evaluations).T
        young = step <= 100_000
        line = [*key, f"{step[-1]:,.0f}"]
        for part in (returns[young], returns[~young]):
            line.append(f"{part.mean():,.0f}" if len(part) else "–")
        line.append(f"{100 * success.max():.0f}")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


# -------------------------------------- Figure 3 --------------------------------------


def figure3(rows: list[dict[str, str]], env_id: str, axes, handles: dict) -> None:
    """Share of every candidate as guidance policy, and the success, in training."""
    lines = defaultdict(lambda: defaultdict(list))  # name, seed: (step, percent)
    for row in rows:
        if row["env_id"] == env_id:
            step, seed, name = int(row["step"]), int(row["seed"]), row["candidate"]
            lines[name][seed].append((step, 100 * number(row["selected"])))
            if name == "target":
                success = 100 * number(row["success_rate"])
                lines["success rate"][seed].append((step, success))
    if not lines:
        empty(axes)
        return
    ends = [max(points)[0] for points in lines["target"].values()]
    start, end = min(min(p)[0] for p in lines["target"].values()), median_high(ends)
    grid, spare = np.linspace(start, end, POINTS), iter(SPARE * 9)
    order = sorted(lines, key=lambda n: [*COLOURS, n, "success rate"].index(n))
    for name in order:
        values = []
        for points in lines[name].values():
            steps, percent = np.array(sorted(points)).T
            if steps[-1] >= end:  # seeds still on their way are left out
                known = np.isfinite(percent)
                values.append(np.interp(grid, steps[known], percent[known], np.nan))
        is_success = name == "success rate"
        colour = GREEN if is_success else COLOURS.get(name) or next(spare)
        style = {"color": colour, "ls": "--" if is_success else "-", "lw": 1.6}
        (handles[name],) = axes.plot(grid, np.mean(values, axis=0), **style)
        if len(values) > 1:
            low, high = interval(np.stack(values))
            axes.fill_between(grid, low, high, color=colour, alpha=0.15, lw=0)
    steps_axis(axes, end)
    axes.set_ylim(-3, 103)
    axes.set_title(f"seeds: {len(values)}", loc="right", **NOTE)


def draw_figure3(rows: list[dict[str, str]], out: Path) -> None:
    label = "share of states; success, %"
    title = "Figure 3: candidates selected as guidance policy during training"
    figure, axes = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes.set_title("push-wall", loc="left", fontsize=10)
    axes.set(xlabel="environment steps", ylabel=label)
    handles: dict = {}
    figure3(rows, "push-wall-v2", axes, handles)
    finish(figure, handles, out / "figure3.png")
    figure, panels = sheet(title, label)
    handles = {}
    for task, axes in panels.items():
        figure3(rows, task, axes, handles)
    finish(figure, handles, out / "figure3_all.png")


# -------------------------------------- Figure 4 --------------------------------------


def play(run_dir: Path, episode_seed: int, path: Path) -> None:
    """Play one episode of the run; write every candidate's advantage to csv."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    import cup

    try:
        actor = cup.load_policy(run_dir / "policy.pt")
        file = run_dir / "checkpoint.pt"
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (cup.UserError, OSError) as error:
        raise UserError(
            f"{run_dir} is not a run directory of cup.py: {error}"
        ) from None
    args, state = cup.Args(**checkpoint["args"]), checkpoint["agent"]
    sources = {n: cup.build_actor(c) for n, c in checkpoint["sources"].items()}
    if not sources:
        raise UserError(f"{run_dir} had no sources: Figure 4 needs a run of CUP")
    critic = cup.SoftQNetwork(actor.obs_dim, actor.action_dim, args.hidden_sizes)
    critic.load_state_dict(state["critic"])
    actor.load_state_dict(state["actor"])  # that of the critic's step
    env = cup.make_env(args.env_id, cup.derive_seed(episode_seed, 3))
    observations, done = [env.reset()[0]], False
    with torch.no_grad():
        while not done:
            obs = torch.as_tensor(observations[-1], dtype=torch.float32)
            action = torch.tanh(actor(obs)[0]).numpy()
            obs, _, terminated, truncated, info = env.step(action)
            observations.append(obs)
            done = terminated or truncated
        obs = torch.as_tensor(np.array(observations[:-1]), dtype=torch.float32)
        mean, log_std = (x.unsqueeze(1) for x in actor(obs))
        dist = cup.query_sources(sources.values(), obs, args)
        means = torch.cat([dist[:, :, 0], mean], dim=1)  # (steps, n + 1, action_dim)
        log_stds = torch.cat([dist[:, :, 1], log_std], dim=1)
        torch.manual_seed(episode_seed)
        noise = torch.randn(SAMPLES, len(obs), 1, actor.action_dim)
        # (samples, steps, n + 1, ...)
        action, log_prob = cup.squash(means, log_stds, noise)
        q = critic(obs.unsqueeze(1).expand(*action.shape[:3], -1), action).amin(dim=0)
        alpha = state["log_alpha"].exp() if args.soft_advantage else 0.0
        advantage, value = cup.expected_advantage(q, log_prob, alpha)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIGURE4)
        about = args.env_id, args.seed, checkpoint["step"]
        for step in range(len(obs)):
            for k, name in enumerate([*sources, "target"]):
                numbers = (f"{x:.5g}" for x in (advantage[step, k], value[step]))
                writer.writerow([*about, step, name, *numbers])
    print(f"{path}: return {info['return']:.1f}, success {info['success']:.0%}")


def figure4(rows: list[dict[str, str]], path: Path) -> None:
    about, lines = rows[0], defaultdict(list)
    for row in rows:
        lines[row["candidate"]].append((int(row["step"]), float(row["advantage"])))
    values = [abs(float(row["value"])) for row in rows]
    figure, axes = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
    task, trained = about["env_id"].removesuffix("-v2"), f"{int(about['trained']):,}"
    title = f"Figure 4: expected advantage along one episode, {task},\n"
    title += (
        f"seed {about['seed']}, after {trained} steps; mean |V| {np.mean(values):.1f}"
    )
    axes.set_title(title, fontsize=10)
    spare, handles = iter(SPARE * 9), {}
    for name, points in lines.items():
        style = {"color": COLOURS.get(name) or next(spare), "lw": 1.3}
        style |= {"ls": "--", "lw": 1} if name == "target" else {}
        (handles[name],) = axes.plot(*zip(*points, strict=True), **style)
    axes.set_xlabel("environment steps of the episode")
    axes.set_ylabel("expected advantage over the target policy")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    finish(figure, handles, path)


# --------------------------------------- sources ---------------------------------------


def draw_sources(directory: Path, path: Path) -> None:
    """Success and return of the training of each source, a panel each."""
    title = "Training of the source policies: success (left) and return (right)"
    figure, panels = sheet(title, "success, %", SOURCES)
    handles = {}
    for task, axes in panels.items():
        rows = read(directory / f"{task}.csv")
        if not rows:
            empty(axes)
            continue
        success, score, right = "eval/success_rate", "eval/return", axes.twinx()
        lines = [(rows, success, axes, 100, GREEN, ".-", "success, mean action")]
        lines += [(rows, score, right, 1, "#0072B2", ".-", "return, mean action")]
        if sac := read(directory / f"{task}-sac.csv"):  # what CUP is compared with
            lines += [(sac, success, axes, 100, GREEN, ".:", "success of plain SAC")]
            lines += [(sac, score, right, 1, "#0072B2", ".:", "return of plain SAC")]
        for curve, column, side, scale, colour, style, label in lines:
            points = [(int(r["step"]), number(r[column])) for r in curve if r[column]]
            steps, values = np.array(points).T
            (handles[label],) = side.plot(
                steps, scale * values, style, color=colour, lw=1.2
            )
        for side in (axes, right):
            steps_axis(side, int(rows[-1]["step"]))
        axes.set_ylim(-3, 103)
        right.set_ylim(0, None)
        right.grid(False)
        right.spines["right"].set_visible(True)
    finish(figure, handles, path)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        if args.figure4:
            play(args.figure4, args.episode_seed, args.dir / "figure4.csv")
        draw_sources(args.dir / "sources", args.dir / "sources.png")
        if rows := read(args.dir / "figure4.csv"):
            figure4(rows, args.dir / "figure4.png")
        if rows := read(args.dir / "selection.csv"):
            draw_figure3(rows, args.dir)
        if rows := read(args.dir / "transfer.csv"):
            curves = {task: Curves(rows, task) for task in TASKS}
            for what in ("success", "return"):
                figure2(curves, what, args.dir / f"figure2_{what}.png")
            text = table(curves)
            (args.dir / "transfer.md").write_text(text + "\n")
            print(text)
        if rows := read(args.dir / "tuning.csv"):
            (args.dir / "tuning.md").write_text(tuning_table(rows) + "\n")
    except (UserError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
