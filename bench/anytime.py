"""How good a model each way has after so much time: tlauto's search and what people do without it.

    python bench/anytime.py --data DIR --weights-dir DIR --keep FOLDER
    python bench/anytime.py --quick        # data and weights from TLAUTO_BENCH_DATA and TLAUTO_WEIGHTS

On the same images, split, weights and machine, one after the other: `tlauto search` with a budget of 5
minutes and one of 15 (`--time`, `--long-time`), `probe_script.py` on every backbone that the search
screens, `naive_optuna.py` with TPE (`loop`) and with random trials (`random`), `fastai_finetune.py`, and
`autogluon_images.py`, once a budget. The last two need an environment of their own, whose interpreter
`--python NAME=PATH` or FASTAI_PYTHON and AUTOGLUON_PYTHON name; without it they are skipped.

All scores are test accuracies, measured after the fact or with the clock stopped: nobody sees them.
Seconds count from the start of the process, imports included. Of a search, the model at a time is the
best trial that had ended by then, and at its end what it bundles; of the others, the best by validation.
`cpu s` is user and system time of all processes of a contender, `MiB` the largest sum of their memory.

A dataset takes up to 80 minutes. With `--keep FOLDER` each finished result is stored and read again when
the same is asked for on as many cores, so the bench can be stopped, and done in parts with `--only`.
Datasets are `--data DIR`, as often as wanted, or those of images with classes in the folder
TLAUTO_BENCH_DATA; `DIR:20` is a dataset of only 20 images a class to learn from, the same ones every
time, and the whole test part. `--seed` may be repeated. Options that this script does not know go to
`tlauto search`. `--quick` takes the first dataset, the first two backbones and one minute each.

The last line of standard output is one JSON object; a figure for which a contender lacks is null:

    score_gain_5min             mean over datasets of ours less the best alternative's, at the end of
                                the shorter search, in points; _low and _high are its 95 % interval by a
                                stratified paired bootstrap over test images. The best alternative of a
                                dataset is the one with the best test score at that time
    score_gain_15min            the same for the longer search
    time_to_naive_score_ratio   seconds of the loop to its final score over ours to that score, second
                                best of the datasets; null where we never reach it
    time_to_script_ratio        our seconds to the script's score over those of its whole run with one
                                test, worst of the datasets; null where we never reach it
    losses                      where an alternative was at least as good as we were
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from contenders import BENCH, BUDGETED, CONTENDERS, ELSEWHERE, Setting, commit, kept_or_run, missing
from curve import cores
from figures import Gain, Row, gain, mean_gain, naive_ratio, score_at, script_ratio

DATASETS = ("hymenoptera", "signdigits", "trashnet", "trashnet:20")
QUICK = ("tlauto", "script", "loop", "random")


def main() -> None:
    args = parse()
    skipped = {name: why for name in args.only if (why := missing(name, args.python))}
    for name, why in skipped.items():
        print(f"{name:<15} skipped: {why}", flush=True)
    rows = [measure(data, seed, args, skipped) for data in args.data for seed in args.seed]
    show(rows, args)
    gains = {name: [gain(row, name, at) for row in rows] for name, at in searches(args)}
    lost = [loss(one) for found in gains.values() for one in found if one and one.ours <= one.theirs]
    for line in lost:
        print(f"no better       {line}")
    print(json.dumps({**figures(rows, gains), "losses": lost, "skipped": skipped, "cores": cores(),
                      "commit": commit(), "rows": [plain(row) for row in rows]}))  # fmt: skip


def measure(data: str, seed: int, args: argparse.Namespace, skipped: dict[str, str]) -> Row:
    """All contenders on one dataset with one seed; those that do not run, only where kept."""
    running = set(args.only) - set(skipped)
    with TemporaryDirectory() as folder:
        setting = hand_over(data, seed, args, folder, export=bool(running & set(ELSEWHERE)))
        results = {}
        for name, contender, budget in plan(args):
            found = kept_or_run(contender, setting, budget, args.keep, runs=contender in running)
            if found is not None:
                results[name] = found
    return Row(setting.name, seed, setting.facts["tested"], results)


def hand_over(data: str, seed: int, args: argparse.Namespace, folder: str, *, export: bool) -> Setting:
    """The split, and the backbones with their weights, which no contender's clock counts."""
    command = [sys.executable, str(BENCH / "handover.py"), "--data", data, "--seed", str(seed), "--offline"]
    command += ["--out", folder, "--most", str(args.most)]
    command += ["--export"] if export else []
    command += ["--preset", args.preset] if args.preset else []
    command += ["--backbones", args.backbones] if args.backbones else []
    command += ["--weights-dir", args.weights_dir] if args.weights_dir else []
    command += [] if args.pretrained else ["--no-pretrained"]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(f"error: {data} could not be handed over (exit code {code})")
    file = Path(folder, "handed.json")
    facts = json.loads(file.read_text(encoding="utf-8"))
    extra = list(args.extra) + (["--preset", args.preset] if args.preset else [])
    extra += ["--backbones", ",".join(facts["backbones"])] if args.backbones or args.most else []
    return Setting(
        Path(data).name, seed, facts, str(file), args.weights_dir, args.pretrained, tuple(extra), args.python
    )


