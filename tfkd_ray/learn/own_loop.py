"""A training loop of the user's own: its setting, and checks of all that it yields.

`OwnLoop` names a generator `train(config, state, teacher, **args)` that yields one `Epoch` an
epoch. `loop.train` runs it in place of its own stages; checkpoints, resuming, stopping and the
evaluation on the test split stay unchanged.

Shapes: N = images, C = channels, H, W = height and width, K = classes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import numbers
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from pydantic import JsonValue, model_validator

from tfkd_ray.learn.images import Images, ImageSet, address, random_states, seed_all
from tfkd_ray.learn.own import code_of, imported, is_only_reading
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError, Sentences
from tfkd_ray.settings.schema import Settings
from tfkd_ray.settings.yaml import Tree, Values
from tfkd_ray.store.experiment import FULL_LENGTH, STOPPED_BY

if TYPE_CHECKING:
    from torch import Tensor, nn

NEEDED = ("epoch", "train_loss")
"""Metrics that every epoch has."""
TAKEN_NAMES = {"failed", "done", "note", "node", "config", "trial", FULL_LENGTH, STOPPED_BY}
"""Names that mean something else in a trial's results."""
_END = object()


class Diverged(ArithmeticError):
    """Raised if the training or validation loss is no longer finite."""


class Yielded(NamedTuple):
    """One epoch as a user's loop yielded it, checked."""

    metrics: dict[str, float]
    state: Callable[[], Tree]
    """Returns the state to resume from: `model`, and anything else that the loop keeps."""


