"""The LIF of neurons.py, fast: the same spikes, bit by bit, and the same gradient.

    from kernels import FastLIF
    spikes = FastLIF()(x_seq)    # [T, N, ...] -> 0 or 1, as neurons.LIF

There are two fast paths in torch, each for one neuron, and on a GPU the Triton kernels
of kernels_triton.py, for all neurons with a hard reset and a fixed tau. FastLIF takes
one of them if its settings are those, and if it agrees with neurons.LIF on small
inputs: in the spikes, the gradient and the score. Otherwise FastLIF runs the plain loop
of neurons.py. So a change in neurons.py takes effect.

On a GPU Triton is taken first, for inputs in float32 or less and up to 64 steps. It is
compared twice: its formulas in float64, when a neuron is made; and what a GPU computes,
at the first input there that is not in a compiled graph.

ArctanLIF, the neuron of the paper's text: arctan surrogate, detached hard reset,
decayed input, a spike where the potential reaches the threshold, a fixed tau. Its
backward pass, with g_t = dL/ds_t and the reset detached, for t = T ... 1:

    dL/dh_t     = g_t * f'(h_t - v_threshold) + dL/dv_t * (1 - s_t)
    dL/dx_t     = dL/dh_t / tau
    dL/dv_{t-1} = dL/dh_t * (1 - 1 / tau)

In terms of a_t = dL/dx_t this is one recursion, which the code runs:

    a_t = g_t * f'(h_t - v_threshold) / tau + (1 - 1 / tau) * (1 - s_t) * a_{t+1}

with a_{T+1} = 0. It needs h alone, since s_t = 1 exactly where h_t >= v_threshold: one
tensor a time step is kept. Autograd over the plain loop keeps several.

TanhLIF, the neuron of the published code: tanh surrogate, a hard reset that passes the
gradient, an input that is not decayed, a spike above the threshold. There

    a_t = slope_t * (g_t - c_t * h_t) + c_t * (1 - s_t)
    slope_t = f'(h_t - v_threshold),  c_t = (1 - 1 / tau) * a_{t+1}
"""
import functools
import inspect
import math
import os
import warnings

import torch

import neurons
from neurons import LIF, Spike

# On a CPU the neurons run in blocks, each over all T steps, so that the potential stays
# in the cache from one step to the next. 2**20 float32 numbers are 4 MiB. Smaller
# blocks are no faster. On a busy machine they are slower, since the threads wait for
# each other at each operation
CPU_BLOCK = 2**20


class FastLIF(LIF):
    """neurons.LIF, computed by a fast path if that gives the same. Its settings are
    fixed when it is made."""

    def __init__(self, **settings):
        super().__init__(**settings)
        # the functions as they are now: a user may have replaced one
        functions = [item for item in vars(neurons).values()
                     if inspect.isfunction(item)]
        methods = [LIF.forward, LIF.over_time, Spike.forward, Spike.backward]
        self.settings = tuple(settings.items())
        key = (self.settings, *functions, *methods, *neurons.SURROGATES[self.surrogate])
        self.path = path_of(*key)
        # torch.compile cannot read an attribute of the class in forward()
        self.records = () if self.path is None else self.path.RECORDS
        self.triton_devices = triton_devices(*key)

    @property
    def is_fast(self):
        """Whether a fast path in torch is used, but for what it does not record."""
        return self.path is not None

    def forward(self, x_seq, time_steps=None):
        if torch.compiler.is_exporting():  # it takes operations of torch alone
            return super().forward(x_seq, time_steps)
        record = None if self._aggregate is None else self._by
        T = len(self.over_time(x_seq, time_steps))  # checks the shape
        if self.runs_triton(x_seq, T):
            import kernels_triton  # here: it needs Triton
            spikes, near = kernels_triton.run(self, x_seq, T, record)
        elif self.path is not None and record in (None, *self.records):
            spikes, near = run(self.path, self, x_seq, T, record)
        else:
            return super().forward(x_seq, time_steps)
        if record is not None:
            self._score = neurons.per_channel(near, self._aggregate)
        return spikes

    def runs_triton(self, x_seq, time_steps):
        """Return whether kernels_triton.py computes an input over time_steps steps."""
        if x_seq.device.type not in self.triton_devices:
            return False
        import kernels_triton
        is_recorded = self._aggregate is not None
        if is_recorded and self._by not in kernels_triton.RECORDS[self.surrogate]:
            return False
        return kernels_triton.fits(x_seq, time_steps) and (
            torch.compiler.is_compiling()  # no trial there: torch.compile needs Triton
            or works_on(x_seq.device, x_seq.dtype, self.settings))


