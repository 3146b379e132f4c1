"""A run: its folder, its log, its checkpoints, its results.

    run = Run(args, device, images, stages, net=net, optimizer=optimizer, masks=masks)
    with run.under_way("the plan in a line"):
        for epoch in run.epochs():
            for x, y in run.batches(epoch):    # counts, saves on Ctrl-C, looks for NaN
                training.step(run, x, y, lr)
            run.end_epoch()           # logs, may evaluate and save a checkpoint
        run.finish("prune_unstructured", "gmp")    # model.pt, curves.png, summary.json

A run that was killed is resumed with --resume. It then ends with the same bits as a run
that was not killed.

Each file is written whole under a temporary name and then renamed. One process at a
time writes to a folder. An error inside under_way, such as a loss that is not finite or
a full disk, ends the script with exit code 1. The last good checkpoint is kept.
"""
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from tqdm import tqdm

import compact
import data
import metrics
import modelfile
import training
from harness import board, files, flags, presets, processes, setup
from harness.files import fits, read_checkpoint, save_tensors, write_json, write_lines
from harness.machine import device_name, peak_memory_mib, versions
from harness.meters import Meter, Pace, Watch, seconds_of_evaluation
from harness.output import in_a_line
from masks import TooFew, seeded

# All files that a run can leave. --overwrite removes all but the first, which it
# replaces. summary.json goes first: without it the run counts as unfinished
FILES = ("config.json", "summary.json", "checkpoint.pt", "metrics.jsonl",
         "updates.jsonl", "model.pt", "curves.png", "channels.json", "gamma.npz",
         "compact.pt", "analysis.npz")

# A checkpoint at the end of an epoch waits until the last one is so many times older
# than what it took to write
SAVING_RATIO = 20

# Where the output is no terminal, a line says how far the run is, every so often
PROGRESS_SECONDS = 180

# A run on a CPU that takes longer than this is told what makes it shorter
LONG_SECONDS = 24 * 3600

SUMMARY_KEYS = [
    "script", "method", "dataset", "model", "seed", "time_steps", "train_limit",
    "widths", "test_accuracy", "pruned_accuracy", "dense_accuracy", "regen",
    "prune_ratio", "sparsity", "sparsity_all", "layers", "parameters",
    "parameters_alive", "macs", "macs_dense", "macs_first_once", "macs_every_step",
    "sops", "energy_mj", "firing_rate", "speedup_batch1", "speedup_batch32", "epochs",
    "training_cost", "survived_by_regeneration", "as_published", "seconds",
    "peak_memory_mib", "footprint_bytes", "neurobench"]


class Broken(RuntimeError):
    """Masks and weights disagree, so that the run cannot be trusted."""


class Stopped(BaseException):
    """A signal has come, and all steps are saved."""


def finished(args):
    """Return the summary of a finished run under --resume, else None.

    It prints that the run is finished. A damaged summary.json, or own data that are no
    longer those of the run, end the script with exit code 2.
    """
    path = Path(args.run_dir, "summary.json")
    if not args.resume or not path.exists():
        return None
    with flags.exits(2, ValueError, OSError, no_memory=flags.SMALLER):
        try:
            summary = json.loads(path.read_text())
            result = (f"test accuracy {100 * summary['test_accuracy']:.2f} %, "
                      f"{100 * summary['sparsity']:.2f} % sparse")
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is damaged, expected the summary of a finished "
                             f"run. Remove it to go on from the checkpoint, or start "
                             f"again with --overwrite") from None
        require_data_of_finished(args)
    if processes.rank() == 0:
        print(f"{args.run_dir} is finished: {result}. Nothing is left to do")
    return summary


def require_data_of_finished(args):
    """Raise ValueError or OSError if the data that a finished run names have changed,
    or cannot be read any more. Data that are gone, older runs and named sets, which
    could be downloaded here, pass."""
    saved = files.saved_config(args.run_dir).get("data")
    if saved is None or args.dataset in data.NAMES:
        return
    if os.path.exists(args.dataset):
        now = files.data_of(setup.read(args))
        files.require_same_data(args.run_dir, saved, now, args.dataset)


