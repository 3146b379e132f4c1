"""Every method under one protocol: run them all, then one table and one plot.

    python compare.py --sparsity 0.9 --seeds 3      # fashion-mini: 54 runs
    python compare.py --sparsity 0.9 0.95 --jobs 4  # four runs at a time
    python compare.py --epochs-prune 4 --epochs-finetune 2 --train-limit 3000
                                                    # a shorter one
    python compare.py --runs runs/compare           # only the table, of finished runs
    python compare.py --runs runs/compare --baseline criticality
                                                    # differences to criticality

Weights: all methods have the same data, network, batches, epochs and final sparsity;
where a method's own sparsity is an outcome, its structure epochs end with an exact cut.
Channels: all methods end at equal MACs. The runs are processes of the scripts beside
this file. Finished ones are not repeated, stopped ones go on, and one that fails is a
line that names its log.

With --runs nothing is run: a folder with a config.json is a run, and runs are found at
any depth below the folders named. There is a table for each data set, network and
schedule; runs of a method that differ in a flag are rows of their own, and of two runs
that differ in nothing the first counts. Runs by --as-published say so in their name:
"gmp, as published", "criticality, published cosine"; a name without such words is the
paper's text. Differences between the two: --baseline "gmp, as published". The columns:

    test accuracy   mean and standard deviation over the seeds, last epoch
    against the baseline
                    difference to GMP (channels: slimming), or to --baseline, at the
                    same seeds, in points, with its 95 % interval by Student's t;
                    "above" or "below" only where the interval leaves out 0
    faster          of channels: time of the dense network / time of what is left, batch
                    32
    SOPs, energy    synaptic operations and energy of an image
    training cost   epochs, each weighted by density and time steps, over those of dense
    rescued         share of what an update prunes that comes back in it, mean over the
                    updates
    back            share of the final weights, or channels, that had been brought back:
                    is about r by construction (Eq. 7), and measures no method
"""
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness  # first: what is not installed is then one line

import numpy as np
from tqdm import tqdm

import data
from harness import flags
from harness import plots
from harness import presets
from harness import processes
from harness import published
from harness import records
from harness.files import write_whole

# name: script and flags, beside the sparsity and the epochs, which all share
WEIGHTS = {
    "dense": "prune_unstructured --sparsity 0",
    "gmp": "prune_unstructured --regen 0",
    "criticality": "prune_unstructured",
    "gradient": "prune_unstructured --metric gradient",
    "random": "prune_unstructured --metric random",
    "granet": "prune_granet",
    "imp": "prune_lottery --method imp --budget matched --rounds 4",
    "eb": "prune_lottery --method eb --budget matched",
    "et": "prune_lottery --method et --budget matched --rounds 4",
    "gradr": "prune_gradr --method gradr --optimizer sgd --mode matched",
    "deepr": "prune_gradr --method deepr --optimizer sgd --mode matched",
    "sdsnn": "prune_sdsnn --optimizer sgd",
    "pq": "prune_pq --mode matched",
}
CHANNELS = {
    "dense": "prune_structured --prune-ratio 0",
    "slimming": "prune_structured --method slimming",
    "greg1": "prune_greg --method greg1",
    "greg2": "prune_greg --method greg2",
    "criticality": "prune_structured",
}
COLUMNS = ("method", "target", "test accuracy, %", "against the baseline, points",
           "seeds", "sparsity, %", "MACs, M", "faster", "SOPs, k", "energy, uJ",
           "training cost", "rescued, %", "back, %")
# Student's t for a two-sided 95 % interval, by degrees of freedom from 1 on
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
# A row is not named after these values: they are our reading of the paper
USUAL = dict(aggregate="max", candidates="all")
# What does not make runs of one method differ: the target is a column of its own,
# GraNet's death rate counts as a regeneration rate, `regen`, and published.words() has
# words for the items of --as-published
NO_VARIANT = {*records.NO_SETTINGS, "as_published", "seed", "sparsity", "target_macs",
              "prune_ratio", "data_dir", "save_every", "death_rate"}


# ---- running ------------------------------------------------------------------------


def budget_of(dataset):
    """Return (epochs_prune, epochs_finetune), the budget of all methods on a data set.

    It is that of prune_unstructured.py: other scripts' defaults are their own papers'.
    """
    settings = presets.of(dataset, "unstructured")
    return settings["epochs_prune"], settings["epochs_finetune"]


