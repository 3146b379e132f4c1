"""The parts of a training run that all scripts share: set-up, stages, schedule, loss, evaluation.

    device = training.set_up(args)                   # device and seeds
    images = training.load(args, device)             # the data set
    net = training.build(args, images)               # as the flags ask for
    stages = training.stages(args, images, prune=200, finetune=300)
    logits = net(images); loss = training.loss_over_time(logits, labels)
    training.evaluate(net, net, images, args)        # loss, accuracy, firing rate of the test set
    training.score_channels(net, images, args)       # criticality over the whole training set
"""
import ctypes
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import flags
import metrics
import models

# ---- setting up ----------------------------------------------------------------------------------


def set_up(args):
    """Choose the device, seed everything, and return the device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no GPU here. Leave it out, or write "
                         "--device cpu")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same run
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32: it is what all else is compared with
    return torch.device(args.device)


def keep_freed_memory():
    """Let glibc keep what is freed: it would return each large tensor to the system, and the next
    one of its size would be faulted in page by page. A step is 14 to 19 % faster, at equal peak."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def load(args, device):
    """Return the data set that the flags ask for, on the device."""
    return data.load(args.dataset, args.data_dir, args.train_limit,
                     flags.SMOKE_IMAGES if args.smoke else None, args.time_steps).to(device)


def build(args, images, widths=None):
    """Return the network of a run, where the images are: as the flags ask for, or with --init's
    weights.

    widths: of a slimmed network, where a checkpoint holds one.
    """
    *_, channels, side = images.x_train.shape[:-1]
    if (args.encoding == "events") != (images.x_train.dim() == 5):
        raise ValueError(f"--encoding is {args.encoding}, but {args.dataset} is made of "
                         f"{'events' if images.x_train.dim() == 5 else 'images'}, expected "
                         f"{'events' if images.x_train.dim() == 5 else 'direct or rate'}. Leave it "
                         f"out")
    for flag in ("crop", "cutout"):
        if getattr(args, flag) >= side:
            raise ValueError(f"--{flag} is {getattr(args, flag)}, expected less than the {side} "
                             f"pixels of an image of {args.dataset}. Lower it")
    if args.batch_size > len(images.x_train):
        raise ValueError(f"--batch-size is {args.batch_size}, but {args.dataset} has "
                         f"{len(images.x_train)} training images here, expected at most as many. "
                         f"Lower it")
    neuron = dict(tau=args.tau, v_threshold=args.threshold, surrogate=args.surrogate,
                  reset=args.reset)
    net = models.build(args.model, images.num_classes, channels, side, args.time_steps,
                       widths or models.default_widths(args.model, args.width), args.encoding,
                       {name: value for name, value in neuron.items() if value is not None})
    net.set_normalisation(images.mean, images.std)
    goes_on = args.resume and Path(args.run_dir, "checkpoint.pt").exists()
    if args.init is not None and not goes_on:
        packed = models.read(args.init)
        source = models.unpack(packed, args.init)
        if not all(mask.all() for mask in packed["masks"].values()):
            raise ValueError(f"{args.init} is a pruned network, expected a dense one: pruning "
                             f"starts from all weights. Train one with --sparsity 0")
        for key in ("name", "num_classes", "in_channels", "image_size", "widths", "encoding",
                    "neuron"):
            if source.config[key] != net.config[key]:
                raise ValueError(f"{args.init} has {key} {source.config[key]}, expected "
                                 f"{net.config[key]} as the flags ask for. Give the flags that it "
                                 f"was made with, or another file")
        net.load_state_dict(source.state_dict())
    return net.to(images.x_train.device, memory_format=torch.channels_last)


def sgd(args, net):
    return torch.optim.SGD(net.parameters(), args.lr, args.momentum,
                           weight_decay=args.weight_decay)


def optimizer(args, net):
    """Return the optimiser that --optimizer names: "sgd", "adam" or "adamw"."""
    if args.optimizer == "sgd":
        return sgd(args, net)
    return dict(adam=torch.optim.Adam, adamw=torch.optim.AdamW)[args.optimizer](
        net.parameters(), args.lr, weight_decay=args.weight_decay)


def stages(args, images, **epochs):
    """Return the Stages of a run from their lengths in epochs."""
    return Stages(data.num_batches(len(images.x_train), args.batch_size), **epochs)


class Stages:
    """The stages of a run, one after the other:
    Stages(steps_per_epoch, prune=200, finetune=300)."""

    def __init__(self, steps_per_epoch, **epochs):
        self.steps_per_epoch, self.by_name, self.epochs = (
            steps_per_epoch, epochs, sum(epochs.values()))

    def steps(self, name):
        return self.by_name[name] * self.steps_per_epoch

    def place(self, epoch):
        """Return (stage, epoch within the stage from 0, epochs of the stage) of an epoch from 0."""
        for name, count in self.by_name.items():
            if epoch < count:
                return name, epoch, count
            epoch -= count
        raise ValueError(f"there is no epoch beyond {self.epochs}")

    def position(self, iteration):
        """Return (step within the stage from 0, steps of the stage) of an iteration from 1."""
        epoch, step = divmod(iteration - 1, self.steps_per_epoch)
        _, within, count = self.place(epoch)
        return within * self.steps_per_epoch + step, count * self.steps_per_epoch


