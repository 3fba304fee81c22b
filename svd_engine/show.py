"""What the command prints: tables of a calibration and of the environment."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich import box
from rich.table import Table

from svd_engine import __version__, models, native, ops
from svd_engine.calibrate import BRACKET, CalibrationReport


def grid(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def calibration(report: CalibrationReport) -> Table:
    """The report of one calibration."""
    table = grid("Calibration", f"objective: {report.objective}, alpha {report.alpha:g}", "")
    low, high = report.interval
    table.add_row("strength (mu)", f"{report.strength:+.2f}  [{low:+.2f}, {high:+.2f}]")
    if report.at_bracket:
        table.add_row("", f"at the end of the search, |mu| <= {BRACKET:g}")
    table.add_row("  the paper's mean of ratios gives", f"{report.paper_mean:+.3g}")
    gain_low, gain_high = report.gain_interval
    gain = report.loss_before - report.loss_after
    name = "preference loss" if report.objective == "preference" else "NLL a token"
    table.add_row(f"{name}, held out", f"{report.loss_before:.4f} -> {report.loss_after:.4f}")
    table.add_row("  gain", f"{gain:+.4f}  [{gain_low:+.4f}, {gain_high:+.4f}]")
    if report.objective == "preference":
        table.add_row("NLL a token, held out", f"{report.nll_before:.4f} -> {report.nll_after:.4f}")
    table.add_row("answer tokens inside the support", f"{report.support_share:.1%}")
    table.add_row("supports of one token", f"{report.single_share:.1%}")
    table.add_row("examples, tokens", f"{report.examples}, {report.tokens}")
    table.caption = f"Verdict: {report.verdict}. Brackets: 95 % bootstrap intervals."
    table.caption_justify = "left"
    return table


def environment() -> Table:
    """Versions, devices, and every backend with the reason where it cannot run."""
    table = grid("svd-engine environment", "what", "")
    table.columns[1].justify = "left"
    table.add_row("svd-engine", __version__)
    table.add_row("Python", platform.python_version())
    for package in ("torch", "triton", "transformers", "peft", "gguf"):
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    table.add_row("smollm2", str(models.smollm2_file() or "not installed"))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(devices) or "none")
    table.add_row("CPU threads", str(torch.get_num_threads()))
    for name, reason in ops.backends().items():
        state = "available" if reason is None else f"not available: {reason}"
        if name == "cpu" and reason is None:
            state += f" ({native.capability()})"
        table.add_row(f"backend {name}", state)
    return table
