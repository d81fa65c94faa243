"""Attention on any device: one function, one definition, several backends. Knows GPUs, not video models."""

from .attention import attention, backends, prepare
from .merge import merge
from .problem import Problem, Verdict

__all__ = ["Problem", "Verdict", "attention", "backends", "merge", "prepare"]
