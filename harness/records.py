"""Finished runs: their folders, which of them may be compared, what can be seen inside.

    runs = [records.read_run(folder) for folder in folders]
    records.read(run, "updates.jsonl")               # a file of a run, read once
    records.look(run)["variance"]                    # what its network shows on the data, kept
    records.compared(runs, "criticality", "baseline")  # at equal data, network, target, seeds
    records.command(run)                             # the command that makes it
"""
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

from harness import flags
import metrics
import models
from harness import runfolder
import training
from harness.files import save_arrays

WEIGHTS, CHANNELS = "prune_unstructured", "prune_structured"
BASELINE = {WEIGHTS: "gmp", CHANNELS: "slimming"}
USUAL_RATE = {WEIGHTS: 0.5, CHANNELS: 0.3}
METHODS = ("dense", "gmp", "slimming", "criticality", "gradient", "random", "granet", "greg1",
           "greg2")

# Flags that must be equal in runs that are compared, and those that mean nothing to a method
BOTH = ("dataset model width encoding tau threshold surrogate reset loss train_limit time_steps "
        "batch_size lr smoke epochs_finetune").split()
SAME = {WEIGHTS: BOTH + "epochs_prune sparsity interval aggregate candidates".split(),
        CHANNELS: BOTH + "epochs_pretrain prune_ratio target_macs regen_base l1 "
                         "finetune_l1".split()}
LOOSE = {"dense": {"sparsity", "interval", "aggregate", "candidates", "prune_ratio", "target_macs",
                   "regen_base"},
         "gmp": {"aggregate", "candidates"}, "slimming": {"regen_base"},
         "greg1": {"regen_base", "l1"}, "greg2": {"regen_base", "l1"}}
NOT_FLAGS = {"run_dir", "script", "device", "device_name", "threads", "processes", "commit"}


class Unfit(Exception):
    """A run that cannot be used for something: Unfit(run, why)."""


# ---- reading -------------------------------------------------------------------------------------


def read_run(folder):
    """Return a finished run: its folder, config and summary, the keys by which runs are compared.
    Raises ValueError that says why it is none."""
    folder, found = Path(folder), {}
    for name, absent in (("config", "it is no run: it has no config.json"),
                         ("summary", "the run is not finished: it has no summary.json")):
        path = folder / f"{name}.json"
        if not path.is_file():
            raise ValueError(absent)
        wanted = ("dataset", "model", "seed") if name == "config" else runfolder.SUMMARY_KEYS
        try:
            found[name] = json.loads(path.read_text())
            lacks = [key for key in wanted if key not in found[name].keys()]
        except (OSError, ValueError, AttributeError):
            raise ValueError(f"{name}.json is damaged") from None
        if lacks:
            raise ValueError(f"{name}.json has no {', '.join(lacks)}")
    summary = found["summary"]
    found["config"] = flags.COMMON | found["config"]  # of a time when some flags were not there
    return SimpleNamespace(folder=folder, **found, files={}, **{
        key: summary[key] for key in ("script", "method", "regen", "seed")})


def read(run, name):
    """Return what a file of a run holds: the rows of a .jsonl, the value of a .json, the arrays of
    an .npz. Raises Unfit."""
    path = run.folder / name
    if name not in run.files:
        try:
            if path.suffix == ".npz":
                with np.load(path) as file:
                    run.files[name] = dict(file)
            elif path.suffix == ".jsonl":
                run.files[name] = [json.loads(row) for row in path.read_text().splitlines()]
            else:
                run.files[name] = json.loads(path.read_text())
        except FileNotFoundError:
            raise Unfit(run, f"it has no {name}") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            raise Unfit(run, f"{name} is damaged") from None
    return run.files[name]


