"""Speed and memory of this project beside SpikingJelly, snnTorch and a network without
neurons.

    pip install -r requirements-benchmark.txt     # the frameworks
    python benchmark.py --quick                   # VGG-16 only: 4 minutes on two cores
    python benchmark.py --quick --report speed    # and a table, a picture, a JSON file
    python benchmark.py --json all.json --figures figures    # everything: 25 minutes

A framework that is not installed has rows that say so, and so has a row that fails.

All rows are one network with one set of weights, in which only the neurons differ. Each
row tells how many spikes of the first batch differ from those of this project. Rows
take turns, A B C A B C, in one process, and a ratio is the median over those rounds:
what slows the machine down for a while slows both sides. A time is the median over the
rounds, with the middle half of them beside it.

SpikingJelly runs as its tutorials show it: multi-step neurons, the image repeated over
T before the first layer, contiguous memory, fp32. "Like for like" lends it what makes
this project fast (the first layer once, channels_last, bf16) and takes its fastest row.
The floor is a ReLU in place of the neurons: what a training step costs at T images a
sample, without the work of a neuron.

On a GPU the batch is 128 and the optimizer fused, in all rows. A time is that of the
GPU's own clock, and beside it stands the time that the processor needs to launch a
step: a step cannot be shorter. More rows show this project without its Triton kernels,
and SpikingJelly's fused kernels in bf16, which it does not take by itself there.
Compiled rows come last: compiling takes minutes. fp32 is fp32 in all rows, not TF32.

"x roofline" in the table is the time of a step over the least time that the GPU would
need for its bytes and FLOPs. This least time is an estimate (harness/roofline.py says
how it is counted), by the rates of a copy and of a matrix product, measured here.
"""
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import harness  # first: what is not installed is then one line

import torch
from torch.autograd import DeviceType
from tqdm import tqdm

import metrics
import models
import training
from harness import flags, plots, processes, roofline, setup
from harness.files import write_json, write_whole
from harness.frameworks import (Floor, SnnTorch, SpikingJelly, SpikingJellyFused,
                                over_time, spikingjelly_kernels)
from harness.machine import device_name, set_precision, threads_each
from harness.output import in_a_line
from kernels import FastLIF
from masks import Masks, seeded
from neurons import LIF

# images of CIFAR-100 and of Fashion-MNIST: channels, side, classes, T, batch on a CPU
SIZES = {"vgg16": (3, 32, 100, 5, 32),
         "resnet19": (3, 32, 100, 5, 16),
         "small": (1, 28, 10, 4, 64)}
GPU_BATCH = 128
EPOCH = 50_000  # images of CIFAR's training sets: 391 steps of 128 images
SECONDS = {"quick": 60, "full": 45}  # of training steps, for each network
GPU_SECONDS = {"quick": 30, "full": 45}
CALLS = 10  # of an action, between two readings of a GPU's clock
COPIED, SIDE = 2**28, 8192  # float32 numbers copied, side of the matrices multiplied
STATUS = Path("/proc/self/status")  # Linux tells the peak memory of a process here
INSTALL = "not installed: pip install -r requirements-benchmark.txt"


def on_gpu(device):
    """Return whether it is a GPU that has events, a profiler and Triton."""
    return device.type == "cuda"


def size_of(network, device):
    """Return (channels, side, classes, T, batch) of the images of a network."""
    *size, batch = SIZES[network]
    return *size, GPU_BATCH if on_gpu(device) else batch


# ---- the rows ------------------------------------------------------------------------


class Row(NamedTuple):
    """What is timed: a neuron in the network, and how the network is run."""

    neuron: type
    precision: str
    channels_last: bool = True
    repeated: bool = False   # the image, over T, before the first layer
    compiled: bool = False
    recorded: str | None = None  # how the criticality is recorded in each step
    triton: bool = True  # whether this project's neurons may run in Triton

    @property
    def itemsize(self):
        """The bytes of a number between two layers."""
        return 2 if self.precision == "bf16" else 4


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
GPU_ROWS = ROWS | {  # on a GPU
    "this project, fp32, without Triton": Row(FastLIF, "fp32", triton=False),
    "this project, bf16, without Triton": Row(FastLIF, "bf16", triton=False),
    "SpikingJelly, bf16, channels_last, fused": Row(SpikingJellyFused, "bf16"),
    "snnTorch, bf16": Row(SnnTorch, "bf16")}
