"""Trains by the command line, then loads what it wrote and generates with it.

python examples/command_line.py [MODEL]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import fastadapt.hf
from fastadapt.training.pretrained import load_model

PAIRS = [
    {"prompt": "What is two and two?", "chosen": " Four.", "rejected": " Guess."},
    {"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Name it yourself."},
]

with tempfile.TemporaryDirectory() as folder:
    data, run = Path(folder, "pairs.jsonl"), Path(folder, "run")
    data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    command = [sys.executable, "-m", "fastadapt", "train", "--data", str(data)]
    command += ["--output_dir", str(run)]
    command += ["--stages", "exmate,dpo", "--max_steps", "1", "--per_device_train_batch_size", "2"]
    command += ["--model", sys.argv[1]] if len(sys.argv) > 1 else []
    subprocess.run(command, check=True)
    model, tokenizer = load_model(run / "model")

inputs = tokenizer("Name a colour.", return_tensors="pt")
tokens = model.generate(
    **inputs, do_sample=True, top_p=0.9, max_new_tokens=8, custom_generate=fastadapt.hf.generate
)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
