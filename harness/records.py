"""Finished runs: find them, read them, choose those that may be compared.

    folders = records.find_runs("results/runs/methods")  # at any depth
    runs = [records.read_run(folder) for folder in folders]
    records.read(run, "updates.jsonl")                   # a file of a run, read once
    records.analysis_of(run)["variance"]                 # what its network shows
    records.compared(runs, "criticality", "baseline")    # equal but for the method
    records.command_of(run)                              # the command that makes it

A run has these attributes:

    folder      Path
    config      dict, config.json
    summary     dict, summary.json
    script      the script that made it, "prune_unstructured"
    method      "criticality", "gmp", ...
    seed        int
    pruned      "weights" or "channels"
    regen       regeneration rate r, the share of the alive that an update brought back;
                0 or None without regeneration; of GraNet its death rate, since as many
                weights grow as die
    files       dict, what read() has read

config["as_published"] lists what a run does as the published code, and not as the
paper's text; it is empty for the text.

A method that is named nowhere in this file is compared like the others: runs are told
apart by what their config.json and summary.json say.
"""
import hashlib
import json
import shlex
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import data
import metrics
import modelfile
from harness import flags
from harness import presets
from harness import processes
from harness import published
from harness import runfolder
from harness import setup
from harness.files import data_changes, data_of, save_arrays
from harness.machine import set_precision

WEIGHTS, CHANNELS = "weights", "channels"
ALGORITHMS = ("prune_unstructured", "prune_structured")  # Algorithms 1 and 2
BASELINE = {WEIGHTS: "gmp", CHANNELS: "slimming"}
# The order in which figures name the methods; those that are not here follow by name
METHODS = ("dense", "gmp", "slimming", "criticality", "gradient", "random", "granet",
           "greg1", "greg2", "imp", "eb", "et", "gradr", "deepr", "sdsnn", "pq",
           "stds", "upr", "upr-neurons", "ndsnn", "set", "rigl", "sca")

# The flags that are equal in runs that are compared
SHARED = ("dataset", "event_split", "model", "init", "width", "encoding", "tau",
          "threshold", "surrogate", "alpha", "reset", "detach_reset", "decay_input",
          "strict", "loss", "train_limit", "time_steps", "batch_size", "lr", "smoke",
          "epochs_finetune", "optimizer")
# More of them, by which compare.py tells rows apart, or tables (precision)
TRAINING = ("crop", "flip", "cutout", "rotate", "precision", "momentum", "weight_decay",
            "schedule", "as_published")
# Runs with equal items of --as-published have equal flags that these imply
SAME = {
    WEIGHTS: (*SHARED, *TRAINING, "epochs_prune", "sparsity", "interval", "aggregate",
              "candidates"),
    CHANNELS: (*SHARED, *TRAINING, "epochs_pretrain", "prune_ratio", "target_macs",
               "regen_base", "l1", "finetune_l1"),
}
# Of these, the flags that mean nothing to a method
MEANINGLESS = {
    "dense": {"sparsity", "interval", "aggregate", "candidates", "prune_ratio",
              "target_macs", "regen_base"},
    "gmp": {"aggregate", "candidates"},
    "slimming": {"regen_base"},
    "granet": {"aggregate", "candidates"},
    "greg1": {"regen_base", "l1"},
    "greg2": {"regen_base", "l1"},
}
# The keys of config.json that change nothing in a run: they are no flags, or say only
# where and on what it ran, what its epochs were chosen for, and how often it was
# evaluated and saved
NO_SETTINGS = flags.NO_FLAGS | flags.MAY_DIFFER | {"run_dir", "minutes"}
# Keys of summary.json that older runs lack
LATER_KEYS = {"as_published", "footprint_bytes", "neurobench"}


class Unfit(Exception):
    """A run that cannot be used for something: Unfit(run, why)."""


# ---- finding and reading ----------------------------------------------------------


def find_runs(folder):
    """Return the folders of runs at or below a folder, at any depth, by path: a folder
    with a config.json is a run."""
    return sorted(path.parent for path in Path(folder).rglob("config.json"))


