"""What all methods share in training: a step, its loss, schedules, evaluation, the
scores of channels.

    for x, y in run.batches(epoch):
        training.step(run, x, y, lr)    # forward, loss, backward, descent
    scores = training.step(run, x, y, lr, record="max")    # and the criticality

A method that adds to the gradient calls the two halves of a step:

    training.backward(run, x, y)
    ...
    training.descend(run.optimizer, lr)

`run` is a harness.runfolder.Run. A step uses these of its attributes:

    net         the network
    forward     the form of it that is called: compiled, or shared among processes
    optimizer, args (the flags), iteration
    weight      of this process's part of the batch; 1 with a single process
    share       this process's part of the batch, 0..1
    total       a function that sums a tensor over the processes
    meter       the running sums of loss and accuracy
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

import metrics
import models
from neurons import widest

# ---- one step ------------------------------------------------------------------------


def step(run, x, y, lr, record=None, by="derivative"):
    """Train on a batch. Return its scores, {LIF name: [C]}.

    x: [N, C, H, W], or [T, N, C, H, W] for events. y: [N]. lr: the learning rate.
    record: how the criticality of the neurons of a channel makes one score, "max" |
    "mean"; None: there are no scores, and the dict is empty. by: what of the surrogate
    is the score, "derivative" | "value" (see neurons.criticality); "post" | "pre": the
    activity is (see neurons.activity).
    """
    scores = backward(run, x, y, record, by)
    descend(run.optimizer, lr)
    return scores


def backward(run, x, y, record=None, by="derivative"):
    """Compute the loss of a batch and its gradient. Return the scores, as step does."""
    with autocast(run.args), models.recording(run.net, record, by) as scores:
        logits = run.forward(x)  # [T, N, K]
    loss = loss_over_time(logits, y, run.args.loss)
    run.net.zero_grad()
    (loss * run.weight).backward()
    run.meter.add(loss, logits, y, run.iteration)
    # the scores of the whole batch are a mean over the processes that share it
    return {name: run.total(score * run.share) for name, score in scores.items()}


def descend(optimizer, lr):
    """Let the optimizer make its step at a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def autocast(args):
    """Return the context of --precision: bfloat16 where it is bf16."""
    kind = torch.device(args.device).type  # "cuda" of cuda:1
    return torch.autocast(kind, torch.bfloat16, enabled=args.precision == "bf16")


LOSSES = ("ce", "mean-ce", "mse")


def loss_over_time(logits, labels, kind="ce"):
    """Return the loss of logits [T, N, K] and labels [N], a mean over T and the batch.

    kind "ce": the cross-entropy of the output at each time step. INTERPRETATION: the
    paper names no loss; this is LTH-SNN's. Confirmed by the published code for
    channels.
    kind "mean-ce", published code: the cross-entropy of the mean over T of the output,
    divided by T.
    kind "mse": the squared distance between the one-hot label and the mean of the
    output over T, which is a firing rate where the output spikes.
    """
    if kind == "mse":
        rate = logits.float().mean(0)
        return F.mse_loss(rate, F.one_hot(labels, rate.shape[1]).to(rate.dtype))
    if kind == "mean-ce":
        return F.cross_entropy(logits.float().mean(0), labels) / len(logits)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.repeat(len(logits)))


def optimizer(args, parameters):
    """Return the optimizer that --optimizer names: "sgd", "adam" or "adamw".

    parameters: an iterable of them, or of groups as torch.optim takes them.
    """
    if args.optimizer == "sgd":
        return _on_device(args, torch.optim.SGD, parameters, lr=args.lr,
                          momentum=args.momentum, weight_decay=args.weight_decay)
    kind = dict(adam=torch.optim.Adam, adamw=torch.optim.AdamW)[args.optimizer]
    return _on_device(args, kind, parameters, lr=args.lr,
                      weight_decay=args.weight_decay)


def _on_device(args, kind, parameters, **settings):
    """Return a torch.optim optimizer: on a GPU (CUDA) in its fused form, which steps
    all parameters by a few kernels; elsewhere in torch's default form."""
    fused = True if torch.device(args.device).type == "cuda" else None
    made = kind(parameters, fused=fused, **settings)

    def keep_form(_, state):
        # a checkpoint names the form of the device that it was written on
        groups = [group | {"fused": fused} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    def keep_layout(optimizer):
        # the network that wrote it may have had its weights in another memory format,
        # which the fused form refuses
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter).copy_(value)

    made.register_load_state_dict_pre_hook(keep_form)
    if fused:
        made.register_load_state_dict_post_hook(keep_layout)
    return made