def look(run):
    """Return what analysis.npz holds, a dict of arrays; where it is not there yet it is made, from
    model.pt and the images, in eval mode and without augmentation. Raises Unfit.

    variance: [K], of each class in the test set. similarity: [K], the cosine between the mean
    features of training and test set. entropy/LIF and criticality/LIF: [C]; rate/LIF, sops/LAYER:
    numbers; over the test set.
    """
    path = run.folder / "analysis.npz"
    if path.exists():
        return read(run, path.name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        packed = models.read(run.folder / "model.pt")
        net = models.unpack(packed, run.folder / "model.pt")
        images = training.load(SimpleNamespace(**run.config), device)
    except (OSError, ValueError) as error:
        raise Unfit(run, " ".join(str(error).split())) from None
    net = net.to(device, memory_format=torch.channels_last)
    train, test = (list(images.pairs(split, run.config["batch_size"]))
                   for split in ("train", "test"))
    with tqdm(total=len(train) + 3 * len(test), desc=run.folder.name, unit="batch", leave=False,
              dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        def stream(batches):
            for batch in batches:
                yield batch
                bar.update()

        of_train, _ = metrics.class_statistics(net, stream(train), images.num_classes)
        of_test, variance = metrics.class_statistics(net, stream(test), images.num_classes)
        seen = metrics.spike_counts(net, stream(x for x, _ in test))
        counts = metrics.count(net, stream(x for x, _ in test), {
            name: mask.to(device) for name, mask in packed["masks"].items()})
    found = dict(variance=variance, similarity=torch.cosine_similarity(of_train, of_test))
    found |= {f"entropy/{name}": entropy for name, (entropy, _) in seen.items()}
    found |= {f"criticality/{name}": score for name, (_, score) in seen.items()}
    found = {name: value.cpu().numpy() for name, value in found.items()}
    found |= {f"rate/{name}": np.array(rate) for name, rate in counts["firing_rates"].items()}
    found |= {f"sops/{name}": np.array(sops) for name, sops in counts["layer_sops"].items()}
    save_arrays(path, found)
    run.files[path.name] = found
    return found


def layers_of(run, kind):
    """Return {layer: value} of one kind ("entropy", "rate", ...) of what look() sees."""
    return {name.partition("/")[2]: value for name, value in look(run).items()
            if name.startswith(f"{kind}/")}


# ---- comparing -----------------------------------------------------------------------------------


def groups(runs, script, free=()):
    """Return lists of runs that may be compared, the largest first: equal in all that SAME names.
    free: flags that may differ. Of two runs of one method, rate and seed the first counts."""
    mine = [run for run in runs if run.script == script]
    same = [flag for flag in SAME[script] if flag not in free]
    anchors = [run for run in mine if run.method not in LOOSE] or mine
    found = []
    for values in dict.fromkeys(tuple(run.config.get(flag) for flag in same) for run in anchors):
        members = {}
        for run in mine:
            if all(run.config.get(flag) == value for flag, value in zip(same, values)
                   if flag not in LOOSE.get(run.method, ())):
                members.setdefault((run.method, run.regen, run.seed,
                                    *(run.config.get(flag) for flag in free)), run)
        found.append(list(members.values()))
    return sorted(found, key=len, reverse=True)


def of(group, method):
    """Return the runs of a method, by seed: of several regeneration rates those of the one with the
    most seeds, then of the one nearest to the paper's (never of the one that came out best)."""
    rates = Counter(run.regen or 0 for run in group if run.method == method)
    rate = max(rates, default=0, key=lambda r: (rates[r], -abs(r - USUAL_RATE[group[0].script])))
    return sorted((run for run in group if (run.method, run.regen or 0) == (method, rate)),
                  key=lambda run: run.seed)


def compared(runs, *methods):
    """Return {script: {method: runs}}, for weights and for channels: of the first group that has
    the methods named, these at the seeds that they share; with none named, all of the group.
    "baseline" is gmp or slimming."""
    found = {}
    for script in BASELINE:
        names = [BASELINE[script] if name == "baseline" else name for name in methods]
        for group in groups(runs, script):
            seeds = {run.seed for run in group}.intersection(
                *({run.seed for run in of(group, name)} for name in names))
            if seeds:
                found[script] = {
                    name: kept for name in METHODS if name in (names or METHODS) and (
                        kept := [run for run in of(group, name) if run.seed in seeds])}
                break
    return found


def controls(runs, panels):
    """Add the runs that regenerated by gradient and at random to what compared() found, where they
    are beside the same criticality runs, at their rate and seeds."""
    for method in ("gradient", "random"):
        for script, found in compared(runs, "criticality", "baseline", method).items():
            ours, theirs = ([run.folder for run in those["criticality"]]
                            for those in (panels[script], found))
            if ours == theirs and found[method][0].regen == found["criticality"][0].regen:
                panels[script][method] = found[method]
    return panels


def flat(panels):
    """Return all runs of what compared() found."""
    return [run for methods in panels.values() for runs in methods.values() for run in runs]


def command(run):
    """Return the command that makes a run: each flag of its config.json that is not a default."""
    config = {flag: value for flag, value in run.config.items()
              if flag not in NOT_FLAGS and not flag.startswith("version_")}
    usual = flags.COMMON | flags.DATASETS.get(config["dataset"], flags.DATASETS["fashion-mini"])
    if run.script == CHANNELS:
        usual["weight_decay"] = None  # there it depends on the method
    ranks = run.config.get("processes", 1)
    words = [*(["python"] if ranks == 1 else ["torchrun", f"--nproc-per-node={ranks}"]),
             f"{run.script}.py"]
    for flag, value in config.items():
        name = flag.replace("_", "-")
        if value is None or (flag in usual and usual[flag] == value):
            continue
        if isinstance(value, bool):
            words += [f"--{name}"] if value else [f"--no-{name}"] if usual.get(flag) else []
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def about(runs):
    """Return what runs are of, in a line: data set, network, target, seeds."""
    def listed(values):
        return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))

    def target(run):
        if run.method == "dense":
            return None
        if run.script != CHANNELS:
            sparsity = run.config.get("sparsity")  # None: the method's own outcome
            return f"{100 * (sparsity or run.summary['sparsity']):g} % of the weights pruned"
        if run.config["target_macs"] is not None:
            return f"{100 * run.config['target_macs']:g} % of the MACs removed"
        return f"{100 * run.config['prune_ratio']:g} % of the channels pruned"

    limits = listed(run.config.get("train_limit") for run in runs)
    return ("demo, short runs; " * any(run.folder.parent.name == "demo" for run in runs)
            + f"{listed(run.config['dataset'] for run in runs)}"
            + f" (training images: {limits})" * bool(limits)
            + f"; {listed(run.config['model'] for run in runs)}"
            + f"; {listed(map(target, runs)) or 'dense'}"
            + f"; seeds {listed(sorted({run.seed for run in runs}))}; {len(runs)} runs")
