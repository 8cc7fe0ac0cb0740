"""Arms x seeds: train each arm with each seed as Ray trials, then judge all on the test split once.

A comparison is a directory like an experiment: `confirm.yaml` lists the arms and seeds,
`trials/<arm>-s<seed>/` holds each run, `confirm.json` the outcome. It can be stopped and resumed.
"""

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import tune
from ray.tune.search import Searcher
from safetensors.numpy import load_file
from torch import Tensor, nn

from tfkd_ray.learn import teachers
from tfkd_ray.learn.checkpoint import WEIGHTS, load_weights, save_weights
from tfkd_ray.learn.config import TeacherRun, TrainConfig
from tfkd_ray.learn.dataset import OF_UNLABELLED, Dataset, digest_of
from tfkd_ray.learn.evaluate import predictions, tf32
from tfkd_ray.learn.images import Images
from tfkd_ray.learn.loop import LOOP_VERSION
from tfkd_ray.learn.several import combined
from tfkd_ray.run.callbacks import Lock, Losses, in_order
from tfkd_ray.run.lent import gpus_of_this_node, share_of_this_node
from tfkd_ray.run.stops import Stops
from tfkd_ray.run.tune import (
    OnTeacher,
    OnTeacherEpoch,
    SharingFifo,
    assemble,
    only_ours,
    prepare,
    train_teachers,
)
from tfkd_ray.settings import own_code
from tfkd_ray.settings.columns import in_columns, to_stderr, wrapped
from tfkd_ray.settings.errors import ConfigError, Say, Sentences, in_file
from tfkd_ray.settings.files import check_writable, write_text
from tfkd_ray.settings.yaml import Tree
from tfkd_ray.show.report import objective_text
from tfkd_ray.show.tensorboard import TensorBoard, write_comparison
from tfkd_ray.space.arms import Arm, Arms, Comparison, Run, end_comparison, read_comparison
from tfkd_ray.store.assignment import SECTION, Assignment
from tfkd_ray.store.experiment import (
    Record,
    append_line,
    damaged,
    name_of_test,
    parse_json,
    read_records,
    read_text,
    trials_folder,
    write_record,
)
from tfkd_ray.store.storage import Experiment, to_continue
from tfkd_ray.verdict import verdict
from tfkd_ray.verdict.scores import SCORES, score_of, scores
from tfkd_ray.verdict.seed_plan import SeedPlan

LOGITS = "test.safetensors"
"""A run's logits [N, K] on the test split, the labels [N], and its teacher's guesses [N]."""
OPENINGS = "test_openings.jsonl"
"""File beside the experiments: one line for each time that a test split was opened."""
TRIES = 2
"""Number of times that a failing run is tried before it is reported as failed."""


