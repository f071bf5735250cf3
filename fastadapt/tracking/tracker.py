"""The tracker: what a run does to chosen and rejected responses, as dictionaries."""

from __future__ import annotations

from typing import Any

import torch

from fastadapt._ops.checks import flag, instance, integer
from fastadapt.losses.mixture import RewardPenalizeLoss
from fastadapt.tracking.recorder import Recorder
from fastadapt.training.head import causal_of
from fastadapt.training.log_odds import LogOddsOf, response_log_odds

INTERVAL = 10  # objective calls between two records


class RewardPenalizeTracker(Recorder):
    """Records, at an interval, what training does to chosen and rejected responses.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastadapt import tracking, training
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> objective = RewardPenalizeLoss({"exmate": 1.0})
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> tracker = tracking.RewardPenalizeTracker(objective, interval=2, model=model)
        >>> with tracker:
        ...     batches = tracker.watch([(batch, None)] * 3)
        ...     steps = list(training.training_steps(model, batches, objective, optimizer))
        >>> [record["step"] for record in tracker.records], len(tracker.pairs)
        ([0, 2], 2)

    In a loop of your own, `tracker.see(batch)` before each step takes the place of `watch`. With
    transformers' `Trainer` use `fastadapt.tracking.TrackerCallback`, with
    `fastadapt.trl.RewardPenalizeTrainer` its argument `tracker`, with trl's `DPOTrainer`
    `fastadapt.tracking.track`. Only calls of the objective that build a graph count, so that
    evaluations in between are not recorded.

    A record is a dictionary of floats, ints and None:

    - "step", "loss".
    - Cells "chosen_in_chosen" log P(y⁺|x⁺), "rejected_in_rejected" log P(y⁻|x⁻),
      "rejected_in_chosen" log P(y⁻|x⁺) and "chosen_in_rejected" log P(y⁺|x⁻), each as ".../sum"
      (per response) and ".../token" (per token, mean over responses), nats, with "/p10", "/p50" and
      "/p90" over the responses. The last two cells are copies where x⁺ = x⁻ or y⁺ = y⁻ in all
      pairs; else they need `extra_forwards`, and without it, or without a batch, they are None.
      What the step computed is in the mode of training; extra forwards are in that of evaluation,
      before the step.
    - "margin" S⁺ - S⁻ and "accuracy", the share of pairs with S⁺ > S⁻; None where the sides have
      no equal number of responses. Cells of a side that a step has not are None too.
    - "mass/chosen", "mass/rejected", "mass/other": Σ |∂L/∂z| on the labels of chosen responses, on
      those of rejected ones and on all other entries of the rows of logits. Where a batch is known,
      rows that a pair shares are one row, in which the two sides cancel or add up.
    - "weight/chosen" -B ∂L/∂S⁺ and "weight/rejected" B ∂L/∂S⁻, by the gradient of the loss itself,
      whatever it is: means over responses, with ∂L/∂S the mean of ∂L/∂l over a response's tokens
      and B what the side's means divide by. Through DPO both are k. Responses that are `gold`, and
      candidates, are in neither, nor in the masses.
    - "weight/dpo_k" k (mean), "weight/exmate" coefficient times probability (mean),
      "weight/unlikelihood_odds" and ".../max" e^m (median, largest), of the losses there are.
    - "count/underflow": rejected responses whose P is below the normal float32 range.
      "count/dead_zone": rejected tokens of p > 1 - 1e-5, which published code clamps out of the
      gradient. "count/naive_inf": rejected tokens for which 1 - p is 0 in float32.
      "count/nonfinite": log-odds and slopes that are infinite or NaN. All of this record alone.
    - with a model: "rho/median", "rho/max", "rho/above_one" (pairs with ρ > 1), "rho/pairs".

    `pairs` holds a row per pair and record: step, place in the batch, rho, chosen_norm,
    rejected_norm, cross, flagged.

    Args:
        objective (RewardPenalizeLoss | None): the loss of the run. None: that of the trainer which
            it is given to.
        interval (int): of every so many steps the first is recorded.
        model (Any): a causal language model of transformers, for ρ and for extra forwards; None:
            that of the trainer; without one log-odds alone are seen.
        rho (bool): whether ρ is recorded where there is a model. Its two products of N H V are the
            larger part of the tracker's cost.
        extra_forwards (bool): run the model on (x⁻, y⁺) and (x⁺, y⁻) where they are not among
            what the step computes.
        log_odds_of (LogOddsOf): as in `training_steps`, for the extra forwards.

    Raises:
        TypeError: an objective, an interval or a model of another type.
        ValueError: an interval below 1; extra forwards without a model; (when recording) a model
            without a batch that was seen, or one of another shape than the log-odds.
    """

    def __init__(
        self,
        objective: RewardPenalizeLoss | None = None,
        *,
        interval: int = INTERVAL,
        model: Any = None,
        rho: bool = True,
        extra_forwards: bool = False,
        log_odds_of: LogOddsOf = response_log_odds,
    ) -> None:
        if objective is not None:
            instance("objective", objective, torch.nn.Module, "a RewardPenalizeLoss")
        interval = integer("interval", interval, 1)
        flag("rho", rho)
        if model is not None:
            causal_of(model)
        if extra_forwards and model is None and objective is not None:
            raise ValueError("extra_forwards: expected a model to run, got None")
        super().__init__(objective, interval, model, rho, extra_forwards, log_odds_of)

    def follow(self, trainer: Any) -> None:
        """Records a trainer's run: attaches to it with a callback, and is handed its batches.

        Args:
            trainer: of transformers' kind, whose `mixture` is a `RewardPenalizeLoss`; or trl's
                `DPOTrainer`.

        Raises:
            TypeError, ValueError: as `fastadapt.tracking.track`.
        """
        from fastadapt.tracking.following import Following

        trainer.add_callback(Following(self, trainer))


