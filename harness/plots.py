"""One look for all figures: colours and markers of the methods, panels as wide as a
column of a paper.

    figure, ((axis,),) = plots.canvas(1)
    mean, std = plots.spread(values)                 # over the seeds
    plots.plot(axis, x, mean, std, "criticality")
    plots.note(figure, "what a reader must know")    # under the panels
    plots.save(Path("figures/name"), figure, rows, "what it is of")
    plots.draw_curves(rows, path)                    # of metrics.jsonl, after each run
"""
import csv
import io
import os
import sys
import textwrap
from contextlib import suppress

import numpy as np

from harness.files import why_not_drawn, write_whole

# Pictures go to files alone, drawn without pyplot: so the backend and the windows of
# somebody's program stay as they are. A notebook leaves MPLBACKEND to what it starts,
# with a name that matplotlib may not know, and then it cannot be imported
is_first = "matplotlib" not in sys.modules
backend = os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402

if backend is not None:
    os.environ["MPLBACKEND"] = backend
    if is_first:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402

# Okabe-Ito colours, told apart by all eyes
BLACK, GREY, ORANGE = "#000000", "#999999", "#E69F00"
BLUE, GREEN = "#0072B2", "#009E73"
RED, PINK = "#D55E00", "#CC79A7"

# {method: its colour, and a marker, told apart without colour}. A family has one hue,
# in dark and light; no two of a family have the same marker
STYLE = {
    "dense": (BLACK, "s"),
    # the smallest go: the baselines
    "gmp": (RED, "o"),
    "slimming": (RED, "o"),
    # blue: Algorithms 1 and 2, by what ranks those that come back
    "criticality": (BLUE, "^"),
    "gradient": ("#4BA3DB", "v"),
    "random": ("#8FC7EA", "D"),
    # green: some go and others grow, all along
    "granet": (GREEN, "P"),
    "pq": ("#5CC9A7", "p"),
    "ndsnn": ("#00604A", "X"),
    "set": ("#5CC9A7", "v"),
    "rigl": (GREEN, "^"),
    "sca": ("#00604A", "s"),
    # orange: lottery tickets
    "imp": (ORANGE, "o"),
    "eb": ("#A86F00", "s"),
    "et": ("#F3C85B", "D"),
    # pink: a strength behind each weight
    "gradr": (PINK, "P"),
    "deepr": ("#8A3A6B", "X"),
    "stds": ("#E5B0CE", "*"),
    # grey: synapses and neurons
    "sdsnn": ("#5F5F5F", "*"),
    "upr": ("#A0A0A0", "p"),
    "upr-neurons": ("#C4C4C4", "s"),
    # brown: a penalty that grows
    "greg1": ("#7A4A1E", "X"),
    "greg2": ("#C09A6B", "*"),
}
OTHERS = "<>hHd8"  # markers that no method of STYLE has
# What methods that STYLE does not name get, one after the other
SPARE = [(colour, marker) for marker in OTHERS
         for colour in ("#3B3FA8", "#7FB800", "#B2182B", "#00A6A6", "#B58900")]
given = {}  # {such a method: its pair of SPARE}
variants = {}  # {method: [its variants, "criticality, aggregate mean"]}

# The look of a marker by the target that it is of: the first, the second, ...
FILLS = [{}, dict(markerfacecolor="white")]
FILLS += [dict(fillstyle=part, markerfacecoloralt="white")
          for part in ("left", "bottom", "right", "top")]
BARS = "Points: means over the seeds; bars: their standard deviation."


def style_of(method):
    """Return (colour, marker) of a method: those of STYLE, else the next pair of SPARE,
    which the method keeps. After the last pair comes the first again.

    A variant, whose name goes on after a comma, has its method's colour and a marker of
    its own.
    """
    name, _, words = method.partition(",")
    if words:
        mine = variants.setdefault(name, [])
        if method not in mine:
            mine.append(method)
        return style_of(name)[0], OTHERS[mine.index(method) % len(OTHERS)]
    if method in STYLE:
        return STYLE[method]
    if method not in given:
        given[method] = SPARE[len(given) % len(SPARE)]
    return given[method]


