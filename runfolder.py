"""The folder of a run: its log, its checkpoints, its results. A killed run goes on bit by bit.

    run = Run(args, device, stages, net=net, optimizer=optimizer, masks=masks)  # after all checks
    for x, y in run.track(images, epoch):            # counts, saves on Ctrl-C, watches for NaN
        ...
    run.end_epoch(...)                               # a line, a row of metrics.jsonl, a checkpoint
    run.finish(...)                                  # model.pt, curves.png and, last, summary.json

Every file is written whole to a temporary name and renamed. What goes wrong under way (a loss that
is not finite, a full disk) ends the script with exit code 1, with the last good checkpoint in
place.
"""
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm

import data
import metrics
import models
from flags import MAY_DIFFER
from training import Meter

CHECKPOINT_FORMAT = 1
FILES = ("config.json", "metrics.jsonl", "updates.jsonl", "checkpoint.pt", "model.pt",
         "summary.json", "curves.png", "channels.json", "gamma.npz", "compact.pt", "analysis.npz")
SUMMARY_KEYS = (
    "script method dataset model seed time_steps train_limit widths test_accuracy pruned_accuracy "
    "dense_accuracy regen prune_ratio sparsity sparsity_all layers parameters parameters_alive "
    "macs macs_dense macs_first_once macs_every_step sops energy_mj firing_rate speedup_batch1 "
    "speedup_batch32 epochs training_cost survived_by_regeneration seconds peak_memory_mib").split()


def finished(args):
    """Return the summary of a run that --resume finds finished, after saying so, else None."""
    path = Path(args.run_dir, "summary.json")
    if not args.resume or not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
        result = (f"test accuracy {100 * summary['test_accuracy']:.2f} %, "
                  f"{100 * summary['sparsity']:.2f} % sparse")
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is damaged, expected the summary of a finished run. Remove it to "
                         f"go on from the checkpoint, or start again with --overwrite") from None
    print(f"{args.run_dir} is finished: {result}. Nothing is left to do")
    return summary


def read_checkpoint(folder):
    """Return what the checkpoint of a run holds, None if there is none."""
    path = Path(folder, "checkpoint.pt")
    if not path.exists():
        return None
    with fits(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {state['format']}, expected {CHECKPOINT_FORMAT}")
        return state


@contextmanager
def fits(path):
    """Turn whatever a bad checkpoint raises into one ValueError that says what to do."""
    try:
        yield
    except Exception as error:  # torch.load raises what zipfile, pickle and the system raise
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} does not fit this run or is damaged ({detail}). Give the flags "
                         f"that it was made with, or start again with --overwrite") from None


def saved_widths(args):
    """Return the widths of the network that --resume goes on with, None if it starts anew."""
    state = read_checkpoint(args.run_dir) if args.resume else None
    return state["widths"] if state else None


# ---- files ---------------------------------------------------------------------------------------


def write_whole(path, write, mode="w"):
    """Write a file to a temporary name, flush it, and rename it: it is whole or it is not there."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, mode) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1, allow_nan=False) + "\n"))


def write_lines(path, rows):
    write_whole(path, lambda file: file.writelines(json.dumps(row) + "\n" for row in rows))


def save_tensors(path, value):
    write_whole(path, lambda file: torch.save(value, file), "wb")


def versions():
    """Return the versions of what a run depends on, flat, for config.json."""
    names = ("torch", "torchvision", "numpy")
    found = dict.fromkeys((f"version_{name}" for name in names))
    for name in names:
        with suppress(PackageNotFoundError):  # torchvision is needed by some data sets only
            found[f"version_{name}"] = version(name)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                            capture_output=True) if shutil.which("git") else None
    return found | dict(version_python=platform.python_version(),
                        commit=commit.stdout.strip() or None if commit else None)


def peak_memory_mib(device):
    """Return the peak memory of the device (GPU) or of this process (CPU) in MiB,
    None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (2**20 if sys.platform == "darwin" else 2**10))