class ListSearcher(Searcher):  # type: ignore[misc]
    """Proposes a list of runs in order, each again if it fails, up to `TRIES` times."""

    def __init__(self, proposals: Sequence[Tree]) -> None:
        super().__init__(metric="train_loss", mode="min")
        self._waiting = deque(proposals)
        self._running: dict[str, Tree] = {}
        self._tries: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Tree | str | None:
        """Return the next run, None while a running one may still fail, or FINISHED."""
        if not self._waiting:
            return None if self._running else str(Searcher.FINISHED)
        proposal = self._waiting.popleft()
        self._running[trial_id] = proposal
        return proposal

    def on_trial_result(self, trial_id: str, result: Tree) -> None:
        pass

    def on_trial_complete(
        self, trial_id: str, result: Tree | None = None, error: bool = False
    ) -> None:
        proposal = self._running.pop(trial_id, None)
        failed = error or bool((result or {}).get("failed"))
        if proposal is None or not failed:
            return
        name = Assignment.of(proposal).name
        self._tries[name] = self._tries.get(name, 0) + 1
        if self._tries[name] < TRIES:
            self._waiting.append(proposal)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the experiment's files hold the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the experiment's files hold the state."""


def comparison_tuner(
    comparison: Experiment | Path,
    *,
    callbacks: Sequence[tune.Callback] = (),
    on_teacher: OnTeacher | None = None,
    on_teacher_epoch: OnTeacherEpoch | None = None,
    on_note: Say | None = None,
    seeds: int | None = None,
) -> tune.Tuner:
    """Return a Tuner that trains a comparison's missing runs; train its teachers first.

    Args:
        seeds: only the runs of so many first seeds. None: all.
    """
    comparison = to_continue(comparison)
    storage, directory = comparison.storage, comparison.folder
    compared = read_comparison(directory)
    here = (torch.__version__.split("+")[0], LOOP_VERSION)
    if compared.made_with != here:
        raise ConfigError(
            f"begun with torch {compared.made_with[0]} and loop version {compared.made_with[1]}, and here are "
            f"{here[0]} and {here[1]}: its runs could not be paired; begin a new comparison",
            directory,
        )
    runs = compared.runs_on_data
    if seeds is not None:
        runs = runs[: seeds * len(compared.arms.arms)]
    check_writable(directory, "a directory of yours")
    config = runs[0].config
    for arm in compared.arms.arms:
        with in_file(directory):
            notes = arm.config.try_own_code()
        for note in notes:
            to_stderr(f"note: arm {arm.name}: {note}")
    config.data.examine()
    prepare(config, storage, notes=(), begun=True)  # each arm's own code was tried above
    lock = Lock(*comparison)
    without_teacher: dict[str, str] = {}

    def lost(teacher: TeacherRun, reason: str) -> None:
        without_teacher[teacher.fingerprint()] = reason

    needed = {made.fingerprint(): made for run in runs for made in run.config.teacher_runs()}
    try:
        train_teachers(needed.values(), storage, on_teacher, lost, on_note, on_teacher_epoch)
    except BaseException:
        lock.release()
        raise
    done = {r.name for r in read_records(directory) if r.status == "done"}
    for number, run in enumerate(runs):
        made = [teacher.fingerprint() for teacher in run.config.teacher_runs()]
        reasons = [without_teacher[teacher] for teacher in made if teacher in without_teacher]
        if reasons:
            done.add(run.name)
            write_record(_failed(directory, number, run, reasons[0]))
    home, proposals = own_code.here(), []
    for number, run in enumerate(runs):
        if run.name not in done:
            assignment = Assignment(
                number=number,
                name=run.name,
                arm=run.arm,
                epochs=run.config.epochs,
                parameters={"arm": run.arm, "seed": run.seed},
                storage=storage,
                directory=trials_folder(directory) / run.name,
                home=home,
            )
            proposals.append({**run.config.tree, SECTION: assignment.section()})
    losses = Losses(config=compared.runs[0].config, on_note=on_note)
    stops = Stops(comparison, on_note)
    return assemble(
        config,
        directory,
        tune.TuneConfig(
            search_alg=ListSearcher(proposals), scheduler=SharingFifo(), num_samples=-1
        ),
        tune.RunConfig(stop=stops),
        in_order(
            lock, TensorBoard(directory / "tb"), losses, callbacks, stops=stops, on_note=on_note
        ),
        max_failures=2,
        buffered=only_ours(callbacks),
    )


def _failed(directory: Path, number: int, run: Run, reason: str) -> Record:
    return Record(
        folder=trials_folder(directory) / run.name,
        number=number,
        name=run.name,
        objective=run.config.objective.called,
        status="failed",
        parameters={"arm": run.arm, "seed": run.seed},
        config=run.config.tree,
        reason=reason,
    )


# --- the test split -------------------------------------------------------------------------------


def judge_on_test(comparison: Experiment | Path, on_run: Say | None = None) -> Tree:
    """Open the test split once, judge every trained run, and return the content of confirm.json.

    Each run keeps its test logits. A file beside the experiments records that the split was opened,
    and for which comparison.
    """
    comparison = to_continue(comparison)
    storage, lock = comparison.storage, Lock(*comparison)
    try:
        with storage.up_to_date(comparison.name, storage.folder / OPENINGS):
            return _judged(comparison.folder, on_run)
    finally:
        lock.release()


def ends_at_look(comparison: Experiment | Path, seeds: int, known: Tree) -> bool:
    """Look at the test split after so many seeds; return whether the comparison ends here.

    A sequential comparison ends when every candidate is settled, or at its limit. Until then no
    test figure leaves this process: a look writes the line of its opening, and nothing else.

    Args:
        known: results of runs at earlier looks of this process, by name; it is added to.
    """
    comparison = to_continue(comparison)
    directory, storage, lock = comparison.folder, comparison.storage, Lock(*comparison)
    try:
        with storage.up_to_date(comparison.name, storage.folder / OPENINGS):
            compared = read_comparison(directory)
            assert compared.plan is not None, directory
            settled = _all_settled(directory, compared, seeds, known)
            ends = settled or seeds == compared.plan.limit
            if ends:
                end_comparison(directory, seeds)
            return ends
    finally:
        lock.release()


def _all_settled(directory: Path, compared: Comparison, seeds: int, known: Tree) -> bool:
    """Return whether more seeds would change no verdict.

    A candidate whose runs have failed is not settled. If a baseline has diverged, nothing can be
    judged, however many seeds there are.
    """
    runs = compared.runs_on_data[: seeds * len(compared.arms.arms)]
    records = {record.name: record for record in read_records(directory)}
    done = [run for run in runs if run.name in records and records[run.name].status == "done"]
    if not done:
        raise _nothing_trained(directory, len(runs))
    with _opened_test(directory, done) as tester:
        _note_opening(directory, compared, tester.digest, len(done), seeds)
        for run in done:
            if run.name not in known:
                logits, labels = tester.logits(run)
                known[run.name] = scores(logits.numpy(), labels.numpy())
    arrays, diverged = {}, set[str]()
    for arm in compared.arms.arms:
        mine = [run for run in runs if run.arm == arm.name]
        found = [_status_of(run, records.get(run.name)) | known.get(run.name, {}) for run in mine]
        arrays[arm.name] = _judged_arm(arm.name, mine, found, None, compared.arms.metric)
        diverged |= {arm.name} if any(map(_has_diverged, found)) else set()
    looked = compared.seeds[:seeds]
    verdicts = list(_verdicts(compared.arms, arrays, diverged, compared.plan, looked))
    judged = {one.name: one.verdict for _, found in verdicts for one in found.candidates}
    parts = {arm.name: arm.part for arm in compared.arms.arms}
    if not verdicts or any(parts[name] == "baseline" for name in diverged):
        return True
    candidates = [name for name, part in parts.items() if part == "candidate"]
    return all(judged.get(name, "cannot tell") != "cannot tell" for name in candidates)


def _nothing_trained(directory: Path, runs: int) -> ConfigError:
    where = trials_folder(directory)
    return ConfigError(f"none of its {runs} runs was trained to the end; see {where}", directory)


def _judged(directory: Path, on_run: Say | None) -> Tree:
    compared = read_comparison(directory)
    runs = compared.runs_on_data
    records = {record.name: record for record in read_records(directory)}
    done = [run for run in runs if run.name in records and records[run.name].status == "done"]
    if not done:
        raise _nothing_trained(directory, len(runs))
    left = [run for run in done if not _logits_file(directory, run).exists()]
    if left:
        with _opened_test(directory, left) as tester:
            for run in left:
                if on_run:
                    on_run(run.name)
                logits, labels = tester.logits(run)
                found = {"logits": logits, "labels": labels}
                guesses = tester.guesses(run)
                found |= {} if guesses is None else {"teacher": guesses}
                # before anybody can see a result; if a file cannot be read, there is none
                if run is left[0] and compared.plan is None:
                    _note_opening(directory, compared, tester.digest, len(done))
                save_weights(_logits_file(directory, run), found, {"run": run.name})
    return outcome(directory)


def _logits_file(directory: Path, run: Run) -> Path:
    return trials_folder(directory) / run.name / LOGITS


@contextlib.contextmanager
def _opened_test(directory: Path, runs: Sequence[Run]) -> Iterator["_Tester | _LentTester"]:
    """Yield the test split, opened, on a GPU if the runs have used one.

    Ray lends a GPU of this node, which has the runs' files. Without Ray in this process, which
    would know who else uses them, a GPU is simply taken.
    """
    share = min(1.0, max(run.config.gpus_per_worker for run in runs))
    if not ray.is_initialized():
        yield _Tester(directory, runs[0].config.data, on_gpu=share > 0)
    elif not 0 < share <= gpus_of_this_node():
        yield _Tester(directory, runs[0].config.data, on_gpu=False)
    else:
        lent = _LentTester(directory, runs[0].config.data, share)
        try:
            yield lent
        finally:
            lent.close()


class _Tester:
    """The test split, opened, and what trained runs say on it, on the CPU.

    Args:
        directory: of the comparison.
        on_gpu: whether to compute on a GPU, if torch sees one.
    """

    def __init__(self, directory: Path, data: Dataset, *, on_gpu: bool) -> None:
        self._directory, self._data = directory, data
        self._device = torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")
        test = data.load_test()
        self.digest = digest_of(test)
        self._test = test.on(self._device)
        self._taught = _Taught(directory.parent, self._device)

    def logits(self, run: Run) -> tuple[Tensor, Tensor]:
        """Return a trained run's logits [N, K] and the labels [N]."""
        weights = trials_folder(self._directory) / run.name / WEIGHTS
        network = run.config.build_student()
        network.load_state_dict(load_weights(weights, network=network))
        network = network.to(self._device).to(memory_format=run.config.student.memory_format)
        loop = run.config.loop
        if loop is None or loop.test is None:
            found = _logits(network, self._data, self._test)
        else:
            with tf32(self._device, False):
                found = loop.ready().test_logits(run.config, network, self._test), self._test.labels
        return found[0].cpu(), found[1].cpu()

    def guesses(self, run: Run) -> Tensor | None:
        """Return the classes [N] that a run's teacher answers; see `_Taught`."""
        found = self._taught.guesses(run.config, self._test)
        return None if found is None else found.cpu()


