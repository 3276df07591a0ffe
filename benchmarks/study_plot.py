"""Tables and pictures of docs/results.md from the rows of a study.

    python benchmarks/study_plot.py benchmarks/results/study_h100
    python benchmarks/study_plot.py DIR --page PAGE.md --images FOLDER

The page keeps what it says; only what stands between `<!-- NAME -->` and `<!-- end of NAME -->` is
written anew, NAME being the folder's. A page without these lines is given them at its end.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from study_runs import KEY, read_rows

from v2m.errors import InputError
from v2m.recipes.study import BEST, VARIANTS

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "corners"
COLOURS = plt.get_cmap("tab10").colors


def final_rows(directory: Path) -> dict[str, list[dict[str, str]]]:
    """The runs that count, by variant, in the order of the recipe."""
    rows = [row for row in read_rows(directory / "runs.csv") if row["stage"] == "final"]
    if not rows:
        raise InputError(f"{directory}/runs.csv has no run that counts yet.")
    found = {name: [row for row in rows if row["variant"] == name] for name in VARIANTS}
    return {name: sorted(of, key=lambda r: int(r["seed"])) for name, of in found.items() if of}


def values(rows: list[dict[str, str]], column: str, scale: float = 1.0) -> list[float]:
    return [scale * float(row[column]) for row in rows if row[column]]


def spread(numbers: list[float]) -> str:
    """Mean and standard deviation between seeds."""
    if len(numbers) == 1:
        return f"{numbers[0]:.2f}"
    return f"{statistics.mean(numbers):.2f} ± {statistics.stdev(numbers):.2f}"


def difference(found: list[float], reference: list[float]) -> str:
    """Of the means, with its standard error; from two seeds each on."""
    if min(len(found), len(reference)) < 2:
        return ""
    error = sum(statistics.variance(x) / len(x) for x in (found, reference)) ** 0.5
    return f"{statistics.mean(found) - statistics.mean(reference):+.2f} ± {error:.2f}"


def seconds_alone(run: dict[str, str], alone: dict[str, str]) -> float:
    """What the training of a run takes with nothing else on the device: its images over the speed.

    The clock of the run itself (`train_seconds`) also counts the runs beside it.
    """
    images = float(run["images_per_second"]) * float(run["train_seconds"])
    return images / float(alone["images_per_second"])


def main_table(directory: Path) -> list[str]:
    runs = final_rows(directory)
    way = {"captured": {}, "eager": {}}
    for row in read_rows(directory / "speed.csv"):
        if not row["error"]:
            way[row["way"]][row["variant"]] = row
    alone = {**way["eager"], **way["captured"]}
    reference = values(runs.get(REFERENCE, []), "test_top1", 100)
    lines = [
        "| model | parameters | rate | seeds | test top-1, % | against `corners` | validation, %"
        " | training alone, s | images/s alone | peak memory, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in runs.items():
        test = values(rows, "test_top1", 100)
        compared = "" if name == REFERENCE else difference(test, reference)
        memory = values(rows, "peak_memory_gib")
        cells = (
            VARIANTS[name].title,
            f"{int(rows[0]['parameters']):,}",
            f"{float(rows[0]['lr']):g}",
            str(len(rows)),
            spread(test),
            compared,
            spread(values(rows, "validation_top1", 100)),
            f"{seconds_alone(rows[0], alone[name]):.0f}" if name in alone else "",
            f"{int(alone[name]['images_per_second']):,}" if name in alone else "",
            f"{max(memory):.2f}" if memory else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    first = next(iter(runs.values()))[0]
    versions = ", ".join(
        f"{name} {first[name]}" for name in ("torch", "triton", "v2m") if first[name]
    )
    dates = sorted({row["date"] for rows in runs.values() for row in rows})
    lines += [
        "",
        f"{first['device']}, {versions}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; "
        f"recipe `{first['recipe']}`, {first['epochs']} epochs, {first['at_once']} runs at once.",
    ]
    return lines


def tuning_table(directory: Path) -> list[str]:
    """Validation top-1 of every variant with every learning rate that was tried."""
    rows = [row for row in read_rows(directory / "runs.csv") if row["stage"] == "tune"]
    if not rows:
        return []
    rates = sorted({float(row["lr"]) for row in rows})
    lines = [
        f"Validation top-1, %, after {rows[0]['epochs']} epochs, by learning rate:",
        "",
        f"| model | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "|---|" + "---|" * len(rates),
    ]
    for name, variant in VARIANTS.items():
        found = {float(r["lr"]): r["validation_top1"] for r in rows if r["variant"] == name}
        if found:
            cells = (f"{100 * float(found[r]):.2f}" if r in found else "" for r in rates)
            lines.append(f"| {variant.title} | {' | '.join(cells)} |")
    return lines


def best_table(directory: Path) -> list[str]:
    rows = [row for row in read_rows(directory / "runs.csv") if row["stage"] in ("trial", "best")]
    if not rows:
        return []
    lines = [
        "| model | run | settings | parameters | epochs | rate | training, s | validation top-1, %"
        " | test top-1, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        test = f"{100 * float(row['test_top1']):.2f}" if row["test_top1"] else ""
        lines.append(
            f"| {BEST[row['variant']].title} | {row['stage']} | {row.get('settings', '')} | "
            f"{int(row['parameters']):,} | "
            f"{row['epochs']} | {float(row['lr']):g} | {float(row['train_seconds']):.0f} | "
            f"{100 * float(row['validation_top1']):.2f} | {test} |"
        )
    return lines


def curves(directory: Path) -> dict[tuple[str, ...], list[dict]]:
    """The epochs of each run; of one that was repeated, the last."""
    lines = (directory / "curves.jsonl").read_text(encoding="utf-8").splitlines()
    records = map(json.loads, lines)
    return {tuple(record[name] for name in KEY): record["curve"] for record in records}


def draw(directory: Path, path: Path) -> None:
    """Validation top-1 over the epochs, and the test top-1 of every seed."""
    runs, epochs = final_rows(directory), curves(directory)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for place, (name, rows) in enumerate(runs.items()):
        colour = COLOURS[list(VARIANTS).index(name) % len(COLOURS)]
        lines = [
            [100 * record["validation_top1"] for record in epochs[tuple(row[k] for k in KEY)]]
            for row in rows
        ]
        mean = [statistics.mean(column) for column in zip(*lines)]
        label = VARIANTS[name].title.replace("`", "")
        left.plot(range(1, len(mean) + 1), mean, ".-", color=colour, label=label, linewidth=1.4)
        test = values(rows, "test_top1", 100)
        right.plot(test, [place] * len(test), "o", color=colour, markersize=5, alpha=0.7)
        right.plot([statistics.mean(test)], [place], "|", color=colour, markersize=18)
    left.set(xlabel="epoch", ylabel="validation top-1, %, mean of the seeds")
    floor = min(min(line.get_ydata()[len(line.get_ydata()) // 3 :]) for line in left.lines)
    left.set_ylim(bottom=floor - 1)
    left.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    right.set_yticks(range(len(runs)), [VARIANTS[n].title.replace("`", "") for n in runs])
    right.invert_yaxis()
    right.set(xlabel="test top-1, %, each seed; the bar is the mean")
    right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def fill(page: str, name: str, lines: list[str]) -> str:
    """The page with `lines` between the marks of `name`."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = "\n".join((start, *lines, end))
    if start not in page:
        return f"{page}\n{text}\n".lstrip()
    return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: text, page, flags=re.DOTALL)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args(words)
    directory = arguments.directory
    try:
        picture = arguments.images / f"{directory.name}.png"
        draw(directory, picture)
        relative = Path(*picture.parts[-2:]).as_posix()
        image = f"![Validation accuracy over the epochs, and test accuracy by seed]({relative})"
        parts = (main_table(directory), [image], tuning_table(directory), best_table(directory))
        lines = [line for part in parts if part for line in (*part, "")]
        page = arguments.page.read_text(encoding="utf-8") if arguments.page.exists() else ""
        arguments.page.write_text(fill(page, directory.name, lines[:-1]), encoding="utf-8")
    except InputError as error:
        print(f"study_plot: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.page} and {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
