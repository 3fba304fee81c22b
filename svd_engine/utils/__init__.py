"""Files, plots and bootstrap intervals."""