class _LentTester:
    """A `_Tester` in a process of Ray's, with a share of a GPU of this node until `close`."""

    def __init__(self, directory: Path, data: Dataset, share: float) -> None:
        # no process of Ray's that has trained is used again: its test split is sealed
        fresh = {"env_vars": {"TFKD_JUDGES": "1"}}
        self._actor = (
            ray.remote(_TesterOfRay)
            .options(**share_of_this_node(share), runtime_env=fresh)
            .remote()
        )
        self.digest: str = self._asked("opened", directory, data, own_code.here())

    def logits(self, run: Run) -> tuple[Tensor, Tensor]:
        """Return what `_Tester.logits` does."""
        found: tuple[Tensor, Tensor] = self._asked("logits", run)
        return found

    def guesses(self, run: Run) -> Tensor | None:
        """Return what `_Tester.guesses` does."""
        found: Tensor | None = self._asked("guesses", run)
        return found

    def close(self) -> None:
        """End the process, and give the GPU back."""
        ray.kill(self._actor)

    def _asked(self, method: str, *given: Any) -> Any:
        try:
            return ray.get(getattr(self._actor, method).remote(*given))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


class _TesterOfRay:
    """The actor of a `_LentTester`."""

    def opened(self, directory: Path, data: Dataset, home: own_code.Place) -> str:
        own_code.enter(home)
        self._tester = _Tester(directory, data, on_gpu=True)
        return self._tester.digest

    def logits(self, run: Run) -> tuple[Tensor, Tensor]:
        return self._tester.logits(run)

    def guesses(self, run: Run) -> Tensor | None:
        return self._tester.guesses(run)


