"""Show whether a user's rule is true: cut and compare a frame around the one module that it describes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from morph.analysis import analyse
from morph.errors import AnalysisError
from morph.plan import Check
from morph.removal import Remover, check_cut
from morph.verify import require


class _Frame(nn.Module):
    """Gives a module inputs, and reads its output, by parameters whose axes are all free."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        super().__init__()
        self.module = module
        self.inputs = nn.ParameterList([nn.Parameter(t.detach().clone()) for t in inputs])
        self.reader = nn.Parameter(torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output))

    def forward(self, x: Tensor) -> Tensor:
        """The weighted sum of the module's output, times a number."""
        total: Tensor = (self.module(*self.inputs) * self.reader).sum(tuple(range(self.reader.dim())))
        return total * x


def check_rule(module: nn.Module, *inputs: Tensor) -> Check:
    """Check a user's rule on one module: drop a third of every coupling and compare with the zeroing reference.

    Args:
        module: A module of a class with a rule, or one that calls an operator with a rule; not touched. Its parameters
            should be random: a zero or a one hides what is wrong.
        inputs: Tensors to call it with, of distinct sizes.

    Returns:
        The check, which passed.

    Raises:
        AnalysisError: If nothing is free, so that nothing was checked, or the rule does not fit the shapes.
        CheckFailedError: If the rule is not true.

    Example:
        >>> import torch, morph
        >>> morph.check_rule(torch.nn.PReLU(6), torch.randn(2, 6, 5)).passed
        True
    """
    own = copy.deepcopy(module).double().eval()
    given = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    with torch.no_grad():
        output = own(*given)
    if not isinstance(output, Tensor):
        raise AnalysisError(f"check_rule needs a module that gives one tensor, got {type(output).__name__}")
    frame = _Frame(own, given, output)
    analysis = analyse(frame, torch.ones(2, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    choice = {
        name: torch.randperm(c.units, generator=generator)[: max(1, c.units // 3)].numpy()
        for name, c in analysis.couplings.items()
        if c.units > 1 and not c.overlaps
    }
    if not any(name.startswith(("inputs.", "reader", "module.")) for name in choice):
        raise AnalysisError(f"nothing of {type(module).__name__} is free by this rule, so there is nothing to check")
    x = torch.ones(2, dtype=torch.float64)
    removed = Remover(frame, x, analysis, "class").remove(choice)
    if removed.left:
        raise AnalysisError(f"the rule leads to a cut that the module cannot carry: {removed.left[0].reason}")
    check = check_cut(removed, frame, x, analysis)
    require((check,))
    return check
