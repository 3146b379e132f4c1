"""The figures of the criticality paper, and a look inside that it does not give, from
run folders.

    python analyze.py                                # all figures, of the runs in runs/
    python analyze.py --runs runs/compare            # of the runs in a folder
    python analyze.py variance --runs runs/A runs/B  # one figure, of two runs
    python analyze.py report                         # all figures, in one HTML page
    python analyze.py verdicts                       # a verdict on each of its claims
    python analyze.py --demo                         # first makes short runs for all

Paper: arXiv 2311.16141. A folder with a config.json is a run; runs are found at any
depth below the folders named. Each figure is a PNG, a PDF, and a CSV of what is drawn;
over several seeds it shows the mean and the standard deviation. What a run did not
write (features, entropies, scores, activity) is computed once, from its model.pt, and
kept in its folder as analysis.npz.

Where the published code (harness/published.py) measures otherwise than the paper's text
says, a figure shows both: survival, importance, variance, similarity.
"""
from pathlib import Path

import harness  # first: what is not installed is then one line

import numpy as np
import torch

from harness import flags
from harness import jobs
from harness import plots
from harness import processes
from harness import records
from harness import report
from harness.plots import (by_layer, canvas, layer_ticks, legend, names_of, plot,
                           spread, style_of)
from harness import verdicts
from harness.records import (BASELINE, CHANNELS, WEIGHTS, Unfit, all_runs, analysis_of,
                             compared, layers_of, read, runs_of)
from metrics import inverted, spearman

DEMO = Path("runs", "demo")


# ---- the paper's figures ------------------------------------------------------------
# Each takes runs and returns (figure, rows of its CSV, runs that it used, what its
# numbers say), or None where the runs do not suffice.


def accuracy_over(axis, runs, name, x_of, label):
    """Draw the final accuracy over x_of(run), for each method; return rows of the CSV,
    in which x has this name."""
    by_method = {}
    for run in runs:
        values = by_method.setdefault(run.method, {})
        values.setdefault(x_of(run), []).append(100 * run.summary["test_accuracy"])
    rows = []
    for method, values in by_method.items():
        mine = []
        for x in sorted(values):
            mean, std = map(float, spread(values[x]))
            mine.append({"method": method, name: x, "accuracy": mean, "std": std,
                         "seeds": len(values[x])})
        columns = ([row[key] for row in mine] for key in (name, "accuracy", "std"))
        plot(axis, *columns, method)
        rows += mine
    axis.set(xlabel=label, ylabel="Test accuracy (%)")
    return rows


def fit_accuracy(axis, rows, name):
    """Set the limits of an axis by the rows in which no seed failed, and write what
    lies below as a number. name: of x in the rows."""
    axis.set_ylim(plots.limits_of([row["accuracy"] for row in rows],
                                  [row["std"] for row in rows]))
    for row in rows:
        plots.mark_below(axis, row[name], row["accuracy"], row["method"])


def ratio(runs):
    """Fig. 1(a): accuracy over the regeneration rate."""
    for group in records.comparable_groups(runs, WEIGHTS):
        rates = {run.regen for run in group if run.method == "criticality"}
        if len(rates) >= 2:
            break
    else:
        return None
    # Each metric of Algorithm 1, and GraNet, whose rate is the death rate
    used = [run for run in group if run.regen]
    used.sort(key=lambda run: run.method not in records.METHODS)
    figure, ((axis,),) = canvas(1)
    rows = accuracy_over(axis, used, "regen", lambda run: run.regen,
                         "Regeneration rate r")
    for method, line in (("gmp", "--"), ("dense", ":")):
        others = runs_of(group, method)
        if others:
            mean, std = spread([100 * run.summary["test_accuracy"] for run in others])
            axis.axhline(mean, color=style_of(method)[0], linestyle=line, linewidth=1,
                         label=method)
            rows.append(dict(method=method, regen=0.0, accuracy=mean, std=std,
                             seeds=len(others)))
            used += others
    fit_accuracy(axis, rows, "regen")
    legend(axis, 3)
    says = {}
    for row in rows:
        says.setdefault(row["method"], []).append(
            f"{row['accuracy']:.1f} % at r = {row['regen']:g}")
    return figure, rows, used, "; ".join(
        f"{method} {', '.join(texts)}" for method, texts in says.items())


def epochs(runs):
    """Fig. 1(b): accuracy over the number of pruning epochs."""
    for group in records.comparable_groups(runs, WEIGHTS, ["epochs_prune"]):
        gmp, ours = runs_of(group, "gmp"), runs_of(group, "criticality")
        shared = ({run.config["epochs_prune"] for run in gmp}
                  & {run.config["epochs_prune"] for run in ours})
        if len(shared) >= 2:
            break
    else:
        return None
    used = gmp + ours
    figure, ((axis,),) = canvas(1)
    rows = accuracy_over(axis, used, "epochs_prune",
                         lambda run: run.config["epochs_prune"], "Epochs of pruning")
    axis.xaxis.get_major_locator().set_params(integer=True)
    fit_accuracy(axis, rows, "epochs_prune")
    legend(axis)
    return figure, rows, used, "; ".join(
        f"{row['method']} {row['accuracy']:.1f} % with {row['epochs_prune']}"
        for row in rows)