OURS, FLOOR, THEIRS = "this project, fp32", "ReLU floor, fp32", "SpikingJelly, fp32"
RECORDING = f"{OURS}, recording"


class Candidate:
    """One row: a network, a batch, and the two actions that are timed, step() and
    predict()."""

    def __init__(self, network, row, device, time_steps=None, batch=None):
        self.row, self.device = GPU_ROWS[row], device
        channels, side, classes, T, N = size_of(network, device)
        self.time_steps, self.batch = time_steps or T, batch or N
        torch.manual_seed(0)  # the same weights and images for all rows
        self.net = models.build(network, classes, channels, side, self.time_steps)
        self.x = torch.randn(self.batch, channels, side, side).to(device)
        self.y = torch.randint(classes, (self.batch,)).to(device)
        self.lifs = list(models.lifs(self.net))
        if self.row.neuron is not FastLIF:
            for name in self.lifs:
                self.net.set_submodule(name, self.row.neuron())
        if not self.row.triton:
            leave_out_triton(self.net)
        memory_format = torch.contiguous_format
        if self.row.channels_last:
            memory_format = torch.channels_last
        self.net.to(device, memory_format=memory_format)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), 0.01, 0.9, weight_decay=5e-4,
            fused=True if on_gpu(device) else None)
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


def leave_out_triton(net):
    """Let the neurons of a network run in torch's operations alone. Raise ValueError if
    they do so anyway."""
    lifs = [module for module in net.modules() if isinstance(module, FastLIF)]
    if not any(getattr(lif, "triton_devices", ()) for lif in lifs):
        raise ValueError("no neuron runs in Triton here")
    for lif in lifs:
        lif.triton_devices = ()


def rows_on(device, quick):
    """Return the names of the rows that take turns. On a GPU the compiled ones are not
    among them: see measure_compiled."""
    rows = GPU_ROWS if on_gpu(device) else ROWS
    with_compiled = not quick and not on_gpu(device)
    return [name for name, row in rows.items() if with_compiled or not row.compiled]


def available(rows):
    """Return (rows whose framework is installed, {other row: what to do})."""
    missing = {}
    for row in rows:
        try:
            GPU_ROWS[row].neuron()
        except (ImportError, AttributeError):  # absent, or too old
            missing[row] = INSTALL
    return [row for row in rows if row not in missing], missing


# ---- measuring -----------------------------------------------------------------------


def timed(action, device):
    """Return the seconds of an action.

    On a GPU they lie between two events in its queue, a mean over CALLS. One call
    before keeps the GPU busy when its clock starts. What the processor does counts
    where the GPU waits for it.
    """
    if not on_gpu(device):
        started = time.perf_counter()
        action()
        metrics.wait(device)
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    action()
    start.record()
    for _ in range(CALLS):
        action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


def take_turns(actions, seconds, device, at_least=5, failed=None):
    """Return {name: seconds of each round}: all actions, one after the other, again and
    again, for so many seconds and at least so many rounds.

    failed: a dict that gets the reason of an action that raises an exception, in whose
    place the others go on; None: it is raised.
    """
    left, times = dict(actions), {name: [] for name in actions}

    def turn():
        for name, action in list(left.items()):
            try:
                times[name].append(timed(action, device))
            except Exception as error:
                if failed is None:
                    raise
                failed[name] = reason(error)
                del left[name], times[name]

    turn()  # to warm up
    for rounds in times.values():
        rounds.clear()
    count, end = 0, time.perf_counter() + seconds
    while left and (count < at_least or time.perf_counter() < end):
        turn()
        count += 1
    return times


def reason(error):
    """Return in a line why a row has no numbers."""
    return f"not measured: {in_a_line(error, 80)}"


def launch_ms(step, rounds=7):
    """Return the milliseconds that the processor needs to launch a step on a GPU, a
    median. The GPU has nothing to do before, so that its queue is empty."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def profiled(step, steps=3):
    """Return what torch's profiler finds in a step on a GPU: see counts_of."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return counts_of(profile.events(), steps)


def counts_of(events, steps):
    """Return of a profiler's events, for one of so many steps, a dict: launches, the
    kernels that ran; kernels_ms, their time; convolutions_ms, that of convolutions
    forward and backward. Copies and fills of memory are no kernels."""
    kernels = [event for event in events if event.device_type == DeviceType.CUDA
               and not event.is_user_annotation
               and not event.name.startswith(("Memcpy", "Memset"))]
    convolutions = [event for event in events if event.device_type == DeviceType.CPU
                    and event.name in ("aten::convolution",
                                       "aten::convolution_backward")]

    def milliseconds(some):
        return sum(event.device_time_total for event in some) / 1e3 / steps

    return dict(launches=len(kernels) / steps, kernels_ms=milliseconds(kernels),
                convolutions_ms=milliseconds(convolutions))


