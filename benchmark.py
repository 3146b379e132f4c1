"""Speed and memory of this project beside SpikingJelly, snnTorch and a network without neurons.

    pip install -r requirements-benchmark.txt     # the frameworks; rows without theirs say so
    python benchmark.py --quick                   # VGG-16 only, under 4 minutes on two cores
    python benchmark.py --json all.json --figures figures    # all networks, scaling: 40 minutes

All rows are one network with one set of weights, in which only the neurons differ; the spikes of
the first batch are compared, so that the same work is timed. Rows take turns, A B C A B C, in one
process, and a ratio is the median over those rounds: both sides see the same moods of the machine.
A time is the median, and beside it the middle half of the rounds.

What users of SpikingJelly run, as its tutorials have it: multi-step neurons, the image repeated
over T before the first layer, contiguous memory, fp32. "like for like": this project's own tricks
are lent to it, the first layer run once, channels_last, bf16, and its fastest row counts. On a GPU
SpikingJelly chooses its fused kernels by itself. The floor is ReLU in place of the neurons: what a
training step costs at T images a sample, without a neuron's work.
"""
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from harness import flags
import masks as masks_file
import metrics
import models
from harness import plots
import training
from harness.frameworks import Floor, Plain, SnnTorch, SpikingJelly, over_time
from neurons import LIF
from harness.runfolder import device_name, write_json

SIZES = {  # images of CIFAR-100 and of Fashion-MNIST: channels, side, classes, T, batch
    "vgg16": (3, 32, 100, 5, 32), "resnet19": (3, 32, 100, 5, 16), "small": (1, 28, 10, 4, 64)}
SECONDS = {"quick": 60, "full": 45}  # of training steps, a network
STATUS = Path("/proc/self/status")  # Linux tells the peak memory of a process here
INSTALL = "not installed: pip install -r requirements-benchmark.txt"

# ---- the rows -----------------------------------------------------------------------------------


ROWS = {  # name: neuron, precision, channels_last, the image repeated over T, compiled, recording
    "this project, fp32": (LIF, "fp32", True, False, False, False),
    "this project, bf16": (LIF, "bf16", True, False, False, False),
    "this project, fp32, recording": (LIF, "fp32", True, False, False, True),
    "this project, fp32, compiled": (LIF, "fp32", True, False, True, False),
    "this project, bf16, compiled": (LIF, "bf16", True, False, True, False),
    "SpikingJelly, fp32": (SpikingJelly, "fp32", False, True, False, False),
    "SpikingJelly, fp32, channels_last": (SpikingJelly, "fp32", True, False, False, False),
    "SpikingJelly, bf16": (SpikingJelly, "bf16", False, False, False, False),
    "SpikingJelly, bf16, channels_last": (SpikingJelly, "bf16", True, False, False, False),
    "snnTorch, fp32": (SnnTorch, "fp32", True, False, False, False),
    "plain autograd, fp32": (Plain, "fp32", True, False, False, False),
    "ReLU floor, fp32": (Floor, "fp32", True, False, False, False),
    "ReLU floor, bf16": (Floor, "bf16", True, False, False, False)}


