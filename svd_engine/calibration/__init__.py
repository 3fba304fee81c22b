"""Calibration: from examples to a strength, and whether it is worth using."""

from svd_engine.calibration.report import CalibrationReport, save

__all__ = ["CalibrationReport", "save"]
