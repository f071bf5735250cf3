"""A history across steps gives what is made anew from all of its tokens, bit for bit."""

import copy
import functools
import pickle
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastadapt import Adaptor, Edits, History, Sequences, filter_logits, reference

INF = float("inf")
COUNTS = ("output", "all", "padded")
Ask = Callable[..., object]


def number_or_each(draw: random.Random, rows: int, choices: tuple) -> float | Tensor:
    """One of the choices, or one for each row."""
    if draw.random() < 0.5:
        return draw.choice(choices)
    return torch.tensor([draw.choice(choices) for _ in range(rows)])


def a_rule(draw: random.Random, rows: int, v: int) -> tuple[str, Ask]:
    """A question to a history, by name."""
    windows = (1, 2, 3, 5, 17, 100)
    window = None if draw.random() < 0.4 else number_or_each(draw, rows, windows)
    counts = draw.choice(COUNTS)
    kind = draw.choice(["edits", "edits", "ban_ngrams", "dry", "dry", "sequences", "min_length"])
    given: dict = {}
    if kind == "edits":
        given = {
            "repetition": number_or_each(draw, rows, (1.0, 1.3, 0.7)),
            "presence": number_or_each(draw, rows, (0.0, 0.4, -0.3)),
            "frequency": number_or_each(draw, rows, (0.0, 0.1, -0.2)),
            "repeats": draw.choice(COUNTS[:2]),
            "counts": draw.choice(COUNTS[:2]),
            "window": window,
        }
    elif kind == "ban_ngrams":
        given = {"n": draw.randrange(1, 6), "counts": counts}
    elif kind == "dry":
        given = {
            "multiplier": number_or_each(draw, rows, (0.8, 0.0, 2.5)),
            "base": draw.choice([1.75, 1.0, 1.3, 30.0]),
            "allowed_length": draw.randrange(1, 5),
            "breakers": draw.sample(range(v), draw.choice([0, 0, 1])),
            "window": window,
            "longest": draw.choice([None, 4, 9]),
            "counts": counts,
        }
    elif kind == "sequences":
        given = {"counts": counts}
        made = [some_sequences(draw, v) for _ in range(rows)]
        together = draw.random() < 0.5

        def ask(history: History, biases: list = made, together: bool = together) -> object:
            ours = isinstance(history, History)
            if together:
                return history.sequences(biases[0], **given)
            return history.sequences([Sequences(x) for x in biases] if ours else biases, **given)

        return f"sequences {made} {together}", ask
    else:
        eos = draw.choice([1, [2, 0], [1, 1, 3]])
        n = number_or_each(draw, rows, (0, 2, 9, 40))
        given = {"eos": eos, "n": n, "counts": counts}
    return f"{kind} {given}", lambda history: getattr(history, kind)(**given)


def some_sequences(draw: random.Random, v: int) -> dict[tuple[int, ...], float]:
    """Sequences of few ids, with numbers whose sums depend on their order."""
    lengths = [draw.randrange(1, 4) for _ in range(draw.randrange(1, 12))]
    ids = [tuple(draw.randrange(v) for _ in range(n)) for n in lengths]
    return {one: draw.choice([-INF, 0.1, 1e8, -1e8, 3.3, -0.7]) for one in ids}