def device_name(device):
    """Return the name of the GPU, or of the processor as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")  # Linux, where platform knows no more than "x86_64"
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def draw_curves(rows, path):
    """Draw accuracy, loss and sparsity over the epochs of a run into a PNG file."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blue, orange, green = "#0072B2", "#D55E00", "#009E73"  # Okabe-Ito: told apart by all eyes
    epochs = [row["epoch"] for row in rows]
    with plt.rc_context({"font.size": 9, "xtick.labelsize": 7, "ytick.labelsize": 7}):
        figure, axes = plt.subplots(1, 3, figsize=(7.0, 2.4), layout="constrained")
        for key, colour, line, label in (("train", blue, "--", "training"),
                                         ("test", orange, "-", "test")):
            style = dict(color=colour, linestyle=line, marker=".", markersize=3, linewidth=1,
                         label=label)
            axes[0].plot(epochs, [100 * row[f"{key}_accuracy"] for row in rows], **style)
            axes[1].plot(epochs, [row[f"{key}_loss"] for row in rows], **style)
        axes[2].plot(epochs, [100 * row["sparsity"] for row in rows], color=green, marker=".",
                     markersize=3, linewidth=1)
        for axis, label in zip(axes, ("Accuracy (%)", "Loss (nats)", "Sparsity (%)")):
            axis.set(xlabel="Epoch", ylabel=label)
            axis.xaxis.get_major_locator().set_params(integer=True)
            ends = [a["epoch"] for a, b in zip(rows, rows[1:]) if a["stage"] != b["stage"]]
            for end in ends:
                axis.axvline(end + 0.5, color="grey", linewidth=0.7, linestyle=":")
                axis.annotate(rows[end - rows[0]["epoch"] + 1]["stage"], (end + 0.5, 1.01),
                              fontsize=7, xycoords=("data", "axes fraction"), color="grey")
        axes[0].legend(fontsize=7, frameon=False)
        axes[2].set_ylim(-3, 103)
        write_whole(path, lambda file: figure.savefig(file, format="png", dpi=200), "wb")
        plt.close(figure)


# ---- the run -------------------------------------------------------------------------------------