def measure_rates(device):
    """Return what a GPU reaches, {"copy": bytes a second, "fp32" and "bf16": FLOPs a
    second of a matrix product}; {} for a CPU, whose product in bf16 says nothing about
    its convolutions, and for a GPU with too little memory."""
    if not on_gpu(device):
        return {}

    def clock(action):
        return timed(action, device)

    try:
        return dict(copy=roofline.copy_rate(clock, device, COPIED),
                    fp32=roofline.matmul_rate(clock, device, SIDE, torch.float32),
                    bf16=roofline.matmul_rate(clock, device, SIDE, torch.bfloat16))
    except torch.OutOfMemoryError:  # a small card, or one that others use
        return {}


def work_of(network, device, rates, itemsize):
    """Return what a training step needs, a dict: gflop, gigabytes, and roofline_ms, the
    least time. All are estimates. rates: of measure_rates; {}: there is no least time.
    """
    channels, side, classes, T, N = size_of(network, device)
    parts = roofline.count(network, classes, channels, side, T, N, itemsize)
    least = None
    if rates:
        flops = rates["bf16" if itemsize == 2 else "fp32"]
        least = 1e3 * roofline.seconds(parts, flops, rates["copy"])
    return dict(gflop=sum(part.flops for part in parts) / 1e9,
                gigabytes=sum(part.bytes for part in parts) / 1e9, roofline_ms=least)


