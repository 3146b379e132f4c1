"""Every method under one protocol: run them all, then one table and one plot.

    python compare.py --sparsity 0.9 --seeds 3            # fashion-mini: 54 runs
    python compare.py --sparsity 0.9 0.95 --jobs 4        # several sparsities, four runs at a time
    python compare.py --epochs-prune 4 --epochs-finetune 2 --train-limit 3000    # a shorter one
    python compare.py --runs runs/compare                 # only the table, of the runs in a folder
    python compare.py --runs runs/compare --baseline criticality    # differences to criticality

Weights: same data, network, batches, epochs and final sparsity for all; where a method's own
sparsity is an outcome, its structure epochs end with an exact cut. Channels: at equal MACs. The
runs are processes of the scripts beside this file; finished ones are not repeated, stopped ones go
on, and one that fails is a line that names its log.

There is a table for each data set, network and schedule; runs of a method that differ in a flag are
rows of their own. Columns: mean and standard deviation over the seeds; the difference to GMP
(channels: slimming), or to --baseline, at the same seeds, in points, with its 95 % interval by
Student's t, "above" or "below" only where the interval leaves out 0; faster: of channels, time of
the dense network over that of what is left, batch 32; rescued: of what an update prunes, the share
that comes back in it, mean over the updates; back: the share of the final weights, or channels,
that had been brought back.
"""
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from harness import flags
from harness import plots
from harness import records
from harness.files import write_whole

WEIGHTS = {  # name: script and flags, beside the sparsity and the epochs, which all share
    "dense": "prune_unstructured --sparsity 0",
    "gmp": "prune_unstructured --regen 0",
    "criticality": "prune_unstructured",
    "gradient": "prune_unstructured --metric gradient",
    "random": "prune_unstructured --metric random",
    "granet": "prune_unstructured --metric granet",
    "imp": "prune_lottery --method imp --budget matched --rounds 4",
    "eb": "prune_lottery --method eb --budget matched",
    "et": "prune_lottery --method et --budget matched --rounds 4",
    "gradr": "prune_gradr --method gradr --optimizer sgd --mode matched",
    "deepr": "prune_gradr --method deepr --optimizer sgd --mode matched",
    "sdsnn": "prune_sdsnn --optimizer sgd",
    "pq": "prune_pq --mode matched"}
CHANNELS = {
    "dense": "prune_structured --prune-ratio 0",
    "slimming": "prune_structured --method slimming",
    "greg1": "prune_structured --method greg1",
    "greg2": "prune_structured --method greg2",
    "criticality": "prune_structured"}
# The budget, structure epochs and epochs with the mask fixed: those of prune_unstructured.py, since
# the other scripts' defaults are their own papers'
PAPER, SHORT = (200, 300), (6, 4)
EPOCHS = {"fashion-mini": (8, 4), "mnist": SHORT, "fashion-mnist": SHORT, "n-mnist": SHORT,
          "cifar10": PAPER, "cifar100": PAPER, "tiny-imagenet": (50, 100), "dvs-gesture": (80, 120),
          "cifar10-dvs": (80, 120)}
COLUMNS = ("method", "target", "test accuracy, %", "against the baseline, points", "seeds",
           "sparsity, %", "MACs, M", "faster", "SOPs, k", "energy, uJ", "training cost",
           "rescued, %", "back, %")
# Student's t for a two-sided 95 % interval, by degrees of freedom from 1 on
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
USUAL = dict(aggregate="max", candidates="all")  # our reading of the paper goes without saying
# What does not make runs of one method differ: the target is a column of its own
NO_VARIANT = {*records.NOT_FLAGS, "seed", "sparsity", "target_macs", "prune_ratio", "data_dir",
              "save_every"}


# ---- running -------------------------------------------------------------------------------------