PAPER_SURVIVAL = {WEIGHTS: 48.03,   # %, VGG-16 at 90 %
                  CHANNELS: 42.60}  # ResNet-19 at 49.46 % of the MACs


def survival(runs):
    """Fig. 2(a): what an update prunes and brings back; what is alive in the end and
    had come back.

    In the paper the first is above 50 %, the second is in PAPER_SURVIVAL. The second is
    no measurement of a method: what the last update brought back equals r by
    construction (Eq. 7), and the rest came back in earlier ones.
    """
    panels = compared(runs, "criticality")
    if not panels:
        return None
    figure, (axes,) = canvas(1 + (WEIGHTS in panels))
    rows, says = [], []
    if WEIGHTS in panels:
        rows, says = survival_of_updates(axes[0], panels[WEIGHTS]["criticality"])
    right, labels = axes[-1], dict(paper="paper", bar="criticality",
                                   rate="r by construction")
    for x, (pruned, paper) in enumerate(PAPER_SURVIVAL.items()):
        across = [x - 0.3, x + 0.3]
        right.plot(across, [paper, paper], "k--", linewidth=1,
                   label=labels.pop("paper", None))  # one entry of the legend does
        if pruned not in panels:
            continue
        mine = panels[pruned]["criticality"]
        mean, std = spread([100 * run.summary["survived_by_regeneration"]
                            for run in mine])
        right.bar(x, mean, 0.4, yerr=std or None, capsize=2,
                  label=labels.pop("bar", None), color=style_of("criticality")[0])
        rows.append(dict(what=f"alive {pruned}", x=None, share=mean, std=std))
        text = (f"{mean:.1f} % of the {pruned} that are alive in the end had come back "
                f"(paper: {paper} %)")
        if mine[0].config.get("regen_base") != "pruned":
            fixed, std = spread([100 * fixed_share(run) for run in mine])
            right.plot(across, [fixed, fixed], ":", color=plots.ORANGE, linewidth=2,
                       label=labels.pop("rate", None))
            rows.append(dict(what=f"r of {pruned}", x=None, share=fixed, std=std))
            text += (f"; what the last update brought back, {fixed:.3g} %, equals r by "
                     f"construction{but_classifier(mine[0])}")
        else:
            text += "; it follows from r and the share that is cut, by construction"
        says.append(text)
    right.set_xticks([0, 1], list(PAPER_SURVIVAL))
    right.set(ylabel="Alive by regeneration (%)", xlim=(-0.5, 1.5), ylim=(0, 100))
    legend(right, 1)
    return figure, rows, all_runs(panels), "; ".join(says)


def but_classifier(run):
    """Return what r is no share of, in words. published code: it neither prunes the
    classifier further nor regenerates it."""
    fixed = "classifier" in run.config["as_published"]
    return " (but the classifier)" if fixed else ""


def fixed_share(run):
    """Return which share of what is alive in the end the last update brought back, by
    Eq. 7 alone: r of all that it regenerates in."""
    alive = [layer["alive"] for layer in run.summary["layers"]]
    rest = alive[:-1] if but_classifier(run) else alive
    return run.regen * sum(rest) / sum(alive)


# The shares of an update: {name in the CSV: (label, look)}
SHARES = {
    "pruned in update": (
        "of what the update cuts (to s'): back in it", {}),
    "plain cut": (  # published code: its survival
        "of what a plain cut to s would take: alive after it",
        dict(color=plots.ORANGE, marker="s")),
    "alive after update": (
        "of those alive after it: back in it, r by construction",
        dict(color=plots.GREY, marker="None", linestyle="-.")),
}


def shares_of(run):
    """Return {name of SHARES: list of shares, %, one an update}, of updates.jsonl.

    A share of nothing is NaN. Logs of before there was survived_plain lack "plain cut".
    Raises Unfit.
    """
    updates = read(run, "updates.jsonl")
    last = -1 if but_classifier(run) else None
    try:
        alive = [sum(layer["alive"] for layer in row["layers"][:last])
                 for row in updates]
        found = {
            "pruned in update": [row["survived"] for row in updates],
            "plain cut": [row.get("survived_plain", "absent") for row in updates],
            "alive after update": [row["regenerated"] / count
                                   for row, count in zip(updates, alive)]}
    except KeyError as error:
        raise Unfit(run, f"a row of updates.jsonl has no {error.args[0]}") from None
    return {name: [np.nan if share is None else 100 * share for share in shares]
            for name, shares in found.items() if "absent" not in shares}


