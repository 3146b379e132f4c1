"""What a GPU runs, guarded on machines without one.

A step of each network runs on tensors that have shapes and say that they lie on a GPU, but hold no
numbers. Operations on tensors of two devices raise there, and what needs a number raises too. A
counter sees what would make the host wait for the GPU. The tests at the end need a GPU.
"""
import copy
import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import kernels
import masks as masks_module
import models
import prune_gradr
import prune_greg
import prune_unstructured
import training
from harness import machine, setup
from harness.meters import Meter, Watch
from helpers import let_fire
from masks import Masks, seeded

CUDA = torch.device("cuda", 0)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU (CUDA)")
aten = torch.ops.aten


# ---- what is counted -----------------------------------------------------------------------------


READS = {aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal,
         aten._unique2, aten.unique_consecutive, aten.bincount}


class Waits(TorchDispatchMode):
    """Collects in `found` what would make the host wait for a GPU: numbers that it reads, shapes
    that depend on them, copies from and to its memory.

    On tensors of a CPU it counts the same reads; their copies cannot be told from others.
    """

    def __init__(self):
        super().__init__()
        self.found, self.operations = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = operation.overloadpacket
        self.operations += 1
        if packet in (aten._fused_sgd_, aten._fused_adam_, aten._fused_adamw_):
            return require_fused_form(*args)
        result = operation(*args, **kwargs)
        is_wait = packet in READS
        if packet in (aten.index, aten.index_put, aten.index_put_):
            # a mask as an index becomes the places where it is True; a number set there does not
            has_mask = any(i is not None and i.dtype == torch.bool for i in args[1])
            is_wait = has_mask and (packet is aten.index or args[2].numel() > 1)
        if packet in (aten._to_copy, aten.copy_):
            source = args[1] if packet is aten.copy_ else args[0]
            is_wait = source.device != result.device
        if packet in (aten.lift_fresh, aten.lift_fresh_copy):  # torch.tensor(..., device="cuda")
            is_wait = result.device.type == "cuda"
        if is_wait:
            self.found.append(str(packet))
        return result


def require_fused_form(parameters, grads, *lists, **_):
    """What torch's fused kernels ask of their lists, which have no form without numbers."""
    for row in zip(parameters, grads, *(tensors for tensors in lists[:2] if tensors)):
        for tensor in row[1:]:
            if tensor.dim():
                assert tensor.device == row[0].device and tensor.dtype == row[0].dtype
                assert tensor.shape == row[0].shape and tensor.stride() == row[0].stride()


