"""UPR: weights, and single neurons, are pruned by masks that are learned with them.

Paper: "Towards Energy Efficient Spiking Neural Networks: An Unstructured Pruning
Framework", Shi et al., ICLR 2024 (OpenReview eoSeaK4QJo), and its code. Each weight has
a learnable number alpha, and computes as w * sigma(beta alpha). A price on the masks
works against the loss: it is proportional to the synaptic operations that a weight can
cause. While the network trains, the slope beta grows from 5 to 1000, and the soft masks
become 0 or 1. Then the masks are fixed, w takes the place of w * sigma, and the network
is fine-tuned.

    python prune_upr.py                    # the whole job on embedded data
    python prune_upr.py --neurons          # neurons have masks too
    python prune_upr.py --mode paper       # alive where alpha > 0, however many
    python prune_upr.py --as-published     # that, with Adam and mean square error
    python prune_upr.py --price 3e-7       # another price

By the chain rule, with g = dL/d(w sigma) and the price lambda c of a mask:

    dJ/dw     = g sigma
    dJ/dalpha = (g w + lambda c) beta sigma (1 - sigma)

So alpha rises where the first-order gain of the weight, -g w, exceeds its price.

With --neurons each neuron, one place of the map of one channel, has such a mask as
well: its spikes are multiplied by it, graded while the masks are soft, and 0 or 1 in
the end. The masks of neurons are buffers of the LIFs in model.pt, and models.load puts
them back; what cannot keep them (--init, compact.py, export.py) refuses the file or
leaves it as it is.

A run counts connections, with --neurons or without: how many alive inputs the alive
neurons have under alive weights, exact at borders. updates.jsonl holds them.

The default of --price is tuned on the embedded data, and depends on loss, optimiser,
batch and network. To find one for another network, bisect in runs with
--epochs-finetune 0 and another --seed: each run says how many masks it found above 0.

How sure the parts are: the rule, the prices, beta and the threshold are from the
authors' code (github xyshi2000/Unstructured-Pruning); the paper's text could not be
read, only its abstract. The published settings are other ones. On CIFAR-10

    python prune_upr.py --dataset cifar10 --model gradr-conv --time-steps 8 \\
        --batch-size 16 --as-published --neurons --price 1e-11 \\
        --epochs-prune 800 --epochs-finetune 200

is nearest to them. A price of 1e-11 acts through the epsilon of Adam, 1e-8, and moves
nothing under another setting.

Differences from the published code: the last epoch is reported, and not the best test
epoch; dead weights stay 0 and have no momentum, where there they drift behind the mask;
connections are counted with binary masks, and not with soft ones; a run that is resumed
goes on at its beta; no layer ends empty; the rate of the masks depends on the length of
the search, so that it can move them as far as there; the stem of ResNet-19 has masks
too, since all methods here share one set of prunable weights; its gradr-conv has no
dropout.
"""
from copy import deepcopy
from pathlib import Path

import harness  # first: what is not installed is then one line

import numpy as np
import torch
from torch import nn

import metrics
import models
import training
from harness import flags, presets, published, setup
from harness.runfolder import Run, finished
from masks import Masks, TooFew, Update, count, select

FIRST_SLOPE, LAST_SLOPE = 5, 1000  # beta at the start and the end, as published
# where |alpha| is smaller in the end, sigma(beta alpha) is not 0 or 1 yet
SOFT = 5 / LAST_SLOPE


# ---- the prices ----------------------------------------------------------------------