def survival_of_updates(axis, runs):
    """Draw over the updates which shares come back, by the definitions of the text and
    of the published code; return rows of the CSV and what they say, a list."""
    found = [shares_of(run) for run in runs]
    counts = [len(shares["pruned in update"]) for shares in found]
    for run, count in zip(runs, counts):
        if count < max(counts):
            raise Unfit(run, f"updates.jsonl has {count} updates, another run's "
                             f"{max(counts)}")
    rows, says = [], []
    for name, (label, look) in SHARES.items():
        if not all(name in shares for shares in found):
            says.append("what a plain cut would take is not in these logs")
            continue
        if name == "alive after update":
            label += but_classifier(runs[0])
        mean, std = spread([shares[name] for shares in found])
        updates = range(1, len(mean) + 1)
        plot(axis, updates, mean, std, "criticality", label=label, **look)
        rows += [dict(what=name, x=update, share=m, std=s)
                 for update, m, s in zip(updates, mean, std)]
        if np.isfinite(mean).any():
            ends = f"{np.nanmin(mean):.0f}", f"{np.nanmax(mean):.0f}"
            says.append(f"{label}, {' to '.join(dict.fromkeys(ends))} %")
    axis.axhline(50, color="black", linestyle="--", linewidth=1,
                 label="paper: above this")
    axis.set(xlabel="Mask update", ylabel="Share (%)", ylim=(0, 103))
    legend(axis, 1)
    return rows, says


INVERTED_GAMMA = (
    "Published code: its script computes (max - |gamma|) / (max - min) over the "
    "channels that a network kept. That is inverted: its channel with the smallest "
    "|gamma| scores 1, and a higher value means a smaller |gamma| in that network.")
# {name in the CSV: (label of the axis, function of |gamma| [E + 1, M])}
IMPORTANCES = {
    "share of the mean": (r"$|\gamma|$ / mean of the network",
                          lambda gamma: gamma / gamma.mean(1, keepdims=True)),
    "published code": ("Inverted $|\\gamma|$\n(published code)",
                       lambda gamma: inverted(torch.from_numpy(gamma)).numpy()),
}


def importance(runs):
    """Fig. 2(b): |gamma|, over fine-tuning with L1, of the channels that only one
    method kept.

    INTERPRETATION of "normalised": |gamma| / the mean over the channels of that network
    at that epoch, so that 1 is a channel like any other. Beside it: the published code.
    """
    with_l1 = [run for run in runs if run.config.get("finetune_l1")]
    panels = compared(with_l1, "criticality", "baseline")
    if not panels:
        return None
    figure, (axes,) = canvas(len(IMPORTANCES))
    rows, says = [], []
    for axis, (kind, (label, scale)) in zip(axes, IMPORTANCES.items()):
        traces = {method: [] for method in panels[CHANNELS]}
        for couple in zip(*panels[CHANNELS].values()):
            for run, trace in zip(couple, importance_of(couple, scale)):
                traces[run.method].append(trace)
        for method, values in traces.items():
            mean, std = spread(values)
            plot(axis, range(len(mean)), mean, std, method, label=f"{method} alone")
            rows += [dict(normalisation=kind, method=method, epoch=epoch, importance=m,
                          std=s) for epoch, (m, s) in enumerate(zip(mean, std))]
            says.append(f"{kind}: channels that only {method} kept go from "
                        f"{mean[0]:.2f} to {mean[-1]:.2f}")
        axis.set(xlabel="Epoch of fine-tuning", ylabel=label)
        legend(axis)
    plots.note(figure, INVERTED_GAMMA)
    return figure, rows, all_runs(panels), "; ".join(says)


def importance_of(couple, scale):
    """Return for each of two runs the mean importance [E + 1], before fine-tuning and
    after each of E epochs, of the channels that the other one did not keep.

    scale: takes |gamma| [E + 1, M] of a network and returns the importance of each.
    """
    tables = [read(run, "channels.json")["layers"] for run in couple]
    for layer, other in zip(*tables):
        if layer["gamma"] != other["gamma"]:
            raise Unfit(couple[0], f"{couple[1].folder.name} was pruned from another "
                                   f"network")
    found = []
    for run, table, rival in zip(couple, tables, tables[::-1]):
        gammas, alone = [], []
        for layer, other in zip(table, rival):
            before = np.array(layer["gamma"])[layer["kept"]]
            after = np.abs(read(run, "gamma.npz")[layer["name"]])
            gammas.append(np.vstack([before, after]))
            alone.append(~np.isin(layer["kept"], other["kept"]))
        gamma, only = np.concatenate(gammas, 1), np.concatenate(alone)  # [E+1, M], [M]
        if not only.any():
            raise Unfit(run, "it kept no channel that the other of its pair did not "
                             "keep")
        found.append(scale(gamma)[:, only].mean(1))
    return found


