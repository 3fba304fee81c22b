"""Utilities: atomic files, plots and bootstrap intervals."""
