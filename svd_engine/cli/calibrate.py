"""`svd-engine calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from svd_engine.cli import terminal
from svd_engine.cli.options import Base, Device, DType, TrustRemoteCode


def calibrate(
    adapter: Annotated[Path, typer.Argument(help="Folder of the PEFT adapter.")],
    data: Annotated[Path, typer.Argument(help="JSON lines: prompt, completion, rejected.")],
    base: Base = None,
    use: Annotated[
        str | None,
        typer.Option(help="generation or ranking: by default generation."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="preference or nll, or ranking for ranking; by default preference if lines have "
            "rejected."
        ),
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="exact, or the paper's mean, median, trimmed or ratio.")
    ] = "exact",
    hessian: Annotated[
        str,
        typer.Option(help="gauss-newton or newton: the denominator of the paper's estimators."),
    ] = "gauss-newton",
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            help="Confidence a token needs to be steered, by default 0.1, or one of 0.01, 0.1 and "
            "0.3 with --direction auto; repeat it to let cross-validation choose."
        ),
    ] = None,
    length_normalised: Annotated[
        bool, typer.Option(help="Compare answers by their log-probability per token.")
    ] = False,
    direction: Annotated[
        str,
        typer.Option(
            help="projected, the paper's; difference, the contrast of both models; or auto: "
            "cross-validation chooses direction, alpha and, unless given, the objective."
        ),
    ] = "projected",
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the folds and the bootstrap.")] = 0,
    force: Annotated[
        bool, typer.Option(help="Keep the strength even if it gains nothing.")
    ] = False,
    allow_overlap: Annotated[
        bool, typer.Option(help="Accept prompts that the adapter was trained on.")
    ] = False,
    dtype: DType = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fit the strength, report what it is worth and write steering_config.json to the adapter.

    The report goes beside it: calibration.json or, for ranking, calibration-ranking.json, with a
    plot if matplotlib is installed. The strength for the other use stays.
    """
    from svd_engine import calibration, hub, loading
    from svd_engine.calibration.options import CalibrationKeywords, CalibrationOptions
    from svd_engine.cli import tables
    from svd_engine.data import contamination
    from svd_engine.data import examples as example_files
    from svd_engine.engine import SteeredEngine
    from svd_engine.steering_config import Steering

    examples = example_files.read(data)
    options: CalibrationKeywords = dict(
        use=use, objective=objective, estimator=estimator, hessian=hessian, alpha=alpha,
        length_normalised=length_normalised, direction=direction, folds=folds, seed=seed,
    )  # fmt: skip
    CalibrationOptions.checked([example.get("rejected") or () for example in examples], **options)
    if loading.has_steering(adapter):
        Steering.from_pretrained(adapter)  # refused now rather than after the work
    if not allow_overlap:
        contamination.check(adapter, contamination.prompts(examples), against=("training",))
    if hub.adapter_folder(adapter) != adapter:
        raise ValueError(
            f"adapter {adapter} is on the Hub; download it: the strength is put beside."
        )
    model, tokenizer = loading.load_base(
        loading.base_of(adapter, base),
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    peft_model = loading.load_adapter(model, adapter)
    engine = SteeredEngine(peft_model, loading.adapter_tokenizer(adapter, model, tokenizer))
    report = engine.calibrate(examples, force=force, progress=True, **options)
    path = calibration.save(adapter, report, engine.steering, examples)
    terminal.show(tables.calibration(report))
    if not report.worthwhile and not force:
        terminal.say("Strength 0 is written; --force keeps the estimate.")
    terminal.say(f"Written to {path}")
