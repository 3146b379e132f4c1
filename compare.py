"""Every method under one protocol: run them all, then one table and one plot.

    python compare.py --sparsity 0.9 --seeds 3            # fashion-mini: 54 runs
    python compare.py --sparsity 0.9 0.95 --jobs 4        # several sparsities, four runs at a time
    python compare.py --epochs-prune 4 --epochs-finetune 2 --train-limit 3000    # a shorter one
    python compare.py --runs runs/compare                 # only the table, of the runs in a folder

Weights: same data, network, batches, epochs and final sparsity for all; where a method's own
sparsity is an outcome, its structure epochs end with an exact cut. Channels: at equal MACs. The
runs are processes of the scripts beside this file; finished ones are not repeated, stopped ones go
on, and one that fails is a row that names its log.
"""
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import flags
import plots
import records
from files import write_whole

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
COLUMNS = ("method", "target", "test accuracy, %", "seeds", "sparsity, %", "MACs, M", "SOPs, k",
           "energy, uJ", "training cost", "seconds")


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


# ---- the table and the plot ----------------------------------------------------------------------


def target_of(run):
    """Return what a run was asked for: ("channels" or "weights", text)."""
    config = run.config
    if run.script == records.CHANNELS:
        aim = ("MACs", config["target_macs"]) if config["target_macs"] is not None else (
            "channels", config["prune_ratio"])
        return "channels", "-" if run.method == "dense" else f"-{100 * aim[1]:g} % {aim[0]}"
    aim = config.get("sparsity")
    return "weights", "-" if run.method == "dense" or aim is None else f"{100 * aim:g} % sparse"


def gather(folder):
    """Return ({(table, target, method): runs}, {name: why} of what is not finished) of a folder."""
    found, notes = {}, {}
    for path in sorted({*folder.glob("*/config.json"), *folder.glob("*.log")}):
        place = path.parent if path.suffix == ".json" else path.with_suffix("")
        try:
            run = records.read_run(place)
        except ValueError as error:
            log = log_of(place)
            notes[place.name] = f"not finished: {error}" + f"; see {log}" * log.exists()
            continue
        key = (*target_of(run), run.method)
        if all(run.folder != other.folder for other in found.setdefault(key, [])):
            found[key].append(run)
    return found, notes


def cost(run):
    """Return the epochs of a run, each weighted by density and time steps."""
    return run.summary["training_cost"] * run.summary["epochs"]


def tabulate(found):
    """Return {"weights" or "channels": rows}, the rows dicts by COLUMNS and the numbers behind."""
    tables = {}
    for (table, target, method), runs in found.items():
        dense = [cost(run) for (kind, _, name), mine in found.items() for run in mine
                 if (kind, name) == (table, "dense")]

        def mean(key, factor=1.0):
            values = [run.summary[key] for run in runs]
            return np.nan if None in values else factor * np.mean(values)

        accuracy, std = plots.spread([100 * run.summary["test_accuracy"] for run in runs])
        tables.setdefault(table, []).append(dict(
            method=method, target=target, accuracy=accuracy, std=std,
            seeds=" ".join(str(seed) for seed in sorted(run.seed for run in runs)),
            sparsity=mean("sparsity", 100), macs=mean("macs", 1e-6), sops=mean("sops", 1e-3),
            energy=mean("energy_mj", 1e3), seconds=mean("seconds"),
            training_cost=(np.mean([cost(run) for run in runs])
                           / (np.mean(dense) if dense else runs[0].summary["epochs"])),
            macs_removed=100 * np.mean([1 - run.summary["macs"] / run.summary["macs_dense"]
                                        for run in runs])))
    for rows in tables.values():
        rows.sort(key=lambda row: (row["target"] != "-", row["target"], -row["accuracy"]))
    return dict(sorted(tables.items(), reverse=True))


def markdown(tables, notes):
    """Return the tables as text; a run that is not finished is a row that says why."""
    text = []
    for table, rows in tables.items():
        text += [f"| {table}: {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        text += [f"| {row['method']} | {row['target']} | {row['accuracy']:.1f} ± {row['std']:.1f} "
                 f"| {row['seeds']} | {row['sparsity']:.2f} | {row['macs']:.2f} | "
                 f"{row['sops']:.0f} | {row['energy']:.3f} | {row['training_cost']:.2f} | "
                 f"{row['seconds']:.0f} |" for row in rows]
        text += [f"| {name} | {why} |" + " |" * (len(COLUMNS) - 2) for name, why in notes.items()
                 if name.startswith("channels-") == (table == "channels")] + [""]
    return "\n".join(text)


def draw(tables):
    """Draw accuracy over sparsity (channels: MACs removed) and over training cost. Where all are
    asked for the same sparsity, they are set apart, or they would cover each other."""
    figure, axes = plots.canvas(2, len(tables))
    for line, (table, rows) in zip(axes, tables.items()):
        reached = "macs_removed" if table == "channels" else "sparsity"
        for axis, x, label in ((line[0], reached, "MACs removed (%)" if table == "channels"
                                else "Sparsity (%)"),
                               (line[1], "training_cost", "Training cost / dense")):
            apart = 1.2 if axis is line[0] else 0
            for i, row in enumerate(rows):
                plots.plot(axis, [row[x] + apart * (i - len(rows) / 2) * (row["target"] != "-")],
                           [row["accuracy"]], [row["std"]], row["method"], linestyle="none")
            axis.set(xlabel=f"{label}, {table}" + ", set apart" * bool(apart),
                     ylabel="Test accuracy (%)")
        handles, names = line[0].get_legend_handles_labels()
        known = dict(zip(names, handles))
        line[1].legend(known.values(), known, frameon=False, fontsize=7, loc="center left",
                       bbox_to_anchor=(1, 0.5))
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
    return parser.parse_args(argv)


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
        tables = tabulate(found)
        text = markdown(tables, notes)
        print(text)
        runs = [run for mine in found.values() for run in mine]
        write_whole(out / "compare.md", lambda file: file.write(text))
        plots.save(out / "compare", draw(tables), [
            dict(pruned=table) | row for table, rows in tables.items() for row in rows],
            records.about(runs))
        print(f"{out / 'compare.md'}, .csv, .png, .pdf: {len(runs)} runs")
    return tables


if __name__ == "__main__":
    main()
