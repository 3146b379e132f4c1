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
from torch import nn
from tqdm import tqdm

import data
from harness import flags
import metrics
import models
from harness import processes

# ---- setting up ----------------------------------------------------------------------------------


def choose_device(name):
    """Return the device of --device, by default the GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no GPU here. Leave it out, or write "
                         "--device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def set_up(args, shared=False):
    """Choose the device, join the other processes, seed everything, and return the device.

    shared: whether the script can share its run among processes, as torchrun starts them.
    """
    if processes.size() > 1 and not shared:
        raise ValueError(f"torchrun started {processes.size()} processes, expected one: this "
                         f"script's method runs in a single one. Start it by python")
    args.device = choose_device(args.device).type
    if args.sync_bn and args.device == "cpu":
        raise ValueError("--sync-bn is given, but --device is cpu, expected GPUs: torch has it "
                         "only there. Leave it out")
    if args.compile and processes.size() > 1:
        raise ValueError(f"--compile is given, but torchrun started {processes.size()} processes, "
                         f"expected one: the two together are not tested. Leave one out")
    number, here = processes.local()
    if args.device == "cuda" and here > torch.cuda.device_count():
        raise ValueError(f"torchrun started {here} processes here, but torch sees "
                         f"{torch.cuda.device_count()} GPUs, expected one for each. Lower "
                         f"--nproc-per-node, or write --device cpu")
    if args.device == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same run
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32: it is what all else is compared with
    device = torch.device(args.device)
    if processes.size() > 1 and args.device == "cuda":
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    processes.start(device)
    return device


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
    return processes.first(lambda: data.load(
        args.dataset, args.data_dir, args.train_limit,
        flags.SMOKE_IMAGES if args.smoke else None, args.time_steps)).to(device)


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
    if args.batch_size < processes.size():
        raise ValueError(f"--batch-size is {args.batch_size}, but torchrun started "
                         f"{processes.size()} processes, expected at least an image for each. "
                         f"Raise it or lower --nproc-per-node")
    neuron = dict(tau=args.tau, v_threshold=args.threshold, surrogate=args.surrogate,
                  reset=args.reset)
    net = models.build(args.model, images.num_classes, channels, side, args.time_steps,
                       widths or models.default_widths(args.model, args.width), args.encoding,
                       {name: value for name, value in neuron.items() if value is not None})
    check_last_batch(args, images, net.config)
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


def forward_of(args, net):
    """Return what a training step calls: the network, compiled where --compile asks for it, whose
    gradients are averaged over the processes where there are several."""
    if args.sync_bn and processes.size() > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(net)  # its layers, with their parameters
    side = net.config["image_size"]
    first = (net.time_steps, 1) if net.encoding == "events" else (1,)
    return processes.average_gradients(torch.compile(net) if args.compile else net, torch.zeros(
        *first, net.config["in_channels"], side, side, dtype=torch.uint8, device=net.mean.device))


def check_last_batch(args, images, config):
    """Raise ValueError where a last batch of one image leaves batch normalisation one value."""
    last = len(images.x_train) % args.batch_size or args.batch_size
    if last // processes.size() > 1:
        return
    with torch.device("meta"):  # no memory, no work, and no draw from torch's generator
        net, image = models.build(**config), images.copies(1).to("meta")
    try:
        net(image)
    except ValueError:
        raise ValueError(f"--batch-size is {args.batch_size}, which leaves a batch of one image of "
                         f"{image.shape[-1]} pixels, and --time-steps {args.time_steps}: one "
                         f"value a channel in {args.model}, expected more for batch normalisation. "
                         f"Change one of the two") from None


def sgd(args, net):
    return torch.optim.SGD(net.parameters(), args.lr, args.momentum,
                           weight_decay=args.weight_decay)


def optimizer(args, parameters):
    """Return the optimiser that --optimizer names, "sgd", "adam" or "adamw", for parameters or
    groups of them."""
    kind = dict(sgd=torch.optim.SGD, adam=torch.optim.Adam, adamw=torch.optim.AdamW)[args.optimizer]
    own = dict(momentum=args.momentum) if args.optimizer == "sgd" else {}
    return kind(parameters, args.lr, weight_decay=args.weight_decay, **own)


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
    """Running sums of an epoch, kept on the device: nothing is copied to the host at each step.

    Each rank has its own; counts: False where a batch has no image for this one.
    """

    def __init__(self, device):
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, correct
        self.samples, self.counts = 0, True
        self.bad = torch.zeros((), dtype=torch.int64, device=device)  # first iteration with no loss

    @torch.no_grad()
    def add(self, loss, logits, labels, iteration=0):
        if not self.counts:
            return
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
        """Return (mean loss, accuracy in 0..1) over the images of all ranks."""
        loss, correct, samples = processes.total(self._row()).tolist()
        return loss / samples, correct / samples

    def _row(self):
        return torch.cat([self.sums, self.sums.new_tensor([self.samples])])

    def state(self):
        """Return the sums of all ranks, [ranks, 3]."""
        return processes.gather(self._row()).cpu()

    def restore(self, rows):
        """Take this rank's row; rank 0 all of them where there were more or fewer ranks."""
        if len(rows) != processes.size():
            rows = torch.cat([rows.sum(0, keepdim=True), rows.new_zeros(processes.size() - 1, 3)])
        self.sums.copy_(rows[processes.rank(), :2])
        self.samples = int(rows[processes.rank(), 2])