def speed_of(times, batch, work):
    """Return the cells of a row that follow from the seconds of its steps. work: what
    work_of returns."""
    median = statistics.median(times)
    steps, least = math.ceil(EPOCH / batch), work["roofline_ms"]
    return median_and_middle_half(times, "step") | dict(
        steps_per_second=1 / median, epochs_per_minute=60 / (steps * median),
        times_roofline=1e3 * median / least if least else None, **work)


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
    its optimiser. On a CPU a process of its own measures it (Linux). None, after a line
    on stderr, if that fails."""
    try:
        if on_gpu(device):
            return _peak(network, row, str(device), time_steps)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_peak, network, row, "cpu", time_steps).result()
    except Exception as error:  # no memory; then the process may be killed
        print(f"{row}, T = {time_steps}: memory {reason(error)}", file=sys.stderr)
        return None


def _peak(network, row, device, time_steps):
    is_gpu = on_gpu(torch.device(device))

    def peak():
        if is_gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        # not getrusage: a new process starts there with the peak of its parent
        return int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1]) / 2**10

    GPU_ROWS[row].neuron()  # imports the framework
    if is_gpu:
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


def build_candidates(network, rows, device, predicts=True):
    """Return ({row: Candidate} that can be run, {other row: why not}, {row: dict of
    what building it took}).

    The dict has build_seconds, with first steps and what they compile, and on a GPU
    memory_mib, the peak of two more steps. predicts: whether to try predict() as well.
    """
    candidates, failed, built = {}, {}, {}
    is_quiet = not sys.stderr.isatty()
    for row in tqdm(rows, f"{network}: building", leave=False, disable=is_quiet):
        started = time.perf_counter()
        try:
            before = torch.cuda.memory_allocated() if on_gpu(device) else 0
            candidate = Candidate(network, row, device)
            candidate.step()
            if predicts:
                candidate.predict()
            cells = {}
            if on_gpu(device):
                torch.cuda.synchronize()
                cells["build_seconds"] = time.perf_counter() - started
                torch.cuda.reset_peak_memory_stats()
                candidate.step()
                candidate.step()
                peak = torch.cuda.max_memory_allocated() - before
                cells |= dict(memory_mib=peak / 2**20, triton=runs_triton(candidate))
        except Exception as error:  # no compiler, no memory, a kernel that fails
            failed[row] = reason(error)
            candidate = None  # frees its memory
        else:
            candidates[row], built[row] = candidate, cells
    return candidates, failed, built


def runs_triton(candidate):
    """Return whether Triton runs the first neurons of a row of this project; None for
    others."""
    lif = candidate.net.get_submodule(candidate.lifs[0])
    if not hasattr(lif, "runs_triton"):
        return None
    dtype = torch.bfloat16 if candidate.row.precision == "bf16" else torch.float32
    x_seq = torch.zeros(2, 1, 1, 1, 1, dtype=dtype, device=candidate.device)
    return lif.runs_triton(x_seq, len(x_seq))


def differing_spikes(candidates):
    """Return {row: share of its spikes that differ from this project's, 0..1}."""
    if OURS not in candidates:
        return {}
    reference = candidates[OURS].spikes()
    total = sum(layer.numel() for layer in reference)
    shares = {}
    for row, candidate in candidates.items():
        if candidate.row.neuron is not Floor:
            differ = sum((own != ours).sum().item() for own, ours
                         in zip(candidate.spikes(), reference))
            shares[row] = differ / total
    return shares


def measure(network, device, quick, rates):
    """Return (rows, ratios) of one network: dicts, and {name of a ratio: number}.
    rates: of measure_rates."""
    # networks share the code of their class, and its limit of compilations
    torch.compiler.reset()
    found = times_of(network, device, quick)
    memory = memory_of(network, found["step"], device, quick, found["built"])
    return (rows_of(network, device, rates, found, memory),
            ratios_of(network, device, found, memory))


def times_of(network, device, quick):
    """Let the rows of a network take turns. Return what they took, a dict:

    step, infer     {row: seconds of the rounds}, of training steps and of inference
    pair            the same of further steps of OURS and RECORDING alone
    masks           the same of what is done with masks
    launches        see launches_of
    built, missing  see build_candidates; missing: {row that was not measured: why}
    differing       see differing_spikes
    """
    installed, missing = available(rows_on(device, quick))
    candidates, failed, built = build_candidates(network, installed, device)
    missing |= failed
    found = dict(built=built, missing=missing, differing=differing_spikes(candidates),
                 pair={}, masks={}, launches={})

    seconds = (GPU_SECONDS if on_gpu(device) else SECONDS)["quick" if quick else "full"]
    print(f"{network}: training steps, {seconds} s and more", file=sys.stderr)
    steps = {row: candidate.step for row, candidate in candidates.items()}
    found["step"] = take_turns(steps, seconds, device, failed=missing)
    pair = {row: steps[row] for row in (OURS, RECORDING) if row in found["step"]}
    if len(pair) == 2:
        found["pair"] = take_turns(pair, seconds / 4, device)
    print(f"{network}: inference and memory", file=sys.stderr)
    predictions = {row: candidate.predict for row, candidate in candidates.items()
                   if candidate.row.recorded is None}
    found["infer"] = take_turns(predictions, seconds / 4, device, at_least=4,
                                failed=missing)
    if OURS in found["step"]:
        ours = candidates[OURS]
        masks = Masks(ours.net)
        found["masks"] = take_turns(
            {"a mask update": mask_update_of(ours.net),
             "masks after a step": lambda: masks.apply(ours.optimizer)}, 1, device)
    if on_gpu(device):
        found["launches"] = launches_of(steps)
    return found


def rows_of(network, device, rates, found, memory):
    """Return the rows of a network, dicts. rates: of measure_rates. found: of times_of.
    memory: of memory_of."""
    T, N = size_of(network, device)[3:]
    work = {itemsize: work_of(network, device, rates, itemsize) for itemsize in (2, 4)}
    table = []
    for row, times in found["step"].items():
        cells = dict(network=network, row=row, batch=N, time_steps=T,
                     spikes_differing=found["differing"].get(row))
        cells |= found["built"][row] | dict(memory_mib=memory.get((row, T)))
        cells |= speed_of(times, N, work[GPU_ROWS[row].itemsize])
        if row in found["infer"]:
            cells |= median_and_middle_half(found["infer"][row], "infer")
        table.append(cells | found["launches"].get(row, {}))
    table += [dict(network=network, row=row, note=why)
              for row, why in found["missing"].items() if row not in found["step"]]
    table += [dict(network=network, row=row, time_steps=time_steps, memory_mib=mib)
              for (row, time_steps), mib in memory.items() if time_steps != T]
    table += [dict(network=network, row=row, **median_and_middle_half(times, "step"))
              for row, times in found["masks"].items()]
    return table


def ratios_of(network, device, found, memory):
    """Return the ratios of a network, {name: number}. For the arguments see rows_of."""
    T, steps, ratios = size_of(network, device)[3], found["step"], {}
    if found["pair"]:
        recording, alone = (steps[row] + found["pair"][row]
                            for row in (RECORDING, OURS))
        ratios["criticality_overhead"] = ratio(recording, alone) - 1
    if found["masks"]:
        ratios["update_vs_step"] = (statistics.median(found["masks"]["a mask update"])
                                    / statistics.median(steps[OURS]))
    kinds = {"step": steps, "infer": found["infer"]}
    for precision in ("fp32", "bf16"):
        ratios |= ratios_in(precision, kinds)
        ours = steps.get(f"this project, {precision}")
        plain = steps.get(f"this project, {precision}, without Triton")
        if ours and plain:
            ratios[f"step_{precision}_without_triton"] = ratio(plain, ours)
    if (OURS, T) in memory and (THEIRS, T) in memory:
        ratios["memory_vs_spikingjelly"] = memory[OURS, T] / memory[THEIRS, T]
    if on_gpu(device):
        in_mib = {row: mib for (row, time_steps), mib in memory.items()
                  if time_steps == T}
        ratios |= gpu_ratios(steps, in_mib, found["launches"])
    return ratios


def gpu_ratios(times, memory, launches):
    """Return the ratios in bf16 that matter on a GPU, {name: number}: to SpikingJelly
    as it comes, to its fused kernels, and to the time of the convolutions alone. One
    without its rows is left out.

    times: {row: seconds of the rounds}. memory: {row: MiB}. launches: of launches_of.
    """
    ours, fused = "this project, bf16", "SpikingJelly, bf16, channels_last, fused"
    ratios = {}
    for name, row in {"default": "SpikingJelly, bf16", "fused": fused}.items():
        if ours in times and row in times:
            ratios[f"step_bf16_vs_spikingjelly_bf16_{name}"] = ratio(
                times[row], times[ours])
    if ours in memory and fused in memory:
        ratios["memory_bf16_vs_spikingjelly_fused"] = memory[ours] / memory[fused]
    convolutions = launches.get(ours, {}).get("convolutions_ms")
    if ours in times and convolutions:
        ratios["step_bf16_vs_convolutions"] = (1e3 * statistics.median(times[ours])
                                               / convolutions)
    return ratios


def launches_of(steps):
    """Return {row: a dict of what its launches take on a GPU}. steps: {row: action}.
    What fails is a line on stderr."""
    found = {}
    for row, step in steps.items():
        try:
            found[row] = dict(host_ms=launch_ms(step), **profiled(step))
        except Exception as error:
            print(f"{row}: launches {reason(error)}", file=sys.stderr)
    return found


def memory_of(network, rows, device, quick, built):
    """Return {(row, T): MiB} at the peak of training, of what could be measured. built:
    of build_candidates."""
    T = size_of(network, device)[3]
    memory = {(row, T): built[row]["memory_mib"] for row in rows
              if "memory_mib" in built[row]}
    if not on_gpu(device) and not STATUS.exists():
        return memory
    wanted = [OURS, THEIRS] if quick else [OURS, THEIRS, FLOOR]
    for row in wanted:
        for time_steps in ([T] if quick else [1, T, 2 * T]):
            if row in rows and (row, time_steps) not in memory:
                memory[row, time_steps] = peak_memory(network, row, device, time_steps)
    return {key: mib for key, mib in memory.items() if mib is not None}


def measure_compiled(network, device, quick, rates):
    """Return (rows, ratios), as measure does, of this project compiled, on a GPU: each
    in turns with itself as it is. `quick`: in bf16 alone."""
    T, N = size_of(network, device)[3:]
    seconds = GPU_SECONDS["quick" if quick else "full"] / 4
    table, ratios = [], {}
    for precision in ["bf16"] if quick else ["bf16", "fp32"]:
        ours = f"this project, {precision}"
        compiled = f"{ours}, compiled"
        print(f"{network}: compiling, {precision}", file=sys.stderr)
        torch.compiler.reset()
        candidates, missing, built = build_candidates(network, [ours, compiled], device,
                                                      predicts=False)
        steps = {row: candidate.step for row, candidate in candidates.items()}
        times = take_turns(steps, seconds, device, failed=missing)
        cells = dict(network=network, row=compiled)
        if compiled in times:
            row = GPU_ROWS[compiled]
            work = work_of(network, device, rates, row.itemsize)
            cells |= dict(batch=N, time_steps=T) | built[compiled]
            cells |= speed_of(times[compiled], N, work)
            cells |= launches_of({compiled: steps[compiled]}).get(compiled, {})
            if ours in times:
                ratios[f"step_{precision}_compiled"] = ratio(times[ours],
                                                             times[compiled])
        else:
            cells["note"] = missing[compiled]
        table.append(cells)
    return table, ratios


def ratios_in(precision, kinds):
    """Return the ratios of this project's times in a precision, {name: number}. A ratio
    to a row without times is left out.

    kinds: {"step" | "infer": {row: times}}.
    """
    ours = f"this project, {precision}"
    floor = f"ReLU floor, {precision}"
    ratios = {}
    for kind, times in kinds.items():
        if ours not in times:
            continue
        if kind == "step" and floor in times:
            ratios[f"step_{precision}_vs_relu_floor"] = ratio(times[ours], times[floor])
        compiled = times.get(f"{ours}, compiled")
        if compiled is not None:
            ratios[f"{kind}_{precision}_compiled"] = ratio(times[ours], compiled)
        if THEIRS in times:
            ratios[f"{kind}_{precision}_vs_spikingjelly"] = ratio(
                times[THEIRS], times[ours])
        alike = [row for row in times
                 if row.startswith("SpikingJelly") and precision in row]
        if alike:
            ratios[f"{kind}_{precision}_like_for_like"] = min(
                ratio(times[row], times[ours]) for row in alike)
    return ratios


def measure_pruned_inference(network, device):
    """Return rows of inference with 90 % of the weights masked, and with half of the
    channels removed, beside the dense network."""
    channels, side, classes, T, N = size_of(network, device)
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
            times = take_turns(actions, 2 if on_gpu(device) else 5, device)
        rows += [dict(network=network, row=f"inference, {name}", batch=batch,
                      time_steps=T, speedup=ratio(times["dense"], times[name]),
                      **median_and_middle_half(times[name], "infer"))
                 for name in nets]
    return rows


# ---- scaling -------------------------------------------------------------------------


def measure_scaling(device):
    """Return rows: images a second over batch size and T, seconds of an update over the
    number of weights, images a second of one and two processes."""
    network = "vgg16" if on_gpu(device) else "small"
    T, N = size_of(network, device)[3:]
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
    for count in (1, 2):
        rows.append(dict(scaling="processes", row="torchrun, prune_unstructured.py",
                         processes=count, images_per_second=torchrun(count, device)))
    return rows


def torchrun(count, device):
    """Return the training images a second of an epoch of prune_unstructured.py, its
    evaluation included, over so many processes that share the processor's threads (on
    GPUs: one GPU each). None, after a line on stderr, if that fails."""
    root = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={count}", str(root / "prune_unstructured.py"),
                   "--run-dir", f"{folder}/run", "--epochs-prune", "3",
                   "--epochs-finetune", "0", "--device", device.type]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root,
                              env=os.environ | threads_each(count))
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no message"]
            print(f"torchrun with {count} processes failed: {said[-1]}",
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
    figure, axes = plots.canvas(2, 2)
    for axis, (key, x, y, is_logarithmic) in zip(axes.flat, panels):
        own = [row for row in rows if row["scaling"] == key]
        value = "seconds" if key == "weights" else "images_per_second"
        names = list(dict.fromkeys(row["row"] for row in own))
        for name, colour in zip(names, (plots.BLUE, plots.GREEN, plots.RED)):
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


# ---- table and picture ---------------------------------------------------------------

def cell(key, form="{:.3g}", factor=1):
    """Return a function that writes a number of a row, "" where there is none."""
    def write(row):
        value = row.get(key)
        return "" if value is None else form.format(factor * value)
    return write


def time_cell(key):
    """Return a function that writes a median and its middle half."""
    def write(row):
        values = [row.get(f"{key}{part}_ms") for part in ("", "_low", "_high")]
        if None in values:
            return ""
        return "{} ({}-{})".format(*(short(value) for value in values))
    return write


def short(number):
    """Return a number with one digit behind the point, or three digits in all if it is
    below 10."""
    return f"{number:.1f}" if number >= 10 else f"{number:#.3g}"


def step_cell(row):
    return row.get("note") or time_cell("step")(row)


COLUMNS = {  # title: how a row writes it. A column without a cell is left out
    "network": cell("network", "{}"),
    "row": cell("row", "{}"),
    "batch": cell("batch", "{}"),
    "T": cell("time_steps", "{}"),
    "step, ms": step_cell,
    "launching it, ms": cell("host_ms"),
    "steps / s": cell("steps_per_second"),
    "epochs / min": cell("epochs_per_minute"),
    "x roofline": cell("times_roofline", "{:.1f}"),
    "convolutions, ms": cell("convolutions_ms"),
    "launches": cell("launches", "{:.0f}"),
    "inference, ms": time_cell("infer"),
    "memory, MiB": cell("memory_mib", "{:.0f}"),
    "spikes that differ": cell("spikes_differing", "{:.4f} %", 100),
    "until the first step, s": cell("build_seconds", "{:.0f}")}
LEGEND = {  # title: what it is
    "step, ms": "a training step: the median, and the middle half in brackets",
    "launching it, ms": "the processor's time for a step",
    "epochs / min": f"of {EPOCH:,} images",
    "x roofline": "the time over the least time for its bytes and FLOPs, an estimate",
    "convolutions, ms": "their own time in the step",
    "launches": "kernels a step",
    "memory, MiB": "at the peak of training",
    "spikes that differ": "from this project's in fp32, in the first batch",
    "until the first step, s": "with all that is compiled for it"}


def markdown(rows):
    """Return rows of measure() and measure_pruned_inference() as a Markdown table, and
    under it what its columns are."""
    table = {title: [write(row) for row in rows] for title, write in COLUMNS.items()}
    table = {title: cells for title, cells in table.items() if any(cells)}
    columns = []
    for title, cells in table.items():
        width = max(map(len, [title, *cells]))
        columns.append([text.ljust(width) for text in [title, "-" * width, *cells]])
    lines = [f"| {' | '.join(line)} |" for line in zip(*columns)]
    legend = [f"- {title}: {text}" for title, text in LEGEND.items() if title in table]
    return "\n".join([*lines, "", *legend])


def text_of(ratios):
    return "\n".join(f"    {name:<44}{value:.3f}" for name, value in ratios.items())


def title_of(result):
    """Return in a line on what the numbers of a result were measured."""
    title = (f"{result['device']}, {result['threads']} threads, torch "
             f"{result['torch']}")
    if result["rates"]:
        copy, fp32, bf16 = (result["rates"][name] for name in ("copy", "fp32", "bf16"))
        title += (f"; a copy {copy / 1e9:.0f} GB/s, a matrix product "
                  f"{fp32 / 1e12:.3g} TFLOP/s in fp32, {bf16 / 1e12:.3g} in bf16")
    return title


def write_report(result, folder):
    """Write benchmark.json, the table benchmark.md and the picture steps.png into a
    folder."""
    write_json(folder / "benchmark.json", result)
    parts = [title_of(result), markdown(result["rows"]), "Ratios:",
             text_of(result["ratios"])]
    text = "\n\n".join(parts) + "\n"
    write_whole(folder / "benchmark.md", lambda file: file.write(text))
    draw_steps(result, folder)


# The colour of a row, by the words that it starts with
COLOURS = {"this project": plots.BLUE, "SpikingJelly": plots.RED,
           "snnTorch": plots.PINK, "plain autograd": plots.ORANGE,
           "ReLU floor": plots.GREY}
PANELS = {"step_ms": "Training step (ms)", "memory_mib": "Peak memory (MiB)",
          "launches": "Kernel launches a step"}


def colour_of(row):
    return next((colour for start, colour in COLOURS.items() if row.startswith(start)),
                plots.BLACK)


def draw_steps(result, folder):
    """Draw the rows of a result as folder/steps.png, .pdf and .csv: bars of the time of
    a step, of the memory and of the launches, as far as they were measured."""
    rows = [row for row in result["rows"] if row.get("steps_per_second")]
    if not rows:
        return
    keys = [key for key in PANELS if any(row.get(key) for row in rows)]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plots.canvas(len(keys), len(networks))
    most = max(sum(row["network"] == network for row in rows) for network in networks)
    figure.set_size_inches(2.2 + 2.6 * len(keys), len(networks) * (0.9 + 0.17 * most))
    for network, panels in zip(networks, axes):
        own = [row for row in rows if row["network"] == network][::-1]
        names = [row["row"] for row in own]
        for axis, key in zip(panels, keys):
            draw_bars(axis, own, key)
            axis.set_yticks(range(len(own)), names if axis is panels[0] else [])
            axis.set_xlabel(PANELS[key])
            axis.set_ylim(-0.6, len(own) - 0.4)
        panels[0].set_title(f"{network}, batch {own[0]['batch']}", fontsize=8)
    note = f"{title_of(result)}. Black: the middle half of the rounds"
    if result["rates"]:
        note += "; dotted: the least time by the roofline model, an estimate"
    plots.note(figure, f"{note}.")
    names = list(dict.fromkeys(key for row in rows for key in row))
    plots.save(folder / "steps", figure, [dict.fromkeys(names) | row for row in rows],
               f"training steps on {title_of(result)}")


def draw_bars(axis, rows, key):
    """Draw a bar for each row that has the number."""
    for y, row in enumerate(rows):
        value = row.get(key)
        if value is None:
            continue
        axis.barh(y, value, color=colour_of(row["row"]), height=0.75)
        if key == "step_ms":
            axis.plot([row["step_low_ms"], row["step_high_ms"]], [y, y],
                      color=plots.BLACK, linewidth=1)
            if row["roofline_ms"]:
                axis.plot([row["roofline_ms"]] * 2, [y - 0.45, y + 0.45],
                          color=plots.BLACK, linewidth=0.8, linestyle=":")


# ---- the script ----------------------------------------------------------------------


def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true",
        help="VGG-16 only, no scaling; compiled on a GPU alone, in bf16")
    add("--networks", nargs="+", choices=list(SIZES), metavar="NAME",
        help=f"of {', '.join(SIZES)} (default: all of them, and the scaling)")
    add("--json", type=flags.path, metavar="FILE",
        help="write every row and the ratios")
    add("--report", type=flags.folder, metavar="DIR",
        help="write benchmark.json, the table benchmark.md and the picture steps.png "
             "into this folder")
    add("--figures", type=flags.folder, metavar="DIR",
        help="draw the scaling (not with --quick or --networks) into this folder")
    add("--device", type=flags.device, metavar="DEVICE",
        help="cpu, cuda or cuda:1; default: the GPU where there is one")
    parser.set_defaults(quick=False, networks=None, json=None, report=None,
                        figures=None, device=None)
    args = parser.parse_args(argv)
    if args.figures and (args.quick or args.networks):
        parser.error("--figures needs the scaling, which --quick and --networks leave "
                     "out, expected one of the two. Leave one out")
    return args