INVERTED_FEATURES = (
    "Published code: its script turns the spike counts x of a sample into (max - x) / "
    "(max - min). That is inverted: silent channels are 1. Most features of a sparse "
    "code are then near 1, so that the cosine is near 1 for any network.")


def per_class(runs, key, label, better):
    """Draw a number of each class, in the order of the baseline's: above with features
    of unit length, below with those of the published code.

    better: "lower" or "higher". Runs that regenerated by another metric, at the same
    rate and seeds, stand by as controls.
    """
    panels = compared(runs, "criticality", "baseline")
    if not panels:
        return None
    panels = records.with_controls(runs, panels)
    used = all_runs(panels)
    kinds = {"unit length": (key, label)}
    older = [run for run in used if f"{key}_published" not in analysis_of(run)]
    if not older:
        kinds["published code"] = f"{key}_published", f"{label}\n(published code)"
    figure, axes = canvas(len(panels), len(kinds))
    rows, says = [], []
    for line, (kind, (key, label)) in zip(axes, kinds.items()):
        for axis, (pruned, methods) in zip(line, panels.items()):
            found, texts = draw_classes(axis, methods, pruned, key, better)
            rows += [dict(normalisation=kind, pruned=pruned) | row for row in found]
            says += [f"{kind}, {pruned}: {text}" for text in texts]
            axis.set(xlabel=f"Class ({pruned} pruned)", ylabel=label)
            legend(axis)
    if older:
        says.append(f"not drawn as the published code: analysis.npz of {len(older)} "
                    f"runs is older, and model.pt or the images are missing")
    else:
        plots.note(figure, INVERTED_FEATURES)
    return figure, rows, used, "; ".join(says)


def draw_classes(axis, methods, pruned, key, better):
    """Draw a number of each class, for each method; return rows of the CSV and how the
    methods compare with the baseline, a list of texts."""
    values = records.values_of_classes(methods, key)
    base = values[BASELINE[pruned]]
    order = base.mean(0).argsort()
    first = next(iter(methods.values()))[0]
    names = records.class_names_of(first) or [str(k) for k in range(len(order))]
    rows, texts = [], []
    for method, found in values.items():
        mean, std = spread(found[:, order])
        plot(axis, range(len(order)), mean, std, method, linestyle="none")
        rows += [{"method": method, "label": k, "class": names[k], "mean": m, "std": s}
                 for k, m, s in zip(order, mean, std)]
        if found is not base:
            won = records.share_won(found, base, better)
            texts.append(f"{method} is {better} in {100 * won:.0f} % of the "
                         f"classes (each seed counted), {found.mean():.4f} against "
                         f"{base.mean():.4f} of {BASELINE[pruned]}")
    if len(order) <= 20:
        layer_ticks(axis, [names[k] for k in order])
    return rows, texts


def variance(runs):
    """Fig. 3(a, b): intra-cluster variance of the features of each class, test set."""
    return per_class(runs, "variance", "Intra-cluster variance", "lower")


def similarity(runs):
    """Fig. 3(c, d): cosine similarity of each class's mean features in training and
    test set."""
    return per_class(runs, "similarity", "Cosine similarity", "higher")


def curves(runs):
    """Figs. 4-7: accuracy and loss over the fine-tuning."""
    panels = compared(runs, "criticality", "baseline")
    if not panels:
        return None
    figure, axes = canvas(len(panels), 2)
    rows, says = [], []
    for column, (pruned, methods) in zip(axes.T, panels.items()):
        for method, mine in methods.items():
            found = curves_of(column, mine, method)
            rows += [dict(pruned=pruned) | row for row in found]
            accuracy = np.mean([run.summary["test_accuracy"] for run in mine])
            says.append(f"{pruned}, {method}: {100 * accuracy:.1f} % in the end")
        for axis, label in zip(column, ("Accuracy (%)", "Loss (nats)")):
            axis.set(xlabel=f"Epoch of fine-tuning ({pruned} pruned)", ylabel=label)
            axis.xaxis.get_major_locator().set_params(integer=True)
        legend(column[0])
    return figure, rows, all_runs(panels), "; ".join(says)