class Watch:
    """Looks after the numbers of a network, weights and running statistics: on the device, which
    nothing waits for. One that is not finite need not reach the loss: a potential that is NaN is
    below every threshold, so that its neuron is silent."""

    def __init__(self, net, device):
        self.net = net
        self.numbers = {name: tensor for name, tensor in net.state_dict().items()
                        if tensor.is_floating_point()}
        # the first iteration that left one not finite, 0: none
        self.bad = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def look(self, iteration):
        largest = torch.nn.utils.get_total_norm(self.numbers.values(), math.inf)
        self.bad = torch.where((self.bad == 0) & ~largest.isfinite(), iteration, self.bad)

    def check(self, meter):
        """Raise FloatingPointError, with iteration and layer, if a loss or a number was not
        finite."""
        if not self.bad:
            return meter.check()
        name = next((name for name, tensor in self.numbers.items() if not tensor.isfinite().all()),
                    "a number of the network")
        wrong = f"{name} is not finite after iteration {int(self.bad)}"
        if 0 < meter.bad <= self.bad:
            wrong = (f"the loss is not finite (NaN or infinite) at iteration {int(meter.bad)}, "
                     f"and then {name} is not")
        raise FloatingPointError(f"{wrong}. A checkpoint saved before is kept; try a lower --lr")


def evaluate(forward, net, images, args):
    """Return a dict over the test set, in eval mode:
    loss, accuracy, rate (firing), silent (LIF names).

    forward: the network, or its compiled form. images: what data.load returned. Each rank takes
    its share of the batches, after the running statistics of BN were averaged (see harness/processes.py).
    """
    meter = Meter(images.x_test.device)
    size = 4 * args.batch_size  # nothing is kept for a backward pass, so that memory allows it
    processes.average_statistics(net)
    net.eval()
    with torch.inference_mode(), metrics.firing(net) as spikes:
        for x, y in processes.share(images.pairs("test", size)):
            with autocast(args):
                logits = forward(x)
            meter.add(loss_over_time(logits, y, args.loss), logits, y)
    net.train()
    loss, accuracy = meter.means()
    rate, by_layer = metrics.rates(_over_ranks(spikes, net))
    return dict(loss=loss, accuracy=accuracy, rate=rate,
                silent=[name for name, layer in by_layer.items() if layer == 0])


def _over_ranks(spikes, net):
    """Return what metrics.firing() counted, summed over the ranks; one may have had no batch."""
    if processes.size() == 1:
        return spikes
    rows = torch.tensor([[int(count) for count in spikes.get(name, (0, 0))]
                         for name in models.lifs(net)], device=net.mean.device)
    return dict(zip(models.lifs(net), zip(processes.total(rows)[:, 0], rows[:, 1].tolist())))


def score_channels(net, images, args, metric="criticality", aggregate="max"):
    """Score the channels of models.removable(net) in one pass over the training set.

    In eval mode, without augmentation; batches are streamed and sums are float64, so that neither
    memory nor the score depends on how many there are. metric: "criticality", the mean over the
    samples (Eq. 6), or "gradient", the mean over the batches of |dL/dgamma|.
    Returns rows over the channels of all layers, on the CPU: [M] float64, and [M] bool, True where
    a channel spiked at all. Ranks share the batches, and return the same.
    """
    groups = models.removable(net)
    neurons = {name: net.get_submodule(group.lif) for name, group in groups.items()}
    gammas = [net.get_submodule(name).bn.weight for name in groups]
    scores = torch.zeros(sum(map(len, gammas)), dtype=torch.float64, device=net.mean.device)
    spiked = {name: torch.zeros(len(gamma), dtype=torch.bool, device=net.mean.device)
              for name, gamma in zip(groups, gammas)}

    def watch(name, spikes):
        spiked[name] = spiked[name] | spikes.transpose(0, 2).flatten(1).any(1)

    was_training = net.training
    net.eval()
    for lif in neurons.values():
        lif.record = aggregate if metric == "criticality" else None
    pairs = list(images.pairs("train", args.batch_size))
    for x, y in tqdm(processes.share(pairs), "scoring", leave=False,
                     disable=not sys.stderr.isatty() or processes.rank() > 0):
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
    scores = processes.total(scores)
    spikes = processes.total(torch.cat(list(spiked.values())).long())
    for name, part in zip(groups, scores.split([len(gamma) for gamma in gammas])):
        if not part.isfinite().all():
            raise FloatingPointError(f"the scores of {name} are not finite (NaN or infinite) and "
                                     f"cannot be ranked. A checkpoint saved before is kept; try a "
                                     f"lower --lr")
    return scores.cpu(), spikes.bool().cpu()