def read_run(folder):
    """Return a finished run, with the attributes that the head of this file lists.

    Raises ValueError that says why the folder holds none.
    """
    folder = Path(folder)
    config = read_object(folder / "config.json", ("dataset", "model", "seed"),
                         "it is no run: it has no config.json")
    wanted = [key for key in runfolder.SUMMARY_KEYS if key not in LATER_KEYS]
    summary = read_object(folder / "summary.json", wanted,
                          "the run is not finished: it has no summary.json")
    method = summary["method"]
    script, config = as_written_today(summary["script"], method, config)
    # A flag that did not exist yet had its default
    config = presets.of("default") | dict(as_published=[]) | presets.of_earlier(config)
    by_channel = "target_macs" in config or "prune_ratio" in config
    rate = config["death_rate"] if script == "prune_granet" else summary["regen"]
    return SimpleNamespace(
        folder=folder, config=config, summary=summary, script=script, method=method,
        seed=summary["seed"], pruned=CHANNELS if by_channel else WEIGHTS, regen=rate,
        files={})


def read_object(path, wanted, absent):
    """Return the dict in a JSON file, which has all keys wanted.

    Raises ValueError: `absent` where there is no file, else what is wrong with it.
    """
    if not path.is_file():
        raise ValueError(absent)
    try:
        found = json.loads(path.read_text())
        lacks = [key for key in wanted if key not in found.keys()]
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"{path.name} is damaged") from None
    if lacks:
        raise ValueError(f"{path.name} has no {', '.join(lacks)}")
    return found


def as_written_today(script, method, config):
    """Return (script, config) of a run in the terms of today's scripts.

    GraNet was a metric of prune_unstructured.py, and --regen its death rate; GReg's two
    variants were methods of prune_structured.py. Their flags without a meaning go, and
    so does --compact, which left the results of a run as they were.
    """
    gone, added = {"compact"}, {}
    if (script, method) == ("prune_unstructured", "granet"):
        script, added = "prune_granet", {"death_rate": config["regen"]}
        gone |= {"regen", "metric", "aggregate", "candidates"}
    elif script == "prune_structured" and method in ("greg1", "greg2"):
        script = "prune_greg"
        gone |= {"regen", "metric", "regen_base", "l1", "finetune_l1"}
    elif script == "prune_structured":
        gone.add("epochs_prune")  # of GReg's stage: 0
    kept = {flag: value for flag, value in config.items() if flag not in gone}
    return script, kept | added | {"script": script}


def read(run, name):
    """Return what a file of a run holds: the rows of a .jsonl, the value of a .json,
    the arrays of an .npz. Raises Unfit."""
    path = run.folder / name
    if name not in run.files:
        try:
            if path.suffix == ".npz":
                with np.load(path) as file:
                    run.files[name] = dict(file)
            elif path.suffix == ".jsonl":
                rows = [json.loads(row) for row in path.read_text().splitlines()]
                if not all(isinstance(row, dict) for row in rows):
                    raise ValueError
                run.files[name] = rows
            else:
                run.files[name] = json.loads(path.read_text())
        except FileNotFoundError:
            raise Unfit(run, f"it has no {name}") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            raise Unfit(run, f"{name} is damaged") from None
    return run.files[name]


def folders_of(named, without):
    """Return the folders of runs at or below those named, each once, in this order.

    One that holds no run stays, to be reported. named None: those below runs/, but for
    the folder `without`.
    """
    if named is None:
        return [folder for folder in find_runs("runs")
                if without not in folder.parents]
    found = []
    for folder in named:
        found += find_runs(folder) or [Path(folder)]
    return list(dict.fromkeys(found))


def read_runs(folders):
    """Return the finished runs of folders; the others are printed, with the reason."""
    runs, skipped = [], {}
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except ValueError as error:
            skipped.setdefault(str(error), []).append(str(folder))
    for why, names in skipped.items():
        print(f"skipped {', '.join(names)}: {why}")
    if note := note_of_data(runs):
        print(note)
    return runs


# ---- what a trained network shows --------------------------------------------------


