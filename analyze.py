"""The figures of the criticality paper, and a look inside that it does not give, from run folders.

    python analyze.py                                # all that the runs in runs/ suffice for
    python analyze.py variance --runs runs/A runs/B  # one figure, from these runs
    python analyze.py report                         # all of them, in one HTML page
    python analyze.py --demo                         # first makes short runs for all of them

Paper: arXiv 2311.16141. Each figure is a PNG, a PDF, and a CSV of what is drawn; over several seeds
it shows the mean and the standard deviation. What a run did not write (features, entropies, scores,
activity) is computed once, from its model.pt, and kept in its folder as analysis.npz.
"""
import subprocess
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from harness import flags
from harness import plots
from metrics import spearman
from harness.plots import STYLE, by_layer, canvas, layer_ticks, legend, plot, spread
from harness.records import (BASELINE, CHANNELS, WEIGHTS, Unfit, about, command, compared, controls, flat,
                     groups, layers_of, look, of, read, read_run)

RANKINGS = ("criticality", "gradient", "random", "granet")
TITLE = {WEIGHTS: "weights", CHANNELS: "channels"}


# ---- the paper's figures -------------------------------------------------------------------------
# Each takes runs and returns (figure, rows of its CSV, runs that it used, what its numbers say), or
# None where the runs do not suffice.


def accuracy_over(axis, runs, flag, label):
    """Draw the final accuracy over a flag's values, for each method; return rows of the CSV."""
    rows, by_method = [], {}
    for run in runs:
        at = by_method.setdefault(run.method, {})
        at.setdefault(run.config[flag], []).append(100 * run.summary["test_accuracy"])
    for method, at in by_method.items():
        points = [(x, *map(float, spread(at[x])), len(at[x])) for x in sorted(at)]
        plot(axis, *list(zip(*points))[:3], method)
        rows += [dict(method=method, **{flag: x}, accuracy=mean, std=std, seeds=seeds)
                 for x, mean, std, seeds in points]
    axis.set(xlabel=label, ylabel="Test accuracy (%)")
    return rows


def ratio(runs):
    """Fig. 1(a): accuracy over the regeneration rate."""
    group = next((group for group in groups(runs, WEIGHTS) if len(
        {run.regen for run in group if run.method == "criticality"}) >= 2), None)
    if group is None:
        return None
    used = [run for run in group if run.method in RANKINGS]
    figure, ((axis,),) = canvas(1)
    rows = accuracy_over(axis, used, "regen", "Regeneration rate r")
    for method, line in (("gmp", "--"), ("dense", ":")):
        if others := of(group, method):
            mean, std = spread([100 * run.summary["test_accuracy"] for run in others])
            axis.axhline(mean, color=STYLE[method][0], linestyle=line, linewidth=1, label=method)
            rows.append(dict(method=method, regen=0.0, accuracy=mean, std=std, seeds=len(others)))
            used += others
    legend(axis, 3)
    return figure, rows, used, "; ".join(
        f"{method} " + ", ".join(f"{row['accuracy']:.1f} % at r = {row['regen']:g}"
                                 for row in rows if row["method"] == method)
        for method in dict.fromkeys(row["method"] for row in rows))


def epochs(runs):
    """Fig. 1(b): accuracy over the number of pruning epochs."""
    for group in groups(runs, WEIGHTS, ["epochs_prune"]):
        couple = of(group, "gmp"), of(group, "criticality")
        one, other = ({run.config["epochs_prune"] for run in mine} for mine in couple)
        if len(one & other) >= 2:
            break
    else:
        return None
    used = sum(couple, [])
    figure, ((axis,),) = canvas(1)
    rows = accuracy_over(axis, used, "epochs_prune", "Epochs of pruning")
    axis.xaxis.get_major_locator().set_params(integer=True)
    legend(axis)
    return figure, rows, used, "; ".join(
        f"{row['method']} {row['accuracy']:.1f} % with {row['epochs_prune']}" for row in rows)