class Candidate:
    """One row: a network, a batch, and the two things that are timed, step() and predict()."""

    def __init__(self, network, row, device, time_steps=None, batch=None):
        neuron, self.precision, channels_last, self.repeated, compiled, recording = ROWS[row]
        channels, side, classes, T, N = SIZES[network]
        self.time_steps, self.batch, self.device = time_steps or T, batch or N, device
        torch.manual_seed(0)  # the same weights and images for all rows
        self.net = models.build(network, classes, channels, side, self.time_steps)
        self.x = torch.randn(self.batch, channels, side, side).to(device)
        self.y = torch.randint(classes, (self.batch,)).to(device)
        self.lifs = list(models.lifs(self.net))
        if neuron is not LIF:
            for name in self.lifs:
                self.net.set_submodule(name, neuron())
        self.net.to(device, memory_format=(torch.channels_last if channels_last
                                           else torch.contiguous_format))
        if recording:
            models.record(self.net, "max")
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.01, 0.9, weight_decay=5e-4)
        self.forward = torch.compile(self.net) if compiled else self.net

    def run(self):
        x = over_time(self.x[None], self.time_steps) if self.repeated else self.x
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.forward(x)

    def step(self):
        loss = training.loss_over_time(self.run(), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.inference_mode()
    def predict(self):
        self.net.eval()
        self.run()
        self.net.train()

    @torch.no_grad()
    def spikes(self):
        """Return the spikes of all neurons on the first batch, as one bool vector a layer."""
        seen, state = [], {k: v.clone() for k, v in self.net.state_dict().items()}
        modules = {name: self.net.get_submodule(name) for name in self.lifs}
        with metrics.hooks(modules, after=lambda _, spikes: seen.append((spikes > 0).flatten())):
            self.run() if self.forward is self.net else self.net(self.x)
        self.net.load_state_dict(state)
        return seen


# ---- measuring -----------------------------------------------------------------------------------


def take_turns(actions, seconds, device, at_least=5):
    """Return {name: seconds of each round}: all actions, one after the other, again and again."""
    def timed(action):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for action in actions.values():
        timed(action)  # to warm up
    times, end = {name: [] for name in actions}, time.perf_counter() + seconds
    while len(next(iter(times.values()))) < at_least or time.perf_counter() < end:
        for name, action in actions.items():
            times[name].append(timed(action))
    return times


def ratio(one, other):
    """Return the median over the rounds of one / other."""
    return statistics.median(a / b for a, b in zip(one, other))


def summary(times, key):
    """Return the median and the middle half of times in seconds, as milliseconds."""
    low, median, high = statistics.quantiles([1e3 * seconds for seconds in times], n=4)
    return {f"{key}_ms": median, f"{key}_low_ms": low, f"{key}_high_ms": high}


def peak_memory(network, row, device, time_steps):
    """Return by how many MiB two training steps raise the memory, network and optimiser included;
    on a CPU in a process of its own, whose peak the system tells (Linux)."""
    if device.type == "cuda":
        return _peak(network, row, "cuda", time_steps)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (network, row, "cpu", time_steps))


def _peak(network, row, device, time_steps):
    def peak():  # VmHWM, and not what getrusage tells, which a new process has from its parent
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1]) / 2**10

    ROWS[row][0]()  # imports the framework
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak()
    candidate = Candidate(network, row, torch.device(device), time_steps)
    candidate.step(), candidate.step()
    return peak() - before


def update(masks, scores):
    """A whole mask update, as prune_unstructured.py does it at r = 0.5 on the way to 50 %."""
    masks.flat.fill_(True)
    keep = masks.keep_at(0.5)
    magnitudes = masks.magnitudes()
    pruned = masks.prune(masks.keep_at(0.75), magnitudes, masks_file.seeded(0))
    back = masks.regenerate(keep - masks.n_alive, ~masks.flat, [masks.spread(scores), magnitudes],
                            masks_file.seeded(0))
    masks.guard()
    masks.account(pruned, back)


def updating(net):
    """Return the update of a network as an action, with random scores."""
    masks = masks_file.Masks(net)
    channels = {lif: net.get_parameter(name).shape[0] for name, (lif, dim, _)
                in masks.scored.items() if dim == 0}
    scores = {lif: torch.rand(count).to(masks.device) for lif, count in channels.items()}
    return lambda: update(masks, scores)


def available(rows):
    """Return (rows that can be run, {row: why not})."""
    missing = {}
    for row in rows:
        try:
            ROWS[row][0]()
        except ImportError:
            missing[row] = INSTALL
    return [row for row in rows if row not in missing], missing


