"""The Triton kernels against neurons.py, with a GPU or in Triton's interpreter on a CPU.
test_triton.py starts these cases in a process of their own, since the interpreter must be asked for
before Triton is imported."""
import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kernels
import kernels_triton
import modelfile
import models
import neurons
import plans
import prune_unstructured
import training
from harness import published
from helpers import rng
from kernels import FastLIF
from neurons import LIF

torch.backends.cudnn.deterministic = True  # two backward passes are compared bit by bit
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
on_cuda = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")

NEURONS = {
    "text": {},
    "tau 2": dict(tau=2.0),
    "reset below 0": dict(tau=1.7, v_threshold=0.9, v_reset=-0.25, alpha=3.0),
    "published": published.ITEMS["unstructured"]["neuron"][1],
    "published for channels": published.ITEMS["structured"]["neuron"][1],
    "sdsnn-small": plans.NETWORKS["sdsnn-small"].neuron,
    "sdsnn-large, linear": dict(tau=2.0, v_threshold=0.5, strict=True),
    "rectangular, all else": dict(tau=1.7, v_threshold=0.9, v_reset=-0.25, alpha=3.0,
                                  surrogate="rectangular", detach_reset=False),
    "tanh, all else": dict(tau=1.7, v_threshold=0.9, v_reset=-0.25, alpha=1.2,
                           surrogate="tanh"),
}
NEURONS = {name: {dict(threshold="v_threshold").get(key, key): value
                  for key, value in settings.items()} for name, settings in NEURONS.items()}


def currents(shape, settings, seed=0):
    """Currents for which many neurons fire; some are at t = 1 exactly on the threshold, and some
    where the rectangular surrogate ends, or the tanh."""
    lif = LIF(**settings)
    x = torch.randn(shape, generator=rng(seed)) * 1.5 + 0.2
    edge = lif.v_threshold - lif.v_reset
    end = 0.5 if lif.surrogate == "tanh" else 1 / lif.alpha
    for at, u in enumerate((0, end, -end)):
        x.flatten()[at::11] = (edge + u) * (lif.tau if lif.decay_input else 1)
    return x.to(DEVICE)


# Relative. In half precision each number of the gradient is rounded once, by half of its last bit
# at most: 2**-8 and 2**-11. The interpreter cuts off what bfloat16 has no bits for, a whole one
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
          torch.float16: 2**-11}


def weights_like(spikes, dtype):
    return torch.randn(spikes.shape, generator=rng(1)).to(dtype).to(DEVICE)


def run(lif, x, time_steps=None, record=None, aggregate="max", dtype=torch.float32):
    """Return spikes, dL/dx and the score; the weights of L are rounded to dtype."""
    if record:
        lif.start_recording(aggregate, record)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    spikes = lif(leaf, time_steps)
    score = lif.stop_recording()
    (spikes * weights_like(spikes, dtype).to(x.dtype)).sum().backward()
    return spikes.detach(), leaf.grad, score


def assert_same(fast, x, time_steps=None, record=None, aggregate="max"):
    """A FastLIF by Triton gives the spikes of neurons.LIF bit by bit, and its gradient and score.
    Of an input in half precision: those of neurons.LIF in float32, rounded."""
    assert fast.runs_triton(x, time_steps or len(x))
    settings = dict(fast.settings)
    spikes, gradient, score = run(fast, x, time_steps, record, aggregate, x.dtype)
    want, slope, expected = run(LIF(**settings), x.float(), time_steps, record, aggregate, x.dtype)
    assert spikes.dtype == gradient.dtype == x.dtype
    assert spikes.shape == want.shape and gradient.shape == x.shape
    assert (spikes.float() != want).sum().item() == 0
    error = (gradient.float() - slope).norm() / slope.norm()
    assert error <= BOUNDS[x.dtype]
    if record:
        assert score.dtype == torch.float64
        assert torch.allclose(score, expected, rtol=1e-6, atol=1e-6)
    return spikes