def plan(args: argparse.Namespace) -> list[tuple[str, str, float]]:
    """Name in the table, contender and budget of each run."""
    longest = args.long_time or args.time
    runs = []
    for contender in CONTENDERS:
        if contender not in BUDGETED:
            runs.append((contender, contender, longest))
            continue
        runs.append((contender, contender, args.time))
        if args.long_time:
            runs.append((f"{contender} long", contender, args.long_time))
    return runs


def searches(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Names and budgets of tlauto's runs."""
    return [(name, budget) for name, contender, budget in plan(args) if contender == "tlauto"]


def figures(rows: Sequence[Row], gains: dict[str, list[Gain | None]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, figure in (("tlauto", "score_gain_5min"), ("tlauto long", "score_gain_15min")):
        mean = mean_gain(gains.get(name, [None]))
        found |= {figure: mean["value"], f"{figure}_low": mean["low"], f"{figure}_high": mean["high"]}
    found["time_to_naive_score_ratio"] = naive_ratio(rows)
    found["time_to_script_ratio"] = script_ratio(rows)
    return found


# --- what is shown ----------------------------------------------------------------------------------


def show(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Test accuracy by time, at the end, and what it took."""
    marks = sorted({30.0, 60.0, 120.0, args.time, args.long_time or args.time})
    heads = "".join(f"{f'{at:.0f} s':>8}" for at in marks)
    print(f"{'data':<15} {'seed':>4}  {'':<15}{heads}{'end':>8}{'end s':>7}{'cpu s':>7}{'MiB':>7}")
    for row in rows:
        for name, result in row.results.items():
            shown = "".join(f"{cell(score_at(result, mark)):>8}" for mark in marks)
            at, _, end = result.rows[-1] if result.rows else (None, None, None)
            seconds = "-" if at is None else f"{at:.0f}"
            memory = "-" if result.peak_mib is None else f"{result.peak_mib:.0f}"
            took = f"{seconds:>7}{result.cpu_s:>7.0f}{memory:>7}"
            print(f"{row.data:<15} {row.seed:>4}  {name:<15}{shown}{cell(end):>8}{took}")


def cell(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def loss(one: Gain) -> str:
    where = f"{one.row.data}, seed {one.row.seed}, {one.at:.0f} s"
    return f"{where}: {one.ours:.3f}, {one.other} {one.theirs:.3f}"


def plain(row: Row) -> dict[str, Any]:
    """A row for JSON, without the answers to single images."""
    results = {}
    for name, result in row.results.items():
        facts = asdict(result)
        del facts["right"]
        results[name] = facts
    return {"data": row.data, "seed": row.seed, "results": results}


# --- options ----------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", action="append", metavar="DIR[:N]", help="a dataset; may be repeated")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"), metavar="DIR")
    parser.add_argument("--time", type=float, default=300.0, help="seconds of the shorter budget")
    parser.add_argument("--long-time", type=float, default=900.0, help="of the longer; 0 leaves it out")
    parser.add_argument(
        "--only",
        type=_names,
        default=list(CONTENDERS),
        metavar="NAME[,NAME]",
        help=f"run only these, and show the others where kept: {', '.join(CONTENDERS)}",
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="store results, and use them again")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH",
                        help="interpreter of fastai or autogluon")  # fmt: skip
    parser.add_argument("--backbones", metavar="GLOB[,GLOB]", help="backbones of all contenders")
    parser.add_argument("--preset", metavar="NAME", help="of the search")
    parser.add_argument("--quick", action="store_true", help="under five minutes, to see it run")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated  [default: 0]")
    args, extra = parser.parse_known_args()
    args.extra = extra
    args.data, args.seed = args.data or _default_data(parser), args.seed or [0]
    args.weights_dir = args.weights_dir and str(Path(args.weights_dir).resolve())
    args.python, args.most = _pythons(parser, args.python), 0
    if args.quick:
        args.time, args.long_time, args.most = 60.0, 0.0, 2
        args.data, args.only = args.data[:1], [name for name in args.only if name in QUICK]
    return args


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(f"no contender '{name}'; there are {', '.join(CONTENDERS)}")
    return names


def _pythons(parser: argparse.ArgumentParser, given: Sequence[str]) -> dict[str, str]:
    found = {name: os.environ.get(f"{name.upper()}_PYTHON", "") for name in ELSEWHERE}
    for text in given:
        name, _, path = text.partition("=")
        if name not in ELSEWHERE or not path:
            parser.error(f"--python '{text}' is not NAME=PATH with {' or '.join(ELSEWHERE)}")
        found[name] = path
    # Not resolved: an environment's interpreter is a link, and knows its environment by where that lies.
    return {name: os.path.abspath(path) for name, path in found.items() if path}


def _default_data(parser: argparse.ArgumentParser) -> list[str]:
    folder = os.environ.get("TLAUTO_BENCH_DATA")
    if not folder:
        parser.error("name a dataset with --data, or a folder of datasets with TLAUTO_BENCH_DATA")
    return [str(Path(folder, name)) for name in DATASETS]


if __name__ == "__main__":
    main()
