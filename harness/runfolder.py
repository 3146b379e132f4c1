"""The folder of a run: its log, its checkpoints, its results. A killed run goes on bit by bit.

    run = Run(args, device, stages, net=net, optimizer=optimizer, masks=masks)  # after all checks
    for x, y in run.track(images, epoch):            # counts, saves on Ctrl-C, watches for NaN
        ...
    run.end_epoch(...)                               # a line, a row of metrics.jsonl, a checkpoint
    run.finish(...)                                  # model.pt, curves.png and, last, summary.json

Every file is written whole to a temporary name and renamed, by one process at a time. What goes
wrong under way (a loss that is not finite, a full disk) ends the script with exit code 1, with the
last good checkpoint in place.
"""
import json
import math
import shlex
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

import data
from harness import files
from harness import flags
import metrics
import models
from harness import processes
from harness.files import fits, read_checkpoint, save_tensors, write_json, write_lines
from harness.machine import device_name, peak_memory_mib, versions
from masks import Broken, recount, seeded
from training import Meter, Watch

FILES = ("config.json", "summary.json", "checkpoint.pt", "metrics.jsonl", "updates.jsonl",
         "model.pt", "curves.png", "channels.json", "gamma.npz", "compact.pt", "analysis.npz")
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
    if processes.rank() == 0:
        print(f"{args.run_dir} is finished: {result}. Nothing is left to do")
    return summary


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# ---- the run -------------------------------------------------------------------------------------


