"""The report of a trade-off study in Markdown, with numbers and signs from the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastadapt.study.files import write_whole
from fastadapt.study.markdown import Estimate, flow, listed, number, shell, shown, sign, table
from fastadapt.study.tradeoff.correlations import CORPUS
from fastadapt.study.tradeoff.plots import USER, is_reliable

Results = Mapping[str, Any]

# Of the paper's released figures and history: of which reward and level, the value, of what.
# "judged" is the user's reward, or the implicit one where there is none.
_PUBLISHED = (
    ("judged", "string", 0.23, "Strings, RLHF pair, a reward model"),
    ("judged", "adaptors", -0.93, "Corpora, RLHF pair, a reward model"),
    ("implicit", "string", -0.45, "Strings, DPO pair, log p₊ − log p with its sign put right"),
    ("implicit", "adaptors", 0.97, "Corpora, DPO pair, log p₊ − log p with its sign put right"),
    ("released", "string", 0.45, "Strings, DPO pair, as released"),
    ("released", "adaptors", -0.97, "Corpora, DPO pair, as released"),
)
_CLOSE = 0.1  # how well r has to be predicted for the report to conclude from it
_MOSTLY = 90  # per cent of strings that are cut, from which their length hardly varies
_REWARDS = {
    "implicit": "log p₊ − log p",
    "flipped": "the same, sign flipped",
    "released": "as the released code: log p − log p₊, p without the prompt",
}


def write_report(results: Results, folder: Path, figures: Sequence[str]) -> Path:
    """Writes `report.md` beside the figures.

    Args:
        results: what `tradeoff.run_study` returned; "remarks", a list of paragraphs, if there
            are any, stand below the command.
        folder: of the report and the figures.
        figures: names of the figures.

    Returns:
        Path: of the report.
    """
    own = [name for name in figures if name == USER]  # of the reward that the report is about
    figures = [*own, *(name for name in figures if name != USER)]
    shown_figures = [f"![{name.replace('_', ' ')}]({name}.png)" for name in figures]
    first = len(own) + 1
    sections = [
        _head(results),
        _found(results),
        *shown_figures[:first],
        _correlations(results),
        *shown_figures[first : first + 1],
        _typical(results),
        _normalisation(results),
        *shown_figures[first + 1 :],
        _defects(results),
        _paper(results),
        _unknown(results),
        _adaptors(results),
    ]
    path = folder / "report.md"
    page = "\n\n".join(sections) + "\n"
    write_whole(path, lambda place: place.write_text(page, encoding="utf-8"))
    return path


def _head(results: Results) -> str:
    """Writes what was done."""
    names, prompts, settings = (results[key] for key in ("names", "prompts", "settings"))
    counts, adaptors = results["counts"], len(results["adaptors"])
    left_out = {**counts["excluded"], "reward not finite": counts["reward not finite"]}
    systems = [
        "without a system prompt" if system is None else f"with the system prompt “{system}”"
        for system in (names["system"], names["prior_system"])
    ]
    sampled = f"""Aligned model p₊: {names["model"]} {systems[0]}. Prior p: {names["prior"]}
        {systems[1]}. {prompts["used"]} prompts ({prompts["read"]} read; {prompts["duplicates"]}
        duplicates, {prompts["too long"]} too long, {prompts["empty"]} empty), {adaptors} adaptors,
        {settings["strings"]} strings of each and prompt, at most {settings["max_new_tokens"]}
        tokens, seed {settings["seed"]}: {counts["of the grid"]:,} strings of the grid,
        {counts["strings"]:,} in all, {counts["tokens"]:,} tokens. Strings left out:
        {", ".join(f"{reason} {n}" for reason, n in left_out.items())}. **Tokens outside the
        support that they are scored under: {counts["violations"]}.**
        {100 * counts["finished"]:.1f} % of the strings end by themselves, the others are cut at
        {settings["max_new_tokens"]} tokens: all distributions below are distributions of strings
        cut so."""
    own = f"The reward is {names['reward']}. Beside it stands the implicit reward,"
    reward = f"""{own if "user" in results["correlations"] else "The reward is"} log p₊ − log p, of
        which p₊ is the exact RLHF optimum with β = 1. Log p stands in it with a minus sign, so
        noise in log p alone would make the two go against each other. Intervals are 95 %, by a
        bootstrap that resamples whole prompts {settings["replicates"]:,} times; those of adaptors'
        means lean towards 0, since resampling adds noise to each mean.
        fastadapt {names["fastadapt"]}, torch {names["torch"]}, transformers
        {names["transformers"]}. Made by"""
    title = f"# The probability–quality trade-off: {names['model']}"
    remarks = [flow(remark) for remark in results.get("remarks", ())]
    made_by = shell(results["command"])
    return "\n\n".join([title, flow(sampled), flow(reward), made_by, *remarks])


def _mains(results: Results) -> list[str]:
    """Returns the rewards that the report is about: the user's, if any, and the implicit one."""
    return ["user", "implicit"] if "user" in results["correlations"] else ["implicit"]