def padded(draw: random.Random, rows: int, v: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, and of each row its start, length and prompt."""
    t = draw.choice([0, 1, 5, 30, 90])
    tokens = torch.tensor([[draw.randrange(v) for _ in range(t)] for _ in range(rows)])
    start = [draw.randrange(t + 1) if draw.random() < 0.6 else 0 for _ in range(rows)]
    length = [draw.randrange(t - s + 1) if draw.random() < 0.5 else t - s for s in start]
    prompt = [draw.choice([0, n, draw.randrange(n + 1)]) for n in length]
    made = (torch.tensor(x, dtype=torch.int64) for x in (start, length, prompt))
    return tokens.reshape(rows, t).long(), *made


def assert_same(got: Edits, expected: Edits) -> None:
    assert torch.equal(got.ids, expected.ids)
    assert torch.equal(got.offsets, expected.offsets)
    assert torch.equal(got.columns, expected.columns)
    assert got.largest == (int(got.ids.max()) if len(got.ids) else -1)


@pytest.mark.parametrize("seed", range(120))
def test_any_history(seed: int) -> None:
    """Questions and changes in any order: what is kept from step to step is never out of date."""
    draw = random.Random(seed)
    v, rows = draw.choice([2, 3, 5, 40]), draw.choice([1, 2, 3])
    given = padded(draw, rows, v)
    ours, plain = History(*given), reference.History(*given)
    rules = [a_rule(draw, rows, v) for _ in range(5)]
    for _ in range(30):
        change = draw.choice(["one", "one", "one", "some", "many", "keep", "extend"])
        if change in ("one", "some", "many"):
            k = {"one": 1, "some": draw.randrange(1, 5), "many": 80}[change]
            tokens = torch.tensor([[draw.randrange(v) for _ in range(k)] for _ in range(rows)])
            lengths = number_or_each(draw, rows, (0, k, draw.randrange(k + 1)))
            for history in (ours, plain):
                history.append(tokens[:, 0] if k == 1 else tokens, lengths)
        elif change == "keep":  # the same number of rows, so that the rules stay
            order = [draw.randrange(rows) for _ in range(rows)]
            ours.keep(order), plain.keep(order)
        else:
            given = padded(draw, 1, v)
            ours.extend(History(*given)), plain.extend(reference.History(*given))
            order = draw.sample(range(rows + 1), rows)
            ours.keep(torch.tensor(order)), plain.keep(order)
        for name, ask in draw.sample(rules, 3):
            draft = torch.tensor([[draw.randrange(v) for _ in range(3)] for _ in range(rows)])
            if draw.random() < 0.3:
                assert_same(ask(ours.with_drafts(draft)), ask(plain.with_drafts(draft)))
            try:
                assert_same(ask(ours), ask(plain))
            except AssertionError:
                raise AssertionError(f"seed {seed}: {name}") from None


@pytest.mark.parametrize("period", [1, 2, 7])
def test_a_loop(period: int) -> None:
    """Where all repeats: as many matches as tokens, and lengths whose powers no float holds."""
    tokens = torch.arange(period).repeat(900 // period)[None]
    ours, plain = History(tokens[:, :500]), reference.History(tokens[:, :500])
    for at in range(500, 512):
        ours.append(tokens[:, at]), plain.append(tokens[:, at])
        for ask in (
            functools.partial(History.dry, multiplier=0.8, base=1.75),
            functools.partial(History.dry, multiplier=0.8, base=1.0, allowed_length=3),
            functools.partial(History.dry, multiplier=1e6, base=30.0, allowed_length=1),
        ):
            again = getattr(reference.History, ask.func.__name__)
            assert_same(ask(ours), again(plain, **ask.keywords))
    assert ours.dry(1e6, base=30.0, allowed_length=1).columns.min() == -INF


def test_many_tokens_of_a_large_vocabulary() -> None:
    """Enough to be sorted by digits, to let every table grow, and to share rows among threads."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 300, (3, 9000), generator=generator) ** 2 * 1000 + 5
    tokens[1] = tokens[1] % 11
    prompts = torch.tensor([2000, 100, 0])
    ours = History(tokens[:, :2000], prompt_length=prompts)
    for at in range(2000, 9000, 1000):
        ours.append(tokens[:, at : at + 1000])
        for row in range(3):
            ids, times = tokens[row, : at + 1000].unique(return_counts=True)
            edits = ours.edits(frequency=1.0, counts="all")
            begin, end = edits.offsets[row], edits.offsets[row + 1]
            assert torch.equal(edits.ids[begin:end].long(), ids)
            assert torch.equal(edits.columns[2, begin:end], -times.float())
    anew = History(tokens, prompt_length=prompts)
    for ask in (
        lambda h: h.edits(repetition=1.1, presence=0.5, window=4000),
        lambda h: h.ban_ngrams(3),
        lambda h: h.dry(0.8),
    ):
        expected = ask(anew)
        assert len(expected.ids) > 0
        assert_same(ask(ours), expected)


def test_threads_change_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (8, 4096), generator=generator)
    threads = torch.get_num_threads()
    lists = []
    for n in (1, 4):
        torch.set_num_threads(n)
        history = History(tokens)
        lists.append([history.edits(repetition=2.0), history.ban_ngrams(3), history.dry(1.0)])
    torch.set_num_threads(threads)
    for one, four in zip(*lists, strict=True):
        assert_same(one, four)