def survival(runs):
    """Fig. 2(a): what an update prunes and brings back; what is alive in the end and had come back.
    The paper: above 50 %; 48.03 % (VGG-16 at 90 %), 42.60 % (ResNet-19 at 49.46 % of the MACs)."""
    if not (panels := compared(runs, "criticality")):
        return None
    figure, (axes,) = canvas(1 + (WEIGHTS in panels))
    right, rows, says = axes[-1], [], []
    if WEIGHTS in panels:
        shares = [[np.nan if row["survived"] is None else 100 * row["survived"]
                   for row in read(run, "updates.jsonl")]
                  for run in panels[WEIGHTS]["criticality"]]
        mean, std = spread(shares)
        plot(axes[0], range(1, len(mean) + 1), mean, std, "criticality")
        axes[0].axhline(50, color="black", linestyle="--", linewidth=1, label="paper: above this")
        axes[0].set(xlabel="Mask update", ylabel="Pruned and regenerated (%)", ylim=(0, 103))
        legend(axes[0])
        rows = [dict(what="pruned in update", x=i, share=m, std=s)
                for i, (m, s) in enumerate(zip(mean, std), 1)]
        says = [f"of the weights that an update prunes, {np.nanmin(mean):.0f} to "
                f"{np.nanmax(mean):.0f} % come back in it (paper: above 50 %)"]
    for x, (script, paper) in enumerate(((WEIGHTS, 48.03), (CHANNELS, 42.60))):
        right.plot([x - 0.3, x + 0.3], [paper, paper], "k--", linewidth=1,
                   label=None if x else "paper")
        if script in panels:
            mean, std = spread([100 * run.summary["survived_by_regeneration"]
                                for run in panels[script]["criticality"]])
            right.bar(x, mean, 0.4, yerr=std or None, capsize=2, color=STYLE["criticality"][0],
                      label=None if says[1:] else "criticality")
            rows.append(dict(what=f"alive {TITLE[script]}", x=None, share=mean, std=std))
            says.append(f"{mean:.1f} % of the {TITLE[script]} that are alive in the end came back "
                        f"(paper: {paper} %)")
    right.set_xticks([0, 1], TITLE.values())
    right.set(ylabel="Alive by regeneration (%)", xlim=(-0.5, 1.5), ylim=(0, 100))
    legend(right)
    return figure, rows, flat(panels), "; ".join(says)


def importance(runs):
    """Fig. 2(b): |gamma|, over fine-tuning with L1, of the channels that only one method kept.

    INTERPRETATION of "normalised": |gamma| / the mean over the channels of that network at that
    epoch, so that 1 is a channel like any other.
    """
    with_l1 = [run for run in runs if run.config.get("finetune_l1")]
    if not (panels := compared(with_l1, "criticality", "baseline")):
        return None
    traces = {method: [] for method in panels[CHANNELS]}
    for couple in zip(*panels[CHANNELS].values()):
        tables = [read(run, "channels.json")["layers"] for run in couple]
        if any(one["gamma"] != other["gamma"] for one, other in zip(*tables)):
            raise Unfit(couple[0], f"{couple[1].folder.name} was pruned from another network")
        for run, table, rivals in zip(couple, tables, tables[::-1]):
            before = [np.array(layer["gamma"])[layer["kept"]] for layer in table]
            after = [np.abs(read(run, "gamma.npz")[layer["name"]]) for layer in table]
            gamma = np.concatenate([np.vstack(both) for both in zip(before, after)], 1)  # [E+1, M]
            only = np.concatenate([~np.isin(layer["kept"], rival["kept"])
                                   for layer, rival in zip(table, rivals)])
            if not only.any():
                raise Unfit(run, "it kept no channel that the other of its pair did not keep")
            traces[run.method].append(gamma[:, only].mean(1) / gamma.mean(1))
    figure, ((axis,),) = canvas(1)
    rows, says = [], []
    for method, values in traces.items():
        mean, std = spread(values)
        plot(axis, range(len(mean)), mean, std, method, label=f"{method} alone")
        rows += [dict(method=method, epoch=i, importance=m, std=s)
                 for i, (m, s) in enumerate(zip(mean, std))]
        says.append(f"channels that only {method} kept go from {mean[0]:.2f} to {mean[-1]:.2f}")
    axis.set(xlabel="Epoch of fine-tuning", ylabel=r"$|\gamma|$ / mean of the network")
    legend(axis)
    return figure, rows, flat(panels), "; ".join(says)