def _label(results: Results, reward: str) -> str:
    """Returns the name of a reward."""
    return str(results["names"]["reward"]) if reward == "user" else _REWARDS[reward]


def _of_implicit(results: Results) -> str:
    """Says that a section is about the implicit reward alone."""
    if "user" not in results["correlations"]:
        return ""
    return f"This section is about the implicit reward, not about {_label(results, 'user')}."


def _found(results: Results) -> str:
    """Writes the findings."""
    mains, parts = _mains(results), ["## What was found"]
    for name in mains:
        parts += [f"### {_label(results, name)}"] if len(mains) > 1 else []
        parts.append(listed(_findings(results, name)))
    return "\n\n".join(parts)


def _findings(results: Results, name: str) -> list[str]:
    """Writes the findings about one reward."""
    found, identity = results["correlations"][name], results["identity"]
    string, adaptors, split = found["string"], found["adaptors"]["pooled"], found["split"]
    within = [sign(one) for one in string["within_adaptors"]]
    curve, implicit = found["curve"], name == "implicit"
    beside = ", where corpora of equal mean log p₊ would have −1" if implicit else ""
    lines = [
        f"""**Strings.** Over all strings r is {sign(string["pooled"]["pearson"])}:
        {shown(string["pooled"]["pearson"])} (ρ {shown(string["pooled"]["spearman"])}). Per token it
        is {shown(string["per_token"])}, with the length held constant
        {shown(string["length_partialled"])}.""",
        f"""**Within one adaptor** r is positive for {within.count("positive")}, negative for
        {within.count("negative")} and of undecided sign for {within.count("of undecided sign")} of
        {len(within)} adaptors.""",
        f"""**Between adaptors** r of the means is {sign(adaptors["pearson"])}:
        {shown(adaptors["pearson"])} (ρ {shown(adaptors["spearman"])}); the slope is
        {shown(adaptors["slope"], 4)} of reward for a nat of log p{beside}.""",
        f"""**Corpora.** Pooled over adaptors, corpora of N strings go from r =
        {number(curve["pearson"][0])} (N = 1, the strings' own, to
        {found["identity_at_1"]:.0e}) to {number(curve["pearson"][-1])} (N =
        {curve["sizes"][-1]:,}). Of the strings' variance
        {100 * split["share_between_log_prior"]:.1f} % (log p) and
        {100 * split["share_between_reward"]:.1f} % (reward) lies between adaptors; of the spread of
        the adaptors' means {100 * split["noise_in_between_log_prior"]:.1f} % and
        {100 * split["noise_in_between_reward"]:.1f} % is what finitely many strings give by
        chance.""",
    ]
    if implicit:
        lines.append(
            f"""**Identity.** Mean reward + mean log p = mean log p₊ on {identity["corpora"]}
            corpora, to {identity["error"]:.0e} nats. For this reward it holds by construction: it
            checks the sums, not the theory."""
        )
    return lines


