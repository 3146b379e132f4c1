"""The LIF of neurons.py on a GPU: one Triton kernel forward, and one backward.

    spikes, near = run(lif, x_seq, time_steps, record)    # lif: the settings

kernels.FastLIF calls this where it gives the same as neurons.py. The file stands beside
kernels.py since it imports Triton, which not every machine has or needs.

Torch launches each operation of a step by itself, and each reads and writes the memory
of the GPU. Here one program takes BLOCK neurons through all T steps, and their
potential stays in registers. The memory holds the input and the spikes; for a score
also its mean over T. The backward pass computes the potentials once more, with the same
roundings, so that nothing but the input is kept for it.

All arithmetic is float32, also where the input is bfloat16 or float16. There neurons.py
rounds the potential of each step to the type of the input; here it is not rounded.

The neurons are those with a hard reset, a fixed tau, and the surrogate arctan, tanh or
rectangular. Their input is decayed or not, their reset detached or not, and they are
strict or not. FormulaLIF has the formulas in plain torch. From v_0 = v_reset:

    h_t = v_{t-1} + (x_t - (v_{t-1} - v_reset)) / tau     or, not decayed,
    h_t = v_{t-1} + (x_t - (v_{t-1} - v_reset) / tau)
    s_t = 1 if h_t >= v_threshold else 0                  or, strict, h_t > v_threshold
    v_t = v_reset where s_t, else h_t

The gradient a_t = dL/dx_t follows from g_t = dL/ds_t and f'_t = f'(h_t - v_threshold),
with c_t = (1 - 1 / tau) a_{t+1} and a_{T+1} = 0. IN is 1 / tau for a decayed input,
else 1:

    a_t = IN * g_t * f'_t + (1 - s_t) * c_t                 or, not detached,
    a_t = IN * g_t * f'_t + (1 - s_t) * c_t + (v_reset - h_t) * c_t * f'_t
"""
import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

MOST_STEPS = 64  # T is unrolled, and the h of all steps lie in registers
TYPES = (torch.float32, torch.bfloat16, torch.float16)
RECORDS = {  # {surrogate: the scores that are recorded}
    "arctan": ("derivative",),
    "rectangular": ("derivative",),
    "tanh": ("derivative", "value")}
# TRITON_INTERPRET=1, for tests on a CPU: there an fma rounds twice
DIVIDES = tl.constexpr(triton.knobs.runtime.interpret)


# ---- what both kernels do ------------------------------------------------------------


@triton.jit
def over_tau(x, inverse, TAU: tl.constexpr):
    """Return x / tau, rounded as a division: x * (1 / tau) would flip spikes.

    inverse: 1 / tau, rounded. The remainder of a first quotient corrects it to the
    nearest number (Markstein 1990). These are three operations, where a division has
    eleven and a branch. The result is exact for a finite x of at least 2**-124, and for
    every tau but those just below a power of two, such as 2 - 2**-23: there one x of
    2**23 is off by its last bit. An infinite x gives NaN.
    """
    if DIVIDES:
        return tl.div_rn(x, TAU)
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, TAU, x), inverse, quotient)


@triton.jit
def charge(x, v, inverse, TAU: tl.constexpr, V_RESET: tl.constexpr,
           DECAY_INPUT: tl.constexpr):
    """Return h_t, in the order of the operations in neurons.py (Eq. 1)."""
    leak = v - V_RESET
    if DECAY_INPUT:
        return v + over_tau(x.to(tl.float32) - leak, inverse, TAU)
    return v + (x.to(tl.float32) - over_tau(leak, inverse, TAU))


@triton.jit
def fires(h, V_THRESHOLD: tl.constexpr, STRICT: tl.constexpr):
    """Return where h_t fires (Eq. 3)."""
    return h > V_THRESHOLD if STRICT else h >= V_THRESHOLD


