"""One HTML page with pictures and tables, which needs no other file.

    table = report.Table(["method", "r = 0.1"], [["gmp", "84.1"]], "Accuracy, %")
    section = report.Section(Path("ratio.png"), "Fig. 1(a)", ["what to look for"],
                             table, "python x.py")
    report.page(Path("report.html"), "A title", ["what it is of"], summary, [section])
"""
import base64
import html
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness import plots
from harness import records
from harness.files import write_whole

STYLE = """
body { max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222;
  font: 16px/1.5 system-ui, sans-serif }
h1, h2 { line-height: 1.2 }
section { margin: 3em 0; border-top: 1px solid #ccc }
img { max-width: 100%; height: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px; line-height: 1.35 }
caption { text-align: left; color: #555; padding: .3em 0 }
th, td { padding: .25em .7em; text-align: left; vertical-align: top }
.numbers td, .numbers th + th { text-align: right; white-space: nowrap }
thead th { border-bottom: 2px solid #888 }
.words td:nth-child(2) { font-weight: 600 }
tbody tr + tr > * { border-top: 1px solid #ddd }
tbody th { font-weight: normal }
.note { color: #555; font-size: 14px }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px }
li { overflow-wrap: anywhere }
@media (max-width: 700px) {
  .large img { max-width: none; width: 600px }
  .words thead { display: none }
  .words tr, .words td, .words tbody th { display: block; padding: .1em 0 }
  .words tr { padding: .6em 0; border-top: 1px solid #ddd }
  .words tbody tr > * { border: 0 }
}
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{intro}
<h2 id="summary">Summary</h2>
{summary}
<h2 id="contents">Contents</h2>
<ol>
{contents}
</ol>
{sections}
</body></html>
"""
IMAGE = """<div class="wide{large}"><img alt="{name}" width="{width}" \
src="data:image/png;base64,{png}"></div>
"""
SECTION = """<section id="{name}"><h2>{heading}</h2>
{image}{texts}
{table}
<details><summary>Commands of the runs</summary><pre>{commands}</pre></details>
<p class="note"><a href="#contents">Contents</a></p></section>
"""
TABLE = """<div class="wide"><table class="{kind}">{caption}
<thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
"""


class Table(NamedTuple):
    """Texts: the names of the columns, the rows, which start with their names, and what
    stands above."""

    head: list
    rows: list
    caption: str = ""


class Section(NamedTuple):
    """A picture, a PNG file, with what it says. notes: texts in small letters. says:
    texts of a list. table: a Table, or None. commands: of its runs."""

    image: Path
    heading: str
    texts: list
    table: Table | None
    commands: str
    says: tuple = ()
    notes: tuple = ()


def page(path, title, intro, summary, sections):
    """Write an HTML page.

    intro: texts. summary: a Table, whose rows end with the name of a section, which
    becomes a link if it is there; None: there is nothing to sum up. sections: a list of
    Section. A picture that could not be drawn is left out.
    """
    names = {section.image.stem for section in sections}
    contents = "\n".join(
        f'<li><a href="#{section.image.stem}">{html.escape(section.heading)}</a></li>'
        for section in sections)
    write_whole(path, lambda file: file.write(PAGE.format(
        title=html.escape(title), style=STYLE, contents=contents,
        intro=paragraphs(intro),
        summary=html_of(summary, "words", names) if summary else "",
        sections="\n".join(map(html_of_section, sections)))))


def paragraphs(texts, kind=""):
    start = f'<p class="{kind}">' if kind else "<p>"
    return "\n".join(f"{start}{html.escape(text)}</p>" for text in texts)


def html_of_section(section):
    name, image = section.image.stem, ""
    if section.image.exists():
        png = section.image.read_bytes()
        pixels = int.from_bytes(png[16:20], "big")  # the width, in its header
        large = " large" if pixels > 1000 else ""  # it has several columns
        image = IMAGE.format(name=name, width=f"{pixels // 1.6:.0f}", large=large,
                             png=base64.b64encode(png).decode())
    texts = paragraphs(section.texts)
    if section.says:
        items = "\n".join(f"<li>{html.escape(text)}</li>" for text in section.says)
        texts += f"\n<ul>\n{items}\n</ul>"
    texts += "\n" + paragraphs(section.notes, "note")
    return SECTION.format(
        name=name, heading=html.escape(section.heading), image=image, texts=texts,
        table=html_of(section.table, "numbers") if section.table else "",
        commands=html.escape(section.commands))


def html_of(table, kind, linked=()):
    """Return a Table as HTML. linked: names that are links in its last column."""
    def cells(row, tag):
        texts = [html.escape(text) for text in row]
        if tag == "td" and texts[-1] in linked:
            texts[-1] = f'<a href="#{texts[-1]}">{texts[-1]}</a>'
        first = "th" if tag == "th" else 'th scope="row"'
        parts = [f"<{first}>{texts[0]}</th>"]
        return "".join(parts + [f"<{tag}>{text}</{tag}>" for text in texts[1:]])

    caption = html.escape(table.caption)
    return TABLE.format(
        kind=kind, caption=f"<caption>{caption}</caption>" if caption else "",
        head=cells(table.head, "th"),
        body="\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows))


# ---- the figures of runs ------------------------------------------------------------

MOST_COLUMNS = 14  # of a table; of more, some are left out evenly


def table_of(name, layout, rows):
    """Return the Table of a figure: the rows of its CSV, with a column for each x.

    layout: (what names a row, a list of columns of the CSV; the column that is x; that
    of the number; its digits; the caption).
    """
    keys, column, number, digits, caption = layout
    cells, columns = {}, {}
    for row in rows:
        x = "end" if row[column] is None else row[column]
        columns[x] = f"{x:g}" if isinstance(x, float) else str(x)
        title = ", ".join(" ".join(str(row[key]).split()) for key in keys)
        cells.setdefault(title, {}).setdefault(x, []).append(row)
    shown = list(columns)
    if column not in ("class", "layer"):
        shown.sort(key=lambda x: (x == "end", 0 if x == "end" else x))
    step = -(-len(shown) // MOST_COLUMNS)
    if step > 1:
        shown = [x for i, x in enumerate(shown) if i % step == 0 or x == shown[-1]]
        caption += f"; one in {step} columns, all are in {name}.csv"
    lines, has_std = [], False
    for title, found in cells.items():
        line = [title]
        for x in shown:
            values = [row[number] for row in found.get(x, ())]
            stds = [row.get("std") for row in found.get(x, ())]
            text = f"{np.median(values):.{digits}f}" if values else "-"
            if len(values) == 1 and stds[0]:
                text += f" ± {stds[0]:.{digits}f}"
                has_std = True
            line.append("-" if text.startswith("nan") else text)
        lines.append(line)
    if has_std:
        caption += "; mean ± deviation of the seeds"
    return Table([""] + [columns[x] for x in shown], lines, f"{caption}.")


def section_of(picture, heading, look_for, table, figure, used, says):
    """Return the Section of a figure of runs. says: texts of a list.

    What stands under the picture, in it, is not said again: only if it could not be
    drawn.
    """
    notes = [records.describe(used, with_settings=False)]
    if not picture.exists():
        notes = [plots.note_of(figure), *notes]
    commands = "\n".join(dict.fromkeys(map(records.command_of, used)))
    return Section(picture, heading, [look_for], table, commands, says, notes)