class _Taught:
    """The answers of teachers on the test images, computed once per teacher.

    Args:
        storage: of the teachers.
    """

    def __init__(self, storage: Path, device: torch.device) -> None:
        self._storage, self._device = storage, device
        self._guesses: dict[str, Tensor] = {}
        self._logits: dict[str, Tensor] = {}

    def guesses(self, config: TrainConfig, test: Images) -> Tensor | None:
        """Return the classes [N] that a student's teacher, or its teachers together, answer.

        None if the objective needs no teacher, or if one is not here.
        """
        runs = config.teacher_runs() if config.objective.needs_teacher else ()
        names = [teachers.teacher_name(run) for run in runs]
        if len(runs) == 1 and names[0] in self._guesses:
            return self._guesses[names[0]]
        if not runs or not all(teachers.is_trained(run, self._storage) for run in runs):
            return None
        if len(runs) == 1:
            self._guesses[names[0]] = self._asked(runs[0], config, test).argmax(dim=1)
            return self._guesses[names[0]]
        for name, run in zip(names, runs, strict=True):
            if name not in self._logits:
                self._logits[name] = self._asked(run, config, test)
        logits, temperature = [self._logits[n] for n in names], config.objective.teacher_temperature
        return combined(logits, config.shares, temperature).argmax(dim=1)

    def _asked(self, run: TeacherRun, config: TrainConfig, test: Images) -> Tensor:
        network = teachers.load_teacher(run, self._storage).to(self._device)
        return _logits(network, config.data, test)[0]


