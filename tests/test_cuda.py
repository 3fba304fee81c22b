"""The CUDA C++ kernels against the reference in float64: on a GPU, and without one on the CPU.

`csrc/cuda/on_cpu.h` runs the kernels thread by thread, so all but nvcc's code for the device and
the device itself is checked anywhere. What nvcc made is checked for spills and registers.
"""

import ctypes
import importlib.util
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from svd_engine import cuda, dispatch
from svd_engine.kernels import reference

INF, NAN = math.inf, math.nan
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ULP = 2.0**-20  # the exponential of a GPU is good to a few float32 roundings
POISON = 12345.0
SOURCES = Path(__file__).parent.parent / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
# 65536 registers: 6 blocks of 128 threads and more, and 3 of 256.
REGISTERS = {"measure_tiles": 80, "steer_tiles": 80, "sample_rows": 80}

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_library = pytest.mark.skipif(isinstance(cuda._load(), str), reason=str(cuda._load()))
needs_gpu = pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))


def compiled(folder, *arguments):
    """A library that nvcc leaves to the host's C++ compiler."""
    library = folder / "library.so"
    common = ["-std=c++17", "-O1", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC"]
    subprocess.run([NVCC, "-x", "c++", *common, *arguments, "-o", library], check=True)
    return library


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    header, source = SOURCES / "cuda/on_cpu.h", SOURCES / "cuda/launch.cu"
    return cuda._bind(compiled(tmp_path_factory.mktemp("cuda"), "-include", header, source))


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=needs_nvcc),
        pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu]),
    ]
)
def device(request, monkeypatch):
    """Where the kernels run; on "cpu" in their emulation."""
    if request.param == "cpu":
        library = request.getfixturevalue("emulated")
        monkeypatch.setattr(cuda, "_library", lambda: library)
        monkeypatch.setattr(cuda, "_device_and_stream", lambda device: (0, 0))
    return request.param


def logits(n, vocab, device, dtype=F32, base_dtype=None, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, vocab, generator=generator) * spread
    b = z + torch.randn(n, vocab, generator=generator)
    return z.to(dtype).to(device), b.to(base_dtype or dtype).to(device)


def with_workspace(operator, z, *arguments):
    size = cuda.workspace_size(*z.shape)
    workspace = torch.full((size + 64,), NAN, device=z.device)
    workspace[size:] = POISON
    operator(z, *arguments, workspace=workspace)
    assert (workspace[size:] == POISON).all()


def steer(z, b, strength, alpha=0.1, penalty=-INF, dtype=F32, lead=0):
    """The kernel's answer, written between columns that it must leave alone."""
    n, vocab = z.shape
    buffer = torch.full((n, lead + vocab + 8), POISON, dtype=dtype, device=z.device)
    before = buffer.clone()
    out = buffer[:, lead : lead + vocab]
    with_workspace(cuda.steer, z, b, strength, alpha, penalty, out)
    assert torch.equal(buffer[:, :lead], before[:, :lead])
    assert torch.equal(buffer[:, lead + vocab :], before[:, lead + vocab :])
    assert not (out == buffer.new_tensor(POISON)).any()
    return out


def sample(z, b, strength, alpha=0.1, penalty=-INF, temperature=0.0, seed=0, position=0):
    token = torch.full(z.shape[:1], -9, device=z.device)
    logprob = torch.full(z.shape[:1], POISON, device=z.device)
    with_workspace(
        cuda.sample, z, b, strength, alpha, penalty, temperature, seed, position, token, logprob
    )
    assert not (token == -9).any() and not (logprob == POISON).any()
    return reference.Sampled(token, logprob)


def assert_earned(kernel, reference32, truth, scale):
    """The kernel errs no more than plain float32, but for a rounding of `scale`."""
    kernel, reference32 = kernel.double(), reference32.double()
    assert torch.equal(kernel.isnan(), truth.isnan())
    assert torch.equal(kernel == -INF, truth == -INF)
    allowed = (reference32 - truth).abs() + ULP * scale
    assert ((kernel - truth).abs() <= allowed)[truth.isfinite()].all()


def check(z, b, strength, alpha=0.1, penalty=-INF, temperature=0.0, seed=0, position=0, **options):
    """Both operators against float64 and the float32 reference; returns the sampled tokens."""
    mask = {"alpha": alpha, "penalty": penalty}
    mu = torch.as_tensor(strength, device=z.device)
    difference = (z.double() - b.double()).nan_to_num(0, 0, 0).abs().max()
    scale = z.double().nan_to_num(0, 0, 0).abs().max() + mu.abs().max() * difference + 1
    if penalty > -INF:
        scale = scale + (mu.abs() * -penalty).max()
    truth = reference.steer(z.double(), b.double(), mu.double(), **mask)
    out = steer(z, b, strength, alpha, penalty, **options)
    assert_earned(out, reference.steer(z.float(), b.float(), mu, **mask), truth, scale)

    draw = {"temperature": temperature, "seed": seed, "position": position}
    got = sample(z, b, strength, alpha, penalty, **draw)
    want = reference.sample(z.float(), b.float(), mu, **mask, **draw)
    assert got.token.tolist() == want.token.tolist()
    chosen = got.token.clamp(min=0)[:, None]
    logprob = truth.log_softmax(-1).gather(-1, chosen)[:, 0]
    assert_earned(got.logprob, want.logprob, logprob, scale)
    return got.token.tolist()