@pytest.mark.parametrize("time_steps", [1, 4, 5])
@pytest.mark.parametrize("neuron", NEURONS)
def test_spikes_gradients_and_scores_are_those_of_neurons(neuron, time_steps):
    settings = NEURONS[neuron]
    x = currents((time_steps, 2, 3, 50), settings)
    spikes = assert_same(FastLIF(**settings), x, record="derivative")
    assert 0.02 < spikes.mean() < 0.9
    if time_steps > 1:
        assert_same(FastLIF(**settings), x[:1], time_steps, record="derivative")


@pytest.mark.parametrize("time_steps", [2, 3, 8, 9, 16, 20])
@pytest.mark.parametrize("neuron", ["text", "published", "sdsnn-small"])
def test_other_numbers_of_steps(neuron, time_steps):
    x = currents((time_steps, 2, 3, 2), NEURONS[neuron])
    assert_same(FastLIF(**NEURONS[neuron]), x)


def test_the_most_steps():
    assert_same(FastLIF(), currents((kernels_triton.MOST_STEPS, 2, 3), {}))


@pytest.mark.parametrize("n, time_steps", [(1023, 2), (1024, 2), (1025, 2), (513, 9), (257, 17)])
def test_any_number_of_neurons(n, time_steps):
    """The last block is full, or not."""
    assert_same(FastLIF(), currents((time_steps, 1, n), {}))


@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("tau", [4 / 3, 1.25, 1.7])
def test_a_division_is_no_product(tau, decay_input):
    """Potentials that reach the threshold at t = 2, or miss it by a last bit. With a product by
    1 / tau some flip."""
    divisor, v = torch.tensor(tau), torch.rand(1500, generator=rng()) * 0.9
    x = [v, 1 - v + v / divisor]
    if decay_input:
        x[0] = v * divisor
        x[1] = x[0] / divisor + divisor * (1 - x[0] / divisor)
    x = torch.stack(x)[:, None].to(DEVICE)
    fast = FastLIF(tau=tau, decay_input=decay_input)
    spikes = assert_same(fast, x)
    assert 0.1 < spikes[1].mean() < 0.99
    inverse, h = 1 / divisor, x[0, 0].cpu() / (divisor if decay_input else 1)
    by_product = h + ((x[1, 0].cpu() - h) * inverse if decay_input else x[1, 0].cpu() - h * inverse)
    assert ((by_product >= 1) != spikes[1, 0].cpu().bool()).any()


@pytest.mark.parametrize("aggregate", ["max", "mean"])
@pytest.mark.parametrize("repeated", [False, True])
def test_the_published_score_by_value(aggregate, repeated):
    settings = NEURONS["published"]
    x = currents((1 if repeated else 4, 2, 3, 4, 5), settings)
    x[0, 0, 0, 0, 0] = 1e4
    assert_same(FastLIF(**settings), x, 4, "value", aggregate)


def layout(x, name):
    if name == "channels_last":
        folded = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return folded.unflatten(0, x.shape[:2])
    if name == "permuted":
        return x.transpose(2, 4).contiguous().transpose(2, 4)
    if name == "not dense":
        return x.repeat_interleave(2, 2)[:, :, ::2]
    if name == "time inside":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if name == "linear":
        return x[..., 0, 0].contiguous()
    if name == "of one neuron":
        return x[:, :1, 0, 0, 0].contiguous()
    return x