def analysis_of(run):
    """Return what analysis.npz of a run holds, a dict of arrays. Raises Unfit.

    Where there is no such file, a damaged one, one of another model.pt than is there
    now, or an older one without the keys *_published, it is computed from model.pt and
    the images, in eval mode and without augmentation, and kept where the folder can be
    written to. A file whose network is gone is returned as it is. K classes, C channels
    of a LIF layer:

        variance              [K]  intra-cluster variance of each class, test set
        similarity            [K]  cosine of its mean features in training and test set
        variance_published    [K]  the same two, with the features of the published code
        similarity_published  [K]
        entropy/LIF           [C]  entropy of the spike counts, bits, test set
        criticality/LIF       [C]  score of the channels (Eq. 6), test set
        rate/LIF              []   firing rate, spikes a step and neuron, test set
        sops/LAYER            []   synaptic operations an image, test set
        made_from             []   hash of the model.pt
    """
    if "analysis" in run.files:
        return run.files["analysis"]
    run.files["analysis"] = found = _current_analysis(run)
    return found


def kept_analysis(run):
    """Return what analysis.npz of a run holds, {} where it cannot be used; the hash of
    the model.pt that is there now, "" if there is none; and what is wrong with the
    file, in words. Raises Unfit if it is damaged and its network is gone."""
    path, network = run.folder / "analysis.npz", run.folder / "model.pt"
    now = ""
    if network.exists():
        now = hashlib.sha256(network.read_bytes()).hexdigest()
    if not path.exists():
        return {}, now, ""
    try:
        old = read(run, path.name)
    except Unfit:
        if not now:
            raise
        return {}, now, "is damaged"
    made_from = str(old.get("made_from", ""))  # older files do not say
    if now and made_from not in ("", now):
        return {}, now, f"is of another {network.name} than is there now"
    return old, now, ""


def _current_analysis(run):
    old, now, wrong = kept_analysis(run)
    if "variance_published" in old:
        return old
    try:
        found = analyse(run)
    except Unfit:
        if old:
            return old
        raise
    found["made_from"] = np.array(now)
    path = run.folder / "analysis.npz"
    try:
        save_arrays(path, found)
    except OSError as error:  # the numbers are here; the next time they are computed
        reason = str(error).partition(", expected ")[0]
        print(f"note: {reason}; the analysis is not kept")
    else:
        if wrong:
            print(f"note: {path} {wrong}: made anew")
    return found


def analyse(run):
    """Compute what analysis_of() describes. Raises Unfit."""
    set_precision()  # what is kept must not depend on the machine's TF32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        packed = modelfile.read(run.folder / "model.pt")
        net = modelfile.unpack(packed, run.folder / "model.pt")
        images = setup.load(SimpleNamespace(**run.config), device)
    except (OSError, ValueError) as error:
        raise Unfit(run, " ".join(str(error).split())) from None
    changes = data_changes(run.config.get("data"), data_of(images))
    if changes:
        raise Unfit(run, f"its data have changed: {'; '.join(changes)}")
    net = net.to(device, memory_format=torch.channels_last)
    masks = {name: mask.to(device) for name, mask in packed["masks"].items()}
    train = list(images.pairs("train", run.config["batch_size"]))
    test = list(images.pairs("test", run.config["batch_size"]))
    bar = tqdm(total=len(train) + 3 * len(test), desc=run.folder.name, unit="batch",
               leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())

    def counted(batches):
        for batch in batches:
            yield batch
            bar.update()

    def test_images():
        return counted(x for x, _ in test)

    with bar:
        of_train = metrics.class_statistics(net, counted(train), images.num_classes)
        of_test = metrics.class_statistics(net, counted(test), images.num_classes)
        spikes = metrics.spike_counts(net, test_images())
        counts = metrics.count(net, test_images(), masks)

    found = {}
    for kind, suffix in (("unit", ""), ("published", "_published")):
        (train_mean, _), (test_mean, variance) = of_train[kind], of_test[kind]
        cosine = torch.cosine_similarity(train_mean, test_mean)
        found[f"variance{suffix}"] = variance.cpu().numpy()
        found[f"similarity{suffix}"] = cosine.cpu().numpy()
    for name, (entropy, score) in spikes.items():
        found[f"entropy/{name}"] = entropy.cpu().numpy()
        found[f"criticality/{name}"] = score.cpu().numpy()
    for name, rate in counts["firing_rates"].items():
        found[f"rate/{name}"] = np.array(rate)
    for name, sops in counts["layer_sops"].items():
        found[f"sops/{name}"] = np.array(sops)
    return found


