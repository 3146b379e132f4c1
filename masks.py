"""Which weights are prunable, alive or dead; exact global selection by count; exact accounting.

    masks = Masks(net)                            # every weight of a convolution or linear layer
    masks.prune(keep=1000)                        # the 1,000 largest |w| over all layers stay
    masks.apply(optimizer)                        # dead weights and their momentum become 0

A mask is a bool beside its weight, True = alive; weights are zeroed, never found by "is it 0",
since a regenerated weight is 0 and alive. Autograd then still delivers the dense gradient.

All masks are views into one flat vector over the M prunable weights of the network, so that a
global ranking is one selection over one vector: the value of the k-th place by partition, never a
sort. Counts are exact, whatever the ties: those are broken by a further key, and at last by a
seeded permutation.
"""
from contextlib import contextmanager

import numpy as np
import torch

from models import scored_by


def prune_further(sparsity, regen):
    """Return the sparsity s' to prune to, ahead of a regeneration that ends at `sparsity` (Eq. 7).

    INTERPRETATION: s' = s + r (1 - s), so that a share r of the survivors owes its place to the
    regeneration; the paper reports 48 % for r = 0.5 at s = 0.9, which fits. s / (1 - r) would
    exceed 1.
    """
    return sparsity + regen * (1 - sparsity)  # Eq. 7


def seeded(*numbers):
    """Return a CPU generator that depends on all of the numbers, such as a seed and an iteration.

    torch's own seeding keeps 32 bits, and neighbouring seeds start alike; numpy mixes them first.
    """
    mixed = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def kth_largest(values, k):
    """Return the k-th largest of a flat tensor (k from 1), as a tensor without dimensions."""
    if values.device.type == "cpu":  # numpy's partition is several times faster than topk, kthvalue
        array = values.numpy()
        return torch.as_tensor(np.partition(array, len(array) - k)[len(array) - k])
    return values.topk(k, sorted=False).values.min()


def select(eligible, k, keys, generator):
    """Choose exactly k of the eligible places: the largest by the first key, ties by the next, and
    so on, what then still ties by a seeded permutation.

    eligible: [M] bool. keys: list of [M] tensors, maybe empty (a random choice). generator: a CPU
    generator. Returns [M] bool with k True. Raises ValueError if k places are not eligible, and
    FloatingPointError if a key is not finite.
    """
    available = int(eligible.count_nonzero())
    if not 0 <= k <= available:
        raise ValueError(f"cannot choose {k} of {available} weights")
    if k in (0, available):
        return eligible.clone() if k else torch.zeros_like(eligible)
    if not keys:
        places = eligible.nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=generator)[:k]
        chosen = torch.zeros_like(eligible)
        chosen[places[order.to(places.device)]] = True
        return chosen
    if not keys[0].isfinite().all():
        raise FloatingPointError("weights or scores are not finite (NaN or infinite) and cannot be "
                                 "ranked. A checkpoint saved before is kept; try a lower --lr")
    key = torch.where(eligible, keys[0], -torch.inf)
    threshold = kth_largest(key, k)
    chosen = key > threshold
    missing = k - int(chosen.count_nonzero())
    ties = (key == threshold).nonzero().squeeze(1)
    among = torch.ones(len(ties), dtype=torch.bool, device=ties.device)
    chosen[ties[select(among, missing, [key[ties] for key in keys[1:]], generator)]] = True
    return chosen


def reactivate(pruned, count, keys, generator=None):
    """Return which pruned units come back, [M] bool: the `count` highest-scored ones (Eq. 5).

    pruned: [M] bool, the candidates: weights, or channels. keys: the score of each unit, then what
    breaks ties. See select().
    """
    return select(pruned, count, keys, generator)  # Eq. 5


def momenta(optimizer, tensor):
    """Return what an optimizer remembers of the past gradients of a parameter: SGD's momentum,
    Adam's first moment; a list of none or one."""
    state = optimizer.state.get(tensor, {})
    return [state[key] for key in ("momentum_buffer", "exp_avg") if state.get(key) is not None]