LAYOUTS = ["contiguous", "channels_last", "permuted", "not dense", "time inside", "linear",
           "of one neuron"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_and_types(name, dtype):
    fast = FastLIF()
    x = layout(currents((4, 2, 3, 5, 6), {}).to(dtype), name)
    record = "derivative" if x.dim() > 2 else None
    for batch in (x, x[:1]):
        spikes = assert_same(fast, batch, 4, record)
        if name in ("channels_last", "permuted"):
            assert spikes.stride() == x.stride()


@pytest.mark.parametrize("neuron", NEURONS)
def test_half_precision_of_each_neuron(neuron):
    x = currents((5, 2, 3, 7), NEURONS[neuron]).bfloat16()
    assert_same(FastLIF(**NEURONS[neuron]), x, record="derivative")


def test_no_number_is_no_spike_and_an_infinite_one_is_an_error_nowhere():
    x = torch.tensor([float("nan"), 2.0], device=DEVICE).view(1, 1, 2)
    assert FastLIF()(x).flatten().tolist() == LIF()(x).flatten().tolist() == [0, 1]
    FastLIF()(x / 0)


@pytest.mark.parametrize("shape", [(4, 0, 3), (4, 2, 0, 3, 3), (1, 0, 3)])
def test_an_empty_batch(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    spikes = FastLIF()(x, 4)
    assert spikes.shape == (4, *shape[1:])
    spikes.sum().backward()
    assert x.grad.shape == shape


def test_nothing_but_the_input_is_kept():
    x = currents((4, 2, 3, 5), {}).requires_grad_()
    for leaf, time_steps in ((x, 4), (x.detach()[:1].requires_grad_(), 4)):
        (saved,) = FastLIF()(leaf, time_steps).grad_fn.saved_tensors
        assert saved.data_ptr() == leaf.data_ptr() and saved.numel() == leaf.numel()
    folded = layout(x.detach()[..., None], "channels_last").requires_grad_()
    (saved,) = FastLIF()(folded).grad_fn.saved_tensors
    assert saved.data_ptr() == folded.data_ptr()


def test_without_gradients():
    x = currents((4, 2, 3), {})
    want = LIF()(x)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            spikes = FastLIF()(x.requires_grad_(torch.is_grad_enabled()))
        assert torch.equal(spikes, want) and spikes.requires_grad == x.requires_grad
    fast = FastLIF()
    with torch.inference_mode():  # the trial is in the first call
        kernels.works_on.cache_clear()
        assert fast.runs_triton(x, 4) and torch.equal(fast(x), want)


def test_a_copy_and_a_second_use_in_one_graph():
    x, grads = currents((4, 2, 3), {}), []
    for lif in (FastLIF(), LIF()):
        lif = copy.deepcopy(lif)
        leaf = x.clone().requires_grad_()
        (lif(leaf * 2) + lif(lif(leaf) * 1.5)).sum().backward()
        grads.append(leaf.grad)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6) and grads[0].count_nonzero()


def test_a_gradient_of_any_layout():
    """Expanded, as of sum(); channels_last, as of a pooling; none, where the loss needs none."""
    x, grads = currents((4, 2, 3, 4, 4), {}), []
    weights = layout(torch.rand(4, 2, 3, 4, 4, generator=rng()).to(DEVICE), "channels_last")
    for lif in (FastLIF(), LIF()):
        leaf = x.clone().requires_grad_()
        spikes = lif(leaf)
        spikes.sum().backward(retain_graph=True)
        spikes.backward(weights)
        grads.append(leaf.grad)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)
    leaf = x.clone().requires_grad_()
    (FastLIF()(leaf) * 0).sum().backward()
    assert leaf.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype, time_steps", [(torch.float64, 4), (torch.float32, 65)])
def test_what_the_kernels_do_not_take_runs_as_before(dtype, time_steps):
    fast, x = FastLIF(), currents((time_steps, 1, 2), {}).to(dtype)
    assert not fast.runs_triton(x, time_steps) and fast.is_fast
    assert torch.equal(fast(x), LIF()(x))
    for settings in (dict(reset="soft"), dict(learn_tau=True)):
        other = FastLIF(**settings).to(DEVICE)
        assert other.triton_devices == ()
        assert torch.equal(other(x.float()), LIF(**settings).to(DEVICE)(x.float()))


def test_a_score_that_the_kernels_do_not_record_is_that_of_neurons():
    x = currents((4, 2, 3, 5), {})
    fast, plain = FastLIF(), LIF()
    for lif in (fast, plain):
        lif.start_recording("max", "value")
    assert not fast.runs_triton(x, 4)
    assert torch.equal(fast(x), plain(x))
    assert torch.equal(fast.stop_recording(), plain.stop_recording())
    assert fast.runs_triton(x, 4)


def test_wrong_shapes_are_refused():
    for shape, steps in (((5,), None), ((3, 2), 4)):
        with pytest.raises(ValueError, match="expected .T, N"):
            FastLIF()(torch.zeros(shape, device=DEVICE), steps)


def slower_loop(self, x_seq, time_steps=None):
    return LIF.original(self, 0.9 * x_seq, time_steps)