@pytest.mark.parametrize("vocab", [1, 7, 8, 100, 2047, 2048, 2049, 5000, 50257, 151936])
def test_any_vocabulary(vocab, device):
    z, b = logits(1 if vocab > 5000 else 3, vocab, device)
    check(z, b, 2.0, temperature=0.8, seed=3, position=11)
    check(z, b, -3.0)


@pytest.mark.parametrize("adapted", [F32, BF16, F16])
@pytest.mark.parametrize("base", [F32, BF16, F16])
@pytest.mark.parametrize("vocab", [2304, 2301])  # 16-byte accesses or scalar ones
def test_any_mix_of_dtypes(adapted, base, vocab, device):
    z, b = logits(2, vocab, device, adapted, base)
    check(z, b, 3.0, temperature=0.7)
    b[1, 5] = NAN
    for penalty in (-INF, -2.0):
        wide = steer(z, b, 3.0, penalty=penalty)
        assert wide[1].isnan().all()
        for dtype in (BF16, F16):
            out = steer(z, b, 3.0, penalty=penalty, dtype=dtype)
            assert torch.equal(out.nan_to_num(9.0), wide.to(dtype).nan_to_num(9.0))


def test_strides_and_alignment(device):
    z, b = logits(2, 2056, device, BF16)
    expected = check(z, b, 2.0)
    wide = torch.full((2, 2080), NAN, dtype=BF16, device=device)
    for lead in (0, 1, 8):
        view = wide[:, lead : lead + 2056]
        view.copy_(z)
        assert check(view, b, 2.0, lead=lead) == expected
    odd = torch.full((4, 2057), NAN, dtype=BF16, device=device)[::2, :2056]
    odd.copy_(b)
    assert check(z, odd, 2.0) == expected
    check(z, b[:1].expand(2, 2056), 2.0, temperature=1.0)
    check(z[:1].expand(2, 2056), b[:1].expand(2, 2056), 2.0)


def test_offsets_beyond_31_bits(device):
    stride, vocab = 2**30 + 16, 100
    try:
        buffer = torch.empty(2 * stride + vocab, dtype=BF16, device=device)  # hardly any touched
    except RuntimeError as error:
        pytest.skip(str(error))
    far = buffer.as_strided((3, vocab), (stride, 1))
    z, b = logits(3, vocab, device, BF16)
    far.copy_(z)
    assert sample(far, b, 2.0).token.tolist() == sample(z, b, 2.0).token.tolist()
    want = steer(z, b, 2.0, dtype=BF16)
    cuda.steer(far, b, 2.0, 0.1, -INF, far)
    assert torch.equal(far, want)


@pytest.mark.parametrize("penalty", [-INF, -3.0])
def test_in_place(penalty, device):
    z, b = logits(2, 5000, device)
    want = steer(z, b, 3.0, penalty=penalty)
    for rows in (z.clone(), b), (z, b.clone()):
        out = rows[0] if rows[0] is not z else rows[1]
        cuda.steer(*rows, 3.0, 0.1, penalty, out)
        assert torch.equal(out, want)


def test_no_rows_and_no_workspace(device):
    z, b = logits(0, 100, device)
    steer(z, b, 1.0)
    assert sample(z, b, 1.0).token.shape == (0,)
    z, b = logits(2, 300, device)
    out = torch.empty_like(z)
    cuda.steer(z, b, 2.0, 0.1, -INF, out)
    assert torch.equal(out, steer(z, b, 2.0))


@pytest.mark.parametrize("strength", [-20.0, 0.0, 3.0, [-20.0, 0.0, 3.0]])
@pytest.mark.parametrize("penalty", [-INF, -2.0, 0.0])
def test_strengths_and_penalties(strength, penalty, device):
    if isinstance(strength, list):
        strength = torch.tensor(strength, device=device)
    for temperature in (0.0, 1.3):
        check(*logits(3, 2500, device), strength, penalty=penalty, temperature=temperature)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.5, 1.0])
def test_alphas(alpha, device):
    z, b = logits(3, 4500, device, spread=1.0)
    z[1] = 0.25  # flat: every token is support at any alpha
    z[2] = z[2].round()  # many at the top
    for temperature in (0.0, 1.0):
        check(z, b, 2.0, alpha=alpha, temperature=temperature)


