"""Attention layers: projections around the operators, with everything learned in the state dict."""

from .eva import EvaAttention
from .lara import LaraAttention
from .rfa import RfaAttention
from .sea import SeaAttention
from .yoso import YosoAttention

__all__ = ["EvaAttention", "LaraAttention", "RfaAttention", "SeaAttention", "YosoAttention"]
