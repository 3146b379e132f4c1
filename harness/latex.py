"""Tables of compare.py for LaTeX.

    source = latex.document(tables, names, cells_of, "compare")
    latex.tex("90 % sparse")                            # 90 \\% sparse
"""
import re

TEX = r"""% Made by compare.py. In a document: \input{NAME}
% No package is needed; where booktabs is loaded, its rules are drawn.
\providecommand{\toprule}{\hline\noalign{\smallskip}}
\providecommand{\midrule}{\noalign{\smallskip}\hline\noalign{\smallskip}}
\providecommand{\bottomrule}{\noalign{\smallskip}\hline}
"""
TEX_TABLE = r"""
\begin{table}
\centering
\caption{%(caption)s}
\scriptsize
\setlength{\tabcolsep}{2pt}
\begin{tabular}{%(align)s}
\toprule
%(head)s \\
%(unit)s \\
%(body)s
\bottomrule
\end{tabular}
\end{table}
"""
# {a column: its two lines in LaTeX}; the others have name and unit
TEX_HEADS = {
    "against the baseline, points": ("difference", "points"),
    "training cost": ("cost", "of dense"), "faster": ("faster", "times"),
    "test accuracy, %": ("accuracy", "%"),
}
TEX_LETTERS = {letter: rf"\{letter}" for letter in "%&_#${}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$"}


def tex(text):
    """Return a text with what is special to LaTeX written so that it is printed; a
    number's minus as a minus."""
    text = text.encode("utf-8", "backslashreplace").decode()  # no text: its bytes
    text = "".join(TEX_LETTERS.get(letter, letter) for letter in text)
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", text)


def document(tables, names, cells_of, file):
    """Return tables as LaTeX, an environment for each, the rows below the name of their
    target.

    tables: {setting: rows}, as groups.tabulate returns them. names: of the columns.
    cells_of(row): returns a row's texts, one for each of them. file: its name
    without .tex.

    Without the columns that are empty, and sparsity and MACs where the target says
    them: all of its rows have the same. Seeds that all rows share stand in the caption.
    """
    parts = [TEX.replace("NAME", file)]
    for setting, rows in tables.items():
        cells = [dict(zip(names, cells_of(row))) for row in rows]
        columns = [name for name in names if name != "target"
                   and any(row[name] != "-" for row in cells)]
        for name in ("sparsity, %", "MACs, M"):
            pairs = {(row["target"], row[name]) for row in cells}
            targets = {row["target"] for row in cells}
            if name in columns and len(pairs) == len(targets) < len(cells):
                columns.remove(name)
        caption = setting[0].upper() + setting[1:]
        if "against the baseline, points" in columns:
            caption += (f". Differences to {rows[0]['baseline']}, with 95 % "
                        f"intervals")
        if len({row["seeds"] for row in rows}) == 1:
            columns.remove("seeds")
            words = "Seeds" if " " in rows[0]["seeds"] else "Seed"
            caption += f". {words} {', '.join(rows[0]['seeds'].split())}"
        longest = max(len(row["method"]) for row in rows)
        # lines of long names are broken
        first, start = ("p{31mm}", r"\raggedright ") if longest > 24 else ("l", "")
        body, before = [], None
        for row in cells:
            if row["target"] != before:
                body.append(r"\midrule")
                if row["target"] != "-":
                    body.append(rf"\multicolumn{{{len(columns)}}}{{l}}"
                                rf"{{\textit{{{tex(row['target'])}}}}} \\")
            before = row["target"]
            # above and below are what the interval says
            text = re.sub(" (above|below)$", "", row["against the baseline, points"])
            row["against the baseline, points"] = text.replace(" to ", ", ")
            texts = " & ".join(tex(row[name]) for name in columns)
            body.append(rf"{start}{texts} \\")
        heads = [TEX_HEADS.get(name) or (name.split(", ") + [""])[:2]
                 for name in columns]
        parts.append(TEX_TABLE % dict(
            caption=tex(f"{caption}."), body="\n".join(body),
            align=first + "r" * (len(columns) - 1),
            head=" & ".join(tex(name) for name, _ in heads),
            unit=" & ".join(tex(unit) for _, unit in heads)))
    return "".join(parts)