@torch.no_grad()
def prices(net):
    """Return ({name of a weight: c}, {name of a LIF: (cn, shape)}) of a network.

    c = H W / stride^2: how many operations a spike map [H, W] can cause in the weight;
    of a linear layer 1. cn: the sum of C_out k^2 / stride^2 over the layers that read a
    neuron. Pooling between the two and the borders are not counted. shape: (C, H, W).

    The LIFs are all that have a map, but the first: that of the first convolution.
    Identity shortcuts are free. INTERPRETATION: a 1x1 shortcut of a pre-activation
    ResNet reads a real-valued stream, and so no neuron.
    """
    config = net.config | dict(time_steps=1, encoding="direct")
    with torch.device("meta"):  # shapes alone: nothing is computed
        twin = models.build(**config).eval()
        image = torch.empty(1, config["in_channels"], *[config["image_size"]] * 2)
    layers = metrics.prunable_layers(twin)
    of_weights, of_neurons, shapes = {}, {}, {}

    def fire(name, spikes):
        shapes[name] = tuple(spikes.shape[2:])
        of_neurons[name] = 0

    def read(name, x):
        weight = layers[name].weight
        operations, reached = 1, len(weight)
        if weight.dim() == 4:
            stride = layers[name].stride[0]
            operations = x.shape[2] * x.shape[3] / stride**2
            reached = len(weight) * weight[0, 0].numel() / stride**2
        of_weights[f"{name}.weight"] = operations  # c
        # it reads the LIF that was the last one to fire: also ResNet-19's shortcut,
        # which is computed first in its block. One without BN reads the stream
        if shapes and not name.endswith(".shortcut"):
            of_neurons[list(shapes)[-1]] += reached  # cn

    with (metrics.hooks(layers, before=read),
          metrics.hooks(models.lifs(twin), after=fire)):
        twin(image)
    with_map = [name for name, shape in shapes.items() if len(shape) == 3]
    return ({name: of_weights[name] for name in models.scored_by(net)},
            {name: (of_neurons[name], shapes[name]) for name in with_map[1:]})


# ---- soft masks ----------------------------------------------------------------------


def slope(done, total):
    """Return beta after `done` of `total` iterations of the search:
    beta_k = 5 (1000 / 5)^(k / K). The first iteration runs at 5."""
    return FIRST_SLOPE * (LAST_SLOPE / FIRST_SLOPE) ** (done / total)