def as_words(values):
    """Return {flag: value} as words of a command line, without those that are None."""
    words = []
    for flag, value in values.items():
        if value is not None:
            words += [f"--{flag.replace('_', '-')}", str(value)]
    return words


def frames_of(args, images):
    """Return how many frames a recording of an own set of events has; None for images
    and for named sets, whose presets say it. Raises ValueError if --time-steps is
    another number."""
    if images.x_train.dim() != 5 or args.dataset in data.NAMES:
        return None
    frames = images.x_train.shape[1]
    if args.time_steps not in (None, frames):
        raise ValueError(f"--time-steps is {args.time_steps}, but {args.dataset} has "
                         f"{frames} frames a recording, expected as many. Leave it out")
    return frames


def plan(args, frames=None):
    """Return [(folder, words of the command)] of all runs. frames: see frames_of."""
    usual = presets.of(args.dataset)
    shared = dict(dataset=args.dataset, data_dir=args.data_dir, width=args.width,
                  train_limit=args.train_limit)
    for flag in ("batch_size", "model", "time_steps"):
        shared[flag] = getattr(args, flag) or usual[flag]
    # Some scripts have their own paper's network on some data sets, with its input
    for flag in ("encoding", "loss", "crop", "rotate"):
        shared[flag] = usual[flag]
    if frames is not None:
        shared |= dict(encoding="events", time_steps=frames)
    prune, finetune = budget_of(args.dataset)
    if args.epochs_prune is not None:
        prune = args.epochs_prune
    if args.epochs_finetune is not None:
        finetune = args.epochs_finetune

    commands = {}  # name of the run: words
    for seed in range(args.seeds):
        for method, command in WEIGHTS.items():
            for sparsity in args.sparsity if method != "dense" else [None]:
                name = method if sparsity is None else f"{method}-{sparsity:g}"
                commands[f"{name}-seed{seed}"] = command.split() + as_words(dict(
                    sparsity=sparsity, epochs_prune=prune, epochs_finetune=finetune,
                    seed=seed))
        for method, command in CHANNELS.items():
            target, name = None, "channels-dense"
            if method != "dense":
                target = args.target_macs
                name = f"channels-{method}-macs{target:g}"
            commands[f"{name}-seed{seed}"] = command.split() + as_words(dict(
                target_macs=target, epochs_pretrain=args.epochs_prune,
                epochs_finetune=args.epochs_prune, seed=seed))

    jobs = []
    for name, (script, *own) in commands.items():
        path = Path(__file__).with_name(f"{script}.py")
        jobs.append((args.out / name, [
            sys.executable, str(path), *own, *as_words(shared),
            "--run-dir", str(args.out / name), "--resume"]))
    return jobs


def log_of(folder):
    return folder.with_name(f"{folder.name}.log")


def run_all(jobs, at_a_time):
    """Run all commands that are not finished, some at a time. One that fails is named,
    and the others go on."""
    threads = max(1, (os.cpu_count() or 1) // at_a_time)
    environment = os.environ | dict(OMP_NUM_THREADS=str(threads))
    bar = tqdm(total=len(jobs), desc="compare", unit="run", dynamic_ncols=True)

    def start(job):
        folder, words = job
        if not (folder / "summary.json").exists():
            shown = shlex.join(["python", Path(words[1]).name, *words[2:]])
            with open(log_of(folder), "w", encoding="utf-8",
                      errors="backslashreplace") as log:
                print(shown, file=log, flush=True)
                code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT,
                                      env=environment).returncode
            if code:
                bar.write(f"failed with exit code {code}: {folder}, see "
                          f"{log_of(folder)}")
        bar.update()

    with ThreadPoolExecutor(at_a_time) as pool, bar:
        try:
            list(pool.map(start, jobs))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            bar.write("stopped, and saved: the same command goes on")
            raise


# ---- the tables ---------------------------------------------------------------------


