"""Policy gradients on what a sampler drew: clipped ratios, REINFORCE, penalties on wrong samples.

Notation as in `formulas.py`: token t has the log-odds m_t, l_t = log p_t = -softplus(-m_t) under
the policy that is trained, and μ_t under the sampler; r_t = e^(l_t - μ_t) is their ratio and A_t
the advantage. With log-odds on the support that a token was drawn from (`linear_support_log_odds`,
`adapted_log_odds`), p_t is what the sampler truncated too, and r_t is 1 before the first update but
for roundings; with those of the whole vocabulary it is the kept mass.

Two kinds of tokens have no gradient, whatever the loss. One outside the support (m = -inf, which
logits made again can do) has no ratio: it adds 0, stays in the divisors of the means, and is
counted in the metric "tokens/outside_support". One alone in its support (m = +inf, p = 1) cannot
change.

Sources: Schulman et al. 2017, arXiv 1707.06347, eq. 7 (PPO); Shao et al. 2024, arXiv 2402.03300
(GRPO); Yu et al. 2025, arXiv 2503.14476 (DAPO: the higher bound, the mean over tokens); Liu et al.
2025, arXiv 2503.20783 (Dr. GRPO); Zheng et al. 2025, arXiv 2507.18071 (GSPO); MiniMax 2025, arXiv
2506.13585 (CISPO); Williams 1992 (REINFORCE); Ionides 2008 (truncated importance sampling); Zhu et
al. 2025, arXiv 2506.01347 (PSR, NSR, W-REINFORCE). The gradients stated here are derived, and
tested, in this package.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import instance, number, one_of
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import Rows, checked, mean_of, per_token
from fastadapt.losses.shapes import accumulated

POLICY_REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum")
RATIO_LEVELS = ("token", "sequence")
NEGATIVE_PENALTIES = ("log_prob", "unlikelihood")


def clipped_ratio_loss(
    sampled: Responses,
    advantages: Tensor,
    sampler_logps: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    level: str = "token",
    reduction: str = "token_mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the clipped surrogate of PPO and GRPO, and metrics of its ratios.

    `-min(r A, clip(r, 1 - ε, 1 + ε_high) A)` a token, and for A < 0 at most `δ |A|`.

    - level "token": r_t of each token. Where it is not clipped g_t = -r_t A_t (1-p_t) / N, else 0.
    - level "sequence": one ratio a response, the geometric mean of its tokens' (GSPO):
      s = exp((1/T) Σ_t (l_t - μ_t)), over those inside their support. With "sequence_mean"
      g_t = -s A (1-p_t) / (B T), else 0.

    - reduction "token_mean": `(1/N) Σ_t`, as in DAPO; with `sampled.total_tokens` B times the most
      tokens of a response it is that of Dr. GRPO.
    - "sequence_mean": the mean over responses of their token means, as in GRPO and GSPO.
    - "sequence_sum": the mean over responses of their sums.

    Clipped are A > 0 with r > 1 + ε_high and A < 0 with r < 1 - ε: there, and for A = 0, the
    gradient is exactly 0 however far off r is. Without δ nothing bounds r from above for A < 0.

    The metrics are made without reading the device, over what has a ratio: tokens, or responses at
    level "sequence". 0 where nothing has.

    - "ratios/mean"; "ratios/beyond_0.1": the share outside [0.9, 1.1].
    - "ratios/clipped": the share that is clipped; "ratios/clipped_low" of it by ε, the rest by
      ε_high or δ.
    - "kl/sampler": the mean over tokens of `r_t - 1 - log r_t` >= 0, nats; estimates KL(sampler ‖
      policy), without bias if both have one support (Schulman 2020, "k3").
    - "tokens/outside_support": how many tokens have m = -inf.

    Examples:
        >>> sampled = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> sampler_logps = torch.tensor([[-0.6931, -0.5]])
        >>> loss, metrics = clipped_ratio_loss(sampled, torch.tensor([1.0]), sampler_logps)
        >>> loss, metrics["ratios/clipped"]
        (tensor(-1.1000), tensor(0.5000))

    Args:
        sampled (Responses): the log-odds of the tokens that were drawn; see there for layouts,
            dtypes and divisors.
        advantages (Tensor): A, one a response, (B,), or at level "token" one a token, the shape of
            the log-odds (of a packed batch with N = B it is one a response); a float dtype. Held
            constant.
        sampler_logps (Tensor): μ, the shape of the log-odds, float32, float64, bfloat16 or float16,
            nats, finite where a token counts; such as `sample(...).logprobs`. Held constant.
        epsilon (float): ε in [0, 1].
        epsilon_high (float | None): ε_high >= 0; DAPO's "clip-higher" has 0.28. None: ε.
        delta (float | None): δ > 1 + ε_high, a bound of r for A < 0. None: none.
        level (str): as above.
        reduction (str): as above.

    Returns:
        tuple[Tensor, dict[str, Tensor]]: the loss, a scalar, float32 (float64 for float64
        log-odds), 0 with a graph if no token counts; and its metrics, detached scalars of its
        dtype. The loss is +inf where A < 0 and r overflows without δ.

    Raises:
        TypeError, ValueError: as `mle_loss`; inputs that do not fit the rows, an option out of its
            range.
    """
    one_of("level", level, RATIO_LEVELS)
    one_of("reduction", reduction, POLICY_REDUCTIONS)
    bounds = _checked_bounds(epsilon, epsilon_high, delta)
    tokens = _tokens(sampled)
    rows, inside = tokens.rows, tokens.inside
    token_ratios = tokens.log_ratios(sampled, sampler_logps)
    if level == "token":
        counted, log_ratios = inside, token_ratios
        weights = _advantages(advantages, sampled, rows)
    else:
        weights = _per_response("advantages", advantages, rows)
        lengths = rows.sum(inside.to(token_ratios.dtype))
        counted, log_ratios = lengths > 0, rows.sum(token_ratios) / lengths.clamp(min=1)
    losses, low, high = _clipped(log_ratios, weights, bounds)
    per_token_losses = losses if level == "token" else rows.spread(losses)
    loss = rows.reduced(torch.where(inside, per_token_losses, 0), reduction)
    with torch.no_grad():
        metrics = _ratio_metrics(log_ratios, counted, rows.dtype)
        metrics |= _divergence(token_ratios, inside, rows.dtype)
        metrics["ratios/clipped"] = mean_of((low | high).double(), counted, rows.dtype)
        metrics["ratios/clipped_low"] = mean_of(low.double(), counted, rows.dtype)
        metrics["tokens/outside_support"] = tokens.outside()
    return loss, metrics