def give_styles(methods):
    """Give the methods that STYLE does not name their pairs, in the order of their
    names. A script calls this once, so that a method looks the same in all figures."""
    for method in sorted(set(methods)):
        style_of(method)


def canvas(columns, rows=1, margin=0, heights=None):
    """Return a figure and its axes [rows, columns], each as wide as a column. margin:
    inches for what stands beside them. heights: of the rows, in inches."""
    heights = heights or [2.5] * rows
    size = 3.4 * columns + margin, sum(heights)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=heights)


def spread(values):
    """Return (mean, standard deviation) over the first dimension, the seeds.

    Of one seed the deviation is 0.
    """
    values = np.asarray(values, float)
    mean = values.mean(0)
    if len(values) == 1:
        return mean, 0 * mean
    return mean, values.std(0, ddof=1)


def plot(axis, x, mean, std, method, **style):
    """Draw a method's line with error bars. style: keywords of axis.errorbar."""
    colour, marker = style_of(method)
    usual = dict(color=colour, marker=marker, markersize=3.5, linewidth=1, label=method)
    bars = std if np.any(np.nan_to_num(std)) else None  # NaN: a layer that is gone
    axis.errorbar(x, mean, yerr=bars, capsize=2, **(usual | style))


def limits_of(means, stds):
    """Return (low, high) of an axis of accuracies, in per cent.

    A mean with a deviation of 10 points, where a seed failed, and one that is 20 points
    below the median do not set the lower one if there are others: they would flatten
    the rest. No mean lies above the upper one.
    """
    least = np.median(means) - 20
    pairs = [(mean, std) for mean, std in zip(means, stds) if std < 10 and mean > least]
    pairs = pairs or list(zip(means, stds))
    return (min(mean - std for mean, std in pairs) - 1,
            max(*means, *(mean + std for mean, std in pairs)) + 1)


def mark_below(axis, x, mean, method):
    """Write a mean that lies below the panel as a number at its lower edge. The limits
    of the panel are set before. Returns whether it did."""
    low, _ = axis.get_ylim()
    if mean >= low:
        return False
    axis.annotate(f"{mean:.0f}", (x, low), fontsize=6, ha="right", va="bottom",
                  color=style_of(method)[0])
    return True


def has_bars(figure):
    """Return whether a figure has error bars."""
    return any(getattr(container, bars, False) for bars in ("has_xerr", "has_yerr")
               for axis in figure.axes for container in axis.containers)


def by_layer(axis, methods, value, label):
    """Draw a number of each layer for each method, mean and deviation over the seeds.
    A layer that a run has lost has no mean, NaN.

    methods: {method: runs}; value(run) returns {layer: number}. Returns the CSV's rows.
    """
    rows = []
    found = {method: [value(run) for run in runs] for method, runs in methods.items()}
    names = names_of(layers for seeds in found.values() for layers in seeds)
    for method, seeds in found.items():
        mean, std = spread([[layers.get(name, np.nan) for name in names]
                            for layers in seeds])
        plot(axis, range(len(names)), mean, std, method)
        rows += [dict(quantity=label, method=method, layer=name, mean=m, std=s)
                 for name, m, s in zip(names, mean, std)]
    layer_ticks(axis, names)
    axis.set_ylabel(label)
    return rows


def names_of(found):
    """Return the names of the layers in dicts {layer: value}, each once, in the order
    of the network: a run may have lost some of them."""
    names = []
    for layers in sorted(found, key=len, reverse=True):
        place = 0  # behind the name before it
        for name in layers:
            if name not in names:
                names.insert(place, name)
            place = names.index(name) + 1
    return names


def layer_ticks(axis, names):
    """Name the ticks 0, 1, ... after the layers; many names are slanted and small."""
    slanted = {}
    if len(names) > 6:
        slanted = dict(rotation=60, ha="right", rotation_mode="anchor")
    size = 6 if len(names) > 12 else 7
    axis.set_xticks(range(len(names)), names, fontsize=size, **slanted)


