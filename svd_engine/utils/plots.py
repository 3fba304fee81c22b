"""Plots of curves as PNG images, if matplotlib is installed."""

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

Curve = Sequence[tuple[float, float]]


def training(losses: Curve) -> bytes | None:
    """Plot the loss of each training step."""
    if find_spec("matplotlib") is None:
        return None
    figure, axes = _figure(6, 3.5)
    axes.plot(*zip(*losses, strict=True), marker="." if len(losses) < 50 else None)
    axes.set(xlabel="step", ylabel="loss per token (nats)", title="Warm start")
    return _png(figure)


def calibration(
    curve: Curve,
    optimum: float,
    interval: tuple[float, float],
    estimates: Mapping[str, float],
    loss: str,
) -> bytes | None:
    """Plot the loss over the strength with its optimum, the interval, and every estimate.

    The window covers the optimum, the interval and 0; estimates outside appear in the legend only.
    """
    if find_spec("matplotlib") is None:
        return None
    reach = 1.5 * max(1.0, *(abs(x) for x in (optimum, *interval)))
    shown = [(mu, value) for mu, value in curve if abs(mu) <= reach]
    figure, axes = _figure(8, 4.5)
    axes.plot(*zip(*shown, strict=True), color="black")
    axes.axvspan(*interval, alpha=0.15, color="tab:blue", label="95 % interval")
    axes.axvline(0.0, color="grey", linewidth=0.8)
    for i, (name, mu) in enumerate({"optimum": optimum, **estimates}.items()):
        label = f"{name} {mu:+.3g}"
        if abs(mu) <= reach:
            style = "-" if i == 0 else "--"
            axes.axvline(mu, color=f"C{i}", linewidth=1.2, linestyle=style, label=label)
        else:
            axes.plot([], [], " ", label=f"{label} (outside)")
    axes.set(xlabel="strength (mu)", ylabel=loss, title="Calibration")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # slow to import; only plots need it

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    return image.getvalue()