def reinforce_loss(
    sampled: Responses,
    advantages: Tensor,
    sampler_logps: Tensor | None = None,
    *,
    max_weight: float = 2.0,
    reduction: str = "token_mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns REINFORCE, weighted by truncated importance weights if the sampler's are given.

    `-w_t A_t log p_t` a token, w_t = min(r_t, C) held constant, or 1 without `sampler_logps`.
    g_t = -w_t A_t (1-p_t) / N: a token whose ratio is far off keeps its gradient, with a bounded
    weight. The same formula with C = 1 + ε_high is CISPO.

    The metrics, without reading the device: "tokens/outside_support", and with `sampler_logps`
    "ratios/mean", "ratios/beyond_0.1", "kl/sampler", as in `clipped_ratio_loss`, and
    "ratios/truncated", the share of tokens with r > C.

    Examples:
        >>> sampled = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> loss, metrics = reinforce_loss(sampled, torch.tensor([-1.0]))
        >>> loss
        tensor(-0.4100)
        >>> sampler_logps = torch.tensor([[-0.6931, -2.0]])
        >>> loss, metrics = reinforce_loss(sampled, torch.tensor([-1.0]), sampler_logps)
        >>> loss, metrics["ratios/truncated"]
        (tensor(-0.4735), tensor(0.5000))

    Args:
        sampled (Responses): as in `clipped_ratio_loss`.
        advantages (Tensor): as in `clipped_ratio_loss`, one a response or one a token.
        sampler_logps (Tensor | None): as in `clipped_ratio_loss`. None: what was drawn is the
            policy's own.
        max_weight (float): C > 0.
        reduction (str): as in `clipped_ratio_loss`.

    Returns:
        tuple[Tensor, dict[str, Tensor]]: as `clipped_ratio_loss`, finite for finite advantages.

    Raises:
        TypeError, ValueError: as `clipped_ratio_loss`.
    """
    one_of("reduction", reduction, POLICY_REDUCTIONS)
    max_weight = number("max_weight", max_weight, positive=True)
    tokens = _tokens(sampled)
    weights, metrics = _truncated(tokens, sampled, sampler_logps, max_weight)
    scale = weights * _advantages(advantages, sampled, tokens.rows)
    return tokens.rows.reduced(-scale * tokens.logps, reduction), metrics


def weighted_reinforce_loss(
    sampled: Responses,
    correct: Tensor,
    sampler_logps: Tensor | None = None,
    *,
    positive_weight: float = 0.1,
    negative_weight: float = 1.0,
    penalty: str = "log_prob",
    max_weight: float = 2.0,
    reduction: str = "token_mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns positive and negative sample reinforcement, weighted: right or wrong is all it takes.

    `λ⁺ Σ_right -w_t log p_t + λ⁻ Σ_wrong w_t penalty_t`, both divided by the tokens (or responses)
    of the whole batch; w_t as in `reinforce_loss`. Weights of (1, 0) are PSR, (0, 1) is NSR, which
    penalises alone, and (0.1, 1) the paper's W-REINFORCE.

    - "log_prob": `log p_t`, the paper's: REINFORCE with the reward -1, and `mate_penalty` with
      "token_mean". Unbounded below; g_t = +λ⁻ w_t (1-p_t) / N, largest where the token is already
      unlikely.
    - "unlikelihood": `-log(1 - p_t)`, >= 0; g_t = +λ⁻ w_t p_t / N, largest where the token is
      certain, and gone with its probability. A token alone in its support adds 0.

    Right tokens have g_t = -λ⁺ w_t (1-p_t) / N. Rewards of several values, or a baseline, are
    `reinforce_loss`; `torch.where(correct, 0.1, -1.0)` as the advantages of `clipped_ratio_loss` is
    W-REINFORCE with clipping.

    The metrics are those of `reinforce_loss`, and "loss/positive" and "loss/negative", each side
    before its weight.

    Examples:
        >>> mask = torch.tensor([[True, True], [True, True]])
        >>> sampled = Responses(torch.tensor([[0.0, 2.0], [0.0, -2.0]]), mask)
        >>> correct = torch.tensor([True, False])
        >>> weighted_reinforce_loss(sampled, correct)[0]
        tensor(-0.6845)
        >>> loss, metrics = weighted_reinforce_loss(sampled, correct, penalty="unlikelihood")
        >>> loss, metrics["loss/negative"]
        (tensor(0.2255), tensor(0.2050))

    Args:
        sampled (Responses): as in `clipped_ratio_loss`.
        correct (Tensor): (B,), bool; the right responses.
        sampler_logps (Tensor | None): as in `reinforce_loss`.
        positive_weight (float): λ⁺ >= 0.
        negative_weight (float): λ⁻ >= 0.
        penalty (str): as above.
        max_weight (float): as in `reinforce_loss`.
        reduction (str): as in `clipped_ratio_loss`.

    Returns:
        tuple[Tensor, dict[str, Tensor]]: as `reinforce_loss`.

    Raises:
        TypeError, ValueError: as `reinforce_loss`; `correct` of another shape or dtype.
    """
    one_of("penalty", penalty, NEGATIVE_PENALTIES)
    one_of("reduction", reduction, POLICY_REDUCTIONS)
    positive_weight = number("positive_weight", positive_weight)
    negative_weight = number("negative_weight", negative_weight)
    max_weight = number("max_weight", max_weight, positive=True)
    tokens = _tokens(sampled)
    rows = tokens.rows
    instance("correct", correct, Tensor, "a Tensor")
    if correct.dtype != torch.bool:
        raise TypeError(f"correct: expected a tensor of torch.bool, got {correct.dtype}")
    right = rows.spread(_of_batch("correct", correct, rows))
    weights, metrics = _truncated(tokens, sampled, sampler_logps, max_weight)
    penalties = tokens.logps if penalty == "log_prob" else tokens.unlikelihood()
    positive = rows.reduced(torch.where(right, -weights * tokens.logps, 0), reduction)
    negative = rows.reduced(torch.where(right, 0, weights * penalties), reduction)
    metrics |= {"loss/positive": positive.detach(), "loss/negative": negative.detach()}
    return positive_weight * positive + negative_weight * negative, metrics


class _Tokens(NamedTuple):
    """Sampled tokens; all that is per token is 0 outside the support and where none counts."""

    rows: Rows
    inside: Tensor  # those that count and are in their support
    logps: Tensor  # without a gradient where p is 1

    def log_ratios(self, sampled: Responses, sampler_logps: Tensor) -> Tensor:
        """Returns l - μ after checks, 0 outside the support."""
        constant = per_token("sampler_logps", sampler_logps, sampled, self.rows).detach()
        return torch.where(self.inside, self.logps - constant.to(self.logps.dtype), 0)

    def unlikelihood(self) -> Tensor:
        """Returns -log(1 - p), 0 outside the support and alone in it."""
        finite = self.inside & ~self.rows.log_odds.isinf()
        m = torch.where(finite, self.rows.log_odds, 0)
        return torch.where(finite, -F.logsigmoid(-m), 0)

    def outside(self) -> Tensor:
        """Returns how many tokens that count are outside their support."""
        return (self.rows.kept & ~self.inside).sum().to(self.rows.dtype)


def _tokens(sampled: Responses) -> _Tokens:
    """Checks the responses and takes the log-probabilities of their tokens."""
    rows = checked("sampled", sampled)
    inside = rows.kept & (rows.log_odds != float("-inf"))
    logps = F.logsigmoid(torch.where(inside, rows.log_odds, 0))
    # where p is 1 an infinite upstream gradient would meet the 0 of 1 - p
    moves = inside & (logps.detach() != 0)
    return _Tokens(rows, inside, torch.where(moves, logps, 0))


class _Bounds(NamedTuple):
    """Of a ratio r: where A > 0 it is at most `high`, where A < 0 in [`low`, `far`]."""

    low: float
    high: float
    far: float


def _checked_bounds(epsilon: float, epsilon_high: float | None, delta: float | None) -> _Bounds:
    """Checks the options of clipping."""
    epsilon = number("epsilon", epsilon)
    if epsilon > 1:
        raise ValueError(f"epsilon: expected a value in [0, 1], got {epsilon}")
    high = 1 + (epsilon if epsilon_high is None else number("epsilon_high", epsilon_high))
    far = float("inf") if delta is None else number("delta", delta, positive=True)
    if far <= high:
        raise ValueError(f"delta: expected a value > 1 + epsilon_high = {high}, got {delta}")
    return _Bounds(1 - epsilon, high, far)


def _clipped(
    log_ratios: Tensor, advantages: Tensor, bounds: _Bounds
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the surrogate, and where it stands still because of the lower or an upper bound."""
    ratios = log_ratios.detach().exp()
    gain, cost = advantages > 0, advantages < 0
    # a bound beyond the dtype is none
    top = torch.finfo(ratios.dtype).max
    least, most, far = (b if b <= top else float("inf") for b in bounds)
    low = cost & (ratios < least)
    high = (gain & (ratios > most)) | (cost & (ratios > far))
    at = torch.where(gain, ratios.clamp(max=most), ratios.clamp(least, far))
    still = low | high | (advantages == 0)
    # a ratio that overflows must not meet a 0, of the advantage or of the gradient
    moving = torch.where(still, 0, log_ratios).exp()
    return -advantages * torch.where(low | high, at, moving), low, high


def _ratio_metrics(log_ratios: Tensor, counted: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the mean of the ratios and the share that is far from 1."""
    ratios = log_ratios.exp()
    beyond = ((ratios < 0.9) | (ratios > 1.1)).to(ratios.dtype)
    return {
        "ratios/mean": mean_of(ratios, counted, dtype),
        "ratios/beyond_0.1": mean_of(beyond, counted, dtype),
    }


def _divergence(log_ratios: Tensor, inside: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the estimate of the KL divergence of tokens."""
    return {"kl/sampler": mean_of(log_ratios.expm1() - log_ratios, inside, dtype)}


def _truncated(
    tokens: _Tokens, sampled: Responses, sampler_logps: Tensor | None, max_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the importance weights, held constant, and their metrics."""
    with torch.no_grad():
        outside = {"tokens/outside_support": tokens.outside()}
        if sampler_logps is None:
            return torch.ones_like(tokens.logps), outside
        log_ratios = tokens.log_ratios(sampled, sampler_logps)
        inside, dtype = tokens.inside, tokens.rows.dtype
        metrics = _ratio_metrics(log_ratios, inside, dtype) | _divergence(log_ratios, inside, dtype)
        weights = log_ratios.exp()
        most = min(max_weight, torch.finfo(dtype).max)  # a finite weight, in the results too
        truncated = (weights > most).to(weights.dtype)
        metrics["ratios/truncated"] = mean_of(truncated, inside, dtype)
        return weights.clamp(max=most), metrics | outside


def _advantages(advantages: Tensor, sampled: Responses, rows: Rows) -> Tensor:
    """Returns the advantage of each token that counts, held constant, after checks."""
    instance("advantages", advantages, Tensor, "a Tensor")
    if advantages.shape == (rows.size,):
        return rows.spread(_per_response("advantages", advantages, rows))
    if advantages.shape != sampled.log_odds.shape:
        shapes = f"({rows.size},) or {tuple(sampled.log_odds.shape)}"
        raise ValueError(f"advantages: expected shape {shapes}, got {tuple(advantages.shape)}")
    return per_token("advantages", advantages, sampled, rows).detach().to(rows.log_odds.dtype)


def _per_response(name: str, value: Tensor, rows: Rows) -> Tensor:
    """Returns one number a response in the dtype of the sums, held constant, after checks."""
    instance(name, value, Tensor, "a Tensor")
    return accumulated(name, _of_batch(name, value, rows)).detach().to(rows.log_odds.dtype)


def _of_batch(name: str, value: Tensor, rows: Rows) -> Tensor:
    """Raises unless a tensor has one value a response, on their device."""
    if value.shape != (rows.size,):
        raise ValueError(f"{name}: expected shape ({rows.size},), got {tuple(value.shape)}")
    if value.device != rows.log_odds.device:
        raise ValueError(f"{name}: expected device {rows.log_odds.device}, got {value.device}")
    return value