def per_class(runs, key, label, better):
    """Draw a number of each class, in the order of the baseline's; better: -1 lower, 1 higher.
    Where there are runs that regenerate by gradient and at random, these stand by as controls."""
    if not (panels := controls(runs, compared(runs, "criticality", "baseline"))):
        return None
    (figure, axes), rows, says = canvas(len(panels)), [], []
    for axis, (script, methods) in zip(axes[0], panels.items()):
        values = {method: np.array([look(run)[key] for run in mine])
                  for method, mine in methods.items()}
        base = values[BASELINE[script]]
        order = base.mean(0).argsort()
        for method, found in values.items():
            mean, std = spread(found[:, order])
            plot(axis, range(len(order)), mean, std, method, linestyle="none")
            rows += [dict(pruned=TITLE[script], method=method, label=k, mean=m, std=s)
                     for k, m, s in zip(order, mean, std)]
            if found is not base:
                won = 100 * (better * (found - base) > 0).mean()
                says.append(f"{TITLE[script]}: {method} is {('higher', 'lower')[better < 0]} in "
                            f"{won:.0f} % of the classes (each seed counted), {found.mean():.4f} "
                            f"against {base.mean():.4f} of {BASELINE[script]}")
        if len(order) <= 20:
            axis.set_xticks(range(len(order)), order)
        axis.set(xlabel=f"Class ({TITLE[script]} pruned)", ylabel=label)
        legend(axis)
    return figure, rows, flat(panels), "; ".join(says)


def variance(runs):
    """Fig. 3(a, b): intra-cluster variance of the features of each class, test set."""
    return per_class(runs, "variance", "Intra-cluster variance", -1)


def similarity(runs):
    """Fig. 3(c, d): cosine similarity of each class's mean features in training and test set."""
    return per_class(runs, "similarity", "Cosine similarity", 1)


def curves(runs):
    """Figs. 4-7: accuracy and loss over the fine-tuning."""
    if not (panels := compared(runs, "criticality", "baseline")):
        return None
    (figure, axes), rows, says = canvas(len(panels), 2), [], []
    for column, (script, methods) in zip(axes.T, panels.items()):
        for method, mine in methods.items():
            logs = [[row for row in read(run, "metrics.jsonl") if row["stage"] == "finetune"]
                    for run in mine]
            if not all(logs):
                raise Unfit(mine[logs.index([])], "it has no epoch of fine-tuning")
            for part, line in (("train", "--"), ("test", "-")):
                for axis, what, factor in zip(column, ("accuracy", "loss"), (100, 1)):
                    mean, std = spread([[factor * row[f"{part}_{what}"] for row in log]
                                        for log in logs])
                    plot(axis, range(1, len(mean) + 1), mean, std, method, linestyle=line,
                         label=f"{method}, {part}")
                    rows += [dict(pruned=TITLE[script], method=method, set=part, quantity=what,
                                  epoch=i, mean=m, std=s)
                             for i, (m, s) in enumerate(zip(mean, std), 1)]
            accuracy = np.mean([run.summary["test_accuracy"] for run in mine])
            says.append(f"{TITLE[script]}, {method}: {100 * accuracy:.1f} % in the end")
        for axis, label in zip(column, ("Accuracy (%)", "Loss (nats)")):
            axis.set(xlabel=f"Epoch of fine-tuning ({TITLE[script]} pruned)", ylabel=label)
            axis.xaxis.get_major_locator().set_params(integer=True)
        legend(column[0])
    return figure, rows, flat(panels), "; ".join(says)


