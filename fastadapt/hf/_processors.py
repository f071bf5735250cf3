"""transformers' processors that touch few logits of a row: which ids, and their new values.

Each computes on the gathered logits what transformers computes on whole rows, by the same
operations in the same order, so that the values are the same bits.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from fastadapt.hf._touched import Lists, Touched


class Step:
    """The gathered logits of one step, which processors change in turn.

    Attributes:
        input_ids: (N, T), int64.
        tokens: the same as lists.
        scores: (N, V), float32; as they came.
        touched: finds the places of ids.
        lists: the ids of the values.
        values: (E,), float32.
        allowed: (N, V / 32 rounded up), int32; a bit for each token whose logit is not -inf. None
            where all have theirs.
    """

    def __init__(
        self, input_ids: Tensor, tokens: list[list[int]], scores: Tensor, touched: Touched
    ) -> None:
        """Gathers the logits of the touched ids."""
        self.input_ids, self.tokens, self.scores, self.touched = input_ids, tokens, scores, touched
        self.lists: Lists = touched.lists()
        self.values = scores[self.lists.rows, self.lists.ids.long()]
        self.allowed: Tensor | None = None

    def ban(self, banned: Sequence[tuple[int, int]]) -> None:
        """Sets the values of some tokens, each with its row, to -inf."""
        self.values[self.touched.places(banned)] = -math.inf


class Rule:
    """What one processor does to the gathered logits.

    Args:
        processor: of transformers, of exactly the class that the rule stands for.

    Attributes:
        shared: the ids that it may touch in every row.
        columns: (S,), int64; where these are among the shared ids of all rules.
        mark: its own set among `Lists.marks`, None where it has none.
    """

    shared: list[int]
    columns: Tensor
    mark: int | None = None
    has_set = False

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.shared = []

    def fits(self, rows: int, vocabulary: int) -> bool:
        """Whether the rule stands for the processor on these rows; else that one runs itself."""
        return True

    def first(self, row: int, rows: int, tokens: list[int]) -> set[int]:
        """Returns the row's set of ids that follows from its first tokens."""
        return set()

    def adds(self, row: int, position: int) -> bool:
        """Whether a new token at this position gets into the row's set."""
        return False

    def apply(self, step: Step) -> bool:
        """Changes the values; False where the processor itself must run."""
        raise NotImplementedError


class _Bias(Rule):
    """Adds to tokens, some of them only behind given others; -inf for bad words."""

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        self.shared = sorted({int(ids[-1]) for ids in processor.sequence_bias})
        place = {token: at for at, token in enumerate(self.shared)}
        self.alone = torch.zeros(len(self.shared))
        behind: defaultdict[int, list[tuple[tuple[int, ...], float]]] = defaultdict(list)
        for ids, bias in processor.sequence_bias.items():
            if len(ids) == 1:
                self.alone[place[ids[0]]] = bias
            else:
                behind[len(ids) - 1].append((ids, bias))
        self.behind = [
            (
                torch.tensor([ids[:-1] for ids, _ in group]),
                torch.tensor([place[ids[-1]] for ids, _ in group]),
                torch.tensor([bias for _, bias in group], dtype=torch.float32),
            )
            for group in behind.values()
        ]

    def fits(self, rows: int, vocabulary: int) -> bool:
        return all(i < vocabulary for ids in self.processor.sequence_bias for i in ids)

    def apply(self, step: Step) -> bool:
        places = step.lists.shared[:, self.columns]
        bias = self.alone.expand(places.shape).clone()
        for prefixes, columns, biases in self.behind:
            length = prefixes.shape[1]
            if length <= step.input_ids.shape[1]:
                matches = (step.input_ids[:, None, -length:] == prefixes).all(dim=-1)
                bias.index_add_(1, columns, torch.where(matches, biases, 0.0))
        step.values[places] += bias
        return True


class _Penalty(Rule):
    """Divides what is above 0, and multiplies what is below, of the tokens seen so far."""

    has_set = True

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        skipped = processor.prompt_ignore_length
        self.skipped: Any = skipped.tolist() if isinstance(skipped, Tensor) else skipped or 0

    def fits(self, rows: int, vocabulary: int) -> bool:
        return isinstance(self.skipped, int) or len(self.skipped) == rows

    def first(self, row: int, rows: int, tokens: list[int]) -> set[int]:
        return set(tokens[self._skipped(row) :])

    def adds(self, row: int, position: int) -> bool:
        return position >= self._skipped(row)

    def _skipped(self, row: int) -> int:
        return int(self.skipped if isinstance(self.skipped, int) else self.skipped[row])

    def apply(self, step: Step) -> bool:
        assert self.mark is not None  # noqa: S101, for the type checker
        x, penalty = step.values, self.processor.penalty
        penalised = torch.where(x < 0, x * penalty, x / penalty)
        step.values = torch.where(step.lists.marks[self.mark], penalised, x)
        return True


