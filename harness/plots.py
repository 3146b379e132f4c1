"""One look for all figures: methods have their colours and markers, panels the width of a column.

    figure, ((axis,),) = plots.canvas(1)
    mean, std = plots.spread(values)                 # over the seeds
    plots.plot(axis, x, mean, std, "criticality")
    plots.save(Path("figures/name"), figure, rows, "what it is of")
    plots.draw_curves(rows, path)                    # of metrics.jsonl: what each run leaves
"""
import base64
import csv
import html
import io

import matplotlib
import numpy as np

from harness.files import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend is chosen first)

STYLE = {  # Okabe-Ito colours, told apart by all eyes; markers, told apart without colour
    "dense": ("#000000", "s"), "gmp": ("#D55E00", "o"), "slimming": ("#D55E00", "o"),
    "criticality": ("#0072B2", "^"), "gradient": ("#009E73", "v"), "random": ("#CC79A7", "D"),
    "granet": ("#56B4E9", "P"), "greg1": ("#E69F00", "X"), "greg2": ("#999999", "*"),
    "imp": ("#E69F00", "o"), "eb": ("#E69F00", "s"), "et": ("#E69F00", "D"),
    "gradr": ("#009E73", "P"), "deepr": ("#009E73", "X"), "sdsnn": ("#56B4E9", "*"),
    "pq": ("#CC79A7", "p")}


def canvas(columns, rows=1):
    """Return a figure and its axes [rows, columns], each as wide as a column of a paper."""
    return plt.subplots(rows, columns, figsize=(3.4 * columns, 2.5 * rows), layout="constrained",
                        squeeze=False)


def spread(values):
    """Return (mean, standard deviation) over the first dimension, the seeds; 0 for one seed."""
    values = np.asarray(values, float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]


def plot(axis, x, mean, std, method, **style):
    colour, marker = STYLE[method]
    style = dict(color=colour, marker=marker, markersize=3.5, linewidth=1, label=method) | style
    axis.errorbar(x, mean, yerr=std if np.any(std) else None, capsize=2, **style)


def by_layer(axis, methods, value, label):
    """Draw value(run), {layer: number}, over the layers for each method; return rows of its CSV."""
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
    slanted = dict(rotation=60, ha="right", rotation_mode="anchor") if len(names) > 6 else {}
    axis.set_xticks(range(len(names)), names, fontsize=6 if len(names) > 12 else 7, **slanted)


def legend(axis, ncols=2):
    """Put the legend above the panel, where it covers nothing."""
    axis.legend(frameon=False, fontsize=7, ncols=ncols, loc="lower center",
                bbox_to_anchor=(0.5, 1), borderaxespad=0.1)


def save(path, figure, rows, header):
    """Write a figure as path.png and path.pdf, and the dicts `rows` that it draws as path.csv,
    below `header`, whose lines become comments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf"):
        write_whole(path.with_suffix(f".{kind}"),
                    lambda file: figure.savefig(file, format=kind, dpi=200), "wb")
    plt.close(figure)
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in header.splitlines())
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path.with_suffix(".csv"), lambda file: file.write(text.getvalue()))


def draw_curves(rows, path):
    """Draw accuracy, loss and sparsity over the epochs of a run into a PNG file."""
    blue, orange, green = "#0072B2", "#D55E00", "#009E73"  # Okabe-Ito: told apart by all eyes
    epochs = [row["epoch"] for row in rows]
    with plt.rc_context({"font.size": 9, "xtick.labelsize": 7, "ytick.labelsize": 7}):
        figure, axes = plt.subplots(1, 3, figsize=(7.0, 2.4), layout="constrained")
        for key, colour, line, label in (("train", blue, "--", "training"),
                                         ("test", orange, "-", "test")):
            style = dict(color=colour, linestyle=line, marker=".", markersize=3, linewidth=1,
                         label=label)
            axes[0].plot(epochs, [100 * row[f"{key}_accuracy"] for row in rows], **style)
            axes[1].plot(epochs, [row[f"{key}_loss"] for row in rows], **style)
        axes[2].plot(epochs, [100 * row["sparsity"] for row in rows], color=green, marker=".",
                     markersize=3, linewidth=1)
        for axis, label in zip(axes, ("Accuracy (%)", "Loss (nats)", "Sparsity (%)")):
            axis.set(xlabel="Epoch", ylabel=label)
            axis.xaxis.get_major_locator().set_params(integer=True)
            ends = [a["epoch"] for a, b in zip(rows, rows[1:]) if a["stage"] != b["stage"]]
            for end in ends:
                axis.axvline(end + 0.5, color="grey", linewidth=0.7, linestyle=":")
                axis.annotate(rows[end - rows[0]["epoch"] + 1]["stage"], (end + 0.5, 1.01),
                              fontsize=7, xycoords=("data", "axes fraction"), color="grey")
        axes[0].legend(fontsize=7, frameon=False)
        axes[2].set_ylim(-3, 103)
        write_whole(path, lambda file: figure.savefig(file, format="png", dpi=200), "wb")
        plt.close(figure)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ max-width: 46em; margin: 2em auto; padding: 0 1em; font: 16px/1.5 sans-serif }}
img {{ max-width: 100% }} figure {{ margin: 3em 0 }} small {{ color: #555 }}
pre {{ white-space: pre-wrap; font-size: 12px }}
</style><h1>{title}</h1>
"""


def page(path, title, sections):
    """Write an HTML page that needs no other file. sections: (PNG, heading, texts, commands)."""
    parts = [PAGE.format(title=html.escape(title))]
    for image, heading, texts, commands in sections:
        png = image.read_bytes()
        source, width = base64.b64encode(png).decode(), int.from_bytes(png[16:20], "big") // 1.6
        parts += [f'<figure id="{image.stem}"><h2>{html.escape(heading)}</h2>\n'
                  f'<img alt="{image.stem}" width="{width:.0f}" '
                  f'src="data:image/png;base64,{source}">\n<figcaption>',
                  *(f"<p>{html.escape(text)}</p>" for text in texts),
                  f"<details><summary>Commands of the runs</summary><pre>"
                  f"{html.escape(commands)}</pre></details></figcaption></figure>\n"]
    write_whole(path, lambda file: file.write("\n".join(parts) + "</html>\n"))