# ---- beyond the paper ----------------------------------------------------------------------------


def in_two_rows(runs, values):
    """Draw two values of each layer, {label: function of a run}, one above the other."""
    if not (panels := compared(runs, "dense", "baseline", "criticality")):
        return None
    (figure, axes), rows, says = canvas(len(panels), 2), [], []
    for column, (script, methods) in zip(axes.T, panels.items()):
        for axis, (label, value) in zip(column, values.items()):
            found = by_layer(axis, methods, value, label)
            axis.set_xlabel(f"Layer ({TITLE[script]} pruned)")
            rows += [dict(pruned=TITLE[script]) | row for row in found]
            says.append(f"{TITLE[script]}, {label}, mean of the layers: " + ", ".join(
                f"{name} {np.nanmean([row['mean'] for row in found if row['method'] == name]):.3g}"
                for name in methods))
        legend(column[0], 3)
    return figure, rows, flat(panels), "; ".join(says)


def entropy(runs):
    """Entropy of the spike counts of each layer, and its rank correlation with criticality."""
    def bits(run):
        return {name: row.mean() for name, row in layers_of(run, "entropy").items()}

    def correlation(run):
        scores = layers_of(run, "criticality")
        return {name: spearman(row, scores[name])
                for name, row in layers_of(run, "entropy").items()}

    return in_two_rows(runs, {"Entropy of counts (bits)": bits, "Spearman's rho": correlation})


def activity(runs):
    """Firing rate and synaptic operations of each layer."""
    return in_two_rows(runs, {
        "Firing rate": lambda run: layers_of(run, "rate"),
        "Synaptic operations (k)": lambda run: {
            name: 1e-3 * sops for name, sops in layers_of(run, "sops").items()}})


def criticality(runs):
    """Distribution of the channels' scores in each layer, before pruning and after."""
    if not (panels := compared(runs, "dense", "criticality")):
        return None
    (figure, axes), rows, says = canvas(len(panels)), [], []
    for axis, (script, methods) in zip(axes[0], panels.items()):
        for shift, method in ((-0.2, "dense"), (0.2, "criticality")):
            scores = [layers_of(run, "criticality") for run in methods[method]]
            names = list(scores[0])
            pooled = [np.concatenate([layers[name] for layers in scores]) for name in names]
            line = dict(color=STYLE[method][0])
            boxes = axis.boxplot(
                pooled, positions=np.arange(len(names)) + shift, widths=0.3, manage_ticks=False,
                flierprops=dict(marker=".", markersize=2, markeredgecolor=line["color"]),
                boxprops=line, whiskerprops=line, capprops=line, medianprops=line)
            boxes["boxes"][0].set_label(method)
            rows += [dict(pruned=TITLE[script], method=method, layer=name, criticality=score)
                     for name, values in zip(names, pooled) for score in values]
            says.append(f"{TITLE[script]}, {method}: median of all channels "
                        f"{np.median(np.concatenate(pooled)):.3f}")
        layer_ticks(axis, names)
        axis.set(xlabel=f"Layer ({TITLE[script]} pruned)", ylabel="Criticality")
        legend(axis)
    return figure, rows, flat(panels), "; ".join(says)


def layers(runs):
    """Density of each layer, for each method."""
    if not (panels := compared([run for run in runs if run.method != "dense"])):
        return None
    figure, axes = canvas(len(panels))
    rows = []
    for axis, (script, methods) in zip(axes[0], panels.items()):
        rows += [dict(pruned=TITLE[script]) | row for row in by_layer(axis, methods, lambda run: {
            layer["name"].removesuffix(".weight").removesuffix(".conv"):
            100 * layer["alive"] / layer["weights"] for layer in run.summary["layers"]},
            "Weights alive (%)")]
        axis.set(xlabel=f"Layer ({TITLE[script]} pruned)", ylim=(0, None))
        legend(axis, 3)
    most = {(row["pruned"], row["method"]): row for row in sorted(rows, key=lambda r: r["mean"])}
    return figure, rows, flat(panels), "; ".join(
        f"{pruned}, {method}: densest is {row['layer']} with {row['mean']:.1f} %"
        for (pruned, method), row in most.items())