@triton.jit
def derivative(u, SURROGATE: tl.constexpr, PEAK: tl.constexpr, SCALE: tl.constexpr):
    """Return f'(u) (Eq. 4). PEAK, SCALE: see shape()."""
    if SURROGATE == "arctan":
        return PEAK / (1 + (SCALE * u) * (SCALE * u))
    elif SURROGATE == "rectangular":
        return tl.where(tl.abs(u) < SCALE, PEAK, 0.0)
    else:  # 1 / cosh^2(k u) = 4 y / (1 + y)^2
        y = tl.exp(-2 * SCALE * tl.abs(u))
        return tl.where(tl.abs(u) <= 0.5, 4 * PEAK * y / ((1 + y) * (1 + y)), 0.0)


@triton.jit
def value_of_tanh(u, PEAK: tl.constexpr, SCALE: tl.constexpr):
    """Return f(u) of the tanh surrogate."""
    y = tl.exp(-2 * SCALE * tl.abs(u))
    above = PEAK / SCALE * (1 - y) / (1 + y)  # f(|u|) - 1/2
    return 0.5 + tl.where(u < 0, -above, above)


@triton.jit
def rows(pointer, at, n, inside, T: tl.constexpr):
    """Return T rows of numbers, loaded at once: none waits for the one before."""
    loaded = ()
    for t in tl.static_range(T):
        loaded = loaded + (tl.load(pointer + t * n + at, mask=inside, other=0.0),)
    return loaded


# ---- the kernels ---------------------------------------------------------------------


@triton.jit
def forward_kernel(x_ptr, s_ptr, near_ptr, n,
                   TAU: tl.constexpr, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
                   SURROGATE: tl.constexpr, PEAK: tl.constexpr, SCALE: tl.constexpr,
                   DETACH_RESET: tl.constexpr, DECAY_INPUT: tl.constexpr,
                   STRICT: tl.constexpr, RECORD: tl.constexpr, T: tl.constexpr,
                   REPEATED: tl.constexpr, BLOCK: tl.constexpr):
    """x: [T, n], or [1, n] if REPEATED -> s: [T, n]; near: [n], if RECORD is not None.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, n = at < n, tl.cast(n, tl.int64)  # t * n may be above 2**31
    x = rows(x_ptr, at, n, inside, 1 if REPEATED else T)
    inverse = tl.div_rn(tl.full((1,), 1.0, tl.float32), TAU)
    v = tl.full((BLOCK,), V_RESET, tl.float32)
    near = tl.zeros((BLOCK,), tl.float32)
    for t in tl.static_range(T):
        h = charge(x[0 if REPEATED else t], v, inverse, TAU, V_RESET, DECAY_INPUT)
        s = fires(h, V_THRESHOLD, STRICT)
        tl.store(s_ptr + t * n + at, tl.where(s, 1.0, 0.0), mask=inside)
        v = tl.where(s, V_RESET, h)  # Eq. 2: reset
        if RECORD == "derivative":
            near += derivative(h - V_THRESHOLD, SURROGATE, PEAK, SCALE)
        elif RECORD == "value":
            near += value_of_tanh(h - V_THRESHOLD, PEAK, SCALE)
    if RECORD is not None:
        tl.store(near_ptr + at, near / T, mask=inside)


@triton.jit
def backward_kernel(x_ptr, g_ptr, a_ptr, n,
                    TAU: tl.constexpr, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
                    SURROGATE: tl.constexpr, PEAK: tl.constexpr, SCALE: tl.constexpr,
                    DETACH_RESET: tl.constexpr, DECAY_INPUT: tl.constexpr,
                    STRICT: tl.constexpr, T: tl.constexpr, REPEATED: tl.constexpr,
                    BLOCK: tl.constexpr):
    """x, g: dL/ds, [T, n] -> a: dL/dx, of the shape of x: if REPEATED, [1, n]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, n = at < n, tl.cast(n, tl.int64)
    x = rows(x_ptr, at, n, inside, 1 if REPEATED else T)
    g = rows(g_ptr, at, n, inside, T)
    inverse = tl.div_rn(tl.full((1,), 1.0, tl.float32), TAU)
    v = tl.full((BLOCK,), V_RESET, tl.float32)
    h_seq = ()
    for t in tl.static_range(T):
        h = charge(x[0 if REPEATED else t], v, inverse, TAU, V_RESET, DECAY_INPUT)
        v = tl.where(fires(h, V_THRESHOLD, STRICT), V_RESET, h)
        h_seq = h_seq + (h,)
    a = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(T, 0, -1):
        h = h_seq[step - 1]
        slope = derivative(h - V_THRESHOLD, SURROGATE, PEAK, SCALE)
        carry = a * (1 - 1 / TAU)
        to_s = g[step - 1].to(tl.float32)
        if DECAY_INPUT:
            to_s = to_s * (1 / TAU)
        if not DETACH_RESET:
            to_s += (V_RESET - h) * carry
        a = to_s * slope + tl.where(fires(h, V_THRESHOLD, STRICT), 0.0, carry)
        if REPEATED:
            total += a
        else:
            tl.store(a_ptr + (step - 1) * n + at, a, mask=inside)
    if REPEATED:
        tl.store(a_ptr + at, total, mask=inside)


