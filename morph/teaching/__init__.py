"""Teaching a student: losses, taps, pairs of layers, adapters, and the objectives that a training loop minimises."""

from morph.teaching.adapters import Bridge, bridge
from morph.teaching.distillation import Distillation
from morph.teaching.feature_losses import AttentionTransfer, Hint, attention_map
from morph.teaching.hints import Hints
from morph.teaching.losses import (
    LabelCrossEntropy,
    LogitRegression,
    MultiChannelBCE,
    OutputLoss,
    SoftLabels,
    WeightedSum,
)
from morph.teaching.objective import Labels, Step
from morph.teaching.pairing import Pair, Pairs, check_pairs, propose_pairs
from morph.teaching.taps import Taps, tap
from morph.teaching.terms import Channels, Features, Outputs

__all__ = [
    "AttentionTransfer",
    "Bridge",
    "Channels",
    "Distillation",
    "Features",
    "Hint",
    "Hints",
    "LabelCrossEntropy",
    "Labels",
    "LogitRegression",
    "MultiChannelBCE",
    "OutputLoss",
    "Outputs",
    "Pair",
    "Pairs",
    "SoftLabels",
    "Step",
    "Taps",
    "WeightedSum",
    "attention_map",
    "bridge",
    "check_pairs",
    "propose_pairs",
    "tap",
]