def test_drafts_change_nothing() -> None:
    """The history does not follow drafts, of which a view has a copy."""
    history = History(torch.tensor([[1, 2, 3, 1, 2], [4, 4, 4, 4, 4]]))
    asks = (
        lambda h: h.edits(repetition=2.0, window=3),
        lambda h: h.ban_ngrams(2),
        lambda h: h.dry(1.0, allowed_length=1),
    )
    before = [ask(history) for ask in asks]
    draft = torch.tensor([[3, 1], [4, 5]])
    view = history.with_drafts(draft)
    draft.zero_()  # it has a copy
    for ask, edits in zip(asks, before, strict=True):
        ask(view)
        assert_same(ask(history), edits)
    assert view.rows == 6 and history.rows == 2 and history.lengths.tolist() == [5, 5]
    assert repr(view) == "History(2 rows, 10 tokens, drafts of 2)"
    expected = view.ban_ngrams(2)
    history.append(torch.tensor([3, 5]))
    view = history.with_drafts(torch.tensor([[3, 1], [4, 5]]))
    assert not torch.equal(view.ban_ngrams(2).ids, expected.ids)
    # 1 2 3 1 2 3, where 1 follows 3; with 3 also 3; with 3 and 1 what follows 1. Then 4 4 4 4 4 5
    lists = [[1], [1, 3], [2], [], [4, 5], [4]]
    assert view.ban_ngrams(2).ids.tolist() == [i for ids in lists for i in ids]
    assert history.with_drafts(torch.empty(2, 0, dtype=torch.int64)).rows == 2


def test_lists_add_up() -> None:
    """Penalties, a bias before and bans are one list, whose result is that of one after another."""
    history = History(torch.tensor([[3, 1, 3]]), prompt_length=1)
    bias = Edits.from_rows([{3: 0.5, 6: -1.0}], "pre")
    penalties = history.edits(repetition=1.5, presence=0.1, frequency=0.2)
    bans = history.ban_ngrams(2) + history.min_length(0, 5) + history.sequences({(3, 5): -INF})
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))
    expected = logits.clone()
    for edits in (bias, penalties, bans):
        expected = filter_logits(expected, Adaptor(), edits=edits)
    got = filter_logits(logits, Adaptor(), edits=bias + penalties + bans)
    assert torch.equal(got, expected)
    assert got[0, [0, 1, 5]].tolist() == [-INF] * 3 and got[0, [2, 3, 4, 6, 7]].isfinite().all()


def test_of_llama_cpp_and_dry_add_up() -> None:
    """Its one subtraction leaves a place for DRY's."""
    history = History(torch.tensor([[3, 1, 3, 1]]))
    both = history.edits(repetition=1.5, presence=0.1, frequency=0.2, counts="all")
    both = both + history.dry(0.8, allowed_length=1)
    logits = torch.ones(1, 4)
    two = torch.tensor(1.0) / 1.5 - (2 * torch.tensor(0.2) + torch.tensor(0.1))
    expected = torch.stack([torch.tensor(1.0), two, torch.tensor(1.0), two - 0.8 * 1.75])
    assert torch.equal(filter_logits(logits, Adaptor(), edits=both)[0], expected)


def test_rows_come_and_go() -> None:
    history = History(torch.tensor([[1, 2], [3, 4]]), prompt_length=1)
    history.edits(frequency=1.0)
    history.extend(history)
    history.keep([3, 0, 0])
    history.append(torch.tensor([4, 5, 2]))
    assert history.edits(frequency=1.0).ids.tolist() == [4, 2, 5, 2]
    assert history.edits(frequency=1.0).columns[2].tolist() == [-2.0, -1.0, -1.0, -2.0]
    history.keep([])
    assert history.rows == 0 and history.ban_ngrams(1).rows == 0
    assert repr(history) == "History(0 rows, 0 tokens)"


def test_tokens_of_any_integers_and_strides() -> None:
    tokens = torch.arange(12).view(3, 4)
    expected = History(tokens).edits(repetition=2.0)
    for same in (tokens.int(), tokens.T.contiguous().T, tokens.to(torch.uint8)):
        assert_same(History(same).edits(repetition=2.0), expected)


