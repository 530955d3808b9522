"""Model surgery for PyTorch: trace a network, know its channels, grow it, cut it, check it.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from morph.analysis import Analysis as Analysis
    from morph.analysis import analyse as analyse
    from morph.analysis.user_rules import rule as rule
    from morph.apg import APG as APG
    from morph.attaching import attach_gates as attach_gates
    from morph.checkpoints import edit_checkpoint as edit_checkpoint
    from morph.counts import count as count
    from morph.couplings import Coupling as Coupling
    from morph.deepening import deepen as deepen
    from morph.drawing import draw as draw
    from morph.expansion import expand as expand
    from morph.family.generator import draw_network as draw_network
    from morph.family.search import search_family as search_family
    from morph.family.settings import FamilySettings as FamilySettings
    from morph.files import open_model as open_model
    from morph.files import save_model as save_model
    from morph.gating import Gated as Gated
    from morph.gating import gate as gate
    from morph.head_swapping import swap_head as swap_head
    from morph.label_surgery import put_label_head as put_label_head
    from morph.label_surgery import put_voting_head as put_voting_head
    from morph.passes.gates import Gate as Gate
    from morph.plan import Plan as Plan
    from morph.plan import Record as Record
    from morph.plan import load_plan as load_plan
    from morph.pruning import prune as prune
    from morph.rule_checks import check_rule as check_rule
    from morph.states import carry_model as carry_model
    from morph.states import move_scheduler as move_scheduler
    from morph.states import transplant as transplant
    from morph.student_search import search_student as search_student
    from morph.substitution import substitute as substitute
    from morph.surgery import Result as Result
    from morph.surgery import replay as replay
    from morph.teaching.capture import Tapped as Tapped
    from morph.teaching.distillation import Distillation as Distillation
    from morph.teaching.pairing import propose_pairs as propose_pairs
    from morph.teaching.taps import Taps as Taps
    from morph.teaching.taps import tap as tap
    from morph.tracing import trace as trace
    from morph.training.evaluation import Scores as Scores
    from morph.training.evaluation import evaluate as evaluate
    from morph.training.fitting import fit as fit
    from morph.widening import widen as widen

_HOMES = {
    "analyse": "morph.analysis",
    "Analysis": "morph.analysis",
    "APG": "morph.apg",
    "attach_gates": "morph.attaching",
    "prune": "morph.pruning",
    "widen": "morph.widening",
    "deepen": "morph.deepening",
    "draw_network": "morph.family.generator",
    "FamilySettings": "morph.family.settings",
    "search_family": "morph.family.search",
    "search_student": "morph.student_search",
    "substitute": "morph.substitution",
    "Distillation": "morph.teaching.distillation",
    "propose_pairs": "morph.teaching.pairing",
    "tap": "morph.teaching.taps",
    "Tapped": "morph.teaching.capture",
    "Taps": "morph.teaching.taps",
    "Coupling": "morph.couplings",
    "rule": "morph.analysis.user_rules",
    "check_rule": "morph.rule_checks",
    "transplant": "morph.states",
    "move_scheduler": "morph.states",
    "carry_model": "morph.states",
    "edit_checkpoint": "morph.checkpoints",
    "count": "morph.counts",
    "draw": "morph.drawing",
    "expand": "morph.expansion",
    "Gate": "morph.passes.gates",
    "Gated": "morph.gating",
    "gate": "morph.gating",
    "open_model": "morph.files",
    "save_model": "morph.files",
    "Plan": "morph.plan",
    "Record": "morph.plan",
    "Result": "morph.surgery",
    "load_plan": "morph.plan",
    "put_label_head": "morph.label_surgery",
    "put_voting_head": "morph.label_surgery",
    "replay": "morph.surgery",
    "swap_head": "morph.head_swapping",
    "trace": "morph.tracing",
    "Scores": "morph.training.evaluation",
    "evaluate": "morph.training.evaluation",
    "fit": "morph.training.fitting",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'morph' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