def setting_of(run):
    """Return what runs of a table share, in words: "weights" or "channels", data set,
    network, T and epochs, and each flag that is not the usual one. What --as-published
    has set stands in the name of a row."""
    config, usual = run.config, presets.of(run.config["dataset"])
    first = "epochs_pretrain" if run.pruned == records.CHANNELS else "epochs_prune"
    words = [Path(config["dataset"]).stem, config["model"],
             f"T = {config['time_steps']}",
             f"{config.get(first)} + {config['epochs_finetune']} epochs"]
    said = {"dataset", "model", "time_steps", "epochs_finetune"}
    for flag in (*records.SHARED, "precision"):
        if flag in said | published.implied(config):
            continue
        if config.get(flag) != usual.get(flag):
            words.append(f"{flag.replace('_', ' ')} {config.get(flag)}")
    return f"{run.pruned}: {', '.join(words)}"


def target_of(run):
    """Return what a run was asked for, in words."""
    config = run.config
    if run.method == "dense":
        return "-"
    if run.pruned == records.CHANNELS:
        if config.get("target_macs") is not None:
            return f"-{100 * config['target_macs']:g} % MACs"
        return f"-{100 * config['prune_ratio']:g} % channels"
    return f"{100 * config['sparsity']:g} % sparse" if config.get("sparsity") else "-"


def by_size(target):
    """Return the key that sorts targets: none, then each kind from the smallest on."""
    number, _, kind = target.partition(" % ")
    return (kind, abs(float(number))) if kind else ("", 0)


def gather(*folders):
    """Return ({(setting, target, method): {seed: run}}, {name: why}), the runs below
    folders, and what is not finished there.

    Where runs of a method differ in more than the seed, its name says in what; of two
    that do not differ the first counts, in the order of the folders and then of paths.
    """
    found, notes = {}, {}
    for folder in folders:
        logs = {path.with_suffix("") for path in folder.rglob("*.log")}
        for place in sorted({*records.find_runs(folder), *logs}):
            try:
                run = records.read_run(place)
            except ValueError as error:
                why, log = f"not finished: {error}", log_of(place)
                name = str(place.relative_to(folder))
                notes[name] = f"{why}; see {log}" if log.exists() else why
                continue
            key = setting_of(run), target_of(run), run.method
            found.setdefault(key, {})[run.folder] = run

    told_apart = {}
    for (setting, target, method), runs in found.items():
        variants = [variant_of(run) for run in runs.values()]
        names = dict.fromkeys(flag for variant in variants for flag in variant)
        vary = [flag for flag in names if len({
            str(variant.get(flag)) for run, variant in zip(runs.values(), variants)
            if flag not in published.implied(run.config)}) > 1]
        for run, variant in zip(runs.values(), variants):
            words = [f"{flag.replace('_', ' ')} {variant[flag]}" for flag in vary
                     if flag in variant and variant[flag] != USUAL.get(flag)]
            reading = published.words(run.config)
            name = ", ".join(filter(None, [method, reading, *words]))
            seeds = told_apart.setdefault((setting, target, name), {})
            seeds.setdefault(run.seed, run)
    return told_apart, notes


def variant_of(run):
    """Return {flag: value} of what tells runs of one method apart, seed, target and
    what --as-published sets not among it. A flag that is off is as one that the run's
    version did not have."""
    values = run.config | {"regen": run.regen or None}
    hidden = NO_VARIANT | published.implied(run.config)
    return {flag: value for flag, value in values.items()
            if value is not None and value is not False
            and flag not in hidden and not flag.startswith("version_")}


def cost(run):
    """Return the epochs of a run, each weighted by density and time steps."""
    return run.summary["training_cost"] * run.summary["epochs"]


def against(runs, baseline):
    """Return the mean difference in accuracy to a baseline at the same seeds, in
    points, and half of its 95 % interval by Student's t.

    runs, baseline: {seed: run}. Both are NaN where they share fewer than two seeds.
    """
    pairs = [100 * (run.summary["test_accuracy"]
                    - baseline[seed].summary["test_accuracy"])
             for seed, run in runs.items() if seed in baseline]
    if len(pairs) < 2 or runs == baseline:
        return np.nan, np.nan
    n = len(pairs) - 1
    t = T95[n - 1] if n <= len(T95) else 1.96 + 2.4 / n  # to 0.03
    return np.mean(pairs), t * np.std(pairs, ddof=1) / np.sqrt(len(pairs))