def layers_of(run, kind):
    """Return {layer: value} of one kind, "entropy" say, of what analysis_of() has."""
    prefix = f"{kind}/"
    found = analysis_of(run)
    return {name.removeprefix(prefix): value for name, value in found.items()
            if name.startswith(prefix)}


# ---- which runs may be compared ----------------------------------------------------


def note_of_data(runs):
    """Return a line for runs whose flags name the same data, but whose data differ, as
    after a file was written anew; "" where there are none, or none that say."""
    groups, found = {}, []
    for run in runs:
        named = values_of(run, ("dataset", "train_limit", "time_steps", "event_split",
                                "smoke"))
        first = groups.setdefault(named, run)
        if not isinstance(first.config.get("data"), dict):
            groups[named] = run  # of an older version: it does not say
        elif isinstance(run.config.get("data"), dict):
            changes = data_changes(first.config["data"], run.config["data"])
            if changes:
                found.append(f"{run.folder} ({'; '.join(changes)})")
    if not found:
        return ""
    more = ", ..." if len(found) > 1 else ""
    return (f"note: {len(found)} of {len(runs)} runs were made with other data under "
            f"the same name: {found[0]}{more}. They should not be compared")


def in_order(methods):
    """Return names of methods, each once: as in METHODS, then the others by name."""
    methods = set(methods)
    known = [method for method in METHODS if method in methods]
    return known + sorted(methods.difference(METHODS))


def rankings(runs):
    """Return the metrics by which runs of Algorithms 1 and 2 regenerated."""
    return in_order(run.method for run in runs
                    if run.script in ALGORITHMS and run.regen)


def meaningless_to(run):
    """Return the flags of SAME that mean nothing to a run: those listed for its method;
    for a script other than the two algorithms those that it does not have, and the
    weight decay, which is its own."""
    found = set(MEANINGLESS.get(run.method, ()))
    if run.script not in ALGORITHMS:
        found |= {flag for flag in SAME[run.pruned] if flag not in run.config}
        found.add("weight_decay")
    return found


def values_of(run, flags):
    """Return the values of some flags of a run, a tuple that can be a key."""
    values = [run.config.get(flag) for flag in flags]
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def is_same(run, flag, own, value):
    """Return whether a run, whose flag has the value `own`, is as one of `value`. Items
    of --as-published that change nothing in the run do not count."""
    if flag != "as_published":
        return own == value
    args = SimpleNamespace(**run.config)
    own, value = ([item for item in items if published.idle(args, item) is None]
                  for items in (own or (), value or ()))
    return own == value


def comparable_groups(runs, pruned, free=()):
    """Return lists of runs that may be compared, the largest first.

    pruned: WEIGHTS or CHANNELS. All runs of a group agree in each flag that SAME names
    and that means something to them; free: flags that may differ. Of two runs of one
    method, rate and seed the first counts.
    """
    mine = [run for run in runs if run.pruned == pruned]
    same = [flag for flag in SAME[pruned] if flag not in free]
    # Groups form around the runs to which each flag means something
    anchors = [run for run in mine if not meaningless_to(run)] or mine
    settings = dict.fromkeys(values_of(run, same) for run in anchors)
    groups = []
    for setting in settings:
        members = {}
        for run in mine:
            meaningless = meaningless_to(run)
            agrees = all(flag in meaningless or is_same(run, flag, own, value)
                         for flag, own, value
                         in zip(same, values_of(run, same), setting))
            if agrees:
                key = (run.method, run.regen or 0, run.seed, values_of(run, free))
                members.setdefault(key, run)
        groups.append(list(members.values()))
    return sorted(groups, key=len, reverse=True)


def paper_rate(run):
    """Return the paper's regeneration rate r for the target of a run: that of the
    nearest sparsity, or share of the channels, which the paper lists."""
    config = run.config
    if run.script == "prune_granet":
        return presets.of(config["dataset"], "granet")["death_rate"]
    if run.pruned == WEIGHTS:
        rates = presets.of(config["dataset"], "unstructured")["regen_rates"]
        target = config.get("sparsity")
    else:
        rates = presets.channel_rates(config["model"])
        target = config.get("prune_ratio")
    if target is None:  # --target-macs: as in prune_structured.py, the first one
        return next(iter(rates.values()))
    return presets.nearest(rates, target)


