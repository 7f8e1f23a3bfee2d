"""A modern large language model, built from scratch in the notebooks of llm_scratch."""

import sys
from types import ModuleType

__version__ = "0.1.0"

# The main names load on first use (PEP 562), so that `import llm_scratch` costs next to nothing.
_HOME = {
    "Tokenizer": "tokenizer",
    "train_bpe": "tokenizer",
    "ModelConfig": "model",
    "TransformerLM": "model",
    "TrainConfig": "training",
    "train": "training",
    "generate": "generation",
    "corpus": "data",
}
__all__ = list(_HOME) + ["flash_attention"]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    @property
    def flash_attention(self):
        "The function, always. Importing the module of that name would put the module here."
        from .flash_attention import flash_attention

        return flash_attention

    @flash_attention.setter
    def flash_attention(self, module):
        pass


sys.modules[__name__].__class__ = _Package