def _logits(network: nn.Module, data: Dataset, images: Images) -> tuple[Tensor, Tensor]:
    """Return (logits [N, K], labels [N]), in exact float32."""
    with tf32(images.labels.device, False):
        logits, labels = zip(*predictions(network, images, data), strict=True)
    return torch.cat(logits), torch.cat(labels)


def split_id(data: Dataset) -> str:
    """Return the test split's id: the data set's name and all settings that affect its images."""
    other = {
        "val_fraction",
        "split_seed",
        "subset",
        "label_noise",
        "check_md5",
        "image_size",
        "mean",
        "std",
        "digest",
        *OF_UNLABELLED,
    }
    tree = data.model_dump(mode="json", exclude=data.places | other)
    return data.name if set(tree) == {"name"} else json.dumps(tree, sort_keys=True)


def _note_opening(
    directory: Path, compared: Comparison, digest: str, runs: int, seeds: int | None = None
) -> None:
    """Record that the test split is opened, and its digest; refuse a split that has changed since.

    Write one line for each number of trained runs, or for each look of a sequential comparison:
    resuming a judgement that was killed adds no line.

    Args:
        seeds: of this look. None: the number of seeds is fixed.
    """
    ours = [
        opened
        for opened in openings(directory.parent, compared.data)
        if opened.get("id") == compared.id
    ]
    for opened in ours:
        if opened.get("digest", digest) != digest:
            raise ConfigError(
                f"the test split of {compared.data.name} has changed since this comparison opened it on "
                f"{opened['when'][:10]} (digest {digest}, then {opened['digest']}): restore it, or begin a new "
                "comparison",
                directory,
            )
    if seeds is not None:
        if any(opened.get("seeds") == seeds for opened in ours):
            return
    elif not (directory / "confirm.json").exists() and any(
        opened.get("runs") == runs for opened in ours
    ):
        return
    line = {
        "test": split_id(compared.data),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "experiment": directory.name,
        "id": compared.id,
        "digest": digest,
        "runs": runs,
    }
    if seeds is not None and compared.plan is not None:
        line |= {"seeds": seeds, "look": seeds - compared.plan.first + 1}
    append_line(directory.parent / OPENINGS, json.dumps(line), durable=True)


def openings(storage: Path, data: Dataset) -> list[Tree]:
    """Return the times at which a data set's test split was opened, in any storage, in order."""
    split, path = split_id(data), storage / OPENINGS
    found = []
    with damaged(path):
        for line in read_text(path).splitlines() if os.path.lexists(path) else ():
            try:
                opened = parse_json(line)
            except ValueError:  # truncated by a full disk
                continue
            if not all(isinstance(opened[key], str) for key in ("test", "when", "experiment")):
                raise ValueError(f"no opening of a test split: {line[:80]}")
            found.append(opened)
    known = {line["digest"] for line in found if line["test"] == split and "digest" in line}
    return [line for line in found if line["test"] == split or line.get("digest") in known]


# --- the outcome ----------------------------------------------------------------------------------