CHANGES = {
    "a derivative": ("published", neurons, "surrogate_grad",
                     lambda u, alpha=2.0, name="tanh": 1 / (1 + u.abs()) ** 2),
    "by a hair": ("text", neurons, "surrogate_grad", lambda u, alpha=2.0, name="arctan":
                  (1 + 1e-7) * neurons.arctan_grad(u, alpha)),
    "rectangular": ("sdsnn-small", neurons, "SURROGATES", neurons.SURROGATES | {
        "rectangular": (neurons.rectangular, lambda u, alpha: (u.abs() < 0.4).to(u.dtype))}),
    "the loop": ("sdsnn-small", LIF, "forward", slower_loop),
    "the backward pass": ("tau 2", neurons.Spike, "backward", staticmethod(
        lambda ctx, g: (0.5 * g, None, None, None))),
    "the score": ("published", neurons, "criticality",
                  lambda h_seq, *_: h_seq.mean((0, 1)).flatten(1).mean(1).double())}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_neurons_takes_effect(change, monkeypatch):
    neuron, owner, name, value = CHANGES[change]
    LIF.original = LIF.forward
    assert FastLIF(**NEURONS[neuron]).triton_devices == (DEVICE.type,)
    monkeypatch.setattr(owner, name, value)
    assert FastLIF(**NEURONS[neuron]).triton_devices == ()


def broken(*_, **__):
    raise RuntimeError("ptxas\nFailed to find C compiler. Please specify via CC")


def untouched(kernel, tensors, *_, **__):
    tensors[1].zero_()  # no spike
    if kernel is kernels_triton.backward_kernel:
        tensors[2].zero_()


@pytest.mark.parametrize("launch, reason", [(broken, "Failed to find C compiler"),
                                            (untouched, "its results differ")])
def test_where_triton_does_not_work_torch_does_with_a_warning(launch, reason, monkeypatch):
    monkeypatch.setattr(kernels_triton, "launch", launch)
    kernels.works_on.cache_clear()
    fast, x = FastLIF(), currents((4, 2, 3), {})
    with pytest.warns(UserWarning, match=f"without Triton.*{reason}"):
        spikes = fast(x)
    assert torch.equal(spikes, LIF()(x))
    fast(x)  # without a second warning, which would be an error
    kernels.works_on.cache_clear()


def test_under_autocast():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 50), FastLIF()).to(DEVICE)
    x = currents((4, 2, 6), {}) * 2
    with torch.autocast(DEVICE.type, torch.bfloat16):
        kernels.works_on.cache_clear()
        spikes = net(x)
        want = LIF()(net[0](x).float())
    assert spikes.dtype == torch.bfloat16 and net[1].runs_triton(spikes, 4)
    assert torch.equal(spikes.float(), want) and spikes.count_nonzero()
    spikes.sum().backward()
    assert net[0].weight.grad.dtype == torch.float32 and net[0].weight.grad.count_nonzero()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning",
                            "ignore::FutureWarning")
def test_a_traced_or_exported_network_needs_no_triton():
    fast, x = FastLIF(), currents((4, 2, 3), {})
    assert "triton" not in str(torch.export.export(fast, (x,)).graph)
    with torch.no_grad():
        traced = torch.jit.trace(fast, (x,))
    other = currents((4, 2, 3), {}, seed=5)
    assert torch.equal(traced(other), LIF()(other))


def tiny_net(neuron=None):
    torch.manual_seed(0)
    return models.build("small", 4, 1, 16, 3, [3, 4, 5, 5], neuron=neuron).to(DEVICE)