class Stopped(BaseException):
    """A signal has come, and all that was done is saved."""


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
        self.stopped_by, self.weight = None, 1.0  # a signal; of this rank's share of a batch
        self.unsaved = False  # whether a step was done since the last checkpoint
        self.seconds = 0.0  # of the epoch under way, before it was resumed
        self._open()
        processes.agree("the position", torch.tensor([self.epoch, self.step, self.iteration]))
        self.watch = Watch(self.parts["net"], device)
        self.bar = tqdm(total=self.total_steps, initial=self.iteration, unit="step",
                        dynamic_ncols=True, leave=False,
                        disable=not sys.stderr.isatty() or processes.rank() > 0)
        self.started = self.began = self.saved_at = time.monotonic()
        self.first_iteration = self.iteration

    # ---- the folder ------------------------------------------------------------------------------

    def _taken(self):
        """Return whether the folder holds a run that may be gone on with or replaced; raise
        ValueError if it holds anything else."""
        folder, args = self.folder, self.args
        for path in (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise ValueError(f"{path} is a file, expected a folder (or nothing yet) there. "
                                 f"Name another --run-dir")
        taken = folder.is_dir() and any(path.suffix != ".tmp" and path.name != ".lock"
                                        for path in folder.iterdir())
        if taken and not (folder / "config.json").exists():
            raise ValueError(f"{folder} is not empty and holds no run, expected a new folder or "
                             f"one with a config.json. Name another --run-dir")
        if taken and not args.resume and not args.overwrite:
            raise ValueError(f"{folder} holds a run already. Go on with it by --resume, replace it "
                             f"by --overwrite, or name another --run-dir")
        return taken

    def _open(self):
        """Make the folder, or go on in it, or say why not."""
        folder, args = self.folder, self.args
        taken = self._taken()
        self.lock = processes.first(
            lambda: files.acquire(folder) if processes.rank() == 0 else None)
        try:
            taken = self._taken()  # another process may have been faster
            if taken and args.resume:
                return self._restore()
            config = {key: value for key, value in vars(args).items()
                      if key not in ("resume", "overwrite")}
            config |= versions() | dict(script=Path(sys.argv[0]).stem,
                                        device_name=device_name(self.device),
                                        threads=torch.get_num_threads(), processes=processes.size())
            processes.largest(0)  # all ranks have looked, before one of them writes
            write_json(folder / "config.json", config, before=self._clear)
        except BaseException:
            files.release(self.lock)
            if not taken and processes.rank() == 0:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
            raise

    def _clear(self):
        """Remove what a run has left; its summary first, so that it is finished no more."""
        for name in FILES[1:]:
            (self.folder / name).unlink(missing_ok=True)

    def _flags(self):
        """Return the flags that a run that goes on must share with its beginning."""
        free = flags.MAY_DIFFER | {"resume", "overwrite", "run_dir"}
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
            epoch, step, iteration = self.epoch, self.step, self.iteration = state["position"]
            per_epoch = self.stages.steps_per_epoch
            if not (0 <= epoch <= self.stages.epochs and 0 <= step <= per_epoch
                    and iteration == epoch * per_epoch + step and state["metrics"] == epoch):
                raise ValueError(f"its position is {state['position']}, which is none of this run")
            for name, part in self.parts.items():
                if name != "optimizer":
                    files.require_alike(name, state["parts"].get(name), part.state_dict())
                part.load_state_dict(state["parts"][name])
            for parameter, own in self.parts["optimizer"].state.items():
                for key, value in own.items():
                    if value.dim() and value.shape != parameter.shape:
                        raise ValueError(f"{key} of its optimizer is {list(value.shape)}, expected "
                                         f"{list(parameter.shape)}")
            if state["masks_hold"] and (found := self.parts["masks"].violation(
                    self.parts["optimizer"])):
                raise ValueError(f"its masks disagree with its weights: {found}")
            self.rows, self.updates = (self._read_lines(name, state[name])
                                       for name in ("metrics", "updates"))
            self.seconds, self.notes = state["seconds"], state["notes"]
            self.meter.restore(state["meter"])
            processes.restore_statistics(self.parts["net"], state["statistics"])

    def _read_lines(self, name, count):
        """Read the first `count` rows of a log: later ones are of work that is done again."""
        if count == 0:
            return []
        lines = (self.folder / f"{name}.jsonl").read_text().splitlines()
        if len(lines) < count:
            raise ValueError(f"{name}.jsonl has {len(lines)} lines, expected {count}")
        try:
            return [json.loads(line) for line in lines[:count]]
        except ValueError:
            raise ValueError(f"{name}.jsonl is damaged") from None

    def save(self):
        """Write checkpoint.pt: all that is needed to go on bit by bit. Nothing that is not finite
        replaces the last good one."""
        if self.watch.net is not self.parts["net"]:  # prune_structured.py has replaced it
            self.watch = Watch(self.parts["net"], self.device)
        self.parts["net"].state_dict()  # what compact.py trains in its place comes home
        self.check()
        if not files.holds(self.lock):
            raise OSError(f"{self.folder} was deleted or replaced under the run, expected it to "
                          f"stay. Nothing more is saved; start again")
        masks = self.parts.get("masks")  # SD-SNN and Grad R train dead weights too, for a while
        save_tensors(self.folder / "checkpoint.pt", {
            "format": files.CHECKPOINT_FORMAT, "position": [self.epoch, self.step, self.iteration],
            "flags": self._flags(), "widths": self.parts["net"].config["widths"],
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "masks_hold": masks is not None and not masks.violation(self.parts["optimizer"]),
            "metrics": len(self.rows), "updates": len(self.updates), "notes": self.notes,
            "meter": self.meter.state(),
            "statistics": processes.statistics(self.parts["net"]),
            "seconds": self.seconds + time.monotonic() - self.began})
        self.unsaved, self.saved_at = False, time.monotonic()

    # ---- what must hold --------------------------------------------------------------------------

    def check(self):
        """Raise FloatingPointError, with iteration and layer, if a loss or a number of the network
        is not finite."""
        self.watch.look(self.iteration)
        self.watch.check(self.meter)

    def verify(self, keep=None, may_be_empty=False):
        """Stop the run unless exactly `keep` weights are alive (None: as many as the last update
        has left), dead ones and their momentum are 0, and no layer is empty."""
        masks = self.parts.get("masks")
        if masks is None:  # prune_structured.py removes what goes
            return
        if keep is None and self.updates:
            keep = sum(layer["alive"] for layer in self.updates[-1]["layers"])
        if found := masks.violation(self.parts["optimizer"], keep, may_be_empty):
            raise Broken(f"after iteration {self.iteration} {found}. This is a mistake in the code "
                         f"or in the memory; a checkpoint saved before is kept")

    # ---- under way -------------------------------------------------------------------------------

    def say(self, line):
        if processes.rank() == 0:
            tqdm.write(line)
            sys.stdout.flush()

    @contextmanager
    def under_way(self):
        """What goes wrong inside is one line and exit code 1; Ctrl-C and SIGTERM end the run at the
        next step, saved. After it the folder is free for other processes."""
        size, half = self.args.batch_size, max(1, self.args.batch_size // 2)
        try:
            with (flags.exits(1, FloatingPointError, OSError, Broken, no_memory=(
                    f"Try --batch-size {half} instead of {size}" + " or --precision bf16" * (
                        self.args.precision == "fp32") + ", in another --run-dir")),
                  self._catching_signals()):
                try:
                    yield
                except FloatingPointError as error:
                    when = f"after iteration {self.iteration}: " * ("iteration" not in str(error))
                    raise FloatingPointError(f"{when}{error}") from None
        finally:
            files.release(self.lock)

    @contextmanager
    def _catching_signals(self):
        """Let Ctrl-C, SIGTERM and SIGHUP end the run at the next step, saved, and at once where
        nothing is unsaved: while it counts, say. A second one ends it at once."""
        def stop(number, _):
            self.stopped_by = number
            if processes.size() == 1:  # torchrun passes on each of them
                signal.signal(number, previous[number])
            if not self.unsaved and not processes.together():
                raise Stopped

        previous = {number: signal.signal(number, stop) for number in {
            signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}}
        try:
            yield
        except Stopped:
            self.bar.close()
            self.say(f"stopped after iteration {self.iteration}, saved. Go on with: python "
                     f"{shlex.join([sys.argv[0], '--resume', '--run-dir', self.args.run_dir])}")
            raise SystemExit(128 + self.stopped_by) from None
        finally:
            self.bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def epochs_of(self, stage):
        """Yield the epochs of a stage that are still to be done, counted over all stages."""
        while self.epoch < self.stages.epochs and self.stages.place(self.epoch)[0] == stage:
            yield self.epoch

    def track(self, images, epoch):
        """Yield the batches of an epoch that are still to be done, and keep count of them; save a
        checkpoint every so many minutes, and stop, saved, when a signal came.

        At a batch's body `iteration` counts it, from 1, and `step` does not yet. Loss and weights
        are checked at each step on a CPU, now and then on a GPU, where looking means waiting.
        """
        args = self.args
        for batch in data.batches(images.x_train, images.y_train, args.batch_size, args.seed, epoch,
                                  self.step, args.crop, args.flip, args.cutout, args.rotate,
                                  processes.rank(), processes.size()):
            self.weight = processes.weight(min(
                args.batch_size, len(images.x_train) - self.step * args.batch_size))
            self.meter.counts = self.weight > 0
            self.unsaved = True
            self.iteration += 1
            # what rate coding and dropout draw in this step depends on nothing before it
            torch.manual_seed(seeded(args.seed, self.iteration, 1 + processes.rank()).initial_seed())
            yield batch
            self.step += 1
            self.bar.update()
            if self.device.type == "cpu" or self.step % 50 == 0:
                self.check()
            else:
                self.watch.look(self.iteration)
            save, stop = self._due()
            if save or stop:
                self.save()
            if stop:
                raise Stopped

    def _due(self, now=False):
        """Return (whether minutes have passed since the last checkpoint, whether a signal came).
        Ranks agree, after each step on CPUs, now and then on GPUs, so that all do the same."""
        late = time.monotonic() - self.saved_at >= 60 * self.args.save_every
        if processes.size() > 1:
            if not (now or self.device.type == "cpu" or self.step % 10 == 0):
                return False, False
            rows = processes.gather(torch.tensor([late, self.stopped_by or 0]))
            late, self.stopped_by = rows[:, 0].any().item(), rows[:, 1].max().item() or None
        return late, self.stopped_by is not None

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

    def end_epoch(self, lr, test, sparsity, masks_hold=True):
        """Log an epoch, on the screen and in metrics.jsonl, and save a checkpoint.

        lr: of the last step. test: what evaluate() returned. masks_hold: whether the weights are
        masked already, as they are but in Grad R's structure epochs.
        """
        stage, within, count = self.stages.place(self.epoch)
        self.check()
        if masks_hold:
            self.verify()
        if not math.isfinite(test["loss"]):
            raise FloatingPointError(f"the test loss is not finite after iteration "
                                     f"{self.iteration}. A checkpoint saved before is kept; "
                                     f"try a lower --lr")
        loss, accuracy = self.meter.means()
        state = self.parts["net"].state_dict()
        processes.agree(f"the weights after iteration {self.iteration}",
                       *(state[name] for name, _ in self.parts["net"].named_parameters()))
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
            self.say(f"  note: no neuron of {', '.join(test['silent'])} fired on the whole test "
                     f"set")
        if self._due(now=True)[1]:
            raise Stopped

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
        counted = recount(self.folder / "model.pt", values["layers"])
        from harness import plots  # here, since matplotlib takes its time
        plots.draw_curves(rows, self.folder / "curves.png")
        write_json(self.folder / "summary.json", values)
        self.say_summary(values, *counted)
        return values

    def say_summary(self, values, alive, zeros):
        """Print the result: accuracies by stage, then what the final network costs. alive, zeros:
        weights of model.pt."""
        for stage in ("dense", "pruned", "test"):
            if values[f"{stage}_accuracy"] is not None:
                name = {"test": "final", "pruned": "pruned, not fine-tuned"}.get(stage, stage)
                self.say(f"  {name:<24}{100 * values[f'{stage}_accuracy']:6.2f} % test accuracy")
        self.say(
            f"  weights alive           {sum(layer['alive'] for layer in values['layers']):,} of "
            f"{sum(layer['weights'] for layer in values['layers']):,} prunable: "
            f"{100 * values['sparsity']:.2f} % sparse ({100 * values['sparsity_all']:.2f} % of all "
            f"parameters)\n"
            f"  counted in model.pt     {alive:,} alive, {zeros:,} zeros\n"
            f"  an image costs          {values['sops']:,.0f} synaptic operations, about "
            f"{1e3 * values['energy_mj']:.3g} uJ; firing rate {values['firing_rate']:.3f}; "
            f"{values['macs']:,} MACs a step as stored")
        if values["macs"] == values["macs_dense"] and values["sparsity"] > 0:
            self.say("  masked weights are stored dense: fewer synaptic operations, "
                     "not a faster GPU")
        if values["peak_memory_mib"] is not None:
            self.say(f"  peak memory             {values['peak_memory_mib']:,.0f} MiB of "
                     f"{'the GPU' if self.device.type == 'cuda' else 'the process'}")
        self.say(f"done in {duration(values['seconds'])}: {100 * values['test_accuracy']:.2f} % "
                 f"test accuracy at {100 * values['sparsity']:.1f} % sparsity -> {self.folder}")
