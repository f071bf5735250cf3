"""The command `fastadapt`, one module a subcommand."""