def _correlations(results: Results) -> str:
    """Tabulates the correlations of every reward, then the main ones by temperature."""
    rows = []
    for name, found in results["correlations"].items():
        string, adaptors = found["string"], found["adaptors"]["pooled"]
        cells = [string["pooled"]["pearson"], string["pooled"]["spearman"], string["per_token"]]
        cells += [string["length_partialled"], adaptors["pearson"], adaptors["spearman"]]
        rows.append([_label(results, name), *map(shown, cells)])
    head = ["reward", "strings r", "ρ", "r per token", "r, length held", "adaptors r", "ρ"]
    parts, mains = [table(head, rows)], _mains(results)
    for name in mains:
        parts += [flow(f"By temperature, {_label(results, name)}:")] if len(mains) > 1 else []
        parts.append(_by_temperature(results["correlations"][name]))
    return "\n\n".join(["## Correlations of log p and the reward", *parts])


def _by_temperature(found: Results) -> str:
    """Tabulates one reward by temperature."""
    adaptors = found["adaptors"]["by_temperature"]
    nothing: Any = {"pearson": [None] * 3, "spearman": [None] * 3}
    rows = []
    for t, one in found["string"]["by_temperature"].items():
        both = (one, adaptors.get(t, nothing))
        rows.append([t, *(shown(b[k]) for b in both for k in ("pearson", "spearman"))])
    return table(["temperature", "strings r", "ρ", "adaptors r", "ρ"], rows)


def _typical(results: Results) -> str:
    """Writes about corpora of one adaptor, selected by their mean log p+."""
    found = results["typical"]
    rows = [
        [
            "any" if one["width"] is None else f"{one['width']:g}",
            number(one["pearson"]),
            number(one["predicted"]),
        ]
        for one in found
    ]
    known = [one for one in found if None not in (one["pearson"], one["predicted"])]
    gap = max((abs(one["pearson"] - one["predicted"]) for one in known), default=float("nan"))
    so = ", so it is the selection that makes the slope, whatever the size of the corpora"
    text = f"""{_of_implicit(results)} Corpora of {CORPUS} strings of one adaptor, kept if their
        mean log p₊ is within ε of the adaptor's; medians over the adaptors. Unselected they have
        the strings' correlation; selecting on the sum of the two quantities takes r from
        {number(found[0]["pearson"])} to {number(found[-1]["pearson"])}. A normal distribution of
        the means predicts that to {number(gap)}{so if gap < _CLOSE else ""}."""
    head = ["ε, in standard deviations of a corpus's mean", "r", "predicted"]
    return "\n\n".join(["## Typical corpora", flow(text), table(head, rows)])


def _normalisation(results: Results) -> str:
    """Writes about local and global normalisation."""
    adaptors, found = results["adaptors"], results["normalisation"]
    good = [one for one in adaptors if is_reliable(one)]
    poor = [one for one in adaptors if not is_reliable(one)]
    text = f"""{_of_implicit(results)} A decoder draws from the locally normalised distribution. The
        global one is reached by weights: every prompt's {found["pool"]:.0f} strings, whichever
        adaptor drew them, count for every adaptor whose support holds them. **For {len(good)} of
        {len(adaptors)} adaptors at least 5 strings of a prompt count in the median; only there is
        the global distribution known**, and not exactly: weighted means of few strings lean towards
        what was drawn, which no interval shows."""
    if good:
        gap = max(abs(one["global"][0] - one["chain"][0]) for one in good)
        text += f""" There the global mean of log p is {_moved(good, 0)}; that of the reward is
            {_moved(good, 1)} (at T = 1 without truncation the two distributions are one).
            Independent Metropolis–Hastings on the same strings agrees with the weights to
            {number(gap)} nats of mean log p."""
    if poor:
        effective = [one["effective"] for one in poor if one["effective"] is not None]
        text += f""" For the other {len(poor)} a median of {number(min(effective), 1)} to
            {number(max(effective), 1)} strings count, so their global means are those of a few
            strings and no finding."""
    correlation = found["correlation"]
    rest = f"""Over all adaptors r of the means is {shown(correlation["local"])} under the local
        distributions, from the same weights, and {shown(correlation["global"])} under the global
        ones; the second rests on the poor estimates too."""
    return "\n\n".join(["## Local and global normalisation", flow(text), flow(rest)])


