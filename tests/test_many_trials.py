"""Many trials: few lines and files each, what samplers and rungs see of a study, lists of ended trials."""

import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.search import Searcher
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto.summary_pb2 import Summary

import tfkd_ray.run.studies as studies
import tfkd_ray.store.ended as ended
from tfkd_ray.run.callbacks import Budget, Lock, Losses, Recorder
from tfkd_ray.run.connect import report_each_epoch
from tfkd_ray.run.journal import open_journal, together
from tfkd_ray.run.rungs import Rungs
from tfkd_ray.run.searcher import OptunaSearcher, StudyStopping
from tfkd_ray.run.studies import Seen
from tfkd_ray.run.trial import StudentTrial
from tfkd_ray.run.tune import _default_message_times, resume_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import append_whole
from tfkd_ray.show import figures
from tfkd_ray.show.events import EventFileWriter
from tfkd_ray.show.listener import Announcer
from tfkd_ray.show.report import report
from tfkd_ray.show.status import best_of, status
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.assignment import SECTION, Assignment, assigned
from tfkd_ray.store.ended import read_briefs
from tfkd_ray.store.experiment import append_line, read_records, write_experiment
from tfkd_ray.store.storage import Directory

EPOCHS = 9


def space(**search: Any) -> Space:
    tree = {"student": "mlp", "epochs": EPOCHS, "objective": "ce"}
    lr = {"low": 0.01, "high": 1, "log": True}
    return build_space({**tree, "optim": {"lr": lr}, "search": {"num_samples": 30, **search}})


class Driver:
    """A sweep without Ray, one trial at a time, with Tune's calls."""

    def __init__(self, space: Space, experiment: Path) -> None:
        if not experiment.exists():
            write_experiment(experiment, space.tree, ["tfkd"])
        place = Directory(experiment.parent).wire()
        self.searcher = OptunaSearcher(
            space, experiment / "study.journal", folder=experiment / "trials", place=place
        )
        self.stopping = StudyStopping(self.searcher)
        budget, losses = Budget(experiment, space, self.searcher), Losses()
        self.told = Announcer([budget, losses, Recorder(losses, budget)])
        self.told.setup()
        self.stopping.on_trial_add(None, None)  # type: ignore[arg-type]

    def begin(self, trial_id: str) -> Any:
        """Return the next trial, or None."""
        config = self.searcher.suggest(trial_id)
        if config == Searcher.FINISHED:
            return None
        assert isinstance(config, dict)
        trial = SimpleNamespace(
            trial_id=trial_id,
            config=config,
            last_result={},
            status="RUNNING",
            max_failures=2,
            num_failures=0,
        )
        self.told.on_trial_start(0, [], trial)
        return trial

    def epoch(self, trial: Any, epoch: int, value: float) -> bool:
        """Report an epoch; return True if the trial ends there."""
        result = {
            "epoch": epoch,
            "val_accuracy": value,
            "training_iteration": epoch,
            "seconds": 2.0,
        }
        decision = self.stopping.on_trial_result(None, trial, result)
        result["done"] = decision == "STOP" or epoch == EPOCHS
        if not result["done"] or decision == "CONTINUE":
            self.searcher.on_trial_result(trial.trial_id, result)
        self.told.on_trial_result(0, [], trial, result)
        trial.last_result = result
        if decision == "PAUSE":
            self.told.on_trial_save(0, [], trial)
            self.searcher.pause(trial.trial_id)
        return bool(result["done"]) or decision == "PAUSE"

    def end(self, trial: Any) -> None:
        self.searcher.on_trial_complete(trial.trial_id, trial.last_result)
        self.told.on_trial_complete(0, [], trial)

    def run(self, most: int = 1000) -> list[Any]:
        """Run trials to their ends; return their configurations."""
        configs = []
        for k in range(most):
            trial = self.begin(f"id{k}")
            if trial is None:
                break
            configs.append(trial.config)
            draw = random.Random(trial.config[SECTION]["number"])
            for epoch in range(1, EPOCHS + 1):
                if self.epoch(trial, epoch, draw.random()):
                    break
            if trial.last_result["done"]:
                self.end(trial)
        return configs


def known_in(study: optuna.Study) -> list[Any]:
    """Return all that a study knows of its trials, but their ids in the storage."""
    names = (
        *("number", "state", "values", "params", "distributions", "user_attrs", "system_attrs"),
        *("intermediate_values", "datetime_start", "datetime_complete"),
    )
    return [[getattr(trial, name) for name in names] for trial in study.trials]


