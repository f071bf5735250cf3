"""The logits processor that vLLM loads, for both of its model runners."""

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondProcessor

from fastadapt.vllm._request import requested
from fastadapt.vllm._runners import FirstRunner, SecondRunner


class FusedSampler(FirstProcessor, SecondProcessor):  # type: ignore[misc]  # Any without vLLM
    """Draws the tokens of requests that ask for it, with all knobs of `Adaptor`.

    For `LLM(logits_processors=[FusedSampler])` or
    `vllm serve --logits-processors fastadapt.vllm:FusedSampler`. A request asks by a key in
    `SamplingParams.extra_args`, over HTTP in `vllm_xargs`: `fastadapt_` and a knob's name, or
    `fastadapt` with a JSON object of them. Beside the knobs there are `fastadapt_seed`, and
    `fastadapt_bias_ids` with `fastadapt_bias_values`. Requests without a key are the engine's as
    ever, and so are greedy ones (temperature 0) without a bias, unless the temperature comes last
    in `fastadapt_order` and XTC or typical may drop the argmax before it.

    A request with `fastadapt_support_id`, a text of its own, is recorded: what each of its tokens
    was drawn from is kept in the folder that the engine's `additional_config` names by
    `fastadapt_support_folder`, for `supports` to read. Such a greedy request is drawn here too.

    The engine's temperature, top_p, top_k, min_p and seed count as ours where ours are not given;
    where both are given and differ, the request is refused. Filters run in the order "vllm" unless
    `fastadapt_order` says otherwise. Penalties and all else that the engine does to logits before
    its own draw count.

    Rows of one order are drawn by one call of `sample`, at the request's seed and the number of
    its output tokens so far, so a token depends on the request's own logits, knobs, seed and
    position and on nothing else. The row is left one-hot for the engine's draw; one without a
    token, by NaN or +inf among its logits or nothing finite, is left NaN. A request without a seed
    gets one when it comes to the batch, of a sequence that the engine's seed decides.

    Examples:
        >>> from fastadapt.vllm import FusedSampler
        >>> from vllm import SamplingParams
        >>> FusedSampler.validate_params(SamplingParams(extra_args={"fastadapt_typical_p": 0.9}))
        >>> FusedSampler.validate_params(SamplingParams(extra_args={"fastadapt_top_p": 1.5}))
        Traceback (most recent call last):
        ValueError: fastadapt_top_p: expected a value in [0, 1], got 1.5

    Args:
        config: vLLM's `VllmConfig`.
        where: a `torch.device` from the V1 runner, `LogitsProcRequestState` from V2.
        is_pin_memory: from the V1 runner alone; not needed.

    Raises:
        ValueError: `logprobs_mode` is of processed logits, which would be those of one-hot rows;
            `additional_config` has another key of ours, or a folder that cannot be.
    """

    def __init__(self, config: Any, where: Any, is_pin_memory: bool | None = None) -> None:
        """Prepares for the runner whose arguments these are."""
        second = hasattr(where, "prompt_len")
        self._runner: Any = SecondRunner(config, where) if second else FirstRunner(config)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises unless a request's keys are as they should be.

        Args:
            sampling_params: vLLM's `SamplingParams`.

        Raises:
            ValueError: they are not; it says what was expected and what came.
        """
        requested(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """Returns False, so that the V1 runner calls it with requests of every temperature."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows the batch of the V1 runner.

        Args:
            batch_update: vLLM's `BatchUpdate`, or None.
        """
        self._runner.update_state(batch_update)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Follows a request of the V2 runner.

        Args:
            req_idx: its slot.
            sampling_params: vLLM's `SamplingParams`.

        Returns:
            bool: whether its rows are drawn here.
        """
        return bool(self._runner.add_request(req_idx, sampling_params))

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Draws the rows of requests that ask for it, and leaves them one-hot.

        Args:
            logits (Tensor): (N, V), float32.
            ctx: vLLM's `LogitsContext`, from the V2 runner alone.

        Returns:
            Tensor: the logits, changed in place; a new tensor where V2 verifies drafts.
        """
        drawn: Tensor = (
            self._runner.apply(logits) if ctx is None else self._runner.apply(logits, ctx)
        )
        return drawn
