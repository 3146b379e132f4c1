"""What runs say of the claims of the paper (arXiv 2311.16141): a verdict on each.

    table = verdicts.table(runs, drawn)   # report.Table
    verdicts.write(Path("verdicts.md"), table)

A difference in accuracy counts only if p < 0.05 after Holm's correction for all the
differences of the table: of a table of twenty, one would else be found by chance.
"""
from typing import Callable, NamedTuple

import numpy as np

from harness import differences
from harness import groups
from harness import published
from harness import records
from harness import report
from harness.files import write_whole
from harness.records import BASELINE, CHANNELS, WEIGHTS

HOLDS, FAILS = "holds", "does not hold"
UNTOLD, EMPTY = "cannot be told here", "true by construction"
HEAD = ["the paper says", "verdict", "here", "figure"]


def above(found):
    """Return the verdict on "above", and what it rests on in words. found:
    {(setting, detail): Difference}, p corrected.

    One place where it is below is enough for "does not hold".
    """
    signs = signs_of(found)
    if -1 in signs:
        verdict = FAILS
    else:
        verdict = HOLDS if 1 in signs else UNTOLD
    return verdict, in_words(found)


def stable(found):
    """Return the verdict on "no difference", as above() does. A difference that cannot
    be told from 0 is no proof that there is none."""
    return UNTOLD if signs_of(found) <= {0} else FAILS, in_words(found)


def signs_of(found):
    return {differences.sign(one.mean, one.p) for one in found.values()}


def in_words(found):
    """Return differences in words, those of one setting together."""
    texts = {}
    for (setting, detail), one in found.items():
        text = " ".join(filter(None, [detail, differences.words(*one)]))
        texts.setdefault(setting, []).append(text)
    return "; ".join(f"{setting}: {', '.join(mine)}" for setting, mine in texts.items())


class Claim(NamedTuple):
    """A claim, and the figure of analyze.py that it is about.

    find(runs, drawn): returns what runs say of it: {(setting, detail): Difference}, for
    judge() to judge, or (verdict, what it rests on); None or {} where they say nothing.
    drawn: {figure: (the figure, rows of its CSV, its runs, what they say)}.
    """

    says: str
    figure: str
    find: Callable
    judge: Callable = above


def table(runs, drawn):
    """Return the report.Table of the claims on which runs and drawn figures say
    something; None if they say nothing on any."""
    found = {claim: claim.find(runs, drawn) for claim in CLAIMS}
    known = {(claim, place): one for claim, said in found.items()
             if isinstance(said, dict) for place, one in said.items()
             if not np.isnan(one.mean)}
    corrected = dict(zip(known, differences.holm([one.p for one in known.values()])))
    lines = []
    for claim, said in found.items():
        if isinstance(said, dict) and said:
            mine = {place: one._replace(p=corrected[claim, place])
                    for place, one in said.items() if (claim, place) in known}
            said = claim.judge(mine) if mine else (UNTOLD, "no two seeds in common")
        if said:
            lines.append([claim.says, *said, claim.figure])
    return report.Table(HEAD, lines) if lines else None


