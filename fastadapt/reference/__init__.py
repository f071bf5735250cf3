"""PyTorch references of the public functions: same names, signatures and results, no kernels.

The rule for float32, bfloat16 and float16 logits is made of integers, so that sums do not depend
on their order and every implementation decides alike, bit for bit:

1. `s = x * fl32(1 / T)` in float32; tokens with s = -inf are out from the start.
2. `d = s - max s`; the mass of a token is `w = trunc(2^40 * e^d)`, a 64-bit integer from one
   polynomial whose operations are rounded separately, and `u = trunc(2^40 * e^d * (-d))`.
3. Tokens are ranked by (s descending, id ascending).
4. Filters run in the adaptor's order, each on the survivors of the one before, with their
   `Z = sum w` and `U = sum u`; scalars of a row are float64. A token stays in top-p if the mass
   before it is below `ceil(p Z c)`, with `c = 1 - 2^-19` if its own is at least `Z / 1024`, else
   `c = 1 - 2^-52`: a mass that is p but for the polynomial's error or a rounding is p. So it is in
   typical, of all that are equally typical together, and the thresholds of min-p, epsilon and eta
   are multiplied by `1 - 2^-19`. docs/sampling-rule.md has the other filters, and what a
   temperature that comes last does to step 1.
5. The draw inverts the cumulated masses at `floor(x * S / 2^64)`, x one 64-bit Philox number.

For float64 logits the same steps run on plain float64 probabilities: the textbook form.

Before step 1 logits are edited, in float32 (float64): `edits`, `allowed` and `num_tokens`, as
`fastadapt.filter_logits` explains them, are keyword arguments of the functions of sampling.
"""

from fastadapt.reference.adapted import (
    adapted_log_odds,
    adapted_logps,
    filter_logits,
    sample,
    score,
)
from fastadapt.reference.distribution_losses import (
    entropy_bonus,
    previous_tokens,
    repeated_ngrams,
    smoothed_mle_loss,
    top_k_divergence,
    z_loss,
)
from fastadapt.reference.divergence import linear_divergence
from fastadapt.reference.history import History
from fastadapt.reference.log_odds import (
    candidate_log_odds,
    label_log_odds,
    linear_candidate_log_odds,
    linear_log_odds,
    linear_mle_loss,
    linear_top_k,
)
from fastadapt.reference.losses import (
    candidate_unlikelihood_penalty,
    dft_loss,
    exmate_loss,
    exmate_penalty,
    focal_mle_loss,
    label_logps,
    mate_loss,
    mate_penalty,
    mle_loss,
    sequence_logps,
    unlikelihood_loss,
    unlikelihood_penalty,
)
from fastadapt.reference.policy import (
    clipped_ratio_loss,
    reinforce_loss,
    weighted_reinforce_loss,
)
from fastadapt.reference.preference import (
    alphapo_loss,
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    apo_zero_unpaired_loss,
    bco_loss,
    bco_pair_loss,
    cal_dpo_loss,
    cdpo_loss,
    cpo_loss,
    desensitized_logps,
    discopop_loss,
    dpo_loss,
    dpop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    nca_pair_loss,
    orpo_loss,
    robust_loss,
    rrhf_loss,
    sigmoid_norm_loss,
    simpo_loss,
    slic_loss,
    sppo_hard_loss,
    tdpo_loss,
    tpo_loss,
    wpo_weights,
)
from fastadapt.reference.support import linear_support_log_odds, support_log_odds
from fastadapt.reference.verification import verify

__all__ = [
    "History",
    "adapted_log_odds",
    "adapted_logps",
    "alphapo_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "bco_loss",
    "bco_pair_loss",
    "cal_dpo_loss",
    "candidate_log_odds",
    "candidate_unlikelihood_penalty",
    "cdpo_loss",
    "clipped_ratio_loss",
    "cpo_loss",
    "desensitized_logps",
    "dft_loss",
    "discopop_loss",
    "dpo_loss",
    "dpop_loss",
    "entropy_bonus",
    "exmate_loss",
    "exmate_penalty",
    "exo_pair_loss",
    "filter_logits",
    "focal_mle_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "kto_reference_point",
    "label_log_odds",
    "label_logps",
    "linear_candidate_log_odds",
    "linear_divergence",
    "linear_log_odds",
    "linear_mle_loss",
    "linear_support_log_odds",
    "linear_top_k",
    "mate_loss",
    "mate_penalty",
    "mle_loss",
    "nca_pair_loss",
    "orpo_loss",
    "previous_tokens",
    "reinforce_loss",
    "repeated_ngrams",
    "robust_loss",
    "rrhf_loss",
    "sample",
    "score",
    "sequence_logps",
    "sigmoid_norm_loss",
    "simpo_loss",
    "slic_loss",
    "smoothed_mle_loss",
    "sppo_hard_loss",
    "support_log_odds",
    "tdpo_loss",
    "top_k_divergence",
    "tpo_loss",
    "unlikelihood_loss",
    "unlikelihood_penalty",
    "verify",
    "weighted_reinforce_loss",
    "wpo_weights",
    "z_loss",
]
__dir__ = __all__.copy  # what is not public is not listed