# --- the journal


def test_a_proposal_is_one_line_and_a_trial_few_and_the_file_holds_what_memory_does(
    tmp_path: Path,
) -> None:
    driver = Driver(space(stopping="none", num_samples=14), tmp_path / "e")
    journal = tmp_path / "e/study.journal"
    before = len(journal.read_bytes().splitlines())
    trial = driver.begin("a")
    (line,) = journal.read_text().splitlines()[before:]
    about = json.loads(line)
    assert about["user_attrs"] == {"name": "t0000-ce", "number": 0}
    assert list(about["params"]) == ["optim.lr"]
    for epoch in range(1, EPOCHS + 1):
        driver.epoch(trial, epoch, 0.5)
    driver.end(trial)
    assert len(journal.read_bytes().splitlines()) == before + 3  # its last value, and its end
    driver.run()
    (study,) = driver.searcher.studies()
    again = optuna.load_study(study_name=study.study_name, storage=open_journal(journal))
    assert known_in(study) == known_in(again) and len(study.trials) == 14


def test_a_block_that_fails_leaves_what_it_had_done_and_no_lock(tmp_path: Path) -> None:
    storage = open_journal(tmp_path / "j")
    study = optuna.create_study(storage=storage)
    with pytest.raises(ZeroDivisionError), together(storage):
        study.ask().set_user_attr("number", 1 // 1)
        study.ask().set_user_attr("number", 1 // 0)
    assert [t.user_attrs for t in study.trials] == [{"number": 1}, {}]
    again = optuna.load_study(study_name=study.study_name, storage=open_journal(tmp_path / "j"))
    assert [t.user_attrs for t in again.trials] == [{"number": 1}, {}]
    assert not list(tmp_path.glob("j.lock*"))


def test_what_others_append_between_blocks_is_read_before_the_next(tmp_path: Path) -> None:
    ours, theirs = open_journal(tmp_path / "j"), open_journal(tmp_path / "j")
    study = optuna.create_study(storage=ours, study_name="s")
    other = optuna.load_study(study_name="s", storage=theirs)
    with together(ours):
        other.ask()
        study.ask().set_user_attr("whose", "ours")
    other.ask()
    whole = optuna.load_study(study_name="s", storage=open_journal(tmp_path / "j"))
    for found in (study, other, whole):
        assert [t.user_attrs.get("whose") for t in found.trials] == [None, "ours", None]


def test_a_full_disk_leaves_a_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, writes = os.write, iter([3])

    def full(handle: int, content: Any) -> int:
        for few in writes:
            return real(handle, content[:few])
        raise OSError(28, "No space left on device")

    (tmp_path / "f").write_bytes(b"whole\n")
    with (tmp_path / "f").open("ab", buffering=0) as file:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            append_whole(file.fileno(), b"cut off\n")
        monkeypatch.undo()
        append_whole(file.fileno(), b"next\n")
    assert (tmp_path / "f").read_bytes() == b"whole\nnext\n"


# --- what samplers see


def trials_of(n: int, draw: random.Random) -> list[FrozenTrial]:
    """Return ended trials in all states, some without a value, some that exceed a constraint."""
    found = []
    for number in range(n):
        state = draw.choice([TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED])
        value = draw.random()
        step = draw.choice([1, 3])
        trial = create_trial(
            state=state,
            value=value if state == TrialState.COMPLETE else None,
            user_attrs={"number": number},
            intermediate_values={}
            if draw.random() < 0.1
            else {step: draw.choice([value, math.nan])},
        )
        if draw.random() < 0.2:
            trial.set_constraint("c", draw.random())
        trial.number = number
        found.append(trial)
    return found


def test_of_many_trials_a_sampler_sees_the_newest_and_tpes_good_ones_whatever_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from optuna.samplers._tpe.sampler import _split_trials  # its own idea of good trials

    monkeypatch.setattr(studies, "BEST_SEEN", 30)
    monkeypatch.setattr(studies, "NEWEST_SEEN", 50)
    draw = random.Random(3)
    for direction in ("maximize", "minimize"):
        study, all_trials = optuna.create_study(direction=direction), trials_of(300, draw)
        of = []
        for _ in "ab":
            seen = Seen(study.directions)
            draw.shuffle(all_trials)
            for trial in all_trials:
                seen.take(trial)
            of.append([t.number for t in seen.trials()])
        assert of[0] == of[1] == sorted(of[0]) and len(of[0]) == 80
        assert of[0][-50:] == list(range(250, 300))
        by_number = sorted(all_trials, key=lambda t: t.number)
        good, _ = _split_trials(study, by_number, 25)
        assert {t.number for t in good} <= set(of[0])


def test_with_several_metrics_a_sampler_sees_the_newest_and_the_front(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(studies, "BEST_SEEN", 30)
    monkeypatch.setattr(studies, "NEWEST_SEEN", 50)
    draw = random.Random(3)
    study = optuna.create_study(directions=["maximize", "minimize"])
    seen = Seen(study.directions)
    for n in range(200):
        trial = create_trial(values=[draw.random(), draw.random()], user_attrs={"number": n})
        study.add_trial(trial)
        seen.take(study.trials[-1])
    found = {t.number for t in seen.trials()}
    assert {t.number for t in study.best_trials} | set(range(150, 200)) == found


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_proposals_are_a_function_of_the_study_also_where_a_sampler_does_not_see_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    monkeypatch.setattr(studies, "BEST_SEEN", 3)
    monkeypatch.setattr(studies, "NEWEST_SEEN", 4)
    s = space(sampler=sampler, num_samples=16)
    whole = Driver(s, tmp_path / "whole").run()
    parts = []
    for most in (9, 3, 100):
        parts += Driver(s, tmp_path / "parts").run(most)
    assert [c["optim"]["lr"] for c in parts] == [c["optim"]["lr"] for c in whole]


# --- rungs


def slow_stops(came: dict[int, float], number: int, factor: int, maximize: bool) -> bool:
    """Return whether a trial is below the best 1 / factor, by the definition."""
    best = sorted(came.values(), reverse=maximize)
    last_good = best[max(1, len(best) // factor) - 1]
    return best.index(came[number]) > best.index(last_good)


@pytest.mark.parametrize("maximize", [True, False])
def test_a_rung_that_is_kept_sorted_judges_as_its_definition(maximize: bool) -> None:
    draw, rungs = random.Random(5), Rungs([[1, 3], [3]], 3, maximize=maximize)
    came: dict[int, float] = {}
    for _ in range(300):
        number = draw.randrange(200)  # some come again, as a retried trial does
        came[number] = draw.choice([0.1, 0.5, draw.random()])
        rungs.take(0, number, 3, came[number])
        rungs.take(1, number, 3, draw.random())  # of another halving
        one = draw.choice(list(came))
        assert rungs.stops(0, one, 3) == slow_stops(came, one, 3, maximize)


def test_the_study_keeps_what_is_judged_and_the_last_value_or_everything(tmp_path: Path) -> None:
    kept = {}
    for report_ in ("judged", "all"):
        s = space(report=report_, num_samples=1)
        driver = Driver(s, tmp_path / report_)
        driver.run()
        kept[report_] = list(driver.searcher.studies()[0].trials[0].intermediate_values)
    assert kept == {"judged": [1, 3, 9], "all": list(range(1, 10))}


def test_a_trial_that_has_passed_a_rung_is_not_judged_there_again_when_it_resumes(
    tmp_path: Path,
) -> None:
    first = Driver(space(), tmp_path / "e")
    trial = first.begin("a")
    assert not any(first.epoch(trial, epoch, 0.1) for epoch in (1, 2))  # the only one so far
    better = first.begin("b")
    assert not first.epoch(better, 1, 0.9)
    again = Driver(space(), tmp_path / "e")  # the first was killed
    trial, better = again.begin("c"), again.begin("d")
    assert assigned(trial).number == 0
    assert not any(again.epoch(trial, epoch, 0.1) for epoch in (1, 2))  # told again, passed before
    assert again.epoch(trial, 3, 0.1) is False  # the first that comes there
    assert not again.epoch(better, 1, 0.9)


# --- lists of ended trials


@pytest.fixture
def swept(tmp_path: Path) -> Iterator[Path]:
    experiment = tmp_path / "e"
    driver = Driver(space(num_samples=12), experiment)
    driver.run(9)
    driver.begin("runs")
    yield experiment


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if not key.endswith("_s")}


def test_status_and_best_of_many_trials_say_what_their_folders_say(
    swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, best = without_times(status(swept)), best_of(swept)[0]
    seconds = sum(m["seconds"] for r in read_records(swept) for m in r.metrics)
    monkeypatch.setattr(ended, "MANY_ENDED", 3)
    assert without_times(status(swept)) == full and full["trials"]["started"] == 10
    assert best_of(swept)[0].config == best.config
    briefs = read_briefs(swept).records
    assert sum(m["seconds"] for r in briefs for m in r.metrics) == seconds
    assert [len(r.config) for r in briefs[:9]] == [1] * 9 and len(briefs[9].config) > 1
    gone = swept / "trials" / briefs[2].name
    gone.rename(swept / "moved")
    assert status(swept)["gone"] == [briefs[2].name]


def test_a_trial_that_begins_again_is_read_from_its_folder_until_it_ends_again(
    swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ended, "MANY_ENDED", 3)
    name = read_briefs(swept).records[0].name
    ended.note_beginning(swept / "trials" / name)
    assert len(read_briefs(swept).records[0].config) > 1
    with (swept / "ended.jsonl").open("a") as file:
        file.write('{"name": "half')  # still being written
    assert len(read_briefs(swept).records) == 10
    append_line(swept / "ended.jsonl", '{"name":"after a line that a full disk has cut')
    assert len(read_briefs(swept).records) == 10
    append_line(swept / "ended.jsonl", '{"name": "half"}')
    with pytest.raises(ConfigError, match=r"(?s)ended\.jsonl.*remove the file"):
        read_briefs(swept)


def test_paused_trials_are_listed_until_they_go_on_or_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s, experiment = space(stopping="pausing", num_samples=9), tmp_path / "e"
    driver = Driver(s, experiment)
    driver.run(9)
    whole = without_times(status(experiment))
    assert whole["trials"]["paused"] == 9
    monkeypatch.setattr(ended, "MANY_ENDED", 3)
    assert without_times(status(experiment)) == whole
    assert all(len(record.config) == 1 for record in read_briefs(experiment).records)
    assert not ended.finished_names(experiment)  # something will be written there
    again = Driver(s, experiment)
    best = again.begin("goes on")
    found = {r.name: r for r in read_briefs(experiment).records}
    assert found[assigned(best).name].status == "running"
    again.searcher.finish()
    again.told.on_experiment_end([best])
    count = Counter(record.status for record in read_briefs(experiment).records)
    assert count == {"stopped": 8, "interrupted": 1}
    assert Counter(record.status for record in read_records(experiment)) == count


def test_of_equal_best_trials_the_first_one_is_best_whatever_its_objective(tmp_path: Path) -> None:
    tree = {"student": "mlp", "epochs": EPOCHS, "objective": ["lsr", "ce"]}
    s = build_space({**tree, "search": {"num_samples": 4, "stopping": "none"}})
    driver = Driver(s, tmp_path / "e")
    for value in (0.2, 0.7, 0.7, 0.7):
        trial = driver.begin(f"of {value}")
        for epoch in range(1, EPOCHS + 1):
            driver.epoch(trial, epoch, value)
        driver.end(trial)
    found = status(tmp_path / "e")["best"]
    assert (found["trial"], found["shared_by"]) == (best_of(tmp_path / "e")[0].name, 3)
    assert found["trial"].startswith("t0001")


def test_the_report_on_many_trials_shows_a_sample_and_says_so(
    swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(swept, swept / "all.html")
    monkeypatch.setattr(ended, "MANY_ENDED", 3)
    monkeypatch.setattr(figures, "MOST_BEST", 1)
    monkeypatch.setattr(figures, "MOST_OTHERS", 4)
    report(swept, swept / "some.html")
    whole, some = ((swept / name).read_text() for name in ("all.html", "some.html"))
    assert "The page shows 4 of 10 trials" in some and "The page shows" not in whole
    assert some.count("<tr data-trials=") == 4 and whole.count("<tr data-trials=") == 10
    for sentence in ("12 planned, 10 begun", "it is the best of 10 on validation"):
        assert sentence in whole and sentence in some


def test_a_lock_does_not_look_into_the_folders_of_many_trials_that_have_ended(
    swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ended, "MANY_ENDED", 3)
    *_, done, runs = (r.folder for r in read_briefs(swept).records)
    (done / "link").symlink_to("/etc/passwd")  # nothing is written there, and readers follow none
    Lock(Directory(swept.parent), swept.name).release()
    (runs / "link").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="link: is a link"):
        Lock(Directory(swept.parent), swept.name)


@pytest.mark.parametrize("place", ["trials/{runs}/link", "tb/link", "{runs}", "trials/linked"])
def test_a_forged_list_hides_no_link_from_a_resume(
    swept: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(ended, "MANY_ENDED", 3)
    *_, done, runs = (r.name for r in read_briefs(swept).records)
    line = (swept / "ended.jsonl").read_text().splitlines()[-1]
    assert f'"{done}"' in line
    for name in (runs, "trials", "tb", "linked"):
        append_line(swept / "ended.jsonl", line.replace(f'"{done}"', f'"{name}"'))
    link = swept / place.format(runs=runs)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="is a link"):
        resume_tuner(swept)


# --- messages of several epochs


def trial_that(*results: Any, judged: tuple[int, ...] = (), begins: bool = False) -> StudentTrial:
    """Return a trial whose steps give these results, or raise them."""
    trial = object.__new__(StudentTrial)
    trial._assignment, trial._raised = Assignment("t0000-ce", EPOCHS, judged=judged), None
    trial._is_silent = begins
    steps = iter(results)

    def train() -> Any:
        step = next(steps)
        if isinstance(step, Exception):
            raise step
        return step

    trial.train = train
    return trial


def epochs_of(trial: StudentTrial, *limits: float) -> list[Any]:
    return [result.get("epoch") for result in trial.train_buffered(*limits)]


def test_a_message_brings_epochs_until_a_rung_the_end_or_some_seconds() -> None:
    epochs = [{"epoch": e, "done": e == EPOCHS} for e in range(1, EPOCHS + 1)]
    trial = trial_that(*epochs, judged=(3, 5))
    sent = [epochs_of(trial, 1000, 60.0) for _ in range(3)]
    assert sent == [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    assert epochs_of(trial_that(*epochs), 0.0, 1000) == [1]
    failed = trial_that(*epochs[:2], {"failed": "x", "done": True})
    assert epochs_of(failed, 60.0, 1000) == [1, 2, None]


def test_the_first_epoch_in_a_process_is_a_message_of_its_own() -> None:
    epochs = [{"epoch": e, "done": e == EPOCHS} for e in range(4, EPOCHS + 1)]
    trial = trial_that(*epochs, judged=(6,), begins=True)
    sent = [epochs_of(trial, 1000, 60.0) for _ in range(3)]
    assert sent == [[4], [5, 6], [7, 8, 9]]


def test_an_error_of_the_process_comes_after_the_epochs_before_it() -> None:
    trial = trial_that({"epoch": 1, "done": False}, OSError(28, "full"))
    assert epochs_of(trial, 60.0, 1000) == [1]
    with pytest.raises(OSError, match="full"):
        trial.train_buffered(60.0, 1000)


@pytest.mark.parametrize("seconds", ["", "-1", "nan", "soon"])
def test_the_users_own_time_of_a_message_is_kept_and_none_is_a_sentence(
    seconds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_RESULT_BUFFER_MIN_TIME_S", "0.5")
    monkeypatch.delenv("TUNE_RESULT_BUFFER_MAX_TIME_S", raising=False)
    _default_message_times()
    both = [os.environ[f"TUNE_RESULT_BUFFER_{end}_TIME_S"] for end in ("MIN", "MAX")]
    assert both == ["0.5", "10"]
    monkeypatch.setenv("TUNE_RESULT_BUFFER_MIN_TIME_S", seconds)
    with pytest.raises(
        ConfigError, match=r"variable TUNE_RESULT_BUFFER_MIN_TIME_S: needs a number of"
    ):
        _default_message_times()


def test_a_lost_trial_reports_each_epoch_at_once(tmp_path: Path) -> None:
    config = space().branches[0].example.tree
    assignment = Assignment("t0000-ce", EPOCHS, directory=tmp_path, judged=(3,))
    trial = SimpleNamespace(config={SECTION: assignment.section(), **config})
    report_each_epoch(trial)
    assert assigned(trial).judged == tuple(range(1, EPOCHS + 1))


# --- event files


def test_tensorboard_reads_our_event_files_after_each_event(tmp_path: Path) -> None:
    writer = EventFileWriter(tmp_path / "run", filename_suffix=".x")
    for step in (1, 2):
        summary = Summary(value=[Summary.Value(tag="a", simple_value=step / 4)])
        writer.add_event(event_pb2.Event(wall_time=1.0, step=step, summary=summary))
        found = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
        assert [e.value for e in found.Scalars("run", "a")] == [0.25, 0.5][:step]
    writer.close()
    writer.close()
    (path,) = (tmp_path / "run").iterdir()
    for _ in range(11):
        EventFileWriter(tmp_path / "more")
    names = [
        p.name for p in sorted((tmp_path / "more").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    ]
    assert names == sorted(names)  # TensorBoard reads them in this order
    assert path.name.startswith("events.out.tfevents.") and path.name.endswith(".x")
