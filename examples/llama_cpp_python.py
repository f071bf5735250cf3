"""llama-cpp-python: a logits processor that draws, and leaves the drawn token alone in the row.

pip install llama-cpp-python numpy
python examples/llama_cpp_python.py MODEL.gguf
"""

import sys

import numpy as np
import torch
from llama_cpp import Llama, LogitsProcessorList

from fastadapt import Adaptor, sample


class Draw:
    """Draws one completion's tokens: by its own adaptor and seed, at its own positions."""

    def __init__(self, adaptor: Adaptor, seed: int) -> None:
        self.adaptor, self.seed = adaptor, torch.tensor([seed])
        self.prompt_length = 0
        self.length: int | None = None  # of the text at the next call

    def __call__(self, input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Takes and returns the logits of one position, (V,) float32."""
        if self.length is None:
            self.length = self.prompt_length = len(input_ids)
        if len(input_ids) != self.length:
            raise ValueError(
                f"expected a new Draw for each completion, whose text has {self.length} tokens "
                f"now, got one of {len(input_ids)}"
            )
        position = torch.tensor([self.length - self.prompt_length])
        self.length += 1
        logits = torch.from_numpy(scores)[None]
        drawn = sample(logits, self.adaptor, seeds=self.seed, positions=position)
        if int(drawn.status[0]):
            raise ValueError(f"expected finite logits, got status {int(drawn.status[0])}")
        row = np.full_like(scores, -np.inf)
        row[int(drawn.tokens[0])] = 0.0
        return row


if len(sys.argv) != 2:
    sys.exit("usage: python examples/llama_cpp_python.py MODEL.gguf")
model = Llama(sys.argv[1], n_ctx=512, verbose=False)
for seed in (1, 2):
    processors = LogitsProcessorList([Draw(Adaptor(temperature=0.8, top_p=0.9), seed)])
    # llama.cpp's own chain is greedy: it takes the only token there is
    out = model.create_completion(
        "Once upon a time there was", max_tokens=20, temperature=0.0, logits_processor=processors
    )
    print(out["choices"][0]["text"])