class Reads(TorchFunctionMode):
    """Collects the calls by which a tensor of a CPU becomes numbers without an operation."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("tolist", "numpy", "cpu"):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_the_counter_sees_what_waits():
    ones = torch.ones(4)
    found = [lambda: ones.sum().item(), lambda: bool(ones.any()), lambda: int(ones[0]),
             lambda: float(ones[0]), lambda: ones.nonzero(), lambda: ones[ones > 0],
             lambda: torch.equal(ones, ones), lambda: ones.masked_select(ones > 0)]
    for wait in found:
        with Waits() as waits:
            wait()
        assert waits.found, wait
    numbers = []
    with Reads(numbers):
        ones.tolist(), ones.cpu(), ones.numpy()
    assert len(numbers) == 3
    with FakeTensorMode(), Waits() as waits:
        there = torch.zeros(4, device=CUDA)
        there.cpu(), there.to("cpu"), torch.zeros(4).to(CUDA)
        torch.tensor(1.0, device=CUDA)
        there.copy_(torch.zeros(4))
        assert len(waits.found) == 5
        with pytest.raises(Exception, match="device"):
            there + torch.zeros(4)
        for read in (lambda: there.sum().item(), lambda: bool(there.any()), there.nonzero):
            with pytest.raises(Exception):
                read()
    with Waits() as waits:
        masked = ones.clone()
        masked[ones > 0] = 0.0  # a number: no places are asked for
        torch.where(ones > 0, 1.0, ones)
    assert waits.found == []


# ---- a step without numbers ----------------------------------------------------------------------


def backward(loss):
    """loss.backward() on tensors without numbers: torch's engine asks for a driver, even for
    these. It calls the nodes of the graph one by one, as the engine does."""
    uses, todo, seen = {}, [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        for other, _ in node.next_functions:
            if other is not None:
                uses[other] = uses.get(other, 0) + 1
                todo.append(other)
    found, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            grads = found.pop(node, {})
            if hasattr(node, "variable"):  # a leaf: its gradient has its memory format
                leaf = node.variable
                grad = torch.empty_like(leaf).copy_(grads[0])
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad
                continue
            call = node if callable(node) else node.apply  # torch's own, or one of Python
            results = call(*[grads.get(i) for i in range(len(node._input_metadata))])
            results = results if isinstance(results, tuple) else (results,)
            for (other, i), grad in zip(node.next_functions, results):
                if other is None:
                    continue
                if grad is not None:
                    form = other._input_metadata[i]
                    grad = grad.sum_to_size(form.shape).to(form.dtype)
                    slots = found.setdefault(other, {})
                    slots[i] = slots[i] + grad if i in slots else grad
                uses[other] -= 1
                if uses[other] == 0:
                    ready.append(other)


@pytest.fixture
def without_numbers(monkeypatch):
    """In it tensors hold no numbers."""
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode():
        yield


def widths_of(name):
    return models.default_widths(name, 0.1)


def flags_of(**changes):
    flags = dict(device="cuda", precision="fp32", loss="ce", lr=0.1, momentum=0.9,
                 weight_decay=5e-4, optimizer="sgd", batch_size=4, time_steps=2)
    return SimpleNamespace(**flags | changes)


def network_on_gpu(name, channels=3, side=32, **more):
    """A network whose tensors say that they lie on a GPU."""
    with torch.device("cuda"):
        net = models.build(name, 10, channels, side, 2, widths_of(name), **more)
    for module in net.modules():  # .to() would exchange the tensors of parameters, not with these
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 4:
                formatted = parameter.detach().contiguous(memory_format=torch.channels_last)
                module._parameters[key] = torch.nn.Parameter(formatted)
    return net


def run_of(net, args, optimizer):
    return SimpleNamespace(args=args, net=net, forward=net, optimizer=optimizer, weight=1.0,
                           share=1.0, total=lambda tensor: tensor, meter=Meter(CUDA), iteration=1)


@pytest.fixture(autouse=True, scope="module")
def neurons_are_compared_before():
    """kernels.py compares its neurons with the plain ones once, on numbers."""
    for name in models.NAMES:
        models.build(name, 10, 3, 32, 2, widths_of(name))


@pytest.mark.parametrize("name", models.NAMES)
def test_a_step_of_each_network_lies_on_one_device_and_waits_for_nothing(name, without_numbers):
    net, args = network_on_gpu(name), flags_of()
    optimizer = training.optimizer(args, net.parameters())
    masks, run, watch = Masks(net), run_of(net, args, optimizer), Watch(net, CUDA)
    x = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device=CUDA)
    y = torch.zeros(4, dtype=torch.int64, device=CUDA)
    for record in (None, "max"):
        with Waits() as waits:
            scores = training.step(run, x, y, 0.1, record)
            masks.apply(optimizer)
            watch.look(1)
        assert waits.found == [] and waits.operations > 100
    assert {score.device for score in scores.values()} == {CUDA}
    states = [*net.parameters(), *net.buffers(), *(w.grad for w in masks.weights.values())]
    states += [momentum for w in masks.weights.values()
               for momentum in masks_module.momenta(optimizer, w)]
    assert {tensor.device for tensor in states} == {CUDA}
    for weight, factor in zip(masks.weights.values(), masks.factors()):
        assert factor.device == CUDA and factor.stride() == weight.stride()
        assert weight.stride() == weight.grad.stride()  # torch.optim's fused form asks for it


@pytest.mark.parametrize("name", ["small", "resnet19"])
def test_a_step_with_triton_neurons_waits_for_nothing(name, without_numbers, monkeypatch):
    """All but the kernels themselves, which need numbers."""
    kernels_triton, launched = pytest.importorskip("kernels_triton"), []

    def launch(kernel, tensors, *given, **switches):
        launched.append({tensor.device for tensor in tensors if tensor is not None})

    monkeypatch.setattr(kernels_triton, "launch", launch)
    monkeypatch.setattr(kernels_triton, "fits", lambda *given: True)
    monkeypatch.setattr(kernels, "works_on", lambda *given: True)
    net, args = network_on_gpu(name), flags_of()
    for lif in models.lifs(net).values():
        lif.triton_devices = ("cuda",)
    optimizer = training.optimizer(args, net.parameters())
    masks, run = Masks(net), run_of(net, args, optimizer)
    x = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device=CUDA)
    for record in (None, "max"):
        launched.clear()
        with Waits() as waits:
            training.step(run, x, torch.zeros(4, dtype=torch.int64, device=CUDA), 0.1, record)
            masks.apply(optimizer)
        assert waits.found == [] and launched == [{CUDA}] * 2 * len(models.lifs(net))


def test_factors_of_masks_made_in_inference_mode():
    with torch.inference_mode():
        net = models.build("small", 3, 1, 8, 2, widths_of("small"))
        masks = Masks(net)
        masks.flat[::2] = False
        masks.apply(torch.optim.SGD(net.parameters(), 0.1))
        masks.flat[:] = False
        masks.apply(torch.optim.SGD(net.parameters(), 0.1))
        assert not any(weight.any() for weight in masks.weights.values())


@pytest.mark.parametrize("changes", [dict(loss="mse"), dict(loss="mean-ce"),
                                     dict(optimizer="adam"), dict(optimizer="adamw")])
def test_other_losses_and_optimizers_wait_for_nothing(changes, without_numbers):
    net, args = network_on_gpu("small", 1, 28), flags_of(**changes)
    optimizer = training.optimizer(args, net.parameters())
    assert optimizer.param_groups[0]["fused"] is True
    masks, run = Masks(net), run_of(net, args, optimizer)
    x = torch.zeros(4, 1, 28, 28, dtype=torch.uint8, device=CUDA)
    with Waits() as waits:
        training.step(run, x, torch.zeros(4, dtype=torch.int64, device=CUDA), 0.1)
        masks.apply(optimizer)
    assert waits.found == []


def test_a_batch_is_made_without_a_wait(without_numbers):
    """Only the draws of an epoch are copied to the GPU, at its start."""
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8, device=CUDA)
    labels = torch.zeros(40, dtype=torch.int64, device=CUDA)
    batches = data.batches(images, labels, 8, 0, 0, pad=4, flip=True, cutout=8, rotate=10.0)
    with Waits() as waits:
        next(batches)
        assert len(waits.found) <= 8
        waits.found.clear()
        x, y = next(batches)
        assert waits.found == [] and x.device == y.device == CUDA


def test_a_step_of_deep_r_and_grad_r_waits_for_nothing(without_numbers):
    net, args = network_on_gpu("small", 1, 28), flags_of(optimizer="adam")
    masks = Masks(net)
    wires = prune_gradr.Connections(masks, "adam")
    others = [p for name, p in net.named_parameters() if name not in masks.weights]
    optimizer = training.optimizer(args, [dict(params=others)])
    run = run_of(net, args, optimizer)
    x = torch.zeros(4, 1, 28, 28, dtype=torch.uint8, device=CUDA)
    keep = masks.total // 10
    with Waits() as waits:
        training.step(run, x, torch.zeros(4, dtype=torch.int64, device=CUDA), 0.1)
        g = wires.gradients()
        prune_gradr.deep_r_step(wires, g, 0.1, 1e-5, 1e-9, keep)
        prune_gradr.grad_r_step(wires, g, 0.1, 1e-3, 0.9)
        prune_gradr.fixed_mask_step(wires, g, 0.1)
        wires.write()
    assert waits.found == []
    assert wires.theta.device == wires.active.device == CUDA


def test_an_evaluation_waits_only_at_its_end(without_numbers):
    net, args = network_on_gpu("small", 1, 28), flags_of()
    x = torch.zeros(4, 1, 28, 28, dtype=torch.uint8, device=CUDA)
    y = torch.zeros(4, dtype=torch.int64, device=CUDA)
    reached = []

    def batches():
        for _ in range(3):
            with Waits() as waits:
                yield x, y  # what is done with it
            reached.append(waits.found)

    with pytest.raises(Exception):  # at the end the sums are read, which hold no numbers
        training.evaluate(net, net, batches(), args)
    assert reached == [[], [], []]


# ---- updates, counted on a CPU -------------------------------------------------------------------


def waits_of(work):
    numbers = []
    with Waits() as waits, Reads(numbers):
        work()
    return len(waits.found) + len(numbers)


@pytest.mark.parametrize("name,most", [("small", 35), ("vgg16", 35)])
def test_a_mask_update_waits_a_few_times_whatever_the_number_of_layers(name, most, capsys):
    torch.manual_seed(0)
    net = models.build(name, 10, 3, 32, 2, widths_of(name))
    masks, optimizer = Masks(net), torch.optim.SGD(net.parameters(), 0.1)
    scores = {lif: torch.rand(len(net.get_parameter(weight)))
              for weight, (lif, dim, _) in masks.scored.items() if dim == 0}

    def update(target):
        score = prune_unstructured.criticality(masks, scores, None)
        change = prune_unstructured.prune_and_regenerate(masks, target, 0.5, score, "all",
                                                         seeded(1))
        masks.apply(optimizer)
        masks.record_update(change.pruned, change.regenerated, change.plain)
        assert masks.violation(optimizer, masks.keep_at(target)) is None

    update(0.5)
    count = waits_of(lambda: update(0.6))
    with capsys.disabled():
        print(f" {name}: a mask update waits {count} times", end="")
    assert 0 < count <= most


@pytest.mark.parametrize("method", ["greg1", "greg2"])
def test_greg_waits_once_where_its_penalty_grows(method):
    torch.manual_seed(0)
    net = models.build("vgg16", 10, 3, 32, 2, widths_of("vgg16"))
    weights = prune_greg.prunable(net)
    state = prune_greg.no_penalty(weights, method, 0.5)
    schedule = prune_greg.schedule_of(method, 200, 0.9)
    for weight in net.parameters():
        weight.grad = torch.zeros_like(weight)
    chosen = 0
    for _ in range(60):
        assert waits_of(lambda: prune_greg.grow(state, weights, schedule, 0.5)) == 1
        assert waits_of(lambda: prune_greg.penalise(state, weights)) == 0
        chosen += all(layer["goes"] is not None for layer in state.values())
    assert chosen > 0  # both before and after GReg-2 has chosen


# ---- factors are never stale ---------------------------------------------------------------------


def require_fresh(masks):
    for factor, mask, weight in zip(masks.factors(), masks.alive.values(), masks.weights.values()):
        assert torch.equal(factor != 0, mask) and torch.equal(factor, mask.to(factor.dtype))
        assert factor.stride() == weight.stride() and factor.dtype == weight.dtype


def changes_of_a_mask():
    """All ways by which scripts, tests and users have changed a mask."""
    def through_the_network(masks):
        next(iter(masks.net.masks.values())).view(-1)[3] = False

    def by_numbers_of_places(masks):
        masks.flat[masks.flat.nonzero()[:5, 0]] = False

    def in_a_part(masks):
        masks.flat.split(masks.sizes)[1].fill_(False)

    def by_out(masks):
        torch.lt(torch.rand(masks.total), 0.5, out=masks.flat)

    def by_a_file(masks):
        masks.load_state_dict(dict(alive=torch.rand(masks.total) < 0.5, returned=~masks.flat))

    def one_exchanged(masks):
        name = list(masks.alive)[0]
        masks.alive[name] = torch.zeros_like(masks.alive[name])

    def without_gradients(masks):
        with torch.inference_mode():
            masks.flat[:7] = False

    return dict(
        copy=lambda masks: masks.flat.copy_(torch.rand(masks.total) < 0.5),
        index=lambda masks: masks.flat.__setitem__(0, False),
        mask=lambda masks: masks.flat.__setitem__(torch.rand(masks.total) < 0.5, False),
        alive=lambda masks: list(masks.alive.values())[-1].fill_(False),
        row=lambda masks: list(masks.alive.values())[0].__setitem__(0, False),
        view=lambda masks: list(masks.alive.values())[0].flatten(1).fill_(False),
        either=lambda masks: masks.flat.__ior__(torch.rand(masks.total) < 0.1),
        both=lambda masks: masks.flat.__iand__(torch.rand(masks.total) < 0.5),
        update=lambda masks: masks.prune(masks.total // 2, masks.magnitudes(), seeded(0)),
        network=through_the_network, places=by_numbers_of_places, part=in_a_part, out=by_out,
        file=by_a_file, exchanged=one_exchanged, inference=without_gradients)


@pytest.mark.parametrize("name", changes_of_a_mask())
def test_no_change_of_a_mask_leaves_a_stale_factor(name):
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 2, [4, 8, 8, 8]).to(memory_format=torch.channels_last)
    masks, optimizer = Masks(net), torch.optim.SGD(net.parameters(), 0.1)
    if name == "either":
        masks.flat.fill_(False)
    require_fresh(masks)
    before = [factor.clone() for factor in masks.factors()]
    assert all(one is other for one, other in zip(masks.factors(), masks.factors()))  # kept
    changes_of_a_mask()[name](masks)
    require_fresh(masks)
    assert not all(map(torch.equal, before, masks.factors()))
    masks.apply(optimizer)
    assert not any((weight.detach()[~alive] != 0).any()
                   for weight, alive in zip(masks.weights.values(), masks.alive.values()))


def test_a_copy_of_masks_has_factors_of_its_own():
    masks = Masks(models.build("small", 10, 1, 28, 2, [4, 8, 8, 8]))
    masks.flat[:9] = False
    masks.factors()
    masks.flat[9:20] = False  # not asked for again before the copy
    other = copy.deepcopy(masks)
    require_fresh(other)
    other.flat[:50] = False
    other.alive["fc.weight"].fill_(False)
    require_fresh(other)
    require_fresh(masks)


def test_the_product_is_that_with_the_masks_bit_by_bit():
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 2, [4, 8, 8, 8]).to(memory_format=torch.channels_last)
    masks, optimizer = Masks(net), torch.optim.SGD(net.parameters(), 0.1, 0.9)
    for weight in net.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    masks.flat.copy_(torch.rand(masks.total) < 0.3)
    fc = net.fc.weight
    with torch.no_grad():
        fc[0, :6] = torch.tensor([math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0])
        masks.alive["fc.weight"][0, :6] = False
    wanted = {}
    for name, weight in masks.weights.items():
        rows = [weight.detach(), *masks_module.momenta(optimizer, weight)]
        wanted[name] = [row * masks.alive[name] for row in rows]
    masks.apply(optimizer)
    for name, weight in masks.weights.items():
        rows = [weight.detach(), *masks_module.momenta(optimizer, weight)]
        for row, want in zip(rows, wanted[name], strict=True):
            assert np.array_equal(row.numpy().view(np.int32), want.numpy().view(np.int32))


SCRIPTS = {"prune_unstructured": "", "prune_granet": "", "prune_lottery": "",
           "prune_gradr": "--method deepr", "prune_pq": "", "prune_sdsnn": "", "prune_stds": "",
           "prune_ndsnn": "", "prune_upr": "",
           "prune_unstructured as published": "--as-published"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_leaves_a_stale_factor(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls, apply, violation = [], Masks.apply, Masks.violation

    def watch(self, optimizer):
        apply(self, optimizer)
        calls.append(require_fresh(self))

    def look(self, *given):
        calls.append(require_fresh(self))
        return violation(self, *given)

    monkeypatch.setattr(Masks, "apply", watch)
    monkeypatch.setattr(Masks, "violation", look)
    module = importlib.import_module(script.split()[0])
    module.main(["--smoke", "--time-steps", "2", "--device", "cpu", *SCRIPTS[script].split()])
    assert len(calls) > 1


def test_no_code_writes_to_masks_past_torchs_count_of_changes():
    root = Path(models.__file__).parent
    for path in [*root.glob("*.py"), *root.glob("harness/*.py")]:
        text = path.read_text()
        for past in ("flat.data", "alive[name].data", "flat.numpy()", "_unsafe_preserve_version"):
            assert f"masks.{past}" not in text and f"self.{past}" not in text, path


# ---- optimizers, evaluation, float32 -------------------------------------------------------------


def stepped(optimizer, parameters, lr=0.1):
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    training.descend(optimizer, lr)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_state_of_another_device_s_optimizer_is_loaded(name):
    """A checkpoint names the form of the optimizer that wrote it: fused on a GPU."""
    nets = [torch.nn.Linear(3, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    one, other = (training.optimizer(flags_of(device="cpu", optimizer=name), net.parameters())
                  for net in nets)
    plain = one.param_groups[0]["fused"]
    assert plain is None  # torch's own choice on a CPU, as ever
    stepped(one, nets[0].parameters())
    state = copy.deepcopy(one.state_dict())
    for group in state["param_groups"]:
        group["fused"] = True
    nets[1].load_state_dict(nets[0].state_dict())
    other.load_state_dict(state)
    assert other.param_groups[0]["fused"] is None
    for optimizer, net in zip((one, other), nets):
        stepped(optimizer, net.parameters())
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
    for group in state["param_groups"]:  # of a version before
        del group["fused"]
    other.load_state_dict(state)
    stepped(other, nets[1].parameters())


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_state_of_a_cpu_goes_on_fused_on_a_gpu(name, without_numbers):
    """Also where its weights had another memory format, as a network that has lost channels."""
    here, there = torch.nn.Conv2d(3, 2, 3), torch.nn.Conv2d(3, 2, 3, device=CUDA)
    weight = there.weight.detach().contiguous(memory_format=torch.channels_last)
    there.weight = torch.nn.Parameter(weight)
    one = training.optimizer(flags_of(device="cpu", optimizer=name), here.parameters())
    other = training.optimizer(flags_of(device="cuda:0", optimizer=name), there.parameters())
    stepped(one, here.parameters())
    other.load_state_dict(one.state_dict())
    assert other.param_groups[0]["fused"] is True
    for parameter, state in other.state.items():
        assert all(value.device == CUDA for value in state.values())
        moments = [value for value in state.values() if value.dim()]
        assert moments and all(m.stride() == parameter.stride() for m in moments)
        assert not any(value.requires_grad for value in state.values())
    with Waits() as waits:
        stepped(other, there.parameters())
    assert waits.found == []


def images_of(side, n_test):
    return SimpleNamespace(x_test=torch.zeros(n_test, 3, 1, 1).expand(-1, -1, side, side))


def test_batches_of_an_evaluation():
    args = flags_of(device="cpu", batch_size=64)
    assert setup.evaluation_batch(args, images_of(32, 10_000)) == 256
    assert setup.evaluation_batch(args, images_of(32, 90)) == 90
    args = flags_of(device="cuda", batch_size=64, time_steps=5)
    assert setup.evaluation_batch(args, images_of(32, 10_000)) == 819  # 1 GiB
    assert setup.evaluation_batch(args, images_of(64, 10_000)) == 256  # no fewer than elsewhere
    assert setup.evaluation_batch(args, images_of(16, 500)) == 500
    with pytest.MonkeyPatch.context() as patch:  # each process has its share
        patch.setattr(setup.processes, "size", lambda: 4)
        assert setup.evaluation_batch(args, images_of(16, 2000)) == 500
    args.device = "cuda:1"
    assert setup.evaluation_batch(args, images_of(32, 10_000)) == 819


def test_an_evaluation_does_not_depend_on_its_batches():
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 2, [4, 8, 8, 8]).eval()
    let_fire(net)
    args = flags_of(device="cpu")
    x, y = torch.randint(256, (120, 1, 28, 28), dtype=torch.uint8), torch.randint(10, (120,))
    found = [training.evaluate(net, net, zip(x.split(size), y.split(size)), args)
             for size in (7, 32, 120)]
    assert found[0]["rate"] > 0 and 0 < found[0]["accuracy"] < 1
    for other in found[1:]:
        assert other["accuracy"] == found[0]["accuracy"] and other["silent"] == found[0]["silent"]
        assert other["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
        assert other["rate"] == pytest.approx(found[0]["rate"], rel=1e-5)


def test_float32_is_float32(monkeypatch):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        args = flags_of(device="cpu", sync_bn=False, compile=False, seed=0, resume=False)
        assert setup.start(args).type == "cpu"
        assert not matmul.allow_tf32 and not cudnn.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


# ---- on a GPU ------------------------------------------------------------------------------------


def twins(name="small"):
    """A network on the CPU and the same one on the GPU, each with masks and optimizer."""
    machine.set_precision()
    made = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = models.build(name, 10, 1, 28, 2, widths_of(name))
        let_fire(net)
        net = net.to(device, memory_format=torch.channels_last)
        args = flags_of(device=device)
        masks, optimizer = Masks(net), training.optimizer(args, net.parameters())
        masks.flat.copy_(torch.rand(masks.total, generator=seeded(1)) < 0.5)
        run = run_of(net, args, optimizer)
        run.meter = Meter(torch.device(device))
        made.append((run, masks))
    return made


@needs_cuda
def test_a_step_on_a_gpu_is_that_of_the_cpu():
    """The first step, whose spikes are those of the same weights: later ones may differ in a bit
    that flips a spike."""
    x = torch.randint(256, (8, 1, 28, 28), dtype=torch.uint8, generator=seeded(2))
    y = torch.randint(10, (8,), generator=seeded(3))
    rows = []
    for run, masks in twins():
        device = masks.device
        # a spike that rounding flips moves a maximum further than a mean
        scores = training.step(run, x.to(device), y.to(device), 0.1, "mean")
        masks.apply(run.optimizer)
        assert masks.violation(run.optimizer) is None
        weights = torch.cat([w.detach().flatten().cpu() for w in masks.weights.values()])
        rows.append((run.meter.means(), {k: v.cpu() for k, v in scores.items()}, weights))
    (means, scores, weights), (means_gpu, scores_gpu, weights_gpu) = rows
    assert means_gpu[0] == pytest.approx(means[0], rel=1e-3)
    for name, score in scores.items():
        assert torch.allclose(scores_gpu[name], score, rtol=1e-2, atol=1e-4), name
    assert (weights_gpu - weights).norm() < 1e-2 * weights.norm()
    assert torch.equal(weights_gpu == 0, weights == 0)


@needs_cuda
def test_masks_of_a_gpu_are_those_of_the_cpu():
    scores, flats = None, []
    for run, masks in twins():
        if scores is None:
            scores = {lif: torch.rand(len(masks.weights[weight]), generator=seeded(4))
                      for weight, (lif, dim, _) in masks.scored.items() if dim == 0}
        on_device = {name: score.to(masks.device) for name, score in scores.items()}
        score = prune_unstructured.criticality(masks, on_device, None)
        for target in (0.6, 0.7, 0.9):
            prune_unstructured.prune_and_regenerate(masks, target, 0.5, score, "all", seeded(1))
            masks.apply(run.optimizer)
        flats.append(masks.flat.cpu())
    assert torch.equal(*flats)


@needs_cuda
def test_a_step_on_a_gpu_does_not_synchronise():
    (_, _), (run, masks) = twins()
    watch = Watch(run.net, masks.device)
    x = torch.zeros(8, 1, 28, 28, dtype=torch.uint8, device="cuda")
    y = torch.zeros(8, dtype=torch.int64, device="cuda")
    for mode in ("default", "error"):  # the first step makes factors and momentum
        torch.cuda.set_sync_debug_mode(mode)
        try:
            training.step(run, x, y, 0.1, "max")
            masks.apply(run.optimizer)
            watch.look(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("places,most", [(5000, 500), (64, 60)])
def test_a_draw_on_a_gpu_is_exact(places, most):
    candidates = torch.arange(places, device="cuda") >= most // 2
    number = torch.tensor(most // 2, device="cuda")
    chosen = prune_gradr.choose_at_random(candidates, number, most, places - most)
    assert int(chosen.sum()) == most // 2 and not (chosen & ~candidates).any()