class SoftMasks:
    """The learnable masks of all M prunable weights, in the order of the masks, and of
    the N neurons that have some, LIF by LIF.

    alpha: [M + N], all start at 0. cost: [M + N], c of weights and cn of neurons.
    beta: the slope. w: [M], the weights themselves: between two steps the network holds
    w * sigma(beta alpha), by which it computes.
    neurons: {name of a LIF: the LIF}, with its mask [C, H, W], a buffer of the network.
    sizes: how many of the M belong to each weight. lengths: the same of all M + N, of
    weights and then of LIFs.
    """

    def __init__(self, net, masks, with_neurons=False):
        self.weights, self.sizes = list(masks.weights.values()), masks.sizes
        c, cn = prices(net)
        self.lengths, costs = list(self.sizes), [c[name] for name in masks.weights]
        self.neurons = {}
        if with_neurons:
            models.mask_neurons(net, {name: torch.ones(shape)
                                      for name, (_, shape) in cn.items()})
            for name, (cost, shape) in cn.items():
                self.neurons[name] = net.get_submodule(name)
                self.lengths.append(torch.Size(shape).numel())
                costs.append(cost)
        self.cost = torch.cat([torch.full((length,), float(cost), device=masks.device)
                               for length, cost in zip(self.lengths, costs)])
        self.alpha = nn.Parameter(torch.zeros_like(self.cost))
        self.beta = float(FIRST_SLOPE)
        self.w = torch.cat([weight.detach().reshape(-1) for weight in self.weights])

    @property
    def sigma(self):
        """sigma(beta alpha), [M + N]."""
        return torch.sigmoid(self.beta * self.alpha.detach())

    @property
    def of_weights(self):
        """alpha of the weights, [M]."""
        return self.alpha.detach()[:len(self.w)]

    def by_lif(self, flat):
        """Return the parts of an [M + N] tensor that belong to the LIFs, a list."""
        return flat.split(self.lengths)[len(self.sizes):]

    @torch.no_grad()
    def write(self):
        """Let the network compute with the soft masks: w * sigma for each weight, and
        spikes times sigma."""
        sigma = self.sigma
        self._write_weights(self.w * sigma[:len(self.w)])
        for lif, part in zip(self.neurons.values(), self.by_lif(sigma)):
            lif.mask.copy_(part.view(lif.mask.shape))
            lif.mask.requires_grad_()  # the next backward pass gives dL/dsigma

    @torch.no_grad()
    def gradients(self, price):
        """Turn the gradients by the network's weights, g = dL/d(w sigma), and by the
        masks of the neurons, dL/dsigma, into dJ/dw and dJ/dalpha. price: lambda.

            J = L + lambda (sum c sigma(beta alpha) + sum cn sigma(beta alpha_n))
        """
        sigma = self.sigma
        g = torch.cat([weight.grad.reshape(-1) for weight in self.weights])
        by_sigma = [g * self.w]
        for lif in self.neurons.values():
            by_sigma.append(lif.mask.grad.reshape(-1))
            lif.mask.grad = None
        by_sigma = torch.cat(by_sigma) + price * self.cost
        self.alpha.grad = by_sigma * self.beta * sigma * (1 - sigma)  # dJ/dalpha
        for weight, part in zip(self.weights, sigma.split(self.lengths)):
            weight.grad.mul_(part.view(weight.shape))  # dJ/dw

    @torch.no_grad()
    def put_weights(self):
        """Let the network hold w itself, for a step of its optimizer."""
        self._write_weights(self.w)

    @torch.no_grad()
    def take_weights(self):
        """Take w, which has moved, back from the network."""
        torch.cat([weight.reshape(-1) for weight in self.weights], out=self.w)

    def _write_weights(self, flat):
        for weight, part in zip(self.weights, flat.split(self.sizes)):
            weight.copy_(part.view(weight.shape))

    @torch.no_grad()
    def fix_neurons(self):
        """Let a neuron be alive where its alpha > 0, for good. Return the names of LIFs
        that would have none: the one with the largest alpha stays."""
        rescued = []
        parts = zip(self.neurons.items(), self.by_lif(self.alpha))
        for (name, lif), part in parts:
            alive = part > 0  # strict: a mask that never moved is dead
            if not alive.any():
                rescued.append(name)
                alive[part.argmax()] = True
            lif.mask.requires_grad_(False)
            lif.mask.copy_(alive.view(lif.mask.shape))
        return rescued

    def state_dict(self):
        return {"beta": self.beta, "alpha": self.alpha.detach().cpu(),
                "w": self.w.cpu()}

    def load_state_dict(self, state):
        self.beta = state["beta"]
        self.w.copy_(state["w"])
        self.alpha.data.copy_(state["alpha"])


# ---- from soft to fixed masks --------------------------------------------------------


def fix_masks(keep, masks, soft, generator):
    """End the search: the `keep` weights with the largest alpha are alive from now on;
    None: those with alpha > 0. Return what that changes, an Update.

    INTERPRETATION of an exact count: the published threshold, 0, is one number for all
    layers, and alpha bears the price of its layer already. So the threshold is moved
    until `keep` weights are above it. Ties go by |w|. Each layer keeps at least one.
    """
    before = masks.flat.clone()
    if keep is None:
        masks.flat.copy_(soft.of_weights > 0)  # strict: a mask that never moved is dead
    else:
        keys = [soft.of_weights, soft.w.abs()]
        masks.flat.copy_(select(before, keep, keys, generator))
    between = masks.sparsity
    rescued = masks.rescue_empty_layers(soft.of_weights)
    return Update(pruned=before & ~masks.flat, between=between,
                  regenerated=torch.zeros_like(before), rescued=rescued)