def plan(args):
    """Return [(folder, words of the command)] of all runs."""
    def words(values):
        return [word for flag, value in values.items() if value is not None
                for word in (f"--{flag.replace('_', '-')}", str(value))]

    usual = flags.COMMON | flags.DATASETS.get(args.dataset, flags.SMALL)
    shared = dict(dataset=args.dataset, data_dir=args.data_dir, width=args.width,
                  train_limit=args.train_limit,
                  batch_size=args.batch_size or usual["batch_size"],
                  model=args.model or usual["model"],
                  time_steps=args.time_steps or usual["time_steps"])
    # some scripts have their own paper's network on some sets, and what goes with it
    shared |= {flag: usual[flag] for flag in ("encoding", "loss", "crop", "rotate")}
    prune, finetune = EPOCHS.get(args.dataset, EPOCHS["fashion-mini"])
    prune = args.epochs_prune or prune
    finetune = finetune if args.epochs_finetune is None else args.epochs_finetune
    jobs = {}
    for seed in range(args.seeds):
        for method, command in WEIGHTS.items():
            for sparsity in args.sparsity if method != "dense" else [None]:  # one does for all
                name = method if sparsity is None else f"{method}-{sparsity:g}"
                jobs[args.out / f"{name}-seed{seed}"] = command.split() + words(dict(
                    sparsity=sparsity, epochs_prune=prune, epochs_finetune=finetune, seed=seed))
        for method, command in CHANNELS.items():
            target = args.target_macs if method != "dense" else None
            name = "channels-dense" if target is None else f"channels-{method}-macs{target:g}"
            jobs[args.out / f"{name}-seed{seed}"] = command.split() + words(dict(
                target_macs=target, epochs_pretrain=args.epochs_prune,
                epochs_finetune=args.epochs_prune, seed=seed))
    return [(folder, [sys.executable, str(Path(__file__).with_name(f"{script}.py")), *own,
                      *words(shared), "--run-dir", str(folder), "--resume"])
            for folder, (script, *own) in jobs.items()]


def log_of(folder):
    return folder.with_name(f"{folder.name}.log")


def run_all(jobs, at_a_time):
    """Run all commands that are not finished, some at a time; what fails says so and stops nothing
    else."""
    threads = max(1, (os.cpu_count() or 1) // at_a_time)
    environment = os.environ | dict(OMP_NUM_THREADS=str(threads))
    bar = tqdm(total=len(jobs), desc="compare", unit="run", dynamic_ncols=True)

    def start(job):
        folder, words = job
        if not (folder / "summary.json").exists():
            with open(log_of(folder), "w") as log:
                print(shlex.join(["python", Path(words[1]).name, *words[2:]]), file=log, flush=True)
                code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT,
                                      env=environment).returncode
            if code:
                bar.write(f"failed with exit code {code}: {folder}, see {log_of(folder)}")
        bar.update()

    with ThreadPoolExecutor(at_a_time) as pool, bar:
        try:
            list(pool.map(start, jobs))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            bar.write("stopped; what was under way is saved: the same command goes on with it")
            raise


# ---- the tables and the plot ---------------------------------------------------------------------


def setting_of(run):
    """Return what runs of a table share, in words: "weights" or "channels", data set, network, T
    and epochs, and each flag that is not the usual one."""
    config, channels = run.config, run.script == records.CHANNELS
    usual = flags.COMMON | flags.DATASETS.get(config["dataset"], flags.SMALL)
    first = "epochs_pretrain" if channels else "epochs_prune"
    words = [Path(config["dataset"]).stem, config["model"], f"T = {config['time_steps']}",
             f"{config.get(first)} + {config['epochs_finetune']} epochs"]
    said = ("dataset", "model", "time_steps", "epochs_finetune")
    words += [f"{flag.replace('_', ' ')} {config.get(flag)}"
              for flag in (*records.BOTH, "precision")
              if flag not in said and config.get(flag) != usual.get(flag)]
    return f"{'channels' if channels else 'weights'}: {', '.join(words)}"


def target_of(run):
    """Return what a run was asked for, in words."""
    config = run.config
    if run.method == "dense":
        return "-"
    if run.script == records.CHANNELS:
        aim = ("MACs", config["target_macs"]) if config["target_macs"] is not None else (
            "channels", config["prune_ratio"])
        return f"-{100 * aim[1]:g} % {aim[0]}"
    return f"{100 * config['sparsity']:g} % sparse" if config.get("sparsity") else "-"


