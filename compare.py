"""Every method under one protocol: run them all, then one table and one plot.

    python compare.py --sparsity 0.9 --seeds 3      # fashion-mini: 75 runs
    python compare.py --sparsity 0.9 0.95 --jobs 4  # four runs at a time
    python compare.py --epochs-prune 4 --epochs-finetune 2 --train-limit 3000
                                                    # a shorter one
    python compare.py --methods gmp criticality     # these alone
    python compare.py --methods gmp criticality --dry-run
                                                    # print the commands, start nothing
    python compare.py --runs runs/compare           # only the table, of finished runs
    python compare.py --runs runs/compare --baseline criticality --latex
                                                    # differences to criticality; for a
                                                    # paper

Weights: all methods have the same data, network, batches, epochs and final sparsity;
where a method's own sparsity is an outcome, its structure epochs end with an exact cut.
Channels: all methods end at equal MACs. The runs are processes of the scripts beside
this file. Finished ones are not repeated, stopped ones go on, and one that fails is a
line that names its log.

With --dry-run nothing is run, written or downloaded: the commands of the runs that are
not finished are printed, one a line, for a scheduler (docs/cluster.md).

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
                    "above" or "below" only where chance hardly explains it: p < 0.05
                    after Holm's correction for all differences of the table, also of
                    rows that --methods leaves out. Pairs that all differ alike have no
                    interval. Where GMP's runs differ, in --interval say, a row is
                    compared with those that have its own
    faster          of channels: time of the dense network / time of what is left, batch
                    32
    SOPs, energy    synaptic operations and energy of an image
    training cost   epochs, each weighted by density and time steps, over those of dense
    rescued         share of what an update prunes that comes back in it, mean over the
                    updates
    back            share of the final weights, or channels, that had been brought back:
                    is about r by construction (Eq. 7), and measures no method

The plot has the largest table of weights and that of channels: the methods below each
other with accuracy and training cost; at three targets or more accuracy by target, and
over the training cost. Below, runs of a method that differ in one number, of any flag
or of --time-steps say, are a line over it.
"""
import difflib
import re
import textwrap
from collections import Counter
from itertools import cycle
from pathlib import Path

import harness  # first: what is not installed is then one line

import numpy as np

import data
import plans
from harness import differences
from harness import flags
from harness import groups
from harness import jobs
from harness import latex
from harness import planning
from harness import plots
from harness import presets
from harness import processes
from harness import records
from harness.files import write_whole

# name: script and flags, beside the sparsity and the epochs, which all share; {density}
# is 1 - sparsity
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
    "stds": "prune_stds --optimizer sgd --mode matched",
    "upr": "prune_upr --mode matched",
    "upr-neurons": "prune_upr --mode matched --neurons",
    "ndsnn": "prune_ndsnn",
    "set": "prune_ndsnn --growth random --density {density}",
    "rigl": "prune_ndsnn --density {density}",
}
CHANNELS = {
    "dense": "prune_structured --prune-ratio 0",
    "slimming": "prune_structured --method slimming",
    "greg1": "prune_greg --method greg1",
    "greg2": "prune_greg --method greg2",
    "criticality": "prune_structured",
    "sca": "prune_sca --schedule step",
}
# The methods as --methods names them: "criticality" is that of weights
METHODS = {**WEIGHTS, **{f"channels-{name}": command
                         for name, command in CHANNELS.items()}}
COLUMNS = ("method", "target", "test accuracy, %", "against the baseline, points",
           "seeds", "sparsity, %", "MACs, M", "faster", "SOPs, k", "energy, uJ",
           "training cost", "rescued, %", "back, %")
