"""A run of `fastadapt train`: its options, its data, its folder and its stages."""