# ---- which path ----------------------------------------------------------------------


@functools.cache
def path_of(settings, *functions):
    """Return the fast path in torch that gives the same as neurons.LIF with these
    settings, ArctanLIF or TanhLIF, else None.

    settings: pairs (argument, value). functions: those of neurons.py. They are part of
    the cache's key: with another function the comparison is made again.
    """
    lif = LIF(**dict(settings))
    for path in (ArctanLIF, TanhLIF):
        if path.computes(lif):
            fast = functools.partial(run, path, lif)
            return path if agrees(fast, lif, path.RECORDS) else None
    return None


def run(path, lif, x_seq, time_steps, record):
    """Run a neurons.LIF by ArctanLIF or TanhLIF. record: None, or the score."""
    return path.apply(x_seq, time_steps, lif.tau, lif.v_threshold, lif.v_reset,
                      lif.alpha, record is not None)


@functools.cache
def triton_devices(settings, *functions):
    """Return the kinds of devices on which kernels_triton.py computes neurons.LIF with
    these settings: ("cuda",), or () without a GPU, without Triton, or if its formulas
    do not give the same. Arguments are those of path_of.

    With TRITON_INTERPRET=1 a CPU runs the kernels, slowly, for tests: ("cpu",).
    """
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (is_interpreted or torch.cuda.is_available()):
        return ()
    try:
        import kernels_triton
    except Exception:  # Triton is not installed, or too old
        return ()
    lif = LIF(**dict(settings))
    formulas = functools.partial(kernels_triton.run_formulas, lif)
    if not (kernels_triton.computes(lif)
            and agrees(formulas, lif, kernels_triton.RECORDS[lif.surrogate])):
        return ()
    return ("cpu",) if is_interpreted else ("cuda",)


@functools.cache
def works_on(device, dtype, settings):
    """Return whether the kernels of kernels_triton.py run on a GPU, and give the same
    as neurons.LIF there. Warn where they do not: Triton needs a C compiler, and not too
    old a GPU."""
    import kernels_triton
    lif = LIF(**dict(settings))
    fast = functools.partial(kernels_triton.run, lif)
    records = kernels_triton.RECORDS[lif.surrogate]
    try:
        if agrees(fast, lif, records, dtype, device):
            return True
        reason = "its results differ"
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # no fault of Triton's
        raise
    except Exception as error:  # of Triton, of the C compiler, of the driver
        reason = (str(error).splitlines() or [type(error).__name__])[-1]
    warnings.warn(f"the neurons run without Triton on {device}, which is slower: "
                  f"{reason}", stacklevel=2)
    return False


# relative and absolute: how far gradients and scores of one neuron may differ. Those in
# half precision are rounded to it
TOLERANCES = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-4, 1e-6),
              torch.bfloat16: (2**-6, 1e-6), torch.float16: (2**-9, 1e-6)}