# {the header of compare.csv: what a row calls it}. A cell is empty where "-" stands in
# the table
CSV = {
    "setting": "setting", "method": "method", "target": "target",
    "test accuracy (%)": "accuracy", "standard deviation (points)": "std",
    "baseline": "baseline", "against the baseline (points)": "against",
    "half of its 95 % interval (points)": "half",
    "p, corrected for the table (Holm)": "p", "seeds": "seeds",
    "sparsity (%)": "sparsity", "MACs of a step (M)": "macs",
    "speed-up at batch 32 (dense = 1)": "faster",
    "synaptic operations of an image (k)": "sops", "energy of an image (uJ)": "energy",
    "training cost (dense = 1)": "training_cost", "rescued (%)": "rescued",
    "back (%)": "back",
}


# ---- the methods --------------------------------------------------------------------


def is_chosen(methods, channels, name):
    """Return whether --methods names a method, or the row of this name.

    methods: those named; None: all. channels: whether it prunes channels: its name is
    then "channels-NAME", or NAME where no method of weights has it.
    """
    if methods is None:
        return True
    names = {name, groups.style_name(name)}
    if channels:
        names = {f"channels-{name}" for name in names} | (names - set(WEIGHTS))
    return not names.isdisjoint(methods)


def require_known(methods, known):
    """Raise ValueError for a method, of --methods, that is not known."""
    for name in methods or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise ValueError(f"--methods has {name}, expected names of methods. {hint}"
                             f"There are: {', '.join(known)}")


def plan(args, frames=None):
    """Return the jobs.Job of all runs of the methods that --methods names. frames: of a
    recording, see jobs.frames_of."""
    weights = {name: command for name, command in WEIGHTS.items()
               if is_chosen(args.methods, False, name)}
    channels = {name: command for name, command in CHANNELS.items()
                if is_chosen(args.methods, True, name)}
    return jobs.plan(args, weights, channels, frames)


# ---- the tables ---------------------------------------------------------------------


def cells_of(row):
    """Return the texts of a row, one for each of COLUMNS; "-" where there is none."""
    def shown(value, digits):
        return "-" if np.isnan(value) else f"{value:.{digits}f}"

    accuracy = f"{row['accuracy']:.1f}"
    if " " in row["seeds"]:
        accuracy += f" ± {row['std']:.1f}"
    difference = differences.words(row["against"], row["half"], row["p"])
    return [row["method"], row["target"], accuracy, difference, row["seeds"],
            shown(row["sparsity"], 2), shown(row["macs"], 2), shown(row["faster"], 2),
            shown(row["sops"], 0), shown(row["energy"], 3),
            shown(row["training_cost"], 2), shown(row["rescued"], 0),
            shown(row["back"], 1)]


def markdown(tables, notes):
    """Return the tables as text; a run that is not finished is a line that says why."""
    text = []
    for setting, rows in tables.items():
        text += [f"**{setting}**", "", f"| {' | '.join(COLUMNS)} |",
                 "|---" * len(COLUMNS) + "|"]
        text += [f"| {' | '.join(cells_of(row))} |" for row in rows]
        text.append("")
    return "\n".join(text + [f"- {name}: {why}" for name, why in notes.items()])


# ---- the plot -----------------------------------------------------------------------


SIZE = 4.5  # of a mark, in which its fill can be seen
MOST_LINES = 4  # panels with lines over a flag, at most
AXES = {"regen": "Regeneration rate r", "time_steps": "Time steps T",
        "epochs_prune": "Epochs of pruning", "interval": "Steps between two updates",
        "lr": "Learning rate"}