def outcome(directory: Path) -> Tree:
    """Return a comparison's measurements and verdicts, read from its files, as in confirm.json.

    There is one verdict for each student network that has candidates and baselines.
    """
    compared = read_comparison(directory)
    records = {record.name: record for record in read_records(directory)}
    arms, arrays, diverged = [], {}, set[str]()
    for arm in compared.arms.arms:
        runs = [run for run in compared.runs if run.arm == arm.name]
        found, right = zip(
            *(_run_outcome(directory, run, records.get(run.name)) for run in runs), strict=True
        )
        arms.append(
            {
                **arm.model_dump(
                    mode="json",
                    include={"name", "published", "published_std", "published_n", "baseline"},
                ),
                "role": arm.part,
                "student": arm.config.student.name,
                "objective": arm.config.objective.tree,
                "runs": list(found),
            }
        )
        arrays[arm.name] = _judged_arm(arm.name, runs, found, right, compared.arms.metric)
        diverged |= {arm.name} if any(_has_diverged(result) for result in found) else set()
    result = {
        "title": compared.arms.title,
        "source": compared.arms.source,
        "preset": compared.arms.preset,
        "note": compared.arms.note,
        "test": split_id(compared.data),
        "opened": openings(directory.parent, compared.data),
        "trained_on": "train" if compared.hold_out else "train and validation",
        "arms": arms,
        "notes": list(_notes_of(directory, compared)),
        "verdicts": [
            {
                "student": student,
                "text": verdict.verdict_table(judged, arms=False),
                **judged.to_json(),
            }
            for student, judged in _verdicts(
                compared.arms, arrays, diverged, compared.plan, compared.seeds
            )
        ],
    }
    write_text(directory / "confirm.json", json.dumps(result, indent=1) + "\n")
    write_comparison(
        directory / "tb", {name: _growth(directory, arm) for name, arm in arrays.items()}
    )
    return result


def _growth(directory: Path, arm: verdict.JudgedArm) -> dict[str, Sequence[Any]]:
    """Return an arm's judged runs, their values, and mean and interval after 2, 3, ... seeds."""
    parts = [
        verdict.summary(verdict.JudgedArm(arm.name, arm.seeds[:n], arm.values[:n]))
        for n in range(2, len(arm.seeds) + 1)
    ]
    curves = {kind: [getattr(part, kind) for part in parts] for kind in ("mean", "low", "high")}
    runs = {
        f"{arm.name}-s{seed}": float(value)
        for seed, value in zip(arm.seeds, arm.values, strict=True)
    }
    runs = {
        name: value
        for name, value in runs.items()
        if (trials_folder(directory) / name / LOGITS).exists()
    }
    return {"runs": list(runs), "values": list(runs.values()), **curves}


def _run_outcome(
    directory: Path, run: Run, record: Record | None
) -> tuple[Tree, NDArray[np.bool_] | None]:
    """Return (the record of a run, a mask of the test images that it classified correctly [N])."""
    path = trials_folder(directory) / run.name / LOGITS
    found = _status_of(run, record)
    if not path.exists():
        return found, None
    arrays = load_file(path)
    found |= scores(arrays["logits"], arrays["labels"])
    guesses = arrays["logits"].argmax(axis=1)
    if "teacher" in arrays:
        found["agreement"] = float((guesses == arrays["teacher"]).mean())
    return found, guesses == arrays["labels"]


def _status_of(run: Run, record: Record | None) -> Tree:
    """Return what became of a run, without its results."""
    found: Tree = {"seed": run.seed, "status": record.status if record else "not run"}
    if record and record.reason:
        found["reason"] = record.reason.splitlines()[0]
    return found


def _judged_arm(
    name: str,
    runs: Sequence[Run],
    found: Sequence[Tree],
    right: Sequence[NDArray[np.bool_] | None] | None,
    metric: str,
) -> verdict.JudgedArm:
    """Return the arm's test values; a diverged run counts with the accuracy of guessing.

    Args:
        right: masks of the test images that each run classified correctly. None: only the values
            are needed.
    """
    pairs = list(zip(runs, found, strict=True))
    diverged = [run.seed for run, result in pairs if _has_diverged(result)]
    if metric != "val_accuracy" or diverged or right is None:
        row = score_of(metric)
        values = {run.seed: result[row.name] for run, result in pairs if row.name in result}
        values |= dict.fromkeys(diverged, row.guess(runs[0].config.data.num_classes))
        return verdict.JudgedArm(name, tuple(values), np.array(list(values.values())))
    judged = {
        run.seed: images for run, images in zip(runs, right, strict=True) if images is not None
    }
    if not judged:
        return verdict.JudgedArm(name, (), np.zeros(0))
    images = np.array(list(judged.values()))
    found_clusters = runs[0].config.data.test_clusters()
    clusters = None if found_clusters is None else found_clusters.numpy()
    return verdict.JudgedArm(name, tuple(judged), images.mean(axis=1), images, clusters)


