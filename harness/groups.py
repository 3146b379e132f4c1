"""Finished runs as the rows of tables: which of them are one row, and its numbers.

    found, notes = groups.gather(Path("runs/compare"))  # runs of a row, what is missing
    tables = groups.tabulate(found)                     # {setting: rows}
    tables = groups.tabulate(found, "criticality")      # differences to this row

A row is named after its method and what its runs differ in from others of that method.
"""
from decimal import Decimal
from pathlib import Path

import numpy as np

from harness import differences
from harness import plots
from harness import presets
from harness import published
from harness import records
from harness.jobs import log_of

# A row is not named after these values: they are our reading of the paper
USUAL = dict(aggregate="max", candidates="all")
# What does not make runs of one method differ: the target is a column of its own,
# a death rate counts as a regeneration rate, `regen`, and published.words() has
# words for the items of --as-published
NO_VARIANT = {*records.NO_SETTINGS, "as_published", "seed", "sparsity", "target_macs",
              "prune_ratio", "data_dir", "death_rate"}


# ---- what a run is ------------------------------------------------------------------


def settings_of(run):
    """Return {flag: words} of what the runs of a table share: data set, network, T and
    epochs, and each flag that is not the usual one. What --as-published has set stands
    in the name of a row."""
    config, usual = run.config, presets.of(run.config["dataset"])
    is_cut_later = run.pruned == records.CHANNELS and "epochs_pretrain" in config
    first = "epochs_pretrain" if is_cut_later else "epochs_prune"
    words = dict(
        dataset=Path(config["dataset"]).stem, model=config["model"],
        time_steps=f"T = {config['time_steps']}",
        epochs=f"{config.get(first)} + {config['epochs_finetune']} epochs")
    said = {*words, "epochs_finetune"} | published.implied(config)
    for flag in (*records.SHARED, "precision"):
        if flag not in said and config.get(flag) != usual.get(flag):
            words[flag] = f"{flag.replace('_', ' ')} {config.get(flag)}"
    return words


def setting_of(run, without=None):
    """Return what the runs of a table share, in words: "weights: fashion-mini, ...".
    without: a flag that is left out."""
    if str(without).startswith("epochs_"):
        without = "epochs"
    words = [text for flag, text in settings_of(run).items() if flag != without]
    return f"{run.pruned}: {', '.join(words)}"


def target_of(run):
    """Return what a run was asked for, in words."""
    config = run.config
    if run.method == "dense":
        return "-"
    if run.pruned == records.CHANNELS:
        if config.get("target_macs") is not None:
            return f"-{percent(config['target_macs'])} % MACs"
        return f"-{percent(config['prune_ratio'])} % channels"
    if config.get("sparsity"):
        return f"{percent(config['sparsity'])} % sparse"
    return "-"


def percent(share):
    """Return a share in percent with all of its digits, so that two shares that differ
    have other words: 0.9000001 is "90.00001"."""
    return f"{(100 * Decimal(str(share))).normalize():f}"


def by_size(target):
    """Return the key that sorts targets: none, then each kind from the smallest on."""
    number, _, kind = target.partition(" % ")
    return (kind, abs(float(number))) if kind else ("", 0)


# ---- the rows -----------------------------------------------------------------------


def gather(*folders):
    """Return ({(setting, target, method): {seed: run}}, {place: why}), the runs below
    folders, and what is not finished there.

    Where runs of a method differ in more than the seed, its name says in what; of two
    that do not differ the first counts, in the order of the folders and then of paths.
    """
    found, notes = {}, {}
    for folder in folders:
        logs = {path.with_suffix("") for path in folder.rglob("*.log")}
        for place in sorted({*records.find_runs(folder), *logs}):
            try:
                run = records.read_run(place)
            except ValueError as error:
                why, log = f"not finished: {error}", log_of(place)
                notes[str(place)] = f"{why}; see {log}" if log.exists() else why
                continue
            key = setting_of(run), target_of(run), run.method
            found.setdefault(key, {})[run.folder] = run

    told_apart = {}
    for (setting, target, method), runs in found.items():
        variants = [variant_of(run) for run in runs.values()]
        names = dict.fromkeys(flag for variant in variants for flag in variant)
        vary = [flag for flag in names if len({
            str(variant.get(flag)) for run, variant in zip(runs.values(), variants)
            if flag not in published.implied(run.config)}) > 1]
        for run, variant in zip(runs.values(), variants):
            words = [words_of(flag, variant[flag]) for flag in vary
                     if flag in variant and variant[flag] != USUAL.get(flag)]
            reading = published.words(run.config)
            name = ", ".join(filter(None, [method, reading, *words]))
            seeds = told_apart.setdefault((setting, target, name), {})
            seeds.setdefault(run.seed, run)
    return told_apart, notes


def words_of(flag, value):
    return f"{flag.replace('_', ' ')} {value}"


