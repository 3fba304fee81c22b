"""Predicted times: worked out by hand, within the bandwidth, and beside measured ones."""

import pytest

from benchmarks.gpu import predict, roofline
from benchmarks.gpu.roofline import Device, Launch, microseconds
from benchmarks.records import RESULTS, read

ROUND = Device(multiprocessors=100, clock=2.0, read=1000.0, copy=1000.0, l2_bytes=50_000_000)


def after_start(launch):
    return microseconds(launch, ROUND) - roofline.LAUNCH


def test_a_launch_bound_by_memory():
    """1000 programs read a gigabyte at 1000 GB/s, and the first waits 400 cycles for its part."""
    launch = Launch(1000, 4, from_memory=1, bytes_read=1e6)
    assert after_start(launch) == pytest.approx(1000 + 0.2)


def test_a_launch_bound_by_its_instructions(monkeypatch):
    """Each of 4 schedulers issues, in half its cycles, the 500 instructions of 10 warps."""
    monkeypatch.setattr(roofline, "ISSUED", 0.5)
    launch = Launch(1000, 4, parallel=500)
    assert after_start(launch) == pytest.approx(0.5 + 5.0)
    assert after_start(launch._replace(active=0.5)) == pytest.approx(0.5 + 2.5)


def test_a_launch_bound_by_the_room_for_programs():
    """3 programs of 76 registers fit at once, so 9 of a multiprocessor take 3 turns."""
    launch = Launch(900, 8, from_l2=10, registers=76)
    assert launch.at_once == 3
    assert after_start(launch) == pytest.approx(3 * 1.0)


def test_what_a_program_alone_waits_for():
    """100 instructions of 4 cycles, 3 barriers of 40 and 2 reads of 200 are 920 cycles."""
    launch = Launch(1, 1, chained=100, barriers=3, from_l2=2)
    assert after_start(launch) == pytest.approx(0.46, abs=0.001)


@pytest.fixture(scope="module")
def result():
    pytest.importorskip("triton")
    return read(RESULTS / "gpu.json")


@pytest.mark.parametrize("gpu", roofline.SHEETS)
@pytest.mark.parametrize("dtype", predict.DTYPES)
@pytest.mark.parametrize("name", predict.OPERATORS)
def test_bandwidth_is_not_exceeded_and_more_rows_take_longer(name, dtype, gpu, result):
    on = roofline.device(result, gpu)
    before = 0.0
    for n in (1, 2, 4, 32, 132, 256, 1024, 4096):
        size = n * 151936 * {"bfloat16": 2, "float32": 4}[dtype]
        written = size / on.write if name == "steer" else 0.0
        time = predict.predicted((name, dtype, n), on)
        assert time > (2 * size / on.read + written) / 1e3
        assert time > before
        before = time


def test_the_measured_figures_are_not_far(result):
    """Those of the published run; half of them are close."""
    errors = sorted(map(abs, predict.errors(result, roofline.device(result, "H200")).values()))
    assert len(errors) > 30
    assert errors[len(errors) // 2] < 0.1 and errors[-1] < 0.3


def test_the_table(result, capsys):
    lines = predict.report(result).splitlines()
    assert lines[2].count("measured") == 3
    measured = predict.measured(result)["steer", "bfloat16", 1]
    row = next(line for line in lines if line.startswith("| `steer`, bfloat16 | "))
    assert f" | {measured:.2f} | " in row
    predict.main(["--gpu", "H100"])
    printed = capsys.readouterr().out
    assert "(2,943 GB/s)" in printed and "measured" not in printed
