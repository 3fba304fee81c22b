"""Tables for the terminal: a calibration and the environment."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from svd_engine import __version__, loading, ops
from svd_engine.calibration.estimators import BRACKET, FROM_TOKENS, HESSIANS
from svd_engine.calibration.report import CalibrationReport
from svd_engine.calibration.text_check import TextCheck
from svd_engine.ops import cpu


def grid(*columns: str) -> Table:
    """An empty table: the first column is text, aligned left; the others are figures."""
    table = Table(box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def section(title: str, table: Table, note: str = "") -> Group:
    """A table below its title, with a note under it."""
    return Group(Text(title, style="bold"), table, *([f"{note}\n"] if note else []))


def calibration(report: CalibrationReport) -> Group:
    """A table of the report of one calibration."""
    table = grid(f"objective: {report.objective}, alpha {report.alpha:g}", "")
    table.add_row("for", report.use)
    if report.direction != "projected":
        table.add_row("direction", report.direction)
    low, high = report.interval
    table.add_row("strength (mu)", f"{report.strength:+.2f}  [{low:+.2f}, {high:+.2f}]")
    if report.at_bracket:
        table.add_row("", f"at the end of the search, |mu| <= {BRACKET:g}")
    if report.estimator != "exact":
        table.add_row("  the optimum of the objective", f"{report.optimum:+.2f}")
    if report.objective != "nll":
        table.add_row("  the optimum of the likelihood", f"{report.likelihood_strength:+.2f}")
    for name in FROM_TOKENS:
        ratios = ", ".join(f"{report.estimates[f'{name} {hessian}']:+.3g}" for hessian in HESSIANS)
        label = f"  {name} of the tokens: {', '.join(HESSIANS)}"
        table.add_row(label, ratios, style=None if report.estimator == name else "dim")
    gain_low, gain_high = report.gain_interval
    gain = report.loss_before - report.loss_after
    table.add_row(
        f"{report.loss_name}, held out", f"{report.loss_before:.4f} -> {report.loss_after:.4f}"
    )
    table.add_row("  gain", f"{gain:+.4f}  [{gain_low:+.4f}, {gain_high:+.4f}]")
    table.add_row("  of the base", f"{report.loss_base:.4f}")
    if report.measure != "nll":
        table.add_row(
            "NLL per token, held out", f"{report.nll_before:.4f} -> {report.nll_after:.4f}"
        )
        table.add_row("  of the base", f"{report.nll_base:.4f}")
    table.add_row("answer tokens inside the support", f"{report.support_share:.1%}")
    table.add_row("supports of one token", f"{report.single_share:.1%}")
    table.add_row("examples, tokens", f"{report.examples}, {report.tokens}")
    warned = "".join(f"Warning: {warning}.\n" for warning in report.warnings)
    note = f"{warned}Verdict: {report.verdict}. Brackets hold 95 % bootstrap intervals."
    shown = [section("Calibration", table, note)]
    if len(report.candidates) > 1:
        shown.insert(0, _candidates(report))
    if report.texts is not None:
        shown.insert(-1, _texts(report.texts, report.strength))
    return Group(*shown)


def _candidates(report: CalibrationReport) -> Group:
    """What cross-validation chose from: the gain of every candidate on held-out examples."""
    table = grid("objective", "direction", "alpha", "gain", "NLL per token")
    for each in report.candidates:
        name = each["objective"] + (" a token" if each["length_normalised"] else "")
        is_chosen = (name, each["direction"], each["alpha"]) == (
            report.objective + (" a token" if report.length_normalised else ""),
            report.direction, report.alpha,
        )  # fmt: skip
        table.add_row(
            name, each["direction"], f"{each['alpha']:g}", f"{each['gain']:+.4f}",
            f"{each['nll_change']:+.4f}", style="bold" if is_chosen else None,
        )  # fmt: skip
    note = f"Change on held-out examples; the gain is that of the {report.loss_name}."
    return section("Candidates", table, note)


def _texts(check: TextCheck, strength: float) -> Group:
    """Greedy answers to a few prompts of the examples, model by model."""
    table = grid("model", "greedy answer")
    table.columns[1].justify, table.columns[1].overflow = "left", "fold"
    for answers in check.answers:
        for model, text in answers.items():
            table.add_row(model, Text(text), end_section=model == "steered")
    distinct = ", ".join(f"{m} {one:.2f} and {two:.2f}" for m, (one, two) in check.distinct.items())
    note = f"Steering changes {check.changed:.0%} of the tokens. Distinct-1 and -2: {distinct}."
    return section(f"Texts at strength {strength:+.2f}", table, note)


def environment(step: str | None = None) -> Table:
    """A table of versions, devices and backends, with the reason if one cannot run.

    step: how the decode steps of an engine run.
    """
    table = grid("svd-engine", "")
    table.columns[1].justify, table.columns[1].overflow = "left", "fold"
    table.add_row("version", __version__)
    table.add_row("Python", platform.python_version())
    for package in ("torch", "triton", "transformers", "peft", "gguf"):
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    table.add_row("smollm2", str(loading.smollm2_file() or "not installed"))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(devices) or "none")
    table.add_row("CPU threads", str(torch.get_num_threads()))
    for name, reason in ops.backends().items():
        state = "available" if reason is None else f"not available: {reason}"
        if name == "cpu" and reason is None:
            state += f" ({cpu.capability()})"
        table.add_row(f"backend {name}", state)
    table.add_row("sampling noise", f"version {ops.NOISE_VERSION}")
    if step is not None:
        table.add_row("decode step", step)
    return table
