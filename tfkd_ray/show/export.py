"""The export of a chosen student: weights, configuration, graphs that run without tfkd_ray, a card.

    README.md            model card: content, choice, verdict or its absence, how to reproduce it
    student.safetensors  weights; the header names the run
    config.yaml          the resolved configuration: `tfkd train config.yaml` trains it again
    student.pt2          torch.export: uint8 images in, logits out, any batch size; loads with torch alone
    student.onnx         the same for ONNX, where asked for
    SHA256SUMS           checksums of all of these, in the format of sha256sum: `sha256sum --check SHA256SUMS`

To add a format, write a function like `_pt2` and its line in `_graphs`. Exporting never opens the test
split.

Shapes: images [B, C, H, W] uint8 in, logits [B, K] out.
"""

import fcntl
import glob
import importlib.metadata
import importlib.util
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tfkd_ray.learn.checkpoint import WEIGHTS, load_weights, save_weights
from tfkd_ray.learn.dataset import Dataset
from tfkd_ray.learn.evaluate import EVAL_PIXELS
from tfkd_ray.learn.loop import LOOP_VERSION
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import PART, check_writable, expanded, kind_of, sha256_of, write_text
from tfkd_ray.settings.yaml import Tree, dump_yaml
from tfkd_ray.show.card import card_text, weights_header
from tfkd_ray.show.chosen import GRAPH, NOT_CONFIRMED, ONNX, OPSET, SUMS, Chosen, choose

IMAGES = 256
"""Images on which the graphs are compared, from validation, or from train if validation has
fewer."""
EXPORT_TOLERANCE = 1e-3
"""Largest tolerated difference of logits, as a fraction of the largest logit."""


class ExportFailed(RuntimeError):
    """Raised when an exported graph does not compute the student's logits."""


class Difference(NamedTuple):
    """The difference between an exported graph and the student."""

    largest: float
    """Largest absolute difference of logits, over all images and classes."""
    scale: float
    """The largest absolute logit of the student."""


def export(
    source: Path,
    out: Path,
    *,
    arm: str | None = None,
    seed: int | None = None,
    onnx: bool = False,
    licence: str | None = None,
) -> Tree:
    """Write a student's folder atomically.

    Args:
        source: an experiment (its best full-length trial), a trial's folder, what `tfkd train`
            made, or a comparison.
        arm: arm of a comparison. None: the candidate that is better than every baseline; of
            several, or if none is, the one with the best mean on the test split.
        seed: seed of a comparison. None: the first that was trained to the end.
        licence: licence of the weights, as the Hugging Face Hub writes it (apache-2.0). None: the
            card says that there is none.

    Returns:
        `name`, `folder`, `files`, `split` and `images` (number in the comparison), `differences`
        (by file: `largest` of logits, and the student's `scale`), `problems` (by file: why a graph
        could not be made) and `confirmed` (whether a verdict is in the card).
    """
    source, out = expanded(source).absolute(), expanded(out).absolute()
    _check_export(out, onnx, licence)
    chosen = choose(source, arm, seed)
    data = chosen.config.data
    data.check()
    network, notes = network_of(chosen)
    split, batches = _images(data)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _whole_folder(out) as part:
        save_weights(part / WEIGHTS, network.state_dict(), weights_header(chosen, licence))
        write_text(part / "config.yaml", dump_yaml(chosen.config.tree))
        found, problems = _graphs(part, network, data, batches, onnx)
        result: Tree = {
            "name": chosen.name,
            "folder": str(out),
            "split": split,
            "images": sum(map(len, batches)),
            "differences": {name: difference._asdict() for name, difference in found.items()},
            "problems": problems,
            "confirmed": chosen.verdict[:1] != [NOT_CONFIRMED],
        }
        write_text(part / "README.md", "\n".join(card_text(chosen, result, notes, licence)) + "\n")
        names = sorted(path.name for path in part.iterdir())
        write_text(part / SUMS, "".join(f"{sha256_of(part / name)}  {name}\n" for name in names))
    return {**result, "files": [*names, SUMS]}


def _check_export(out: Path, onnx: bool, licence: str | None) -> None:
    """Raise if the export could not be written, before anything is read."""
    kind = kind_of(out, follow=False)
    if out.name in ("", ".."):
        raise ConfigError("is no valid name for a new directory; choose another: -o DIR", out)
    if os.path.lexists(out) and (kind != "a directory" or any(out.iterdir())):
        what = "is not empty" if kind == "a directory" else f"is {kind or 'a file'}"
        raise ConfigError(f"{what}; choose another directory: -o DIR", out)
    check_writable(out.parent, "-o DIR")
    missing = [
        p
        for p in ("onnx", "onnxscript", "onnxruntime")
        if onnx and importlib.util.find_spec(p) is None
    ]
    if missing:
        raise ConfigError(
            f"--onnx: {', '.join(missing)} not installed here: pip install 'tfkd_ray[onnx]'"
        )
    if licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", licence):
        raise ConfigError(
            f"--licence: a short name such as apache-2.0, mit or cc-by-4.0, got {licence!r}"
        )


# --- weights and graphs ----------------------------------------------------------------------------------------