def curves_of(axes, runs, method):
    """Draw accuracy and loss of a method over the fine-tuning into two axes, one below
    the other; return rows of the CSV."""
    logs = []
    for run in runs:
        log = [row for row in read(run, "metrics.jsonl") if row["stage"] == "finetune"]
        if not log:
            raise Unfit(run, "it has no epoch of fine-tuning")
        logs.append(log)
    for run, log in zip(runs, logs):
        if len(log) < max(map(len, logs)):
            raise Unfit(run, f"its log has {len(log)} epochs of fine-tuning, another "
                             f"one {max(map(len, logs))}")
    rows = []
    for part, line in (("train", "--"), ("test", "-")):
        # of the epochs that all runs were evaluated in
        epochs = [i for i, of_epoch in enumerate(zip(*logs))
                  if all(row[f"{part}_accuracy"] is not None for row in of_epoch)]
        for axis, quantity, factor in zip(axes, ("accuracy", "loss"), (100, 1)):
            mean, std = spread([[factor * log[i][f"{part}_{quantity}"] for i in epochs]
                                for log in logs])
            shown = [i + 1 for i in epochs]
            plot(axis, shown, mean, std, method, linestyle=line,
                 label=f"{method}, {part}")
            rows += [dict(method=method, set=part, quantity=quantity, epoch=epoch,
                          mean=m, std=s) for epoch, m, s in zip(shown, mean, std)]
    return rows


# ---- beyond the paper ---------------------------------------------------------------


def interval(runs):
    """Accuracy over the number of steps between two updates: does what comes back need
    time to grow?

    The pruning stage has the same length throughout: longer intervals mean fewer
    updates, and larger cuts.
    """
    for group in records.comparable_groups(runs, WEIGHTS, ["interval"]):
        gmp, ours = runs_of(group, "gmp"), runs_of(group, "criticality")
        shared = ({run.config["interval"] for run in gmp}
                  & {run.config["interval"] for run in ours})
        if len(shared) >= 2:
            break
    else:
        return None
    used = gmp + ours
    for method in records.rankings(group):
        theirs = [run for run in group
                  if run.method == method and run.regen == ours[0].regen]
        if method != "criticality" and len({run.config["interval"]
                                            for run in theirs}) >= 2:
            used += theirs
    figure, ((axis,),) = canvas(1)
    rows = accuracy_over(axis, used, "interval", lambda run: run.config["interval"],
                         "Steps between two updates")
    axis.set_xticks(sorted({row["interval"] for row in rows}))
    fit_accuracy(axis, rows, "interval")
    legend(axis)
    return figure, rows, used, "; ".join(
        f"{row['method']} {row['accuracy']:.1f} % with {row['interval']} steps"
        for row in rows)


def in_two_rows(runs, values):
    """Draw two numbers of each layer, one above the other.

    values: {label: function of a run that returns {layer: number}}.
    """
    panels = compared(runs, "dense", "baseline", "criticality")
    if not panels:
        return None
    figure, axes = canvas(len(panels), 2)
    rows, says = [], []
    for column, (pruned, methods) in zip(axes.T, panels.items()):
        for axis, (label, value) in zip(column, values.items()):
            found = by_layer(axis, methods, value, label)
            axis.set_xlabel(f"Layer ({pruned} pruned)")
            rows += [dict(pruned=pruned) | row for row in found]
            means = []
            for method in methods:
                mine = [row["mean"] for row in found if row["method"] == method]
                means.append(f"{method} {np.nanmean(mine):.3g}")
            says.append(f"{pruned}, {label}, mean of the layers: {', '.join(means)}")
        legend(column[0], 3)
    return figure, rows, all_runs(panels), "; ".join(says)


def entropy(runs):
    """Entropy of the spike counts of each layer, and its rank correlation with
    criticality."""
    def bits(run):
        return {name: row.mean() for name, row in layers_of(run, "entropy").items()}

    def correlation(run):
        scores = layers_of(run, "criticality")
        return {name: spearman(row, scores[name])
                for name, row in layers_of(run, "entropy").items()}

    return in_two_rows(runs, {"Entropy of counts (bits)": bits,
                              "Spearman's rho": correlation})


def activity(runs):
    """Firing rate and synaptic operations of each layer."""
    def rate(run):
        return layers_of(run, "rate")

    def kilo_sops(run):
        return {name: 1e-3 * sops for name, sops in layers_of(run, "sops").items()}

    return in_two_rows(runs, {"Firing rate": rate,
                              "Synaptic operations (k)": kilo_sops})


def criticality(runs):
    """Distribution of the channels' scores in each layer, before pruning and after."""
    panels = compared(runs, "dense", "criticality")
    if not panels:
        return None
    figure, axes = canvas(len(panels))
    rows, says = [], []
    for axis, (pruned, methods) in zip(axes[0], panels.items()):
        scores = {method: [layers_of(run, "criticality") for run in methods[method]]
                  for method in ("dense", "criticality")}
        names = names_of(layers for seeds in scores.values() for layers in seeds)
        for shift, (method, seeds) in zip((-0.2, 0.2), scores.items()):
            pooled = {name: np.concatenate([layers[name] for layers in seeds
                                            if name in layers])
                      for name in names if name in names_of(seeds)}
            places = [names.index(name) + shift for name in pooled]
            boxes(axis, places, list(pooled.values()), method)
            rows += [dict(pruned=pruned, method=method, layer=name, criticality=score)
                     for name, values in pooled.items() for score in values]
            says.append(f"{pruned}, {method}: median of all channels "
                        f"{np.median(np.concatenate([*pooled.values()])):.3f}")
        layer_ticks(axis, names)
        axis.set(xlabel=f"Layer ({pruned} pruned)", ylabel="Criticality")
        legend(axis)
    return figure, rows, all_runs(panels), "; ".join(says)


