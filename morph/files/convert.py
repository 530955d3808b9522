"""Write a model in another file format; the file is opened again and compared with the model before it takes its name.

Formats: our own file (``morph``), a pickle of the whole module (``module``), its tensors (``state-dict``,
``safetensors``), and what it computes in evaluation mode, for any batch size (``torch-export``, ``onnx``).
"""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_model as save_safetensors
from torch import Tensor, nn

from morph.atomic import atomic_path, check_writable
from morph.errors import CheckFailedError, MorphError, OutputError, TraceError
from morph.files import open_model, save_model

Result = tuple[tuple[str, ...], float | None]


@dataclass(frozen=True)
class Conversion:
    """What was written and how it was checked.

    Attributes:
        path: The new file.
        format: Its format, a key of `FORMATS`.
        bytes: Its size.
        checked: The comparisons that were made.
        max_difference: Largest ``|difference|`` of the outputs on a random batch; None where none was compared.
    """

    path: Path
    format: str
    bytes: int
    checked: tuple[str, ...]
    max_difference: float | None


@dataclass(frozen=True)
class _Job:
    """What a writer needs; ``file`` is the temporary one."""

    model: nn.Module
    file: Path
    input_shape: tuple[int, ...] | None
    opset: int | None

    def batch(self, size: int) -> Tensor:
        """Make random samples ``[size, *input_shape]`` of the model's type; the global random state stays."""
        tensors = (*self.model.parameters(), *self.model.buffers(), torch.empty(0))
        like = next(t for t in tensors if t.is_floating_point())
        generator = torch.Generator().manual_seed(size)
        return torch.randn(size, *(self.input_shape or ()), generator=generator).to(like)


def convert(
    model: nn.Module, path: str | Path, to: str, *,
    input_shape: tuple[int, ...] | None, opset: int | None = None, force: bool = False,
) -> Conversion:  # fmt: skip
    """Write ``model`` to ``path`` in another format and compare the file with the model.

    The model, its train flags and the global random state stay as they are.

    Args:
        model: Any module that maps one batch to tensors.
        path: The new file; it appears whole and checked, or not at all.
        to: A key of `FORMATS`.
        input_shape: Shape of one sample without the batch axis; ``torch-export`` and ``onnx`` need it. Without it, the
            tensors of a ``morph`` or ``module`` file are compared, but no outputs.
        opset: Version of the ONNX operators; None leaves it to the exporter.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: If the format is unknown or does not fit the arguments, or the file cannot be written.
        TraceError: If the model does not accept such inputs or cannot be exported.
        CheckFailedError: If the file does not give back what the model gives; it is removed.
    """
    path = Path(path)
    check_writable(path, force=force)
    _check_request(path, to, input_shape, opset)
    with atomic_path(path, force=force) as file, _silence():
        try:
            checked, difference = FORMATS[to](_Job(model, file, input_shape, opset))
        except OSError:
            raise
        except MorphError as error:
            raise type(error)(str(error).replace(str(file), str(path))) from error
        except Exception as error:  # writers raise what they like
            raise OutputError(f"{path}: not written as {to}: {_line(error)}") from error
    return Conversion(path, to, path.stat().st_size, checked, difference)


def _check_request(path: Path, to: str, input_shape: tuple[int, ...] | None, opset: int | None) -> None:
    """Refuse what cannot end well."""
    if to not in FORMATS:
        raise OutputError(f"{path}: {to!r} is no format; known are {', '.join(FORMATS)}")
    if opset is not None and to != "onnx":
        raise OutputError(f"{path}: an opset belongs to onnx alone, got opset={opset} for {to}")
    if to in ("torch-export", "onnx") and input_shape is None:
        raise OutputError(f"{path}: {to} needs the shape of one sample; give --input, e.g. --input 3x32x32")
    if missing := [n for n in ("onnx", "onnxscript") if to == "onnx" and importlib.util.find_spec(n) is None]:
        raise OutputError(f"{path}: onnx needs {' and '.join(missing)}, not installed; pip install torch-morph[onnx]")


def _line(error: Exception) -> str:
    """Squeeze the text of a foreign error into part of a line."""
    return textwrap.shorten(str(error) or type(error).__name__, 300)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Clear all train flags, and give every module its own back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False  # not eval(), which exported programs refuse
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what exporters print, warn and log away from the user while the block runs."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _tensors(output: object) -> list[Tensor]:
    """Flatten the output of a model."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return _tensors(list(output.values()))
    return [t for item in output for t in _tensors(item)] if isinstance(output, (list, tuple)) else []


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Run ``model`` in evaluation mode."""
    try:
        with torch.no_grad(), _evaluation(model):
            return _tensors(model(x))
    except Exception as error:  # whatever the user's forward raises
        shape = "x".join(map(str, x.shape[1:]))
        raise TraceError(f"the model does not run on samples of {shape} (see --input): {_line(error)}") from error


def _difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """Return the largest ``|difference|``; refuse one above the square root of the type's precision."""
    shapes, found = ([tuple(t.shape) for t in tensors] for tensors in (expected, got))
    if shapes != found:
        raise CheckFailedError(f"the file gives outputs of shape {found}, the model {shapes}; nothing was written")
    largest = 0.0
    for tensor, other in zip(expected, got, strict=True):
        a, b = tensor.cpu().double(), other.cpu().double()
        scale, worst = (t.abs().max().item() if t.numel() else 0.0 for t in (a, a - b))
        precision = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
        if not worst <= math.sqrt(precision) * scale:  # also if either is not a number
            raise CheckFailedError(f"the file's outputs are off by {worst:.2e} of {scale:.2e}; nothing was written")
        largest = max(largest, worst)
    return largest