def plot_tables(tables):
    """Draw the largest table of weights and that of channels, and lines over flags, and
    return the figure.

    Left: accuracy for the targets that several methods have (dotted: dense). Right:
    the training cost. Of one or two targets each method has a row of its own, the best
    one first. Of more targets the methods are lines over them, and on the right
    accuracy is drawn over the cost. Below: the rows that are lines over a flag, of all
    tables.
    """
    panels = sweeps(tables)
    on_lines = {groups.key_of(row) for lines in panels.values() for line in lines
                for _, row in line}
    drawn = largest_tables(tables, panels, on_lines)
    shown, heights, margin = [], [], 0
    for setting, rows in drawn:
        counts = Counter(row["target"] for row in rows if row["target"] != "-")
        targets = [target for target in counts if counts[target] > 1] or list(counts)
        rows = [row for row in rows if row["target"] in ("-", *targets)]
        shown.append((setting, rows, targets))
        if len(targets) > 2:
            heights.append(2.5)
            # room for a legend in one or two columns, see beside()
            many = len({row["method"] for row in rows}) > 16
            margin = max(margin, 3.6 if many else 1.8)
        else:
            heights.append(0.9 + 0.17 * len({row["method"] for row in rows}))
    heights += [2.5] * -(-len(panels) // 2)
    figure, axes = plots.canvas(2, len(heights), margin, heights)
    seen = set(on_lines)
    for (left, right), (setting, rows, targets) in zip(axes, shown):
        limits = plots.limits_of([row["accuracy"] for row in rows],
                                 [row["std"] for row in rows])
        if len(targets) > 2:
            for axis in (left, right):
                axis.set(ylabel="Test accuracy (%)", ylim=limits)
            plot_targets(left, rows, targets)
            plot_costs(right, rows, targets)
        else:
            left.set(xlabel="Test accuracy (%)", xlim=limits)
            plot_methods(left, right, rows, targets)
        # above the legend of two targets; the name of a data set may have a $, which is
        # no formula
        left.set_title(setting, fontsize=7, loc="left", parse_math=False,
                       pad=16 if len(targets) == 2 else 6)
        seen |= set(map(groups.key_of, rows))
    below = axes[len(drawn):].flatten()
    for axis, ((flag, setting), lines) in zip(below, panels.items()):
        seen |= set(map(groups.key_of, plot_lines(axis, flag, setting, lines, tables)))
    for axis in below[len(panels):]:
        axis.remove()
    methods = {groups.style_name(row["method"]) for _, rows in drawn for row in rows}
    explain(figure, "dense" in methods, sum(map(len, tables.values())) - len(seen))
    return figure


def largest_tables(tables, panels, on_lines):
    """Return [(setting, rows)], the largest table of weights and that of channels
    without the rows that are on lines alone.

    Points of one method compare nothing: such a table is drawn only if there is no
    other one and no line.
    panels: see sweeps. on_lines: the groups.key_of() of their rows.
    """
    names = {flag.replace("_", " ") for flag, _ in panels}
    largest = {}
    for setting, rows in tables.items():
        # A row that is named after the flag of its line is drawn there alone
        rows = [row for row in rows if not (groups.key_of(row) in on_lines and any(
            word.rpartition(" ")[0] in names for word in words_in(row)))]
        largest.setdefault(setting.partition(":")[0], (setting, rows))
    found = [(setting, rows) for setting, rows in largest.values() if rows]
    several = [(setting, rows) for setting, rows in found
               if len({row["method"] for row in rows}) > 1]
    if several or panels:
        return several
    return found


def words_in(row):
    """Return the words of a row's name after the method, "regen 0.5" say."""
    return row["method"].split(", ")[1:]


def explain(figure, has_dense, missing):
    """Write under the figure what its bars, marks and numbers are. missing: how many
    rows of the tables are not in it."""
    text = plots.BARS if plots.has_bars(figure) else "Points: one seed each."
    if has_dense:
        text += " Dotted: dense."
    if any(axis.texts for axis in figure.axes):
        text += " A number at an edge: a mean beyond it."
    if missing:
        text += (f" Not drawn: {missing} rows of smaller tables, or of a target or a "
                 f"table that one method alone has.")
    plots.note(figure, text)


def sweeps(tables):
    """Return {(flag, setting without it): lines}, the panels of runs that differ in the
    number of one flag alone, the one with the most rows first. A line is a list of
    (number, row), in order; it has at least two numbers."""
    lines = {}
    for row in (row for rows in tables.values() for row in rows):
        for flag, value in row["numbers"].items():
            others, setting = row["like"][flag]
            lines.setdefault((flag, setting, others), []).append((value, row))
    panels = {}
    for (flag, setting, _), line in lines.items():
        if len({value for value, _ in line}) > 1:
            line.sort(key=lambda point: point[0])
            panels.setdefault((flag, setting), []).append(line)
    most = sorted(panels.items(), key=lambda item: -sum(map(len, item[1])))
    return dict(most[:MOST_LINES])


def plot_methods(left, right, rows, targets):
    """Draw the methods below each other: on the left their accuracy, on the right their
    training cost. The limits on the left are set before."""
    first = {row["method"]: row["accuracy"] for row in rows[::-1]
             if row["target"] in ("-", *targets[:1])}
    methods = sorted({row["method"] for row in rows},
                     key=lambda method: (-first.get(method, 0), method))
    low, _ = left.get_xlim()
    for place, method in enumerate(methods):
        colour, marker = plots.style_of(method)
        mine = [row for row in rows if row["method"] == method]
        for row in mine:
            look = dict(color=colour, marker=marker, markersize=SIZE, label=method)
            if row["target"] in targets[1:]:
                look |= plots.FILLS[1]
            left.errorbar(row["accuracy"], place, xerr=row["std"] or None, capsize=2,
                          elinewidth=1, **look)
            right.plot(row["training_cost"], place, **look)
        beyond = [f"{row['accuracy']:.0f}" for row in mine if row["accuracy"] < low]
        if beyond:
            left.annotate(", ".join(beyond), (low, place), fontsize=6, va="bottom",
                          color=colour, xytext=(2, 0), textcoords="offset points")
        if groups.style_name(method) == "dense":
            left.axvline(mine[0]["accuracy"], color="black", linestyle=":", linewidth=1)
    for axis in (left, right):
        axis.set(ylim=(len(methods) - 0.5, -0.5))
        axis.set_yticks(range(len(methods)), methods, fontsize=6.5, parse_math=False)
        axis.grid(axis="y", linewidth=0.3)
    right.tick_params(axis="y", labelleft=False)
    most = max((row["training_cost"] for row in rows if row["training_cost"] > 0),
               default=1)  # NaN: without an epoch
    right.set(xlabel="Training cost / dense", xlim=(0, 1.05 * most))
    if len(targets) > 1:
        for target, fill in zip(targets, plots.FILLS):
            right.plot([], [], color=plots.GREY, marker="o", markersize=SIZE,
                       linestyle="none", label=target, **fill)
        named = right.get_legend_handles_labels()
        right.legend(*(items[-len(targets):] for items in named), frameon=False,
                     fontsize=7, ncols=2, loc="lower right", bbox_to_anchor=(1, 1),
                     borderaxespad=0.1)


def plot_targets(axis, rows, targets):
    """Draw accuracy for each of several targets, a line for each method. The limits of
    the axis are set before."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["target"] != "-"))
    for row in rows:
        if groups.style_name(row["method"]) == "dense":
            axis.axhline(row["accuracy"], color="black", linestyle=":", linewidth=1)
    for method in methods:
        mine = [row for row in rows
                if row["method"] == method and row["target"] in targets]
        shift = (methods.index(method) + 0.5) / len(methods) - 0.5
        places = [targets.index(row["target"]) + 0.8 * shift for row in mine]
        plot_rows(axis, places, mine, targets, "-")
    axis.set_xlim(-0.5, len(targets) - 0.5)
    axis.set_xticks(range(len(targets)), targets, fontsize=8)


def plot_costs(axis, rows, targets):
    """Draw accuracy over the training cost, for each method, with the legend of both
    panels."""
    one_kind = len({groups.by_size(target)[0] for target in targets}) == 1
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        plot_rows(axis, [row["training_cost"] for row in mine], mine, targets,
                  "-" if one_kind else "none")
    axis.set_xlabel("Training cost / dense")
    for target, fill in zip(targets, cycle(plots.FILLS)):
        axis.plot([], [], color=plots.GREY, marker="o", markersize=SIZE,
                  linestyle="none", label=target, **fill)
    beside(axis)


def plot_rows(axis, places, rows, targets, line):
    """Draw the rows of one method at some places, the fill of a mark by its target."""
    if not rows:
        return
    method = rows[0]["method"]
    plots.plot(axis, places, [row["accuracy"] for row in rows],
               [row["std"] for row in rows], method, linewidth=0.5, linestyle=line,
               markersize=SIZE)
    colour, marker = plots.style_of(method)
    for x, row in zip(places, rows):
        plots.mark_below(axis, x, row["accuracy"], method)
        if row["target"] in targets[1:]:  # over the full one, which is at 2.1
            fill = plots.FILLS[targets.index(row["target"]) % len(plots.FILLS)]
            axis.plot([x], [row["accuracy"]], color=colour, marker=marker,
                      markersize=SIZE, linestyle="none", zorder=2.2, **fill)


def plot_lines(axis, flag, setting, lines, tables):
    """Draw accuracy over a flag, a line for each of `lines`, (number, row) lists; and,
    dashed, the baseline, where it has one row for all of them; return that row in a
    list. setting: of the lines, in words."""
    rows = [row for line in lines for _, row in line]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    limits = plots.limits_of([row["accuracy"] for row in rows],
                             [row["std"] for row in rows])
    label = AXES.get(flag, flag.replace("_", " ").capitalize())
    if len(targets) == 1:
        setting += f", {targets[0]}"
    axis.set(ylabel="Test accuracy (%)", ylim=limits)
    axis.set_xlabel(f"{label}\n{textwrap.fill(setting, 42)}", fontsize=7,
                    parse_math=False)
    for line in lines:
        _, first = line[0]
        said = [word for word in words_in(first)
                if word.rpartition(" ")[0] != flag.replace("_", " ")]
        method = ", ".join([groups.style_name(first["method"]), *said])
        fill = plots.FILLS[targets.index(first["target"]) % len(plots.FILLS)]
        label = method if len(targets) == 1 else f"{method}, {first['target']}"
        values, accuracies = [], []
        for value, row in line:
            values.append(value)
            accuracies.append(row["accuracy"])
        plots.plot(axis, values, accuracies, [row["std"] for _, row in line], method,
                   label=label, **fill)
        for value, accuracy in zip(values, accuracies):
            plots.mark_below(axis, value, accuracy, method)
    name = records.BASELINE[rows[0]["pruned"]]
    settings = {row["setting"] for row in rows}
    level = [row for setting in settings for row in tables[setting]
             if row["method"] == name and row["target"] in targets]
    if not len(level) == len(settings) == len(targets) == 1:
        level = []
    for row in level:
        axis.axhline(row["accuracy"], color=plots.style_of(name)[0], linestyle="--",
                     linewidth=1, label=name)
    numbers = [value for line in lines for value, _ in line]
    if min(numbers) > 0 and max(numbers) > 20 * min(numbers):
        axis.set_xscale("log")
    _, labels = axis.get_legend_handles_labels()
    fit = 52 // (max(map(len, labels)) + 6)  # beside each other, above a panel
    few, most = (1, 3) if len(lines) < 10 else (2, 4)
    plots.legend(axis, min(max(fit, few), most))
    return level


def beside(axis):
    """Put the legend to the right of a panel, in two columns if it is long."""
    _, labels = axis.get_legend_handles_labels()
    axis.legend(frameon=False, fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5),
                ncols=1 if len(labels) <= 18 else 2)


# ---- the script ---------------------------------------------------------------------


def parse_args(argv):
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--methods", nargs="+", metavar="METHOD", default=None, help="start "
        "these methods alone: " + ", ".join(METHODS) + " (default: all); with --runs, "
        "show the rows of these alone, by their names in the table")
    add("--sparsity", type=flags.number(0, 1, above=True), nargs="+", default=[0.9],
        metavar="S", help="final sparsities of the weights (default 0.9)")
    add("--target-macs", type=flags.number(0, 1, above=True), default=0.7,
        metavar="SHARE", help="share of the MACs that goes with the channels (default "
        "0.7)")
    add("--seeds", type=flags.whole(1), default=3, metavar="N",
        help="seeds 0 to N - 1 (default 3)")
    add("--epochs-prune", type=flags.whole(1), metavar="N", default=None,
        help="structure epochs of each method; for channels: epochs of pretraining and "
        "of fine-tuning, and a stage between them in proportion (default: the scripts')"
        )
    add("--epochs-finetune", type=flags.whole(1), metavar="N", default=None,
        help="epochs with the mask fixed (default: the scripts'); a lottery ticket "
        "needs one")
    add("--minutes", type=flags.number(0, above=True), default=None, metavar="M",
        help="choose the epochs, the same for all methods, so that all runs together "
        "end within so many minutes (a short trial of each method measures it)")
    add("--dataset", type=flags.path, default="fashion-mini",
        help="as in the other scripts")
    add("--precision", choices=("fp32", "bf16"), default=None,
        help="as in the other scripts")
    add("--model", choices=plans.NAMES, default=None, help="as in the other scripts")
    for flag, convert in (("data-dir", flags.path), ("device", flags.device),
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
    add("--dry-run", action="store_true", default=False, help="print the commands of "
        "the runs that are not finished, one a line, and start nothing")
    add("--latex", action="store_true", default=False, help="also write the tables as "
        "compare.tex, for a paper")
    add("--baseline", default=None, metavar="METHOD", help="the row that differences "
        "are taken to, as the table names it, where a table has it; the files are then "
        "compare-METHOD.* (default: gmp, for channels slimming)")
    args = parser.parse_args(argv)
    refuse_unused(parser, args)
    if args.minutes is not None and (args.epochs_prune or args.epochs_finetune):
        parser.error("--minutes chooses the epochs, so --epochs-prune and "
                     "--epochs-finetune exclude it. Leave one out")
    known = {**WEIGHTS, **CHANNELS}
    if args.runs is None:
        with flags.exits(2, ValueError):
            require_known(args.methods, list({**METHODS, **CHANNELS}))
    if args.runs is None and args.baseline not in (None, *known):
        parser.error(f"--baseline is {args.baseline}, expected a method. Choose one "
                     f"of: {', '.join(known)}")
    if args.runs is None and args.baseline is not None and not any(
            is_chosen(args.methods, channels, args.baseline)
            for channels in (False, True)):
        parser.error(f"--baseline is {args.baseline}, which --methods does not name, "
                     f"expected one of its methods. Add {args.baseline} to --methods")
    if args.out is None:
        args.out = args.runs[0] if args.runs else "runs/compare"
    args.out = Path(args.out)
    if args.runs is not None:
        args.runs = [Path(folder) for folder in args.runs]
    return args


def refuse_unused(parser, args):
    """End with an error if --runs stands beside a flag of the runs to start, or
    --dry-run beside one of what would be started or drawn."""
    for flag in ("jobs", "latex", "baseline", "minutes") if args.dry_run else ():
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} and --dry-run exclude each other, since --dry-run "
                         f"only prints commands. Leave one out")
    if args.runs is None:
        return
    for flag, value in vars(args).items():
        used = flag in ("runs", "out", "baseline", "methods", "latex")
        if not used and value != parser.get_default(flag):
            parser.error(f"--{flag.replace('_', '-')} and --runs exclude each other, "
                         f"since --runs starts nothing. Leave one out")


def rates_in(runs):
    """Return in words at which r and after how many steps the runs of the two
    algorithms regenerated, for each target; "" where none did."""
    found = {}  # {target: runs}
    for run in runs:
        if run.script in records.ALGORITHMS and run.regen:
            found.setdefault(groups.target_of(run), []).append(run)
    texts = []
    for target in sorted(found, key=groups.by_size):
        text = f"{records.rates_of(found[target])} at {target}"
        if updates := records.updates_of(found[target]):
            text += f" ({updates})"
        texts.append(text)
    return "; ".join(texts)


def csv_rows(tables):
    """Return the rows of compare.csv, by the names of CSV; None where there is no
    number."""
    def known(value):
        return None if isinstance(value, float) and np.isnan(value) else value

    return [{name: known(row[key]) for name, key in CSV.items()}
            for rows in tables.values() for row in rows]


def write(folder, name, tables, notes, runs, with_latex=False):
    """Write the tables as NAME.md, NAME.csv and, if asked for, NAME.tex, and their
    plot, and print them."""
    text = markdown(tables, notes)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.md", lambda file: file.write(text))
    kinds = ".md, .csv, .png, .pdf"
    if with_latex:
        source = latex.document(tables, COLUMNS, cells_of, name)
        write_whole(folder / f"{name}.tex", lambda file: file.write(source))
        kinds += ", .tex"
    figure, rates = plot_tables(tables), rates_in(runs)
    if rates:
        plots.note(figure, f"In the runs of these tables {rates}.")
    plots.save(folder / name, figure, csv_rows(tables))
    print(f"{folder / name}{kinds}: {len(runs)} runs")


def rows_of(tables, methods):
    """Return the tables with the rows that --methods names; None: all of them. Raises
    ValueError for a name that no row has."""
    rows = [row for mine in tables.values() for row in mine]
    names = {}
    for row in rows:
        name = groups.style_name(row["method"])
        names |= {name: None, row["method"]: None}
        if row["pruned"] == records.CHANNELS:
            names[f"channels-{name}"] = None
    require_known(methods, list(names))
    kept = {setting: [row for row in mine if is_chosen(
        methods, row["pruned"] == records.CHANNELS, row["method"])]
        for setting, mine in tables.items()}
    return {setting: mine for setting, mine in kept.items() if mine}


def chosen_epochs(args, frames):
    """Return {flag: epochs}, those that fit into --minutes, one budget for all methods
    (see planning.choose_for_all)."""
    def plan_with(epochs):
        return plan(jobs.with_flags(args, epochs), frames)

    usual = jobs.epochs_of_weights(args)
    asked = {flag: getattr(args, flag) for flag in jobs.TIMED}
    asked["methods"] = sorted({job.method for job in plan_with(usual)})
    return planning.choose_for_all(plan_with, usual, asked, args.out / "minutes.json",
                                   args.jobs)


def main(argv=None):
    args = parse_args(argv)
    known = {} if args.runs else dict(no_memory=flags.SMALLER)
    with flags.exits(2, ValueError, OSError, **known):
        processes.require_one()
        if args.runs is None:
            frames, usual = None, presets.of(args.dataset)
            # a named set may have to be downloaded, which a dry run does not
            if not args.dry_run or args.dataset not in data.NAMES:
                frames = jobs.frames_of(args, data.load(
                    args.dataset, args.data_dir or "data", args.train_limit,
                    time_steps=args.time_steps or usual["time_steps"]))
            if not args.dry_run:
                args.out.mkdir(parents=True, exist_ok=True)
            if args.minutes is not None:
                args = jobs.with_flags(args, chosen_epochs(args, frames))
            planned = plan(args, frames)
            jobs.require_same_flags(planned)
            if args.dry_run:
                jobs.print_commands(planned)
                return None
            jobs.run_all(planned, args.jobs)
        folders = args.runs or [args.out]
        found, notes = groups.gather(*folders)
        if not found:
            why = "; ".join(f"{name} is {why}" for name, why in notes.items())
            raise ValueError(f"{', '.join(map(str, folders))} holds no finished run, "
                             f"expected those of: python compare.py. {why}")
        runs = [run for by_seed in found.values() for run in by_seed.values()]
        if note := records.note_of_data(runs):
            print(note)
        plots.give_styles(run.method for run in runs)
        tables = groups.tabulate(found, args.baseline)
        if args.runs is not None:
            tables = rows_of(tables, args.methods)
            runs = [run for rows in tables.values() for row in rows
                    for run in found[groups.key_of(row)].values()]
        name = "-".join(["compare", *re.findall(r"\w+", args.baseline or "")])
        write(args.out, name, tables, notes, runs, args.latex)
    return tables


if __name__ == "__main__":
    main()