def by_size(target):
    """Return the key that sorts targets: none, then for each kind from the smallest on."""
    number, _, kind = target.partition(" % ")
    return (kind, abs(float(number))) if kind else ("", 0)


def gather(folder):
    """Return ({(setting, target, method): {seed: run}}, {name: why} of what is not finished) of a
    folder. Where runs of a method differ in more than the seed, its name says in what; of two that
    do not, the first counts."""
    found, notes = {}, {}
    for path in sorted({*folder.glob("*/config.json"), *folder.glob("*.log")}):
        place = path.parent if path.suffix == ".json" else path.with_suffix("")
        try:
            run = records.read_run(place)
        except ValueError as error:
            log = log_of(place)
            notes[place.name] = f"not finished: {error}" + f"; see {log}" * log.exists()
            continue
        found.setdefault((setting_of(run), target_of(run), run.method), {})[run.folder] = run

    told_apart = {}
    for (setting, target, method), runs in found.items():
        flags_of = [{flag: value for flag, value in run.config.items() if flag not in NO_VARIANT
                     and not flag.startswith("version_")} for run in runs.values()]
        vary = [flag for flag in flags_of[0] if len({str(one.get(flag)) for one in flags_of}) > 1]
        for run, values in zip(runs.values(), flags_of):
            name = ", ".join([method, *(f"{flag.replace('_', ' ')} {values.get(flag)}"
                                        for flag in vary if values.get(flag) != USUAL.get(flag))])
            told_apart.setdefault((setting, target, name), {}).setdefault(run.seed, run)
    return told_apart, notes


def cost(run):
    """Return the epochs of a run, each weighted by density and time steps."""
    return run.summary["training_cost"] * run.summary["epochs"]


def against(runs, baseline):
    """Return the mean difference in accuracy to a baseline at the same seeds, in points, and half
    of its 95 % interval by Student's t; NaN where two seeds are not shared."""
    pairs = [100 * (run.summary["test_accuracy"] - baseline[seed].summary["test_accuracy"])
             for seed, run in runs.items() if seed in baseline]
    if len(pairs) < 2 or runs == baseline:
        return np.nan, np.nan
    n = len(pairs) - 1
    t = T95[n - 1] if n <= len(T95) else 1.96 + 2.4 / n  # to 0.03
    return np.mean(pairs), t * np.std(pairs, ddof=1) / np.sqrt(len(pairs))


def rescued(run):
    """Return which share of what an update prunes comes back in it, of all updates of a run."""
    try:
        shares = [row.get("survived") for row in records.read(run, "updates.jsonl")]
    except records.Unfit:
        return np.nan
    shares = [share for share in shares if share is not None]
    return np.mean(shares) if shares else np.nan


def tabulate(found, versus=None):
    """Return {setting: rows}, the rows dicts by COLUMNS and the numbers behind. versus: the method
    to take differences to, by its name in the table. Raises ValueError where there is none."""
    names = {method for _, _, method in found}
    if versus is not None and versus not in names:
        raise ValueError(f"--baseline is {versus}, expected a method as the table names it. Choose "
                         f"one of: {'; '.join(sorted(names))}")
    tables = {}
    for (setting, target, method), by_seed in found.items():
        runs = list(by_seed.values())
        dense = [cost(run) for (kind, _, name), mine in found.items() for run in mine.values()
                 if (kind, name) == (setting, "dense")]
        usual = records.BASELINE.get(runs[0].script, "gmp")
        level = "-" if versus == "dense" else target
        baseline = found.get((setting, level, versus or usual), {})

        def mean(key, factor=1.0):
            values = [run.summary[key] for run in runs]
            return np.nan if None in values else factor * np.mean(values)

        accuracy, std = plots.spread([100 * run.summary["test_accuracy"] for run in runs])
        difference, half = against(by_seed, baseline)
        tables.setdefault(setting, []).append(dict(
            method=method, target=target, accuracy=accuracy, std=std, against=difference, half=half,
            seeds=" ".join(str(seed) for seed in sorted(by_seed)),
            sparsity=mean("sparsity", 100), macs=mean("macs", 1e-6), sops=mean("sops", 1e-3),
            energy=mean("energy_mj", 1e3), faster=(
                mean("speedup_batch32") if runs[0].script == records.CHANNELS else np.nan),
            back=mean("survived_by_regeneration", 100),
            rescued=100 * np.mean([rescued(run) for run in runs]) if runs[0].regen else np.nan,
            training_cost=(np.mean([cost(run) for run in runs])
                           / (np.mean(dense) if dense else runs[0].summary["epochs"]))))
    for rows in tables.values():
        rows.sort(key=lambda row: (by_size(row["target"]), -row["accuracy"]))
    return dict(sorted(tables.items(), key=lambda item: (-len(item[1]), item[0])))