ONE = History(torch.tensor([[1, 2], [3, 4]]))
PAIR = torch.ones(1, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: History([[1]]), TypeError, "tokens: expected a tensor of integers, got list"),
        (
            lambda: History(torch.zeros(1, 2)),
            TypeError,
            "tokens: expected integers, got",
        ),
        (lambda: History(torch.tensor([1])), ValueError, r"tokens: expected shape \(N, T\)"),
        (
            lambda: History(torch.tensor([[-1]])),
            ValueError,
            r"tokens: expected ids in \[0, 2147",
        ),
        (lambda: History(torch.tensor([[2**31]])), ValueError, r"got 2147483648"),
        (
            lambda: History(PAIR, start=3),
            ValueError,
            "start: expected 0 to 2, go",
        ),
        (
            lambda: History(PAIR, 1, 2),
            ValueError,
            "length: expected 0 to 1, got",
        ),
        (
            lambda: History(PAIR, 1, 1, 2),
            ValueError,
            "prompt_length: expected 0",
        ),
        (
            lambda: History(torch.ones(2, 1).long(), torch.tensor([0])),
            ValueError,
            r"start: expected shape \(2,\), got \(1,\)",
        ),
        (
            lambda: ONE.append(torch.tensor([1])),
            ValueError,
            r"tokens: expected shape \(2,\) or",
        ),
        (lambda: ONE.append(torch.tensor([1, -5])), ValueError, "got -5"),
        (
            lambda: ONE.append(torch.tensor([1, 5]), 2),
            ValueError,
            "lengths: expected 0 to 1",
        ),
        (lambda: ONE.keep([0, 2]), ValueError, "rows: expected 0 to 1, got 2"),
        (lambda: ONE.keep([-1]), ValueError, "rows: expected 0 to 1, got -1"),
        (lambda: ONE.keep([[0]]), ValueError, r"rows: expected shape \(M,\), got \(1, 1\)"),
        (lambda: ONE.extend(torch.ones(2)), TypeError, "other: expected a History, got Tensor"),
        (lambda: ONE.edits(repetition=0), ValueError, "repetition: expected a value > 0, got 0"),
        (
            lambda: ONE.edits(repetition=torch.tensor([1.0, INF])),
            ValueError,
            "repetition: expected a finite value, got inf",
        ),
        (lambda: ONE.edits(presence=float("nan")), ValueError, "presence: expected a finite"),
        (lambda: ONE.edits(presence="1"), TypeError, "presence: expected a number, got '1'"),
        (lambda: ONE.edits(counts="padded"), ValueError, "counts: expected one of output, all,"),
        (lambda: ONE.edits(repeats="prompt"), ValueError, "repeats: expected one of output, all,"),
        (lambda: ONE.edits(window=0), ValueError, "window: expected at least 1, got 0"),
        (
            lambda: ONE.edits(window=torch.tensor([1, 0])),
            ValueError,
            "window: .* at least 1, got 0 in",
        ),
        (
            lambda: ONE.edits(frequency=torch.ones(3)),
            ValueError,
            r"frequency: expected shape \(2,\), got \(3,\)",
        ),
        (
            lambda: ONE.edits(frequency=torch.ones(2).long()),
            TypeError,
            "frequency: expected a number or a tensor of floats, got torch.int64",
        ),
        (lambda: ONE.edits(presence=-1e39), ValueError, r"presence: expected -1e\+28 to 1e\+28"),
        (lambda: ONE.edits(repetition=1e-46), ValueError, "repetition: expected 1e-28 to"),
        (
            lambda: ONE.edits(frequency=torch.tensor([0.0, 1e30])),
            ValueError,
            "frequency: expected",
        ),
        (lambda: ONE.sequences({(5,): 1e39}), ValueError, r"sequences\[\(5,\)\]: expected -1e"),
        (lambda: ONE.dry(1e39), ValueError, "multiplier: expected 0 to"),
        (lambda: ONE.ban_ngrams(0), ValueError, "n: expected at least 1, got 0"),
        (lambda: ONE.ban_ngrams(2, counts="prompt"), ValueError, "counts: expected one of"),
        (lambda: ONE.dry(-1), ValueError, "multiplier: expected a value >= 0, got -1"),
        (
            lambda: ONE.dry(torch.tensor([1.0, -1.0])),
            ValueError,
            "multiplier: expected a value >= 0, got -1",
        ),
        (lambda: ONE.dry(1, base=0.5), ValueError, "base: expected a value >= 1, got 0.5"),
        (lambda: ONE.dry(1, allowed_length=0), ValueError, "allowed_length: expected 1"),
        (lambda: ONE.dry(1, breakers=["."]), TypeError, "breakers: expected an integer, got '.'"),
        (
            lambda: ONE.sequences({(): 1.0}),
            ValueError,
            r"sequences: expected one id or more",
        ),
        (lambda: ONE.sequences({3: 1.0}), TypeError, "sequences: expected tuples of ids, got int"),
        (lambda: ONE.sequences({(3,): INF}), ValueError, r"sequences\[\(3,\)\]: expected a finite"),
        (lambda: ONE.sequences({(-3,): 1.0}), ValueError, "sequences: expected 0 to 2147483647"),
        (lambda: ONE.sequences([{}, {}]), TypeError, "biases: expected Sequences, got dict"),
        (
            lambda: ONE.sequences([Sequences({})]),
            ValueError,
            "biases: expected Sequences of 2",
        ),
        (lambda: ONE.sequences(None), TypeError, "biases: expected a mapping, Sequences or"),
        (lambda: ONE.min_length([1.5], 2), TypeError, "eos: expected an integer, got 1.5"),
        (lambda: ONE.min_length(1, -2), ValueError, "n: expected at least 0, got -2"),
        (
            lambda: ONE.with_drafts(torch.tensor([[1]])),
            ValueError,
            r"draft: expected shape \(2, K\), got \(1, 1\)",
        ),
        (
            lambda: ONE.with_drafts(torch.tensor([[1], [-2]])).ban_ngrams(2),
            ValueError,
            "draft: expected ids in",
        ),
        (
            lambda: ONE.with_drafts(torch.tensor([[1], [2]])).append(torch.tensor([1, 2])),
            RuntimeError,
            "append: expected a History without drafts",
        ),
    ],
)
def test_what_is_wrong(call: Callable[[], object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert ONE.lengths.tolist() == [2, 2]  # and nothing was appended


@pytest.mark.parametrize("change", ["append", "keep", "extend"])
def test_lists_of_drafts_are_of_the_rows_they_were_made_for(change: str) -> None:
    history = History(torch.tensor([[1, 2], [3, 4]]))
    view = history.with_drafts(torch.tensor([[5], [6]]))
    assert len(view.edits(repetition=2.0).ids) == 10
    given = {"append": torch.tensor([7, 8]), "keep": [1, 0], "extend": history}[change]
    getattr(history, change)(given)
    with pytest.raises(RuntimeError, match="with_drafts: expected rows as they were"):
        view.edits(repetition=2.0)


def test_what_stands_behind_the_lengths_of_drafts_is_not_read() -> None:
    history = History(torch.tensor([[1, 2], [3, 4]]))
    view = history.with_drafts(torch.tensor([[5, -1], [6, 7]]), torch.tensor([1, 2]))
    edits = view.edits(repetition=2.0)
    rows = [edits.ids[a:b].tolist() for a, b in edits.offsets.unfold(0, 2, 1).tolist()]
    assert rows[:2] == [[1, 2], [1, 2, 5]] and rows[3:] == [[3, 4], [3, 4, 6], [3, 4, 6, 7]]


def test_more_tokens_than_there_are_cost_nothing() -> None:
    """Numbers that a client may send."""
    history = History(torch.tensor([[1, 2, 1]]))
    assert len(history.ban_ngrams(10**12).ids) == 0
    assert len(history.dry(1.0, allowed_length=2**31).ids) == 0
    history.append(torch.tensor([2]))
    assert history.ban_ngrams(3).ids.tolist() == [1]


def pickled(made: History) -> History:
    return pickle.loads(pickle.dumps(made))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled], ids=lambda f: f.__name__)
