"""What runs say of the claims of the paper (arXiv 2311.16141): a verdict on each.

    table = verdicts.table(runs, drawn)   # report.Table
    verdicts.write(Path("verdicts.md"), table, runs)

A difference in accuracy counts only if p < 0.05 after Holm's correction for all the
differences of the table: of a table of twenty, one would else be found by chance.
Criticality is compared at one regeneration rate, which records.runs_of chooses: the
paper's, where it is at hand; another one is named.
"""
import re
from contextlib import suppress
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
TARGETS = {"sparsity", "prune_ratio", "target_macs"}  # flags of the target
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


def everywhere(found):
    """Return the verdict on "above in each place", of two or more, as above() does."""
    verdict, text = above(found)
    if verdict == HOLDS and (len(found) < 2 or signs_of(found) != {1}):
        verdict = UNTOLD
    return verdict, text


def stable(found):
    """Return the verdict on "no difference", as above() does. A difference that cannot
    be told from 0 is no proof that there is none."""
    return UNTOLD if signs_of(found) <= {0} else FAILS, in_words(found)


def signs_of(found):
    """Return which signs differences have, a set of 1, -1 and 0 (cannot be told)."""
    return {differences.sign(one.mean, one.p) for one in found.values()}


def in_words(found):
    """Return differences in words, those of one setting together."""
    texts = {}
    for (setting, detail), one in found.items():
        text = " ".join(filter(None, [detail, differences.words(*one)]))
        texts.setdefault(setting, []).append(text)
    return "; ".join(f"{setting}: {', '.join(mine)}" for setting, mine in texts.items())


def joined(*words):
    return ", ".join(filter(None, words))


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