def markdown(tables, notes):
    """Return the tables as text; a run that is not finished is a line that says why."""
    def shown(value, digits, sign=""):
        return "-" if np.isnan(value) else f"{value:{sign}.{digits}f}"

    text = []
    for setting, rows in tables.items():
        text += [f"**{setting}**", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for row in rows:
            difference = "-"
            if not np.isnan(row["against"]):
                low, high = row["against"] - row["half"], row["against"] + row["half"]
                word = " above" if low > 0 else " below" if high < 0 else ""
                difference = f"{row['against']:+.1f} ({low:+.1f} to {high:+.1f}){word}"
            text.append("| " + " | ".join([
                row["method"], row["target"],
                f"{row['accuracy']:.1f}" + f" ± {row['std']:.1f}" * (" " in row["seeds"]),
                difference, row["seeds"], shown(row["sparsity"], 2), shown(row["macs"], 2),
                shown(row["faster"], 2), shown(row["sops"], 0), shown(row["energy"], 3),
                shown(row["training_cost"], 2), shown(row["rescued"], 0),
                shown(row["back"], 1)]) + " |")
        text.append("")
    return "\n".join(text + [f"- {name}: {why}" for name, why in notes.items()])


def draw(tables):
    """Draw the largest table of weights and that of channels, the targets that several methods
    have: accuracy, the methods side by side in the order of the first target (dotted: dense), and
    accuracy over the training cost, where a line joins a method's targets of one kind."""
    largest = {}
    for setting, rows in tables.items():
        plain = [row for row in rows if "," not in row["method"]]  # analyze.py draws rates
        largest.setdefault(setting.partition(":")[0], (setting, plain or rows))
    figure, axes = plots.canvas(2, len(largest))
    for (left, right), (setting, rows) in zip(axes, largest.values()):
        there = Counter(row["target"] for row in rows if row["target"] != "-")
        targets = [target for target in there if there[target] > 1] or list(there)  # to compare
        rows = [row for row in rows if row["target"] in ("-", *targets)]
        # Seeds that came to nothing beside others that did not do not set the scale
        steady = [row for row in rows if row["std"] < 10] or rows
        low = min(row["accuracy"] - row["std"] for row in steady) - 1
        high = max(row["accuracy"] + row["std"] for row in steady) + 1
        one_kind = len({by_size(target)[0] for target in targets}) == 1
        methods = list(dict.fromkeys(row["method"] for row in rows if row["target"] != "-"))
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method]
            cost, mean, std = ([row[key] for row in mine]
                               for key in ("training_cost", "accuracy", "std"))
            known = method.partition(",")[0]
            plots.plot(right, cost, mean, std, known, label=method, linewidth=0.5,
                       linestyle="-" if one_kind else "none")
            if method == "dense":
                left.axhline(*mean, color="black", linestyle=":", linewidth=1)
            for row in mine:
                if row["target"] in targets:
                    x = targets.index(row["target"]) + 0.8 * (
                        (methods.index(method) + 0.5) / len(methods) - 0.5)
                    plots.plot(left, [x], [row["accuracy"]], [row["std"]], known, linestyle="none")
                    if row["accuracy"] < low:  # out of the panel: a number
                        left.annotate(f"{row['accuracy']:.0f}", (x, low), fontsize=6, ha="right",
                                      va="bottom", color=plots.STYLE[known][0])
        for axis in (left, right):
            axis.set(ylabel="Test accuracy (%)", ylim=(low, high))
        left.set_xlim(-0.5, max(len(targets), 1) - 0.5)
        left.set_xticks(range(len(targets)), targets)
        right.set_xlabel("Training cost / dense")
        left.set_title(setting, fontsize=7, loc="left")
        right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# ---- the script ----------------------------------------------------------------------------------