@torch.no_grad()
def connections(net, alive):
    """Return how many connections a network has: the sum over layers and alive neurons
    of the alive inputs that they have under alive weights, exact at borders.

    alive: {name of a weight: bool tensor, True = alive}. All inputs of the network are
    alive. A neuron is alive where its mask is 1 and it has a connection, and a pooled
    place where one of its inputs is. So nothing behind a dead place is counted.

    A copy of the network counts, with weights of 0 and 1: in float64 and on the CPU,
    since the fast convolutions of a GPU would return whole numbers only nearly.
    """
    twin = deepcopy(net).to("cpu", torch.float64).eval()
    twin.time_steps, twin.checks_values = 1, False
    layers, total = metrics.prunable_layers(twin), []
    scored, masked = models.scored_by(twin), models.neuron_masks(twin)
    for name, layer in layers.items():
        layer.weight.copy_(alive[f"{name}.weight"])
        if layer.bias is not None:
            layer.bias.zero_()
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.BatchNorm2d):  # it connects nothing
            twin.set_submodule(name, nn.Identity())

    def places(name, x):  # what a hook returns takes the place of the input
        is_first = name == next(iter(layers))
        return torch.ones_like(x) if is_first else (x > 0).to(x.dtype)

    def meet(name, met):  # met: [1, C, ...], alive inputs under alive weights
        lif, dim, _ = scored[f"{name}.weight"]
        if dim == 0:  # it feeds these neurons
            met = met * masked.get(lif, 1)
        total.append(int(met.sum()))

    def fire(lif, inputs, _):  # instead of its spikes: 1 where a neuron is alive
        return (inputs[0] > 0).to(inputs[0].dtype) * getattr(lif, "mask", 1)

    for lif in models.lifs(twin).values():
        lif.register_forward_hook(fire)
    sides = [net.config["image_size"]] * 2
    steps = [1] if net.encoding == "events" else []
    with metrics.hooks(layers, before=places, after=meet):
        twin(torch.ones(*steps, 1, net.config["in_channels"], *sides).double())
    return sum(total)


def counts_of(net, masks, soft):
    """Return the connections and neurons of a network that is cut, and of the dense
    one, a dict for updates.jsonl."""
    dense = deepcopy(net)
    for mask in models.neuron_masks(dense).values():
        mask.fill_(1)
    everything = {name: torch.ones_like(mask) for name, mask in masks.alive.items()}
    masked = [lif.mask for lif in soft.neurons.values()]
    return dict(connections=connections(net, masks.alive),
                connections_dense=connections(dense, everything),
                neurons_alive=sum(map(count, masked)),
                neurons=sum(mask.numel() for mask in masked))


# ---- the defaults of the masks' rate and of the price --------------------------------

# How far Adam can move an alpha in the published search for DVS-CIFAR10, the sum of its
# rates: 240 epochs of 140 steps, a cosine from 1e-3
REACH = 240 * 140 * 1e-3 / 2


def default_mask_lr(args, steps):
    """Return the rate under which Adam can move an alpha by REACH in a search.

    INTERPRETATION: as far as in the published search, in however many steps. At its
    1e-3 a search of 752 steps keeps its masks soft until beta is large. BN hides how
    small the weights of a layer have become, and the cut then empties the layer.
    """
    return REACH / training.sum_of_rates(args.schedule, 1, steps)


# {share of the weights whose alpha is above 0 after the search: the price lambda},
# measured on fashion-mini with `small`, without --neurons:
#     python prune_upr.py --price LAMBDA --epochs-finetune 0 --seed 3
PRICE = {0.1210: 3e-7, 0.0635: 1e-6, 0.0437: 3e-6, 0.0173: 5e-5, 0.0109: 1e-4}


def default_price(args):
    """Return the price under which the search should end at a density of 1 - sparsity:
    from PRICE, by log price over log density; beyond its ends the nearest one.

    INTERPRETATION: other networks, losses and lengths, and --neurons, get it too. A run
    says how far the search was off; the cut makes the count exact.
    """
    densities, found = np.log(sorted(PRICE.items())).T
    return float(np.exp(np.interp(np.log(1 - args.sparsity), densities, found)))


# ---- the script ----------------------------------------------------------------------