def measure(network, device, quick):
    """Return (rows, ratios) of one network: dicts, and {name of a ratio: number}."""
    channels, side, classes, T, N = SIZES[network]
    torch.compiler.reset()  # networks share the code of their class, and its limit of recompiling
    rows, missing = available([row for row in ROWS if not (quick and "compiled" in row)])
    candidates = {}
    for row in tqdm(rows, f"{network}: building", leave=False, disable=not sys.stderr.isatty()):
        candidate = Candidate(network, row, device)
        try:
            candidate.step(), candidate.predict()
            candidates[row] = candidate
        except RuntimeError as error:  # torch.compile without a compiler
            missing[row] = "not measured: " + " ".join(str(error).split())[:80]
    first, floor = "this project, fp32", "ReLU floor, fp32"
    reference = candidates[first].spikes()
    total = sum(layer.numel() for layer in reference)
    differing = {row: sum((a != b).sum().item() for a, b in zip(candidate.spikes(), reference))
                 / total for row, candidate in candidates.items() if "floor" not in row}

    seconds = SECONDS["quick" if quick else "full"]
    print(f"{network}: training steps, {seconds} s and more", file=sys.stderr)
    steps = take_turns({row: c.step for row, c in candidates.items()}, seconds, device)
    recorded = {row: candidates[row].step for row in (first, f"{first}, recording")}
    recorded = take_turns(recorded, seconds / 4, device)
    print(f"{network}: inference and memory", file=sys.stderr)
    infer = take_turns({row: c.predict for row, c in candidates.items() if "record" not in row},
                       seconds / 4, device, at_least=4)
    updates = take_turns({"update": updating(candidates[first].net)}, 1, device)["update"]
    theirs = [row for row in candidates if row.startswith("SpikingJelly")]
    candidates.clear()
    memory = {(row, time_steps): peak_memory(network, row, device, time_steps)
              for row in (first, "SpikingJelly, fp32", *([] if quick else [floor]))
              for time_steps in ([T] if quick else (1, T, 2 * T))
              if row in steps and (device.type == "cuda" or STATUS.exists())}

    table = [dict(network=network, row=row, batch=N, time_steps=T,
                  spikes_differing=differing.get(row), memory_mib=memory.get((row, T)),
                  **summary(steps[row], "step"),
                  **(summary(infer[row], "infer") if row in infer else {})) for row in steps]
    table += [dict(network=network, row=row, note=why) for row, why in missing.items()]
    table += [dict(network=network, row=row, time_steps=time_steps, memory_mib=mib)
              for (row, time_steps), mib in memory.items() if time_steps != T]
    table.append(dict(network=network, row="a mask update", **summary(updates, "step")))
    found = dict(
        criticality_overhead=ratio(*(steps[row] + recorded[row] for row in
                                     (f"{first}, recording", first))) - 1,
        update_vs_step=statistics.median(updates) / statistics.median(steps[first]))
    for precision in ("fp32", "bf16"):
        ours = f"this project, {precision}"
        found[f"step_{precision}_vs_relu_floor"] = ratio(steps[ours],
                                                         steps[f"ReLU floor, {precision}"])
        found |= {f"{kind}_{precision}_compiled": ratio(times[ours], times[f"{ours}, compiled"])
                  for kind, times in (("step", steps), ("infer", infer))
                  if f"{ours}, compiled" in steps}
        best = [row for row in theirs if precision in row]
        for kind, times in (("step", steps), ("infer", infer)) if theirs else ():
            found[f"{kind}_{precision}_vs_spikingjelly"] = ratio(times["SpikingJelly, fp32"],
                                                                 times[ours])
            found[f"{kind}_{precision}_like_for_like"] = min(ratio(times[row], times[ours])
                                                             for row in best)
    if ("SpikingJelly, fp32", T) in memory:
        found["memory_vs_spikingjelly"] = memory[first, T] / memory["SpikingJelly, fp32", T]
    return table, found