# ---- their call ----------------------------------------------------------------------


def computes(lif):
    """Return whether a neurons.LIF is one of these neurons, by its settings."""
    return lif.reset == "hard" and lif.surrogate in RECORDS and not lif.learn_tau


def constants(lif):
    """Return the settings of a neurons.LIF as the kernels take them, a tuple."""
    return (lif.tau, lif.v_threshold, lif.v_reset, lif.surrogate,
            *shape(lif.surrogate, lif.alpha), lif.detach_reset, lif.decay_input,
            lif.strict)


def run(lif, x_seq, time_steps, record):
    """Run a neurons.LIF by the kernels. Arguments and results: see TritonLIF."""
    return TritonLIF.apply(x_seq, time_steps, constants(lif), record)


def run_formulas(lif, x_seq, time_steps, record):
    """Run it by the same formulas in plain torch."""
    return FormulaLIF.apply(x_seq, time_steps, constants(lif), record)


def shape(surrogate, alpha):
    """Return two numbers that fix f': PEAK, which is f'(0), and SCALE, a factor on u.
    SCALE of the rectangular surrogate is the |u| where it ends."""
    if surrogate == "arctan":
        return alpha / 2, math.pi / 2 * alpha
    if surrogate == "rectangular":
        return alpha / 2, 1 / alpha
    k = 1.5 * alpha
    return k / (2 * math.tanh(k / 2)), k


def fits(x_seq, time_steps):
    """Return whether the kernels can run on an input: in float32 or less, for at most
    MOST_STEPS steps. A FakeTensor has no memory to run on, and a graph that is traced
    or exported may go where Triton is not."""
    is_for_elsewhere = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return (time_steps <= MOST_STEPS and x_seq.dtype in TYPES and not is_for_elsewhere
            and type(x_seq) in (torch.Tensor, torch.nn.Parameter))


def launch(kernel, tensors, time_steps, settings, **switches):
    """Run a kernel over the n neurons of a step. tensors: three of them, [..., n]."""
    n = tensors[0].shape[-1]
    if n == 0:
        return
    block = 1024  # 8 neurons a thread; fewer where T is large: registers hold them
    while block > 128 and block * time_steps > 6144:
        block //= 2
    # torch.compile chooses the GPU by itself
    is_compiling = torch.compiler.is_compiling()
    on_its_gpu = nullcontext() if is_compiling else torch.cuda.device_of(tensors[0])
    with on_its_gpu:
        kernel[(triton.cdiv(n, block),)](*tensors, n, *settings, T=time_steps,
                                         BLOCK=block, num_warps=4, **switches)


def order_in_memory(x_seq):
    """Return the dimensions of a step [N, ...] in their order in memory, from 1 on.

    torch.compile compares strides that vary, but sorts none of them.
    """
    order = []
    for d in range(1, x_seq.dim()):
        before = [other for other in order if x_seq.stride(other) >= x_seq.stride(d)]
        order.insert(len(before), d)
    return order