def method_of(args):
    """Return the method's name, for the summary."""
    return "upr-neurons" if args.neurons else "upr"


def run_name(args):
    """Return the name of the run's folder."""
    name = f"{Path(args.dataset).stem}-{args.model}-{method_of(args)}-{args.sparsity:g}"
    if args.mode == "paper":
        name += "-paper"
    if args.price is not None:
        name += f"-price{args.price:g}"
    if args.mask_lr is not None:
        name += f"-mask{args.mask_lr:g}"
    return f"{name}{published.suffix(args, 'upr')}-seed{args.seed}"


def complete(args, explicit):
    """Set what --as-published implies."""
    published.complete(args, explicit, "upr")


def parse_args(argv):
    """Return all flags, a Namespace."""
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("pruning (UPR)").add_argument
    add("--sparsity", type=flags.number(0, 1, above=True),
        help="share of the prunable weights that is dead in the end, a fraction above "
             "0 and below 1, by a top-K of alpha after the search; with --mode paper "
             "it only chooses the default price")
    add("--neurons", action="store_true",
        help="single neurons have masks too, those of all maps but the first; one is "
             "alive where its alpha is above 0, however many these are")
    add("--mode", choices=("matched", "paper"),
        help="matched: exactly --sparsity in the end; paper: weights are alive where "
             "alpha > 0, and their number is the result")
    add("--price", type=flags.number(0), metavar="LAMBDA",
        help="what a synaptic operation costs, in units of the loss; 0: nothing "
             "(default: tuned to --sparsity on the embedded data)")
    add("--mask-lr", type=flags.number(0, above=True), metavar="LR",
        help="learning rate of the masks, which Adam moves; it follows --schedule "
        "(default: such that it can move a mask as far as in the published search)")
    add("--epochs-prune", type=flags.whole(1), metavar="N",
        help="epochs of the search, with soft masks")
    add("--epochs-finetune", type=flags.whole(0), metavar="N",
        help="epochs with the masks fixed")
    published.add_flag(add, "upr")
    return flags.parse(parser, argv, "upr", complete, run_name)


