"""Other neurons in the place of ours, for benchmark.py: those of the frameworks, and none at all.

    net.set_submodule("lifs.0", SpikingJelly())

All have the signature, the equations and the settings of neurons.LIF: tau 4/3, threshold 1, reset
to 0, arctan surrogate with alpha 2. A framework is imported when its neuron is made.
"""
import torch
import torch.nn.functional as F
from torch import nn

from neurons import LIF, surrogate_grad


def over_time(x_seq, time_steps):
    """Return the input of all steps, where direct coding gives that of one."""
    return x_seq if time_steps is None else x_seq.expand(time_steps, *x_seq.shape[1:])


class Floor(nn.Module):
    def forward(self, x_seq, time_steps=None):
        return F.relu(over_time(x_seq, time_steps))


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, g):
        return g * surrogate_grad(*ctx.saved_tensors)


class Plain(LIF):
    """The equations of neurons.py, one autograd operation after the other."""

    def forward(self, x_seq, time_steps=None):
        v, spikes = torch.zeros_like(x_seq[0]), []
        for x in over_time(x_seq, time_steps):
            h = v + (x - v) / self.tau
            s = Spike.apply(h - self.v_threshold)
            v = (1 - s.detach()) * h
            spikes.append(s)
        return torch.stack(spikes)


class SpikingJelly(nn.Module):
    def __init__(self):
        super().__init__()
        from spikingjelly.activation_based import neuron, surrogate
        self.neuron = neuron.LIFNode(
            tau=4 / 3, decay_input=True, v_threshold=1.0, v_reset=0.0, detach_reset=True,
            surrogate_function=surrogate.ATan(2.0), step_mode="m")

    def forward(self, x_seq, time_steps=None):
        self.neuron.reset()
        return self.neuron(over_time(x_seq, time_steps))


class SnnTorch(nn.Module):
    def __init__(self):
        super().__init__()
        import snntorch
        self.tau = 4 / 3
        self.neuron = snntorch.Leaky(
            beta=1 - 1 / self.tau, threshold=1.0, reset_mechanism="zero", reset_delay=False,
            spike_grad=snntorch.surrogate.atan(alpha=2.0))

    def forward(self, x_seq, time_steps=None):
        membrane, spikes = torch.zeros_like(x_seq[0]), []
        for x in over_time(x_seq, time_steps):
            spike, membrane = self.neuron(x / self.tau, membrane)
            spikes.append(spike)
        return torch.stack(spikes)