def _has_diverged(result: Tree) -> bool:
    return result["status"] == "failed" and str(result.get("reason", "")).startswith("Diverged")


def _verdicts(
    arms: Arms,
    arrays: dict[str, verdict.JudgedArm],
    diverged: set[str],
    plan: SeedPlan | None,
    seeds: Sequence[int],
) -> Iterator[tuple[str, verdict.Verdict]]:
    """Yield a verdict for each student network with candidates and baselines, or one for a sweep.

    Nothing is judged if a baseline has fewer than two runs or a diverged run: a candidate would win
    by default.

    Args:
        plan: of a sequential comparison.
        seeds: of all looks so far, in order.
    """

    def group(arm: Arm) -> str:
        return "of the sweep" if arms.experiment else str(arm.config.student)

    for key in dict.fromkeys(group(arm) for arm in arms.arms):
        mine = [arm for arm in arms.arms if group(arm) == key]
        candidates, baselines = (
            [arrays[a.name] for a in mine if a.part == p] for p in ("candidate", "baseline")
        )
        if not candidates or not baselines:
            continue
        names = ", ".join(dict.fromkeys(arm.config.student.name for arm in mine))
        plain = [arm.name for arm in mine if arm.part == "baseline" and _is_plain_training(arm)]
        metric = verdict.metric_of(arms.metric)
        reasons = [
            f"baseline {b.name} has {len(b.seeds)} of its runs"
            for b in baselines
            if len(b.seeds) < 2
        ]
        reasons += [f"baseline {b.name} diverged" for b in baselines if b.name in diverged]
        able = [c for c in candidates if len(c.seeds) > 1]
        reasons += [] if able else ["no candidate has two runs"]
        if not reasons:
            try:
                lost = len(candidates) - len(able)
                judged = verdict.judge(
                    able,
                    baselines,
                    metric,
                    searched=arms.searched,
                    lost=lost,
                    plan=plan,
                    seeds=seeds,
                    plain=plain[0] if plain else None,
                )
                yield names, judged
                continue
            except ConfigError as error:  # no common seeds
                reasons = error.problems
        yield names, verdict.undecided(reasons, metric, searched=arms.searched)


def _is_plain_training(arm: Arm) -> bool:
    """Return whether an arm is plain training: cross-entropy that is not scaled."""
    return arm.config.objective.name == "ce" and arm.config.objective.loss_scale == 1


def _notes_of(directory: Path, compared: Comparison) -> Sentences:
    found = openings(directory.parent, compared.data)
    own = next((k for k, o in enumerate(found) if o.get("id") == compared.id), len(found))
    # the looks of a sequential comparison are one opening
    before = list({o.get("id", k): o for k, o in reversed([*enumerate(found[:own])])}.values())
    times = sum(o.get("id") == compared.id for o in found)
    if compared.plan is not None:
        yield (
            f"a sequential comparison: one opening of the test split, in {times} looks, from {compared.plan.first} to "
            f"{len(compared.seeds)} of at most {compared.plan.limit} seeds; levels and intervals hold over all looks"
        )
    elif times > 1:
        yield (
            "this test split was opened again after more runs were trained, so the first verdict may have influenced "
            "them"
        )
    if before:
        often = "once" if len(before) == 1 else f"{len(before)} times"
        yield (
            f"this test split was opened {often} before in this storage, first on {before[-1]['when'][:10]} by "
            f"{before[-1]['experiment']}: choices made since then may depend on it"
        )
    for arm in compared.arms.arms:
        made = {
            t.fingerprint(): t
            for r in compared.runs
            if r.arm == arm.name
            for t in r.config.teacher_runs()
        }
        several = len(arm.config.teachers) if arm.config.needs_teacher else 0
        if any(t.weights for t in made.values()):
            yield f"{arm.name}: its teacher has external weights; training data unknown"
        elif len(made) == 1:
            yield f"{arm.name}: conditional on one teacher, which all its seeds share"
        elif several and len(made) == several:
            yield f"{arm.name}: conditional on its {several} teachers, which all its seeds share"