def test_ddp_gives_the_gradients_of_one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0,
                                         world_size=1)
    try:
        x, found = torch.rand(3, 1, 16, 16, generator=rng()).to(DEVICE) * 4, []
        for wrap in (nn.parallel.DistributedDataParallel, lambda net: net):
            net = tiny_net()
            wrap(net)(x).square().sum().backward()
            found.append([p.grad for p in net.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def tiny_data(path):
    """24 + 6 images of three classes, 8 x 8 pixels: blocks at different places."""
    generator, images, labels = np.random.default_rng(0), [], np.arange(30) % 3
    for label in labels:
        image = generator.integers(0, 90, (8, 8), dtype=np.uint8)
        image[2 * label:2 * label + 4, 2:7] += 150
        images.append(image)
    x = np.stack(images)
    np.savez(path, x_train=x[:24], y_train=labels[:24], x_test=x[24:], y_test=labels[24:])


@pytest.mark.parametrize("extra", [[], ["--as-published"]], ids=["text", "published"])
def test_a_run_has_the_masks_of_a_run_without_triton(extra, tmp_path, monkeypatch):
    """Training, scores, prunings and regenerations, fine-tuning, evaluation."""
    tiny_data("tiny.npz")
    given = ["--dataset", "tiny.npz", "--train-limit", "12", "--batch-size", "4", "--width", "0.25",
             "--time-steps", "3", "--interval", "2", "--epochs-prune", "2", "--epochs-finetune",
             "1", "--evaluate-every", "3", "--sparsity", "0.8", "--regen", "0.5", "--device",
             DEVICE.type, *extra]
    calls, counts, found = [], [], []
    real = kernels_triton.launch
    monkeypatch.setattr(kernels_triton, "launch", lambda *a, **k: (calls.append(a), real(*a, **k)))
    for name in ("triton", "torch"):
        prune_unstructured.main([*given, "--run-dir", name])
        found.append(modelfile.read(f"{name}/model.pt"))
        monkeypatch.setattr(kernels, "triton_devices", lambda *_: ())
        counts.append(len(calls))
    assert counts[0] > 80 and counts[1] == counts[0]
    one, other = found
    updates = [Path(name, "updates.jsonl").read_text() for name in ("triton", "torch")]
    assert updates[0] == updates[1] and updates[0].count("\n") == 3
    assert one["masks"].keys() == other["masks"].keys()
    for name, mask in one["masks"].items():
        assert torch.equal(mask, other["masks"][name]), name
    for name, value in one["state_dict"].items():
        assert torch.allclose(value.double(), other["state_dict"][name].double(), atol=1e-4), name


@on_cuda
@pytest.mark.parametrize("neuron", ["text", "published", "sdsnn-small"])
def test_compiled_on_cuda_without_a_graph_break(neuron):
    for dtype in (torch.float32, torch.bfloat16):
        lif = FastLIF(**NEURONS[neuron])
        compiled = torch.compile(lif, fullgraph=True)
        x = currents((5, 2, 3, 50), NEURONS[neuron]).to(dtype)
        for lif_ in (compiled, lif):
            leaf = x.clone().requires_grad_()
            spikes = lif_(leaf)
            spikes.backward(weights_like(spikes, dtype))
            if lif_ is compiled:
                want = spikes, leaf.grad
        assert torch.equal(spikes, want[0])
        assert torch.allclose(leaf.grad.float(), want[1].float(), rtol=1e-2, atol=1e-5)


@on_cuda
def test_more_numbers_than_32_bits_count_on_cuda():
    T, n = 5, 2**29
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB")
    x = torch.zeros(T, 1, n, dtype=torch.bfloat16, device=DEVICE)
    x[:, :, -300:] = currents((T, 1, 300), {}).bfloat16()
    x.requires_grad_()
    spikes = FastLIF()(x)
    assert torch.equal(spikes[..., -300:], FastLIF()(x.detach()[..., -300:].contiguous()))
    assert spikes[..., :-300].count_nonzero() == 0
    spikes.backward(torch.ones_like(spikes))
    assert (x.grad[..., -300:] > 0).all() and (x.grad[..., :300] > 0).all()


@on_cuda
def test_a_loss_over_time_of_a_whole_network_on_cuda():
    x = torch.rand(3, 1, 16, 16, generator=rng()).to(DEVICE) * 4
    labels, grads = torch.arange(3, device=DEVICE), []
    for is_fused in (True, False):
        net = tiny_net()
        for lif in models.lifs(net).values():
            lif.triton_devices = lif.triton_devices if is_fused else ()
        training.loss_over_time(net(x), labels).backward()
        grads.append([p.grad for p in net.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