class OwnLoop(Settings):
    """A training loop of your own: `package.module:function`, a generator.

    It is called as `function(config, state, teacher, **args)` and yields one `Epoch(metrics, state)`
    for each epoch of `config.epochs`. It trains `config.build_student()`, whose `state_dict()` is
    `model` in its state.
    """

    name: Literal["own"] = "own"
    path: str
    """Path of the function, `package.module:name`, in an installed package or in the working
    directory of `tfkd`, where it also runs."""
    test: str | None = None
    """Path of a function `(config, network, images)` that returns the logits [N, K] of uint8 images
    [N, C, H, W] on test. None: they are the network's outputs on normalised images."""
    args: dict[str, JsonValue] = {}
    """More arguments of the function. Each may be searched."""
    digest: str | None = None
    """Digest of the files of your own that the functions' modules load, recorded when a file is
    read. A run refuses other code; without it, the code as it is now counts."""

    def __hash__(self) -> int:
        return hash(json.dumps(self.tree))

    @model_validator(mode="before")
    @classmethod
    def _recorded(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping) or is_only_reading() or tree.get("digest") is not None:
            return tree
        given = [tree.get("path"), tree.get("test")]
        digest = _digest_of([path for path in given if isinstance(path, str)])
        return tree if digest is None else {**tree, "digest": digest}

    @property
    def _paths(self) -> list[str]:
        return [path for path in (self.path, self.test) if path is not None]

    def of_teacher(self) -> OwnLoop:
        """Return the loop that trains a teacher: without the arguments, which may be searched."""
        digest = None if self.digest is None else self.digest.partition("-")[0]
        return OwnLoop(path=self.path, digest=digest)

    def problems(self, *, trains_teacher: bool) -> Sentences:
        """Yield a sentence for each reason why the functions cannot be called."""
        if is_only_reading():
            return
        batch = ["config", "state", "teacher"]
        found = list(_call_problems(self.path, "loop.path", batch, self.args))
        yield from found
        if trains_teacher and self.args and not found:
            for problem in _call_problems(self.path, "loop.path", batch, {}):
                yield f"{problem}: the teacher is trained with its defaults; give each argument one"
        if self.test is not None:
            yield from _call_problems(self.test, "loop.test", ["config", "network", "images"], {})

    def changed(self) -> str | None:
        """Return a sentence if the code is not what was recorded, else None."""
        digest = _digest_of(self._paths)
        if digest is None or self.digest in (None, digest):
            return None
        files = ", ".join(dict.fromkeys(str(code_of(path)) for path in self._paths))
        return (
            f"the code of the loop {own_code.shown_name(self.path)} is not what it was: {files} had digest "
            f"{self.digest}, and has {digest} now"
        )

    def as_it_is_now(self) -> Self:
        """Return the same loop with its present code recorded."""
        return self.model_copy(update={"digest": _digest_of(self._paths)})

    def ready(self) -> Self:
        """Return this loop for a run; raise a ConfigError if its code is not what was recorded."""
        if (changed := self.changed()) is not None:
            raise ConfigError(
                f"loop.digest: {changed}. Put the old code back, or start a new run with the present code (in a file "
                "of one run: leave digest out)"
            )
        return self

    def epochs(
        self,
        config: Any,
        state: Tree | None,
        teacher: nn.Module | None,
        done: int,
    ) -> Generator[Yielded, None, None]:
        """Yield the epochs of the function, checked; the global generators are seeded before each.

        Args:
            config: a `TrainConfig`.
            done: number of epochs in `state`.
        """
        function = imported(self.path, "loop.path")
        found = own_code.at_home(function)(config, state, teacher, **self.args)
        if not isinstance(found, Iterator):
            raise self._wrong(
                f"returns {_type_of(found)}; it must be a generator that yields epochs"
            )
        following = own_code.at_home(lambda: next(found, _END))
        put_back = random_states()
        try:
            for epoch in range(done + 1, config.epochs + 1):
                seed_all(address(config.seed, "loop", epoch))
                item = following()
                if item is _END:
                    ended = f"ends after epoch {epoch - 1}" if epoch > 1 else "yields no epoch"
                    raise self._wrong(
                        f"{ended}; it must yield one Epoch for each of the {config.epochs} epochs, up to config.epochs"
                    )
                yielded = self._checked(item, epoch)
                if epoch == config.epochs:
                    last = copy.deepcopy(self._content(yielded, epoch))
                    if following() is not _END:
                        raise self._wrong(
                            f"yields another epoch after its last, {epoch} (config.epochs); it must end there"
                        )
                    yielded = Yielded(yielded.metrics, functools.partial(dict, last))
                elif epoch == done + 1:
                    self._content(yielded, epoch)  # at once, not when a checkpoint is due
                yield yielded
        finally:
            put_back()
            if hasattr(found, "close"):
                found.close()

    def test_logits(self, config: Any, network: nn.Module, images: Images) -> Tensor:
        """Return the logits [N, K] of the test function."""
        import torch

        assert self.test is not None, f"{self=}"
        what = f"loop.test: {self.test}"
        if not isinstance(images, ImageSet):
            raise ConfigError(
                f"{what} gets all images at once, and those of data {config.data.name} stay in files; leave it out"
            )
        function = own_code.at_home(imported(self.test, "loop.test"))
        with torch.no_grad():
            found = function(config, network.eval(), images.images)
        size = [len(images), config.data.num_classes]
        if not isinstance(found, torch.Tensor) or list(found.shape) != size:
            raise ConfigError(f"{what} must return logits {size}, a tensor, got {_type_of(found)}")
        if not found.is_floating_point() or not bool(found.isfinite().all()):
            raise ConfigError(f"{what} returns logits that are not finite numbers")
        return found.float()

    def _checked(self, item: Any, epoch: int) -> Yielded:
        """Return what was yielded for an epoch; raise a ConfigError if it is no such thing."""
        if not isinstance(item, tuple) or len(item) != len(Yielded._fields):
            raise self._wrong(f"yields {_type_of(item)}; it must yield Epoch(metrics, state)")
        metrics, state = item
        if not isinstance(metrics, Mapping):
            raise self._wrong(f"yields metrics that are {_type_of(metrics)}, not a dictionary")
        if not callable(state):
            raise self._wrong(
                f"yields a state that is {_type_of(state)}, not a function that returns one: lambda: {{'model': ...}}"
            )
        for name in NEEDED:
            if name not in metrics:
                raise self._wrong(
                    f"yields no {name!r} in metrics, only {sorted(map(str, metrics))}"
                )
        found = {str(name): self._number(name, value) for name, value in metrics.items()}
        if found["epoch"] != epoch:
            raise self._wrong(
                f"yields epoch {found['epoch']:g} where epoch {epoch} is next; they count from 1, and after a resume "
                "from state['epoch'] + 1"
            )
        for name, number in found.items():
            if not math.isfinite(number):
                raise Diverged(
                    f"{name} is {number} at epoch {epoch}; a smaller learning rate may help, or {self.path} has a "
                    "log(0), 0/0 or overflow"
                )
        return Yielded(found, state)

    def _number(self, name: Any, value: Any) -> float:
        if not isinstance(name, str) or not name.isidentifier() or name in TAKEN_NAMES:
            raise self._wrong(
                f"yields a metric called {name!r}; a name has letters, digits and _, and is none of "
                f"{', '.join(sorted(TAKEN_NAMES))}"
            )
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise self._wrong(
                f"yields {name} as {_type_of(value)}, not a number; of a tensor take .item()"
            )
        return float(value)

    def _content(self, yielded: Yielded, epoch: int) -> Tree:
        """Return a copy of a loop's state; raise a ConfigError if a checkpoint cannot hold it."""
        found = yielded.state()
        where = f"yields a state at epoch {epoch} that"
        if not isinstance(found, Mapping) or not isinstance(found.get("model"), Mapping):
            raise self._wrong(
                f"{where} has no state_dict under 'model': {{'model': student.state_dict(), ...}}"
            )
        for path, kind in _not_kept(found, ()):
            raise self._wrong(
                f"{where} has a {kind} at {path}; a checkpoint holds tensors, numbers, text, lists and dictionaries"
            )
        return dict(found)

    def _wrong(self, problem: str) -> ConfigError:
        return ConfigError(f"loop.path: {self.path} {problem}")


