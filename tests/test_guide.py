"""Discovery in the terminal: groups of verbs, examples, near misses, spaces, init, completion."""

import html
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from test_clusters import verbs
from test_readers import make_sweep

from tfkd_ray.cli.fit import told_of_interrupt
from tfkd_ray.cli.guide import EXAMPLES, GROUPS, SHELLS, overview, verbs_of
from tfkd_ray.cli.main import _command_of, _parsed_args, _parser, main
from tfkd_ray.cli.sweep import _print_summary
from tfkd_ray.cli.terminal import TOLD_S, resume_command
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.shortened import without_defaults
from tfkd_ray.learn.teachers import PROGRESS
from tfkd_ray.run.tune import build_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.meant import no_such_setting, places_of, settings_below
from tfkd_ray.settings.yaml import dump_yaml, parse_yaml, shipped_files
from tfkd_ray.show.live import Progress
from tfkd_ray.show.python import best_config
from tfkd_ray.show.status import best_of
from tfkd_ray.space.arms import load_arms
from tfkd_ray.space.fitted import batch_for, epochs_for, look_at, with_setting
from tfkd_ray.space.search_config import SearchConfig
from tfkd_ray.space.shipped import shipped_spaces
from tfkd_ray.space.space import build_space, load_space
from tfkd_ray.store.experiment import read_experiment, write_experiment