# ---- the parts of a training step ----------------------------------------------------------------


def cosine(lr, step, steps):
    """Return the learning rate of a step (from 0) of a stage:
    a cosine from lr to 0 over its steps."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


def step_down(lr, step, steps):
    """Return the learning rate of a step (from 0) of a stage: x 0.1 at half of it, and again at
    three quarters: at epochs 80 and 120 of 160."""
    return lr * 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")


def loss_over_time(logits, labels, kind="ce"):
    """Return the cross-entropy of each time step's output, averaged over T and the batch; or, of
    kind "mse", the mean squared distance of the mean over T, the firing rate of an output that
    spikes, to the one-hot target.

    logits: [T, N, K]. labels: [N]. INTERPRETATION: the paper names no loss; this is LTH-SNN's. The
    other is Grad R's and SD-SNN's, on CIFAR-10 as well, where its UnilateralMse is not specified.
    """
    if kind == "mse":
        rate = logits.float().mean(0)
        return F.mse_loss(rate, F.one_hot(labels, rate.shape[1]).to(rate.dtype))
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.repeat(len(logits)))


class Meter:
    """Running sums of an epoch, kept on the device: nothing is copied to the host at each step."""

    def __init__(self, device):
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, correct
        self.samples = 0
        self.bad = torch.zeros((), dtype=torch.int64, device=device)  # first iteration with no loss

    @torch.no_grad()
    def add(self, loss, logits, labels, iteration=0):
        right = (logits.sum(0).argmax(1) == labels).sum()
        self.sums += torch.stack([loss.double() * len(labels), right.double()])
        self.samples += len(labels)
        self.bad = torch.where((self.bad == 0) & ~loss.isfinite(), iteration, self.bad)

    def check(self):
        """Raise FloatingPointError if a loss was not finite."""
        if self.bad:
            raise FloatingPointError(
                f"the loss is not finite (NaN or infinite) at iteration {int(self.bad)}. "
                f"A checkpoint saved before is kept; try a lower --lr")

    def means(self):
        """Return (mean loss, accuracy in 0..1)."""
        loss, correct = self.sums.tolist()
        return loss / self.samples, correct / self.samples

    def state(self):
        return self.sums.cpu(), self.samples

    def restore(self, state):
        self.sums.copy_(state[0])
        self.samples = state[1]


def evaluate(forward, net, images, args):
    """Return a dict over the test set, in eval mode:
    loss, accuracy, rate (firing), silent (LIF names).

    forward: the network, or its compiled form. images: what data.load returned.
    """
    meter = Meter(images.x_test.device)
    net.eval()
    with torch.inference_mode(), metrics.firing(net) as spikes:
        for x, y in images.pairs("test", args.batch_size):
            with autocast(args):
                logits = forward(x)
            meter.add(loss_over_time(logits, y, args.loss), logits, y)
    net.train()
    loss, accuracy = meter.means()
    rate, by_layer = metrics.rates(spikes)
    return dict(loss=loss, accuracy=accuracy, rate=rate,
                silent=[name for name, layer in by_layer.items() if layer == 0])


def score_channels(net, images, args, metric="criticality", aggregate="max"):
    """Score the channels of models.removable(net) in one pass over the training set.

    In eval mode, without augmentation; batches are streamed and sums are float64, so that neither
    memory nor the score depends on how many there are. metric: "criticality", the mean over the
    samples (Eq. 6), or "gradient", the mean over the batches of |dL/dgamma|.
    Returns rows over the channels of all layers, on the CPU: [M] float64, and [M] bool, True where
    a channel spiked at all.
    """
    groups = models.removable(net)
    neurons = {name: net.get_submodule(group.lif) for name, group in groups.items()}
    gammas = [net.get_submodule(name).bn.weight for name in groups]
    scores, spiked = 0, dict.fromkeys(groups, False)

    def watch(name, spikes):
        spiked[name] = spiked[name] | spikes.transpose(0, 2).flatten(1).any(1)

    was_training = net.training
    net.eval()
    for lif in neurons.values():
        lif.record = aggregate if metric == "criticality" else None
    pairs = list(images.pairs("train", args.batch_size))
    for x, y in tqdm(pairs, "scoring", disable=not sys.stderr.isatty(), leave=False):
        with (torch.set_grad_enabled(metric == "gradient"), autocast(args),
              metrics.hooks(neurons, after=watch)):
            loss = loss_over_time(net(x), y, args.loss)
        if metric == "gradient":
            grads = torch.autograd.grad(loss, gammas)
            scores = scores + torch.cat(grads).abs().double() / len(pairs)
        else:
            batch = torch.cat([lif.score for lif in neurons.values()])
            scores = scores + batch * (len(y) / len(images.y_train))
    for lif in neurons.values():
        lif.record = lif.score = None
    net.train(was_training)
    return scores.cpu(), torch.cat(list(spiked.values())).cpu()