def network_of(chosen: Chosen) -> tuple[nn.Module, list[str]]:
    """Return the student in eval mode on the CPU, and notes on its file."""
    config, path = chosen.config, chosen.folder / WEIGHTS
    if not path.is_file():
        raise ConfigError(f"its weights are missing: it has no {WEIGHTS}", chosen.folder)
    try:
        with torch.random.fork_rng(devices=[]):
            network = config.build_student()
        network.load_state_dict(load_weights(path, network=network))
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ConfigError(f"damaged: {error}; train it again", path) from None
    except RuntimeError as error:  # raised by load_state_dict
        problem = " ".join(str(error).split())
        raise ConfigError(
            f"its weights do not fit its configuration: {problem[:300]}", path
        ) from None
    run = config.fingerprint(LOOP_VERSION)
    notes = []
    if header.get("run") != run:
        notes.append(
            f"The weights say that run {header.get('run')} made them, but this release computes run {run} from the "
            "configuration: another release trained them, or a file was changed by hand."
        )
    return network.eval().requires_grad_(False), notes


def _images(data: Dataset) -> tuple[str, list[Tensor]]:
    """Return the split's name, and images spread evenly over it.

    The images are uint8, in batches of 1, 7 and more.
    """
    train, val = data.load()
    split, images = "train", train
    if val is not None and len(val) >= min(IMAGES, len(train)):
        split, images = "validation", val
    index = (
        torch.linspace(0, len(images) - 1, min(IMAGES, len(images)), dtype=torch.float64)
        .round()
        .long()
    )
    batch = max(1, EVAL_PIXELS["cpu"] // math.prod(data.shape[1:]))
    shares = [share for share in (index[:1], index[1:8], *index[8:].split(batch)) if len(share)]
    return split, list(images.read(shares))


class _Graph(nn.Module):
    """The student behind its normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, data: Dataset) -> None:
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in data.statistics())
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images.float() - self.mean) / self.std)
        return logits


def _graphs(
    folder: Path, network: nn.Module, data: Dataset, batches: Sequence[Tensor], onnx: bool
) -> tuple[dict[str, Difference], dict[str, str]]:
    """Write the graphs; return the difference by file, and by file why it could not be written."""
    graph = _Graph(network, data).eval()
    with torch.no_grad():
        expected = torch.cat([graph(images) for images in batches])
    found, problems = dict[str, Difference](), dict[str, str]()
    forms: dict[str, Callable[[Path, ExportedProgram, Sequence[Tensor]], list[Tensor]]] = {
        GRAPH: _pt2
    }
    forms |= {ONNX: _onnx} if onnx else {}
    try:
        program = _program(graph, data.shape)
    except Exception as error:  # tracing runs the author's code, which can raise anything
        return {}, dict.fromkeys(forms, f"torch.export: {_export_reason(error)}")
    for name, write in forms.items():
        try:
            logits = torch.cat(write(folder / name, program, batches))
        except Exception as error:  # an operation that the format lacks can raise anything
            (folder / name).unlink(missing_ok=True)
            problems[name] = _export_reason(error)
            continue
        found[name] = difference = Difference(
            float((logits.double() - expected.double()).abs().max()),
            float(expected.double().abs().max()),
        )
        if not difference.largest <= EXPORT_TOLERANCE * difference.scale:  # true for NaN, too
            raise ExportFailed(
                f"{name}: its logits differ from the student's by up to {difference.largest:.2g} on {len(expected)} "
                f"images, where {EXPORT_TOLERANCE:g} of their scale ({difference.scale:.3g}) is allowed; "
                "nothing was written"
            )
    return found, problems


def _program(graph: nn.Module, shape: tuple[int, int, int]) -> ExportedProgram:
    """Return the graph for any batch size, without paths of this machine in it."""
    example = (torch.zeros(2, *shape, dtype=torch.uint8),)
    sizes = {"images": {0: Dim("batch", min=1)}}
    try:
        program = torch.export.export(graph, example, dynamic_shapes=sizes, strict=False)
    except Exception as error:  # each mode traces code that the other cannot, such as len(images)
        try:
            program = torch.export.export(graph, example, dynamic_shapes=sizes, strict=True)
        except Exception:
            raise error from None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _pt2(path: Path, program: ExportedProgram, batches: Sequence[Tensor]) -> list[Tensor]:
    """Write the graph for torch; return its logits, computed from the file."""
    torch.export.save(program, path)
    module = torch.export.load(path).module()
    with torch.no_grad():
        return [module(images) for images in batches]


def _onnx(path: Path, program: ExportedProgram, batches: Sequence[Tensor]) -> list[Tensor]:
    """Write the graph for ONNX; return its logits, computed from the file by onnxruntime."""
    import onnxruntime

    names: Tree = {"input_names": ["images"], "output_names": ["logits"]}
    torch.onnx.export(
        program, (), path, dynamo=True, opset_version=OPSET, external_data=False, verbose=False, **names
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(session.run(None, {"images": images.numpy()})[0]) for images in batches
    ]


def _export_reason(error: Exception) -> str:
    """Return an exception as one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


# --- files -----------------------------------------------------------------------------------------------------


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write to. It becomes `out` on success and is removed on failure.

    Leftovers of killed exports to the same place are removed: nobody holds their locks.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * 8}{PART}"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left)
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}{PART}")
    part.mkdir()
    try:
        with ExitStack() as held:
            with suppress(OSError):  # the file system has no locks
                held.enter_context(_locked(part))
            yield part
            for path in part.iterdir():
                with path.open("rb") as file:
                    os.fsync(file)
            part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; raise an OSError if another process holds it, or if it is no folder."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
