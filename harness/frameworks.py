"""Other neurons in the place of this project's, for benchmark.py: those of the
frameworks, and one that does nothing but a ReLU.

    net.set_submodule("lifs.0", SpikingJelly())

SpikingJelly and SnnTorch have the call, the equations and the default settings of
neurons.LIF: tau 4/3, threshold 1, reset to 0, arctan surrogate with alpha 2. A
framework is imported when its neuron is made; ImportError says that it is missing.
"""
import torch
import torch.nn.functional as F
from torch import nn

TAU, V_THRESHOLD, V_RESET, ALPHA = 4 / 3, 1.0, 0.0, 2.0


def over_time(x_seq, time_steps):
    """Return the input of all steps, [T, N, ...]; direct coding gives that of one,
    [1, N, ...]."""
    if time_steps is None:
        return x_seq
    return x_seq.expand(time_steps, *x_seq.shape[1:])


class Floor(nn.Module):
    """A ReLU at each step: what a step costs without the work of a neuron."""

    def forward(self, x_seq, time_steps=None):
        return F.relu(over_time(x_seq, time_steps))


class SpikingJelly(nn.Module):
    """SpikingJelly's LIFNode in its multi-step mode."""

    def __init__(self):
        super().__init__()
        from spikingjelly.activation_based import neuron, surrogate
        self.neuron = neuron.LIFNode(
            tau=TAU, decay_input=True, v_threshold=V_THRESHOLD, v_reset=V_RESET,
            detach_reset=True, surrogate_function=surrogate.ATan(ALPHA), step_mode="m")

    def forward(self, x_seq, time_steps=None):
        self.neuron.reset()
        return self.neuron(over_time(x_seq, time_steps))


class SpikingJellyFused(nn.Module):
    """SpikingJelly's fastest LIF: its fused kernels with a potential in float32.

    LIFNode makes its potential in the type of its input. Under autocast that is
    bfloat16, for which SpikingJelly 2.0 takes its plain loop, because its fused kernels
    ask for float32. In fp32 LIFNode takes the fused kernels by itself, on a GPU.
    """

    def __init__(self):
        super().__init__()
        from spikingjelly.activation_based import functional, surrogate
        self.run, self.surrogate = functional.lif_multi_step, surrogate.ATan(ALPHA)

    def forward(self, x_seq, time_steps=None):
        x_seq = over_time(x_seq, time_steps)
        dtype = torch.promote_types(x_seq.dtype, torch.float32)
        v = torch.zeros_like(x_seq[0], dtype=dtype)
        spikes, *_ = self.run(
            x_seq, v, tau=TAU, decay_input=True, v_threshold=V_THRESHOLD,
            v_reset=V_RESET, surrogate_function=self.surrogate, detach_reset=True)
        return spikes


def spikingjelly_kernels(device):
    """Return the name of the kernels that SpikingJelly takes for its LIF on a device,
    such as "triton"; None if it does not tell."""
    try:
        from spikingjelly.activation_based.functional import neuron_implementation
        return neuron_implementation("lif", device)["implementation"]
    except Exception:  # not installed, an older version, no kernels for this device
        return None


class SnnTorch(nn.Module):
    """snnTorch's Leaky, step by step. Its reset is not detached, so that its gradient
    differs."""

    def __init__(self):
        super().__init__()
        import snntorch
        self.neuron = snntorch.Leaky(
            beta=1 - 1 / TAU, threshold=V_THRESHOLD, reset_mechanism="zero",
            reset_delay=False, spike_grad=snntorch.surrogate.atan(alpha=ALPHA))

    def forward(self, x_seq, time_steps=None):
        membrane, spikes = torch.zeros_like(x_seq[0]), []
        for x in over_time(x_seq, time_steps):
            spike, membrane = self.neuron(x / TAU, membrane)
            spikes.append(spike)
        return torch.stack(spikes)