ALL = {" ".join(words): parser for words, parser in verbs(_parser())}
PARSERS = {**ALL, **verbs_of(_parser())}
"""Parsers of all verbs, and of the parts of `teacher` and `cluster`."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answered(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """Run a command that must end with exit code 2; return its message on one line."""
    try:
        code = main(shlex.split(line))
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and "Traceback" not in err, (line, code, out, err)
    return " ".join(err.split())


# --- the verbs


def test_tfkd_alone_shows_the_verbs_in_four_groups_with_an_example_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err == f"{overview(verbs_of(_parser()))}\n"
    assert len(GROUPS) == 4 and max(map(len, err.splitlines())) <= 80
    for group, (example, _) in GROUPS.items():
        assert f"\n{group}, such as  {example}\n" in err
    for verb in verbs_of(_parser()):
        assert re.search(rf"(?m)^  {verb} +\w", err), f"{verb} is in no group"


def test_tfkd_help_is_the_same_overview(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"{overview(verbs_of(_parser()))}\n"


def test_help_is_a_verb_too(capsys: pytest.CaptureFixture[str]) -> None:
    for words, same in ((["help"], ["--help"]), (["help", "plan"], ["plan", "--help"])):
        told = []
        for line in (words, same):
            with pytest.raises(SystemExit) as end:
                main(line)
            assert end.value.code in (0, None)
            told.append(capsys.readouterr().out)
        assert told[0] == told[1] and told[0].startswith("usage: tfkd")


@pytest.mark.parametrize("verb", PARSERS)
def test_every_help_ends_with_two_examples(verb: str) -> None:
    text = PARSERS[verb].format_help()
    assert text.endswith("\nexamples:\n" + "".join(f"  {e}\n" for e in EXAMPLES[verb]))
    assert len(set(EXAMPLES[verb])) == 2


@pytest.mark.slow
@pytest.mark.parametrize("verb", PARSERS)
def test_every_example_parses(verb: str, here: Path) -> None:
    (here / "tfkd_results/first").mkdir(parents=True)
    (here / "tfkd_results/first/experiment.yaml").touch()
    lines = [*EXAMPLES[verb], *(example for example, _ in GROUPS.values())]
    for line in lines:
        commands = list(commands_in(line))
        assert (
            commands and any(words[: len(verb.split())] == verb.split() for words in commands)
        ) or (line not in EXAMPLES[verb])
        for words in commands:
            _parsed_args(_command_of(words)[0])


def commands_in(line: str) -> Iterator[list[str]]:
    """Yield the words of each command `tfkd` in a line of a shell, redirections left out."""
    for part in re.split(r"&&|;|\|", line):
        found = re.search(r"\btfkd (.*?)(?:\)\"|>|$)", part)
        if found:
            yield shlex.split(found[1])


# --- near misses


@pytest.mark.parametrize("line", ["status first", "status", "confirm first"])
def test_a_sweep_that_trains_its_teacher_first_is_not_called_missing(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tfkd_results" / "teachers" / "cnn-0123abcd"
    folder.mkdir(parents=True)
    for content, told in (
        ('{"epoch": 7}', "; teacher cnn-0123abcd is being trained (epoch 7 ended 0:00 ago); a sweep's directory"),
        ('{"epoch": [', ""), ("[7]", ""), ("", ""),
    ):  # fmt: skip
        (folder / PROGRESS).write_text(content)
        assert main(line.split()) == 2
        said = capsys.readouterr().err
        assert told in " ".join(said.split()) and ("teacher" in said) == bool(told)
    (folder / PROGRESS).write_text('{"epoch": 7}')
    os.utime(folder / PROGRESS, (time.time() - 2 * TOLD_S,) * 2)  # of a killed one
    assert main(line.split()) == 2 and "teacher" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("tun", "tfkd: error: no such verb: 'tun'; did you mean 'tune'?"),
        ("teacher lst", "no such part of tfkd teacher: 'lst'; did you mean 'list'?"),
        ("cluster chek x", "no such part of tfkd cluster: 'chek'; did you mean 'check'?"),
        ("tune digits_tfk", "did you mean 'digits_tfkd'? `tfkd spaces` lists what ships with tfkd"),
        ("check paper/tabel_1", "did you mean 'paper/table_1'?"),
        ("check mina.yaml", "did you mean 'mine.yaml'?"),
        ("tune min", "did you mean 'mine.yaml'?"),
        ("confirm digits_arm", "did you mean 'digits_arms'?"),
        ("confirm frist", "did you mean 'first'?"),
        ("status frist", "no such directory (searched from"),
        ("status frist", "did you mean 'first'? `tfkd ls` lists experiments"),
        ("resume frist", "did you mean 'first'?"),
        ("tensorboard first frist", "frist: no such directory"),
        ("compare first frist", "did you mean 'first'?"),
        ("stop frist", "did you mean 'first'?"),
        ("tune digits_tfkd --prior frist", "did you mean 'first'?"),
        ("cluster up aws-gp", "did you mean 'aws-gpu'?"),
        ("cluster up slrm", "did you mean 'slurm'?"),
        ("tune digits_tfkd --epochs 3", "a setting is written without dashes: epochs=3"),
        ("tune --lr 0.1 digits_tfkd", "a setting is written without dashes: optim.lr=0.1"),
        ("tune digits_tfkd --batch-size=8", "without dashes: optim.batch_size=8"),
        ("tune digits_tfkd --temperature --detach", "objective.kd.temperature=VALUE"),
        ("tune digits_tfkd --num_samples 3", "did you mean '--num-samples'?"),
        ("status first --folow", "did you mean '--follow'?"),
        ("check digits_tfkd lr=1", "lr: no such setting; did you mean 'optim.lr'? (in 'lr=1')"),
        ("check digits_tfkd num_samples=1", "did you mean 'search.num_samples'?"),
        ("check digits_tfkd optim.lrr=1", "optim.lrr: no such setting; did you mean 'lr'?"),
        ("check digits_tfkd objective.lsr.alfa=1", "objective.lsr.alfa: no such setting; did you mean 'alpha'?"),
        ("check other.yaml", "other.yaml: objective.kd.temprature: no such setting; did you mean 'temperature'?"),
        ("check digits_arms lr=1", "did you mean 'optim.lr'?"),
        ("check digits_arms optim.lrr=1", "optim.lrr: no such setting; did you mean 'lr'?"),
        ("check mine.yaml", "mine.yaml: lr: no such setting; did you mean 'optim.lr'?"),
        ("check mine.yaml", "hidden: no such setting; did you mean 'student.hidden'?"),
        ("check mine.yaml", "data.rot: no such setting; did you mean 'root'?"),
        ("init digits_tfk", "no such search space; did you mean 'digits_tfkd'?"),
    ],
)  # fmt: skip
def test_a_near_miss_is_answered_with_what_was_meant(
    here: Path, capsys: pytest.CaptureFixture[str], line: str, sentence: str
) -> None:
    (here / "mine.yaml").write_text(
        "objective: ce\nlr: 0.1\nhidden: [8]\ndata: {name: mnist, rot: /x}\n"
    )
    (here / "other.yaml").write_text("objective: [{name: kd, temprature: 4}, ce]\n")
    (here / "tfkd_results/first").mkdir(parents=True)
    (here / "tfkd_results/first/experiment.yaml").touch()
    assert sentence in answered(capsys, line)


@pytest.mark.parametrize(
    "path, known, sentence",
    [
        (["lr"], {"loop", "optim"}, "lr: no such setting; did you mean 'optim.lr'?"),
        (["temperature"], {"teacher"}, "did you mean 'objective.kd.temperature'? The objectives kd, "),
        (["correct_prob"], {"compile"}, "'objective.tfkd_reg.correct_prob'? The objectives tfkd_reg, tfkd_reg_code have"),
        (["optm"], {"optim", "data"}, "optm: no such setting; did you mean 'optim'?"),
        (["optim", "betas"], {"lr", "momentum"}, "optim.betas: no such setting; known: lr, momentum"),
        (["optim", "learning_rate"], {"lr", "momentum"}, "optim.learning_rate: no such setting; did you mean 'lr'?"),
        (["wd"], {"optim"}, "wd: no such setting; did you mean 'optim.weight_decay'?"),
        (["xyzzy"], {"optim", "data"}, "xyzzy: no such setting; known: data, optim"),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_exist_is_told_where_one_of_its_name_is(
    path: list[str], known: set[str], sentence: str
) -> None:
    assert sentence in no_such_setting(path, known)


def test_python_gets_the_same_hint(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"lr: no such setting; did you mean 'optim.lr'\?"):
        TrainConfig(objective="ce", lr=0.1)
    (here / "mine.yaml").write_text("objective: ce\nalpha: 0.5\n")
    with pytest.raises(ConfigError, match=r"did you mean 'objective\.kd\.alpha'"):
        load_space("mine.yaml")


def test_the_list_of_settings_is_whole() -> None:
    assert settings_below() == {*TrainConfig.model_fields, "search"}
    assert settings_below("search") == set(SearchConfig.model_fields)
    assert places_of("lr")[0] == "optim.lr" and places_of("hidden")[0] == "student.hidden"


@pytest.mark.parametrize("name", shipped_files("search_spaces"))
def test_the_quick_check_refuses_nothing_that_ships(name: str) -> None:
    from tfkd_ray.settings.meant import wrong_names
    from tfkd_ray.settings.yaml import read_yaml

    tree = read_yaml(shipped_files("search_spaces")[name])
    assert "arms" in tree or list(wrong_names(tree)) == []


# --- what is imported before a wrong word is answered


WRONG = [
    "", "tun", "tune digits_tfk", "tune digits_tfkd --epochs 3", "tune digits_tfkd lr=3", "train mine.yaml", "tune other.yaml", "confirm nothing",
    "resume nothing", "status nothing", "best nothing", "report nothing", "export nothing", "logs nothing 0", "cluster up nothing",
    "tune digits_tfkd --name first", "tensorboard nothing", "compare nothing either", "stop nothing", "init nothing", "completion csh",
]  # fmt: skip


def test_a_wrong_file_name_key_or_verb_is_answered_before_anything_large_is_imported(
    tmp_path: Path,
) -> None:
    """These imports take most of a second; what is left takes a tenth."""
    (tmp_path / "mine.yaml").write_text("objective: ce\nlr: 0.1\n")
    (tmp_path / "other.yaml").write_text("objective: [{name: kd, temprature: 4}, ce]\n")
    (tmp_path / "tfkd_results/first").mkdir(parents=True)
    code = (
        "import sys; from tfkd_ray.cli.main import main\n"
        f"for line in {WRONG!r}:\n"
        "    try: code = main(line.split())\n    except SystemExit as end: code = end.code\n"
        "    assert code == 2, (line, code)\n"
        "    large = {'torch', 'ray', 'optuna', 'numpy', 'scipy', 'pydantic', 'PIL'} & set(sys.modules)\n"
        "    assert not large and len(sys.modules) < 250, (line, large, len(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- values


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("check mine.yaml epochs=x", "command line: epochs: should be a whole number"),
        ("check mine.yaml epochs=x", "got 'x' (in 'epochs=x')"),
        ("check mine.yaml optim.lr.low=3 epochs=5", "got low 3 and high 0.5; swap them (in 'optim.lr.low=3')"),
        ("check mine.yaml objective.kd.alpha=2", "got 2 (in 'objective.kd.alpha=2')"),
        ("check mine.yaml epochs = 3", "epochs = 3: the shell splits words at blanks; write epochs=3"),
        ("check mine.yaml epochs= 3", "epochs= 3: the shell splits words at blanks; write epochs=3"),
        ("check mine.yaml seed=1 epochs =3", "epochs =3: the shell splits words at blanks; write epochs=3"),
        ("check mine.yaml search.finalists={k:3}", "YAML needs a blank after the colon: k: 3"),
        ("confirm mine.yaml", "is a search space without arms to compare; sweep it with `tfkd tune`"),
        ("check mine.yaml epochs=x optim.momentum=y", "got 'y' (in 'optim.momentum=y')"),
        ("tune mine.yaml --num-samples 0", "got 0 (in '--num-samples 0')"),
        ("tune mine.yaml --time-budget -1", "(in '--time-budget -1.0')"),
        ("check bad.yaml seed=1", "bad.yaml: epochs: should be a whole number"),
        ("check bad.yaml seed=x", "(in 'seed=x' on the command line)"),
        ("check bad.yaml epochs=y", "command line: epochs: should be a whole number"),
        ("check digits_arms epochs=x", "got 'x' (in 'epochs=x'); the same in 10 more arms"),
        ("confirm digits_arms optim.momentum=x", "got 'x' (in 'optim.momentum=x')"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_blamed_on_the_words_that_gave_it(
    here: Path, capsys: pytest.CaptureFixture[str], line: str, sentence: str
) -> None:
    space = "objective: [kd, ce]\nteacher: mlp\noptim: {lr: {low: 0.01, high: 0.5}}\n"
    (here / "mine.yaml").write_text(space)
    (here / "bad.yaml").write_text(f"{space}epochs: many\n")
    assert sentence in answered(capsys, line)


def test_a_teacher_is_named_by_its_network_alone() -> None:
    tree = {"objective": "kd", "epochs": 3}
    named = TrainConfig(**tree, teacher="cnn")
    assert named == TrainConfig(**tree, teacher={"model": "cnn"})
    two = TrainConfig(**tree, teacher=["cnn", {"model": "mlp"}])
    assert two == TrainConfig(**tree, teacher=[{"model": "cnn"}, {"model": "mlp"}])
    space = load_space("digits_tfkd", ["objective=kd", "teacher=mlp", "teacher.epochs=3"])
    assert space.teacher_runs()[0].student.name == "mlp"
    with pytest.raises(ConfigError, match=r"teacher.model: no such name 'cn'"):
        TrainConfig(**tree, teacher="cn")


def test_train_on_a_search_space_says_what_to_do_instead(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answered(capsys, "train digits_tfkd")
    assert len(said) < 500
    assert (
        "objective, optim.lr, optim.weight_decay: are searched, and one run needs one value" in said
    )
    assert "search them: tfkd tune digits_tfkd" in said
    assert "tfkd best EXPERIMENT > best.yaml && tfkd train best.yaml" in said
    fixes = re.findall(r"fix them: (.*?) search them", said)
    assert load_space("digits_tfkd", shlex.split(fixes[0])).single().objective.name == "tfkd_reg"


# --- spaces and init


def test_colorama_which_ray_imports_writes_no_escape_at_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    colorama, dropped = ModuleType("colorama.initialise"), list[Any]()
    colorama.reset_all = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "colorama.initialise", colorama)
    monkeypatch.setattr("atexit.unregister", dropped.append)
    assert main(["completion", "bash"]) == 0 and dropped == [colorama.reset_all]


@pytest.mark.slow
def test_spaces_lists_every_file_that_ships_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    found = {space.name: space for space in shipped_spaces()}
    assert sorted(found) == sorted(shipped_files("search_spaces"))
    for name, space in found.items():
        if space.trials.endswith(" arms"):
            arms = load_arms(name)
            assert space.trials == f"{len(arms.arms)} arms" and arms.example.data.name == space.data
            config = arms.example
        else:
            loaded = load_space(name)
            assert int(space.trials) == loaded.search.num_samples
            config = loaded.example
            assert config.data.name == space.data and config.student.name == space.student
            names = {b.objective for b in loaded.branches}
            assert set(space.objectives.split(", ")) == names - {"ce", "lsr"} or names <= {
                "ce",
                "lsr",
            }
        gpus = config.workers * config.gpus_per_worker
        assert space.needs == {0: "-", 1: "GPU"}.get(gpus, f"{gpus:g} GPUs")
        assert space.about, name
    assert main(["spaces"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(found)
    assert main(["spaces", "--about"]) == 0
    out = capsys.readouterr().out
    assert "    Does teacher-free distillation help a small network on real digits?\n" in out


@pytest.mark.slow
def test_spaces_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["spaces", "--about"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= width


@pytest.mark.parametrize("name", ["digits_tfkd", "paper/table_1"])
def test_init_copies_what_ships_and_replaces_nothing(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", name]) == 0
    out = f"{Path(name).name}.yaml"
    assert capsys.readouterr().out == f"{out}\n"
    text, shipped = (here / out).read_text(), shipped_files("search_spaces")[name].read_text()
    assert text == shipped.replace(f"search_spaces/{name}.yaml", out)
    (here / out).write_text("mine")
    assert "exists and is not overwritten" in answered(capsys, f"init {name}")
    assert (here / out).read_text() == "mine"
    (here / "link.yaml").symlink_to("nowhere.yaml")
    assert "exists and is not overwritten" in answered(capsys, f"init {name} -o link.yaml")
    assert not (here / "nowhere.yaml").exists()
    assert main(["init", name, "-o", "other.yaml"]) == 0


def pictures(root: Path, images: int, side: int = 50) -> Path:
    for split, count in (("train", images), ("val", 2)):
        for name in ("cat", "dog", "eel"):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (side + 20, side + k % 3)).save(root / split / name / f"{k}.png")
    return root


@pytest.mark.parametrize("name", ["digits_tfkd", "fashion_mnist_kd", "cifar100_kd", "fashion_arms", "digits_optimizers"])  # fmt: skip
def test_init_fits_a_copy_to_a_folder_of_images(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(here / "pictures", 40)
    assert main(["init", name, "--data", "pictures"]) == 0
    assert (
        "120 images of 3 classes in train, read at 48x48 (their shorter side is 51 px; a multiple"
        in capsys.readouterr().err
    )
    file = f"{name}.yaml"
    is_arms = "arms" in parse_yaml((here / file).read_text(), file)
    config = load_arms(file).example if is_arms else load_space(file).example
    assert config.data.name == "image_folder" and config.data.root == here / "pictures"
    assert (config.data.num_classes, config.data.image_size) == (3, 48)
    train, _ = config.data.load()
    assert 8 <= config.optim.batch_size <= len(train) / 4 and config.epochs == 90
    runs = config.teacher_runs() if is_arms else load_space(file).teacher_runs()
    assert all(run.optim.batch_size <= config.optim.batch_size for run in runs)
    text = (here / file).read_text()
    assert "# 120 images in train, as `tfkd init` counted them\ndata: " in text
    begin = f"tfkd confirm {file}" if is_arms else f"tfkd tune {file} --name {name} && tfkd confirm"
    head = text.splitlines()[:3]
    assert head[:2] == [f"# {name}, fitted to the images in pictures.", "#"] and begin in head[2]
    assert "Fashion-MNIST" not in text.partition("\n\n")[0]


@pytest.mark.parametrize(
    "images, batch, epochs",
    [
        (1, 2, 90),
        (6, 2, 90),
        (24, 4, 90),
        (25, 8, 90),
        (1_000, 32, 90),
        (4_000, 128, 90),
        (100_000, 128, 18),
    ],
)
def test_batch_and_epochs_follow_the_number_of_images(images: int, batch: int, epochs: int) -> None:
    assert batch_for(images) == batch and epochs_for(images, batch) == epochs


@pytest.mark.parametrize(
    "folders, sentence",
    [
        ([], "d has no class folders and no images; put images at d/CLASS/ (they are split), or at"),
        (["train/a"], "d/train has only one class folder, 'a'; two or more"),
        (["a/1.png"], "d has only one class folder, 'a'; two or more"),
        (["train/a", "train/b"], "no image in 2 of 2 class folders: d/train/a, d/train/b; fill or"),
        (["a/1.png", "b/1.PNG", "c/1.txt"], "no image in 1 of 3 class folders: d/c; fill or remove"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b"], "of 4 class folders: d/val/b"),
        (["1.png", "2.jpg"], "2 images lie directly in d: make a folder for each class"),
        (["a/1.png", "1.png"], "only one class folder, 'a', and 1 images lie directly in d"),
        (["val/a/1.png", "val/b/1.png"], "not found: the folder train beside d/val"),
        (["Training/a/1.png", "valid/a/1.png"], "have the names of splits, not of classes"),
    ],
)  # fmt: skip
def test_init_says_what_a_folder_of_images_lacks_and_not_what_the_shipped_data_set_does(
    folders: list[str], sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "d").mkdir()
    for name in folders:
        place = here / "d" / name
        (place.parent if place.suffix else place).mkdir(parents=True, exist_ok=True)
        if place.suffix:
            place.touch()
    for space in ("digits_tfkd", "fashion_tfkd"):
        said = answered(capsys, f"init {space} --data d")
        assert sentence in said and "fashion_mnist" not in said
    assert "no such directory" in answered(capsys, "init digits_tfkd --data nowhere")
    assert [p.name for p in here.iterdir()] == ["d"]


def test_an_option_with_one_value_is_not_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("init n --data a --data b", "tune n --name a --name=a", "report e -o a --out b"):
        assert "given twice; give it once" in answered(capsys, words)
    args = _parsed_args(["trials", "e", "--filter", "a=1", "--filter", "b=2", "--limit", "3"])
    assert args.filter == ["a=1", "b=2"] and "given_options" not in args


def test_a_file_with_such_a_folder_gets_the_same_sentence_and_other_files_their_data_sets(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "d/a").mkdir(parents=True)
    for data in ("{name: image_folder, root: d}", "{name: image_folder, root: d, num_classes: 2}"):
        (here / "mine.yaml").write_text(f"data: {data}\nobjective: ce\n")
        main(["check", "mine.yaml"])
        assert "has only one class folder, 'a'; two" in " ".join(
            "".join(capsys.readouterr()).split()
        )
    (here / "idx").mkdir()
    (here / "idx/train.gz").touch()
    assert "data fashion_mnist: not found" in answered(capsys, "init fashion_tfkd --data idx")


def test_init_and_check_say_once_what_is_left_out_and_that_validation_is_small(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = pictures(here / "all", 5, side=27)
    for name in ("train/cat/a.txt", "val/b.png", "train/.hidden", "val/dog/.c.txt"):
        (root / name).touch()
    (root / "valid").mkdir()
    assert main(["init", "fashion_tfkd", "--data", "all"]) == 0
    begun = " ".join(capsys.readouterr().err.split())
    assert "read at 28x28;" in begun and "its student, cnn, has 1,517 weights" in begun
    assert main(["check", "fashion_tfkd.yaml"]) == 0
    checked = " ".join(capsys.readouterr().out.split())
    for said in (begun, checked):
        assert said.count("2 files are no image in a class folder and left out: a.txt, b.png") == 1
        assert said.count("these folders are not read: valid;") == 1
    assert "validation has 3 images: one image is 33.33 points" in checked
    assert "steps" not in checked and "optim.batch_size 2 " in checked


@pytest.mark.parametrize(
    "side, text",
    [
        (28, "28x28"),
        (105, "104x104 (their shorter side is 105 px; a multiple of 8, which every network takes)"),
        (500, "224x224 (their shorter side is 500 px; at most 224)"),
        (5, "8x8 (their shorter side is 5 px; at least 8)"),
    ],
)
def test_the_size_of_images_is_their_own_or_has_a_reason(
    side: int, text: str, tmp_path: Path
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (side, side + 3)).save(tmp_path / name / "0.png")
    assert look_at(tmp_path).size_text == text


@pytest.mark.parametrize("name", ["digits_tfkd", "fashion_mnist_kd"])
def test_init_fits_a_copy_to_a_single_folder_and_says_that_it_is_split(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(pictures(here / "all", 40) / "val")
    for folder in (here / "all/train").iterdir():
        folder.rename(here / "all" / folder.name)
    (here / "all/train").rmdir()
    assert main(["init", name, "--data", "all"]) == 0
    said = capsys.readouterr().err
    assert "120 images of 3 classes in one folder" in said
    assert "a fifth of each class is the test split" in said
    config = load_space(f"{name}.yaml").example
    train, val = config.data.load()
    assert (len(train), len(val or ()), len(config.data.load_test())) == (78, 18, 24)
    assert 8 <= config.optim.batch_size <= len(train) / 4
    assert main(["check", f"{name}.yaml"]) == 0
    assert "24 images, a fifth of each class, are the test split" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    "text, key, value, expected",
    [
        ("# c\n\na: 1  # x\nb: 2\n", "a", 3, "# c\n\na: 3\nb: 2\n"),
        ("a:   # x\n  b: 1   # y\n  c: 2   # z\n\nd: 3\n", "a", {"b": 1, "c": 4, "e": 5}, "a:   # x\n  b: 1   # y\n  c: 4\n  e: 5\n\nd: 3\n"),
        ("a: {b: 1}\nd: 3\n", "a", {"b": 2}, "a: {b: 2}\nd: 3\n"),
        ("a: 1\nd: 3\n", "a", None, "d: 3\n"),
        ("# c\n\nd: 3\n", "a", 1, "# c\n\na: 1\nd: 3\n"),
        ("d: 3\n", "a", None, "d: 3\n"),
    ],
)  # fmt: skip
def test_a_setting_is_written_into_a_file_whose_other_lines_stay(
    text: str, key: str, value: object, expected: str
) -> None:
    assert with_setting(text, key, value) == expected


# --- completion


def completed(here: Path, line: str, script: str) -> set[str]:
    """Return what a real bash offers for the last word of a line."""
    words = line.split(" ")
    code = f"""
{script}
COMP_WORDS=({" ".join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}
_tfkd; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "--norc", "-c", code], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return set(done.stdout.split("\n")) - {""}