def agrees(fast, lif, records, dtype=torch.float64, device="cpu"):
    """Return whether a function gives the same as a neurons.LIF on small inputs: the
    spikes, the gradient and the scores.

    fast: (x_seq, time_steps, record) -> spikes, and the score of each neuron or None.
    records: the scores that it records. In half precision it is compared with the
    neurons.LIF of the same input in float32.
    """
    def plain(x_seq, time_steps, record):
        lif.start_recording("max", record or "derivative")
        spikes = lif(x_seq, time_steps)
        return spikes, lif.stop_recording()

    def spikes_gradient_score(forward, x, record):
        leaf = x.clone().requires_grad_()
        spikes, score = forward(leaf, 4, record)
        weights = torch.cos(torch.arange(spikes.numel())).to(dtype).to(x.dtype)
        (spikes * weights.view(spikes.shape)).sum().backward()
        return spikes.detach(), leaf.grad, score

    full = torch.promote_types(dtype, torch.float32)
    relative, absolute = TOLERANCES[dtype]
    # a network may be built inside other contexts, such as torch.device("meta")
    with (torch.device(device), torch.inference_mode(False), torch.enable_grad(),
          torch.autocast(torch.device(device).type, enabled=False)):
        x = probe(lif, dtype)
        for batch in (x, x[:1]):  # four steps, and one that is repeated
            for record in records or (None,):
                spikes, gradient, near = spikes_gradient_score(fast, batch, record)
                try:
                    expected = spikes_gradient_score(plain, batch.to(full), record)
                except (torch.OutOfMemoryError, torch.AcceleratorError):
                    raise
                except Exception:  # changed so that it takes other shapes, say
                    return False
                found = [spikes.to(full), gradient.to(full)]
                if near is not None:
                    found.append(neurons.per_channel(near, "max"))
                if not all(torch.allclose(one, other, rtol=relative, atol=absolute)
                           for one, other in zip(found, expected)):
                    return False
    return True


def probe(lif, dtype):
    """Return currents for the comparison, [4, 2, 3, 5]: from far below the threshold of
    a neurons.LIF to far above, and some on it."""
    span = lif.v_threshold - lif.v_reset
    x = torch.linspace(-span, 4 * span, 120, dtype=torch.float64)
    x = x[torch.arange(120) * 37 % 120]  # in a mixed order
    x[-16:] *= torch.logspace(0, 4, 16, dtype=torch.float64)  # some are far away
    x[:9] = span * lif.tau * (1 + torch.arange(-4, 5) * 2**-52)  # some on the edge
    x = x.clamp(max=torch.finfo(dtype).max)
    return x.to(dtype).view(4, 2, 3, 5)


# ---- what the paths in torch share ---------------------------------------------------


def _as_rows(seq, order):
    """Return [T, N, ...] as [T, numbers in a step]. order: of the dimensions after T.

    It is a view, and not a copy, if a step is dense in memory in that order:
    contiguous, channels_last, or one step expanded over T.
    """
    return seq.permute(0, *order).flatten(1)


def _blocks(rows):
    """Return slices over the numbers of a step: on a CPU several that fit its cache."""
    n = rows.shape[1]
    if n == 0:
        return []
    is_blocked = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    size = CPU_BLOCK if is_blocked else n
    return [slice(start, start + size) for start in range(0, n, size)]


