"""The leaky integrate-and-fire (LIF) neuron, its surrogate, and its criticality.

Paper: "Brain-Inspired Efficient Pruning: Exploiting Criticality in Spiking Neural
Networks", arXiv 2311.16141, Eqs. 1-4 (the neuron) and 6 (the score).

For t = 1 ... T, from v_0 = v_reset:

    h_t = v_{t-1} + (x_t - (v_{t-1} - v_reset)) / tau      charge        Eq. 1
    s_t = 1 if h_t >= v_threshold else 0                   fire          Eq. 3
    v_t = (1 - s_t) * h_t + s_t * v_reset                  hard reset    Eq. 2

The derivative of Eq. 3 is 0 or infinite. The backward pass takes that of a smooth
function instead, the surrogate f (Eq. 4):  ds_t/dh_t = f'(h_t - v_threshold).
The reset is detached: no gradient flows through the s_t of Eq. 2.

    from neurons import LIF
    lif = LIF()                                     # tau 4/3, threshold 1, arctan
    spikes = lif(torch.rand(5, 8, 64, 32, 32))      # [T, N, C, H, W] -> 0 or 1

This file is the reference: LIF.forward is a loop over T that autograd differentiates.
Change the loop or a surrogate here, and the scripts train with the change. kernels.py
computes the same neuron faster. It is used only where it gives the same results.
"""
import math

import torch
from torch import nn

# ---- surrogates ----------------------------------------------------------------------
# Each is a function of u = h - v_threshold, followed by its derivative. alpha is the
# steepness. To add a surrogate, write such a pair and its row in SURROGATES.


def arctan(u, alpha=2.0):
    """Return a smooth step with values in (0, 1); f(0) = 1/2."""
    return torch.arctan(math.pi / 2 * alpha * u) / math.pi + 0.5  # Eq. 4a


def arctan_grad(u, alpha=2.0):
    """Return f'(u). Its peak, at u = 0, is alpha / 2."""
    return (alpha / 2) / (1 + (math.pi / 2 * alpha * u) ** 2)  # Eq. 4b


def rectangular(u, alpha=2.0):
    """Return a ramp from 0 to 1 over |u| < 1 / alpha."""
    return (alpha / 2 * u + 0.5).clamp(0, 1)


def rectangular_grad(u, alpha=2.0):
    """Return f'(u): alpha / 2 for |u| < 1 / alpha, else 0."""
    return (u.abs() < 1 / alpha).to(u.dtype) * (alpha / 2)


def tanh(u, alpha=2.0):
    """Return a scaled tanh that goes from 0 to 1 over |u| <= 1/2.

    published code: at alpha = 2 and v_threshold = 1/2 it is
    (tanh 3(h - 1/2) + tanh 1.5) / (2 tanh 1.5). Training clamps h to [0, 1], so that
    the derivative is 0 beyond |u| = 1/2; the score by value does not.
    """
    k = 1.5 * alpha
    return torch.tanh(k * u) / (2 * math.tanh(k / 2)) + 0.5


def tanh_grad(u, alpha=2.0):
    """Return f'(u): k / (2 tanh(k/2) cosh^2(k u)) for |u| <= 1/2, else 0;
    k = 1.5 alpha."""
    k = 1.5 * alpha
    peak = k / (2 * math.tanh(k / 2))
    inside = (u.abs() <= 0.5).to(u.dtype)
    return inside * peak / torch.cosh(k * u.clamp(-0.5, 0.5)) ** 2


SURROGATES = {  # name: (function, derivative)
    "arctan": (arctan, arctan_grad),
    "rectangular": (rectangular, rectangular_grad),
    "tanh": (tanh, tanh_grad),
}
RESETS = ("hard", "soft")


def surrogate(u, alpha=2.0, name="arctan"):
    """Return f(u), the surrogate of the step, at u = h - v_threshold (Eq. 4).

    Training needs only its derivative. The function itself is for plots, tests, and the
    score by value (see criticality).
    """
    return SURROGATES[name][0](u, alpha)


def surrogate_grad(u, alpha=2.0, name="arctan"):
    """Return f'(u), which training uses as the derivative of a spike (Eq. 4)."""
    return SURROGATES[name][1](u, alpha)


class Spike(torch.autograd.Function):
    """A step function whose derivative is the surrogate's."""

    @staticmethod
    def forward(ctx, u, alpha, name, strict):
        ctx.save_for_backward(u)
        ctx.alpha, ctx.name = alpha, name
        return (u > 0 if strict else u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, g):
        (u,) = ctx.saved_tensors
        return g * surrogate_grad(u, ctx.alpha, ctx.name), None, None, None