class Run:
    """One run: its folder, its position, its log, its checkpoints.

    epoch, step, iteration: epochs done (over all stages), steps done of the epoch under way, steps
    done in all. rows, updates: what metrics.jsonl and updates.jsonl hold. parts: {name: object with
    state_dict and load_state_dict}, saved and restored together: network, optimizer, masks.
    Nothing is written before all that can be checked was checked: it is made last.
    """

    def __init__(self, args, device, stages, **parts):
        self.args, self.device, self.stages, self.parts = args, device, stages, parts
        self.total_steps = stages.epochs * stages.steps_per_epoch
        self.folder = Path(args.run_dir)
        self.epoch = self.step = self.iteration = 0
        self.rows, self.updates, self.notes = [], [], {}
        self.meter = Meter(device)
        self.stopped_by = None
        self.seconds = 0.0  # of the epoch under way, before it was resumed
        self._open()
        self.bar = tqdm(total=self.total_steps, initial=self.iteration, unit="step",
                        dynamic_ncols=True, disable=not sys.stderr.isatty(), leave=False)
        self.started = self.began = time.monotonic()
        self.first_iteration = self.iteration

    # ---- the folder ------------------------------------------------------------------------------

    def _open(self):
        """Make the folder, or go on in it, or say why not."""
        folder, args = self.folder, self.args
        for path in (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise ValueError(f"{path} is a file, expected a folder (or nothing yet) there. "
                                 f"Name another --run-dir")
        taken = folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir())
        if taken and not (folder / "config.json").exists():
            raise ValueError(f"{folder} is not empty and holds no run, expected a new folder or "
                             f"one with a config.json. Name another --run-dir")
        if taken and not args.resume and not args.overwrite:
            raise ValueError(f"{folder} holds a run already. Go on with it by --resume, replace it "
                             f"by --overwrite, or name another --run-dir")
        if taken and args.resume:
            return self._restore()
        config = {key: value for key, value in vars(args).items()
                  if key not in ("resume", "overwrite")}
        config |= versions() | dict(script=Path(sys.argv[0]).stem,
                                    device_name=device_name(self.device),
                                    threads=torch.get_num_threads())
        if taken:
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)

    def _flags(self):
        """Return the flags that a run that goes on must share with its beginning."""
        free = MAY_DIFFER | {"resume", "overwrite", "run_dir"}
        return {flag: value for flag, value in vars(self.args).items() if flag not in free}

    def _restore(self):
        state = read_checkpoint(self.folder)
        if state is None:
            return
        with fits(self.folder / "checkpoint.pt"):
            for flag, value in self._flags().items():
                if state["flags"].get(flag) != value:
                    raise ValueError(f"it was made with {flag} {state['flags'].get(flag)}, not "
                                     f"{value}")
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            self.rows, self.updates = (self._read_lines(name, state[name])
                                       for name in ("metrics", "updates"))
            self.epoch, self.step, self.iteration = state["position"]
            self.seconds, self.notes = state["seconds"], state["notes"]
            self.meter.restore(state["meter"])
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["rng_cuda"] is not None:
                torch.cuda.set_rng_state(state["rng_cuda"])

    def _read_lines(self, name, count):
        """Read the first `count` rows of a log: later ones are of work that is done again."""
        if count == 0:
            return []
        lines = (self.folder / f"{name}.jsonl").read_text().splitlines()
        if len(lines) < count:
            raise ValueError(f"{name}.jsonl has {len(lines)} lines, expected {count}")
        return [json.loads(line) for line in lines[:count]]

    def save(self):
        """Write checkpoint.pt: all that is needed to go on bit by bit.

        Nothing that is not finite replaces the last good one. A NaN in a weight need not reach the
        loss: a potential that is NaN is below every threshold, so that its neuron is silent.
        """
        self.meter.check()
        net = self.parts["net"].state_dict()
        finite = torch.stack([tensor.isfinite().all() for tensor in net.values()]).tolist()
        if not all(finite):
            raise FloatingPointError(
                f"{list(net)[finite.index(False)]} is not finite after iteration {self.iteration}. "
                f"A checkpoint saved before is kept; try a lower --lr")
        save_tensors(self.folder / "checkpoint.pt", {
            "format": CHECKPOINT_FORMAT, "position": [self.epoch, self.step, self.iteration],
            "flags": self._flags(), "widths": self.parts["net"].config["widths"],
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "metrics": len(self.rows), "updates": len(self.updates), "notes": self.notes,
            "meter": self.meter.state(), "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "seconds": self.seconds + time.monotonic() - self.began})

    # ---- under way -------------------------------------------------------------------------------

    def say(self, line):
        tqdm.write(line)
        sys.stdout.flush()

    @contextmanager
    def catching_signals(self):
        """Let Ctrl-C and SIGTERM end the run at the next step, saved;
        a second one ends it at once."""
        def stop(number, _):
            self.stopped_by = number
            signal.signal(number, previous[number])

        previous = {number: signal.signal(number, stop)
                    for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self.bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def epochs_of(self, stage):
        """Yield the epochs of a stage that are still to be done, counted over all stages."""
        while self.epoch < self.stages.epochs and self.stages.place(self.epoch)[0] == stage:
            yield self.epoch

    def track(self, images, epoch):
        """Yield the batches of an epoch that are still to be done, and keep count of them; stop,
        saved, when a signal came.

        At a batch's body `iteration` counts it, from 1, and `step` does not yet. The loss is
        checked at each step on a CPU, now and then on a GPU, where looking means waiting.
        """
        args = self.args
        for batch in data.batches(images.x_train, images.y_train, args.batch_size, args.seed, epoch,
                                  self.step, args.crop, args.flip, args.cutout, args.rotate):
            self.iteration += 1
            yield batch
            self.step += 1
            self.bar.update()
            if self.device.type == "cpu" or self.step % 50 == 0:
                self.meter.check()
            if self.stopped_by is not None:
                self.save()
                self._stop()

    def _stop(self):
        self.bar.close()
        self.say(f"stopped after iteration {self.iteration}, saved. Go on with: python "
                 f"{shlex.join([sys.argv[0], '--resume', '--run-dir', self.args.run_dir])}")
        raise SystemExit(128 + self.stopped_by)

    def header(self, images, net, plan):
        """Say what runs, on what, where; plan: what the script does, in a line."""
        sizes = metrics.parameters(net)
        prunable = sum(layer["weights"] for layer in sizes["layers"])
        stages = ", ".join(f"{name} {epochs}" for name, epochs in self.stages.by_name.items())
        self.say(
            f"{Path(sys.argv[0]).stem}  torch {torch.__version__}  {self.args.device}  "
            f"{self.args.precision}  seed {self.args.seed}  ->  {self.folder}\n"
            f"data {images.name}: {len(images.x_train):,} train, {len(images.x_test):,} test, "
            f"{images.num_classes} classes   model {self.args.model}, T = {self.args.time_steps}, "
            f"{sizes['parameters']:,} parameters, {prunable:,} prunable\n"
            f"epochs: {stages}, {self.stages.steps_per_epoch} steps each   {plan}")
        if self.iteration:
            self.say(f"resumed after iteration {self.iteration} of {self.total_steps}")

    def add_update(self, row):
        """Log one mask update, on the screen and in updates.jsonl."""
        self.updates.append(row)
        write_lines(self.folder / "updates.jsonl", self.updates)
        self.say(f"  update {row['update']:>3}  pruned {row['pruned']:,}  regenerated "
                 f"{row['regenerated']:,}  sparse {100 * row['sparsity']:.1f} %")

    def end_epoch(self, lr, test, sparsity):
        """Log an epoch, on the screen and in metrics.jsonl, and save a checkpoint.

        lr: of the last step. test: what evaluate() returned.
        """
        stage, within, count = self.stages.place(self.epoch)
        self.meter.check()
        if not math.isfinite(test["loss"]):
            raise FloatingPointError(f"the test loss is not finite after iteration "
                                     f"{self.iteration}. A checkpoint saved before is kept; "
                                     f"try a lower --lr")
        loss, accuracy = self.meter.means()
        now = time.monotonic()
        seconds, self.seconds, self.began = self.seconds + now - self.began, 0.0, now
        self.epoch, self.step, self.meter = self.epoch + 1, 0, Meter(self.device)
        self.rows.append(dict(
            stage=stage, epoch=self.epoch, iteration=self.iteration, lr=lr, train_loss=loss,
            train_accuracy=accuracy, test_loss=test["loss"], test_accuracy=test["accuracy"],
            sparsity=sparsity, firing_rate=test["rate"], seconds=seconds))
        write_lines(self.folder / "metrics.jsonl", self.rows)
        self.save()
        left = ((self.total_steps - self.iteration) * (now - self.started)
                / max(1, self.iteration - self.first_iteration))
        self.say(f"{stage:<9}{within + 1:>4}/{count:<4} lr {lr:.4f}  loss {loss:.3f}  train "
                 f"{100 * accuracy:.1f} %  test {100 * test['accuracy']:.1f} %  sparse "
                 f"{100 * sparsity:.1f} %  firing {test['rate']:.3f}  {seconds:.0f} s  left "
                 f"{duration(left)}")
        if test["silent"]:
            self.say(f"  note: no neuron of {', '.join(test['silent'])} fired on the whole test set")
        if self.stopped_by is not None:
            self._stop()

    def finish(self, net, alive, counts, **summary):
        """Write model.pt, curves.png and, last, summary.json; return the summary.

        counts: what metrics.count() returned. summary: the keys that only the script knows; what it
        leaves out is null.
        """
        args, rows = self.args, self.rows
        densities = [1.0] + [1 - row["sparsity"] for row in rows[:-1]]  # at the start of each epoch
        known = dict(
            dataset=args.dataset, model=args.model, seed=args.seed, time_steps=args.time_steps,
            train_limit=args.train_limit, widths=net.config["widths"], epochs=len(rows),
            test_accuracy=rows[-1]["test_accuracy"], training_cost=sum(densities) / len(densities),
            seconds=sum(row["seconds"] for row in rows),
            peak_memory_mib=peak_memory_mib(self.device))
        values = dict.fromkeys(SUMMARY_KEYS) | {
            key: value for key, value in (counts | known | summary).items() if key in SUMMARY_KEYS}
        save_tensors(self.folder / "model.pt", models.pack(net, alive))
        draw_curves(rows, self.folder / "curves.png")
        write_json(self.folder / "summary.json", values)
        self.say_summary(values)
        return values

    def say_summary(self, values):
        """Print the result: accuracies by stage, then what the final network costs."""
        for stage in ("dense", "pruned", "test"):
            if values[f"{stage}_accuracy"] is not None:
                name = {"test": "final", "pruned": "pruned, not fine-tuned"}.get(stage, stage)
                self.say(f"  {name:<24}{100 * values[f'{stage}_accuracy']:6.2f} % test accuracy")
        self.say(
            f"  weights alive           {sum(layer['alive'] for layer in values['layers']):,} of "
            f"{sum(layer['weights'] for layer in values['layers']):,} prunable: "
            f"{100 * values['sparsity']:.2f} % sparse ({100 * values['sparsity_all']:.2f} % of all "
            f"parameters)\n"
            f"  an image costs          {values['sops']:,.0f} synaptic operations, about "
            f"{1e3 * values['energy_mj']:.3g} uJ; firing rate {values['firing_rate']:.3f}; "
            f"{values['macs']:,} MACs a step as stored")
        if values["macs"] == values["macs_dense"] and values["sparsity"] > 0:
            self.say("  masked weights are stored dense: fewer synaptic operations, "
                     "not a faster GPU")
        self.say(f"done in {duration(values['seconds'])}: {100 * values['test_accuracy']:.2f} % "
                 f"test accuracy at {100 * values['sparsity']:.1f} % sparsity -> {self.folder}")
