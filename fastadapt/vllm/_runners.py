"""What vLLM's two model runners tell of their batches, and the draw of a step in each."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from fastadapt._ops.checks import shown
from fastadapt.vllm._batch import Batch
from fastadapt.vllm._records import Sheet, log
from fastadapt.vllm._request import KEY, requested
from fastadapt.vllm._row import Row

FOLDER = "fastadapt_support_folder"  # the key of `additional_config`


class Admission:
    """Makes rows of requests; those without a seed get the next one of a sequence.

    Each rank of a tensor-parallel engine admits the same requests in the same order, so all draw
    the same tokens. Engines of another seed and replicas (data parallel) have other sequences.

    Args:
        config: vLLM's `VllmConfig`.

    Raises:
        ValueError: the engine returns log-probabilities of what processors leave, or its
            `additional_config` has an unknown key of ours or no folder for records.
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
        self.folder = _folder(config.additional_config)
        self.told = False  # that records are asked for in vain
        # the ranks of a tensor-parallel engine draw the same tokens: the first one records them
        self.records = self.folder is not None and _is_first(config.parallel_config)

    def row(self, params: Any, first: int, **told: Any) -> Row | None:
        """Returns a row as the engine tells of it; None for a request that it draws itself.

        Args:
            params: vLLM's `SamplingParams`.
            first: how many output tokens the request has by now.
            told: of the row.
        """
        request = requested(params)
        if request is None:
            return None
        seed = self._next_seed() if request.seed is None else request.seed
        return Row(request, seed, sheet=self._sheet(request.support_id, first), **told)

    def _sheet(self, support_id: str | None, first: int) -> Sheet | None:
        """Returns where a request is recorded; None where it did not ask for that."""
        if support_id is None:
            return None
        if self.folder is None and not self.told:
            self.told = True
            log.error("%s_support_id: no records: the additional_config has no %s", KEY, FOLDER)
        return Sheet(self.folder, support_id, first) if self.folder and self.records else None

    def _next_seed(self) -> int:
        """Returns an int64 that the engine's seed and the number of those before decide."""
        self.admitted += 1
        digest = hashlib.sha256(f"{self.begins} {self.admitted}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)


def _folder(additional: Any) -> Path | None:
    """Returns the folder of records, and makes it for its owner alone; None: nothing is recorded.

    Raises:
        ValueError: an unknown key of ours, no absolute path, or a folder that cannot be made.
    """
    given = additional if isinstance(additional, dict) else {}
    for key in given:
        if str(key).startswith(KEY) and key != FOLDER:
            raise ValueError(f"additional_config: expected {FOLDER}, got {key}")
    if FOLDER not in given:
        return None
    path = given[FOLDER]
    if not isinstance(path, str) or not Path(path).is_absolute():
        raise ValueError(f"{FOLDER}: expected the absolute path of a folder, got {shown(path)}")
    try:
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{FOLDER}: expected a folder, got {path!r} ({error})") from error
    return Path(path)


def _is_first(parallel: Any) -> bool:
    """Whether this is the first of the ranks that draw the same tokens, side by side in vLLM."""
    alike = parallel.tensor_parallel_size * parallel.prefill_context_parallel_size
    return bool(parallel.rank % alike == 0)


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
        return self.admission.row(params, len(output), prompt=prompt or (), output=output)

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
        first = int(self.states.prefill_len.np[slot]) - prompt_length
        row = self.admission.row(params, first, prompt_length=prompt_length)
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