def _keep(ctx, x_seq, h, order, time_steps):
    """Keep for the backward pass the potentials h, and how the rows of a step become
    the shape of the input again. order: as in _as_rows."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h)
    ctx.order, ctx.repeated = order, len(x_seq) < time_steps
    ctx.shape = [x_seq.shape[d] for d in order]
    ctx.inverse = [0] + [1 + order.index(d) for d in range(1, x_seq.dim())]


class ArctanLIF(torch.autograd.Function):
    """Run the neuron of the paper's text over time_steps steps.

    x_seq: [T, N, ...], or [1, N, ...] for the same input at each step. The gradient of
    the latter is summed over the steps here, so that no tensor of all steps is made.
    Returns the spikes [T, N, ...] and, if `recorded`, the mean of f'(h_t - v_threshold)
    over t for each neuron, [N, ...], else None.
    """

    RECORDS = ("derivative",)  # the scores that this path records

    @staticmethod
    def computes(lif):
        """Return whether the settings of a neurons.LIF are those of this neuron."""
        return (lif.surrogate == "arctan" and lif.reset == "hard" and lif.detach_reset
                and lif.decay_input and not lif.strict and not lif.learn_tau)

    @staticmethod
    def forward(ctx, x_seq, time_steps, tau, v_threshold, v_reset, alpha, recorded):
        # the dimensions in their order in memory
        order = sorted(range(1, x_seq.dim()), key=x_seq.stride, reverse=True)
        x = _as_rows(x_seq, order).expand(time_steps, -1)
        s = torch.empty_like(x, memory_format=torch.contiguous_format)
        h = torch.empty_like(s) if ctx.needs_input_grad[0] else None  # for the backward
        threshold = s.new_full((), v_threshold)
        # in half precision addcdiv would round once where the plain loop rounds twice
        is_full_precision = s.dtype in (torch.float32, torch.float64)
        near = None
        if recorded:
            near = torch.empty_like(
                s[0], dtype=torch.promote_types(s.dtype, torch.float32))
            one, curvature = near.new_ones(()), (math.pi / 2 * alpha) ** 2
        for block in _blocks(x):
            x_b, s_b = x[:, block], s[:, block]
            v, taus = torch.empty_like(s_b[0]), torch.full_like(s_b[0], tau)
            h_b = h[:, block] if h is not None else [torch.empty_like(v)] * time_steps
            if recorded:
                near_b, slope = near[block], torch.empty_like(near[block])
                ones = torch.ones_like(slope)
            for t, (x_t, h_t, s_t) in enumerate(zip(x_b, h_b, s_b)):
                # charge. By a division: a product with 1 / tau rounds differently
                if t == 0:
                    torch.div(x_t, taus, out=h_t)
                    if v_reset != 0:
                        h_t.add_(v_reset)
                else:
                    torch.sub(x_t, v - v_reset if v_reset != 0 else v, out=h_t)
                    if is_full_precision:
                        torch.addcdiv(v, h_t, taus, out=h_t)
                    else:
                        torch.add(v, h_t.div_(taus), out=h_t)
                torch.ge(h_t, threshold, out=s_t)  # fire
                if t + 1 < time_steps:
                    torch.addcmul(h_t, h_t, s_t, value=-1, out=v)  # reset: (1 - s) h
                    if v_reset != 0:
                        v.add_(s_t, alpha=v_reset)  # + s v_reset
                if recorded:  # f' = alpha / 2 / slope, summed over t
                    torch.sub(h_t.to(near.dtype), threshold, out=slope)
                    torch.addcmul(one, slope, slope, value=curvature, out=slope)
                    if t == 0:
                        near_b.copy_(slope.reciprocal_())
                    else:
                        near_b.addcdiv_(ones, slope)
        _keep(ctx, x_seq, h, order, time_steps)
        ctx.tau, ctx.v_threshold, ctx.alpha = tau, v_threshold, alpha
        if recorded:
            near = near.mul_(alpha / 2 / time_steps).unflatten(0, ctx.shape)
            near = near[None].permute(ctx.inverse)[0]
            ctx.mark_non_differentiable(near)
        return s.unflatten(1, ctx.shape).permute(ctx.inverse), near

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
            below, slope, carry, scratch = (torch.empty_like(h[0, block])
                                            for _ in range(4))
            a_b = [scratch] * len(h) if ctx.repeated else a[:, block]
            a_next = None
            for h_t, g_t, a_t in reversed([*zip(h[:, block], g[:, block], a_b)]):
                torch.sub(threshold, h_t, out=below)  # > 0 where there was no spike
                # slope = tau / f'
                torch.addcmul(flat, below, below, value=curvature, out=slope)
                if a_next is None:
                    torch.div(g_t, slope, out=a_t)
                else:  # carry = (1 - s_t) a_{t+1}
                    torch.ops.aten.threshold_backward.grad_input(
                        a_next, below, 0, grad_input=carry)
                    torch.addcdiv(carry.mul_(1 - 1 / ctx.tau), g_t, slope, out=a_t)
                if ctx.repeated:
                    a[0, block] = a_t if a_next is None else a[0, block].add_(a_t)
                a_next = a_t
        return a.unflatten(1, ctx.shape).permute(ctx.inverse), *(None,) * 6


class TanhLIF(torch.autograd.Function):
    """Run the neuron of the published code over time_steps steps.

    Arguments are those of ArctanLIF. It records no score: the plain loop does.
    """

    RECORDS = ()

    @staticmethod
    def computes(lif):
        """Return whether the settings of a neurons.LIF are those of this neuron."""
        return (lif.surrogate == "tanh" and lif.reset == "hard"
                and not lif.detach_reset and not lif.decay_input and lif.strict
                and not lif.learn_tau and lif.v_reset == 0)

    @staticmethod
    def forward(ctx, x_seq, time_steps, tau, v_threshold, v_reset, alpha, recorded):
        order = sorted(range(1, x_seq.dim()), key=x_seq.stride, reverse=True)
        x = _as_rows(x_seq, order).expand(time_steps, -1)
        s = torch.empty_like(x, memory_format=torch.contiguous_format)
        h = torch.empty_like(s) if ctx.needs_input_grad[0] else None  # for the backward
        threshold = s.new_full((), v_threshold)
        for block in _blocks(x):
            x_b, s_b = x[:, block], s[:, block]
            v, taus = torch.empty_like(s_b[0]), torch.full_like(s_b[0], tau)
            h_b = h[:, block] if h is not None else [torch.empty_like(v)] * time_steps
            for t, (x_t, h_t, s_t) in enumerate(zip(x_b, h_b, s_b)):
                # charge, in the order of the plain loop: v + (x - v / tau)
                if t == 0:
                    h_t.copy_(x_t)
                else:
                    torch.div(v, taus, out=h_t)
                    torch.sub(x_t, h_t, out=h_t).add_(v)
                torch.gt(h_t, threshold, out=s_t)  # fire
                if t + 1 < time_steps:
                    torch.addcmul(h_t, h_t, s_t, value=-1, out=v)  # reset: (1 - s) h
        _keep(ctx, x_seq, h, order, time_steps)
        ctx.tau, ctx.v_threshold, ctx.alpha = tau, v_threshold, alpha
        return s.unflatten(1, ctx.shape).permute(ctx.inverse), None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_seq, _):
        if g_seq is None:
            return (None,) * 7
        (h,) = ctx.saved_tensors
        g = _as_rows(g_seq, ctx.order)
        a = torch.empty_like(h[:1] if ctx.repeated else h)
        threshold = h.new_full((), ctx.v_threshold)
        k = 1.5 * ctx.alpha
        peak = k / (2 * math.tanh(k / 2))
        for block in _blocks(h):
            u, slope, inside, carry, scratch = (torch.empty_like(h[0, block])
                                                for _ in range(5))
            a_b = [scratch] * len(h) if ctx.repeated else a[:, block]
            a_next = None
            for h_t, g_t, a_t in reversed([*zip(h[:, block], g[:, block], a_b)]):
                torch.sub(h_t, threshold, out=u)
                # f' = peak / cosh^2(k u) = 4 peak y (1 - y), y the sigmoid of 2 k u;
                # 0 beyond |u| = 1/2
                torch.sigmoid(torch.mul(u, 2 * k, out=slope), out=slope)
                torch.addcmul(slope, slope, slope, value=-1, out=slope).mul_(4 * peak)
                slope.mul_(torch.le(torch.abs(u, out=inside), 0.5, out=inside))
                if a_next is None:
                    torch.mul(g_t, slope, out=a_t)
                else:
                    torch.mul(a_next, 1 - 1 / ctx.tau, out=carry)
                    torch.addcmul(g_t, carry, h_t, value=-1, out=a_t).mul_(slope)
                    a_t.add_(carry.mul_(torch.le(u, 0, out=slope)))  # (1 - s) carry
                if ctx.repeated:
                    a[0, block] = a_t if a_next is None else a[0, block].add_(a_t)
                a_next = a_t
        return a.unflatten(1, ctx.shape).permute(ctx.inverse), *(None,) * 6
