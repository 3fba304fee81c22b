"""The CUDA library: that it loads or says why not, what nvcc made of it, and CUDA graphs."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from svd_engine.kernels import reference
from svd_engine.ops import cuda, dispatch

from . import packed
from .cases import BF16, logits
from .runners import NVCC, SOURCES, compiled

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_library = pytest.mark.skipif(isinstance(cuda._load(), str), reason=str(cuda._load()))
needs_gpu = pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))

# 65536 registers: 6 blocks of 128 threads and more, and 3 of 256.
REGISTERS = 80
# How many there are of each: by the dtypes of both rows and by whether 16-byte accesses fit, 18; of
# the two forms of pass 1; of the operators but steer, and `sample` with cuts and without.
KERNELS = {"measure_tiles": 36, "steer_tiles": 18, "answer_rows": 7}


@needs_nvcc
def test_noise_in_float_is_the_reference_s(tmp_path):
    source = tmp_path / "noise.cpp"
    source.write_text(
        '#include "row.h"\n'
        'extern "C" void noise(const uint32_t* bits, float* out, int n) {\n'
        "  for (int i = 0; i < n; ++i) out[i] = gumbel<float>(bits[i]);\n"
        "}\n"
    )
    library = ctypes.CDLL(str(compiled(source, "-I", SOURCES)))
    top = 2**32 - 1
    ends = torch.tensor([0, 1, 2, 2**8, 2**31 - 1, 2**31, 2**31 + 1, top - 2, top - 1, top])
    bits = torch.cat([ends, (torch.linspace(0, 1, 99_990, dtype=torch.float64) * top).long()])
    out, given = torch.empty(len(bits)), bits.to(torch.uint32)
    library.noise(ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()), len(bits))
    near = (torch.minimum(bits, top - bits).double() + 0.5) * 2.0**-32
    want = -torch.where(bits < 2**31, -torch.log1p(-near), -near.log()).log()
    torch.testing.assert_close(out.double(), want, rtol=2e-7, atol=3e-7)


@pytest.mark.gpu
@needs_gpu
def test_in_a_graph_on_a_stream_of_its_own():
    z, b = logits(4, 50_000, "cuda", BF16)
    strength = torch.full((4,), 2.0, device="cuda")
    seed, position, target = (torch.zeros(4, dtype=torch.int64, device="cuda") for _ in range(3))
    workspace = torch.empty(cuda.workspace_size(*z.shape), device="cuda")
    rows, by, at = (z, b), packed.mask(strength, 0.01), dict(seed=seed, position=position)
    operators = {  # and its arguments
        "steer": (*rows, by),
        "steering_vector": (*rows, "difference"),
        "sample": (*rows, by, packed.draw(2.0, **at)),
        "sample, cut": (*rows, by, packed.draw(2.0, **at, top_k=50, top_p=0.95, min_p=1e-4)),
        "topk": (*rows, by, 9),
        "score": (*rows, by, target),
        "project_strength": (*rows, target, 0.01, "projected"),
        "support": (*rows, target, 0.01, "difference", 50),
        "divergence": rows,
    }
    outputs = {
        name: dispatch.OPERATORS[name.split(",")[0]].outputs(
            *arguments, *([BF16] if name == "steer" else [])
        )
        for name, arguments in operators.items()
    }

    def step():
        for name, arguments in operators.items():
            getattr(cuda, name.split(",")[0])(*arguments, *outputs[name], workspace=workspace)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    drawn = set()
    for i in range(20):
        position.fill_(i)
        target.fill_(i)
        z.add_(0.125)
        graph.replay()
        in_graph = [x.clone() for each in outputs.values() for x in each]
        step()
        eager = [x for each in outputs.values() for x in each]
        assert all(torch.equal(x, y) for x, y in zip(in_graph, eager, strict=True))
        drawn.add(tuple(outputs["sample"][0].tolist()))
    assert len(drawn) > 5


@needs_library
def test_without_a_device_it_loads_and_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    library = cuda._load()
    z, b = logits(1, 10, "cpu")
    codes = library.probe(), library.steer(
        *cuda._inputs(z, b), None, 1.0, 0.0, 0.0, 0, *cuda._rows(z), z.data_ptr(), 0, None
    )  # fmt: skip
    for code in codes:
        assert library.error(code) in (b"cudaErrorInsufficientDriver", b"cudaErrorNoDevice")
    assert cuda.unavailable() == "there is no CUDA device"
    with pytest.raises(RuntimeError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
        cuda._check(codes[1])


def test_says_why_it_is_unavailable(monkeypatch, tmp_path):
    def reload():
        cuda._load.cache_clear()
        cuda._library.cache_clear()
        return cuda.unavailable()

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "__file__", str(tmp_path / "ops" / "cuda.py"))
        assert "not built" in reload()
        (tmp_path / "_cuda.abi3.so").write_bytes(b"no library")
        assert "_cuda.abi3.so failed to load" in reload()
        with pytest.raises(RuntimeError, match="failed to load"):
            cuda.workspace_size(1, 1)
    reload()


def test_it_stands_in_for_triton_on_a_cuda_device(monkeypatch):
    launch = pytest.importorskip("svd_engine.kernels.launch")
    choose, device = dispatch.choose.__wrapped__, torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for running, chosen in (("triton", "cuda"), launch), (("cuda",), cuda), ((), reference):
        monkeypatch.setattr(dispatch, "unavailable", lambda x, y=running: None if x in y else "no")
        assert choose("sample", "auto", device) is choose("divergence", "auto", device) is chosen
    monkeypatch.setattr(dispatch, "unavailable", lambda x: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which takes tensors on the CPU alone
    assert choose("sample", "auto", device) is cuda


@needs_library
def test_every_kernel_is_there_without_spills():
    cuobjdump, environment = find_cuobjdump()
    library = next(Path(cuda.__file__).parents[1].glob("_cuda*.so"))
    command = [cuobjdump, "-res-usage", library]
    usage = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kernels = {}
    for part in usage.stdout.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (sm_\w+)", part).group(1)
        names = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", part)
        for name, registers, stack, local in names:
            kernel = re.search("|".join(KERNELS), name).group(0)
            kernels.setdefault(arch, []).append(kernel)
            assert int(stack) == int(local) == 0, f"spills: {arch} {name}"
            assert int(registers) <= REGISTERS, f"{arch} {name}: {registers}"
    if "SVD_CUDA_ARCHS" not in os.environ:
        assert set(kernels) >= {"sm_80", "sm_90", "sm_100"}
    for arch, names in kernels.items():
        assert Counter(names) == KERNELS, arch


@pytest.fixture(scope="module")
def functions():
    """The library's code for sm_90: of each kernel its instructions."""
    cuobjdump, environment = find_cuobjdump()
    library = next(Path(cuda.__file__).parents[1].glob("_cuda*.so"))
    command = [cuobjdump, "-sass", "-arch", "sm_90", library]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = done.stdout.split("Function : ")[1:]
    if not found:
        pytest.skip("not built for sm_90, or no nvdisasm")
    return {function.split()[0]: function for function in found}