def check_network(args, net):
    """Raise ValueError for a network that soft masks do not suit.

    INTERPRETATION: at the start sigma = 1/2 halves all currents, and half spikes halve
    them again. Batch normalisation takes that out.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        raise ValueError(f"--model is {args.model}, which has no batch normalisation, "
                         f"expected a network with some: soft masks halve all "
                         f"currents at the start. Take another --model")
    if args.neurons and not prices(net)[1]:
        raise ValueError(f"--neurons is given, but --model {args.model} has one map of "
                         f"neurons, expected more: the first has no masks. Leave it "
                         f"out")


def set_up(args):
    """Return the run. What cannot work is exit code 2, before anything is written."""
    with flags.exits(2, ValueError, OSError, no_memory=flags.SMALLER):
        device = setup.start(args)
        images = setup.load(args, device)
        net = setup.build(args, images)
        check_network(args, net)
        masks = Masks(net)
        masks.check_sparsity(args.sparsity)
        soft = SoftMasks(net, masks, args.neurons)
        optimizer = training.optimizer(args, net.parameters())
        stages = setup.stages(args, images, prune=args.epochs_prune,
                              finetune=args.epochs_finetune)
        if args.price is None:
            args.price = default_price(args)
        if args.mask_lr is None:
            args.mask_lr = default_mask_lr(args, stages.steps("prune"))
        # INTERPRETATION: beside SGD the masks have an Adam of their own, without decay,
        # the pair of the published setting for DVS-CIFAR10
        mask_optimizer = torch.optim.Adam([soft.alpha], args.mask_lr)
        return Run(args, device, images, stages, net=net, optimizer=optimizer,
                   masks=masks, soft=soft, mask_optimizer=mask_optimizer)


def ending(args, masks, soft):
    """Say in a line what the search has found. Raise TooFew if these masks are the
    result, and too few."""
    found, n_layers = count(soft.of_weights > 0), len(masks.sizes)
    if args.mode == "paper" and found < n_layers:
        raise TooFew(f"the search ended with {found} masks of weights above 0, "
                     f"expected at least one for each of the {n_layers} layers. Start "
                     f"again with a lower --price")
    text = f"  the search ended with {found:,} masks of weights above 0"
    if args.mode == "matched":
        keep = masks.keep_at(args.sparsity)
        text += f", {keep:,} are asked for"
    n_soft = count(soft.of_weights.abs() < SOFT)
    text += (f"; {100 * n_soft / masks.total:.1f} % of all are still soft, |alpha| < "
             f"{SOFT:g}")
    if args.mode == "matched" and abs(found - keep) > 0.2 * keep:
        text += ": more than 20 % off. --price moves it"
    return text


def said_of(counts):
    """Say in a line what the binary network has beside weights."""
    found, dense = counts["connections"], counts["connections_dense"]
    text = f"  connections {found:,} of {dense:,} ({100 * found / dense:.2f} %)"
    if counts["neurons"]:
        text += (f"; {counts['neurons_alive']:,} of {counts['neurons']:,} masked "
                 f"neurons alive")
    return text


def main(argv=None):
    """Run the script. Return its summary, a dict."""
    args = parse_args(argv)
    if (summary := finished(args)) is not None:
        return summary
    is_default = args.price is None
    run = set_up(args)
    net, masks, optimizer = run.net, run.masks, run.optimizer
    soft, mask_optimizer = run.parts["soft"], run.parts["mask_optimizer"]
    last = run.stages.steps("prune")
    target = keep = None  # outcomes
    if args.mode == "matched":
        target, keep = args.sparsity, masks.keep_at(args.sparsity)

    with run.under_way(f"UPR, price {args.price:.4g}, lr of the masks "
                       f"{args.mask_lr:.3g}, beta {FIRST_SLOPE} to {LAST_SLOPE}"):
        if is_default and args.dataset != presets.of("default")["dataset"]:
            run.say(f"note: the price {args.price:.4g} is that of short runs on the "
                    f"embedded data. It depends on loss, optimiser, batch and network: "
                    f"try it in a shorter run first, and give --price")
        if run.iteration < last:
            soft.write()  # w * sigma(beta alpha)

        for epoch in run.epochs("prune"):
            for x, y in run.batches(epoch):
                # INTERPRETATION: one schedule a stage for both, as in all scripts
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                mask_lr = training.lr_at(args.schedule, args.mask_lr, *run.position)
                training.backward(run, x, y)  # 1 forward with soft masks, 2 backward
                soft.gradients(args.price)  # dJ/dw and dJ/dalpha
                training.descend(mask_optimizer, mask_lr)  # 3 the masks
                soft.put_weights()
                training.descend(optimizer, lr)  # 4 w, BN and biases
                soft.take_weights()
                # 5: the next backward pass clears the gradients
                soft.beta = slope(run.iteration, last)  # 6
                soft.write()

            if run.iteration == last:
                run.say(ending(args, masks, soft))
                change = fix_masks(keep, masks, soft, run.generator())
                for name in soft.fix_neurons():
                    run.say(f"  note: {name} would have lost all neurons; the one with "
                            f"the largest alpha is kept")
                soft.put_weights()  # w itself, and not w * sigma
                masks.apply(optimizer)  # w <- w * m, and its momentum
                counts = counts_of(net, masks, soft)
                run.log_update(target, change, keep, **counts)
                run.say(said_of(counts))
            run.end_epoch()

        for epoch in run.epochs("finetune"):
            for x, y in run.batches(epoch):
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                training.step(run, x, y, lr)
                masks.apply(optimizer)  # w <- w * m, and its momentum
            run.end_epoch()

        return run.finish("prune_upr", method_of(args),
                          pruned_accuracy=run.last_accuracy("prune"))


if __name__ == "__main__":
    main()