class _EncoderPenalty(_Penalty):
    """The same of the tokens that an encoder read."""

    def __init__(self, processor: Any) -> None:
        Rule.__init__(self, processor)
        self.encoder: list[list[int]] = processor.encoder_input_ids.tolist()

    def fits(self, rows: int, vocabulary: int) -> bool:
        whole = bool(self.encoder) and rows % len(self.encoder) == 0
        return whole and all(0 <= i < vocabulary for row in self.encoder for i in row)

    def first(self, row: int, rows: int, tokens: list[int]) -> set[int]:
        return set(self.encoder[row // (rows // len(self.encoder))])

    def adds(self, row: int, position: int) -> bool:
        return False


class _NGrams(Rule):
    """Bans what would end an n-gram for the second time."""

    has_set = True

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        self.size: int = processor.ngram_size
        # of each row, what has followed n - 1 tokens
        self.followers: dict[int, defaultdict[tuple[int, ...], set[int]]] = {}

    def first(self, row: int, rows: int, tokens: list[int]) -> set[int]:
        followers: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        for end in range(self.size, len(tokens) + 1):
            followers[tuple(tokens[end - self.size : end - 1])].add(tokens[end - 1])
        self.followers[row] = followers
        return set(tokens)

    def adds(self, row: int, position: int) -> bool:
        return True

    def apply(self, step: Step) -> bool:
        if self.size == 1:
            return self._ban_all(step)
        banned = list[tuple[int, int]]()
        for row, tokens in enumerate(step.tokens):
            followers = self.followers[row]
            if len(tokens) >= self.size:  # the last token ends an n-gram
                followers[tuple(tokens[-self.size : -1])].add(tokens[-1])
                after = followers.get(tuple(tokens[1 - self.size :]), ())
                banned += [(row, token) for token in after]
        step.ban(banned)
        return True

    def _ban_all(self, step: Step) -> bool:
        """Bans the whole set: every token is an n-gram of its own."""
        assert self.mark is not None  # noqa: S101, for the type checker
        step.values.masked_fill_(step.lists.marks[self.mark], -math.inf)
        return True


class _EncoderNGrams(_NGrams):
    """Bans what would end an n-gram that an encoder read."""

    def fits(self, rows: int, vocabulary: int) -> bool:
        held = self.processor.generated_ngrams
        ids = (i for row in held for after in row.values() for i in after)
        return rows % self.processor.batch_size == 0 and all(0 <= i < vocabulary for i in ids)

    def first(self, row: int, rows: int, tokens: list[int]) -> set[int]:
        held = self.processor.generated_ngrams[row // (rows // self.processor.batch_size)]
        self.followers[row] = defaultdict(set, {k: set(v) for k, v in held.items()})
        return {token for after in held.values() for token in after}

    def adds(self, row: int, position: int) -> bool:
        return False

    def apply(self, step: Step) -> bool:
        if self.size == 1:
            return self._ban_all(step)
        step.ban(
            [
                (row, token)
                for row, tokens in enumerate(step.tokens)
                for token in self.followers[row].get(tuple(tokens[1 - self.size :]), ())
            ]
        )
        return True


class _Ban(Rule):
    """Bans given tokens at some lengths."""

    def __init__(
        self, processor: Any, tokens: Tensor, at: Callable[[Any, int], bool] = lambda _, __: True
    ) -> None:
        super().__init__(processor)
        self.shared, self.at = sorted(set(tokens.tolist())), at

    def apply(self, step: Step) -> bool:
        if self.at(self.processor, step.input_ids.shape[1]):
            step.values[step.lists.shared[:, self.columns]] = -math.inf
        return True


class _Force(_Ban):
    """Gives given tokens the logit 0 at some lengths, and all others -inf."""

    def fits(self, rows: int, vocabulary: int) -> bool:
        return all(0 <= i < vocabulary for i in self.shared)

    def apply(self, step: Step) -> bool:
        if not self.at(self.processor, step.input_ids.shape[1]):
            return True
        step.values.fill_(-math.inf)
        step.values[step.lists.shared[:, self.columns]] = 0.0
        forced = torch.zeros(step.scores.shape[1], dtype=torch.bool)
        forced[self.shared] = True
        step.allowed = _words(forced).expand(len(step.tokens), -1).contiguous()
        return True


class _Decay(Rule):
    """Raises the logits of the end tokens, step by step."""

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        self.shared = sorted(set(processor.eos_token_id.tolist()))

    def fits(self, rows: int, vocabulary: int) -> bool:
        return all(0 <= i < vocabulary for i in self.shared)

    def apply(self, step: Step) -> bool:
        past = step.input_ids.shape[1] - self.processor.regulation_start
        if past > 0:
            places = step.lists.shared[:, self.columns]
            x = step.values[places]
            raised = torch.abs(x) * (pow(self.processor.regulation_factor, past) - 1)
            step.values[places] = x + raised.masked_fill(~torch.isfinite(x), 0.0)
        return True


class Prefix(Rule):
    """Allows the tokens that a function names.

    Attributes:
        named: what the function named at this step, by row.
    """

    named: list[Any]

    def ask(self, input_ids: Tensor) -> None:
        """Asks the function once for each row."""
        function = self.processor._prefix_allowed_tokens_fn  # noqa: SLF001, its only address
        self.named = [function(row, tokens) for row, tokens in enumerate(input_ids)]

    def again(self) -> LogitsProcessor:
        """Returns the processor with the answers instead of the function."""
        return PrefixConstrainedLogitsProcessor(lambda row, _: self.named[row], 1)

    def apply(self, step: Step) -> bool:
        if step.allowed is not None or any(len(tokens) == 0 for tokens in self.named):
            return False
        words = []
        for row, tokens in enumerate(self.named):
            start, end = step.lists.offsets[row : row + 2].tolist()
            logits = step.scores[row].clone()
            logits[step.lists.ids[start:end].long()] = step.values[start:end]
            allowed = torch.zeros(len(logits), dtype=torch.bool)
            allowed[tokens] = True
            # transformers raises a row to 0 where all that is allowed is -inf
            if not -math.inf < logits[allowed].amax() or not logits.amax() < math.inf:
                return False
            words.append(_words(allowed))
        step.allowed = torch.stack(words)
        return True


def _words(allowed: Tensor) -> Tensor:
    """Returns one bit for each token, 32 a word: (V / 32 rounded up,), int32."""
    bits = torch.nn.functional.pad(allowed, (0, -len(allowed) % 32)).view(-1, 32).int()
    return (bits << torch.arange(32, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def _is_shorter(processor: Any, length: int) -> bool:
    return length < int(processor.min_length)


def _is_new(processor: Any, length: int) -> bool:
    return length - int(processor.prompt_length_to_skip) < int(processor.min_new_tokens)


RULES: dict[type[LogitsProcessor], Callable[[Any], Rule]] = {
    SequenceBiasLogitsProcessor: _Bias,
    NoBadWordsLogitsProcessor: _Bias,
    RepetitionPenaltyLogitsProcessor: _Penalty,
    EncoderRepetitionPenaltyLogitsProcessor: _EncoderPenalty,
    NoRepeatNGramLogitsProcessor: _NGrams,
    EncoderNoRepeatNGramLogitsProcessor: _EncoderNGrams,
    MinLengthLogitsProcessor: lambda p: _Ban(p, p.eos_token_id, _is_shorter),
    MinNewTokensLengthLogitsProcessor: lambda p: _Ban(p, p.eos_token_id, _is_new),
    SuppressTokensLogitsProcessor: lambda p: _Ban(p, p.suppress_tokens),
    SuppressTokensAtBeginLogitsProcessor: lambda p: _Ban(
        p, p.begin_suppress_tokens, lambda q, length: bool(length == q.begin_index)
    ),
    ForcedBOSTokenLogitsProcessor: lambda p: _Force(
        p, torch.tensor([p.bos_token_id]), lambda _, length: length == 1
    ),
    ForcedEOSTokenLogitsProcessor: lambda p: _Force(
        p, p.eos_token_id, lambda q, length: bool(length == q.max_length - 1)
    ),
    ExponentialDecayLengthPenalty: _Decay,
    PrefixConstrainedLogitsProcessor: Prefix,
}
