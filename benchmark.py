"""Speed and memory of this project beside SpikingJelly, snnTorch and a network without
neurons.

    pip install -r requirements-benchmark.txt     # the frameworks
    python benchmark.py --quick                   # VGG-16 only: 4 minutes on two cores
    python benchmark.py --json all.json --figures figures    # everything: 40 minutes

A framework that is not installed has rows that say so.

All rows are one network with one set of weights, in which only the neurons differ. Each
row tells how many spikes of the first batch differ from those of this project. Rows
take turns, A B C A B C, in one process, and a ratio is the median over those rounds:
what slows the machine down for a while slows both sides. A time is the median over the
rounds, with the middle half of them beside it.

SpikingJelly runs as its tutorials show it: multi-step neurons, the image repeated over
T before the first layer, contiguous memory, fp32. "Like for like" lends it what makes
this project fast (the first layer once, channels_last, bf16) and takes its fastest row.
On a GPU SpikingJelly chooses its fused kernels by itself. The floor is a ReLU in place
of the neurons: what a training step costs at T images a sample, without the work of a
neuron.
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
from typing import NamedTuple

import harness  # first: what is not installed is then one line

import torch
from tqdm import tqdm

import metrics
import models
import training
from harness import flags, plots, processes, setup
from harness.files import write_json
from harness.frameworks import Floor, SnnTorch, SpikingJelly, over_time
from harness.machine import device_name
from kernels import FastLIF
from masks import Masks, seeded
from neurons import LIF

# images of CIFAR-100 and of Fashion-MNIST: channels, side, classes, T, batch
SIZES = {"vgg16": (3, 32, 100, 5, 32),
         "resnet19": (3, 32, 100, 5, 16),
         "small": (1, 28, 10, 4, 64)}
SECONDS = {"quick": 60, "full": 45}  # of training steps, for each network
STATUS = Path("/proc/self/status")  # Linux tells the peak memory of a process here
INSTALL = "not installed: pip install -r requirements-benchmark.txt"

# ---- the rows ------------------------------------------------------------------------


class Row(NamedTuple):
    """What is timed: a neuron in the network, and how the network is run."""

    neuron: type
    precision: str
    channels_last: bool = True
    repeated: bool = False   # the image, over T, before the first layer
    compiled: bool = False
    recorded: str | None = None  # how the criticality is recorded in each step


ROWS = {
    "this project, fp32": Row(FastLIF, "fp32"),
    "this project, bf16": Row(FastLIF, "bf16"),
    "this project, fp32, recording": Row(FastLIF, "fp32", recorded="max"),
    "this project, fp32, compiled": Row(FastLIF, "fp32", compiled=True),
    "this project, bf16, compiled": Row(FastLIF, "bf16", compiled=True),
    "SpikingJelly, fp32": Row(SpikingJelly, "fp32", channels_last=False, repeated=True),
    "SpikingJelly, fp32, channels_last": Row(SpikingJelly, "fp32"),
    "SpikingJelly, bf16": Row(SpikingJelly, "bf16", channels_last=False),
    "SpikingJelly, bf16, channels_last": Row(SpikingJelly, "bf16"),
    "snnTorch, fp32": Row(SnnTorch, "fp32"),
    "plain autograd, fp32": Row(LIF, "fp32"),
    "ReLU floor, fp32": Row(Floor, "fp32"),
    "ReLU floor, bf16": Row(Floor, "bf16")}
OURS, FLOOR, THEIRS = "this project, fp32", "ReLU floor, fp32", "SpikingJelly, fp32"


class Candidate:
    """One row: a network, a batch, and the two actions that are timed, step() and
    predict()."""

    def __init__(self, network, row, device, time_steps=None, batch=None):
        self.row, self.device = ROWS[row], device
        channels, side, classes, T, N = SIZES[network]
        self.time_steps, self.batch = time_steps or T, batch or N
        torch.manual_seed(0)  # the same weights and images for all rows
        self.net = models.build(network, classes, channels, side, self.time_steps)
        self.x = torch.randn(self.batch, channels, side, side).to(device)
        self.y = torch.randint(classes, (self.batch,)).to(device)
        self.lifs = list(models.lifs(self.net))
        if self.row.neuron is not FastLIF:
            for name in self.lifs:
                self.net.set_submodule(name, self.row.neuron())
        memory_format = torch.contiguous_format
        if self.row.channels_last:
            memory_format = torch.channels_last
        self.net.to(device, memory_format=memory_format)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.01, 0.9,
                                         weight_decay=5e-4)
        self.forward = torch.compile(self.net) if self.row.compiled else self.net

    def run(self, forward=None):
        """Return the logits of the batch, [T, N, K]."""
        x = self.x
        if self.row.repeated:
            x = over_time(x[None], self.time_steps)
        is_bf16 = self.row.precision == "bf16"
        with (torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16),
              models.recording(self.net, self.row.recorded)):
            return (forward or self.forward)(x)

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
        """Return the spikes of all neurons on the batch, a bool vector for each layer.
        The network, its running statistics too, is the same afterwards."""
        seen = []
        state = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        modules = {name: self.net.get_submodule(name) for name in self.lifs}

        def watch(_, spikes):
            seen.append((spikes > 0).flatten())

        with metrics.hooks(modules, after=watch):
            self.run(self.net)  # uncompiled: a compiled network passes by the hooks
        self.net.load_state_dict(state)
        return seen


def available(rows):
    """Return (rows whose framework is installed, {other row: what to do})."""
    missing = {}
    for row in rows:
        try:
            ROWS[row].neuron()
        except ImportError:
            missing[row] = INSTALL
    return [row for row in rows if row not in missing], missing


# ---- measuring -----------------------------------------------------------------------


def take_turns(actions, seconds, device, at_least=5):
    """Return {name: seconds of each round}: all actions, one after the other, again and
    again, for so many seconds and at least so many rounds."""
    def timed(action):
        started = time.perf_counter()
        action()
        metrics.wait(device)
        return time.perf_counter() - started

    for action in actions.values():
        timed(action)  # to warm up
    times = {name: [] for name in actions}
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < at_least or time.perf_counter() < end:
        for name, action in actions.items():
            times[name].append(timed(action))
        rounds += 1
    return times


def ratio(one, other):
    """Return the median over the rounds of one / other."""
    return statistics.median(a / b for a, b in zip(one, other))


def median_and_middle_half(times, key):
    """Return times in seconds as milliseconds, {key_ms, key_low_ms, key_high_ms}: their
    median, lower and upper quartile."""
    milliseconds = [1e3 * seconds for seconds in times]
    low, median, high = statistics.quantiles(milliseconds, n=4)
    return {f"{key}_ms": median, f"{key}_low_ms": low, f"{key}_high_ms": high}


def peak_memory(network, row, device, time_steps):
    """Return by how many MiB two training steps raise the memory, with the network and
    its optimiser. On a CPU a process of its own measures it (Linux)."""
    if device.type == "cuda":
        return _peak(network, row, "cuda", time_steps)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (network, row, "cpu", time_steps))


def _peak(network, row, device, time_steps):
    def peak():
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        # not getrusage: a new process starts there with the peak of its parent
        return int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1]) / 2**10

    ROWS[row].neuron()  # imports the framework
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak()
    candidate = Candidate(network, row, torch.device(device), time_steps)
    candidate.step()
    candidate.step()
    return peak() - before


def update_masks(masks, scores):
    """Take one whole mask update, as prune_unstructured.py takes it at r = 0.5 on the
    way to a sparsity of 50 %. scores: {LIF name: [C]}."""
    masks.flat.fill_(True)
    magnitudes = masks.magnitudes()
    pruned = masks.prune(masks.keep_at(0.75), magnitudes, seeded(0))
    count = masks.keep_at(0.5) - masks.n_alive
    keys = [masks.spread(scores), magnitudes]
    regenerated = masks.regenerate(count, ~masks.flat, keys, seeded(0))
    masks.rescue_empty_layers()
    masks.record_update(pruned, regenerated)


def mask_update_of(net):
    """Return the mask update of a network as an action, with random scores."""
    masks, scores = Masks(net), {}
    for name, (lif, dim, _) in masks.scored.items():
        if dim == 0:  # the neuron that the weight feeds
            channels = net.get_parameter(name).shape[0]
            scores[lif] = torch.rand(channels).to(masks.device)
    return lambda: update_masks(masks, scores)


def build_candidates(network, rows, device):
    """Return ({row: Candidate} that can be run, {other row: why not})."""
    candidates, failed = {}, {}
    is_quiet = not sys.stderr.isatty()
    for row in tqdm(rows, f"{network}: building", leave=False, disable=is_quiet):
        candidate = Candidate(network, row, device)
        try:
            candidate.step()
            candidate.predict()
        except RuntimeError as error:  # torch.compile without a compiler
            failed[row] = "not measured: " + " ".join(str(error).split())[:80]
        else:
            candidates[row] = candidate
    return candidates, failed


def differing_spikes(candidates):
    """Return {row: share of its spikes that differ from this project's, 0..1}."""
    reference = candidates[OURS].spikes()
    total = sum(layer.numel() for layer in reference)
    shares = {}
    for row, candidate in candidates.items():
        if candidate.row.neuron is not Floor:
            differ = sum((own != ours).sum().item() for own, ours
                         in zip(candidate.spikes(), reference))
            shares[row] = differ / total
    return shares


def measure(network, device, quick):
    """Return (rows, ratios) of one network: dicts, and {name of a ratio: number}."""
    T, N = SIZES[network][3:]
    # networks share the code of their class, and its limit of compilations
    torch.compiler.reset()
    wanted = [row for row in ROWS if not (quick and ROWS[row].compiled)]
    installed, missing = available(wanted)
    candidates, failed = build_candidates(network, installed, device)
    missing |= failed
    differing = differing_spikes(candidates)

    seconds = SECONDS["quick" if quick else "full"]
    print(f"{network}: training steps, {seconds} s and more", file=sys.stderr)
    steps = {row: candidate.step for row, candidate in candidates.items()}
    step_times = take_turns(steps, seconds, device)
    with_recording = f"{OURS}, recording"
    pair = {row: steps[row] for row in (OURS, with_recording)}
    pair_times = take_turns(pair, seconds / 4, device)
    print(f"{network}: inference and memory", file=sys.stderr)
    predictions = {row: candidate.predict for row, candidate in candidates.items()
                   if candidate.row.recorded is None}
    inference_times = take_turns(predictions, seconds / 4, device, at_least=4)
    update = mask_update_of(candidates[OURS].net)
    update_times = take_turns({"update": update}, 1, device)["update"]
    theirs = [row for row in candidates if row.startswith("SpikingJelly")]
    candidates.clear()  # before the memory is measured
    steps, pair, predictions, update = {}, {}, {}, None

    memory = {}  # {(row, T): MiB}
    memory_rows = [OURS, THEIRS] if quick else [OURS, THEIRS, FLOOR]
    if device.type == "cuda" or STATUS.exists():
        for row in memory_rows:
            for time_steps in ([T] if quick else [1, T, 2 * T]):
                if row in step_times:
                    memory[row, time_steps] = peak_memory(
                        network, row, device, time_steps)

    table = []
    for row, times in step_times.items():
        cells = dict(network=network, row=row, batch=N, time_steps=T,
                     spikes_differing=differing.get(row),
                     memory_mib=memory.get((row, T)))
        cells |= median_and_middle_half(times, "step")
        if row in inference_times:
            cells |= median_and_middle_half(inference_times[row], "infer")
        table.append(cells)
    table += [dict(network=network, row=row, note=why) for row, why in missing.items()]
    table += [dict(network=network, row=row, time_steps=time_steps, memory_mib=mib)
              for (row, time_steps), mib in memory.items() if time_steps != T]
    table.append(dict(network=network, row="a mask update",
                      **median_and_middle_half(update_times, "step")))

    recording_times = step_times[with_recording] + pair_times[with_recording]
    ratios = dict(
        criticality_overhead=ratio(recording_times, step_times[OURS] + pair_times[OURS])
        - 1,
        update_vs_step=(statistics.median(update_times)
                        / statistics.median(step_times[OURS])))
    kinds = {"step": step_times, "infer": inference_times}
    for precision in ("fp32", "bf16"):
        ratios |= ratios_of(precision, kinds, theirs)
    if (THEIRS, T) in memory:
        ratios["memory_vs_spikingjelly"] = memory[OURS, T] / memory[THEIRS, T]
    return table, ratios


def ratios_of(precision, kinds, theirs):
    """Return the ratios of this project's times in a precision, {name: number}.

    kinds: {"step" | "infer": {row: times}}. theirs: the rows of SpikingJelly.
    """
    ours = f"this project, {precision}"
    step_times = kinds["step"]
    to_floor = ratio(step_times[ours], step_times[f"ReLU floor, {precision}"])
    ratios = {f"step_{precision}_vs_relu_floor": to_floor}
    alike = [row for row in theirs if precision in row]
    for kind, times in kinds.items():
        compiled = times.get(f"{ours}, compiled")
        if compiled is not None:
            ratios[f"{kind}_{precision}_compiled"] = ratio(times[ours], compiled)
        if theirs:
            ratios[f"{kind}_{precision}_vs_spikingjelly"] = ratio(
                times[THEIRS], times[ours])
            ratios[f"{kind}_{precision}_like_for_like"] = min(
                ratio(times[row], times[ours]) for row in alike)
    return ratios


def measure_pruned_inference(network, device):
    """Return rows of inference with 90 % of the weights masked, and with half of the
    channels removed, beside the dense network."""
    channels, side, classes, T, N = SIZES[network]
    factors = {"dense": 1, "90 % masked": 1, "half of the channels": 0.5}
    rows = []
    for batch in (1, N):
        nets = {}
        for name, factor in factors.items():
            torch.manual_seed(0)
            widths = models.default_widths(network, factor)
            net = models.build(network, classes, channels, side, T, widths)
            nets[name] = net.to(device, memory_format=torch.channels_last).eval()
        masked = nets["90 % masked"]
        masks = Masks(masked)
        masks.prune(masks.keep_at(0.9), masks.magnitudes(), seeded(0))
        masks.apply(torch.optim.SGD(masked.parameters()))
        x = torch.randn(batch, channels, side, side, device=device)
        actions = {name: lambda net=net: net(x) for name, net in nets.items()}
        with torch.inference_mode():
            times = take_turns(actions, 5, device)
        rows += [dict(network=network, row=f"inference, {name}", batch=batch,
                      time_steps=T, speedup=ratio(times["dense"], times[name]),
                      **median_and_middle_half(times[name], "infer"))
                 for name in nets]
    return rows


# ---- scaling -------------------------------------------------------------------------


def measure_scaling(device):
    """Return rows: images a second over batch size and T, seconds of an update over the
    number of weights, images a second of one and two processes."""
    network = "vgg16" if device.type == "cuda" else "small"
    T, N = SIZES[network][3:]
    names, _ = available([OURS, "this project, bf16", THEIRS])
    is_quiet = not sys.stderr.isatty()
    rows = []
    sweeps = {"batch": (8, 16, 32, 64, 128, 256), "time_steps": (1, 2, 4, 8, 16)}
    for key, values in sweeps.items():
        for value in tqdm(values, f"scaling: {key}", leave=False, disable=is_quiet):
            size = dict(batch=N, time_steps=T) | {key: value}
            steps = {row: Candidate(network, row, device, **size).step for row in names}
            times = take_turns(steps, 4, device)
            for row in names:
                images_per_second = size["batch"] / statistics.median(times[row])
                rows.append(dict(scaling=key, network=network, row=row, **size,
                                 images_per_second=images_per_second))
    for weights in (1e5, 1e6, 1e7, 1e8):
        widths = models.default_widths("vgg16", (weights / 14.8e6) ** 0.5)
        net = models.build("vgg16", 100, 3, 32, 1, widths)
        net.to(device, memory_format=torch.channels_last)
        times = take_turns({"update": mask_update_of(net)}, 2, device)["update"]
        rows.append(dict(scaling="weights", row="mask update", weights=Masks(net).total,
                         seconds=statistics.median(times)))
    for processes in (1, 2):
        rows.append(dict(scaling="processes", row="torchrun, prune_unstructured.py",
                         processes=processes,
                         images_per_second=torchrun(processes, device)))
    return rows


def torchrun(processes, device):
    """Return the training images a second of an epoch of prune_unstructured.py, its
    evaluation included, over processes that share the processor's threads (on GPUs: one
    GPU each). None, after a line on stderr, if that fails."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    root = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={processes}", str(root / "prune_unstructured.py"),
                   "--run-dir", f"{folder}/run", "--epochs-prune", "3",
                   "--epochs-finetune", "0", "--device", device.type]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no message"]
            print(f"torchrun with {processes} processes failed: {said[-1]}",
                  file=sys.stderr)
            return None
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        images = 6000  # of fashion-mini's training set
        return images / min(json.loads(line)["seconds"] for line in lines)


def draw_scaling(rows, folder):
    """Write the rows of measure_scaling as folder/scaling.png, .pdf and .csv."""
    panels = (  # the key of a row, the two axes, whether they are logarithmic
        ("batch", "Batch size", "Images a second", True),
        ("time_steps", "Time steps", "Images a second", True),
        ("weights", "Weights", "Seconds an update", True),
        ("processes", "Processes", "Images a second", False))
    colours = ("#0072B2", "#009E73", "#D55E00")  # Okabe-Ito, as in all figures
    figure, axes = plots.canvas(2, 2)
    for axis, (key, x, y, is_logarithmic) in zip(axes.flat, panels):
        own = [row for row in rows if row["scaling"] == key]
        value = "seconds" if key == "weights" else "images_per_second"
        names = list(dict.fromkeys(row["row"] for row in own))
        for name, colour in zip(names, colours):
            points = [(row[key], row[value]) for row in own
                      if row["row"] == name and row[value]]
            if points:
                axis.plot(*zip(*points), marker="o", markersize=3.5, linewidth=1,
                          color=colour, label=name)
        if is_logarithmic:
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


# ---- the script ----------------------------------------------------------------------

COLUMNS = {  # name: width
    "network": 8, "row": 33, "batch": 5, "T": 2, "step, ms": 24, "inference, ms": 24,
    "memory, MiB": 11, "spikes that differ": 18}


def print_ratios(ratios):
    for name, value in ratios.items():
        print(f"  {name:<44}{value:.3f}")
    print()


def print_table(table):
    """Print rows of measure() and measure_pruned_inference() as a Markdown table."""
    def time_of(row, key):
        values = [row.get(f"{key}{part}_ms") for part in ("", "_low", "_high")]
        if None in values:
            return ""
        return "{:.1f} ({:.1f}-{:.1f})".format(*values)

    def print_cells(cells):
        padded = (f"{cell:<{width}}" for cell, width in zip(cells, COLUMNS.values()))
        print("| " + " | ".join(padded) + " |")

    print_cells(COLUMNS)
    print("|" + "|".join("-" * (width + 2) for width in COLUMNS.values()) + "|")
    for row in table:
        memory = differing = ""
        if row.get("memory_mib"):
            memory = f"{row['memory_mib']:.0f}"
        if row.get("spikes_differing") is not None:
            differing = f"{100 * row['spikes_differing']:.4f} %"
        print_cells((
            row["network"], row["row"], row.get("batch", ""), row.get("time_steps", ""),
            row.get("note") or time_of(row, "step"), time_of(row, "infer"), memory,
            differing))


def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true",
        help="VGG-16 only, nothing compiled, no scaling")
    add("--networks", nargs="+", choices=list(SIZES), metavar="NAME",
        help=f"of {', '.join(SIZES)} (default: all of them, and the scaling)")
    add("--json", type=flags.path, metavar="FILE",
        help="write every row and the ratios")
    add("--figures", type=flags.folder, metavar="DIR",
        help="draw the scaling (not with --quick or --networks) into this folder")
    add("--device", type=flags.device, metavar="DEVICE",
        help="cpu, cuda or cuda:1; default: the GPU where there is one")
    parser.set_defaults(quick=False, networks=None, json=None, figures=None,
                        device=None)
    args = parser.parse_args(argv)
    if args.figures and (args.quick or args.networks):
        parser.error("--figures needs the scaling, which --quick and --networks leave "
                     "out, expected one of the two. Leave one out")
    return args


def main(argv=None):
    args = parse_args(argv)
    with flags.exits(2, ValueError, OSError):
        processes.require_one()
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise ValueError(f"the folder of --json {args.json} does not exist, "
                             f"expected one. Make it")
        device = setup.choose_device(args.device)
    if device.type == "cpu" and sys.platform == "linux":
        setup.keep_freed_memory()  # in all rows, those of the frameworks too
    started = time.perf_counter()
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}; times: median (middle half)\n", flush=True)

    networks = args.networks or (["vgg16"] if args.quick else list(SIZES))
    table, ratios = [], {}
    for network in networks:
        rows, found = measure(network, device, args.quick)
        table += rows + measure_pruned_inference(network, device)
        prefix = "" if network == "vgg16" else f"{network}_"
        ratios |= {prefix + name: value for name, value in found.items()}
    print_ratios(ratios)
    print_table(table)
    if not args.quick and not args.networks:
        scaled = measure_scaling(device)
        table += scaled
        if args.figures:
            draw_scaling(scaled, Path(args.figures))
    if args.json:
        write_json(Path(args.json), dict(
            device=device_name(device), threads=torch.get_num_threads(),
            torch=torch.__version__, seconds=time.perf_counter() - started,
            ratios=ratios, rows=table))
    print(f"\ndone in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
