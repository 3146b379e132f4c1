"""The neuron in Triton, kernels_triton.py: the cases of cases_triton.py in Triton's interpreter and
on a GPU, where there is one; what a GPU would compile; what an import needs."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import kernels
import models
from kernels import FastLIF
from neurons import LIF

ROOT = Path(__file__).parent.parent


def run_cases(**variables):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W",
               "error::UserWarning", "--rootdir", str(ROOT), str(ROOT / "tests/cases_triton.py")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-2000:]
    return done.stdout


def test_the_cases_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    output = run_cases(TRITON_INTERPRET="1")
    assert int(re.search(r"(\d+) passed", output)[1]) > 90


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_cases_on_cuda():
    output = run_cases(TRITON_INTERPRET="0")
    assert int(re.search(r"(\d+) passed", output)[1]) > 90


# ---- without a GPU -------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_triton_is_not_imported():
    code = ("import sys; import kernels, torch; kernels.FastLIF()(torch.rand(4, 2, 3)); "
            "assert not {'triton', 'kernels_triton'} & set(sys.modules)")
    environment = os.environ | dict(TRITON_INTERPRET="0")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_a_gpu_without_triton_runs_the_operations_of_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "kernels_triton", None)  # an import fails
    kernels.triton_devices.cache_clear()
    assert FastLIF().triton_devices == ()
    kernels.triton_devices.cache_clear()


def fused(monkeypatch, **settings):
    """A FastLIF as a machine with a GPU makes it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.delenv("TRITON_INTERPRET", raising=False)
        kernels.triton_devices.cache_clear()
        lif = FastLIF(**settings)
    kernels.triton_devices.cache_clear()
    assert lif.triton_devices == ("cuda",)
    return lif


def test_a_network_made_beside_a_gpu_runs_on_a_cpu(monkeypatch):
    lif, x = fused(monkeypatch), torch.rand(4, 2, 3) * 2
    monkeypatch.setitem(sys.modules, "kernels_triton", None)
    assert torch.equal(lif(x), LIF()(x))


PUBLISHED = dict(v_threshold=0.5, surrogate="tanh", decay_input=False, strict=True,
                 detach_reset=False)
RECTANGULAR = PUBLISHED | dict(tau=1.25, surrogate="rectangular")


@pytest.mark.parametrize("settings", [{}, PUBLISHED, RECTANGULAR],
                         ids=["arctan", "tanh", "rectangular"])
def test_the_kernels_compile_for_an_h100(settings, tmp_path, monkeypatch):
    """With addresses of 64 bits, loads of 16 bytes, and nothing put off to memory. An interpreter
    knows less of the language than the compiler."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import kernels_triton
    names = [name for name in kernels_triton.backward_kernel.arg_names if name.isupper()][:9]
    values = dict(zip(names, kernels_triton.constants(LIF(**settings)), strict=True))
    for kernel in (kernels_triton.forward_kernel, kernels_triton.backward_kernel):
        constants = values | dict(T=5, REPEATED=False, BLOCK=1024)
        if kernel is kernels_triton.forward_kernel:
            constants |= dict(RECORD=None, near_ptr=None)
        types = dict(x_ptr="*bf16", s_ptr="*bf16", g_ptr="*bf16", a_ptr="*bf16", n="i32")
        types |= dict.fromkeys(constants, "constexpr")
        signature = {name: types[name] for name in kernel.arg_names}
        aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(signature)
                   if name == "n" or signature[name].startswith("*")}
        source = ASTSource(kernel, signature, {
            (kernel.arg_names.index(name),): value for name, value in constants.items()}, aligned)
        found = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
        assert spilled(found["cubin"], tmp_path / "cubin") in (None, 0)
        assert "extsi" in found["ttir"] and not re.search(r"muli .* : (i32|tensor<1024xi32>)",
                                                          found["ttir"].split("get_program_id")[1])
        ptx = found["ptx"]
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == (
            5 if kernel is kernels_triton.forward_kernel else 10)
        assert "st.global" in ptx


def spilled(cubin, path):
    """Return the bytes that a program puts off to memory; None without the tool that tells."""
    import triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    path.write_bytes(cubin)
    told = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", told)[1])


def test_a_compiled_network_is_one_graph(monkeypatch):
    """On stand-ins for tensors on a GPU, without one. On a GPU cases_triton.py compiles it."""
    triton_of_torch = pytest.importorskip("torch.utils._triton")
    fused(monkeypatch)  # the comparison needs numbers
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    def count(graph, _):
        graphs.append(sum("autograd_function_apply" in str(node.target)
                          for node in graph.graph.nodes))
        return graph.forward

    graphs = []
    monkeypatch.setattr(triton_of_torch, "has_triton", lambda: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        net, x = models.build("small", 4, 1, 16, 3), torch.empty(2, 1, 16, 16)
    for lif in models.lifs(net).values():
        lif.triton_devices = ("cuda",)
    try:
        logits = torch.compile(net, backend=count, fullgraph=True)(x)
    finally:
        torch._dynamo.reset()
    assert graphs == [4] and logits.shape == (3, 2, 4) and logits.is_cuda
