"""YAML and settings: valid input, and sentences about invalid input."""

import time
from pathlib import Path

import pytest
from conftest import long_after
from rich.cells import cell_len

from tfkd_ray.launch.clusterfile import load_cluster
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.settings.columns import in_columns, on_one_line
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import settings_at, validated
from tfkd_ray.settings.yaml import dump_yaml, find_file, parse_documents, parse_yaml, read_yaml


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4), ("1.0e-4", 1e-4), ("5", 5), ("007", 7), ("-3", -3), (".5", 0.5), ("true", True), ("~", None),
        ("on", "on"), ("no", "no"), ("1:30", "1:30"), ("0x1f", "0x1f"), ("2026-01-01", "2026-01-01"), ("''", ""),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_yaml(f"a: {text}", "f.yaml")["a"]
    assert read == value and type(read) is type(value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\na: 2", "line 2, column 1: not YAML: key 'a' is given twice"),
        ("a:\n\tb: 1", "a tab, but YAML indents with spaces only"),
        ("a: [1, 2", "line 1"),
        ("1: a", "key 1 must be text"),
        ("a: &x [*x]", "an alias contains itself"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("[" * 5000, "nested too deeply"),
        ("a: !!bool x", "line 1, column 4: not YAML: this is no bool"),
        ("a: 1\nb: !!float x", "line 2, column 4: not YAML: this is no float"),
        ("a: !!timestamp x", "line 1, column 4: not YAML: this is no timestamp"),
        ("a:\n- " + "1" * 5000, "line 2, column 3: not YAML: this is no int"),
        ("a: 1\nbc: x\0", "line 2, column 6: not YAML: unacceptable character"),
        ("\0", "line 1, column 1: not YAML: unacceptable character"),
    ],
)
def test_what_is_not_yaml_is_said_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "f.yaml")
    assert str(error.value).startswith("f.yaml:\n  ") and message in str(error.value)


def test_aliases_cannot_explode() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="more than 100000 values once its aliases are expanded"):
        parse_yaml("\n".join(lines), "f.yaml")


HUGE = {
    "keys": "".join(f"k{i}: 1\n" for i in range(300_000)),
    "the same key": "a: 1\n" * 600_000,
    "a list": "a: [" + "1," * 1_500_000 + "]",
    "depth": "[" * 3_000_000,
    "a long line": "a: " + "x" * 3_000_000,
    "aliases": "a: &a [1]\n" + "".join(f"k{i}: *a\n" for i in range(250_000)),
    "documents": "--- [a]\n" * 500_000,
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_a_huge_file_is_refused_within_seconds(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    for read in (read_yaml, load_cluster):
        began = time.process_time()
        with pytest.raises(ConfigError, match="larger than any such file"):
            read(tmp_path / "x.yaml")
        assert time.process_time() - began < 1


@pytest.mark.parametrize("name", long_after(1, ["aliases", "documents"]))
@pytest.mark.slow
def test_a_large_file_is_read_no_further_than_to_the_most_values(name: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match="more than 100000 values"):
        parse_documents(HUGE[name][: 2**20], "x.yaml")
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "is a directory, not a file"),
        (lambda p: p.write_text(""), "is empty"),
        (lambda p: p.write_text("# only a comment\n"), "is empty"),
        (lambda p: p.write_text("- a\n- b\n"), "must be settings (key: value), got a list"),
        (lambda p: p.write_bytes(b"a: \xff"), "not a text file in UTF-8: byte 3 is 0xff"),
    ],
)
def test_a_file_that_cannot_be_used_gets_one_sentence(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "space.yaml"
    make(path)
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_a_zero_byte_is_no_file_name() -> None:
    with pytest.raises(ConfigError, match="a file name cannot contain a zero byte"):
        read_yaml(find_file("a\0b", "search_spaces"))


def test_a_misspelt_file_name_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"did you mean 'digits.yaml'\?"):
        read_yaml(tmp_path / "digit.yaml")


def test_dumped_trees_read_back_the_same() -> None:
    tree = {"b": [1, 1e-5, 0.1, None, True, "on", "1e-4", ""], "a": {"x": (1, 2), "name": "n"}}
    text = dump_yaml(tree)
    assert parse_yaml(text, "f") == {
        "b": [1, 1e-5, 0.1, None, True, "on", "1e-4", ""],
        "a": {"x": [1, 2], "name": "n"},
    }
    assert text.index("name") < text.index("x:")


