"""What `fastadapt.sglang` uses of SGLang 0.5.23, for tests where SGLang cannot be installed.

It needs CUDA packages of gigabytes. Names, arguments, fields and the order of the steps are those
of its `sglang.srt.layers.sampler`; the bodies are ours, of the backend `pytorch`, without filters.
tests/test_sglang.py runs on SGLang's own classes where they can be imported.
"""

import dataclasses
import sys
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

SGLANG_RETURN_ORIGINAL_LOGPROB = False
SYNC_TOKEN_IDS_ACROSS_TP = False
SAMPLING_BACKEND_CHOICES = {"flashinfer", "pytorch", "ascend", "intel_xpu"}
_CUSTOM_SAMPLER_FACTORIES: dict[str, Any] = {}


class SamplingMaskStatus(IntEnum):
    OK = 0
    OVERFLOW = 1
    INVALID = 2


@dataclasses.dataclass
class SamplingMaskOutput:
    token_ids: Tensor
    lengths: Tensor
    selected_logprobs: Tensor
    support_logprobs: Tensor | None
    statuses: Tensor


@dataclasses.dataclass
class LogitsProcessorOutput:
    next_token_logits: Tensor
    next_token_logprobs: Tensor | None = None
    next_token_top_logprobs_val: Any = None
    next_token_top_logprobs_idx: Any = None
    next_token_token_ids_logprobs_val: Any = None
    next_token_token_ids_logprobs_idx: Any = None
    sampling_mask_output: SamplingMaskOutput | None = None


@dataclasses.dataclass
class SamplingBatchInfo:
    temperatures: Tensor
    top_ps: Tensor
    top_ks: Tensor
    min_ps: Tensor
    is_all_greedy: bool
    is_any_greedy: bool
    need_top_p_sampling: bool
    need_top_k_sampling: bool
    need_min_p_sampling: bool
    vocab_size: int
    grammars: list[Any] | None = None
    has_custom_logit_processor: bool = False
    custom_params: list[Any] | None = None
    custom_logit_processor: dict[int, Any] | None = None
    sampling_seed: Tensor | None = None
    sampling_mask_batch_indices: Tensor | None = None
    sampling_support_logprobs_capture_indices: Tensor | None = None
    device: str = "cuda"

    def __len__(self) -> int:
        return len(self.temperatures)


@dataclasses.dataclass
class ProcessorEntry:
    processor: Any
    rows: list[int]
    indices: Tensor


@dataclasses.dataclass
class LogprobResult:
    fields: dict[str, Any]

    def write_output_to(self, logits_output: LogitsProcessorOutput) -> None:
        for name, value in self.fields.items():
            setattr(logits_output, f"next_token_{name}", value)


class OutputLogprobProcessor:
    def compute_logprobs(
        self,
        logprobs: Tensor,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int] | None],
        batch_next_token_ids: Tensor,
    ) -> LogprobResult:
        logprobs.clamp_(min=torch.finfo(logprobs.dtype).min)
        fields: dict[str, Any] = {}
        if any(top_logprobs_nums):
            values, ids = logprobs.topk(max(top_logprobs_nums), dim=-1)
            fields["top_logprobs_val"] = [
                v[:k] for v, k in zip(values, top_logprobs_nums, strict=True)
            ]
            fields["top_logprobs_idx"] = [
                i[:k] for i, k in zip(ids, top_logprobs_nums, strict=True)
            ]
        if any(ids is not None for ids in token_ids_logprobs):
            asked = [ids or [] for ids in token_ids_logprobs]
            fields["token_ids_logprobs_val"] = [
                row[ids] for row, ids in zip(logprobs, asked, strict=True)
            ]
            fields["token_ids_logprobs_idx"] = asked
        rows = torch.arange(len(batch_next_token_ids))
        fields["logprobs"] = logprobs[rows, batch_next_token_ids]
        return LogprobResult(fields)


@dataclasses.dataclass
class _SamplingMaskCapture:
    weights: Tensor
    token_ids: Tensor | None
    selected_weight: Tensor | None
    batch_rows: Tensor


def maybe_detect_nan(tensor: Tensor, msg: str = "") -> None:
    """Off unless SGLANG_ENABLE_NAN_LOGITS_CHECK is set."""


def sanitize_nan_logits(logits: Tensor, msg: str = "") -> None:
    """Off unless SGLANG_SANITIZE_NAN_LOGITS is set."""


def sampler_softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1)


def get_exec() -> Any:
    raise ValueError("config namespace 'exec' not published")


def get_parallel() -> Any:
    raise ValueError("config namespace 'parallel' not published")


def get_server_args() -> Any:
    raise ValueError("no server arguments")


def is_dp_attention_enabled() -> bool:
    return False


class Sampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tp_sync_group = get_parallel().tp_group.device_group
        self.rl_on_policy_target = get_exec().deterministic.rl_on_policy_target
        self.enable_deterministic = get_exec().deterministic.enable_deterministic_inference
        self.sampling_mask_max_tokens = get_exec().features.sampling_mask_max_tokens
        self.output_logprob_processor = OutputLogprobProcessor()

    def _preprocess_logits(self, logits: Tensor, sampling_info: SamplingBatchInfo) -> Tensor:
        if sampling_info.has_custom_logit_processor:
            for entry in sampling_info.custom_logit_processor.values():
                params = [sampling_info.custom_params[i] for i in entry.rows]
                changed = entry.processor(logits.index_select(0, entry.indices), params)
                logits.index_copy_(0, entry.indices, changed.to(logits.dtype))
        sanitize_nan_logits(logits, "sampler: next_token_logits")
        return logits

    def forward(
        self,
        logits_output: LogitsProcessorOutput,
        sampling_info: SamplingBatchInfo,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int] | None],
        positions: Tensor,
        *,
        logprob_logits: Tensor | None = None,
    ) -> Tensor:
        logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
        if sampling_info.is_all_greedy:
            tokens = torch.argmax(logits, -1)
            logprobs = torch.log_softmax(logits, dim=-1)
        else:
            original = torch.log_softmax(logits, dim=-1)
            logits.div_(sampling_info.temperatures)
            logprobs = torch.log_softmax(logits, dim=-1)
            logits[:] = sampler_softmax(logits)
            tokens = torch.multinomial(logits, 1).view(-1).to(torch.int32)  # unfiltered: not ours
            if not self.enable_deterministic:
                logprobs = torch.log(logits)
            logprobs = original if SGLANG_RETURN_ORIGINAL_LOGPROB else logprobs
        if return_logprob:
            self.output_logprob_processor.compute_logprobs(
                logprobs, top_logprobs_nums, token_ids_logprobs, tokens
            ).write_output_to(logits_output)
        self._sync_token_ids_across_tp(tokens, sampling_info)
        indices = sampling_info.sampling_mask_batch_indices
        if indices is not None and sampling_info.is_all_greedy:
            support = sampling_info.sampling_support_logprobs_capture_indices
            logits_output.sampling_mask_output = SamplingMaskOutput(
                token_ids=tokens[indices].int().view(-1, 1),
                lengths=torch.ones(len(indices), dtype=torch.int32),
                selected_logprobs=torch.zeros(len(indices)),
                support_logprobs=None if support is None else torch.zeros(len(support), 1),
                statuses=torch.zeros(len(indices), dtype=torch.int32),
            )
        return tokens

    def _sync_token_ids_across_tp(
        self, batch_next_token_ids: Tensor, sampling_info: SamplingBatchInfo
    ) -> None:
        if SYNC_TOKEN_IDS_ACROSS_TP or sampling_info.grammars:
            torch.distributed.all_reduce(
                batch_next_token_ids, op=torch.distributed.ReduceOp.MIN, group=self.tp_sync_group
            )

    def _build_sampling_mask_output(
        self, tokens: Tensor, capture: Any, support_capture_indices: Tensor | None
    ) -> SamplingMaskOutput:
        weights = capture.weights
        mass = weights.sum(-1, dtype=torch.float32)
        drawn = tokens.index_select(0, capture.batch_rows).long().view(-1, 1)
        selected = torch.log(weights.gather(1, drawn).squeeze(1) / mass)
        lengths = (weights > 0).sum(-1, dtype=torch.int32)
        status = (lengths > self.sampling_mask_max_tokens).int() * SamplingMaskStatus.OVERFLOW
        status = torch.where(torch.isfinite(selected), status, SamplingMaskStatus.INVALID).int()
        size = min(self.sampling_mask_max_tokens, weights.shape[-1])
        packed, ids = torch.topk(weights, k=size, dim=-1, sorted=True)
        support = support_capture_indices
        return SamplingMaskOutput(
            token_ids=ids.int(),
            lengths=lengths.clamp(max=size),
            selected_logprobs=selected,
            support_logprobs=(
                None if support is None else torch.log(packed[support] / mass[support, None])
            ),
            statuses=status,
        )


def register_sampler_backend(backend: str, factory: Any) -> None:
    SAMPLING_BACKEND_CHOICES.add(backend)
    _CUSTOM_SAMPLER_FACTORIES[backend] = factory


def create_sampler(backend: str) -> Sampler:
    if backend in _CUSTOM_SAMPLER_FACTORIES:
        return _CUSTOM_SAMPLER_FACTORIES[backend]()
    return Sampler()


def modules() -> dict[str, ModuleType]:
    """The modules of SGLang that have these names, each as its address."""
    here = sys.modules[__name__]
    found = {
        "sglang.srt.layers.sampler": here,
        "sglang.srt.layers.logits_processor": here,
        "sglang.srt.sampling.sampling_batch_info": here,
        "sglang.srt.runtime_context": here,
        "sglang.srt.utils.async_probe": here,
        "sglang.srt.arg_groups.choices": here,
    }
    for address in list(found):
        parts = address.split(".")
        for end in range(len(parts) - 1, 0, -1):
            parent = found.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
            setattr(parent, parts[end], found[".".join(parts[: end + 1])])
    return found


def published(**options: Any) -> Any:
    """What `get_exec` gives once a server's options are published."""
    deterministic = SimpleNamespace(
        rl_on_policy_target=options.get("rl_on_policy_target"),
        enable_deterministic_inference=options.get("deterministic", False),
    )
    return SimpleNamespace(
        deterministic=deterministic,
        kernel=SimpleNamespace(sampling_backend="pytorch"),
        features=SimpleNamespace(sampling_mask_max_tokens=options.get("cap", 4096)),
    )