def rescued(run):
    """Return which share of what an update prunes comes back in it, mean over the
    updates of a run; NaN where it has no log of them."""
    try:
        shares = [row.get("survived") for row in records.read(run, "updates.jsonl")]
    except records.Unfit:
        return np.nan
    shares = [share for share in shares if share is not None]
    return np.mean(shares) if shares else np.nan


def tabulate(found, versus=None):
    """Return {setting: rows}; rows are dicts with the numbers behind COLUMNS.

    versus: the method to take differences to, by its name in the table. Raises
    ValueError where there is none of this name.
    """
    names = {method for _, _, method in found}
    if versus is not None and versus not in names:
        raise ValueError(f"--baseline is {versus}, expected a method as the table "
                         f"names it. Choose one of: {'; '.join(sorted(names))}")
    tables = {}
    for (setting, target, method), by_seed in found.items():
        name = versus or records.BASELINE[next(iter(by_seed.values())).pruned]
        level = "-" if style_name(name) == "dense" else target
        baseline = found.get((setting, level, name), {})
        dense = [cost(run) for (kind, _, name), runs in found.items()
                 for run in runs.values()
                 if (kind, style_name(name)) == (setting, "dense")]
        tables.setdefault(setting, []).append(
            dict(method=method, target=target) | row_of(by_seed, baseline, dense))
    for rows in tables.values():
        rows.sort(key=lambda row: (by_size(row["target"]), -row["accuracy"]))
    return dict(sorted(tables.items(), key=lambda item: (-len(item[1]), item[0])))


def row_of(by_seed, baseline, dense):
    """Return the numbers of a row: means over its runs, {seed: run}.

    baseline: {seed: run}; dense: the costs of the dense runs.
    """
    runs = list(by_seed.values())

    def mean(key, factor=1.0):
        values = [run.summary[key] for run in runs]
        return np.nan if None in values else factor * np.mean(values)

    accuracy, std = plots.spread([100 * run.summary["test_accuracy"] for run in runs])
    difference, half = against(by_seed, baseline)
    faster = come_back = np.nan
    if runs[0].pruned == records.CHANNELS:
        faster = mean("speedup_batch32")
    if runs[0].regen:
        come_back = 100 * np.mean([rescued(run) for run in runs])
    # NaN: without an epoch there is no cost to compare with
    usual_cost = (np.mean(dense) if dense else runs[0].summary["epochs"]) or np.nan
    return dict(
        accuracy=accuracy, std=std, against=difference, half=half,
        seeds=" ".join(str(seed) for seed in sorted(by_seed)),
        sparsity=mean("sparsity", 100), macs=mean("macs", 1e-6),
        sops=mean("sops", 1e-3), energy=mean("energy_mj", 1e3), faster=faster,
        back=mean("survived_by_regeneration", 100), rescued=come_back,
        training_cost=np.mean([cost(run) for run in runs]) / usual_cost)