@pytest.mark.parametrize("vocab", [4800, 4801])
def test_ties_go_to_the_lowest_token(vocab, device):
    z, b = logits(5, vocab, device)
    tied = [(7, 8), (3, 2047), (2047, 2048), (100, 4000), (1, 1024)]
    for row, tokens in enumerate(tied):
        z[row, tokens], b[row, tokens] = 50.0, 48.0
    assert check(z, b, 3.0) == [first for first, _ in tied]
    z[:], b[:] = 1.0, 0.0
    assert check(z, b, 3.0) == [0] * 5


@pytest.mark.parametrize("vocab", [4800, 4801])
def test_minus_infinity(vocab, device):
    z, b = logits(9, vocab, device)
    z[0, :2048] = -INF  # the first tile
    z[1, 2048:] = -INF  # all but the first
    b[2, :4096] = -INF
    z[3, 10:4700] = b[3, 10:4700] = -INF
    b[4] = -INF  # no opinion at all
    z[5], z[5, 4700] = -INF, -4.0  # one token
    b[6, z[6].argmax()] = -INF
    z[7, ::2], b[7, 1::2] = -INF, -INF
    z[8, :-1] = b[8, :-1] = -INF
    check(z, b, 3.0)
    check(z, b, 3.0, alpha=0.0, temperature=1.0)
    check(z, b, 3.0, penalty=-1.0, temperature=1.0)


def test_underflow_and_large_logits(device):
    z, b = logits(5, 4500, device)
    z[0, 5] += 500.0  # p of the rest underflows
    z[1, 5] += 500.0
    b[1, 6] += 500.0
    z[2] -= 1e4
    b[3] += 1e4
    z[4], b[4] = z[4] * 1e30, b[4] * 1e30
    check(z, b, 3.0)
    check(z[:4], b[:4], 3.0, alpha=0.0, temperature=1.0)