def pruned_inference(network, device):
    """Return rows of inference with 90 % of the weights masked, and with half of the channels gone,
    beside the dense network."""
    channels, side, classes, T, N = SIZES[network]
    rows = []
    for batch in (1, N):
        nets = {}
        for name, factor in (("dense", 1), ("90 % masked", 1), ("half of the channels", 0.5)):
            torch.manual_seed(0)
            nets[name] = models.build(network, classes, channels, side, T,
                                      models.default_widths(network, factor)).to(
                device, memory_format=torch.channels_last).eval()
        masks = masks_file.Masks(nets["90 % masked"])
        masks.prune(masks.keep_at(0.9), masks.magnitudes(), masks_file.seeded(0))
        masks.apply(torch.optim.SGD(nets["90 % masked"].parameters()))
        x = torch.randn(batch, channels, side, side, device=device)
        with torch.inference_mode():
            times = take_turns({name: lambda net=net: net(x) for name, net in nets.items()}, 5,
                               device)
        rows += [dict(network=network, row=f"inference, {name}", batch=batch, time_steps=T,
                      speedup=ratio(times["dense"], times[name]), **summary(times[name], "infer"))
                 for name in nets]
    return rows


# ---- scaling -------------------------------------------------------------------------------------


def scaling(device):
    """Return rows: images a second over batch size and T, seconds of an update over the number of
    weights, images a second of one and two processes."""
    network = "vgg16" if device.type == "cuda" else "small"
    T, N = SIZES[network][3:]
    rows, (names, _) = [], available(["this project, fp32", "this project, bf16",
                                      "SpikingJelly, fp32"])
    for key, values in (("batch", (8, 16, 32, 64, 128, 256)), ("time_steps", (1, 2, 4, 8, 16))):
        for value in tqdm(values, f"scaling: {key}", leave=False, disable=not sys.stderr.isatty()):
            size = dict(batch=N, time_steps=T) | {key: value}
            times = take_turns({row: Candidate(network, row, device, **size).step for row in names},
                               4, device)
            rows += [dict(scaling=key, network=network, row=row, **size,
                          images_per_second=size["batch"] / statistics.median(times[row]))
                     for row in names]
    for weights in (1e5, 1e6, 1e7, 1e8):
        widths = models.default_widths("vgg16", (weights / 14.8e6) ** 0.5)
        net = models.build("vgg16", 100, 3, 32, 1, widths).to(memory_format=torch.channels_last)
        count = masks_file.Masks(net).total
        times = take_turns({"update": updating(net.to(device))}, 2, device)["update"]
        rows.append(dict(scaling="weights", row="mask update", weights=count,
                         seconds=statistics.median(times)))
    for processes in (1, 2):
        rows.append(dict(scaling="processes", row="torchrun, prune_unstructured.py",
                         processes=processes, images_per_second=torchrun(processes, device)))
    return rows


