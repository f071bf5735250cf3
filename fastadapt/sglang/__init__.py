"""SGLang: the sampling backend `fastadapt`, one fused call for filters and draw of a batch."""

from fastadapt.sglang._masks import support_of

__all__ = ["register", "support_of"]
__dir__ = __all__.copy  # what is not public is not listed


def register() -> None:
    """Registers the sampling backend `fastadapt`, for `--sampling-backend fastadapt`.

    SGLang calls this itself, in each of its processes: the package has an entry point of its group
    `sglang.srt.plugins`. What is registered draws every request by `fastadapt.sample`, with the
    request's temperature, top-k, top-p and min-p, and its `sampling_seed` where SGLang passes seeds
    on, which it does with `--enable-deterministic-inference`. That option makes it ask for its
    backend `pytorch`, whatever was given; so this name gets a factory too, which returns SGLang's
    own sampler unless `--sampling-backend fastadapt` was given.

    Examples:
        >>> fastadapt.sglang.register()
        >>> from sglang.srt.arg_groups.choices import SAMPLING_BACKEND_CHOICES
        >>> "fastadapt" in SAMPLING_BACKEND_CHOICES
        True

    Raises:
        ModuleNotFoundError: SGLang is not installed.
        RuntimeError: its `Sampler` lacks what the backend is built on.
    """
    from sglang.srt.layers.sampler import register_sampler_backend

    from fastadapt.sglang._sampler import FusedSampler, as_asked, check_engine

    check_engine()
    register_sampler_backend("fastadapt", FusedSampler)
    register_sampler_backend("pytorch", as_asked)