@needs_library
def test_rows_are_read_16_bytes_at_a_time(functions):
    for name, function in functions.items():
        per_row = 2 if "13__nv_bfloat16S1_" in name or "6__halfS1_" in name else None
        if per_row and "measure_tiles" in name:  # 16 halves a thread and row
            aligned = "Lb1" in name
            assert len(re.findall(r"LDG\.E\.128", function)) == (2 * per_row if aligned else 0)
            assert len(re.findall(r"LDG\.", function)) == (2 * per_row if aligned else 32)


@needs_library
def test_nvcc_fuses_nothing_by_itself(functions):
    """It does so kernel by kernel: `sample` would compare other logits than `steer` writes."""
    plain = [name for name in functions if "steer_tiles" in name or "rowsINS_7Project" in name]
    assert len(plain) == KERNELS["steer_tiles"] + 1
    for name in plain:
        assert not re.search(r"\bFFMA\b", functions[name]), name


def find_cuobjdump():
    """cuobjdump, and an environment in which it finds nvdisasm: Triton's wheel has both."""
    folders = ["/usr/local/cuda/bin", *os.environ["PATH"].split(os.pathsep)]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        folders.insert(0, str(Path(triton.origin).parent / "backends/nvidia/bin"))
    path = os.pathsep.join(folders)
    found = shutil.which("cuobjdump", path=path)
    if found is None:
        pytest.skip("no cuobjdump")
    return found, os.environ | {"PATH": path}