def runs_of(group, method):
    """Return the runs of a method in a group, by seed, at one regeneration rate.

    Of several rates the paper's for this target counts; where it is not at hand, the
    one with the most seeds, then the nearest to the paper's, of two as near the higher
    one; never the one with the best result.
    """
    mine = [run for run in group if run.method == method]
    if not mine:
        return []
    usual = paper_rate(mine[0])
    seeds = Counter(run.regen or 0 for run in mine)
    # rounded: 0.1 and 0.3 are as near to 0.2
    rate = max(seeds, key=lambda rate: (rate == usual, seeds[rate],
                                        -round(abs(rate - usual), 9), rate))
    return sorted((run for run in mine if (run.regen or 0) == rate),
                  key=lambda run: run.seed)


def compared(runs, *methods):
    """Return {pruned: {method: runs}}, pruned being WEIGHTS, CHANNELS or both.

    The runs are of the first group that has all methods named, at the seeds that these
    share; with none named, all methods of the first group. "baseline" is GMP, or
    network slimming.
    """
    found = {}
    for pruned, baseline in BASELINE.items():
        names = [baseline if name == "baseline" else name for name in methods]
        for group in comparable_groups(runs, pruned):
            seeds = {run.seed for run in group}
            for name in names:
                seeds &= {run.seed for run in runs_of(group, name)}
            if seeds:
                found[pruned] = {
                    name: [run for run in runs_of(group, name) if run.seed in seeds]
                    for name in in_order(names or {run.method for run in group})}
                break
    return found


def with_controls(runs, panels):
    """Add the runs that regenerated by another metric to panels, which
    compared(runs, "criticality", "baseline") returned, and return these.

    They are added where they have the rate and the seeds of the criticality runs.
    """
    rates = {pruned: methods["criticality"][0].regen
             for pruned, methods in panels.items()}
    for method in rankings(runs):
        if method == "criticality":
            continue
        at_rate = [run for run in runs
                   if run.method != method or run.regen == rates.get(run.pruned)]
        beside = compared(at_rate, "criticality", "baseline", method)
        for pruned, found in beside.items():
            ours, theirs = panels[pruned]["criticality"], found["criticality"]
            if [run.folder for run in ours] == [run.folder for run in theirs]:
                panels[pruned][method] = found[method]
    return panels


def all_runs(panels):
    """Return the runs of all panels that compared() returned, in one list."""
    return [run for methods in panels.values() for runs in methods.values()
            for run in runs]


# ---- parts of a group -------------------------------------------------------------


def share_won(found, base, better):
    """Return in which share of the classes, each seed counted, found is better than
    base. better: "lower" or "higher"."""
    return (found < base if better == "lower" else found > base).mean()


def values_of_classes(methods, key):
    """Return {method: a number of each class, [seeds, K]}. methods: {method: runs}."""
    return {method: np.array([analysis_of(run)[key] for run in mine])
            for method, mine in methods.items()}


def by_method(used, pruned, method):
    """Return the runs of a method. pruned: WEIGHTS or CHANNELS."""
    return [run for run in used if (run.pruned, run.method) == (pruned, method)]


def by_seed(runs):
    """Return {seed: run}, as differences.against takes it."""
    return {run.seed: run for run in runs}


# ---- what a run is, in words -------------------------------------------------------