# ---- the script ----------------------------------------------------------------------------------

UNSTRUCTURED, STRUCTURED = "python prune_unstructured.py", "python prune_structured.py"
PAIRS = (f"{UNSTRUCTURED}{{c}}; {UNSTRUCTURED}{{c}} --regen 0; {STRUCTURED}{{c}}; "
         f"{STRUCTURED}{{c}} --method slimming")
ALL_THREE = f"{PAIRS}; {UNSTRUCTURED}{{c}} --sparsity 0; {STRUCTURED}{{c}} --prune-ratio 0"
FIGURES = {  # name: (function, what to look for, commands that make the runs it needs)
    "ratio": (ratio, "The paper's curve rises from GMP (r = 0) to a rate in the middle and falls "
              "again; criticality lies above the other rankings.",
              f"for r in 0 0.1 0.3 0.5 0.7; do {UNSTRUCTURED}{{c}} --regen $r; done"),
    "epochs": (epochs, "In the paper criticality is above GMP at each length, and most where "
               "there are few epochs.",
               f"for n in 4 8 16; do for r in 0 0.5; do {UNSTRUCTURED}{{c}} --epochs-prune $n "
               f"--regen $r; done; done"),
    "survival": (survival, "In the paper more than half of what an update prunes comes back in "
                 "it, and about half of what is alive in the end had been regenerated.",
                 f"{UNSTRUCTURED}{{c}}; {STRUCTURED}{{c}}"),
    "importance": (importance, "In the paper the channels that criticality brought back gain in "
                   "importance while fine-tuning, and pass those that slimming had kept.",
                   f"{STRUCTURED}{{c}} --finetune-l1; "
                   f"{STRUCTURED}{{c}} --finetune-l1 --method slimming"),
    "variance": (variance, "In the paper criticality has the lower variance in almost all classes: "
                 "its features are more uniform within a class.", PAIRS),
    "similarity": (similarity, "In the paper criticality has the higher similarity: what was "
                   "learnt holds for the test set.", PAIRS),
    "curves": (curves, "In the paper criticality ends higher on the test set, with less distance "
               "between training and test.", PAIRS),
    "entropy": (entropy, "A positive correlation says that the score picks the channels whose "
                "spike counts carry information.", ALL_THREE),
    "criticality": (criticality, "Scores near alpha / 2 belong to channels that are kept at their "
                    "threshold.", ALL_THREE),
    "layers": (layers, "Where a method takes its weights from: what regeneration gives to one "
               "layer is missing in another.", PAIRS),
    "activity": (activity, "Where the spikes are, and what they cost.", ALL_THREE)}


def draw(name, runs, out):
    """Draw one figure, without the runs that it cannot use, which are named. Returns what the
    figure's function returned."""
    try:
        drawn = FIGURES[name][0](runs)
    except Unfit as error:
        unfit, why = error.args
        print(f"{name:<12}without {unfit.folder}: {why}")
        return draw(name, [run for run in runs if run is not unfit], out)
    if drawn is None:
        shared = runs[0].config if runs else {}
        usual = flags.COMMON | flags.DATASETS.get(shared.get("dataset"), flags.SMALL)
        given = "".join(f" --{flag.replace('_', '-')} {shared[flag]}"
                        for flag in ("dataset", "model", "width", "train_limit", "time_steps")
                        if flag in shared and shared[flag] != usual[flag])
        print(f"{name:<12}not drawn; the runs that it needs: {FIGURES[name][2].format(c=given)}")
    else:
        figure, rows, used, says = drawn
        plots.save(out / name, figure, rows, f"{name}: {about(used)}\n"
                   f"runs: {', '.join(str(run.folder) for run in used)}")
        print(f"{name:<12}{out / name}.png  of {len(used)} runs: {says}")
    return drawn