TABLE_COLUMNS = 6
"""Maximum number of metrics in a table: of 80 columns, an arm's name takes 20, each metric 10."""


def _other_metrics(result: Tree) -> Sentences:
    """Yield means over seeds of all metrics but accuracy; NLL in nats, most others as fractions."""
    known = {key for arm in result["arms"] for run in arm["runs"] for key in run}
    rows = [row for row in SCORES.values() if row.heading is not None and row.name in known]
    for first in range(0, len(rows), TABLE_COLUMNS):
        some = rows[first : first + TABLE_COLUMNS]
        yield ""
        table = ["\t".join(["means on test", *(str(row.heading) for row in some)])]
        for arm in result["arms"]:
            values = [[run[row.name] for run in arm["runs"] if row.name in run] for row in some]
            cells = [f"{np.mean(v):.4f}" if v else "" for v in values]
            table.append("\t".join([arm["name"], *cells]))
        yield from in_columns(table, 80)


def outcome_table(result: Tree) -> list[str]:
    """Return the outcome as lines of at most 80 columns; accuracies are in per cent."""
    where = f"test split of {name_of_test(result['test'])}; trained on {result['trained_on']}"
    lines = [*wrapped(result["title"]), *wrapped(where)]
    if result["preset"]:
        lines.append(
            f"PRESET {result['preset']}: scaled down for a quick try; not comparable with published results"
        )
    printed = any(arm["published"] is not None for arm in result["arms"])
    lines += wrapped(result["note"]) if result["note"] else []
    head = "arm\ttest acc. % ± sd\tn\t95 % over seeds" + "\tpublished\tdiff" * printed
    rows = [_arm_row(arm, printed) for arm in result["arms"]]
    lines += ["", *in_columns([head, *rows], 80)]
    lines += _settings_lines(result["arms"])
    for arm in result["arms"]:
        for run in arm["runs"]:
            if run["status"] != "done":
                which = f"{arm['name']}, seed {run['seed']}: {run['status']}"
                lines += wrapped(f"{which}: {run.get('reason', '')}")
    lines += _other_metrics(result)
    for found in result["verdicts"]:
        lines += ["", f"--- student {found['student']}", *found["text"]]
    notes = verdict.merged_notes(result["notes"], [arm["name"] for arm in result["arms"]])
    lines += [""] if notes else []
    lines += [line for note in notes for line in wrapped(f"note: {note}")]
    return lines


def _settings_lines(arms: Sequence[Tree]) -> list[str]:
    """Return the settings of the arms' objectives, a sentence each after an empty line."""
    told = {arm["name"]: objective_text(arm["objective"]) for arm in arms}
    sentences = [f"{name} is {text}" for name, text in told.items() if ":" in text]
    lines = [line for sentence in sentences for line in wrapped(sentence)]
    return ["", *lines] if lines else []


def _arm_row(arm: Tree, printed: bool) -> str:
    """Return an arm's accuracy on test over its runs, beside what is published."""
    s = verdict.over_seeds(arm)
    ours, interval = f"{s.mean:.2f}" if s.n else "none", ""
    if s.n > 1:
        ours += f" ± {s.sd:.2f}"
        interval = verdict.ACCURACY.interval(s.low / 100, s.high / 100)
    row = f"{arm['name']}\t{ours}\t{s.n}\t{interval}"
    if arm["published"] is None:
        return row + "\t\t" * printed
    gap = f"{s.mean - arm['published']:+.2f}" if s.n else ""
    return f"{row}\t{arm['published']:.2f}\t{gap}"