def _same_tensors(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    """Compare names, types and bits; return what was compared."""
    if odd := sorted(expected.keys() ^ got.keys()):
        raise CheckFailedError(f"the file and the model differ in {len(odd)} names, e.g. {odd[0]}; nothing was written")
    for name, tensor in expected.items():
        a, b = (t.detach().cpu().contiguous() for t in (tensor, got[name]))
        same = a.dtype == b.dtype and a.shape == b.shape
        if not same or not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            raise CheckFailedError(f"the file holds another {name} than the model; nothing was written")
    return f"{len(expected)} tensors are equal bit for bit"


def _state(job: _Job) -> dict[str, Tensor]:
    """Return the state_dict, which must hold tensors and nothing else."""
    state: dict[str, Tensor] = job.model.state_dict()
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise OutputError(f"{odd[0]} in the state_dict is no tensor, and this format holds nothing else")
    return state


def _same_module(job: _Job, reopened: nn.Module) -> Result:
    """Compare a module that was opened again with the model."""
    tensors = _same_tensors(job.model.state_dict(), reopened.state_dict())
    if job.input_shape is None:
        return (tensors,), None
    x = job.batch(2)
    return (tensors, "outputs on a random batch of 2"), _difference(_outputs(job.model, x), _outputs(reopened, x))


def _write(save: Callable[..., None], value: object, file: Path) -> None:
    """Save to memory first: on a full disk torch's own writers give no OSError, and may end the process."""
    save(value, buffer := io.BytesIO())
    file.write_bytes(buffer.getbuffer())


def _morph(job: _Job) -> Result:
    """Write our own file."""
    save_model(job.model, job.file, input_shape=job.input_shape, force=True)
    return _same_module(job, open_model(job.file).model)


def _module(job: _Job) -> Result:
    """Pickle the whole module."""
    _write(torch.save, job.model, job.file)
    return _same_module(job, torch.load(job.file, weights_only=False))  # written just above


def _state_dict(job: _Job) -> Result:
    """Write the tensors with torch.save."""
    _write(torch.save, state := _state(job), job.file)
    return (_same_tensors(state, torch.load(job.file, weights_only=True)),), None


def _safetensors(job: _Job) -> Result:
    """Write the tensors with safetensors; tied ones once, their other names in the metadata."""
    state = _state(job)
    save_safetensors(job.model, str(job.file))
    stored = load_file(job.file)
    with safe_open(job.file, "pt") as file:
        tied = file.metadata() or {}
    got = {name: stored[key] for name in state if (key := tied.get(name, name)) in stored}
    return (_same_tensors(state, got),), None


def _exported(job: _Job) -> torch.export.ExportedProgram:
    """Export what the model computes in evaluation mode; the batch axis is free."""
    _outputs(job.model, x := job.batch(3))
    try:
        with torch.no_grad(), _evaluation(job.model):
            return torch.export.export(job.model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # torch.export raises many kinds
        raise TraceError(f"torch.export cannot export the model for any batch size: {_line(error)}") from error


def _torch_export(job: _Job) -> Result:
    """Write a torch.export archive."""
    _write(torch.export.save, _exported(job), job.file)
    x, reloaded = job.batch(2), torch.export.load(job.file).module()  # written just above
    return ("the reloaded program on a random batch of 2",), _difference(_outputs(job.model, x), _outputs(reloaded, x))


def _onnx(job: _Job) -> Result:
    """Write one ONNX file, weights inside."""
    import onnx

    expected = _outputs(job.model, x := job.batch(2))
    names = ["output"] if len(expected) == 1 else [f"output_{i}" for i in range(len(expected))]
    wishes: dict[str, Any] = {"input_names": ["input"], "output_names": names, "dynamic_shapes": ({0: "batch"},)}
    program = torch.onnx.export(_exported(job), opset_version=job.opset, **wishes)
    assert program is not None  # it is None only where a file name is given
    program.save(job.file, external_data=False)
    onnx.checker.check_model(str(job.file), full_check=True)
    written = {item.domain: item.version for item in onnx.load(str(job.file)).opset_import}[""]
    if job.opset not in (None, written):  # the exporter falls back without an error
        raise OutputError(f"the exporter cannot write opset {job.opset} for this model, it gives {written}")
    runner, got = _run_onnx(job.file, x)
    return ("onnx.checker", f"{runner} on a random batch of 2"), _difference(expected, got)


def _run_onnx(file: Path, x: Tensor) -> tuple[str, list[Tensor]]:
    """Run an ONNX file by onnxruntime if it is installed, else by the reference; return which and the outputs."""
    feed = {"input": x.cpu().numpy()}
    runner = "onnxruntime" if importlib.util.find_spec("onnxruntime") else "onnx.reference"
    library = importlib.import_module(runner)
    if runner == "onnxruntime":
        session = library.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    else:
        session = library.ReferenceEvaluator(str(file))
    return runner, [torch.as_tensor(array) for array in session.run(None, feed)]


FORMATS: dict[str, Callable[[_Job], Result]] = {
    "morph": _morph, "module": _module, "state-dict": _state_dict, "safetensors": _safetensors,
    "torch-export": _torch_export, "onnx": _onnx,
}  # fmt: skip
