"""Why well-known modules and functions have no bound here, and what to use in their place."""

from __future__ import annotations

from torch import nn

__all__ = ["GENERAL", "advice"]

GENERAL = "derive it from LipschitzModule with a lipschitz_bound(), or state its bound with liplayers.register_bound"

_KINDS: list[tuple[str, str, str]] = [
    (
        "LayerNorm GroupNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d RMSNorm "
        "layer_norm group_norm instance_norm rms_norm normalize",
        "its slopes grow to 1/√eps or more where its input hardly varies: it has no useful constant",
        "liplayers.BatchCentering, batch normalisation in eval mode, or none",
    ),
    (
        "MultiheadAttention TransformerEncoderLayer TransformerDecoderLayer TransformerEncoder TransformerDecoder "
        "Transformer scaled_dot_product_attention multi_head_attention_forward",
        "its weights depend on the input that they multiply, which has no constant (arXiv 2006.04710)",
        "convolutions or dense layers over the tokens, such as liplayers.LipNeXtBlock",
    ),
    (
        "RNN LSTM GRU RNNCell LSTMCell GRUCell",
        "no bound is known for recurrent layers",
        "dense layers of liplayers over the sequence",
    ),
    (
        "Threshold Hardshrink threshold hardshrink sign round floor ceil",
        "it jumps, and has no constant",
        "nn.Softshrink, nn.ReLU or liplayers.MaxMin",
    ),
    (
        "GLU glu",
        "a·sigmoid(b) has slopes as large as a, which is not bounded",
        "nn.ReLU, liplayers.MaxMin, or the sigmoid alone",
    ),
    (
        "Bilinear bilinear",
        "it multiplies values that both depend on the input, and has no constant",
        "nn.Linear of both, concatenated",
    ),
]
_ADVICE = {name: (reason, instead) for names, reason, instead in _KINDS for name in names.split()}


def advice(module: nn.Module | None = None, operation: str = "") -> tuple[str, str]:
    """Why there is no bound, and what to use instead; two empty texts where nothing is known.

    >>> advice(nn.GLU())[1]
    'nn.ReLU, liplayers.MaxMin, or the sigmoid alone'
    """
    torchs = module is not None and type(module).__module__.startswith("torch.nn.")
    return _ADVICE.get(operation) or (_ADVICE.get(type(module).__name__) if torchs else None) or ("", "")