def test_bash_completes_verbs_options_files_experiments_and_settings(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sweep(here / "tfkd_results/first", 4)
    (here / "mine.yaml").touch()
    (here / "other").mkdir()
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for line, some, none in [
        ("tfkd ", {"tune", "spaces", "status"}, {"digits_tfkd"}),
        ("tfkd tu", {"tune"}, {"status"}),
        ("tfkd tune dig", {"digits_tfkd", "digits_arms"}, {"fashion_tfkd", "first"}),
        ("tfkd tune mi", {"mine.yaml"}, set()),
        ("tfkd tune digits_tfkd optim.l", {"optim.lr="}, {"optim.momentum="}),
        ("tfkd tune digits_tfkd --na", {"--name"}, {"--num-samples"}),
        ("tfkd status ", {"first", "@last", "other"}, {"digits_tfkd"}),
        ("tfkd status --", {"--follow", "--json", "--help"}, {"first"}),
        ("tfkd trials -o ", {"table", "json", "csv"}, {"first"}),
        ("tfkd trials first --output c", {"csv"}, {"table"}),
        ("tfkd teacher ", {"train", "list", "show"}, {"digits_tfkd"}),
        ("tfkd teacher train fash", {"fashion_tfkd"}, set()),
        ("tfkd cluster up aws", {"aws-gpu"}, set()),
        ("tfkd compare first f", {"first"}, {"fashion_tfkd"}),
        ("tfkd stop ", {"first", "@last"}, {"digits_tfkd"}),
        ("tfkd confirm ", {"first", "digits_arms"}, set()),
        ("tfkd completion ", {"bash", "zsh", "fish"}, {"first"}),
        ("tfkd init fash", {"fashion_tfkd"}, {"mine.yaml"}),
        ("tfkd tune --storage o", {"other"}, {"digits_tfkd"}),
        ("tfkd tune --name f", set(), {"first", "fashion_tfkd"}),
    ]:
        offered = completed(here, line, script)
        assert some <= offered and not none & offered, (line, offered)


@pytest.mark.parametrize(
    "shell",
    [pytest.param(s, marks=[] if s == "bash" else [pytest.mark.tools]) for s in SHELLS],
)
def test_a_completion_script_is_read_by_its_shell(
    shell: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for verb in verbs_of(_parser()):
        assert re.search(rf"\b{verb}\b", text), verb
    done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


# --- best, logs, plan


@pytest.mark.parametrize(
    "changes",
    [{}, {"epochs": 7, "recipe": "modern", "augment": {"crop_padding": 1}}, {"optim": "adamw", "ema": {"decay": 0.9}},
     {"init": "trained", "freeze": "net.1", "resources": {"disk": 1}}, {"objective": "kd", "teacher": ["mlp", {"model": "cnn", "share": 2}]},
     {"objective": "tfkd_self", "teacher": {"epochs": 2}, "student": "cnn"}, {"objective": {"name": "ce", "loss_scale": 0.5}, "precision": "bf16"}],
    ids=str,
)  # fmt: skip
def test_settings_without_defaults_are_the_same_run(changes: dict[str, object]) -> None:
    whole = TrainConfig(**{"objective": "lsr", **changes})
    short = without_defaults(whole.tree)
    assert TrainConfig(**short) == whole and len(dump_yaml(short)) < len(dump_yaml(whole.tree)) / 2


def test_best_prints_what_differs_from_the_defaults_and_it_is_the_same_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sweep(here / "tfkd_results/first", 12, search={"stopping": "none"})
    printed = {}
    for words in (["best", "first"], ["best", "first", "--all"]):
        assert main(words) == 0
        printed[words[-1]] = capsys.readouterr().out
    (here / "short.yaml").write_text(printed["first"])
    (here / "all.yaml").write_text(printed["--all"])
    short, whole = load_space("short.yaml").single(), load_space("all.yaml").single()
    assert short == whole == best_config(here / "tfkd_results/first")
    assert short.fingerprint() == whole.fingerprint()
    assert len(printed["first"].splitlines()) < 30 < len(printed["--all"].splitlines())
    winner, _ = best_of(here / "tfkd_results/first")
    for name in winner.parameters:  # what was searched is there, also where it is as by default
        assert re.search(rf"(?m)^\s*{name.rpartition('.')[2]}: ", printed["first"]), name
    assert "(--all shows them)" in printed["first"] and "(--all" not in printed["--all"]


def test_best_of_an_experiment_that_this_release_refuses_is_printed_as_it_is(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sweep(here / "e", 4, search={"stopping": "none"})
    for file in (here / "e/trials").glob("*/trial.json"):
        file.write_text(file.read_text().replace('"batch_size"', '"size_of_old"'))
    assert main(["best", "e"]) == 0
    assert "size_of_old" in capsys.readouterr().out


def test_logs_of_an_objective_are_those_of_its_trials(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sweep(here / "tfkd_results/first", 12)
    names = sorted(p.name for p in (here / "tfkd_results/first/trials").glob("*-lsr"))
    assert main(["logs", "first", "lsr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if re.match(r"t\d", line)] == names and len(names) == 3
    assert sum(line.startswith("  epoch ") for line in lines) >= 3
    assert "one trial at a time; lsr has t0002-lsr, " in answered(capsys, "logs first lsr --follow")
    assert "did you mean 'lsr'?" in answered(capsys, "logs first lsrr")


def test_plan_says_in_words_what_a_sweep_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "digits_tfkd"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith(
        "24 trials of 54 epochs: 6 each of tfkd_reg, tfkd_self, lsr and ce.\n"
        "Trials that are behind are stopped after epoch 6 and 18, so that about 7 of 24\n"
        "run to the end. That saves 59 % of the epochs.\n"
    )
    assert main(["plan", "digits_tfkd", "objective=ce", "search.stopping=none"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("24 trials of 54 epochs: ce.\nNone is stopped early.\n")


# --- commands that are printed


@pytest.mark.slow
def test_commands_that_are_printed_can_be_pasted(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that train parse, and name what is there; the others are run."""
    make_sweep(here / "tfkd_results/a b", 24)
    sweep = here / "tfkd_results/a b"
    (here / "mine.yaml").touch()  # the file that it was tuned with
    said = []
    for words in (
        ["status", "a b"],
        ["best", "a b"],
        ["report", "a b"],
        ["tune"],
        ["ls"],
        ["spaces"],
        ["init", "digits_tfkd"],
    ):
        if words == ["tune"]:
            about = read_experiment(sweep)
            _print_summary(build_space(about["space"]), sweep, whole=True)
            told_of_interrupt(sweep)
        else:
            assert main(words) == 0
        said += list(capsys.readouterr())
    page = html.unescape(re.sub(r"<[^>]+>", "\n", (here / "report.html").read_text()))
    found = {line for text in [*said, page] for line in commands_printed(text)}
    assert len(found) > 6, found
    monkeypatch.chdir(here)
    for line in sorted(found):
        for words in commands_in(line):
            if any(word.isupper() for word in words):  # NAME, FILE: to be filled in
                continue
            args = _parsed_args(words)
            if words[0] not in ("tune", "train", "resume", "confirm", "tensorboard"):
                assert main(words) == 0, line
                capsys.readouterr()
            elif words[0] != "train":
                place = getattr(args, "experiment", None) or getattr(args, "experiments", [None])[0]
                assert Path(place or args.file).exists(), line


def commands_printed(text: str) -> Iterator[str]:
    """Yield the lines, or parts of them in backquotes, that are commands `tfkd`."""
    yield from re.findall(r"(?m)^\s*(tfkd [a-z].*?)\s*$", text)
    yield from re.findall(r"`(tfkd [a-z][^`]*)`", text)
    yield from re.findall(r": (tfkd [a-z].*?)\s*$", text)


def test_an_experiments_name_is_a_place_in_python_too(here: Path) -> None:
    make_sweep(here / "tfkd_results/first", 8)
    assert best_config("first") == best_config("tfkd_results/first")
    with pytest.raises(ConfigError, match="no such directory"):
        best_config("second")


def test_the_command_to_resume_names_the_cluster_on_which_a_sweep_was_begun(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = here / "tfkd_results/first"
    for words, rest in (
        (["tune", "x"], ""),
        (
            ["tune", "x", "--address", "10.0.0.1:6379", "--name", "first"],
            " --address 10.0.0.1:6379",
        ),
        (["tune", "x", "--address=auto"], " --address auto"),
    ):
        write_experiment(experiment, build_space({"objective": "ce"}).tree, ["tfkd", *words])
        assert resume_command(experiment) == f"tfkd resume tfkd_results/first{rest}"
    assert resume_command(here / "nowhere") == "tfkd resume nowhere"


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"callbacks": object()}, "callbacks: needs a list of ray.tune.Callback, got <object"),
        ({"callbacks": [Progress]}, "callbacks: Progress is a class; give an object of it"),
        ({"callbacks": [print]}, "callbacks: <built-in function print> is no ray.tune.Callback"),
        ({"priors": "earlier"}, "priors: needs a list of directories, got 'earlier'"),
    ],
)
def test_one_thing_in_place_of_a_list_is_refused_before_anything_is_written(
    here: Path, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        build_tuner({"objective": "ce"}, name="y", **given)
    assert " ".join(str(error.value).split()).startswith(sentence)
    assert not (here / "tfkd_results").exists()