def track(
    trainer: Any,
    *,
    interval: int = INTERVAL,
    rho: bool = True,
    extra_forwards: bool = False,
) -> RewardPenalizeTracker:
    """Records what a trainer's run does to its pairs, from one call before `train()`.

    Of `fastadapt.trl.RewardPenalizeTrainer` and its like records are those of its objective. Of
    trl's `DPOTrainer`, whatever its `loss_type`, they have the same names: log-probabilities are
    those that its model returns, inside `fused_log_probs()` or not, the loss is what
    `compute_loss` returns, and what the gradient says ("mass/...", "weight/chosen",
    "weight/rejected") is read in the run's own backward. "weight/dpo_k" is there for the loss type
    "sigmoid" alone. Outside `fused_log_probs()` a probability near 1 has few digits of 1 - p.

    Examples:
        >>> import datasets, tokenizers, transformers, trl
        >>> from fastadapt.tracking import track
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=3, hidden_size=64, intermediate_size=64, num_hidden_layers=1
        ... )
        >>> model, ref_model = (transformers.LlamaForCausalLM(config) for _ in range(2))
        >>> pairs = [{"prompt": "a", "chosen": "b", "rejected": "a"}] * 24
        >>> trainer = trl.DPOTrainer(
        ...     model,
        ...     ref_model,
        ...     args=trl.DPOConfig("out", bf16=False, save_strategy="no", num_train_epochs=1),
        ...     train_dataset=datasets.Dataset.from_list(pairs),
        ...     processing_class=tokenizer,
        ... )
        >>> tracker = track(trainer, interval=2)
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> [record["step"] for record in tracker.records]
        [0, 2]

    Args:
        trainer: trl's `DPOTrainer`, or one with a `RewardPenalizeLoss` as its `mixture`.
        interval (int): as of `RewardPenalizeTracker`, and so the others.
        rho (bool): as there.
        extra_forwards (bool): as there.

    Returns:
        RewardPenalizeTracker: whose `records` and `pairs` grow in the run, and are kept with its
        checkpoints.

    Raises:
        TypeError: no trainer of pairs.
        ValueError: an interval below 1; ρ of a head that is not whole on each process.
    """
    tracker = RewardPenalizeTracker(interval=interval, rho=rho, extra_forwards=extra_forwards)
    tracker.follow(trainer)
    return tracker
