"""A modern large language model, built from scratch in the notebooks of llm_scratch."""

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
    "flash_attention": "flash_attention",
    "corpus": "data",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOME})
