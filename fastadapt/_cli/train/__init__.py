"""The command `fastadapt train`: options, data, run folder and stages."""