# ---- the neuron ----------------------------------------------------------------------


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons: currents over time -> spikes over time.

    Called with x_seq [T, N, ...], it returns spikes, 0 or 1, of the same shape, dtype
    and memory format. With [1, N, ...] and time_steps the input is the same at each
    step (direct coding), and the spikes are [T, N, ...]. The potential starts at
    v_reset in each call: no state is kept between batches.

    tau: membrane time constant in time steps, > 1.
    v_threshold, v_reset: potentials; the reset is below the threshold.
    alpha: steepness of the surrogate, > 0. surrogate: a name in SURROGATES.
    reset: "hard", to v_reset, or "soft", v_t = h_t - s_t * v_threshold.
    detach_reset: no gradient flows through the s_t of the reset.
    decay_input: the input is divided by tau as well. If False,
    h_t = v_{t-1} + x_t - (v_{t-1} - v_reset) / tau.
    strict: fire at h_t > v_threshold, not at h_t >= v_threshold.
    learn_tau: 1 / tau = sigmoid(w), with one parameter w that starts at the given tau
    (PLIF, Fang et al. 2021, arXiv 2007.05785).
    Raises ValueError outside these ranges.

    INTERPRETATION: the paper leaves out tau and alpha. Its set-up follows LTH-SNN
    (arXiv 2207.01382), whose public code has tau = 4/3, alpha = 2, a decayed input and
    a detached reset. Confirmed by the published code for channels, but for the reset.
    published code, for weights: decay_input=False, v_threshold=0.5, strict=True,
    surrogate="tanh", detach_reset=False.
    """

    def __init__(self, tau=4 / 3, v_threshold=1.0, v_reset=0.0, alpha=2.0,
                 surrogate="arctan", reset="hard", detach_reset=True, decay_input=True,
                 strict=False, learn_tau=False):
        super().__init__()
        if not (math.isfinite(tau) and tau > 1):
            raise ValueError(f"tau is {tau}, expected a number above 1 (in time "
                             f"steps), such as 4/3")
        if not (math.isfinite(v_threshold) and math.isfinite(v_reset)
                and v_reset < v_threshold):
            raise ValueError(f"v_reset is {v_reset} and v_threshold {v_threshold}, "
                             f"expected finite numbers, the reset below the threshold, "
                             f"such as 0 and 1")
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha is {alpha}, expected a number above 0, such as 2")
        if surrogate not in SURROGATES or reset not in RESETS:
            raise ValueError(f"surrogate is {surrogate!r} and reset {reset!r}, "
                             f"expected one of {', '.join(SURROGATES)}, and of "
                             f"{', '.join(RESETS)}")
        self.tau, self.v_threshold, self.v_reset = tau, v_threshold, v_reset
        self.alpha, self.surrogate, self.reset = alpha, surrogate, reset
        self.detach_reset, self.decay_input = detach_reset, decay_input
        self.strict, self.learn_tau = strict, learn_tau
        self.w = nn.Parameter(torch.tensor(-math.log(tau - 1))) if learn_tau else None
        self._aggregate = self._by = self._score = None  # see start_recording

    def forward(self, x_seq, time_steps=None):
        x_seq = self.over_time(x_seq, time_steps)
        # tau is a tensor: on a GPU, x / number is x * (1 / number), which rounds
        # differently
        if self.learn_tau:
            tau = 1 / self.w.sigmoid()
        else:
            tau = x_seq.new_full((), self.tau)
        v_threshold = x_seq.new_full((), self.v_threshold)
        v = torch.full_like(x_seq[0], self.v_reset)
        h_seq, s_seq = [], []
        for x in x_seq:
            leak = v - self.v_reset
            if self.decay_input:
                h = v + (x - leak) / tau  # Eq. 1: charge
            else:
                h = v + (x - leak / tau)
            s = Spike.apply(h - v_threshold, self.alpha, self.surrogate,
                            self.strict)  # Eq. 3: fire
            fired = s.detach() if self.detach_reset else s
            if self.reset == "hard":
                v = (1 - fired) * h + fired * self.v_reset  # Eq. 2: reset
            else:
                v = h - fired * v_threshold
            h_seq.append(h)
            s_seq.append(s)
        if self._aggregate is not None and self._by not in POTENTIALS:
            self._score = criticality(torch.stack(h_seq).detach(), self.v_threshold,
                                      self.alpha, self._aggregate, self.surrogate,
                                      self._by)
        elif self._aggregate is not None:
            self._score = activity(self, torch.stack(h_seq).detach(),
                                   torch.stack(s_seq).detach(), self._aggregate,
                                   self._by)
        # in the memory format of x_seq
        return torch.empty_like(x_seq).copy_(torch.stack(s_seq))

    def over_time(self, x_seq, time_steps=None):
        """Return x_seq with all its steps, [T, N, ...]. Raise ValueError for a wrong
        shape."""
        fits = time_steps in (None, len(x_seq)) or len(x_seq) == 1
        if x_seq.dim() < 2 or not fits:
            raise ValueError(f"LIF got shape {tuple(x_seq.shape)}, expected "
                             f"[T, N, ...], or [1, N, ...] with time_steps. Add time "
                             f"first: x.unsqueeze(0)")
        return x_seq.expand(time_steps or len(x_seq), *x_seq.shape[1:])

    def start_recording(self, aggregate, by="derivative"):
        """Let each call compute the criticality too. aggregate, by: as in
        criticality(). by "post" or "pre": activity() instead."""
        self._aggregate, self._by, self._score = aggregate, by, None

    def stop_recording(self):
        """End the recording. Return the criticality of the last call, [C] float64 (on
        mps float32), or what activity() returns; None without a call."""
        score, self._aggregate, self._score = self._score, None, None
        return score

    def limit(self, current):
        """Return the limit of the potential under a constant current, without spikes.
        The potential approaches it and never passes it."""
        if self.decay_input:
            return self.v_reset + current
        tau = 1 / self.w.sigmoid() if self.learn_tau else self.tau
        return self.v_reset + current * tau

    def extra_repr(self):
        reset = f"{self.reset} reset"
        if self.detach_reset:
            reset += ", detached"
        return (f"tau={self.tau:.4g}, v_threshold={self.v_threshold}, "
                f"v_reset={self.v_reset}, alpha={self.alpha}, {self.surrogate}, "
                f"{reset}, decay_input={self.decay_input}, strict={self.strict}, "
                f"learn_tau={self.learn_tau}")


# ---- the score -----------------------------------------------------------------------


def widest(device):
    """Return the type of scores and sums on a device: float64, but float32 on Apple's
    GPU (mps), which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def criticality(h_seq, v_threshold=1.0, alpha=2.0, aggregate="max", name="arctan",
                by="derivative"):
    """Return the criticality of each channel, [C] float64 (on mps float32): how near to
    the threshold its neurons are (Eq. 6).

    h_seq: [T, N, C, ...], the potential after the charge and before the reset;
    [T, N, C] for a linear layer. aggregate: over the dimensions after C, "max" (the
    paper's choice) or "mean". name: of the surrogate. With arctan the values are in
    (0, alpha / 2]; a rectangular one counts only how often a neuron is near.
    by: "derivative", f' as in Eq. 6, which peaks at the threshold. published code:
    "value", f itself, which grows with the potential.

    INTERPRETATION: mean over T, then max over H x W, then mean over the samples. The
    paper says that the aggregation acts on the structure, and the average on the
    samples. Confirmed by the published code.
    """
    if aggregate not in ("max", "mean"):
        raise ValueError(f'aggregate is {aggregate!r}, expected "max" or "mean"')
    if by not in ("derivative", "value"):
        raise ValueError(f'by is {by!r}, expected "derivative" or "value"')
    if h_seq.dim() < 3:
        raise ValueError(f"criticality got shape {tuple(h_seq.shape)}, expected "
                         f"[T, N, C, ...]")
    dtype = torch.promote_types(h_seq.dtype, torch.float32)
    score = surrogate_grad if by == "derivative" else surrogate
    per_neuron = sum(score(h.to(dtype) - v_threshold, alpha, name)
                     for h in h_seq) / len(h_seq)  # Eq. 6: the mean of f' over T
    return per_channel(per_neuron, aggregate)