class Run:
    """One run: its parts, its position, its folder.

    args: the flags. device: a torch.device. images: the data set. stages:
    training.Stages.
    parts: {name: object with state_dict and load_state_dict}, saved and restored
    together. There must be a `net`, which setup.build has made, and an `optimizer`;
    `masks` may be left out.

    epoch: epochs done, over all stages. step: steps done in the current epoch.
    iteration: steps done in the whole run.
    rows, updates: the rows of metrics.jsonl and updates.jsonl, lists of dicts.
    notes: further values of a method that a checkpoint keeps, a dict of plain values.

    measured: a function of the run, the seconds of a step and those of an evaluation,
    called as soon as they are known (see harness/planning.py); None: there is none.
    computes: returns the context in which the network computes with other values than
    its parameters store (see masks.computing_with); evaluations are inside it.

    Make it last, after all other checks of the flags: it is the first that writes.
    Raises ValueError or OSError if the folder or its checkpoint does not fit.
    """

    measured = None
    computes = staticmethod(nullcontext)

    def __init__(self, args, device, images, stages, **parts):
        self.args, self.device, self.images = args, device, images
        self.stages, self.parts = stages, {}
        self.is_under_way = False
        self.forward = None  # the network as a step calls it: compiled, or shared
        self.hold(**parts)
        self.total_steps = stages.epochs * stages.steps_per_epoch
        self.folder = Path(args.run_dir)
        self.epoch = self.step = self.iteration = 0
        self.rows, self.updates, self.notes = [], [], {}
        self.meter = Meter(device)
        # of the current batch: (step within its stage from 0, steps of the stage); the
        # weight of this process's loss (see processes.weight), and its part, 0..1
        self.position, self.weight, self.share = (0, 0), 1.0, 1.0
        self.total = processes.total
        # whether the folder held nothing; the folders that were made for it
        self.is_new, self.made = False, []
        self.last_rank = None  # of this process, set when the shared work ends
        self.stopped_by = None  # the number of a signal
        self.unsaved = False  # whether a step was done since the last checkpoint
        self.seconds = 0.0  # of the current epoch, before the run was resumed
        known = json.dumps(files.data_of(images)).encode()
        processes.agree("the data", torch.tensor(list(known), dtype=torch.uint8))
        self.lock = self.board = None  # of the folder; for TensorBoard
        try:
            self._open()
            if self.net.start_note:
                self.notes["init"] = self.net.start_note
                if self.masks is not None:
                    self.notes["first_sparsity"] = self.masks.sparsity
            position = torch.tensor([self.epoch, self.step, self.iteration])
            processes.agree("the position", position)
            if args.tensorboard and processes.rank() == 0:
                self.board = board.open_anew(self.folder, self.rows, self.updates)
            self.watch = Watch(self.net, device)
        except BaseException:
            self._leave_nothing()
            self._let_go()
            raise
        self.pace, self.says_length = Pace(device), True
        shows_bar = sys.stderr.isatty() and processes.rank() == 0
        self.bar = tqdm(total=self.total_steps, initial=self.iteration, unit="step",
                        dynamic_ncols=True, leave=False, disable=not shows_bar)
        self.first_iteration = self.iteration
        # times: of the start, of the start of the epoch, of the last checkpoint
        self.started = self.began = self.saved_at = time.monotonic()
        self.spoken_at = self.started  # when the last line of progress was printed
        self.save_seconds = 0.0  # what the last checkpoint took; 0: not known yet

    def hold(self, **parts):
        """Take these objects as parts of the run, in the place of those it has."""
        self.parts |= parts
        self.net, self.optimizer = self.parts["net"], self.parts["optimizer"]
        self.masks = self.parts.get("masks")
        if self.is_under_way:
            self.forward = setup.forward_of(self.args, self.net)

    @property
    def stage(self):
        """The name of the stage of the current epoch."""
        return self.stages.place(self.epoch)[0]

    @property
    def first_sparsity(self):
        """The sparsity of the masks at the start, 0..1: those that --init has brought,
        or the method has drawn; 0 without any."""
        return self.notes.get("first_sparsity", 0.0)

    def generator(self, *numbers):
        """Return a CPU generator that depends on --seed, the iteration and numbers."""
        return seeded(self.args.seed, self.iteration, *numbers)

    # ---- training --------------------------------------------------------------------

    @contextmanager
    def under_way(self, plan):
        """Print the header, and handle the errors and signals of what runs inside.

        plan: what runs, in a line. An error inside is printed in one line and ends the
        script with exit code 1. On Ctrl-C, SIGTERM and SIGHUP the run saves a
        checkpoint after the current step and ends. At the end the folder is unlocked.
        """
        size = self.args.batch_size
        smaller = f"--batch-size {max(1, size // 2)} instead of {size}"
        if self.args.precision == "fp32":
            smaller += " or --precision bf16"
        no_memory = f"Try {smaller}, in another --run-dir"
        errors = FloatingPointError, OSError, Broken, TooFew
        try:
            with (flags.exits(1, *errors, no_memory=no_memory),
                  self._catching_signals()):
                try:
                    self.is_under_way = True
                    self.hold()
                    self._say_header(plan)
                    if self.net.starts_dense:
                        self.notes["dense_accuracy"] = self.evaluate()["accuracy"]
                    yield
                except FloatingPointError as error:
                    self.check()  # its own error also names the layer
                    when = ""
                    if "iteration" not in str(error):
                        when = f"after iteration {self.iteration}: "
                    raise FloatingPointError(f"{when}{error}") from None
        except BaseException as end:
            is_signal = isinstance(end, KeyboardInterrupt)
            if not is_signal and getattr(end, "code", 1) == 1:
                self._leave_nothing()
            raise
        finally:
            self._let_go()

    def epochs(self, stage=None):
        """Yield the epochs that are left, counted over all stages from 0.

        stage: the name of a stage; then only its epochs.
        """
        while self.epoch < self.stages.epochs:
            if stage is not None and self.stage != stage:
                return
            yield self.epoch

    def replan(self, stages):
        """Replace the stages, where the length of one is known only when it ends."""
        self.stages = stages
        self.total_steps = stages.epochs * stages.steps_per_epoch
        self.bar.total = self.total_steps

    def batches(self, epoch):
        """Yield the batches (x, y) of an epoch that are left, and count them.

        While a batch is used, `iteration` counts it already, from 1, and `step` does
        not. After it the loss and the weights are checked: at each step on a CPU, at
        each 50th on a GPU, where a check waits for the GPU. A checkpoint is saved every
        --save-every minutes, and when a signal has come, which also ends the run.
        """
        args, images = self.args, self.images
        batches = data.batches(
            images.x_train, images.y_train, args.batch_size, args.seed, epoch,
            self.step, args.crop, args.flip, args.cutout, args.rotate,
            processes.rank(), processes.size())
        self.pace.restart()
        for batch in batches:
            images_left = len(images.x_train) - self.step * args.batch_size
            self.weight = processes.weight(min(args.batch_size, images_left))
            self.share = self.weight / processes.size()
            self.meter.counts = self.weight > 0
            self.unsaved = True
            self.iteration += 1
            self.position = self.stages.position(self.iteration)
            # a resumed run draws the same numbers in this step
            torch.manual_seed(self.generator(1 + processes.rank()).initial_seed())
            yield batch
            self.step += 1
            self.bar.update()
            if self.says_length and self.pace.step():
                self._say_length()
            self._say_progress()
            if self.device.type == "cpu" or self.step % 50 == 0:
                self.check()
            else:
                self.watch.look(self.iteration)
            is_late, is_stopped = self._due()
            if is_late or is_stopped:
                self.save()
            if is_stopped:
                raise Stopped

    def evaluate(self, net=None):
        """Return loss, accuracy, firing rate and silent LIFs over the test set, a dict
        (see training.evaluate).

        net: the network to evaluate; None: the run's own.
        """
        forward, computes = net, nullcontext
        if net is None:
            net, forward, computes = self.net, self.forward, self.computes
        processes.average_statistics(net)
        size = setup.evaluation_batch(self.args, self.images)
        pairs = self.images.pairs("test", size)
        with computes():
            return training.evaluate(forward, net, processes.share(pairs), self.args,
                                     self.total)

    def score_channels(self, metric):
        """Return the scores of the network's channels over the training set, and which
        ever spiked (see training.score_channels)."""
        def mine(pairs):
            shows_bar = sys.stderr.isatty() and processes.rank() == 0
            return tqdm(processes.share(pairs), "scoring", leave=False,
                        disable=not shows_bar)

        pairs = self.images.pairs("train", self.args.batch_size)
        return training.score_channels(self.net, pairs, self.args, metric, mine=mine,
                                       total=self.total)

    def log_update(self, target, update, keep=None, may_be_empty=False,
                   masks_hold=True, layers=None, **more):
        """Print an update of the masks, write it to updates.jsonl, and check it.

        target: the sparsity asked for, 0..1; None where it is an outcome.
        update: a masks.Update.
        keep: how many weights must be alive; None: any number.
        may_be_empty: whether a layer may lose all weights.
        masks_hold: whether the weights are masked already.
        layers: further keys of the row's layers, {key: a value for each layer}.
        more: further keys of the row.
        Raises Broken if the masks and the weights disagree.
        """
        self._say_length()
        processes.agree(f"the masks after iteration {self.iteration}", self.masks.flat)
        for name in update.rescued:
            self.say(f"  note: {name} would have lost all weights; its largest one is "
                     f"kept")
        counts = self.masks.record_update(update.pruned, update.regenerated,
                                          update.plain)
        row = dict(update=len(self.updates) + 1, iteration=self.iteration,
                   target=target, before=update.between, **counts, **more)
        for key, values in (layers or {}).items():
            for layer, value in zip(row["layers"], values):
                layer[key] = value
        self.add_update(row)
        self.say(f"  update {row['update']:>3}  pruned {row['pruned']:,}  regenerated "
                 f"{row['regenerated']:,}  sparse {100 * row['sparsity']:.1f} %")
        if masks_hold:
            self.verify(keep, may_be_empty)

    def add_update(self, row):
        """Write an update to updates.jsonl, and for TensorBoard. row: a dict of plain
        values."""
        self.updates.append(row)
        write_lines(self.folder / "updates.jsonl", self.updates)
        if self.board is not None:
            board.add_update(self.board, row)

    def end_epoch(self, sparsity=None, masks_hold=True):
        """Evaluate, print the epoch, write it to metrics.jsonl, and save a checkpoint,
        always at the end of a stage and else if the last one is old. An epoch that
        --evaluate-every passes over has no test accuracy: it is null.

        sparsity: of the network, 0..1; None: of the masks. masks_hold: whether dead
        weights are 0 already, which is then checked.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        self._say_length()
        if self._is_evaluated(self.epoch):
            test = self.evaluate()
        else:
            processes.average_statistics(self.net)  # as an evaluation does
            test = dict(loss=None, accuracy=None, rate=None, silent=[])
        if sparsity is None:
            sparsity = self.masks.sparsity
        stage, within, count = self.stages.place(self.epoch)
        self.check()
        if masks_hold:
            self.verify()
        if test["loss"] is not None and not math.isfinite(test["loss"]):
            raise FloatingPointError(
                f"the test loss is not finite after iteration {self.iteration}. A "
                f"checkpoint saved before is kept; try a lower --lr")
        loss, accuracy = self.meter.means()
        state = self.net.state_dict()
        weights = [state[name] for name, _ in self.net.named_parameters()]
        processes.agree(f"the weights after iteration {self.iteration}", *weights)

        now = time.monotonic()
        seconds = self.seconds + now - self.began
        self.seconds, self.began = 0.0, now
        self.epoch, self.step, self.meter = self.epoch + 1, 0, Meter(self.device)
        self.rows.append(dict(
            stage=stage, epoch=self.epoch, iteration=self.iteration, lr=lr,
            train_loss=loss, train_accuracy=accuracy, test_loss=test["loss"],
            test_accuracy=test["accuracy"], sparsity=sparsity,
            firing_rate=test["rate"], seconds=seconds))
        write_lines(self.folder / "metrics.jsonl", self.rows)
        if self.board is not None:
            board.add_epoch(self.board, self.rows[-1])
        if self._is_worth_saving(is_stage_end=within + 1 == count):
            self.save()

        self.spoken_at = now
        line = (f"{stage:<9}{within + 1:>4}/{count:<4} lr {lr:.4f}  loss {loss:.3f}  "
                f"train {100 * accuracy:.1f} %  ")
        if test["accuracy"] is not None:
            line += f"test {100 * test['accuracy']:.1f} %  "
        line += f"sparse {100 * sparsity:.1f} %  "
        if test["rate"] is not None:
            line += f"firing {test['rate']:.3f}  "
        self.say(f"{line}{seconds:.0f} s  left {self._time_left()}")
        if test["silent"]:
            self.say(f"  note: no neuron of {', '.join(test['silent'])} fired on the "
                     f"whole test set")
        _, is_stopped = self._due(now=True)
        if is_stopped and self.unsaved:
            self.save()
        if is_stopped:
            raise Stopped

    def _is_evaluated(self, epoch):
        """Return whether an epoch, from 0 over all stages, ends with an evaluation."""
        _, within, count = self.stages.place(epoch)
        return within + 1 == count or (within + 1) % self.args.evaluate_every == 0

    def last_accuracy(self, stage):
        """Return the test accuracy, 0..1, after the last epoch of a stage."""
        return [row["test_accuracy"] for row in self.rows if row["stage"] == stage][-1]

    def say(self, line):
        """Print a line, above the progress bar, once for all processes."""
        if processes.rank() == 0:
            tqdm.write(line)
            sys.stdout.flush()

    # ---- the results -----------------------------------------------------------------

    def is_alone(self):
        """End the work that processes share. Return whether this process writes."""
        if self.last_rank is None:
            self.last_rank = processes.end()
        return self.last_rank == 0

    def finish(self, script, method, counts=None, **own):
        """Write model.pt, compact.pt, curves.png and, last, summary.json.

        script, method: names for the summary. counts: the result of metrics.count();
        None: it is called here. own: keys of the summary that only the script knows.
        Keys without a value are null.
        Returns the summary, a dict; None in a process that does not write.
        """
        if not self.is_alone():
            return None
        args, rows, net, masks = self.args, self.rows, self.net, self.masks
        alive = None if masks is None else masks.alive
        if counts is None:
            batches = self.images.inputs("test", args.batch_size)
            with training.autocast(args):
                counts = metrics.count(net, batches, alive)
        # an epoch starts at the density at which the one before it has ended
        densities = [1 - self.first_sparsity]
        densities += [1 - row["sparsity"] for row in rows[:-1]]
        known = dict(
            script=script, method=method, dataset=args.dataset, model=args.model,
            seed=args.seed, time_steps=args.time_steps, train_limit=args.train_limit,
            widths=net.config["widths"], epochs=len(rows),
            test_accuracy=rows[-1]["test_accuracy"] if rows else None,
            macs_dense=counts["macs"],
            dense_accuracy=self.notes.get("dense_accuracy"),
            training_cost=sum(densities) / len(densities),
            as_published=vars(args).get("as_published"),
            seconds=sum(row["seconds"] for row in rows))
        if masks is not None and counts["sparsity"] > 0:
            known |= self._compact()
        known = counts | known | own
        summary = {key: known.get(key) for key in SUMMARY_KEYS}
        summary["peak_memory_mib"] = peak_memory_mib(self.device)

        save_tensors(self.folder / "model.pt", modelfile.pack(net, alive))
        n_alive, n_zeros = recount(self.folder / "model.pt", summary["layers"])
        if rows:  # a network of --init may be cut, and not trained
            self._draw_curves()
        write_json(self.folder / "summary.json", summary)
        self.say_summary(summary, n_alive, n_zeros)
        return summary

    def _draw_curves(self):
        """Draw curves.png. If that fails, say why: the results do not need it."""
        try:
            from harness import plots  # not at the top: matplotlib is slow to import
            plots.draw_curves(self.rows, self.folder / "curves.png")
        except Exception as error:  # of matplotlib, its fonts, its settings, the disk
            self.say(f"  note: curves.png could not be drawn ({in_a_line(error)}). "
                     f"Nothing else is missing; metrics.jsonl has its numbers")

    def _compact(self):
        """Write compact.pt, the network without the channels that change nothing.

        Returns how many times as fast it predicts, a dict for summary.json. Without
        such channels nothing is written, and the dict is empty.
        """
        small, alive, text = compact.make(self.net, self.masks.alive)
        if small is None:
            self.say(f"  {text}")
            return {}
        save_tensors(self.folder / "compact.pt", modelfile.pack(small, alive))
        speed = {}  # {batch size: factor}
        with training.autocast(self.args):
            for size in (1, 32):
                speed[size] = metrics.speedup(
                    self.net, small, self.images.copies(size), seconds=0.05)
        self.say(f"  compact.pt: {text}; {speed[1]:.2f} times as fast at batch 1, "
                 f"{speed[32]:.2f} at batch 32")
        return dict(speedup_batch1=speed[1], speedup_batch32=speed[32])

    # ---- what must hold --------------------------------------------------------------

    def check(self):
        """Raise FloatingPointError, with iteration and layer, if a loss or a number of
        the network is not finite."""
        self.watch.look(self.iteration)
        self.watch.check(self.meter)

    def verify(self, keep=None, may_be_empty=False):
        """Raise Broken unless the masks hold.

        They hold if exactly `keep` weights are alive (None: as many as the last update
        has left), dead weights and their momentum are 0, and, without may_be_empty, no
        layer is empty. Without masks nothing is checked.
        """
        if self.masks is None:
            return
        if keep is None and self.updates:
            keep = sum(layer["alive"] for layer in self.updates[-1]["layers"])
        wrong = self.masks.violation(self.optimizer, keep, may_be_empty)
        if wrong:
            self.check()  # a number that is not finite is not 0 either
            raise Broken(f"after iteration {self.iteration} {wrong}. This is a mistake "
                         f"in the code or in the memory; a checkpoint saved before is "
                         f"kept")

    # ---- the folder ------------------------------------------------------------------

    def _open(self):
        """Make the folder and write config.json, or restore the run that it holds."""
        taken = self._is_taken()
        self.made = [path for path in (self.folder, *self.folder.parents)
                     if not path.exists()]
        self.lock = processes.rank_0_first(
            lambda: files.acquire(self.folder) if processes.rank() == 0 else None)
        taken = self._is_taken()  # another process may have been faster
        self.is_new = not taken
        if processes.rank() == 0:  # what a run that was killed had begun to write
            for name in FILES:
                files.remove_unfinished(self.folder / name)
        if taken and self.args.resume:
            self._restore()
        else:
            config = self._config()
            processes.largest(0)  # all ranks have looked before one of them writes
            write_json(self.folder / "config.json", config, before=self._clear)

    def _leave_nothing(self):
        """After an error before the first step, remove what this run has written, if
        its folder was new or empty."""
        if self.is_new and self.iteration == 0 and processes.rank() == 0:
            for name in FILES:
                with suppress(OSError):
                    (self.folder / name).unlink()
            with suppress(OSError):
                board.remove(self.folder)

    def _let_go(self):
        """Close what is written for TensorBoard, and unlock the folder. Remove the
        folders that this run has made, those that are empty."""
        try:
            if self.board is not None:
                self.board.close()
        finally:
            files.release(self.lock)
        if processes.rank() == 0:
            with suppress(OSError):  # one is not empty, or was never made
                for path in self.made:
                    path.rmdir()

    def _is_taken(self):
        """Return whether the folder holds a run, which the flags allow to resume or to
        replace. Raise ValueError if they do not, or if it holds anything else."""
        folder, args = self.folder, self.args
        for path in (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise ValueError(f"{path} is a file, expected a folder (or nothing "
                                 f"yet) there. Name another --run-dir")
        taken = False
        if folder.is_dir():
            taken = any(path.suffix != ".tmp" and path.name != ".lock"
                        for path in folder.iterdir())
        if taken and not (folder / "config.json").exists():
            raise ValueError(f"{folder} is not empty and holds no run, expected a new "
                             f"folder or one with a config.json. Name another "
                             f"--run-dir")
        if taken and not args.resume and not args.overwrite:
            raise ValueError(f"{folder} holds a run already. Go on with it by "
                             f"--resume, replace it by --overwrite, or name another "
                             f"--run-dir")
        return taken

    def _config(self):
        """Return what config.json holds: the flags, and what the run depends on."""
        config = {flag: value for flag, value in vars(self.args).items()
                  if flag not in ("resume", "overwrite")}
        return config | versions() | dict(
            script=Path(sys.argv[0]).stem, device_name=device_name(self.device),
            threads=torch.get_num_threads(), processes=processes.size(),
            data=files.data_of(self.images))

    def _clear(self):
        """Remove the files of an earlier run."""
        for name in FILES[1:]:
            (self.folder / name).unlink(missing_ok=True)
        board.remove(self.folder)

    # ---- checkpoints -----------------------------------------------------------------

    def save(self):
        """Write checkpoint.pt, which holds all that a resumed run needs.

        Raises FloatingPointError if a number is not finite, and OSError if the folder
        is gone or the file cannot be written. Then the last good checkpoint stays.
        """
        if self.watch.net is not self.net:  # a method has replaced it by a smaller one
            self.watch = Watch(self.net, self.device)
        self.check()
        if not files.holds(self.lock):
            raise OSError(f"{self.folder} was deleted or replaced under the run, "
                          f"expected it to stay. Nothing more is saved; start again")
        started = time.monotonic()
        # some methods train dead weights too, for a while
        masks_hold = self.masks is not None and not self.masks.violation(self.optimizer)
        save_tensors(self.folder / "checkpoint.pt", {
            "format": files.CHECKPOINT_FORMAT,
            "position": [self.epoch, self.step, self.iteration],
            "flags": self._flags(),
            "widths": self.net.config["widths"],
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "masks_hold": masks_hold,
            "metrics": len(self.rows),
            "updates": len(self.updates),
            "notes": self.notes,
            "meter": self.meter.state(),
            "statistics": processes.statistics(self.net),
            "data": files.data_of(self.images),
            "seconds": self.seconds + time.monotonic() - self.began})
        self.unsaved, self.saved_at = False, time.monotonic()
        self.save_seconds = self.saved_at - started

    def _flags(self, knows_data=False):
        """Return the flags that a resumed run must share with its checkpoint.

        knows_data: whether the checkpoint has the hash of its data."""
        free = flags.MAY_DIFFER | {"resume", "overwrite", "run_dir"}
        if knows_data:  # then their hash must agree, wherever they lie
            free |= flags.PLACES
        return {flag: value for flag, value in vars(self.args).items()
                if flag not in free}

    def _restore(self):
        """Take all state from checkpoint.pt, if there is one. Raise ValueError if it
        does not fit."""
        state = read_checkpoint(self.folder)
        if state is None:
            return
        saved = state.get("data")
        path = self.folder / "checkpoint.pt"
        files.require_same_data(path, saved, files.data_of(self.images),
                                self.args.dataset)
        if saved is None:
            self.say(f"note: {path} is older and does not say which data it was made "
                     f"with: that they are the same is not checked")
        held = presets.of_earlier(state["flags"])
        with fits(path):
            changed = presets.changed_since(state["flags"])
            if changed:
                raise ValueError(f"{changed} has changed since; only the version that "
                                 f"began it can go on")
            for flag, value in self._flags(knows_data=saved is not None).items():
                was, is_new = held.get(flag), flag not in held  # to the run's version
                if was != value and not (is_new and not value):
                    raise ValueError(f"it was made with {flag} {was}, not {value}")
            self._restore_position(state)
            self._restore_parts(state)
            self.rows = self._read_lines("metrics", state["metrics"])
            self.updates = self._read_lines("updates", state["updates"])
            self.seconds, self.notes = state["seconds"], state["notes"]
            for name in ("density", "first_density"):  # of older versions
                if name in self.notes:
                    self.notes["first_sparsity"] = 1 - self.notes.pop(name)
            self.meter.restore(state["meter"])
            processes.restore_statistics(self.net, state["statistics"])

    def _restore_position(self, state):
        epoch, step, iteration = state["position"]
        per_epoch = self.stages.steps_per_epoch
        is_inside = 0 <= epoch <= self.stages.epochs and 0 <= step <= per_epoch
        adds_up = iteration == epoch * per_epoch + step and state["metrics"] == epoch
        if not (is_inside and adds_up):
            raise ValueError(f"its position is {state['position']}, which does not fit "
                             f"the epochs and steps of this run")
        self.epoch, self.step, self.iteration = epoch, step, iteration

    def _restore_parts(self, state):
        saved = state["parts"].get("net")
        if isinstance(saved, dict):
            # the names of the classes are those of the data, which are compared
            names = {"_extra_state": self.net.get_extra_state()}
            saved = modelfile.complete_state(self.net, saved) | names
            state["parts"]["net"] = saved
            gone = [name for name in saved.keys() - self.net.state_dict().keys()
                    if name.startswith("lif") and name.endswith(".w")]
            if gone:
                raise ValueError(f"its neurons have learnt time constants "
                                 f"({', '.join(sorted(gone))}) that are fixed in "
                                 f"{self.args.model} since; only the version that "
                                 f"began it can go on")
        for name, part in self.parts.items():
            if name != "optimizer":
                files.require_alike(name, state["parts"].get(name), part.state_dict())
            part.load_state_dict(state["parts"][name])
        for parameter, own in self.optimizer.state.items():
            for key, value in own.items():
                if value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"{key} of its optimizer is {list(value.shape)}, "
                                     f"expected {list(parameter.shape)}")
        if state["masks_hold"]:
            wrong = self.masks.violation(self.optimizer)
            if wrong:
                raise ValueError(f"its masks disagree with its weights: {wrong}")

    def _read_lines(self, name, count):
        """Return the first `count` rows of a log, a list of dicts.

        Later rows are of steps after the checkpoint, which are done again.
        """
        if count == 0:
            return []
        lines = (self.folder / f"{name}.jsonl").read_text().splitlines()
        if len(lines) < count:
            raise ValueError(f"{name}.jsonl has {len(lines)} lines, expected {count}")
        try:
            return [json.loads(line) for line in lines[:count]]
        except ValueError:
            raise ValueError(f"{name}.jsonl is damaged") from None

    # ---- signals ---------------------------------------------------------------------

    @contextmanager
    def _catching_signals(self):
        """Let Ctrl-C, SIGTERM and SIGHUP end the run after the current step, saved.

        It ends at once if all steps are saved already, as while it writes the results,
        and at a second signal. What the process was started to ignore stays ignored.
        """
        def stop(number, _):
            self.stopped_by = number
            # torchrun passes signals on, so that a second one need not be the user's
            if processes.size() == 1:
                signal.signal(number, previous[number])
            if not self.unsaved and not processes.together():
                raise Stopped

        previous = {number: signal.signal(number, stop) for number in own_signals()}
        try:
            yield
        except Stopped:
            self.bar.close()
            self.say(f"stopped after iteration {self.iteration}, saved. Go on with: "
                     f"{self._resume_command()}")
            raise SystemExit(128 + self.stopped_by) from None
        finally:
            self.bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _resume_command(self):
        """Return the command that goes on with this run, in as many processes, and on
        its device where that is not the one that would be chosen; of several nodes, in
        words."""
        args = self.args
        if processes.local()[1] < processes.size():
            words = [sys.argv[0], "--resume", "--run-dir", args.run_dir]
            return f"the same launcher on each node, with {shlex.join(words)}"
        words = [*processes.starter(processes.size()), sys.argv[0], "--resume",
                 "--run-dir", args.run_dir]
        if args.device != str(setup.choose_device(None)):
            words += ["--device", args.device]
        return shlex.join(words)

    def _is_worth_saving(self, is_stage_end):
        """Return whether the end of an epoch is saved: at the end of a stage, and where
        the last checkpoint is older than --save-every, or than SAVING_RATIO times what
        it took. So saving takes a small share of the time, also where epochs are short.

        All processes return the same, what the first one finds: it writes.
        """
        age = time.monotonic() - self.saved_at
        is_old = age >= min(60 * self.args.save_every, SAVING_RATIO * self.save_seconds)
        first_finds = is_old and processes.rank() == 0
        return processes.largest(int(is_stage_end or first_finds)) == 1

    def _due(self, now=False):
        """Return (whether a checkpoint is due, whether a signal has come), two bools.

        All processes return the same. To agree they wait for each other: after each
        step on CPUs, after each tenth on GPUs, and whenever `now` is given.
        """
        minutes = (time.monotonic() - self.saved_at) / 60
        is_late = minutes >= self.args.save_every
        if processes.size() > 1:
            if not (now or self.device.type == "cpu" or self.step % 10 == 0):
                return False, False
            rows = processes.gather(torch.tensor([is_late, self.stopped_by or 0]))
            is_late = rows[:, 0].any().item()
            self.stopped_by = rows[:, 1].max().item() or None
        return is_late, self.stopped_by is not None

    # ---- what is printed -------------------------------------------------------------

    def _say_header(self, plan):
        args, images = self.args, self.images
        sizes = metrics.parameters(self.net)
        prunable = sum(layer["weights"] for layer in sizes["layers"])
        stages = ", ".join(f"{name} {epochs}"
                           for name, epochs in self.stages.by_name.items())
        self.say(
            f"{Path(sys.argv[0]).stem}  torch {torch.__version__}  {args.device}  "
            f"{args.precision}  seed {args.seed}  ->  {self.folder}\n"
            f"data {images.name}: {len(images.x_train):,} train, "
            f"{len(images.x_test):,} test, {images.num_classes} classes   "
            f"model {args.model}, T = {args.time_steps}, {sizes['parameters']:,} "
            f"parameters, {prunable:,} prunable\n"
            f"epochs: {stages}, {self.stages.steps_per_epoch} steps each   {plan}")
        if args.minutes is not None:
            chosen = "these epochs"
            if vars(args).get("interval"):
                chosen += f" and --interval {args.interval}"
            self.say(f"minutes {args.minutes:g}: {chosen} were chosen for it")
        if "init" in self.notes:
            self.say(f"init {args.init}: {self.notes['init']}")
        if self.iteration:
            self.say(f"resumed after iteration {self.iteration} of {self.total_steps}")

    def _say_length(self):
        """Print, once, how long the run takes from here, with all evaluations, as soon
        as it is known: before the first update and the first end of an epoch.

        A later network may be smaller, and a search may end early: then it is shorter.
        """
        if self.says_length:
            self.pace.stop()
        if not self.says_length or self.pace.seconds is None:
            return
        self.says_length = False
        args, step = self.args, self.pace.seconds
        # a call of a network that is shared would wait for the other processes
        forward = self.forward if processes.size() == 1 else self.net
        evaluation = seconds_of_evaluation(
            self.net, forward, self.images,
            setup.evaluation_batch(args, self.images), training.autocast(args))
        evaluation /= processes.size()
        if self.measured is not None:
            self.measured(step, evaluation)
        steps = self.total_steps - self.iteration
        epochs_left = range(self.epoch, self.stages.epochs)
        evaluations = sum(map(self._is_evaluated, epochs_left))
        seconds = steps * step + evaluations * evaluation
        form = "%a %H:%M" if seconds < 6 * 86400 else "%d %b %Y"
        ends = time.strftime(form, time.localtime(time.time() + seconds))
        line = (f"takes about {span(seconds)} from here, until {ends}: {steps:,} steps "
                f"of {span(step)}, {evaluations} evaluations of "
                f"{span(evaluation)}")
        if seconds > LONG_SECONDS and self.device.type == "cpu":
            line += (f"\nnote: about {span(seconds)} on this machine; --train-limit, "
                     f"--width, or a GPU makes it shorter, and so does --minutes")
        self.say(line)

    def _say_progress(self):
        """Print how far the run is, if no line has said it for a while, and no bar
        shows it."""
        now = time.monotonic()
        if now - self.spoken_at < PROGRESS_SECONDS:
            return
        self.spoken_at = now
        if not self.bar.disable:
            return
        stage, within, count = self.stages.place(self.epoch)
        self.say(f"  {stage} {within + 1}/{count}, step {self.step:,} of "
                 f"{self.stages.steps_per_epoch:,}; iteration {self.iteration:,} of "
                 f"{self.total_steps:,}, left {self._time_left()}")

    def _time_left(self):
        """Return in words how long the steps take that are left, at the mean pace."""
        steps_done = max(1, self.iteration - self.first_iteration)
        steps_left = self.total_steps - self.iteration
        return duration(steps_left * (time.monotonic() - self.started) / steps_done)

    def say_summary(self, values, alive, zeros):
        """Print the result: accuracies by stage, then the costs of the final network.

        values: the summary. alive, zeros: how many weights of model.pt are so.
        """
        accuracies = {"dense": values["dense_accuracy"],
                      "pruned, not fine-tuned": values["pruned_accuracy"],
                      "final": values["test_accuracy"]}
        for name, accuracy in accuracies.items():
            if accuracy is not None:
                self.say(f"  {name:<24}{100 * accuracy:6.2f} % test accuracy")
        tuned = [row["test_accuracy"] for row in self.rows
                 if row["stage"] == "finetune"]
        known = [accuracy for accuracy in tuned if accuracy is not None]
        if values["as_published"] and known:
            which = ": what the published code reports"
            if len(known) < len(tuned):
                which = f", of {len(known)} that were evaluated"
            self.say(f"  best epoch              {100 * max(known):6.2f} % of the "
                     f"fine-tuning, chosen by the test set{which}")
        n_alive = sum(layer["alive"] for layer in values["layers"])
        n_weights = sum(layer["weights"] for layer in values["layers"])
        self.say(
            f"  weights alive           {n_alive:,} of {n_weights:,} prunable: "
            f"{100 * values['sparsity']:.2f} % sparse "
            f"({100 * values['sparsity_all']:.2f} % of all parameters)\n"
            f"  counted in model.pt     {alive:,} alive, {zeros:,} zeros\n"
            f"  an image costs          {values['sops']:,.0f} synaptic operations, "
            f"about {1e3 * values['energy_mj']:.3g} uJ; firing rate "
            f"{values['firing_rate']:.3f}; {values['macs']:,} MACs a step as stored")
        if values["macs"] == values["macs_dense"] and values["sparsity"] > 0:
            self.say("  masked weights are stored dense: fewer synaptic operations, "
                     "not a faster GPU")
        if values["peak_memory_mib"] is not None:
            where = "the GPU" if self.device.type == "cuda" else "the process"
            peak = values["peak_memory_mib"]
            self.say(f"  peak memory             {peak:,.0f} MiB of {where}")
        self.say(
            f"done in {duration(values['seconds'])}: "
            f"{100 * values['test_accuracy']:.2f} % test accuracy at "
            f"{100 * values['sparsity']:.1f} % sparsity -> {self.folder}")


# ---- functions -----------------------------------------------------------------------


def own_signals():
    """Return the signals on which a run ends: those of Ctrl-C, kill and a terminal that
    closes, without those that are ignored, as SIGHUP is under nohup.

    In a thread of somebody's program there are none: signals are the main thread's.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # None: a handler that is not Python's, which could not be put back
    return [number for number in numbers
            if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def recount(path, layers):
    """Read a model.pt back from the disk, and return (alive, zeros) over its weights.

    layers: the rows of summary.json, each with name and alive. Raises Broken if the
    file disagrees with them, or its masks with its weights.
    """
    try:
        packed = modelfile.read(path)
        modelfile.unpack(packed, path)  # it raises if a dead weight is not 0
    except ValueError as error:
        raise Broken(str(error)) from None
    alive = zeros = 0
    for layer in layers:
        name, expected = layer["name"], layer["alive"]
        if name not in packed["masks"] and expected == 0:
            continue  # it was removed as a whole
        found = int(packed["masks"][name].count_nonzero())
        if found != expected:
            raise Broken(f"{path} has {found:,} weights of {name} alive, expected "
                         f"{expected:,}. Go on with --resume, which writes it again")
        alive += found
        zeros += int((packed["state_dict"][name] == 0).count_nonzero())
    return alive, zeros


def duration(seconds):
    """Return a time in words: "1:05" for 65 seconds, "1:00:00" for an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


def span(seconds):
    """Return a time in words, to two digits: "85 ms", "1.2 s", "3.5 min", "19 days"."""
    units = (("ms", 1e-3, 1), ("s", 1, 100), ("min", 60, 6000), ("h", 3600, 48 * 3600),
             ("days", 86400, math.inf))
    for unit, size, limit in units:
        if seconds < limit:
            break
    number = seconds / size
    return f"{number:,.0f} {unit}" if number >= 9.95 else f"{number:.1f} {unit}"