def torchrun(processes, device):
    """Return the training images a second of one epoch of prune_unstructured.py, its test set
    included, over processes that share the processor's threads (on GPUs: one each)."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={processes}",
                   str(Path(__file__).with_name("prune_unstructured.py")), "--run-dir",
                   f"{folder}/run", "--epochs-prune", "3", "--epochs-finetune", "0", "--device",
                   device.type]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        if done.returncode:
            print(f"torchrun with {processes} processes failed: "
                  f"{(done.stderr.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
            return None
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        return 6000 / min(json.loads(line)["seconds"] for line in lines)


def draw(rows, folder):
    figure, axes = plots.canvas(2, 2)
    panels = (("batch", "Batch size", "Images a second", 1),
              ("time_steps", "Time steps", "Images a second", 1),
              ("weights", "Weights", "Seconds an update", 1), ("processes", "Processes",
                                                              "Images a second", 0))
    colours = ["#0072B2", "#009E73", "#D55E00"]  # Okabe-Ito, as in all figures
    for axis, (key, x, y, logarithmic) in zip(axes.flat, panels):
        own = [row for row in rows if row["scaling"] == key]
        value = "seconds" if key == "weights" else "images_per_second"
        for name, colour in zip(dict.fromkeys(row["row"] for row in own), colours):
            points = [(row[key], row[value]) for row in own if row["row"] == name and row[value]]
            if points:
                axis.plot(*zip(*points), marker="o", markersize=3.5, linewidth=1, color=colour,
                          label=name)
        if logarithmic:
            axis.set(xscale="log", yscale="log")
        else:
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        if key != "weights":
            ticks = sorted({row[key] for row in own})
            axis.set_xticks(ticks, ticks)
            axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.set(xlabel=x, ylabel=y)
        plots.legend(axis, 1)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    plots.save(folder / "scaling", figure, [dict.fromkeys(keys) | row for row in rows],
               "training steps over batch size and T; a mask update; processes")


# ---- the script ----------------------------------------------------------------------------------


def show(table, ratios):
    """Print the ratios and one table."""
    for name, value in ratios.items():
        print(f"  {name:<44}{value:.3f}")

    def time_of(row, key):
        values = [row.get(f"{key}{part}_ms") for part in ("", "_low", "_high")]
        return "" if None in values else "{:.1f} ({:.1f}-{:.1f})".format(*values)

    print()
    for row in [None, *table]:
        cells = ("network", "row", "batch", "T", "step, ms", "inference, ms", "memory, MiB",
                 "spikes that differ") if row is None else (
            row["network"], row["row"], row.get("batch", ""), row.get("time_steps", ""),
            row.get("note") or time_of(row, "step"), time_of(row, "infer"),
            f"{row['memory_mib']:.0f}" if row.get("memory_mib") else "",
            f"{100 * row['spikes_differing']:.4f} %" if row.get("spikes_differing") is not None
            else "")
        widths = (8, 33, 5, 2, 24, 24, 11, 18)
        print("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths)) + " |")
        if row is None:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def main(argv=None):
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="VGG-16 only, nothing compiled, no scaling")
    add("--networks", nargs="+", choices=list(SIZES), metavar="NAME", help=f"of "
        f"{', '.join(SIZES)} (default: all of them, and the scaling)")
    add("--json", metavar="FILE", help="write every row and the ratios")
    add("--figures", metavar="DIR", help="draw the scaling (not with --quick) into this folder")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    args = parser.parse_args(argv)
    given = dict(quick=False, networks=None, json=None, figures=None,
                 device=None) | vars(args)
    if given["figures"] and (given["quick"] or given["networks"]):
        parser.error("--figures needs the scaling, which --quick and --networks leave out. Leave "
                     "one out")
    with flags.exits(2, ValueError, OSError):
        if given["json"] and not Path(given["json"]).absolute().parent.is_dir():
            raise ValueError(f"the folder of --json {given['json']} does not exist, expected one. "
                             f"Make it")
        device = training.choose_device(given["device"])
    if device.type == "cpu" and sys.platform == "linux":
        training.keep_freed_memory()  # for all rows: a gift to the frameworks
    started = time.perf_counter()
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"times: median (middle half)\n", flush=True)

    table, ratios = [], {}
    for network in given["networks"] or (["vgg16"] if given["quick"] else list(SIZES)):
        rows, found = measure(network, device, given["quick"])
        rows += pruned_inference(network, device)
        table += rows
        ratios |= {name if network == "vgg16" else f"{network}_{name}": value
                   for name, value in found.items()}
    show(table, ratios)
    if not given["quick"] and not given["networks"]:
        scaled = scaling(device)
        table += scaled
        if given["figures"]:
            draw(scaled, Path(given["figures"]))
    if given["json"]:
        write_json(Path(given["json"]), dict(
            device=device_name(device), threads=torch.get_num_threads(), torch=torch.__version__,
            seconds=time.perf_counter() - started, ratios=ratios, rows=table))
    print(f"\ndone in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
