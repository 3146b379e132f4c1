"""The leaky integrate-and-fire (LIF) neuron with an arctan surrogate, and its criticality score.

Paper: "Brain-Inspired Efficient Pruning: Exploiting Criticality in Spiking Neural Networks",
arXiv 2311.16141, Eqs. 1-4 (the neuron) and 6 (the score).

    from neurons import LIF
    lif = LIF()                              # tau 4/3, threshold 1: the settings of the paper
    spikes = lif(torch.rand(5, 8, 64, 32, 32))        # [T, N, C, H, W], time first -> 0 or 1
    lif.record = "max"; lif(x_seq); lif.score         # [C], the criticality of each channel

Forward, for t = 1 ... T, from v_0 = v_reset:

    h_t = v_{t-1} + (x_t - (v_{t-1} - v_reset)) / tau      charge
    s_t = 1 if h_t >= v_threshold else 0                   fire
    v_t = s_t * v_reset + (1 - s_t) * h_t                  hard reset

Backward. A spike is a step function of h_t, whose derivative is replaced by that of the surrogate,
f'(u) at u = h_t - v_threshold. The reset is detached: no gradient flows through the s_t that stands
in the line of the reset, so that dv_t/dh_t = 1 - s_t. With g_t = dL/ds_t, for t = T ... 1:

    dL/dh_t     = g_t * f'(h_t - v_threshold) + dL/dv_t * (1 - s_t)
    dL/dx_t     = dL/dh_t / tau
    dL/dv_{t-1} = dL/dh_t * (1 - 1 / tau)

Written in a_t = dL/dx_t alone this is one recursion, which the code runs:

    a_t = g_t * f'(h_t - v_threshold) / tau + (1 - 1 / tau) * (1 - s_t) * a_{t+1},    a_{T+1} = 0

and h is all that it needs, since s_t = 1 exactly where h_t >= v_threshold. Autograd over a plain
loop would keep several tensors a time step; this keeps one.

Other papers' neurons are arguments of LIF: a rectangular surrogate, a soft reset
(v_t = h_t - s_t * v_threshold), an input that does not decay (h_t = ... + x_t, not x_t / tau), a
strict threshold (s_t = 1 if h_t > v_threshold), a tau that is learnt (PLIF, Fang et al. 2021,
arXiv 2007.05785: 1 / tau = sigmoid(w), one w a layer). They run in _AnyLIF, by the same derivation:

    dL/dh_t     = g_t * f'(h_t - v_threshold) + dL/dv_t * (1 - s_t)        soft reset: * 1
    dL/dx_t     = dL/dh_t / tau                                            undecayed:  dL/dh_t
    dL/d(1/tau) = sum over t of dL/dh_t * (h_t - v_{t-1}) * tau            undecayed:
                  sum over t of dL/dh_t * (v_reset - v_{t-1})
"""
import math

import torch
from torch import nn

# On a CPU the T steps run block by block, so that the potential stays in the cache from one step to
# the next. 2**20 float32 numbers are 4 MiB. Smaller blocks are no faster, and on a busy machine, where
# threads wait for each other at each operation, much slower.
CPU_BLOCK = 2**20
SURROGATES, RESETS = ("arctan", "rectangular"), ("hard", "soft")


def surrogate(u, alpha=2.0):
    """Return the surrogate of the step function, a value in (0, 1),
    at u = h - v_threshold (Eq. 4a).

    Training never needs it, only its derivative; it is here to be read, plotted and tested.
    """
    return torch.arctan(math.pi / 2 * alpha * u) / math.pi + 0.5  # Eq. 4a


def surrogate_grad(u, alpha=2.0, shape="arctan"):
    """Return the derivative of the surrogate at u = h - v_threshold (Eq. 4b).

    Its peak, on the threshold, is alpha / 2: exactly 1 at alpha = 2. shape "rectangular" has that
    height wherever |u| < 1 / alpha, and 0 elsewhere: SD-SNN's is 1 for |u| < 0.5.
    """
    if shape == "rectangular":
        return (u.abs() < 1 / alpha).to(u.dtype) * (alpha / 2)
    return (alpha / 2) / (1 + (math.pi / 2 * alpha * u) ** 2)  # Eq. 4b