def boxes(axis, positions, values, method):
    """Draw a box for each array of values, in the method's colour."""
    colour = style_of(method)[0]
    line = dict(color=colour)
    drawn = axis.boxplot(
        values, positions=positions, widths=0.3, manage_ticks=False,
        boxprops=line, whiskerprops=line, capprops=line, medianprops=line,
        flierprops=dict(marker=".", markersize=2, markeredgecolor=colour))
    drawn["boxes"][0].set_label(method)


def layers(runs):
    """Density of each layer, for each method."""
    panels = compared([run for run in runs if run.method != "dense"])
    if not panels:
        return None

    def density(run):
        found = {}
        for layer in run.summary["layers"]:
            name = layer["name"].removesuffix(".weight").removesuffix(".conv")
            found[name] = 100 * layer["alive"] / layer["weights"]
        return found

    figure, axes = canvas(len(panels))
    rows = []
    for axis, (pruned, methods) in zip(axes[0], panels.items()):
        found = by_layer(axis, methods, density, "Weights alive (%)")
        rows += [dict(pruned=pruned) | row for row in found]
        axis.set(xlabel=f"Layer ({pruned} pruned)", ylim=(0, None))
        legend(axis, 3)
    densest = {}
    known = [row for row in rows if not np.isnan(row["mean"])]
    for row in sorted(known, key=lambda row: row["mean"]):
        densest[row["pruned"], row["method"]] = row  # the last one has the most
    return figure, rows, all_runs(panels), "; ".join(
        f"{pruned}, {method}: densest is {row['layer']} with {row['mean']:.1f} %"
        for (pruned, method), row in densest.items())


# ---- the script ---------------------------------------------------------------------

# The commands that make the runs of a figure; {c}: the flags that they share
UNSTRUCTURED = "python prune_unstructured.py{c}"
STRUCTURED = "python prune_structured.py{c}"
PAIRS = (f"{UNSTRUCTURED}; {UNSTRUCTURED} --regen 0; {STRUCTURED}; "
         f"{STRUCTURED} --method slimming")
WITH_DENSE = f"{PAIRS}; {UNSTRUCTURED} --sparsity 0; {STRUCTURED} --prune-ratio 0"
FIGURES = {  # name: (function, what to look for, commands of the runs that it needs)
    "ratio": (
        ratio, "In the paper accuracy is stable from r = 0.1 to 0.6; criticality, "
        "gradient and random are above GMP, and criticality is above the other two.",
        f"for r in 0 0.1 0.3 0.5 0.7; do {UNSTRUCTURED} --regen $r; done"),
    "epochs": (
        epochs, "In the paper criticality is above GMP at each length, and most where "
        "there are few epochs.",
        f"for n in 4 8 16; do for r in 0 0.5; do {UNSTRUCTURED} --epochs-prune $n "
        f"--regen $r; done; done"),
    "survival": (
        survival, "In the paper more than half of what an update prunes comes back in "
        "it; 48.03 % of the final weights and 42.60 % of the final channels had come "
        "back. What the last update brought back equals r by construction, so that "
        "this share says nothing for or against the method.",
        f"{UNSTRUCTURED}; {STRUCTURED}"),
    "importance": (
        importance, "In the paper the channels that criticality brought back gain in "
        "importance while fine-tuning, and pass those that slimming had kept.",
        f"{STRUCTURED} --finetune-l1; {STRUCTURED} --finetune-l1 --method slimming"),
    "variance": (
        variance, "In the paper criticality has the lower variance in almost all "
        "classes: its features are more uniform within a class.", PAIRS),
    "similarity": (
        similarity, "In the paper criticality has the higher similarity: what was "
        "learnt holds for the test set.", PAIRS),
    "curves": (
        curves, "In the paper criticality ends higher on the test set, with less "
        "distance between training and test.", PAIRS),
    "interval": (
        interval, "If what comes back needs time to grow, criticality gains on GMP as "
        "the interval grows.",
        f"for n in 25 94 235; do for r in 0 0.5; do {UNSTRUCTURED} --interval $n "
        f"--regen $r; done; done"),
    "entropy": (
        entropy, "A positive correlation says that the score picks the channels whose "
        "spike counts carry information.", WITH_DENSE),
    "criticality": (
        criticality, "Scores near alpha / 2 belong to channels that are kept at their "
        "threshold.", WITH_DENSE),
    "layers": (
        layers, "Where a method takes its weights from: what regeneration gives to one "
        "layer is missing in another.", PAIRS),
    "activity": (activity, "Where the spikes are, and what they cost.", WITH_DENSE),
}