def test_copies_are_histories_of_their_own(copied: Callable[[History], History]) -> None:
    history = History(torch.tensor([[0, 7, 5, 7], [1, 2, 1, 9]]), torch.tensor([1, 0]), 3, 2)
    history.append(torch.tensor([5, 2]))
    other = copied(history)
    history.append(torch.tensor([5, 2]))
    assert other.lengths.tolist() == [4, 4] and history.lengths.tolist() == [5, 5]
    other.append(torch.tensor([5, 2]))
    for counts in ("output", "all", "padded"):
        assert_same(other.ban_ngrams(2, counts=counts), history.ban_ngrams(2, counts=counts))
    assert len(copied(History(torch.empty(0, 0).long())).lengths) == 0
    made = Sequences({(5, 1): 0.5, (2,): -INF})
    assert_same(history.sequences(copied(made)), history.sequences(made))


def test_sequences_say_how_many() -> None:
    made = Sequences({(1,): 0.5, (1, 2): -INF})
    assert len(made) == 2 and repr(made) == "Sequences(2 sequences)"


def test_lists_are_checked_like_any() -> None:
    edits = History(torch.tensor([[1, 7]])).edits(repetition=2.0)
    with pytest.raises(ValueError, match=r"edits: expected ids in \[0, 6\), got 7"):
        filter_logits(torch.zeros(1, 6), Adaptor(), edits=edits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tokens_on_a_gpu() -> None:
    tokens = torch.tensor([[1, 2, 1], [3, 3, 3]])
    there, here = History(tokens.cuda()), History(tokens)
    there.append(tokens[:, 0].cuda()), here.append(tokens[:, 0])
    for ask in (lambda h: h.edits(repetition=2.0), lambda h: h.ban_ngrams(2)):
        assert ask(there).ids.is_cuda
        assert_same(ask(there).to("cpu"), ask(here))
