"""The command `fastadapt`: one module per subcommand."""