def _moved(adaptors: Sequence[Results], which: int) -> str:
    """Says for how many adaptors a mean is higher or lower under the global distribution."""
    signs = [sign(one["shift"][which]) for one in adaptors]
    up, down = signs.count("positive"), signs.count("negative")
    return f"higher for {up}, lower for {down} and undecided for {len(signs) - up - down} of them"


def _defects(results: Results) -> str:
    """Writes what each defect of the released code changes."""
    adaptors, counts = results["adaptors"], results["counts"]
    string, means = {}, {}
    for name, found in results["correlations"].items():
        string[name] = shown(found["string"]["pooled"]["pearson"])
        means[name] = shown(found["adaptors"]["pooled"]["pearson"])
    lines = [
        f"""**Its chain never rejects**, so its corpora are the local ones. With the adaptor itself
        as proposal a chain would accept {_percentages(adaptors, "own_acceptance")} of the
        proposals, by adaptor.""",
        f"""**One chain runs over all prompts**, though log Z differs between them: as one pool,
        {_percentages(adaptors, "one_chain_effective")} of an adaptor's strings would count.""",
        f"""**Its target has T = 1 for every temperature.** Mean log p of the adaptors' targets
        spans {_span(adaptors, "fixed_target")} nats so, {_span(adaptors, "global")} under their own
        global distributions and {_span(adaptors, "local")} under the local ones, as far as the
        weights can tell.""",
        f"""**The sign of the implicit reward is flipped**: r of strings
        {string["implicit"]} becomes {string["flipped"]}, of adaptors {means["implicit"]} becomes
        {means["flipped"]}.""",
    ]
    if "released" in string:
        lines.append(
            f"""**And p is scored without the prompt**: with both, r of strings is
            {string["released"]} and of adaptors {means["released"]}."""
        )
    lines += [
        f"""**Top-k 50 is left on and not scored** ({one["name"]}): {100 * one["outside"]:.1f} % of
        the strings drawn without it hold a token that it removes; it moves mean log p by
        {shown(one["shift"][0], 1)} and the mean reward by {shown(one["shift"][1])}."""
        for one in results["hidden_top_k"]
    ]
    lines += [
        f"""**Log-probabilities are clamped at −25 a token**, which hides tokens outside their
        support. Here {counts["violations"]} of {counts["tokens"]:,} are: drawing and scoring decide
        by one rule on the same logits.""",
        """**Prompts are formatted twice** (two blanks where one was sampled with). Not repeated
        here: each side reads one context for all.""",
        """**Log p is summed over strings of different lengths.** The columns per token and with the
        length held constant above say how much of r that is.""",
    ]
    head = ["## What the released code's defects do here", flow(_of_implicit(results))]
    return "\n\n".join([*filter(None, head), listed(lines)])


def _paper(results: Results) -> str:
    """Compares signs with the published figures."""
    rows = []
    judged = _mains(results)[0]
    for published, level, value, what in _PUBLISHED:
        reward = judged if published == "judged" else published
        if reward not in results["correlations"]:
            continue
        ours = results["correlations"][reward][level]["pooled"]["pearson"]
        theirs, here = "positive" if value > 0 else "negative", sign(ours)
        verdict = "undecided" if here not in ("positive", "negative") else "agrees"
        verdict = "differs" if verdict == "agrees" and here != theirs else verdict
        rows.append([what, number(value), _label(results, reward), shown(ours), verdict])
    found = results["correlations"][judged]
    ours = {level: found[level]["pooled"]["pearson"] for level in ("string", "adaptors")}
    grows = _size(ours["adaptors"]) > _size(ours["string"])
    within = [sign(one) for one in found["string"]["within_adaptors"]]
    other = {"negative": "positive", "positive": "negative"}.get(sign(ours["adaptors"]))
    here = (
        f"""here {within.count(other)} of {len(within)} adaptors have within them the opposite sign
        of that between them"""
        if other
        else "here that between them is undecided"
    )
    text = f"""That the correlation is stronger between adaptors than among strings
        {"holds here too" if grows else "does not hold here"} ({_label(results, judged)}). In the
        paper's RLHF data r is positive within every adaptor and negative between them; {here}. The
        paper's models, strings and rewards are others, so values cannot be expected to agree; signs
        might."""
    head = ["published r", "value", "reward here", "r here", "sign"]
    return "\n\n".join(["## Beside the paper", table(head, rows), flow(text)])


