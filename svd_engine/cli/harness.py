"""`svd-engine lm-eval`."""

import sys

import typer

SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness, with "svd-engine" as a further --model; its own arguments."""
    try:
        import lm_eval.models  # noqa: F401  # the harness itself does it only for an empty list
        from lm_eval.__main__ import cli_evaluate

        import svd_engine.integrations.lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'lm-eval needs its package: pip install "svd-engine[eval]". {error}'
        ) from error
    whole, sys.argv = sys.argv, ["lm-eval", *context.args]
    try:
        cli_evaluate()
    finally:
        sys.argv = whole