def parse_args(argv):
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--sparsity", type=flags.number(0, 1, above=True), nargs="+", default=[0.9], metavar="S",
        help="final sparsities of the weights (default 0.9)")
    add("--target-macs", type=flags.number(0, 1, above=True), default=0.7, metavar="SHARE",
        help="share of the MACs that goes with the channels (default 0.7)")
    add("--seeds", type=flags.whole(1), default=3, metavar="N", help="seeds 0 to N - 1 (default 3)")
    add("--epochs-prune", type=flags.whole(1), metavar="N", default=None,
        help="structure epochs of each method; for channels: epochs of pretraining and of "
        "fine-tuning (default: the scripts')")
    add("--epochs-finetune", type=flags.whole(0), metavar="N", default=None,
        help="epochs with the mask fixed (default: the scripts')")
    for flag, convert in (("dataset", str), ("data-dir", str), ("model", str),
                          ("width", flags.number(0, 100, above=True)),
                          ("train-limit", flags.whole(1)), ("time-steps", flags.whole(1)),
                          ("batch-size", flags.whole(1))):
        add(f"--{flag}", type=convert, default="fashion-mini" if flag == "dataset" else None,
            help="as in the other scripts")
    add("--jobs", type=flags.whole(1), default=1, metavar="N", help="runs at a time (default 1)")
    add("--out", type=Path, default=Path("runs/compare"), metavar="DIR",
        help="the folder of the runs and of the result (default runs/compare)")
    add("--runs", type=Path, default=None, metavar="DIR", help="run nothing: only tabulate and "
        "draw the runs in this folder")
    add("--baseline", default=None, metavar="METHOD", help="the row that differences are taken "
        "to, as the table names it, where a table has it; the files are then compare-METHOD.* "
        "(default: gmp, for channels slimming)")
    args = parser.parse_args(argv)
    known = {**WEIGHTS, **CHANNELS}
    if args.runs is None and args.baseline not in (None, *known):
        parser.error(f"--baseline is {args.baseline}, expected a method. Choose one of: "
                     f"{', '.join(known)}")
    return args


def main(argv=None):
    args = parse_args(argv)
    with flags.exits(2, ValueError, OSError):
        out = args.runs or args.out
        if args.runs is None:
            steps = args.time_steps or flags.DATASETS.get(args.dataset, flags.SMALL)["time_steps"]
            data.load(args.dataset, args.data_dir or "data", args.train_limit, time_steps=steps)
            out.mkdir(parents=True, exist_ok=True)
            run_all(plan(args), args.jobs)
        found, notes = gather(out)
        if not found:
            raise ValueError(f"{out} holds no finished run, expected those of: python compare.py. "
                             + "; ".join(f"{name} is {why}" for name, why in notes.items()))
        tables = tabulate(found, args.baseline)
        name = "-".join(["compare", *re.findall(r"\w+", args.baseline or "")])
        text = markdown(tables, notes)
        print(text)
        runs = [run for mine in found.values() for run in mine.values()]
        write_whole(out / f"{name}.md", lambda file: file.write(text))
        plots.save(out / name, draw(tables), [
            dict(setting=setting) | row for setting, rows in tables.items() for row in rows],
            f"{len(runs)} runs")
        print(f"{out / name}.md, .csv, .png, .pdf: {len(runs)} runs")
    return tables


if __name__ == "__main__":
    main()