def _size(found: Estimate) -> float:
    """Describes how strong a correlation is, 0 for none."""
    return abs(found[0] or 0.0)


def _unknown(results: Results) -> str:
    """Writes what this study does not show."""
    cut = 100 * (1 - results["counts"]["finished"])
    hardly = ", so length hardly varies" if cut >= _MOSTLY else ""
    few = [one for one in results["adaptors"] if not is_reliable(one)]
    lines = [f"What longer strings give: {cut:.0f} % of these are cut{hardly}."] if cut > 0 else []
    if few:
        lines.append(
            "The global distributions of the adaptors with few effective strings, and all that "
            "needs them."
        )
    if "user" in results["correlations"]:
        reward = _label(results, "user")
        lines.append(f"How well {reward} measures the quality of the texts as people see it.")
    else:
        optimal = """Whether a reward that people or a reward model give would behave so: p₊ is
            exactly optimal for the reward used here by definition."""
        quality = "The quality of the texts as people see it: no reward was given that measures it."
        lines = [optimal, *lines, quality]
    return "## What is not known\n\n" + listed(lines)


def _adaptors(results: Results) -> str:
    """Tabulates the adaptors under their own distributions, then under the global ones."""
    correlations = results["correlations"]
    within = correlations["implicit"]["string"]["within_adaptors"]
    has_user = "user" in correlations
    judged = iter(correlations["user"]["string"]["within_adaptors"] if has_user else ())
    local, globalised = [], []
    for one, r in zip(results["adaptors"], within, strict=True):
        row = [one["name"], str(one["strings"]), number(one["length"], 1), number(-one["log_q"], 1)]
        row += [number(one["own"][0], 1), number(one["own"][1]), shown(r)]
        if has_user:
            row += (
                ["–", "–"] if one["user"] is None else [number(one["user"][1]), shown(next(judged))]
            )
        local.append(row)
        known = one["global"] if is_reliable(one) else [None, None]
        row = [one["name"], number(known[0], 1), number(known[1]), number(one["effective"], 1)]
        globalised.append([*row, number(one["own_acceptance"])])
    head, which = ["adaptor", "strings", "tokens", "−log q", "log p", "reward", "r within"], ""
    if has_user:
        reward = _label(results, "user")
        head += [reward, "r of it within"]
        which = f" Reward is the implicit one; the last two columns are of {reward}."
    rest = """Under the global distributions. Effective: strings of a prompt that count for it,
        median; below 5 no mean is given. Acceptance: of Metropolis–Hastings with the adaptor as
        proposal."""
    tables = [flow(f"Means of strings, in nats.{which}"), table(head, local)]
    head = ["adaptor", "log p", "reward", "effective", "acceptance"]
    return "\n\n".join(["## The adaptors", *tables, flow(rest), table(head, globalised)])


def _percentages(adaptors: Sequence[Results], key: str) -> str:
    """Formats the range of a share over the adaptors."""
    values = [100 * one[key] for one in adaptors if one[key] is not None]
    return f"{min(values):.0f} to {max(values):.0f} %" if values else "–"


def _span(adaptors: Sequence[Results], key: str) -> str:
    """Formats the range of the adaptors' means of log p."""
    values = [one[key][0] for one in adaptors if one[key][0] is not None]
    return number(max(values) - min(values), 1) if values else "–"