@pytest.mark.parametrize("where", ["adapted", "base"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_invalid_rows_are_isolated(where, value, device):
    z, b = logits(6, 4500, device)
    z[:, 70] = -INF
    z[5] = -INF
    clean = steer(z, b, 2.0), sample(z, b, 2.0)
    spoilt = {"adapted": z, "base": b}[where]
    spoilt[1, 0] = spoilt[1, 4499] = value
    spoilt[2, 70] = value  # base: where the adapted row is -inf
    spoilt[3] = value
    for penalty, alpha in ((-INF, 0.1), (-1.0, 0.1), (-INF, 0.0)):
        tokens = check(z, b, 2.0, penalty=penalty, alpha=alpha)
        assert tokens[1:4] == [-1, -1, -1] and tokens[5] == -1
    for row in (0, 4):
        assert torch.equal(steer(z, b, 2.0)[row], clean[0][row])
        assert sample(z, b, 2.0).token[row] == clean[1].token[row]


@pytest.mark.parametrize("vocab", [6000, 6001])
def test_a_row_is_the_same_to_the_bit_in_any_batch(vocab, device):
    z, b = logits(5, vocab, device)
    seeds = torch.arange(5, device=device)
    draw = {"penalty": -1.0, "temperature": 1.0}
    together = steer(z, b, 2.0), sample(z, b, 2.0, **draw, seed=seeds, position=9)
    for row in range(5):
        one = slice(row, row + 1)
        assert torch.equal(steer(z[one], b[one], 2.0)[0], together[0][row])
        alone = sample(z[one], b[one], 2.0, **draw, seed=row, position=9)
        assert alone.token[0] == together[1].token[row]
        assert alone.logprob[0] == together[1].logprob[row]
    # So many rows that a block of `steer` takes two tiles, and four.
    for n in () if vocab % 8 else (700,) if device == "cpu" else (700, 2800):
        many = steer(z[:1].expand(n, vocab), b[:1].expand(n, vocab), 2.0)
        assert torch.equal(many, together[0][:1].expand(n, vocab))


def test_sampling_follows_seed_and_position(device):
    n = 10
    z, b = (x.expand(n, 60) for x in logits(1, 60, device, spread=1.0))
    seeds = torch.arange(n, device=device) * 2**33 - 7
    positions = torch.arange(n, device=device) * 5 + 2**32
    draws = []
    for seed, position in (
        (seeds, positions), (seeds, 3), (2**62 + 1, positions), (-1, 2**32 - 1), (0, 0), (0, 1)
    ):  # fmt: skip
        draw = {"alpha": 0.05, "temperature": 1.5, "seed": seed, "position": position}
        draws.append(sample(z, b, 1.0, **draw).token.tolist())
        assert draws[-1] == reference.sample(z, b, 1.0, **draw).token.tolist()
    assert all(len(set(x)) > 4 for x in draws[:3])
    assert all(len(set(x)) == 1 for x in draws[3:])  # one seed, one position, one row: one draw


@needs_nvcc
def test_noise_in_float_is_the_reference_s(tmp_path):
    source = tmp_path / "noise.cpp"
    source.write_text(
        '#include "row.h"\n'
        'extern "C" void noise(const uint32_t* bits, float* out, int n) {\n'
        "  for (int i = 0; i < n; ++i) out[i] = gumbel<float>(bits[i]);\n"
        "}\n"
    )
    library = ctypes.CDLL(str(compiled(tmp_path, "-I", SOURCES, source)))
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
    out, token = torch.empty_like(z), torch.empty(4, dtype=torch.int64, device="cuda")
    logprob, strength = torch.empty(4, device="cuda"), torch.full((4,), 2.0, device="cuda")
    seed, position = (torch.zeros(4, dtype=torch.int64, device="cuda") for _ in range(2))
    workspace = torch.empty(cuda.workspace_size(*z.shape), device="cuda")

    def step():
        cuda.steer(z, b, strength, 0.01, -INF, out, workspace=workspace)
        cuda.sample(
            z, b, strength, 0.01, -INF, 2.0, seed, position, token, logprob, workspace=workspace
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    drawn = set()
    for i in range(20):
        position.fill_(i)
        z.add_(0.125)
        graph.replay()
        in_graph = out.clone(), token.clone(), logprob.clone()
        step()
        assert all(torch.equal(x, y) for x, y in zip(in_graph, (out, token, logprob), strict=True))
        drawn.add(tuple(token.tolist()))
    assert len(drawn) > 5


@needs_library
def test_without_a_device_it_loads_and_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    library = cuda._load()
    z, b = logits(1, 10, "cpu")
    codes = library.probe(), library.steer(
        *cuda._inputs(z, b), None, 1.0, 0.0, 0.0, *cuda._rows(z), z.data_ptr(), 0, None
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
        patch.setattr(cuda, "__file__", str(tmp_path / "cuda.py"))
        assert "not built" in reload()
        (tmp_path / "_cuda.abi3.so").write_bytes(b"no library")
        assert "_cuda.abi3.so failed to load" in reload()
        with pytest.raises(RuntimeError, match="failed to load"):
            cuda.workspace_size(1, 1)
    reload()


def test_it_is_the_second_choice_on_a_cuda_device(monkeypatch):
    launch = pytest.importorskip("svd_engine.kernels.launch")
    choose = dispatch.choose.__wrapped__
    for running, chosen in (("triton", "cuda"), launch), (("cuda",), cuda), ((), reference):
        monkeypatch.setattr(dispatch, "unavailable", lambda x, y=running: None if x in y else "no")
        assert choose("sample", "auto", "cuda") is chosen
        assert choose("divergence", "auto", "cuda") is reference


@needs_library
def test_every_kernel_is_there_without_spills():
    cuobjdump, environment = find_cuobjdump()
    library = next(Path(cuda.__file__).parent.glob("_cuda*.so"))
    command = [cuobjdump, "-res-usage", library]
    usage = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kernels = {}
    for part in usage.stdout.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (sm_\w+)", part).group(1)
        names = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", part)
        for name, registers, stack, local in names:
            kernel = re.search("|".join(REGISTERS), name).group(0)
            kernels.setdefault(arch, []).append(kernel)
            assert int(stack) == int(local) == 0, f"spills: {arch} {name}"
            assert int(registers) <= REGISTERS[kernel], f"{arch} {name}: {registers}"
    if "SVD_CUDA_ARCHS" not in os.environ:
        assert set(kernels) >= {"sm_80", "sm_90", "sm_100"}
    for arch, names in kernels.items():
        # Three dtypes of either row, 16-byte accesses or scalar ones.
        assert sorted(names) == sorted([*REGISTERS] * 18), arch


@needs_library
def test_rows_are_read_16_bytes_at_a_time():
    cuobjdump, environment = find_cuobjdump()
    library = next(Path(cuda.__file__).parent.glob("_cuda*.so"))
    command = [cuobjdump, "-sass", "-arch", "sm_90", library]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    functions = done.stdout.split("Function : ")[1:]
    if not functions:
        pytest.skip("not built for sm_90, or no nvdisasm")
    for function in functions:
        name = function.split()[0]
        per_row = 2 if "13__nv_bfloat16S1_" in name or "6__halfS1_" in name else None
        if per_row and "measure_tiles" in name:  # 16 halves a thread and row
            aligned = "Lb1" in name
            assert len(re.findall(r"LDG\.E\.128", function)) == (2 * per_row if aligned else 0)
            assert len(re.findall(r"LDG\.", function)) == (2 * per_row if aligned else 32)


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
