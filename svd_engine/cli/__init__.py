"""The `svd-engine` command."""
