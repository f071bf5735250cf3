"""What vLLM's two model runners tell of their batches, and the draw of a step in each."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from fastadapt.vllm._batch import Batch
from fastadapt.vllm._request import requested
from fastadapt.vllm._row import Row


class Admission:
    """Makes rows of requests; those without a seed get the next one of a sequence.

    Each rank of a tensor-parallel engine admits the same requests in the same order, so all draw
    the same tokens. Engines of another seed and replicas (data parallel) have other sequences.

    Args:
        config: vLLM's `VllmConfig`.

    Raises:
        ValueError: the engine returns log-probabilities of what processors leave.
    """

    def __init__(self, config: Any) -> None:
        """Checks what an engine's configuration asks for."""
        mode = config.model_config.logprobs_mode
        if mode.startswith("processed"):
            raise ValueError(
                "logprobs_mode: expected raw_logprobs or raw_logits with fastadapt.vllm, which "
                f"leaves a drawn row one-hot, got {mode}"
            )
        replica = config.parallel_config.data_parallel_rank
        self.begins = f"{config.model_config.seed or 0} {replica}"
        self.admitted = 0

    def row(self, params: Any, **told: Any) -> Row | None:
        """Returns a row as the engine tells of it; None for a request that it draws itself."""
        request = requested(params)
        if request is None:
            return None
        seed = self._next_seed() if request.seed is None else request.seed
        return Row(request, seed, **told)

    def _next_seed(self) -> int:
        """Returns an int64 that the engine's seed and the number of those before decide."""
        self.admitted += 1
        digest = hashlib.sha256(f"{self.begins} {self.admitted}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)


class FirstRunner:
    """The V1 runner: a row for each request, whose output tokens are on the host.

    The engine's penalties come after its processors, so the draw applies them itself.
    """

    def __init__(self, config: Any) -> None:
        """Starts with an empty batch."""
        self.admission = Admission(config)
        self.rows: dict[int, Row] = {}
        self.batch: Batch | None = None

    def update_state(self, update: Any) -> None:
        """Follows requests that come, go and change places."""
        process_dict_updates(self.rows, update, self._new)

    def _new(self, params: Any, prompt: list[int] | None, output: list[int]) -> Row | None:
        """Returns the row of a request; a prompt of embeddings has no tokens."""
        return self.admission.row(params, prompt=prompt or (), output=output)

    def apply(self, logits: Tensor) -> Tensor:
        """Leaves the rows of our requests one-hot, in place."""
        if not self.rows:
            return logits
        self.batch = batch = batch_of(sorted(self.rows.items()), logits, self.batch)
        lengths = torch.tensor([len(row.output) for _, row in batch.rows])
        batch.draw(logits, lengths.to(logits.device), penalties=True)
        return logits


class SecondRunner:
    """The V2 runner: rows by slots, tokens on the device, a row for each draft of a request.

    The engine's penalties are in the logits already.
    """

    def __init__(self, config: Any, states: Any) -> None:
        """Starts without requests."""
        self.admission = Admission(config)
        self.states = states
        self.rows: dict[int, Row] = {}
        self.batch: Batch | None = None

    def add_request(self, slot: int, params: Any) -> bool:
        """Follows a request that comes to a slot; whether it is drawn here."""
        prompt_length = int(self.states.prompt_len.np[slot])
        row = self.admission.row(params, prompt_length=prompt_length)
        if row is None:
            self.rows.pop(slot, None)
        else:
            self.rows[slot] = row
        return row is not None

    def apply(self, logits: Tensor, context: Any) -> Tensor:
        """Returns logits with the rows of our requests one-hot; without drafts in place.

        A row's position is the number of output tokens before its own, drafts among them.
        """
        slots = context.idx_mapping_np.tolist()
        ours = [(at, self.rows[slot]) for at, slot in enumerate(slots) if slot in self.rows]
        if not ours:
            return logits
        self.batch = batch = batch_of(ours, logits, self.batch)
        after = context.pos.long() + 1
        if logits.shape[0] == len(slots):
            batch.draw(logits, after[batch.at] - batch.prompts, penalties=False)
            return logits
        of_slots = torch.full((self.states.max_num_reqs,), -1, device=logits.device)
        numbers = torch.arange(len(ours), device=logits.device)
        of_slots[context.idx_mapping[batch.at].long()] = numbers
        of_rows = of_slots[context.expanded_idx_mapping.long()]
        positions = after - batch.prompts[of_rows.clamp(min=0)]
        return batch.draw_drafts(logits, of_rows, positions)


def batch_of(rows: list[tuple[int, Row]], logits: Tensor, before: Batch | None) -> Batch:
    """Returns the batch until now, or a new one where rows came, went or changed places."""
    if before is not None and before.rows == rows:
        return before
    return Batch(rows, logits, before)
