"""The `svd-engine` command."""

INTERRUPTED = 130  # the exit code after Ctrl-C, which is typer's and the shell's
STOPPED = "\nstopped; nothing half-written"