def markdown(tables, notes):
    """Return the tables as text; a run that is not finished is a line that says why."""
    def shown(value, digits):
        return "-" if np.isnan(value) else f"{value:.{digits}f}"

    text = []
    for setting, rows in tables.items():
        text += [f"**{setting}**", "", f"| {' | '.join(COLUMNS)} |",
                 "|---" * len(COLUMNS) + "|"]
        for row in rows:
            accuracy = f"{row['accuracy']:.1f}"
            if " " in row["seeds"]:
                accuracy += f" ± {row['std']:.1f}"
            cells = [row["method"], row["target"], accuracy, difference_of(row),
                     row["seeds"], shown(row["sparsity"], 2), shown(row["macs"], 2),
                     shown(row["faster"], 2), shown(row["sops"], 0),
                     shown(row["energy"], 3), shown(row["training_cost"], 2),
                     shown(row["rescued"], 0), shown(row["back"], 1)]
            text.append(f"| {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text + [f"- {name}: {why}" for name, why in notes.items()])


def difference_of(row):
    """Return a row's difference in words: "+1.2 (+0.3 to +2.1) above"."""
    if np.isnan(row["against"]):
        return "-"
    low, high = row["against"] - row["half"], row["against"] + row["half"]
    text = f"{row['against']:+.1f} ({low:+.1f} to {high:+.1f})"
    if low > 0:
        return f"{text} above"
    return f"{text} below" if high < 0 else text


# ---- the plot -----------------------------------------------------------------------


def plot_tables(tables):
    """Draw the largest table of weights and that of channels, and return the figure.

    Left: accuracy for the targets that several methods have, the methods side by side
    in the order of the first target (dotted: dense). Right: accuracy over the training
    cost; where all targets are of one kind, a line joins those of a method.
    """
    largest = {}
    for setting, rows in tables.items():
        # Without the rows that differ in a flag: rates are drawn by analyze.py
        plain = [row for row in rows if "," not in row["method"]]
        largest.setdefault(setting.partition(":")[0], (setting, plain or rows))
    figure, axes = plots.canvas(2, len(largest))
    for (left, right), (setting, rows) in zip(axes, largest.values()):
        counts = Counter(row["target"] for row in rows if row["target"] != "-")
        targets = [target for target in counts if counts[target] > 1] or list(counts)
        rows = [row for row in rows if row["target"] in ("-", *targets)]
        low, high = limits_of(rows)
        plot_targets(left, rows, targets, low)
        plot_costs(right, rows, targets)
        for axis in (left, right):
            axis.set(ylabel="Test accuracy (%)", ylim=(low, high))
        # the name of a data set may have a $, which is no formula
        left.set_title(setting, fontsize=7, loc="left", parse_math=False)
    return figure


def limits_of(rows):
    """Return (low, high) of the axis of accuracies.

    A row with a deviation of 10 points, where a seed failed, does not set them if there
    are others.
    """
    steady = [row for row in rows if row["std"] < 10] or rows
    return (min(row["accuracy"] - row["std"] for row in steady) - 1,
            max(row["accuracy"] + row["std"] for row in steady) + 1)


def style_name(method):
    """Return the method whose colour a row has: its name without what it differs in."""
    return method.partition(",")[0]


def plot_targets(axis, rows, targets, low):
    """Draw accuracy for each target, the methods side by side.

    What is below `low`, the end of the axis, is written there as a number.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows if row["target"] != "-"))
    for method in dict.fromkeys(row["method"] for row in rows):
        style = style_name(method)
        for row in rows:
            if row["method"] != method:
                continue
            if style == "dense":
                axis.axhline(row["accuracy"], color="black", linestyle=":", linewidth=1)
            if row["target"] not in targets:
                continue
            shift = (methods.index(method) + 0.5) / len(methods) - 0.5
            x = targets.index(row["target"]) + 0.8 * shift
            plots.plot(axis, [x], [row["accuracy"]], [row["std"]], style,
                       linestyle="none")
            if row["accuracy"] < low:
                axis.annotate(f"{row['accuracy']:.0f}", (x, low), fontsize=6,
                              ha="right", va="bottom",
                              color=plots.style_of(style)[0])
    axis.set_xlim(-0.5, max(len(targets), 1) - 0.5)
    axis.set_xticks(range(len(targets)), targets)


def plot_costs(axis, rows, targets):
    """Draw accuracy over the training cost, for each method."""
    one_kind = len({by_size(target)[0] for target in targets}) == 1
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        columns = ([row[key] for row in mine]
                   for key in ("training_cost", "accuracy", "std"))
        plots.plot(axis, *columns, style_name(method), label=method, linewidth=0.5,
                   linestyle="-" if one_kind else "none")
    axis.set_xlabel("Training cost / dense")
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


# ---- the script ---------------------------------------------------------------------


def parse_args(argv):
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--sparsity", type=flags.number(0, 1, above=True), nargs="+", default=[0.9],
        metavar="S", help="final sparsities of the weights (default 0.9)")
    add("--target-macs", type=flags.number(0, 1, above=True), default=0.7,
        metavar="SHARE", help="share of the MACs that goes with the channels (default "
        "0.7)")
    add("--seeds", type=flags.whole(1), default=3, metavar="N",
        help="seeds 0 to N - 1 (default 3)")
    add("--epochs-prune", type=flags.whole(1), metavar="N", default=None,
        help="structure epochs of each method; for channels: epochs of pretraining and "
        "of fine-tuning (default: the scripts')")
    add("--epochs-finetune", type=flags.whole(1), metavar="N", default=None,
        help="epochs with the mask fixed (default: the scripts'); a lottery ticket "
        "needs one")
    add("--dataset", type=flags.path, default="fashion-mini",
        help="as in the other scripts")
    for flag, convert in (("data-dir", flags.path), ("model", str),
                          ("width", flags.number(0, 100, above=True)),
                          ("train-limit", flags.whole(1)),
                          ("time-steps", flags.whole(1)),
                          ("batch-size", flags.whole(1))):
        add(f"--{flag}", type=convert, default=None, help="as in the other scripts")
    add("--jobs", type=flags.whole(1), default=1, metavar="N",
        help="runs at a time (default 1)")
    add("--out", type=flags.folder, default=None, metavar="DIR",
        help="the folder of the runs and of the result (default runs/compare); with "
             "--runs, of the result (default: the first of those folders)")
    add("--runs", type=flags.path, nargs="+", default=None, metavar="DIR",
        help="run nothing: only tabulate and draw the runs in these folders, at any "
        "depth")
    add("--baseline", default=None, metavar="METHOD", help="the row that differences "
        "are taken to, as the table names it, where a table has it; the files are then "
        "compare-METHOD.* (default: gmp, for channels slimming)")
    args = parser.parse_args(argv)
    refuse_unused(parser, args)
    known = {**WEIGHTS, **CHANNELS}
    if args.runs is None and args.baseline not in (None, *known):
        parser.error(f"--baseline is {args.baseline}, expected a method. Choose one "
                     f"of: {', '.join(known)}")
    if args.out is None:
        args.out = args.runs[0] if args.runs else "runs/compare"
    args.out = Path(args.out)
    if args.runs is not None:
        args.runs = [Path(folder) for folder in args.runs]
    return args


def refuse_unused(parser, args):
    """End with an error if --runs stands beside a flag of the runs to start."""
    if args.runs is None:
        return
    for flag, value in vars(args).items():
        used = flag in ("runs", "out", "baseline")
        if not used and value != parser.get_default(flag):
            parser.error(f"--{flag.replace('_', '-')} and --runs exclude each other, "
                         f"since --runs starts nothing. Leave one out")


def rates_in(runs):
    """Return in words at which r and after how many steps the runs of the two
    algorithms regenerated, for each target; "" where none did."""
    found = {}  # {target: runs}
    for run in runs:
        if run.script in records.ALGORITHMS and run.regen:
            found.setdefault(target_of(run), []).append(run)
    texts = []
    for target in sorted(found, key=by_size):
        text = f"{records.rates_of(found[target])} at {target}"
        if updates := records.updates_of(found[target]):
            text += f" ({updates})"
        texts.append(text)
    return "; ".join(texts)


def write(folder, name, tables, notes, runs):
    """Write the tables as NAME.md and NAME.csv and their plot, and print them."""
    text = markdown(tables, notes)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.md", lambda file: file.write(text))
    rows = [dict(setting=setting) | row for setting, mine in tables.items()
            for row in mine]
    figure, count, rates = plot_tables(tables), len(runs), rates_in(runs)
    if rates:
        plots.note(figure, f"In the runs of these tables {rates}.")
    plots.save(folder / name, figure, rows, f"{count} runs")
    print(f"{folder / name}.md, .csv, .png, .pdf: {count} runs")


def main(argv=None):
    args = parse_args(argv)
    with flags.exits(2, ValueError, OSError):
        processes.require_one()
        if args.runs is None:
            usual = presets.of(args.dataset)
            images = data.load(args.dataset, args.data_dir or "data", args.train_limit,
                               time_steps=args.time_steps or usual["time_steps"])
            jobs = plan(args, frames_of(args, images))
            args.out.mkdir(parents=True, exist_ok=True)
            run_all(jobs, args.jobs)
        folders = args.runs or [args.out]
        found, notes = gather(*folders)
        if not found:
            why = "; ".join(f"{name} is {why}" for name, why in notes.items())
            raise ValueError(f"{', '.join(map(str, folders))} holds no finished run, "
                             f"expected those of: python compare.py. {why}")
        runs = [run for by_seed in found.values() for run in by_seed.values()]
        if note := records.note_of_data(runs):
            print(note)
        plots.give_styles(run.method for run in runs)
        tables = tabulate(found, args.baseline)
        name = "-".join(["compare", *re.findall(r"\w+", args.baseline or "")])
        write(args.out, name, tables, notes, runs)
    return tables


if __name__ == "__main__":
    main()