def criticality(h_seq, v_threshold=1.0, alpha=2.0, aggregate="max", shape="arctan"):
    """Return how near to its threshold each channel is kept, as a score in (0, alpha / 2] (Eq. 6).

    h_seq: [T, N, C, ...], the potential after charging and before the reset. aggregate: "max" (the
    paper's choice) or "mean" over what follows C. shape: of the surrogate; a rectangular one tells
    only how often a neuron is near. Returns [C] in float64, for linear layers as well.

    INTERPRETATION: mean over T, then max over H x W, then mean over the samples: in the text the
    aggregation acts on the structure and the average runs over the samples.
    """
    if aggregate not in ("max", "mean"):
        raise ValueError(f'aggregate is {aggregate!r}, expected "max" or "mean"')
    if h_seq.dim() < 3:
        raise ValueError(f"criticality got shape {tuple(h_seq.shape)}, expected [T, N, C, ...]")
    dtype = torch.promote_types(h_seq.dtype, torch.float32)
    per_neuron = sum(surrogate_grad(h.to(dtype) - v_threshold, alpha, shape)
                     for h in h_seq) / len(h_seq)
    return _per_channel(per_neuron, aggregate)


def _per_channel(per_neuron, aggregate):
    """Return the score of each channel, [C] in float64, from that of each neuron, [N, C, ...]."""
    if per_neuron.dim() == 2:
        per_sample = per_neuron
    elif aggregate == "max":
        per_sample = per_neuron.amax(2)
        while per_sample.dim() > 2:  # one dimension at a time: many times faster on few channels
            per_sample = per_sample.amax(2)
    else:
        per_sample = per_neuron.flatten(2).mean(2)
    return per_sample.mean(0, dtype=torch.float64)  # Eq. 6


def _as_rows(seq, order):
    """View [T, N, ...] as [T, numbers in one step], the dimensions after T laid out in `order`.

    This is a view, and not a copy, wherever one step is dense in memory in that order: contiguous,
    channels_last, or one step expanded over T.
    """
    return seq.permute(0, *order).flatten(1)


def _blocks(rows):
    """Return slices over the numbers of one step, small enough for the cache where that pays."""
    n = rows.shape[1]
    size = CPU_BLOCK if rows.device.type == "cpu" and not torch.compiler.is_compiling() else n
    return [slice(start, start + size) for start in range(0, n, size)] if n else []


class _LIF(torch.autograd.Function):
    """Run the equations at the top of this file over time_steps steps. Return the spikes and, where
    `recorded`, the mean of f'(h_t - v_threshold) over t for each neuron, [N, ...], else None.

    x_seq: [T, N, ...], or [1, N, ...]: the same input at every step. Its gradient is then summed
    here, in the cache, and not over a tensor of all steps.
    """

    @staticmethod
    def forward(ctx, x_seq, time_steps, tau, v_threshold, v_reset, alpha, recorded):
        order = sorted(range(1, x_seq.dim()), key=x_seq.stride, reverse=True)  # as it is in memory
        x = _as_rows(x_seq, order).expand(time_steps, -1)
        s = torch.empty_like(x, memory_format=torch.contiguous_format)
        h = torch.empty_like(s) if ctx.needs_input_grad[0] else None  # only the backward reads it
        threshold = s.new_full((), v_threshold)
        near = None
        if recorded:
            near = torch.empty_like(s[0], dtype=torch.promote_types(s.dtype, torch.float32))
            one, curvature = near.new_ones(()), (math.pi / 2 * alpha) ** 2
        for block in _blocks(x):
            x_b, s_b = x[:, block], s[:, block]
            v, taus = torch.empty_like(s_b[0]), torch.full_like(s_b[0], tau)
            h_b = h[:, block] if h is not None else [torch.empty_like(v)] * time_steps
            if recorded:
                near_b, slope = near[block], torch.empty_like(near[block])
                ones = torch.ones_like(slope)
            for t, (x_t, h_t, s_t) in enumerate(zip(x_b, h_b, s_b)):
                # Eq. 1. A true division: times 1 / tau rounds otherwise, and flips spikes
                if t == 0:
                    torch.div(x_t, taus, out=h_t)
                    if v_reset != 0:
                        h_t.add_(v_reset)
                else:
                    torch.sub(x_t, v - v_reset if v_reset != 0 else v, out=h_t)
                    torch.addcdiv(v, h_t, taus, out=h_t)
                torch.ge(h_t, threshold, out=s_t)  # Eq. 3
                if t + 1 < time_steps:
                    torch.addcmul(h_t, h_t, s_t, value=-1, out=v)  # Eq. 2: (1 - s) h ...
                    if v_reset != 0:
                        v.add_(s_t, alpha=v_reset)  # ... + s v_reset
                if recorded:  # f' = alpha / 2 / slope, summed over t
                    torch.sub(h_t.to(near.dtype), threshold, out=slope)
                    torch.addcmul(one, slope, slope, value=curvature, out=slope)
                    near_b.copy_(slope.reciprocal_()) if t == 0 else near_b.addcdiv_(ones, slope)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h)
        ctx.order, ctx.tau, ctx.v_threshold, ctx.alpha = order, tau, v_threshold, alpha
        ctx.repeated = len(x_seq) < time_steps
        ctx.shape = shape = [x_seq.shape[d] for d in order]
        ctx.inverse = inverse = [0] + [1 + order.index(d) for d in range(1, x_seq.dim())]
        if recorded:
            near = near.mul_(alpha / 2 / time_steps).unflatten(0, shape)[None].permute(inverse)[0]
            ctx.mark_non_differentiable(near)
        return s.unflatten(1, shape).permute(inverse), near

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_seq, _):
        if g_seq is None:
            return (None,) * 7
        (h,) = ctx.saved_tensors
        g = _as_rows(g_seq, ctx.order)
        a = torch.empty_like(h[:1] if ctx.repeated else h)
        threshold = h.new_full((), ctx.v_threshold)
        flat = h.new_full((), ctx.tau / (ctx.alpha / 2))
        curvature = (math.pi / 2 * ctx.alpha) ** 2 * ctx.tau / (ctx.alpha / 2)
        for block in _blocks(h):
            below, slope, carry, scratch = (torch.empty_like(h[0, block]) for _ in range(4))
            a_b = [scratch] * len(h) if ctx.repeated else a[:, block]
            a_next = None
            for h_t, g_t, a_t in reversed([*zip(h[:, block], g[:, block], a_b)]):
                torch.sub(threshold, h_t, out=below)  # > 0 exactly where there was no spike
                torch.addcmul(flat, below, below, value=curvature, out=slope)  # tau / f'
                if a_next is None:
                    torch.div(g_t, slope, out=a_t)
                else:  # carry = (1 - s_t) a_{t+1}
                    torch.ops.aten.threshold_backward.grad_input(a_next, below, 0, grad_input=carry)
                    torch.addcdiv(carry.mul_(1 - 1 / ctx.tau), g_t, slope, out=a_t)
                if ctx.repeated:
                    a[0, block] = a_t if a_next is None else a[0, block].add_(a_t)
                a_next = a_t
        return a.unflatten(1, ctx.shape).permute(ctx.inverse), *(None,) * 6