def draw_figure(name, runs, out):
    """Draw one figure into a folder and print what it says. A run that it cannot use is
    named and left out. Returns what the figure's function returned."""
    make, _, commands = FIGURES[name]
    try:
        drawn = make(runs)
    except Unfit as error:
        unfit, why = error.args
        print(f"{name:<12}without {unfit.folder}: {why}")
        return draw_figure(name, [run for run in runs if run is not unfit], out)
    if drawn is None:
        needed = commands.format(c=jobs.flags_of(runs[0]) if runs else "")
        print(f"{name:<12}not drawn; the runs that it needs: {needed}")
        return None
    figure, rows, used, says = drawn
    plots.note(figure, marks_of(name, figure, rows))
    # what a picture says of regeneration holds at these settings alone
    settings = [text for text in (records.rates_of(used), records.updates_of(used),
                                  records.readings_of(used)) if text]
    if settings:
        plots.note(figure, f"{', '.join(settings)}.")
    folders = ", ".join(str(run.folder) for run in used)
    plots.save(out / name, figure, rows,
               f"{name}: {records.describe(used)}\nruns: {folders}")
    of = ", ".join([f"of {len(used)} runs", *settings])
    print(f"{name:<12}{out / name}.png  {of}: {says}")
    return drawn


def marks_of(name, figure, rows):
    """Return what the bars and numbers in a picture are, in words."""
    if name == "criticality":
        return ("Boxes: quartiles and median of the channels; whiskers: to the last "
                "one within 1.5 times the height of the box; dots: beyond.")
    text = plots.BARS if plots.has_bars(figure) else "One seed: no error bars."
    if "accuracy" in rows[0] and any(axis.texts for axis in figure.axes):
        text += " A number at the lower edge: a mean below the panel."
    return text


def demo_commands():
    """Return {name of the run: script and flags} of the short runs for all figures."""
    short = "--train-limit 3000 --epochs-finetune 2"
    weights = f"prune_unstructured {short} --interval 10"
    wanted = {"dense": f"{weights} --epochs-prune 4 --sparsity 0"}
    for length in (4, 2, 8):
        for rate in (0, 0.5):
            wanted[f"epochs{length}-r{rate}"] = (
                f"{weights} --epochs-prune {length} --regen {rate}")
    for steps in (5, 20):  # 10 is epochs4
        for rate in (0, 0.5):
            wanted[f"interval{steps}-r{rate}"] = (
                f"prune_unstructured {short} --interval {steps} --epochs-prune 4 "
                f"--regen {rate}")
    for rate in (0.1, 0.3, 0.7):  # 0.5 is epochs4-r0.5
        wanted[f"criticality-r{rate}"] = (
            f"{weights} --epochs-prune 4 --metric criticality --regen {rate}")
    for metric in ("gradient", "random"):
        for rate in (0.1, 0.3, 0.5, 0.7):
            wanted[f"{metric}-r{rate}"] = (
                f"{weights} --epochs-prune 4 --metric {metric} --regen {rate}")
    for rate in (0.1, 0.3, 0.5, 0.7):
        wanted[f"granet-r{rate}"] = (
            f"prune_granet {short} --interval 10 --epochs-prune 4 --death-rate {rate}")

    channels = ("prune_structured --train-limit 3000 --epochs-pretrain 4 "
                "--epochs-finetune 4 --l1 0.01")
    wanted |= {"channels-dense": f"{channels} --prune-ratio 0",
               "channels-slimming": f"{channels} --method slimming",
               "channels-criticality": channels,
               "channels-slimming-l1": f"{channels} --method slimming --finetune-l1",
               "channels-criticality-l1": f"{channels} --finetune-l1"}
    return wanted


# ---- the report ---------------------------------------------------------------------

INTRO = (
    "Figures of runs by the scripts of this project, and what they say of the claims "
    "of the paper (arXiv 2311.16141).",
    "The verdicts hold for these runs alone. A difference in accuracy at the same "
    "seeds, in points with its 95 % interval (Student's t), is above or below only "
    "where p < 0.05 after Holm's correction for all differences of the table. One "
    "place below is enough for \"does not hold\". Of updates \"holds\" is all that "
    "have room for more than half, by the mean of the seeds; of classes three of four "
    "in each setting.",
    "README.md weighs the runs that come with this project, none of them at the "
    "paper's own scale (200 + 300 epochs of VGG-16 and ResNet-19 on CIFAR): there "
    "no gain over GMP is shown.")