class TritonLIF(torch.autograd.Function):
    """Run neurons over time_steps steps.

    x_seq: [T, N, ...], or [1, N, ...] for the same input at each step. settings: of
    constants(). record: None, "derivative", or with the tanh surrogate "value".
    Returns the spikes [T, N, ...] and, if a score is recorded, its mean over t for each
    neuron, [N, ...] float32, else None.
    """

    @staticmethod
    def forward(ctx, x_seq, time_steps, settings, record):
        order = order_in_memory(x_seq)
        # of dense steps a view
        x = x_seq.permute(0, *order).flatten(1).contiguous()
        s = x.new_empty(time_steps, x.shape[1])
        near = None
        if record is not None:
            near = torch.empty_like(s[0], dtype=torch.float32)
        ctx.is_repeated = len(x) < time_steps
        launch(forward_kernel, (x, s, near), time_steps, settings,
               REPEATED=ctx.is_repeated, RECORD=record)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.settings, ctx.order = settings, order
        ctx.shape = [x_seq.shape[d] for d in order]
        ctx.inverse = [0] + [1 + order.index(d) for d in range(1, x_seq.dim())]
        if record is not None:
            near = near.view(1, *ctx.shape).permute(ctx.inverse)[0]
            ctx.mark_non_differentiable(near)
        return s.view(time_steps, *ctx.shape).permute(ctx.inverse), near

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_seq, _):
        if g_seq is None:
            return (None,) * 4
        (x,) = ctx.saved_tensors
        g = g_seq.permute(0, *ctx.order).flatten(1).contiguous()
        a = torch.empty_like(x)
        launch(backward_kernel, (x, g, a), len(g), ctx.settings,
               REPEATED=ctx.is_repeated)
        a = a.view(len(a), *ctx.shape).permute(ctx.inverse)
        return a, None, None, None


# ---- the formulas in plain torch -----------------------------------------------------


class FormulaLIF(torch.autograd.Function):
    """The formulas of the kernels, without Triton. kernels.py compares them with
    neurons.py. Arguments and results are those of TritonLIF."""

    @staticmethod
    def forward(ctx, x_seq, time_steps, settings, record):
        (tau, threshold, v_reset, surrogate, peak, scale,
         _, decay_input, strict) = settings
        v = torch.full_like(x_seq[0], v_reset)
        near, h_seq, s_seq = torch.zeros_like(v), [], []
        for x in x_seq.expand(time_steps, *x_seq.shape[1:]):
            leak = v - v_reset
            h = v + ((x - leak) / tau if decay_input else x - leak / tau)
            s = h > threshold if strict else h >= threshold
            v = torch.where(s, v_reset, h)
            slope, value = both(h - threshold, surrogate, peak, scale)
            near += value if record == "value" else slope
            h_seq.append(h)
            s_seq.append(s)
        h_seq, s_seq = torch.stack(h_seq), torch.stack(s_seq)
        ctx.save_for_backward(x_seq, h_seq, s_seq)
        ctx.settings = settings
        near = near / time_steps if record is not None else None
        return s_seq.to(x_seq.dtype), near

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_seq, _):
        (tau, threshold, v_reset, surrogate, peak, scale,
         detach_reset, decay_input, _) = ctx.settings
        x_seq, h_seq, s_seq = ctx.saved_tensors
        a, a_seq = torch.zeros_like(x_seq[0]), []
        for g, h, s in zip(g_seq.flip(0), h_seq.flip(0), s_seq.flip(0)):
            slope, _ = both(h - threshold, surrogate, peak, scale)
            carry = (1 - 1 / tau) * a
            a = g * slope / (tau if decay_input else 1) + torch.where(s, 0, carry)
            if not detach_reset:
                a += (v_reset - h) * carry * slope
            a_seq.append(a)
        a_seq = torch.stack(a_seq).flip(0)
        if len(x_seq) < len(a_seq):
            a_seq = a_seq.sum(0, keepdim=True)
        return a_seq, None, None, None


def both(u, surrogate, peak, scale):
    """Return f'(u), and with the tanh surrogate f(u), else None."""
    if surrogate == "arctan":
        return peak / (1 + (scale * u) ** 2), None
    if surrogate == "rectangular":
        return torch.where(u.abs() < scale, peak, torch.zeros_like(u)), None
    slope = peak / torch.cosh(scale * u.clamp(-0.5, 0.5)) ** 2
    value = 0.5 + peak / scale * torch.tanh(scale * u)
    return torch.where(u.abs() <= 0.5, slope, 0), value
