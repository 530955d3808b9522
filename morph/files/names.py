"""Which names a model file may use: classes, functions, methods and attributes; everything else needs the user's word.

A file chooses names, never objects, so what it can reach is what stands in this module. Classes are built without
calling their constructors, and the functions below neither import, open, execute, nor look up attributes by name.
"""

from __future__ import annotations

import enum
import functools
import importlib
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import fx, nn

from morph.errors import ModelFileError, UnsafeFileError

# Packages whose nn.Module subclasses may appear in a model, and those that may be held as values (as norm_layer is).
_MODULES = ("torch.nn.modules", "torchvision.models", "torchvision.ops", "timm.layers", "timm.models", "morph.zoo")
_VALUES = ("torch.nn.modules", "torchvision.ops", "timm.layers")
# Of these, what traces or compiles code, and so is refused.
_REFUSED = ("torchvision.models.feature_extraction", "timm.models._features_fx", "torch.nn.modules.lazy")
_NEVER = ("torch.fx", "torch.jit", "torch.package", "torch._dynamo", "torch._C.ScriptModule")
NETWORKS = ("morph.files.network.GraphNetwork", "morph.files.network.SingleInputGraphNetwork")
OWN = (
    *NETWORKS,
    "morph.attention.FreeMultiheadAttention",
    "morph.label_heads.MultiChannelHead",
    "morph.label_heads.VotingHead",
    "morph.window_attention.FreeShiftedWindowAttention",
    "morph.window_attention.FreeShiftedWindowAttentionV2",
)
CONTAINER = "torch.nn.modules.module.Module"

_FUNCTIONS = {
    "torch": """
        abs add addbmm addcdiv addcmul addmm amax amin arange argmax argsort atan atan2 baddbmm bmm cat cdist
        ceil chunk clamp clone concat conv1d conv2d cos cosh cosine_similarity cumprod cumsum div einsum
        empty_like eq erf exp expm1 eye flatten flip floor floor_divide full full_like gather ge gt index_add
        index_select kron le linspace log log1p log2 log_softmax logical_and logical_not logsumexp lt
        masked_fill matmul max maximum mean meshgrid min minimum mm movedim mul ne neg norm ones ones_like outer
        permute pow rand rand_like randn randn_like reciprocal relu repeat_interleave reshape roll round rsqrt
        scatter scatter_add sigmoid sign sin sinh softmax sort split sqrt square squeeze stack std sub sum
        swapaxes tan tanh tile topk transpose tril triu unbind unflatten unsqueeze var view_as_complex
        view_as_real where zeros zeros_like _assert""",
    "torch.nn.functional": """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d affine_grid alpha_dropout avg_pool1d
        avg_pool2d avg_pool3d batch_norm bilinear binary_cross_entropy binary_cross_entropy_with_logits celu
        channel_shuffle conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
        cosine_similarity cross_entropy dropout dropout1d dropout2d dropout3d elu embedding fold gelu glu
        grid_sample group_norm hardsigmoid hardswish hardtanh huber_loss instance_norm interpolate kl_div
        l1_loss layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid lp_pool2d max_pool1d
        max_pool2d max_pool3d mish mse_loss nll_loss normalize one_hot pad pixel_shuffle pixel_unshuffle prelu
        relu relu6 relu_ rms_norm scaled_dot_product_attention selu sigmoid silu smooth_l1_loss softmax softmin
        softplus softshrink softsign tanh tanhshrink threshold unfold upsample""",
    "operator": """
        add and_ eq floordiv ge getitem gt iadd imul invert isub itruediv le lt matmul mod mul ne neg not_ or_
        pow setitem sub truediv""",
    "math": "ceil floor sqrt log prod",
    "torchvision.ops": "stochastic_depth drop_block2d",
    "morph.passes.gated_readers": "gated_input gated_reader spread",
    "morph.window_attention": "free_shifted_window_attention",
    "torchvision.models.swin_transformer": "shifted_window_attention _get_relative_position_bias _patch_merging_pad",
    "torchvision.models.googlenet": "GoogLeNetOutputs",
    "torchvision.models.inception": "InceptionOutputs",
}
_METHODS = """
    abs add add_ addcdiv addcmul addmm all amax amin any argmax argsort baddbmm bernoulli_ bfloat16 bmm bool
    chunk clamp clamp_ clamp_min clone contiguous cos cosh cumprod cumsum detach diagonal dim div div_ double eq
    erf exp expand expand_as expm1 fill_ flatten flip float floor gather ge gt half index_add index_select int
    item le log log1p log_softmax logsumexp long lt masked_fill masked_fill_ matmul max maximum mean min minimum
    mm movedim mul mul_ narrow ne neg new_empty new_full new_ones new_zeros norm normal_ numel permute pow prod
    reciprocal relu relu_ repeat repeat_interleave reshape reshape_as roll round rsqrt scatter scatter_add
    select sigmoid sigmoid_ sign sin sinh size softmax sort split sqrt square squeeze std sub sub_ sum swapaxes
    t tan tanh to topk transpose tril triu type_as unbind unflatten unfold uniform_ unsqueeze var view view_as
    where zero_"""