def command_of(run):
    """Return the command that makes a run: each flag of its config.json that is not a
    default of all scripts nor one of NO_SETTINGS, and that --as-published does not set.
    """
    usual = presets.of(run.config["dataset"]) | dict(as_published=[])
    if run.pruned == CHANNELS:
        usual["weight_decay"] = None  # always written: it differs between scripts
    own = presets.of(run.config["dataset"], run.script.removeprefix("prune_"))
    usual |= {flag: own[flag] for flag in ("optimizer", "schedule")}
    words = [*processes.starter(run.config.get("processes", 1)), f"{run.script}.py"]
    implied = published.implied(run.config)
    for flag, value in run.config.items():
        name = flag.replace("_", "-")
        if flag in NO_SETTINGS or flag.startswith("version_") or value is None:
            continue
        if flag in implied or (flag in usual and usual[flag] == value):
            continue
        if value is True:
            words.append(f"--{name}")
        elif value is False:
            if flag in usual:
                words.append(f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def class_names_of(run):
    """Return the names of the classes of a run's data, a list; None where its
    config.json has none. Older runs do not say; of Fashion-MNIST they are known."""
    found = run.config.get("data")
    if isinstance(found, dict):
        return found.get("class_names")
    if run.config["dataset"] in ("fashion-mini", "fashion-mnist"):
        return list(data.FASHION)
    return None


def rates_of(runs):
    """Return the regeneration rates of runs in words, "r = 0.5"; where weights and
    channels have rates, "r = 0.5 (weights), 0.3 (channels)"; "" where there is none."""
    found = {}
    for pruned in BASELINE:
        mine = [run for run in runs if run.pruned == pruned and run.regen]
        rates = sorted({run.regen for run in mine})
        if rates:
            found[pruned] = ", ".join(f"{rate:g}" for rate in rates)
    if not found:
        return ""
    if len(found) == 1:
        return f"r = {', '.join(found.values())}"
    return f"r = {by_pruned(found)}"


def updates_of(runs):
    """Return in words how many updates the runs that regenerate weights have, and
    after how many steps: "30 updates, one every 25 steps"; "" where no run regenerates
    weights."""
    mine = [run for run in runs if run.pruned == WEIGHTS and run.regen]
    steps = listed(sorted({run.config["interval"] for run in mine
                           if run.config.get("interval")}))
    if not steps:
        return ""
    counts = set()
    for run in mine:
        try:
            counts.add(len(read(run, "updates.jsonl")))
        except Unfit:  # the steps suffice
            continue
    if counts:
        return f"{listed(sorted(counts))} updates, one every {steps} steps"
    return f"an update every {steps} steps"


def by_pruned(found):
    """Return {"weights": text, "channels": text} as "text (weights), text
    (channels)"."""
    return ", ".join(f"{text} ({pruned})" for pruned, text in found.items())


def readings_of(runs):
    """Return in words what runs do as the published code, "as published" or "published
    cosine"; "" where all are the paper's text."""
    found = {}
    for pruned in BASELINE:
        mine = [published.words(run.config) or "as the text" for run in runs
                if run.pruned == pruned]
        if mine:
            found[pruned] = listed(mine)
    texts = set(found.values())
    if texts <= {"as the text"}:
        return ""
    return texts.pop() if len(texts) == 1 else by_pruned(found)


def listed(values):
    """Return values in words, each once, without None."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def aim_of(run):
    """Return what a run was asked to prune, in words; None for a dense one."""
    if run.method == "dense":
        return None
    if run.pruned == WEIGHTS:
        # None where the sparsity is the method's own outcome
        sparsity = run.config.get("sparsity") or run.summary["sparsity"]
        return f"{100 * sparsity:g} % of the weights pruned"
    if run.config.get("target_macs") is not None:
        return f"{100 * run.config['target_macs']:g} % of the MACs removed"
    return f"{100 * run.config['prune_ratio']:g} % of the channels pruned"


def describe(runs, with_settings=True):
    """Return in a line what runs have in common: data set, network, what was pruned,
    the reading if it is not the text's, seeds, how many they are; with_settings: also
    the rates and the number of updates."""
    dataset = listed(run.config["dataset"] for run in runs)
    if limits := listed(run.config.get("train_limit") for run in runs):
        dataset += f" (training images: {limits})"
    if any(run.folder.parent.name == "demo" for run in runs):
        dataset = f"demo, short runs; {dataset}"
    model = listed(run.config["model"] for run in runs)
    aim = listed(aim_of(run) for run in runs) or "dense"
    seeds = f"seeds {listed(sorted({run.seed for run in runs}))}"
    settings = [rates_of(runs), updates_of(runs)] if with_settings else []
    parts = [dataset, model, aim, readings_of(runs), *settings, seeds,
             f"{len(runs)} runs"]
    return "; ".join(part for part in parts if part)