def write(path, table, runs):
    """Write a table as Markdown, but for the names of the figures. A letter stands for
    a setting; below stand what the letters mean, and in how many pairs criticality is
    below the baseline."""
    letters = {}

    def letter(match):
        over, place = divmod(len(letters), 26)
        sign = chr(ord("A") + over - 1) * bool(over) + chr(ord("A") + place)
        return letters.setdefault(match[0], f"**{sign}**")

    kinds = {setting: pruned for pruned in BASELINE
             for setting, _, _ in settings(runs, pruned)}
    # the longest first: one may begin as another one does, and end with the other
    names = sorted(kinds, key=len, reverse=True)
    pattern = re.compile(f"(?:{'|'.join(map(re.escape, names))})(?=: )"
                         if names else "(?!)")
    rows = [[*line[:2], pattern.sub(letter, line[2])] for line in table.rows]
    lines = [table.head[:-1], ["---"] * 3, *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    text += "\n" * bool(letters)
    text += "".join(f"- {sign} {kinds[name]}: {name}\n"
                    for name, sign in letters.items())
    text += "".join(f"\n{line}\n" for line in in_pairs(runs))
    write_whole(path, lambda file: file.write(text))


def in_pairs(runs):
    """Yield in sentences in how many pairs of one seed, over all settings, criticality
    is below the baseline: what the corrected differences of few seeds cannot say.
    Settings of one seed count too."""
    for pruned, rival in BASELINE.items():
        found = [differences.pairs(records.by_seed(ours), records.by_seed(theirs))
                 for _, group, ours in settings(runs, pruned)
                 if is_meant(ours[0]) and (theirs := rivals_of(group, ours, rival))]
        found = [mine for mine in found if mine]
        pairs = [one for mine in found for one in mine]
        if pairs:
            # a mean of equal numbers may differ from 0 by rounding
            below, lower = (sum(one < -1e-9 for one in values)
                            for values in (pairs, map(np.mean, found)))
            yield (f"{pruned.capitalize()}: criticality's mean is below "
                   f"{rival.upper() if rival == 'gmp' else rival}'s in {lower} of "
                   f"{len(found)} cases (a setting and a target), its accuracy in "
                   f"{below} of {len(pairs)} pairs of one seed; "
                   f"{np.mean(pairs):+.1f} points over all pairs.")


# ---- differences in accuracy --------------------------------------------------------


def settings(runs, pruned, free=()):
    """Return [(setting, group, its criticality runs at one rate)] of the groups of runs
    that may be compared, in the two readings of the paper: a single item of
    --as-published or another reading of the score is left out. No two settings have
    the same words.

    pruned: WEIGHTS or CHANNELS. free: flags that may differ.
    """
    found = []
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
            found.append((joined(*words), group, ours))
    return told_apart(found, [flag for flag in records.SAME[pruned]
                              if flag not in free and flag not in TARGETS])


def told_apart(found, flags):
    """Return what settings() found, with words for the flags in which groups of one
    setting differ, whatever their targets."""
    named = []
    for setting, group, ours in found:
        alike = [runs[0].config for other, _, runs in found if other == setting]
        words = [groups.words_of(flag, ours[0].config.get(flag)) for flag in flags
                 if len({str(config.get(flag)) for config in alike}) > 1]
        named.append((joined(setting, *words), group, ours))
    return named


def rate_of(ours):
    """Return the rate of criticality runs in words; "" if it is the paper's."""
    rate = ours[0].regen
    return "" if rate == records.paper_rate(ours[0]) else f"r = {rate:g}"


def rivals_of(group, ours, rival):
    """Return the runs of a rival in a group that have the rate of ours, or none."""
    return [run for run in records.by_method(group, ours[0].pruned, rival)
            if run.regen in (0, None, ours[0].regen)]


def against(pruned, rival, sparsity=None):
    """Return what finds the differences of criticality to a rival.

    sparsity: the target of the weights; None: any.
    """
    def find(runs, drawn):
        found = {}
        for setting, group, ours in settings(runs, pruned):
            theirs = rivals_of(group, ours, rival)
            if theirs and is_meant(ours[0], sparsity):
                detail = joined("" if sparsity else groups.target_of(ours[0]),
                                rate_of(ours))
                found[setting, detail] = differences.against(
                    records.by_seed(ours), records.by_seed(theirs))
        return found
    return find


def is_meant(run, sparsity=None):
    """Return whether a run has the target that is asked for. sparsity: of the weights;
    None: any. Of channels those runs count whose target is a share of the MACs: at an
    equal share of the channels the MACs differ."""
    if run.pruned == CHANNELS:
        return run.config.get("target_macs") is not None
    return sparsity in (None, run.config.get("sparsity"))


def over_rates(runs, drawn):
    """Return the differences of criticality at rates up to 0.6 to that at 0.1."""
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
    """Return the differences of criticality to GMP at each number of pruning epochs,
    where there are two or more."""
    found = {}
    for setting, group, ours in settings(runs, WEIGHTS, ("epochs_prune",)):
        by_length = {}
        for run in ours:
            by_length.setdefault(run.config["epochs_prune"], []).append(run)
        for length, mine in sorted(by_length.items()) if len(by_length) > 1 else ():
            theirs = [run for run in rivals_of(group, mine, "gmp")
                      if run.config["epochs_prune"] == length]
            detail = joined(groups.target_of(ours[0]), rate_of(ours),
                            f"{length} epochs")
            found[setting, detail] = differences.against(
                records.by_seed(mine), records.by_seed(theirs))
    return found


# ---- other measures -----------------------------------------------------------------


def rescue_at(sparsity):
    """Return what finds in how many updates of criticality to a sparsity more than half
    of what was pruned came back. An update counts by the mean of the seeds, two at
    least, and only where r leaves room for more than half. In all of these the claim
    holds, else it does not."""
    def find(runs, drawn):
        texts, signs = [], []
        for setting, _, ours in settings(runs, WEIGHTS):
            logged = rescued_in(ours)
            if ours[0].config.get("sparsity") != sparsity or len(logged) < 2:
                continue
            shares, most = 100 * np.mean(logged, axis=0)  # [updates] each
            has_room = most > 50  # not so where nothing was pruned
            text = f"{setting}: "
            if rate := rate_of(ours):
                text += f"{rate}, "
            if has_room.any():
                shares, most = shares[has_room], most[has_room]
                more = int((shares > 50).sum())
                updates = "updates that have" if len(shares) > 1 else "update that has"
                text += (f"in {more} of the {len(shares)} {updates} room for it, "
                         f"{span(shares)} % of at most {span(most)}")
                signs.append(more == len(shares))
            else:
                text += "no update has room for it"
            texts.append(text)
        if signs:
            return HOLDS if all(signs) else FAILS, "; ".join(texts)
        return (UNTOLD, "; ".join(texts)) if texts else None
    return find


def span(values):
    """Return from where to where values lie, in whole numbers; one if these agree."""
    ends = dict.fromkeys(f"{end:.0f}" for end in (min(values), max(values)))
    return " to ".join(ends)


def rescued_in(runs):
    """Return which share of what an update prunes comes back in it, and how much could,
    for each run that logs them an array [2, updates]; NaN is a share of nothing. A run
    with fewer updates than another one is left out: its log is cut off.

    What comes back is a share r of what stays (Eq. 7), from all weights that are dead.
    So of what an update prunes no more comes back than that number.
    """
    logged = []
    for run in runs:
        try:
            rows = records.read(run, "updates.jsonl")
        except records.Unfit:
            continue
        logged.append([(row["survived"], min(1, row["regenerated"] / row["pruned"]))
                       if row.get("survived") is not None and row.get("pruned")
                       else (np.nan, np.nan) for row in rows])
    most = max(map(len, logged), default=0)
    return [np.transpose(shares) for shares in logged if len(shares) == most > 0]


def came_back(runs, drawn):
    """Say which share of the final weights and channels had come back."""
    if "survival" not in drawn:
        return None
    _, rows, used, _ = drawn["survival"]
    share_of = {row["what"]: row["share"] for row in rows}
    found = []
    for pruned in BASELINE:
        if f"alive {pruned}" in share_of:
            mine = next(run for run in used if run.pruned == pruned)
            found.append(f"{place_of(mine)}, {records.rates_of([mine])}: "
                         f"{share_of[f'alive {pruned}']:.1f} %")
    return EMPTY, (f"{'; '.join(found)}. The measure follows from r (Eq. 7), whatever "
                   f"ranks the weights: of channels it is r, of weights r or a little "
                   f"more; as published r times the share of the alive weights outside "
                   f"the classifier, or a little more")


def place_of(run):
    """Return what the runs of a figure share, in words."""
    return joined(groups.setting_of(run), groups.target_of(run),
                  published.words(run.config))


def epochs_given(runs, drawn):
    """Say what the ratio of epochs is, where there is IMP to compare with."""
    texts = []
    for setting, group, ours in settings(runs, WEIGHTS):
        tickets = records.by_method(group, WEIGHTS, "imp")
        if tickets:
            epochs, of_tickets = (
                records.listed(sorted({run.summary["epochs"] for run in mine}))
                for mine in (ours, tickets))
            texts.append(f"{epochs} epochs, IMP {of_tickets}")
    if texts:
        return EMPTY, ("2,260 and 3,100 epochs are those of LTH-SNN's schedule, 200 "
                       "those that criticality was given; here criticality has "
                       + "; ".join(dict.fromkeys(texts)))


def gain_in_importance(runs, drawn):
    """Return the verdict on the |gamma| of channels that one method alone kept. Means
    have to be further apart than their standard deviations."""
    if "importance" not in drawn:
        return None
    _, rows, used, _ = drawn["importance"]
    rows = [row for row in rows if row["normalisation"] == "share of the mean"]
    ours, theirs = ([(row["importance"], row["std"]) for row in rows
                     if row["method"] == method]
                    for method in ("criticality", BASELINE[CHANNELS]))
    (first, _), (mean, std) = ours[0], ours[-1]
    text = (f"criticality's go from {first:.2f} to {mean:.2f} of the network's mean, "
            f"slimming's from {theirs[0][0]:.2f} to {theirs[-1][0]:.2f}")
    if len({run.seed for run in used}) < 2:
        return UNTOLD, f"{place_of(used[0])}, one seed: {text}"
    text = f"{place_of(used[0])}: {text}"
    apart = [mean - other for other, _ in (ours[0], theirs[-1])]
    spread = [std + other for _, other in (ours[0], theirs[-1])]
    if all(gain > width for gain, width in zip(apart, spread)):
        return HOLDS, text
    is_against = any(gain < -width for gain, width in zip(apart, spread))
    return FAILS if is_against else UNTOLD, text


def in_classes(key, better):
    """Return what finds in which share of the classes criticality is better than the
    baseline, in each setting. In three of four or more everywhere the claim holds, in
    one of four or fewer somewhere it does not; settings of one seed do not count.

    key: of records.analysis_of. Runs that no figure has looked at are left out.
    """
    def find(runs, drawn):
        texts, shares = [], []  # shares: where there are several seeds
        for pruned, baseline in BASELINE.items():
            for setting, group, ours in settings(runs, pruned):
                both = [{run.seed: numbers for run in mine
                         if (numbers := analysis_at_hand(run))}
                        for mine in (ours, rivals_of(group, ours, baseline))]
                seeds = sorted(both[0].keys() & both[1].keys())
                if not seeds:
                    continue
                values = [np.array([mine[seed][key] for seed in seeds])
                          for mine in both]
                share = records.share_won(*values, better)
                target = joined(groups.target_of(ours[0]), rate_of(ours))
                text = (f"{setting}: {target} {better} in {100 * share:.0f} % of the "
                        f"classes")
                if len(seeds) > 1:
                    shares.append(share)
                else:
                    text += ", one seed"
                texts.append(text)
        if not texts:
            return None
        if shares and min(shares) >= 0.75:
            verdict = HOLDS
        else:
            verdict = FAILS if shares and min(shares) <= 0.25 else UNTOLD
        return verdict, "; ".join(texts)
    return find


def analysis_at_hand(run):
    """Return what records.analysis_of does where a figure has made it, else None: to
    compute it takes a while."""
    if "analysis" in run.files:
        return run.files["analysis"]
    with suppress(records.Unfit):
        return records.kept_analysis(run)[0] or None
    return None


CLAIMS = [
    Claim("criticality is above GMP at 90 %, by 0.3 to 1.8 points", "curves",
          against(WEIGHTS, "gmp", 0.9)),
    Claim("criticality is above GMP at 95 %, by 0.2 to 1.0 points", "curves",
          against(WEIGHTS, "gmp", 0.95)),
    Claim("criticality is above GMP at 98 %, by up to 0.8 points (once 0.03 below)",
          "curves", against(WEIGHTS, "gmp", 0.98)),
    Claim("criticality is above regeneration by gradient at the same r", "ratio",
          against(WEIGHTS, "gradient")),
    Claim("criticality is above random regeneration at the same r", "ratio",
          against(WEIGHTS, "random")),
    Claim("criticality is stable from r = 0.1 to 0.6 (here: differences to 0.1)",
          "ratio", over_rates, stable),
    Claim("criticality is above GMP at each length of pruning", "epochs",
          over_lengths, everywhere),
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