@pytest.mark.parametrize(
    "tree, sentence",
    [
        ({"objective": "cee"}, "objective: no such name 'cee'; did you mean 'ce'?"),
        ({"objective": {"alpha": 1}}, "objective: needs a 'name', got {'alpha': 1}"),
        ({}, "objective: required, and not given"),
        ({"objective": {"name": "kd", "temprature": 2}}, "objective.kd.temprature: no such setting; did you mean 'temperature'?"),
        ({"objective": {"name": "lsr", "alpha": 1.5}}, "objective.lsr.alpha: should be at most 1, got 1.5"),
        ({"objective": {"name": "lsr", "alpha": float("nan")}}, "objective.lsr.alpha: should be a finite number, got nan"),
        ({"objective": {"name": "tfkd_reg", "temperature": 0}}, "objective.tfkd_reg.temperature: should be greater than 0, got 0"),
        ({"objective": {"name": "tfkd_reg", "correct_prob": 1.0}}, "objective.tfkd_reg.correct_prob: should be less than 1, got 1.0"),
        ({"objective": {"name": "tfkd_reg", "correct_prob": 0.05}}, "objective.tfkd_reg.correct_prob: must be at least 1/K = 0.1"),
        ({"objective": "ce", "data": "digit"}, "data: no such name 'digit'; did you mean 'digits'?"),
        ({"objective": "ce", "student": "mpl"}, "student: no such name 'mpl'; did you mean 'mlp'?"),
        ({"objective": "ce", "optim": {"lrr": 1}}, "optim.lrr: no such setting; did you mean 'lr'?"),
        ({"objective": "ce", "optim": 3}, "optim: needs settings below it (key: value), got 3"),
        ({"objective": "kd"}, "teacher.model: objective kd needs a teacher's network"),
        ({"objective": "tfkd_self", "teacher": {"model": "cnn"}}, "teacher.model: objective tfkd_self learns from a copy"),
        ({"objective": "ce", "optim": {"nesterov": True, "momentum": 0}}, "optim: nesterov needs a momentum above 0"),
        ({"objective": "ce", "workers": 200}, "optim.batch_size: 200 workers cannot share 128 images"),
        ({"objective": "ce", "batch_norm": "sync"}, "batch_norm: sync needs GPUs"),
        ({"objective": "ce", "workers": 2, "gpus_per_worker": 0.5}, "gpus_per_worker: 2 workers need whole GPUs"),
        ({"objective": "ce", "workers": 2, "gpus_per_worker": 2}, "gpus_per_worker: one process trains on one GPU, got 2; set gpus_per_worker: 1 and workers: 4"),
        ({"objective": "ce", "gpus_per_worker": 1.5}, "gpus_per_worker: one process trains on one GPU, got 1.5; set gpus_per_worker: 1 and workers: 2"),
    ],
)  # fmt: skip
def test_every_problem_is_a_sentence_with_field_rule_value_and_way_out(
    tree: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        validated(TrainConfig, tree, "mine.yaml")
    assert any(problem.startswith(sentence) for problem in error.value.problems), str(error.value)
    assert str(error.value).startswith("mine.yaml:\n")


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        validated(
            TrainConfig,
            {"objective": {"name": "lsr", "alpha": 2, "x": 1}, "epochs": 0, "optim": {"lr": -1}},
        )
    assert len(error.value.problems) == 4


def test_settings_are_found_through_unions() -> None:
    assert "temperature" in settings_at(TrainConfig, ("objective", "kd"))
    assert "temperature" not in settings_at(TrainConfig, ("objective", "ce"))
    assert "model" in settings_at(TrainConfig, ("teacher",))


@pytest.mark.parametrize(
    "given", ["digits_tfkd", "digits_tfkd.yaml", "search_spaces/digits_tfkd.yaml"]
)
def test_shipped_files_are_found_from_anywhere(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file(given, "search_spaces").is_file()
    assert not find_file("mine.yaml", "search_spaces").exists()


# --- tables ----------------------------------------------------------------------------------------------------


def test_tables_set_numbers_to_the_right_and_cut_the_first_column_alone() -> None:
    rows = ["arm\taccuracy\tn\tof", "試験\t90.04 ± 0.43\t5\tmine", "a" * 48 + "\tnone\t12\t7 days"]
    assert in_columns(rows, 40) == [
        "arm                 accuracy   n  of",
        "試験            90.04 ± 0.43   5  mine",
        "aaaaaaaaaaaaa…          none  12  7 days",
    ]
    assert in_columns(rows)[2].startswith("a" * 48 + "  ")
    assert in_columns([]) == [] and in_columns(["a\tb"], 1) == ["a  b"]
    assert max(map(cell_len, in_columns(rows, 10))) == 8 + 26


def test_a_cell_holds_no_line_end_and_no_control_character() -> None:
    (line,) = in_columns([on_one_line("a\tb\n\x1b[31m") + "\tc"])
    assert line.isprintable() and "\\t" in line and line.endswith("  c")