def variant_of(run):
    """Return {flag: value} of what tells runs of one method apart, seed, target and
    what --as-published sets not among it. A flag that is off is as one that the run's
    version did not have."""
    values = run.config | {"regen": run.regen or None}
    hidden = NO_VARIANT | published.implied(run.config)
    return {flag: value for flag, value in values.items()
            if value is not None and value is not False
            and flag not in hidden and not flag.startswith("version_")}


def cost(run):
    """Return the epochs of a run, each weighted by density and time steps."""
    return run.summary["training_cost"] * run.summary["epochs"]


def rescued(run):
    """Return which share of what an update prunes comes back in it, mean over the
    updates of a run; NaN where it has no log of them."""
    try:
        shares = [row.get("survived") for row in records.read(run, "updates.jsonl")]
    except records.Unfit:
        return np.nan
    shares = [share for share in shares if share is not None]
    return np.mean(shares) if shares else np.nan


def tabulate(found, versus=None):
    """Return {setting: rows}; rows are dicts with the numbers behind COLUMNS. The p of
    the differences is corrected for how many there are in a table.

    versus: the method to take differences to, by its name in the table. Raises
    ValueError where there is none of this name.
    """
    names = {method for _, _, method in found}
    if versus is not None and versus not in names:
        raise ValueError(f"--baseline is {versus}, expected a method as the table "
                         f"names it. Choose one of: {'; '.join(sorted(names))}")
    tables = {}
    for (setting, target, method), by_seed in found.items():
        name = versus or records.BASELINE[next(iter(by_seed.values())).pruned]
        level = "-" if style_name(name) == "dense" else target
        if versus is None:
            name = baseline_of(method, name, [other for place, mark, other in found
                                              if (place, mark) == (setting, level)])
        baseline = found.get((setting, level, name), {})
        dense = [cost(run) for (kind, _, other), runs in found.items()
                 for run in runs.values()
                 if (kind, style_name(other)) == (setting, "dense")]
        tables.setdefault(setting, []).append(
            dict(setting=setting, method=method, target=target, baseline=name)
            | row_of(by_seed, baseline, dense))
    for rows in tables.values():
        corrected = differences.holm([row["p"] for row in rows])
        for row, p in zip(rows, corrected):
            row["p"] = p
        rows.sort(key=lambda row: (by_size(row["target"]), -row["accuracy"]))
    return dict(sorted(tables.items(), key=lambda item: (-len(item[1]), item[0])))


def baseline_of(method, baseline, names):
    """Return the name of the row that a row is compared with.

    method: the name of the row. baseline: the method to compare with. names: of all
    rows. Where its runs differ, in --interval say, it has several: the one with the
    fewest words counts, of those whose words the row's own name has as well.
    """
    said = set(method.split(", ")[1:])
    own = [name for name in names if style_name(name) == baseline
           and said.issuperset(name.split(", ")[1:])]
    return min(own, key=lambda name: (name.count(", "), name), default=baseline)


def row_of(by_seed, baseline, dense):
    """Return the numbers of a row: means over its runs, {seed: run}.

    baseline: {seed: run}; dense: the costs of the dense runs.
    """
    runs = list(by_seed.values())

    def mean(key, factor=1.0):
        values = [run.summary[key] for run in runs]
        return np.nan if None in values else factor * np.mean(values)

    accuracy, std = plots.spread([100 * run.summary["test_accuracy"] for run in runs])
    difference = differences.against(by_seed, baseline)
    faster = come_back = np.nan
    if runs[0].pruned == records.CHANNELS:
        faster = mean("speedup_batch32")
    if runs[0].regen:
        come_back = 100 * np.mean([rescued(run) for run in runs])
    # NaN: without an epoch there is no cost to compare with
    usual_cost = (np.mean(dense) if dense else runs[0].summary["epochs"]) or np.nan
    numbers = {flag: value for flag, value in variant_of(runs[0]).items()
               if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return dict(
        pruned=runs[0].pruned, numbers=numbers, like=likeness(runs[0], numbers),
        accuracy=accuracy, std=std, against=difference.mean, half=difference.half,
        p=difference.p,
        seeds=" ".join(str(seed) for seed in sorted(by_seed)),
        sparsity=mean("sparsity", 100), macs=mean("macs", 1e-6),
        sops=mean("sops", 1e-3), energy=mean("energy_mj", 1e3), faster=faster,
        back=mean("survived_by_regeneration", 100), rescued=come_back,
        training_cost=np.mean([cost(run) for run in runs]) / usual_cost)


def likeness(run, numbers):
    """Return {flag: what a run has in common, in all but this number, with the runs
    that it is a line with: a key, and the setting of all lines in a panel}."""
    rest = variant_of(run) | dict(
        reading=published.words(run.config), method=run.method, target=target_of(run))
    return {flag: (str(sorted((key, value) for key, value in rest.items()
                              if key != flag)), setting_of(run, flag))
            for flag in numbers}


def style_name(method):
    """Return the method whose colour a row has: its name without what it differs in."""
    return method.partition(",")[0]


def key_of(row):
    return row["setting"], row["target"], row["method"]