# {figure: (what names a row of its table, a column, and the number; digits; caption)}
TABLES = {
    "ratio": (["method"], "regen", "accuracy", 1, "Test accuracy, %, over r"),
    "epochs": (["method"], "epochs_prune", "accuracy", 1,
               "Test accuracy, %, over the epochs of pruning"),
    "survival": (["what"], "x", "share", 0,
                 "Shares, %, over the updates; \"end\": of what is alive in the end"),
    "importance": (["normalisation", "method"], "epoch", "importance", 2,
                   "Importance over the epochs of fine-tuning"),
    "variance": (["normalisation", "pruned", "method"], "class", "mean", 4,
                 "Variance of each class"),
    "similarity": (["normalisation", "pruned", "method"], "class", "mean", 4,
                   "Similarity of each class"),
    "curves": (["pruned", "method", "set", "quantity"], "epoch", "mean", 2,
               "Accuracy, %, and loss, nats, over the epochs of fine-tuning"),
    "interval": (["method"], "interval", "accuracy", 1,
                 "Test accuracy, %, over the steps between two updates"),
    "entropy": (["pruned", "quantity", "method"], "layer", "mean", 2, "By layer"),
    "criticality": (["pruned", "method"], "layer", "criticality", 3,
                    "Median of the channels of a layer"),
    "layers": (["pruned", "method"], "layer", "mean", 1, "Weights alive, %"),
    "activity": (["pruned", "quantity", "method"], "layer", "mean", 3, "By layer"),
}


def write_report(path, runs, drawn):
    """Write figures, {name: what draw_figure returned}, into one HTML page."""
    sections = []
    for name, (figure, rows, used, says) in drawn.items():
        make, look_for, _ = FIGURES[name]
        heading = " ".join(make.__doc__.split("\n\n")[0].split())  # first sentence
        sections.append(report.section_of(
            path.with_name(f"{name}.png"), heading.rstrip("."), look_for,
            report.table_of(name, TABLES[name], rows), figure, used,
            says.split("; ") if name in IN_WORDS else ()))
    report.page(path, "Pruning spiking neural networks", INTRO,
                verdicts.table(runs, drawn), sections)
    print(f"report      {path}")


def write_verdicts(path, runs, drawn):
    """Write and print what runs say of the paper's claims."""
    table = verdicts.table(runs, drawn)
    if table is None:
        raise ValueError("these runs say nothing of a claim of the paper. Make runs of "
                         "criticality and of GMP: python compare.py")
    verdicts.write(path, table, runs)
    for claim, verdict, here, _ in table.rows:
        print(f"{claim}: {verdict}. {here}")
    print(f"verdicts    {path}")


# Figures whose numbers, in words, are more than their table
IN_WORDS = {"survival", "variance", "similarity", "entropy", "activity"}


def parse_args(argv):
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("figure", nargs="?", default="all",
        choices=("all", "report", "verdicts", *FIGURES), metavar="FIGURE",
        help=f"one of {', '.join(FIGURES)}; all of them (default); report: all of "
        "them, in one page; verdicts: all of them, and verdicts.md, what they say of "
        "the paper's claims")
    add("--runs", type=flags.path, nargs="+", metavar="FOLDER", default=None,
        help="finished runs, or folders with runs at any depth (default: runs, without "
        "runs/demo)")
    add("--out", type=flags.folder, metavar="DIR", default=None,
        help="where the figures go (default: figures)")
    add("--demo", action="store_true", default=False, help="first make short runs for "
        "all figures in runs/demo, about 20 minutes on two cores, and draw those in "
        "figures/demo")
    args = parser.parse_args(argv)
    if args.demo and args.runs:
        parser.error("--demo and --runs exclude each other, expected one of them. "
                     "Leave one out")
    args.out = Path(args.out or ("figures/demo" if args.demo else "figures"))
    return args


def main(argv=None):
    args = parse_args(argv)
    no_memory = "Free some memory, or hide the GPU: CUDA_VISIBLE_DEVICES="
    with (flags.exits(1, RuntimeError),
          flags.exits(2, ValueError, OSError, no_memory=no_memory)):
        processes.require_one()
        runs = records.read_runs(
            jobs.make(demo_commands(), DEMO, "python analyze.py --demo") if args.demo
            else records.folders_of(args.runs, without=DEMO))
        plots.give_styles(run.method for run in runs)
        names = [args.figure] if args.figure in FIGURES else list(FIGURES)
        drawn = {}
        for name in names:
            found = draw_figure(name, runs, args.out)
            if found is not None:
                drawn[name] = found
        if not drawn:
            raise ValueError("no figure can be drawn of these runs. Make some first: "
                             "python analyze.py --demo, or: python "
                             "prune_unstructured.py")
        if args.figure == "report":
            write_report(args.out / "report.html", runs, drawn)
        if args.figure == "verdicts":
            write_verdicts(args.out / "verdicts.md", runs, drawn)
    return drawn


if __name__ == "__main__":
    main()