def parts_of(networks, device, quick, rates):
    """Yield (rows, ratios) of one part of the measurement after the other."""
    parts = [measure, measure_compiled] if on_gpu(device) else [measure]
    for network in networks:
        prefix = "" if network == "vgg16" else f"{network}_"
        for part in parts:
            rows, ratios = part(network, device, quick, rates)
            yield rows, {prefix + name: value for name, value in ratios.items()}
        yield measure_pruned_inference(network, device), {}


def main(argv=None):
    args = parse_args(argv)
    with flags.exits(2, ValueError, OSError):
        processes.require_one()
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise ValueError(f"the folder of --json {args.json} does not exist, "
                             f"expected one. Make it")
        if args.json and Path(args.json).is_dir():
            raise ValueError(f"--json is {args.json}, a folder, expected a file. Name "
                             f"one in it, such as {Path(args.json, 'all.json')}")
        if args.report:
            Path(args.report).mkdir(parents=True, exist_ok=True)
        device = setup.choose_device(args.device)
    if device.type == "cpu" and sys.platform == "linux":
        setup.keep_freed_memory()  # in all rows, those of the frameworks too
    set_precision()  # as in a run, in all rows
    started = time.perf_counter()
    result = dict(
        device=device_name(device), threads=torch.get_num_threads(),
        torch=torch.__version__, spikingjelly_kernels=spikingjelly_kernels(device),
        seconds=0, rates=measure_rates(device), ratios={}, rows=[])
    print(f"{title_of(result)}; times: median (middle half)\n", flush=True)

    def add(rows, ratios={}):
        """Add to the result, and write what there is: a later part may fail."""
        result["rows"] += rows
        result["ratios"] |= ratios
        result["seconds"] = time.perf_counter() - started
        if args.json:
            write_json(Path(args.json), result)
        if args.report:
            write_report(result, Path(args.report))

    networks = args.networks or (["vgg16"] if args.quick else list(SIZES))
    with flags.exits(1, OSError, no_memory="Name fewer --networks"):
        try:
            for rows, ratios in parts_of(networks, device, args.quick, result["rates"]):
                add(rows, ratios)
        finally:
            print(text_of(result["ratios"]) + "\n")
            print(markdown(result["rows"]))
        if not args.quick and not args.networks:
            scaled = measure_scaling(device)
            add(scaled)
            for folder in {args.figures, args.report} - {None}:
                draw_scaling(scaled, Path(folder))
    print(f"\ndone in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