class _AnyLIF(torch.autograd.Function):
    """The neurons of other papers (see the top of this file); spikes and h, shaped like x_seq.

    rate: 1 / tau, a tensor with one number. soft, decay_input, strict: bool.
    """

    @staticmethod
    def forward(ctx, x_seq, rate, v_threshold, v_reset, alpha, shape, soft, decay_input, strict):
        order = sorted(range(1, x_seq.dim()), key=x_seq.stride, reverse=True)  # as it is in memory
        x, k = _as_rows(x_seq, order), rate.detach().to(x_seq.dtype)
        h = torch.empty_like(x, memory_format=torch.contiguous_format)
        s = torch.empty_like(h)
        fire, v = torch.gt if strict else torch.ge, torch.full_like(h[0], v_reset)
        for x_t, h_t, s_t in zip(x, h, s):
            current = (x_t - (v - v_reset)) * k if decay_input else x_t - (v - v_reset) * k
            torch.add(v, current, out=h_t)
            fire(h_t, v_threshold, out=s_t)
            v = h_t - s_t * v_threshold if soft else h_t + s_t * (v_reset - h_t)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, s, k)
        ctx.settings = v_threshold, v_reset, alpha, shape, soft, decay_input
        ctx.order, ctx.shape = order, [x_seq.shape[d] for d in order]
        ctx.inverse = [0] + [1 + order.index(d) for d in range(1, x_seq.dim())]
        spikes, h_seq = (rows.unflatten(1, ctx.shape).permute(ctx.inverse) for rows in (s, h))
        ctx.mark_non_differentiable(h_seq)
        return spikes, h_seq

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_seq, _):
        if g_seq is None:
            return (None,) * 9
        h, s, k = ctx.saved_tensors
        v_threshold, v_reset, alpha, shape, soft, decay_input = ctx.settings
        g, a = _as_rows(g_seq, ctx.order), torch.empty_like(h)
        to_v, to_rate = 0, torch.zeros((), dtype=torch.float32, device=h.device)
        for t in reversed(range(len(h))):
            to_h = g[t] * surrogate_grad(h[t] - v_threshold, alpha, shape)
            to_h = to_h + (to_v if soft else to_v * (1 - s[t]))
            a[t] = to_h * k if decay_input else to_h
            to_v = to_h * (1 - k)
            if ctx.needs_input_grad[1]:
                v = torch.full_like(h[0], v_reset) if t == 0 else (
                    h[t - 1] - s[t - 1] * v_threshold if soft
                    else h[t - 1] + s[t - 1] * (v_reset - h[t - 1]))
                to_rate += (to_h * ((h[t] - v) / k if decay_input else v_reset - v)).sum()
        return a.unflatten(1, ctx.shape).permute(ctx.inverse), to_rate.to(k.dtype), *[None] * 7


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons: input currents over time -> spikes over time (Eqs. 1-4).

    tau: membrane time constant in time steps, > 1. v_threshold, v_reset: potentials, the reset
    below the threshold. alpha: steepness of the surrogate, > 0. surrogate: "arctan" |
    "rectangular". reset: "hard" | "soft". decay_input: x / tau, and not x. strict: fires above the
    threshold only. learn_tau: tau is where a parameter of the layer starts (PLIF). Raises
    ValueError outside these ranges.
    INTERPRETATION: tau = 4/3 and alpha = 2 are elided in the paper; its set-up follows LTH-SNN,
    whose public code uses them, with a decayed input (x / tau) and a detached reset.

    Called with [T, N, ...] it returns spikes, 0 or 1, of the same shape, dtype and memory format.
    The potential starts at v_reset in every call: no state is kept, nothing is to be reset between
    batches. With [1, N, ...] and time_steps the input is the same at every step (direct coding): it
    is never copied over T.

    record: None, or "max" | "mean": then each call leaves the criticality of its batch in `score`,
    [C] in float64 (Eq. 6). The potentials are in the cache in the forward pass, so this is cheap.
    """

    def __init__(self, tau=4 / 3, v_threshold=1.0, v_reset=0.0, alpha=2.0, surrogate="arctan",
                 reset="hard", decay_input=True, strict=False, learn_tau=False):
        super().__init__()
        if not (math.isfinite(tau) and tau > 1):
            raise ValueError(f"tau is {tau}, expected a number above 1 (in time steps), "
                             f"such as 4/3")
        if not (math.isfinite(v_threshold) and math.isfinite(v_reset) and v_reset < v_threshold):
            raise ValueError(f"v_reset is {v_reset} and v_threshold {v_threshold}, expected finite "
                             f"numbers, the reset below the threshold, such as 0 and 1")
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha is {alpha}, expected a number above 0, such as 2")
        if surrogate not in SURROGATES or reset not in RESETS:
            raise ValueError(f"surrogate is {surrogate!r} and reset {reset!r}, expected one of "
                             f"{', '.join(SURROGATES)}, and of {', '.join(RESETS)}")
        self.tau, self.v_threshold, self.v_reset, self.alpha = tau, v_threshold, v_reset, alpha
        self.surrogate, self.other = surrogate, None  # other: what only _AnyLIF can do
        self.w = nn.Parameter(torch.tensor(-math.log(tau - 1))) if learn_tau else None
        if (surrogate, reset, decay_input, strict, learn_tau) != ("arctan", "hard", True, False,
                                                                  False):
            self.other = dict(soft=reset == "soft", decay_input=decay_input, strict=strict)
        self.record = None
        self.score = None

    def forward(self, x_seq, time_steps=None):
        if x_seq.dim() < 2 or time_steps not in (None, len(x_seq)) and len(x_seq) != 1:
            raise ValueError(f"LIF got shape {tuple(x_seq.shape)}, expected [T, N, ...], or "
                             f"[1, N, ...] with time_steps. Add time first: x.unsqueeze(0)")
        time_steps = time_steps or len(x_seq)
        if self.other is None:
            spikes, near = _LIF.apply(x_seq, time_steps, self.tau, self.v_threshold, self.v_reset,
                                      self.alpha, self.record is not None)
            if self.record is not None:
                self.score = _per_channel(near, self.record)
            return spikes
        rate = (self.w.sigmoid() if self.w is not None
                else torch.full((), 1 / self.tau, dtype=x_seq.dtype, device=x_seq.device))
        spikes, h_seq = _AnyLIF.apply(x_seq.expand(time_steps, *x_seq.shape[1:]), rate,
                                      self.v_threshold, self.v_reset, self.alpha, self.surrogate,
                                      *self.other.values())
        if self.record is not None:
            self.score = criticality(h_seq.detach(), self.v_threshold, self.alpha, self.record,
                                     self.surrogate)
        return spikes

    def limit(self, current):
        """Return the potential that a constant current tends to, from v_reset, and never passes."""
        if self.other is None or self.other["decay_input"]:
            return self.v_reset + current
        return self.v_reset + current * (self.tau if self.w is None else 1 / self.w.sigmoid())

    def extra_repr(self):
        others = "".join(f", {name}={value}" for name, value in (self.other or {}).items())
        return (f"tau={self.tau:.4g}, v_threshold={self.v_threshold}, v_reset={self.v_reset}, "
                f"alpha={self.alpha}{others}")