# ---- schedules -----------------------------------------------------------------------


class Stages:
    """The stages of a run, in their order, with their lengths in epochs:

        Stages(steps_per_epoch, prune=200, finetune=300)

    by_name: {stage: epochs}. epochs: of all stages.
    """

    def __init__(self, steps_per_epoch, **epochs):
        self.steps_per_epoch, self.by_name = steps_per_epoch, epochs
        self.epochs = sum(epochs.values())

    def steps(self, name):
        """Return how many iterations a stage has."""
        return self.by_name[name] * self.steps_per_epoch

    def place(self, epoch):
        """Return (stage, epoch within the stage from 0, epochs of the stage).

        epoch: over all stages, from 0.
        """
        for name, count in self.by_name.items():
            if epoch < count:
                return name, epoch, count
            epoch -= count
        raise ValueError(f"there is no epoch beyond {self.epochs}")

    def position(self, iteration):
        """Return (step within the stage from 0, steps of the stage).

        iteration: over all stages, from 1.
        """
        epoch, step = divmod(iteration - 1, self.steps_per_epoch)
        _, within, count = self.place(epoch)
        return within * self.steps_per_epoch + step, count * self.steps_per_epoch


def sparsity_at(update, num_updates, final_sparsity, first=0.0):
    """Return the sparsity after an update, 0..1 (Eq. 9): a cubic from `first` to
    final_sparsity.

    update: 1..num_updates. Raises ValueError outside this range.
    """
    if not 1 <= update <= num_updates:
        raise ValueError(f"update is {update}, expected 1 to {num_updates}")
    left = (1 - update / num_updates) ** 3
    return first + (final_sparsity - first) * (1 - left)  # Eq. 9


def cosine(lr, step, steps):
    """Return the learning rate of a step: a cosine from lr to 0.

    step: from 0. steps: of the stage.
    """
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


def step_down(lr, step, steps):
    """Return the learning rate of a step: lr, times 0.1 from half of the steps on, and
    times 0.1 again from three quarters on (epochs 80 and 120 of 160).

    step: from 0. steps: of the stage.
    """
    is_past_half, is_past_three_quarters = 2 * step >= steps, 4 * step >= 3 * steps
    return lr * 0.1 ** (is_past_half + is_past_three_quarters)


def constant(lr, step, steps):
    """Return the learning rate of a step: lr, at each of them."""
    return lr


SCHEDULES = {"cosine": cosine, "step": step_down, "constant": constant}
# {schedule: its mean over a long stage, as a share of the rate at its start}
MEAN_RATE = {"cosine": 1 / 2, "step": 1 / 2 + 0.1 / 4 + 0.01 / 4, "constant": 1}


def sum_of_rates(schedule, lr, steps):
    """Return the sum of the learning rates of a long stage: how far a gradient of 1
    moves a weight, by SGD without momentum."""
    return lr * steps * MEAN_RATE[schedule]


def setting_for(density, measured):
    """Return the setting under which a run should end at a density, by measured ones:
    on a line of log setting over log density, through the two that it lies between, or
    the last two at an end.

    density: the share of the weights that is alive, 0..1. measured: {density: setting}.
    """
    densities, settings = np.log(sorted(measured.items())).T
    wanted = math.log(density)
    i = np.clip(np.searchsorted(densities, wanted), 1, len(densities) - 1)
    slope = (settings[i] - settings[i - 1]) / (densities[i] - densities[i - 1])
    return math.exp(settings[i] + slope * (wanted - densities[i]))


def lr_at(schedule, lr, step, steps):
    """Return the learning rate of a step, from the lr at the start of its stage.

    schedule: that of --schedule, a key of SCHEDULES. step: from 0. steps: of the stage.
    """
    return SCHEDULES[schedule](lr, step, steps)


# ---- a pass over a data set ----------------------------------------------------------


