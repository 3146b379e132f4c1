"""One look for all figures: colours and markers of the methods, panels as wide as a
column of a paper.

    figure, ((axis,),) = plots.canvas(1)
    mean, std = plots.spread(values)                 # over the seeds
    plots.plot(axis, x, mean, std, "criticality")
    plots.note(figure, "what a reader must know")    # under the panels
    plots.save(Path("figures/name"), figure, rows, "what it is of")
    plots.draw_curves(rows, path)                    # of metrics.jsonl, after each run
"""
import base64
import csv
import html
import io
import os
import sys
import textwrap
from contextlib import suppress

import numpy as np

from harness.files import write_whole

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
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
RED, PINK = "#D55E00", "#CC79A7"

STYLE = {  # method: colour, and a marker, told apart without colour
    "dense": (BLACK, "s"),
    "gmp": (RED, "o"),
    "slimming": (RED, "o"),
    "criticality": (BLUE, "^"),
    "gradient": (GREEN, "v"),
    "random": (PINK, "D"),
    "granet": (SKY, "P"),
    "greg1": (ORANGE, "X"),
    "greg2": (GREY, "*"),
    "imp": (ORANGE, "o"),
    "eb": (ORANGE, "s"),
    "et": (ORANGE, "D"),
    "gradr": (GREEN, "P"),
    "deepr": (GREEN, "X"),
    "sdsnn": (SKY, "*"),
    "pq": (PINK, "p"),
}
# What methods that STYLE does not name get, one after the other
SPARE = [(colour, marker) for marker in "<>hHd8"
         for colour in (BLUE, RED, GREEN, PINK, SKY, ORANGE, GREY)]
given = {}  # {such a method: its pair of SPARE}


def style_of(method):
    """Return (colour, marker) of a method: those of STYLE, else the next pair of SPARE,
    which the method keeps. After the last pair comes the first again."""
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


def canvas(columns, rows=1):
    """Return a figure and its axes [rows, columns], each as wide as a column."""
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


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
    bars = std if np.any(std) else None
    axis.errorbar(x, mean, yerr=bars, capsize=2, **(usual | style))


def by_layer(axis, methods, value, label):
    """Draw a number of each layer for each method, mean and deviation over the seeds.

    methods: {method: runs}; value(run) returns {layer: number}. Returns the CSV's rows.
    """
    rows = []
    for method, runs in methods.items():
        found = [value(run) for run in runs]
        names = list(found[0])
        mean, std = spread([[layers[name] for name in names] for layers in found])
        plot(axis, range(len(names)), mean, std, method)
        rows += [dict(quantity=label, method=method, layer=name, mean=m, std=s)
                 for name, m, s in zip(names, mean, std)]
    layer_ticks(axis, names)
    axis.set_ylabel(label)
    return rows


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


def save(path, figure, rows, header):
    """Write what a figure draws as path.csv, and the figure as path.png and path.pdf.

    rows: dicts with the same keys. header: its lines become comments of the CSV. What
    matplotlib cannot draw is a note, and an older picture of this name is removed.
    Raises OSError if a file cannot be written.
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
        try:
            write_whole(target, lambda file: figure.savefig(file, format=kind, dpi=200),
                        "wb")
        except OSError:
            raise
        except Exception as error:  # of matplotlib, its fonts, its settings
            target.unlink(missing_ok=True)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            print(f"note: {target} could not be drawn ({reason}). Its numbers are in "
                  f"{path.with_suffix('.csv')}")


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
    epochs = [row["epoch"] for row in rows]
    small = {"font.size": 9, "xtick.labelsize": 7, "ytick.labelsize": 7}
    with matplotlib.rc_context(small):
        figure = Figure(figsize=(7.0, 2.4), layout="constrained")
        axes = figure.subplots(1, 3)
        point = dict(marker=".", markersize=3, linewidth=1)
        for key, colour, line, label in (("train", BLUE, "--", "training"),
                                         ("test", RED, "-", "test")):
            style = point | dict(color=colour, linestyle=line, label=label)
            accuracy = [100 * row[f"{key}_accuracy"] for row in rows]
            axes[0].plot(epochs, accuracy, **style)
            axes[1].plot(epochs, [row[f"{key}_loss"] for row in rows], **style)
        sparsity = [100 * row["sparsity"] for row in rows]
        axes[2].plot(epochs, sparsity, color=GREEN, **point)
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
        write_whole(path, lambda file: figure.savefig(file, format="png", dpi=200),
                    "wb")


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">\
<title>{title}</title><style>
body {{ max-width: 46em; margin: 2em auto; padding: 0 1em; font: 16px/1.5 sans-serif }}
img {{ max-width: 100% }} figure {{ margin: 3em 0 }} small {{ color: #555 }}
pre {{ white-space: pre-wrap; font-size: 12px }}
</style><h1>{title}</h1>
"""
IMAGE = """<img alt="{name}" width="{width}" src="data:image/png;base64,{png}">
"""
SECTION = """<figure id="{name}"><h2>{heading}</h2>
{image}<figcaption>
{texts}
<details><summary>Commands of the runs</summary><pre>{commands}</pre></details>\
</figcaption></figure>
"""


def page(path, title, sections):
    """Write an HTML page that needs no other file.

    sections: [(path of a PNG file, heading, texts, commands of its runs)]. A picture
    that could not be drawn is left out.
    """
    parts = [PAGE.format(title=html.escape(title))]
    for path_of_image, heading, texts, commands in sections:
        image = ""
        if path_of_image.exists():
            png = path_of_image.read_bytes()
            pixels = int.from_bytes(png[16:20], "big")  # the width, in its header
            image = IMAGE.format(name=path_of_image.stem, width=f"{pixels // 1.6:.0f}",
                                 png=base64.b64encode(png).decode())
        parts.append(SECTION.format(
            name=path_of_image.stem, heading=html.escape(heading), image=image,
            commands=html.escape(commands),
            texts="\n".join(f"<p>{html.escape(text)}</p>" for text in texts)))
    write_whole(path, lambda file: file.write("\n".join(parts) + "</html>\n"))