def demo():
    """Make short runs for all figures in runs/demo; go on with those that were stopped."""
    short = "--train-limit 3000 --epochs-finetune 2 --interval 10"
    wanted = {"dense": f"{WEIGHTS} {short} --epochs-prune 4 --sparsity 0"}
    for length in (4, 2, 8):
        for rate in (0, 0.5):
            wanted[f"epochs{length}-r{rate}"] = (
                f"{WEIGHTS} {short} --epochs-prune {length} --regen {rate}")
    for metric in RANKINGS:
        for rate in (0.1, 0.3, 0.5, 0.7):
            if (metric, rate) != ("criticality", 0.5):  # it is there already
                wanted[f"{metric}-r{rate}"] = (f"{WEIGHTS} {short} --epochs-prune 4 "
                                               f"--metric {metric} --regen {rate}")
    short = "--train-limit 3000 --epochs-pretrain 4 --epochs-finetune 4 --l1 0.01"
    for name, more in (("dense", "--prune-ratio 0"), ("slimming", "--method slimming"),
                       ("criticality", ""), ("slimming-l1", "--method slimming --finetune-l1"),
                       ("criticality-l1", "--finetune-l1")):
        wanted[f"channels-{name}"] = f"{CHANNELS} {short} {more}"
    folders = [Path("runs", "demo", name) for name in wanted]
    bar = tqdm(folders, "demo", unit="run", dynamic_ncols=True)
    for folder, words in zip(bar, wanted.values()):
        if (folder / "summary.json").exists():
            continue
        script, *given = words.split()
        done = subprocess.run([sys.executable, Path(__file__).with_name(f"{script}.py"), *given,
                               "--run-dir", folder, "--resume"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{folder} came to nothing: {done.stderr.strip()[-500:]}. Go on "
                               f"with: python analyze.py --demo")
    return folders


def main(argv=None):
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("figure", nargs="?", default="all", choices=("all", "report", *FIGURES), metavar="FIGURE",
        help=f"one of {', '.join(FIGURES)}, all of them (default), or report: all, in a page")
    add("--runs", nargs="+", metavar="FOLDER", default=None, help="finished runs (default: runs/*)")
    add("--out", metavar="DIR", default=None, help="where the figures go (default figures)")
    add("--demo", action="store_true", default=False, help="first make short runs for all figures "
        "in runs/demo, about 20 minutes on two cores, and draw those in figures/demo")
    args = parser.parse_args(argv)
    if args.demo and args.runs:
        parser.error("--demo and --runs exclude each other, expected one of them. Leave one out")
    with flags.exits(1, RuntimeError), flags.exits(2, ValueError, OSError):
        folders = demo() if args.demo else [Path(folder) for folder in args.runs or sorted(
            path.parent for path in Path("runs").glob("*/config.json"))]
        out = Path(args.out or ("figures/demo" if args.demo else "figures"))
        runs, skipped = [], {}
        for folder in folders:
            try:
                runs.append(read_run(folder))
            except ValueError as error:
                skipped.setdefault(str(error), []).append(str(folder))
        for error, names in skipped.items():
            print(f"skipped {', '.join(names)}: {error}")
        names = [args.figure] if args.figure in FIGURES else list(FIGURES)
        drawn = {name: found for name in names if (found := draw(name, runs, out)) is not None}
        if not drawn:
            raise ValueError("no figure can be drawn of these runs. Make some first: python "
                             "analyze.py --demo, or: python prune_unstructured.py")
        if args.figure == "report":
            plots.page(out / "report.html", "Pruning spiking neural networks", [
                (out / f"{name}.png", FIGURES[name][0].__doc__.splitlines()[0],
                 (FIGURES[name][1], f"Here: {says}.", about(used)),
                 "\n".join(dict.fromkeys(map(command, used))))
                for name, (_, _, used, says) in drawn.items()])
            print(f"report      {out / 'report.html'}")
    return drawn


if __name__ == "__main__":
    main()