def evaluate(forward, net, batches, args, total=lambda tensor: tensor):
    """Evaluate a network in eval mode. Return a dict:

        loss        a mean over the images
        accuracy    0..1
        rate        spikes per neuron and time step, 0..1
        silent      names of the LIFs without a spike

    forward: the network, or its compiled form. batches: of (images, labels); with
    several processes each has its share of them, which may be empty. total(tensor):
    sums over the processes.
    """
    names, device = list(models.lifs(net)), net.mean.device
    sums = torch.zeros(2, dtype=widest(device), device=device)
    samples = 0
    with (torch.inference_mode(), models.evaluating(net),
          metrics.firing(net) as spikes):
        for x, y in batches:
            with autocast(args):
                logits = forward(x)
            loss = loss_over_time(logits, y, args.loss)
            # in float32, since the sum of bfloat16 logits rounds to ties
            sums_over_time = logits.sum(0, dtype=torch.float32)
            right = (sums_over_time.argmax(1) == y).sum()
            sums += torch.stack([loss.to(sums) * len(y), right.to(sums)])
            samples += len(y)
    sums = torch.cat([sums, sums.new_tensor([samples])])
    loss, correct, samples = total(sums).tolist()
    rows = [[int(n) for n in spikes.get(name, (0, 0))] for name in names]
    counted = total(torch.tensor(rows, device=net.mean.device))
    n_spikes, n_places = counted[:, 0], counted[:, 1].tolist()
    rate, by_layer = metrics.rates(dict(zip(names, zip(n_spikes, n_places))))
    silent = [name for name, layer in by_layer.items() if layer == 0]
    return dict(loss=loss / samples, accuracy=correct / samples, rate=rate,
                silent=silent)


def score_channels(net, pairs, args, metric="criticality", aggregate="max",
                   mine=lambda batches: batches, total=lambda tensor: tensor):
    """Score the channels of models.removable(net), in one pass in eval mode.

    Returns (scores [C] float64, has_spiked [C] bool), over the channels of all layers,
    on the CPU. Sums are float64: rounding hardly depends on the number of batches.

    pairs: batches of (images, labels). metric: "criticality", a mean over the samples
    (Eq. 6), or "gradient", the mean over the batches of |dL/dgamma|. aggregate: how the
    neurons of a channel make one criticality, "max" | "mean".
    mine(batches): returns those of this process. total(tensor): sums over the
    processes, which all return the same.
    """
    if metric not in ("criticality", "gradient"):
        raise ValueError(f'metric is {metric!r}, expected "criticality" or "gradient"')
    groups, device = models.removable(net), net.mean.device
    neurons = {name: net.get_submodule(group.lif) for name, group in groups.items()}
    gammas = [net.get_submodule(group.bn).weight for group in groups.values()]
    sizes = [len(gamma) for gamma in gammas]
    scores = torch.zeros(sum(sizes), dtype=widest(device), device=device)
    spiked = {name: torch.zeros(size, dtype=torch.bool, device=device)
              for name, size in zip(groups, sizes)}

    def watch(name, spikes):
        spiked[name] = spiked[name] | spikes.transpose(0, 2).flatten(1).any(1)

    pairs = list(pairs)
    images = sum(len(y) for _, y in pairs)
    recorded = aggregate if metric == "criticality" else None
    for x, y in mine(pairs):
        with (torch.set_grad_enabled(metric == "gradient"), autocast(args),
              models.evaluating(net), metrics.hooks(neurons, after=watch),
              models.recording(net, recorded) as found):
            loss = loss_over_time(net(x), y, args.loss)
        if metric == "gradient":
            gradients = torch.cat(torch.autograd.grad(loss, gammas))
            scores = scores + gradients.abs().to(scores) / len(pairs)
        else:
            batch = torch.cat([found[group.lif] for group in groups.values()])
            scores = scores + batch * (len(y) / images)
    scores = total(scores)
    spikes = total(torch.cat(list(spiked.values())).long())
    for name, part in zip(groups, scores.split(sizes)):
        if not part.isfinite().all():
            raise FloatingPointError(
                f"the scores of {name} are not finite (NaN or infinite) and cannot be "
                f"ranked. A checkpoint saved before is kept; try a lower --lr")
    return scores.cpu(), spikes.bool().cpu()