class Masks:
    """The masks of a network and what happened to them.

    alive: {name: bool tensor shaped like the weight}, True = alive; views into one flat vector.
    returned: flat bool, True where the latest entry of a weight into the mask was a regeneration.
    """

    def __init__(self, net):
        self.scored = scored_by(net)
        self.weights = {name: net.get_parameter(name) for name in self.scored}
        self.sizes = [weight.numel() for weight in self.weights.values()]
        self.total = sum(self.sizes)
        self.device = next(iter(self.weights.values())).device
        self._hold(torch.ones(self.total, dtype=torch.bool, device=self.device))
        self.returned = torch.zeros_like(self.flat)

    def _hold(self, flat):
        self.flat = flat
        self.alive = {name: part.view(weight.shape) for (name, weight), part
                      in zip(self.weights.items(), flat.split(self.sizes))}

    # ---- counts ----------------------------------------------------------------------------------

    def keep_at(self, sparsity):
        """Return how many weights are alive at a sparsity: exactly M - round(sparsity * M)."""
        return self.total - round(sparsity * self.total)

    def check(self, sparsity):
        """Raise ValueError if a sparsity leaves fewer weights than there are layers."""
        if self.keep_at(sparsity) < len(self.sizes):
            raise ValueError(f"--sparsity is {sparsity}, which leaves {self.keep_at(sparsity)} of "
                             f"{self.total} weights alive, expected at least one for each of the "
                             f"{len(self.sizes)} layers. Lower --sparsity or raise --width")

    @property
    def n_alive(self):
        return int(self.flat.count_nonzero())

    @property
    def sparsity(self):
        """Dead / prunable weights, from the masks."""
        return 1 - self.n_alive / self.total

    @property
    def share_regenerated(self):
        """Share of the alive weights whose latest entry into the mask was a regeneration
        (Fig. 2a)."""
        return int((self.returned & self.flat).count_nonzero()) / self.n_alive

    def per_layer(self, flat):
        """Return how many places of a flat bool vector are True in each layer,
        as a list of ints."""
        return torch.stack([part.count_nonzero() for part in flat.split(self.sizes)]).tolist()

    # ---- flat views of the network ---------------------------------------------------------------

    def _flatten(self, tensors):
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    def magnitudes(self):
        """Return |w| of all prunable weights, [M] (Eq. 8: the importance of a weight)."""
        return self._flatten(self.weights.values()).abs_()  # Eq. 8

    def gradients(self):
        """Return |dL/dw| of all prunable weights, dead ones included, [M]."""
        return self._flatten(weight.grad for weight in self.weights.values()).abs_()

    def spread(self, scores):
        """Give each weight the score of its LIF channel: {LIF name: [C]} -> [M] in float32."""
        parts = []
        for name, (lif, dim, repeat) in self.scored.items():
            weight, score = self.weights[name], scores[lif].to(torch.float32)
            shape = [-1 if d == dim else 1 for d in range(weight.dim())]
            score = score.repeat_interleave(repeat).view(shape)
            parts.append(score.expand(weight.shape).reshape(-1))
        return torch.cat(parts)

    # ---- the steps of an update ------------------------------------------------------------------

    def prune(self, keep, magnitudes, generator):
        """Let only the `keep` largest |w| over all layers live on;
        return what was pruned, [M] bool.

        Only alive weights are ranked: one that came back at 0 and has not moved ties with no dead
        one.
        """
        before = self.flat.clone()
        self.flat.copy_(select(before, keep, [magnitudes], generator))
        return before & ~self.flat

    def regenerate(self, count, candidates, keys, generator):
        """Bring back the `count` best candidates; return what came back, [M] bool.

        candidates: [M] bool, none of them alive. keys: the score of each weight, then |w| from
        before the update. A weight that was pruned in this same update still has its value and
        keeps it; one that was dead before comes back at 0 and grows from its next gradient.
        """
        back = reactivate(candidates & ~self.flat, count, keys, generator)
        self.flat |= back
        return back

    def guard(self, importance=None):
        """Leave no layer empty: its largest weight stays, and the smallest alive weight of a layer
        with more than one goes in its place, so that the count holds. importance: [M], what large
        and small mean, |w| if not given. Returns the names of such layers."""
        if all(self.per_layer(self.flat)):
            return []
        values = (self.magnitudes() if importance is None else importance).split(self.sizes)
        parts = self.flat.split(self.sizes)
        rescued = []
        for name, part, value in zip(self.weights, parts, values):
            if part.any():
                continue
            rescued.append(name)
            spare = [torch.where(other, size, torch.inf) if other.count_nonzero() > 1
                     else torch.full_like(size, torch.inf) for other, size in zip(parts, values)]
            self.flat[torch.cat(spare).argmin()] = False
            part[value.argmax()] = True
        return rescued

    @torch.no_grad()
    def apply(self, optimizer):
        """Set dead weights and their momentum to 0, after every step: or momentum, weight decay and
        the dense gradient bring them back to life."""
        for name, weight in self.weights.items():
            weight.mul_(self.alive[name])
            for momentum in momenta(optimizer, weight):
                momentum.mul_(self.alive[name])

    def account(self, pruned, regenerated):
        """Remember who came back, and return one update in numbers: a dict with totals and layers.

        pruned: [M] bool, alive when the update began and cut by magnitude in it. regenerated:
        [M] bool. survived: the share of the pruned that the regeneration brought back.
        """
        regenerated = regenerated & self.flat  # without what the guard gave away
        self.returned = (self.returned | regenerated) & self.flat
        rows = zip(self.weights, *map(self.per_layer, (self.flat, pruned, regenerated)))
        layers = [dict(name=name, alive=alive, pruned=cut, regenerated=back)
                  for name, alive, cut, back in rows]
        n_pruned = sum(layer["pruned"] for layer in layers)
        rescued = int((pruned & regenerated).count_nonzero())
        return dict(sparsity=self.sparsity, pruned=n_pruned,
                    regenerated=sum(layer["regenerated"] for layer in layers),
                    survived=rescued / n_pruned if n_pruned else None, layers=layers)

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self):
        return {"alive": self.flat.cpu(), "returned": self.returned.cpu()}

    def load_state_dict(self, state):
        self._hold(state["alive"].to(self.device, copy=True))
        self.returned = state["returned"].to(self.device, copy=True)


def trim(sparsity, masks, generator):
    """End the structure epochs at exactly this sparsity: the largest |w| of those alive stay, or
    (INTERPRETATION) where fewer are alive, the dead that drifted farthest in this epoch return."""
    keep, drift = masks.keep_at(sparsity), masks.magnitudes()
    regenerated = masks.regenerate(max(0, keep - masks.n_alive), ~masks.flat, [drift], generator)
    between, pruned = masks.sparsity, masks.prune(keep, drift, generator)
    return sparsity, between, pruned, regenerated, masks.guard()


@contextmanager
def computing_with(masks, names):
    """Let the weights be w * m inside, for a forward and a backward pass. INTERPRETATION: w takes
    the gradient by w * m (straight-through): masked synapses train on, and show if they grow."""
    latent = {name: masks.weights[name].detach().clone() for name in names}
    for name in names:
        masks.weights[name].data.mul_(masks.alive[name])
    yield
    for name in names:
        masks.weights[name].data.copy_(latent[name])