POTENTIALS = ("post", "pre")  # what activity() is taken of


def activity(lif, h_seq, s_seq, aggregate="mean", by="post"):
    """Return the activity and the firing rate of each channel, [2, C] float64 (on mps
    float32), means over T and the samples. The activity says how far from rest the
    potentials of its neurons are.

    lif: the neurons. h_seq: [T, N, C, ...], the potential before the reset. s_seq:
    their spikes, of the same shape. aggregate: as in criticality.
    by: "pre", |h|; "post", s * v_threshold + |v|, v the potential after the reset. They
    differ where a neuron fires: |v| alone would be 0 where it fires at each step.
    """
    if by not in POTENTIALS:
        raise ValueError(f'by is {by!r}, expected "post" or "pre"')
    dtype = torch.promote_types(h_seq.dtype, torch.float32)
    total, spikes = 0, 0
    for h, s in zip(h_seq.to(dtype), s_seq.to(dtype)):
        v = h - s * lif.v_threshold
        if lif.reset == "hard":
            v = (1 - s) * h + s * lif.v_reset
        total = total + (h.abs() if by == "pre" else s * lif.v_threshold + v.abs())
        spikes = spikes + s
    return torch.stack([per_channel(total / len(h_seq), aggregate),
                        per_channel(spikes / len(h_seq), aggregate)])


def per_channel(per_neuron, aggregate):
    """Return the score of each channel, [C] float64 (on mps float32).

    per_neuron: the score of each neuron, [N, C, ...], a mean over T. aggregate: as in
    criticality.
    """
    if per_neuron.dim() == 2:
        per_sample = per_neuron
    elif aggregate == "max":
        per_sample = per_neuron.amax(2)
        while per_sample.dim() > 2:  # one dimension at a time: faster on few channels
            per_sample = per_sample.amax(2)
    else:
        per_sample = per_neuron.flatten(2).mean(2)
    return per_sample.mean(0, dtype=widest(per_sample.device))
