"The model needs torch and nothing else: no Triton (Windows, Mac), no matplotlib."

import subprocess
import sys

CODE = """
import sys
for name in ("triton", "matplotlib", "fastcore", "numpy"):
    sys.modules[name] = None  # importing it raises
import torch
from llm_scratch.model import ModelConfig, TransformerLM
model = TransformerLM(ModelConfig(vocab_size=10, d_model=16, num_heads=2, num_layers=1))
ids = torch.zeros(2, 3, dtype=torch.int64)
assert model(ids, cache=model.new_cache(2)).shape == (2, 3, 10)
model(ids).sum().backward()
print("trained")
"""


def test_model_needs_torch_only():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout.strip() == "trained", done.stderr