def _digest_of(paths: list[str]) -> str | None:
    """Return the digests of the modules of some functions; None if one cannot be imported."""
    try:
        for path in paths:
            imported(path, "loop")
    except ConfigError:  # `problems` tells it
        return None
    found = dict.fromkeys(code_of(path).digest for path in paths)
    return "-".join(found) or None


def _call_problems(path: str, where: str, first: list[str], args: Values) -> Sentences:
    """Yield a sentence if the function at a path does not take these arguments."""
    try:
        function = imported(path, where)
    except ConfigError as error:
        yield from error.problems
        return
    if not callable(function):
        yield f"{where}: {path} is {function!r}, not a function"
        return
    try:
        inspect.signature(function).bind(*first, **args)
    except TypeError as error:
        call = ", ".join([*first, *(f"{name}={value!r}" for name, value in args.items())])
        yield f"{where}: {path} cannot be called as function({call}): {error}; see loop.args"
    except ValueError:  # written in C, without a signature
        pass


def _type_of(value: Any) -> str:
    """Return what a value is, for a sentence."""
    shape = getattr(value, "shape", None)
    size = f" {list(shape)}" if isinstance(shape, tuple) else ""
    return "None" if value is None else f"a {type(value).__name__}{size}"


def _not_kept(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """Yield (path, type) of the parts of a state that a checkpoint cannot hold."""
    import torch

    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _not_kept(below, (*path, key))
    elif type(value) in (list, tuple):
        for k, below in enumerate(value):
            yield from _not_kept(below, (*path, k))
    elif not isinstance(value, torch.Tensor) and type(value) not in (
        str, int, float, bool, type(None),
    ):  # fmt: skip
        yield ".".join(map(str, path)), type(value).__name__
