"""The tokens of a batch across the steps of a generation, and the edits that they ask for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.checks import instance, integer, integers, one_of
from fastadapt._ops.history import COUNTED, listed, rows_of
from fastadapt.sampling.edits import Edits
from fastadapt.sampling.numbers import ids_of, on_host, one_or_real, one_or_whole, real, whole
from fastadapt.sampling.sequences import Sequences


class History:
    """Tokens of N rows, to which each step appends, and penalties and bans of what is there.

    Every list it gives is `Edits` of the same rows for the next token; those of several calls add
    up with `+`. What a list is made from is kept from step to step: a step costs an insertion and a
    copy of the list, not a visit of the history. Nothing has the size of the vocabulary.

    `counts` says which tokens a rule reads: "output" those after the prompt, "all" prompt and
    output, "padded" also the padding before `start`, as some rules of transformers do. A row's
    `window` is the last of its tokens, prompt and output; those of them that count are read.

    Tokens of CUDA are copied to the host, which waits for them; lists are made there and moved to
    the device of the first tokens. One history serves one thread at a time.

    Examples:
        >>> history = History(torch.tensor([[0, 7, 5, 7]]), start=1)  # padded on the left
        >>> history.append(torch.tensor([5]))
        >>> history
        History(1 rows, 4 tokens)
        >>> logits = torch.ones(1, 9)
        >>> edits = history.edits(repetition=2.0, presence=0.25)
        >>> filter_logits(logits, Adaptor(), edits=edits + history.ban_ngrams(2))
        tensor([[1.0000, 1.0000, 1.0000, 1.0000, 1.0000, 0.2500, 1.0000,   -inf, 1.0000]])

    Args:
        tokens (Tensor): (N, T), integers, ids in [0, 2**31) up to the end of each row.
        start (int | Tensor): (N,) or one, integers in [0, T]: the padding on the left.
        length (int | Tensor | None): (N,) or one, integers: the tokens of each row from `start` on;
            what follows is not read. None: all.
        prompt_length (int | Tensor | None): (N,) or one, integers in [0, length]: those of them
            that are no output. None: all.

    Raises:
        TypeError: something else than a tensor of integers, or than integers.
        ValueError: another shape, a number out of its range, an id below 0 or of 2**31 and more.
    """

    _of: "History"  # of a view with drafts: whose rows they are

    def __init__(
        self,
        tokens: Tensor,
        start: int | Tensor = 0,
        length: int | Tensor | None = None,
        prompt_length: int | Tensor | None = None,
    ) -> None:
        """Copies the tokens."""
        instance("tokens", tokens, Tensor, "a tensor of integers")
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected shape (N, T), got {tuple(tokens.shape)}")
        n, t = tokens.shape
        first = whole("start", start, n, 0, t)
        rest = t - first
        count = rest if length is None else whole("length", length, n, 0, rest)
        if prompt_length is not None:
            prompt_length = whole("prompt_length", prompt_length, n, 0, count)
        prompt = count if prompt_length is None else prompt_length
        self._device = tokens.device
        self._draft: Tensor | None = None
        self._changes = 0
        self._rows = rows_of(on_host("tokens", tokens), first + count, first, first + prompt)

    @property
    def rows(self) -> int:
        """The number of rows; with drafts that of all their lists."""
        k = 0 if self._draft is None else self._draft.shape[1]
        return self._rows.rows() * (k + 1)

    @property
    def lengths(self) -> Tensor:
        """(N,), int64, on the CPU: the tokens of each row, prompt and output, without drafts."""
        of_rows = range(self._rows.rows())
        return torch.tensor([self._rows.length(r, 1) for r in of_rows], dtype=torch.int64)

    def append(self, tokens: Tensor, lengths: int | Tensor | None = None) -> None:
        """Adds one token to each row, or the first ones of several: in O(1) a token.

        Args:
            tokens (Tensor): (N,) or (N, K), integers, ids in [0, 2**31).
            lengths (int | Tensor | None): (N,) or one, integers in [0, K]: how many of each row;
                0 for a row that is done. None: all.

        Raises:
            TypeError, ValueError: as `History`; nothing is added then.
            RuntimeError: to a history with drafts.
        """
        self._refuse_drafts("append")
        instance("tokens", tokens, Tensor, "a tensor of integers")
        n = self._rows.rows()
        if tokens.dim() not in (1, 2) or tokens.shape[0] != n:
            raise ValueError(
                f"tokens: expected shape ({n},) or ({n}, K), got {tuple(tokens.shape)}"
            )
        k = 1 if tokens.dim() == 1 else tokens.shape[1]
        counts = k if lengths is None else whole("lengths", lengths, n, 0, k)
        self._rows.append(on_host("tokens", tokens), k, counts)
        self._changes += 1

    def keep(self, rows: Sequence[int] | Tensor) -> None:
        """Keeps some rows, in this order: without those that are done, or the parents of beams.

        Examples:
            >>> history = History(torch.tensor([[1, 2], [3, 4]]))
            >>> history.extend(History(torch.tensor([[5, 6, 7]])))  # a request comes
            >>> history.keep([0, 2])  # another one leaves
            >>> history.lengths
            tensor([2, 3])

        Args:
            rows (sequence of int | Tensor): (M,), integers in [0, N); one may be there twice.

        Raises:
            TypeError: no integers.
            ValueError: another shape, a row that is not there.
            RuntimeError: of a history with drafts.
        """
        self._refuse_drafts("keep")
        none = isinstance(rows, list | tuple) and not rows  # torch would make floats of them
        wanted = torch.empty(0, dtype=torch.int64) if none else integers("rows", rows)
        if wanted.dim() != 1:
            raise ValueError(f"rows: expected shape (M,), got {tuple(wanted.shape)}")
        self._rows.keep([integer("rows", i, 0, self._rows.rows() - 1) for i in wanted.tolist()])
        self._changes += 1

    def extend(self, other: "History") -> None:
        """Adds copies of another history's rows after these.

        Args:
            other (History): on the same device.

        Raises:
            TypeError: no history.
            ValueError: another device.
            RuntimeError: a history with drafts.
        """
        instance("other", other, History, "a History")
        self._refuse_drafts("extend")
        other._refuse_drafts("extend")
        if other._device != self._device:
            raise ValueError(f"other: expected one on {self._device}, got one on {other._device}")
        self._rows.extend(other._rows)
        self._changes += 1

    def with_drafts(self, draft: Tensor, lengths: int | Tensor | None = None) -> "History":
        """Returns the history of every position of a draft: its lists have N * (K + 1) rows.

        Row i * (K + 1) + j has row i's tokens and its first j draft tokens, as output. It is for
        lists alone, and until these rows change: then make it anew. Numbers for each row stay (N,).

        Examples:
            >>> history = History(torch.tensor([[1, 2, 1]]))
            >>> history.with_drafts(torch.tensor([[2, 1]])).ban_ngrams(2)
            Edits(3 rows, 3 ids)

        Args:
            draft (Tensor): (N, K), integers, ids in [0, 2**31).
            lengths (int | Tensor | None): (N,) or one, integers in [0, K]: how many drafts a row
                has. What stands behind them is not read; lists of rows behind them are of no use,
                but there. None: all.

        Raises:
            TypeError, ValueError: as `History`; ids out of range when lists are asked for.
            RuntimeError: of a history with drafts; when lists are asked for after a change.
        """
        self._refuse_drafts("with_drafts")
        instance("draft", draft, Tensor, "a tensor of integers")
        n = self._rows.rows()
        if draft.dim() != 2 or draft.shape[0] != n:
            raise ValueError(f"draft: expected shape ({n}, K), got {tuple(draft.shape)}")
        given = on_host("draft", draft).clone()
        if lengths is not None:
            counts = whole("lengths", lengths, n, 0, draft.shape[1])
            given[torch.arange(draft.shape[1]) >= counts[:, None]] = 0
        view = type(self).__new__(type(self))
        view._device, view._rows, view._draft = self._device, self._rows, given
        view._of, view._changes = self, self._changes
        return view

    def edits(
        self,
        *,
        repetition: float | Tensor = 1.0,
        presence: float | Tensor = 0.0,
        frequency: float | Tensor = 0.0,
        repeats: str = "all",
        counts: str = "output",
        window: int | Tensor | None = None,
    ) -> Edits:
        """Returns penalties of tokens that are there.

        Repetition divides (`Edits.penalty`); with `repeats="all"` it reads prompt and output.
        Frequency is subtracted times the count of the token, then presence once where it is there.
        With `counts="output"` these are two subtractions (`post`, `last`), as in vLLM; with "all"
        they read prompt and output and are one number (`post`), as in llama.cpp and
        text-generation-webui.

        Args:
            repetition (float | Tensor): in [1e-28, 1e28], or (N,). 1: none.
            presence (float | Tensor): in [-1e28, 1e28], or (N,).
            frequency (float | Tensor): in [-1e28, 1e28], or (N,).
            repeats (str): "output" or "all": what repetition reads.
            counts (str): "output" or "all": what presence and frequency read.
            window (int | Tensor | None): >= 1, or (N,): the last tokens that all three read.

        Raises:
            TypeError, ValueError: a wrong type, a number out of its range.
        """
        one_of("repeats", repeats, COUNTED[:2])
        one_of("counts", counts, COUNTED[:2])
        return self._listed(
            self._rows.penalties,
            COUNTED.index(counts),
            COUNTED.index(repeats),
            self._real("repetition", repetition, positive=True),
            self._real("presence", presence, signed=True),
            self._real("frequency", frequency, signed=True),
            self._window(window),
        )

    def ban_ngrams(self, n: int, *, counts: str = "all") -> Edits:
        """Returns bans of tokens that would complete n-grams which are there already.

        Of transformers' `no_repeat_ngram_size` with `counts="padded"`; the same where the padding
        has no token of the text.

        Args:
            n (int): >= 1; with 1 no token comes twice.
            counts (str): "output", "all" or "padded".

        Raises:
            TypeError, ValueError: a wrong type, a number out of its range.
        """
        return self._listed(self._rows.n_grams, _counted(counts), integer("n", n, 1))

    def dry(
        self,
        multiplier: float | Tensor,
        *,
        base: float = 1.75,
        allowed_length: int = 2,
        breakers: Sequence[int] = (),
        window: int | Tensor | None = None,
        longest: int | None = None,
        counts: str = "all",
    ) -> Edits:
        """Returns the penalties of DRY, of tokens that would continue a repeat.

        Where the last m tokens stand before, `multiplier * base ** (m - allowed_length)` is
        subtracted (`last`) from the token that came then, if m is at least `allowed_length`; m is
        the largest of all such places. A repeat begins after the last breaker, and no breaker is
        penalised. The power is cut where a float would overflow, as in llama.cpp.

        llama.cpp holds `multiplier` and `base` in float32: the same numbers give the same bits.
        text-generation-webui counts at most 50 tokens (`longest`), and padding (`counts`).

        Args:
            multiplier (float | Tensor): in [0, 1e28], or (N,). 0: none.
            base (float): in [1, 1e28].
            allowed_length (int): >= 1.
            breakers (sequence of int): ids of tokens.
            window (int | Tensor | None): >= 1, or (N,): the last tokens that are read.
            longest (int | None): >= 1: the most tokens of a repeat that count.
            counts (str): "output", "all" or "padded".

        Raises:
            TypeError, ValueError: a wrong type, a number out of its range.
        """
        if real("base", base) < 1:
            raise ValueError(f"base: expected a value >= 1, got {base}")
        return self._listed(
            self._rows.dry,
            _counted(counts),
            self._real("multiplier", multiplier),
            float(base),
            integer("allowed_length", allowed_length, 1, 2**31),
            ids_of("breakers", breakers),
            self._window(window),
            0 if longest is None else integer("longest", longest, 1),
        )

    def sequences(
        self,
        biases: Mapping[Sequence[int], float] | Sequences | Sequence[Sequences],
        *,
        counts: str = "all",
    ) -> Edits:
        """Returns additions (`pre`) to tokens that would complete sequences; of -inf, bad words.

        A sequence of one token always counts. transformers is `counts="padded"`; vLLM's bad words
        are "output".

        Examples:
            >>> history = History(torch.tensor([[1, 2], [2, 1]]))
            >>> history.sequences({(2, 3): -float("inf"), (4,): 1.0}).ids
            tensor([3, 4, 4], dtype=torch.int32)

        Args:
            biases (Mapping | Sequences | sequence of Sequences): as `Sequences` has them, or those
                of each row. A mapping is made ready at every call.
            counts (str): "output", "all" or "padded".

        Raises:
            TypeError, ValueError: as `Sequences`; another number of them than rows.
        """
        if isinstance(biases, Mapping):
            biases = Sequences(biases)
        given = [biases] if isinstance(biases, Sequences) else biases
        instance("biases", given, list | tuple, "a mapping, Sequences or a list of Sequences")
        for one in given:
            instance("biases", one, Sequences, "Sequences")
        n = self._rows.rows()
        if given is biases and len(given) != n:
            raise ValueError(f"biases: expected Sequences of {n} rows, got {len(given)}")
        return self._listed(self._rows.sequences, _counted(counts), [one._of for one in given])

    def min_length(
        self, eos: int | Sequence[int], n: int | Tensor, *, counts: str = "output"
    ) -> Edits:
        """Returns bans of the tokens that end a text, in rows of fewer than n tokens.

        transformers' `min_new_tokens` and vLLM's `min_tokens` are "output", transformers'
        `min_length` is "padded".

        Args:
            eos (int | sequence of int): ids.
            n (int | Tensor): >= 0, or (N,).
            counts (str): "output", "all" or "padded".

        Raises:
            TypeError, ValueError: a wrong type, a number out of its range.
        """
        ids = ids_of("eos", eos if isinstance(eos, Sequence) else [eos])
        least = one_or_whole("n", n, self._rows.rows(), 0)
        return self._listed(self._rows.min_length, _counted(counts), ids, least)

    def _listed(self, rule: Callable[..., tuple[int, int]], *numbers: Any) -> Edits:
        """Returns the lists of a rule."""
        if self._draft is not None and self._of._changes != self._changes:
            raise RuntimeError("with_drafts: expected rows as they were then, got changed ones")
        made = Edits._made(*listed(rule, self._draft, self.rows, *numbers))
        return made if self._device.type == "cpu" else made.to(self._device)

    def _refuse_drafts(self, what: str) -> None:
        """Raises for a view with drafts."""
        if self._draft is not None:
            raise RuntimeError(f"{what}: expected a History without drafts, got one with them")

    def _real(self, name: str, value: float | Tensor, **kind: bool) -> float | Tensor:
        """Returns a number, or one for each row."""
        return one_or_real(name, value, self._rows.rows(), **kind)

    def _window(self, window: int | Tensor | None) -> int | Tensor:
        """Returns a window, 0 for none, or one for each row."""
        return 0 if window is None else one_or_whole("window", window, self._rows.rows(), 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns what makes an equal one: a copy, or one in another process."""
        self._refuse_drafts("copy")
        rows = [self._rows.row(r) for r in range(self._rows.rows())]
        tokens = torch.zeros(len(rows), max((len(t) for t, *_ in rows), default=0)).long()
        for row, (of_row, *_) in zip(tokens, rows, strict=True):
            row[: len(of_row)] = torch.tensor(of_row, dtype=torch.int64)
        places = torch.tensor([(start, len(t), prompt) for t, start, prompt in rows]).view(-1, 3)
        start, end, prompt = places.long().unbind(1)
        return type(self), (tokens.to(self._device), start, end - start, prompt - start)

    def __repr__(self) -> str:
        """Says how many rows and tokens there are."""
        drafts = "" if self._draft is None else f", drafts of {self._draft.shape[1]}"
        return f"History({self._rows.rows()} rows, {int(self.lengths.sum())} tokens{drafts})"


def _counted(counts: str) -> int:
    """Returns the number of what counts."""
    one_of("counts", counts, COUNTED)
    return COUNTED.index(counts)