def write(path, table):
    """Write a table as Markdown, but for the names of the figures."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    write_whole(path, lambda file: file.write(
        "".join(f"| {' | '.join(line[:-1])} |\n" for line in lines)))


# ---- differences in accuracy --------------------------------------------------------


def settings(runs, pruned, free=()):
    """Yield (setting, group, the criticality runs in it at the paper's rate) of the
    groups of runs that may be compared, in the two readings of the paper: a single item
    of --as-published or another reading of the score is left out. pruned: WEIGHTS or
    CHANNELS. free: flags that may differ."""
    for group in records.comparable_groups(runs, pruned, free):
        ours = records.runs_of(group, "criticality")
        if not ours:
            continue
        config = ours[0].config
        reading = published.words(config)
        usual = all(config.get(flag, value) == value
                    for flag, value in groups.USUAL.items())
        if usual and reading in ("", "as published"):
            words = [groups.setting_of(ours[0], *free).partition(": ")[2],
                     "" if free else records.updates_of(ours[:1]), reading]
            yield ", ".join(filter(None, words)), group, ours


def against(pruned, rival, target=None):
    """Return what finds the differences of criticality, at the paper's rate, to a rival
    that has the same rate or none. target: a sparsity; None: any target."""
    def find(runs, drawn):
        found = {}
        for setting, group, ours in settings(runs, pruned):
            theirs = [run for run in records.by_method(group, pruned, rival)
                      if run.regen in (0, None, ours[0].regen)]
            if theirs and target in (None, ours[0].config.get("sparsity")):
                detail = "" if target else groups.target_of(ours[0])
                found[setting, detail] = differences.against(
                    records.by_seed(ours), records.by_seed(theirs))
        return found
    return find


def over_rates(runs, drawn):
    """Return the differences of criticality at rates from 0.1 to 0.6 to that at 0.1."""
    found = {}
    for setting, group, ours in settings(runs, WEIGHTS):
        at_rate = {}
        for run in records.by_method(group, WEIGHTS, "criticality"):
            at_rate.setdefault(run.regen, {})[run.seed] = run
        for rate in sorted(at_rate):
            if 0.1 in at_rate and 0.1 < rate <= 0.6:
                detail = f"{groups.target_of(ours[0])}, r = {rate:g}"
                found[setting, detail] = differences.against(
                    at_rate[rate], at_rate[0.1])
    return found


def over_lengths(runs, drawn):
    """Return the differences of criticality to GMP at each number of pruning epochs."""
    found = {}
    for setting, group, ours in settings(runs, WEIGHTS, ("epochs_prune",)):
        lengths = sorted({run.config["epochs_prune"] for run in ours})
        for length in lengths if len(lengths) > 1 else ():
            mine, theirs = (records.by_seed(
                run for run in records.by_method(group, WEIGHTS, method)
                if run.config["epochs_prune"] == length and run.regen in rates)
                for method, rates in (("criticality", [ours[0].regen]),
                                      ("gmp", [0, None])))
            found[setting, f"{length} epochs"] = differences.against(mine, theirs)
    return found


# ---- other measures -----------------------------------------------------------------


def rescue_at(sparsity):
    """Return what finds in how many updates of criticality, to a sparsity and at the
    paper's rate, more than half of what was pruned came back. An update counts by the
    mean of the seeds, two at least."""
    def find(runs, drawn):
        texts, signs = [], []
        for setting, _, ours in settings(runs, WEIGHTS):
            if len(ours) < 2 or ours[0].config["sparsity"] != sparsity:
                continue
            shares = shares_of(ours)
            if len(shares):
                more = int((shares > 50).sum())
                texts.append(f"{setting}: in {more} of {len(shares)} updates, "
                             f"{min(shares):.0f} to {max(shares):.0f} %")
                signs.append(more == len(shares))
        if texts:
            return HOLDS if all(signs) else FAILS, "; ".join(texts)
    return find


def shares_of(runs):
    """Return what share of what an update prunes comes back in it, in %, of each
    update, a mean over the runs; of those that log it."""
    logged = []
    for run in runs:
        try:
            rows = records.read(run, "updates.jsonl")
        except records.Unfit:
            continue
        logged.append([row.get("survived") for row in rows])
    shares = np.array(logged, dtype=float)  # None becomes NaN
    shares = shares[:, ~np.isnan(shares).any(0)] if len(shares) else shares
    return 100 * shares.mean(0) if shares.size else shares.reshape(0)


def came_back(runs, drawn):
    if "survival" not in drawn:
        return None
    _, rows, _, _ = drawn["survival"]
    final = {f"alive {pruned}": pruned for pruned in BASELINE}
    found = [f"{row['share']:.1f} % ({final[row['what']]})" for row in rows
             if row["what"] in final]
    return EMPTY, f"{', '.join(found)}: equals r about by construction (Eq. 7)"


def epochs_given(runs, drawn):
    """Say what the ratio of epochs is, where lottery tickets are compared with."""
    if not any(run.method in ("imp", "eb", "et") for run in runs):
        return None
    return EMPTY, ("2,260 and 3,100 epochs are those of LTH-SNN's schedule, 200 those "
                   "that criticality was given; here all have as many")


def gain_in_importance(runs, drawn):
    if "importance" not in drawn:
        return None
    _, rows, used, _ = drawn["importance"]
    rows = [row for row in rows if row["normalisation"] == "share of the mean"]
    ours, theirs = ([row["importance"] for row in rows if row["method"] == method]
                    for method in ("criticality", BASELINE[CHANNELS]))
    text = (f"criticality's go from {ours[0]:.2f} to {ours[-1]:.2f} of the network's "
            f"mean, slimming's from {theirs[0]:.2f} to {theirs[-1]:.2f}")
    if len({run.seed for run in used}) < 2:
        return UNTOLD, f"one seed: {text}"
    return HOLDS if ours[-1] > max(ours[0], theirs[-1]) else FAILS, text


def in_classes(figure, better):
    """Return what finds in which share of the classes criticality is better than the
    baseline, and what other rankings reach. In three of four or more the claim holds,
    in one of four or fewer it does not. figure: its name, and that of the number in
    records.analysis_of."""
    def find(runs, drawn):
        if figure not in drawn:
            return None
        _, _, used, _ = drawn[figure]
        texts, shares = [], []
        for pruned, baseline in BASELINE.items():
            mine = [run for run in used if run.pruned == pruned]
            if not mine:
                continue
            values = records.values_of_classes(
                {name: records.by_method(mine, pruned, name)
                 for name in records.in_order(run.method for run in mine)}, figure)
            base = values.pop(baseline)
            won = {name: records.share_won(found, base, better)
                   for name, found in values.items()}
            shares.append(won["criticality"])
            texts.append(f"{pruned} ({groups.target_of(mine[0])}): {better} in "
                         + ", ".join(f"{100 * share:.0f} % of the classes ({name})"
                                     for name, share in won.items()))
        if len({run.seed for run in used}) < 2:
            return UNTOLD, f"one seed: {'; '.join(texts)}"
        if min(shares) >= 0.75:
            verdict = HOLDS
        else:
            verdict = FAILS if max(shares) <= 0.25 else UNTOLD
        return verdict, "; ".join(texts)
    return find


CLAIMS = [
    Claim("criticality is above GMP at 90 %, by 0.3 to 1.8 points", "curves",
          against(WEIGHTS, "gmp", 0.9)),
    Claim("criticality is above GMP at 95 %, by 0.2 to 1.0 points", "curves",
          against(WEIGHTS, "gmp", 0.95)),
    Claim("criticality is above GMP at 98 %, by up to 0.8 points", "curves",
          against(WEIGHTS, "gmp", 0.98)),
    Claim("criticality is above regeneration by gradient at the same r", "ratio",
          against(WEIGHTS, "gradient")),
    Claim("criticality is above random regeneration at the same r", "ratio",
          against(WEIGHTS, "random")),
    Claim("criticality is stable from r = 0.1 to 0.6 (here: to r = 0.1)", "ratio",
          over_rates, stable),
    Claim("criticality is above GMP at each length of pruning", "epochs",
          over_lengths),
    Claim("criticality is above LTH-SNN (IMP)", "ratio",
          against(WEIGHTS, "imp")),
    Claim("criticality needs 11.3 and 15.5 times fewer epochs than LTH-SNN", "epochs",
          epochs_given),
    *(Claim(f"more than half of what an update prunes comes back in it, at "
            f"{100 * sparsity:.0f} %", "survival", rescue_at(sparsity))
      for sparsity in (0.9, 0.95, 0.98)),
    Claim("48.03 % of the final weights, 42.60 % of the final channels had come back",
          "survival", came_back),
    Claim("the channels that criticality alone kept gain in importance, and pass those "
          "that slimming alone kept", "importance", gain_in_importance),
    Claim("features vary less within a class than the baseline's", "variance",
          in_classes("variance", "lower")),
    Claim("features of training and test set are more alike than the baseline's",
          "similarity", in_classes("similarity", "higher")),
    Claim("channels: criticality is above slimming at equal MACs, by 0.2 to 1.7 points",
          "curves", against(CHANNELS, "slimming")),
]