METHODS = frozenset(_METHODS.split())
ATTRIBUTES = frozenset(
    {"shape", "ndim", "dtype", "device", "T", "mT", "is_cuda", "requires_grad", "data", "real", "imag"}
)

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PART = re.compile(r"[\w-]+", re.ASCII)


def is_identifier(name: str) -> bool:
    """Whether ``name`` is a plain ASCII identifier that is not a magic one."""
    return bool(_IDENTIFIER.fullmatch(name)) and not _is_magic(name)


def is_part(name: str) -> bool:
    """Whether ``name`` may name a child, parameter or buffer: letters, digits, ``_`` and ``-``, and not magic."""
    return bool(_PART.fullmatch(name)) and not _is_magic(name)


def _is_magic(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def is_trusted(name: str, trust: Collection[str]) -> bool:
    """Whether the user accepts ``name``, by itself or by a package that it is in."""
    return bool(_DOTTED.fullmatch(name)) and not _never(name) and _within(name, trust)


def _within(name: str, packages: Collection[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def refusal(name: str) -> UnsafeFileError:
    """The error for a global that is not allowed; names it and the flags that would accept it."""
    if not _DOTTED.fullmatch(name):
        return UnsafeFileError(f"wants {name!r}, which is not the name of a class or function; refused")
    trust = "" if _never(name) else f"--trust {name} if you trust that code, or "
    return UnsafeFileError(
        f"wants {name}, which is not among the known classes; nothing was run; use {trust}"
        "--allow-code to run whatever the file holds"
    )


def _never(name: str) -> bool:
    return _within(name, _NEVER) or name.partition(".")[0] in ("sys", "os", "posix", "nt")


def check_name(name: str, trust: Collection[str], *, value: bool) -> None:
    """Refuse the name of a class or function before anything is imported.

    Args:
        name: Dotted name.
        trust: Exact names or package prefixes that the user accepts.
        value: Whether it is held as a value; if not, it is the class of a module.

    Raises:
        UnsafeFileError: If it is neither known nor trusted.
    """
    if not _DOTTED.fullmatch(name) or any(_is_magic(part) for part in name.split(".")[1:]) or _never(name):
        raise refusal(name)
    known = name in FUNCTIONS or (_within(name, _VALUES) and not _within(name, _REFUSED))
    if not value:
        known = name in OWN or (_within(name, _MODULES) and not _within(name, _REFUSED))
    if not known and not _within(name, trust):
        raise refusal(name)


@contextmanager
def working_folder_importable() -> Iterator[None]:
    """Let imports find modules in the working folder, as `python` itself does."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def resolve(name: str) -> object:
    """Import what ``name`` stands for. The name must have passed `check_name`.

    Raises:
        ModelFileError: If there is no such thing, or it is an alias of something defined elsewhere.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]()
    home, _, attribute = name.rpartition(".")
    known = name in OWN or _within(name, _MODULES)  # never looked for in the working folder
    try:
        with nullcontext() if known else working_folder_importable():
            found = getattr(importlib.import_module(home), attribute)
    except Exception as error:
        raise ModelFileError(f"needs {name}, which cannot be imported here: {error}") from error
    if getattr(found, "__module__", None) != home or getattr(found, "__qualname__", None) != attribute:
        raise UnsafeFileError(f"wants {name}, which is only another name of something defined elsewhere; refused")
    return found


def _makes_its_own(cls: type) -> bool:
    """Whether making an instance runs code of the class."""
    return any("__new__" in vars(base) for base in cls.__mro__[:-1])


def as_module_class(found: object, name: str) -> type[nn.Module]:
    """Check that ``found`` is a module class that can be rebuilt from its attributes alone.

    Raises:
        UnsafeFileError: If it is not.
    """
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise UnsafeFileError(f"names {name} as the class of a module, but it is not one of torch.nn.Module; refused")
    special = (fx.GraphModule, torch.jit.ScriptModule, nn.modules.lazy.LazyModuleMixin)
    if issubclass(found, special) or _makes_its_own(found):
        raise UnsafeFileError(f"names {name}, which cannot be rebuilt without running its code; use --allow-code")
    return found


def as_value(found: object, name: str, trust: Collection[str]) -> object:
    """Check that ``found`` is a function of the list or a module class, unless the user trusts it.

    Raises:
        UnsafeFileError: If it is not.
    """
    if name in FUNCTIONS or _within(name, trust):
        return found
    return as_module_class(found, name)


def as_enum(found: object, name: str) -> type[enum.Enum]:
    """Check that ``found`` is an enumeration.

    Raises:
        UnsafeFileError: If it is not.
    """
    if isinstance(found, type) and issubclass(found, enum.Enum):
        return found
    raise UnsafeFileError(f"wants to call {name}, which is not an enumeration; refused")


def as_plain_class(found: object, name: str) -> type:
    """Check that ``found`` is a class whose instances can be rebuilt from their ``__dict__``.

    Raises:
        UnsafeFileError: If it is not.
    """
    if isinstance(found, type) and not _makes_its_own(found) and not hasattr(found, "__setstate__"):
        return found
    raise UnsafeFileError(f"holds a {name}, which cannot be rebuilt from its attributes alone; use --allow-code")


def class_name(cls: type) -> str | None:
    """The name under which a module class may be saved, or None for a class that is not known (a user's own)."""
    return _class_name(cls)


@functools.cache
def _class_name(cls: type) -> str | None:
    name = f"{cls.__module__}.{cls.__qualname__}"
    try:
        check_name(name, (), value=False)
        return name if as_module_class(resolve(name), name) is cls else None
    except ModelFileError:
        return None


def value_name(value: object) -> str | None:
    """The name under which a class or function may be saved as a value, or None."""
    if isinstance(value, type) and _within(f"{value.__module__}.{value.__qualname__}", _VALUES):
        return class_name(value)
    return function_name(value)


def _function(home: str, name: str) -> object:
    found: object = getattr(importlib.import_module(home), name)
    return found


def _function_table() -> Mapping[str, Callable[[], object]]:
    """Each allowed function by its public name; looked up when it is first used, so torchvision stays unimported."""
    return {
        f"{home}.{name}": functools.partial(_function, home, name)
        for home, names in _FUNCTIONS.items()
        for name in names.split()
    }


FUNCTIONS = _function_table()


_BY_LAST_PART: dict[str, list[str]] = {}
for _name in FUNCTIONS:
    _BY_LAST_PART.setdefault(_name.rpartition(".")[2], []).append(_name)


def function_name(value: object) -> str | None:
    """The public name of a function of the list above, or None for any other object. Imports nothing."""
    for name in _BY_LAST_PART.get(getattr(value, "__name__", ""), []):
        if name.rpartition(".")[0] in sys.modules and FUNCTIONS[name]() is value:
            return name
    return None


def function_alias(name: str) -> str:
    """Give the public name of a function that a pickle calls by its home in torch, as ``torch._C._nn.gelu``."""
    home, _, attribute = name.rpartition(".")
    public = {
        "torch._C._nn": "torch.nn.functional",
        "_operator": "operator",
        "torch.functional": "torch",
        "torch._VF": "torch",
        "torch._C._VariableFunctions": "torch",
    }.get(home)
    return f"{public}.{attribute}" if f"{public}.{attribute}" in FUNCTIONS else name
