"""SGLang's sampler with filters and draw in one call; its own code does what is around them.

Written against SGLang 0.5.23. Around the draw everything is the engine's: custom logit processors,
NaN detection, log-probabilities, tokens made equal on tensor-parallel ranks, the form of masks.
"""

from typing import Any

import torch
from sglang.srt.layers import sampler as engine
from sglang.srt.runtime_context import get_server_args
from sglang.srt.utils.async_probe import maybe_detect_nan
from torch import Tensor

from fastadapt.sampling.functions import filter_logits, sample
from fastadapt.sglang._knobs import Knobs

NAME = "fastadapt"
_OF_THE_SAMPLER = (
    "_preprocess_logits", "_sync_token_ids_across_tp", "_build_sampling_mask_output",
)  # fmt: skip
_OF_THE_MODULE = ("_SamplingMaskCapture", "SGLANG_RETURN_ORIGINAL_LOGPROB", "sampler_softmax")
# SGLANG_SANITIZE_NAN_LOGITS makes -inf -1e30, so that masked tokens are finite
_SANITIZED = -0.5e30


class FusedSampler(engine.Sampler):
    """SGLang's sampler, whose filters and draw are one `fastadapt.sample` for the batch.

    A batch of greedy requests alone is the engine's own argmax; a greedy request among others is
    drawn at temperature 0, which gives the same token. Filters are top-k, top-p and min-p, each on
    the renormalised survivors of the one before.
    """

    def __init__(self) -> None:
        """Refuses what would make the engine promise another draw than this one."""
        super().__init__()
        if self.rl_on_policy_target is not None:
            raise ValueError(
                f"--sampling-backend {NAME}: expected no --rl-on-policy-target, whose draws are "
                f"rounded as its trainer's, got {self.rl_on_policy_target!r}"
            )
        self._knobs = Knobs()

    def forward(
        self,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int] | None],
        positions: Tensor,
    ) -> Tensor:
        """Draws a token for each request and writes what was asked for into `logits_output`.

        Args:
            logits_output: SGLang's `LogitsProcessorOutput`; penalties, biases and grammars are in
                its `next_token_logits`, (N, V).
            sampling_info: SGLang's `SamplingBatchInfo` of N requests.
            return_logprob: whether some request wants log-probabilities.
            top_logprobs_nums: of each request, how many of the most probable tokens.
            token_ids_logprobs: of each request, ids to tell the log-probabilities of, or None.
            positions (Tensor): (N,), of each request's last token in its text.

        Returns:
            Tensor: (N,), int32 (int64 if all requests are greedy); 0 for a row of which no token
            can be drawn.
        """
        if sampling_info.is_all_greedy:
            chosen: Tensor = super().forward(
                logits_output, sampling_info, return_logprob, top_logprobs_nums,
                token_ids_logprobs, positions,
            )  # fmt: skip
            return chosen
        logits = logits_output.next_token_logits
        maybe_detect_nan(logits, "sampler: next_token_logits")
        logits = self._preprocess_logits(logits, sampling_info)
        seeds = sampling_info.sampling_seed
        tokens = sample(
            logits,
            self._knobs.of(sampling_info),
            seeds=seeds,
            positions=None if seeds is None else positions.to(torch.int64),
        ).tokens
        # the engine looks tokens up before it ends a request: no id may be out of range
        tokens = tokens.clamp(min=0).to(torch.int32)
        capture = self._capture(logits, sampling_info)
        if return_logprob:
            self.output_logprob_processor.compute_logprobs(
                self._logprobs(logits, sampling_info.temperatures),
                top_logprobs_nums, token_ids_logprobs, tokens,
            ).write_output_to(logits_output)  # fmt: skip
        self._sync_token_ids_across_tp(tokens, sampling_info)
        if capture is not None:
            logits_output.sampling_mask_output = self._build_sampling_mask_output(
                tokens, capture, sampling_info.sampling_support_logprobs_capture_indices
            )
        return tokens

    def _logprobs(self, logits: Tensor, temperatures: Tensor) -> Tensor:
        """Returns the engine's log-probabilities, bit for bit; the logits are used up."""
        if engine.SGLANG_RETURN_ORIGINAL_LOGPROB:
            return torch.log_softmax(logits, dim=-1)
        logits.div_(temperatures)
        if self.enable_deterministic:
            return torch.log_softmax(logits, dim=-1)
        return torch.log(engine.sampler_softmax(logits))

    def _capture(self, logits: Tensor, sampling_info: Any) -> Any:
        """Returns the weights of the tokens that `sample` drew from, for requests that ask."""
        indices = sampling_info.sampling_mask_batch_indices
        if indices is None:
            return None
        rows = logits.index_select(0, indices)
        rows = rows.masked_fill_(rows <= _SANITIZED, float("-inf"))
        kept = filter_logits(rows, self._knobs.select(sampling_info, indices))
        # a weight above 0 is what the engine takes for a token of the support
        weights = kept.float().softmax(-1).clamp_min_(torch.finfo(torch.float32).tiny)
        weights = weights.masked_fill_(kept == float("-inf"), 0)
        return engine._SamplingMaskCapture(
            weights=weights, token_ids=None, selected_weight=None, batch_rows=indices
        )


def as_asked() -> engine.Sampler:
    """Returns the sampler for the engine's backend `pytorch`: its own, unless ours was asked for.

    `get_server_args` has what was given on the command line, before options changed each other.
    """
    return FusedSampler() if get_server_args().sampling_backend == NAME else engine.Sampler()


def check_engine() -> None:
    """Raises unless the engine's sampler has the parts that `FusedSampler` calls.

    Raises:
        RuntimeError: it has not.
    """
    missing = [name for name in _OF_THE_SAMPLER if not hasattr(engine.Sampler, name)]
    missing += [name for name in _OF_THE_MODULE if not hasattr(engine, name)]
    if missing:
        raise RuntimeError(
            f"--sampling-backend {NAME}: expected the sampler of SGLang 0.5.23, got one without "
            f"{', '.join(missing)}"
        )