def legend(axis, ncols=2):
    """Put the legend above the panel, where it covers nothing."""
    axis.legend(frameon=False, fontsize=7, ncols=ncols, loc="lower center",
                bbox_to_anchor=(0.5, 1), borderaxespad=0.1)


def note(figure, text):
    """Write a text in small letters under the panels of a figure, before the one that
    stands there already."""
    text = f"{text} {note_of(figure)}".strip()
    letters = int(22 * figure.get_figwidth())  # that fit in a line
    figure.supxlabel(textwrap.fill(text, letters), fontsize=6, x=0.01, ha="left")


def note_of(figure):
    """Return the text under the panels of a figure in a line, "" if there is none."""
    return " ".join(figure.get_supxlabel().split())


def save(path, figure, rows, header=""):
    """Write what a figure draws as path.csv, and the figure as path.png and path.pdf.

    rows: dicts with the same keys. header: its lines become comments above the CSV's
    own header; "" for none. What matplotlib cannot draw is a note, and an older picture
    of this name is removed. Raises OSError if a file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in header.splitlines())
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path.with_suffix(".csv"), lambda file: file.write(text.getvalue()))
    make_printable(figure)
    for kind in ("png", "pdf"):
        target = path.with_suffix(f".{kind}")
        if reason := why_not_drawn(target, lambda: save_picture(figure, target)):
            print(f"note: {target} could not be drawn ({reason}). Its numbers are in "
                  f"{path.with_suffix('.csv')}")


def save_picture(figure, path):
    """Write a figure in the format that its path names."""
    write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:],
                                                  dpi=200), "wb")


def make_printable(figure):
    """Write letters that no font can have, of a file's name that is no text, as their
    numbers."""
    for text in figure.findobj(Text):
        letters = text.get_text().encode("utf-8", "backslashreplace").decode()
        if letters != text.get_text():
            text.set(text=letters, parse_math=False)


def draw_curves(rows, path):
    """Draw accuracy, loss and sparsity over the epochs of a run into a PNG file.

    rows: those of metrics.jsonl. Dotted lines stand where a stage begins.
    """
    small = {"font.size": 9, "xtick.labelsize": 7, "ytick.labelsize": 7}
    with matplotlib.rc_context(small):
        figure = Figure(figsize=(7.0, 2.4), layout="constrained")
        axes = figure.subplots(1, 3)
        point = dict(marker=".", markersize=3, linewidth=1)
        for key, colour, line, label in (("train", BLUE, "--", "training"),
                                         ("test", RED, "-", "test")):
            style = point | dict(color=colour, linestyle=line, label=label)
            # an epoch that was not evaluated has no test accuracy
            known = [row for row in rows if row[f"{key}_accuracy"] is not None]
            epochs = [row["epoch"] for row in known]
            accuracy = [100 * row[f"{key}_accuracy"] for row in known]
            axes[0].plot(epochs, accuracy, **style)
            axes[1].plot(epochs, [row[f"{key}_loss"] for row in known], **style)
        sparsity = [100 * row["sparsity"] for row in rows]
        axes[2].plot([row["epoch"] for row in rows], sparsity, color=GREEN, **point)
        for axis, label in zip(axes, ("Accuracy (%)", "Loss (nats)", "Sparsity (%)")):
            axis.set(xlabel="Epoch", ylabel=label)
            axis.xaxis.get_major_locator().set_params(integer=True)
            for last, first in zip(rows, rows[1:]):
                if last["stage"] != first["stage"]:
                    x = last["epoch"] + 0.5
                    axis.axvline(x, color="grey", linewidth=0.7, linestyle=":")
                    axis.annotate(first["stage"], (x, 1.01), fontsize=7, color="grey",
                                  xycoords=("data", "axes fraction"))
        axes[0].legend(fontsize=7, frameon=False)
        axes[2].set_ylim(-3, 103)
        save_picture(figure, path)
