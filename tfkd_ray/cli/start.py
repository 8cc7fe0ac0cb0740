"""The verbs `spaces`, `init` and `completion`, which need no experiment yet."""

import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path

from tfkd_ray.cli.terminal import say_error, shell_word
from tfkd_ray.settings.columns import USUAL_WIDTH, in_columns, wrapped
from tfkd_ray.settings.errors import OK, ConfigError, near_to


def spaces_verb(args: Namespace) -> int:
    from tfkd_ray.space.shipped import shipped_spaces

    found = list(shipped_spaces())
    cells = [list(space[:6]) for space in found]
    heads = ["name", "data", "objectives", "student", "trials", "needs"]
    table = in_columns("\t".join(row) for row in [heads, *cells])
    if max(map(len, table)) > shutil.get_terminal_size((USUAL_WIDTH, 24)).columns:
        table = in_columns("\t".join(row[:3] + row[4:]) for row in [heads, *cells])
    print(table[0])
    for space, line in zip(found, table[1:], strict=True):
        print(line)
        if args.about:
            print(*wrapped(space.about, first="    ", rest="    "), sep="\n")
    say_error(
        "`tfkd init NAME` copies one to change it. ce and lsr are tuned beside the\n"
        "objectives. All data but digits are read from data.root, which\n"
        "`tfkd check NAME` shows."
    )
    return OK


def init_verb(args: Namespace) -> int:
    from tfkd_ray.settings.yaml import shipped_files, text_of
    from tfkd_ray.space.shipped import copied

    known = shipped_files("search_spaces")
    name = args.name.removeprefix("search_spaces/").removesuffix(".yaml")
    if name not in known:
        near = near_to(name, known)
        meant = "" if near is None else f" did you mean {near!r}?"
        raise ConfigError(f"no such search space;{meant} `tfkd spaces` lists them", args.name)
    out = args.out or Path(f"{Path(name).name}.yaml")
    _check_unused(out)
    text = copied(text_of(known[name]), name, out)
    if args.data is not None:
        text = _on_data(text, args.data, name, out)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        _check_unused(out)
        raise
    print(out)
    say_error(f"look at it with:\n  tfkd check {shell_word(out)}")
    return OK


def _on_data(text: str, root: Path, name: str, out: Path) -> str:
    """Return the text of a shipped file for images in a folder, or for its own data set there."""
    from tfkd_ray.space.arms import is_arms_file
    from tfkd_ray.space.fitted import (
        data_of,
        fitted_space,
        look_at,
        looks_like_images,
        rooted,
        student_note,
        with_head,
    )

    if data_of(text) != "digits" and root.is_dir() and not (root / "train").is_dir():
        try:
            text = rooted(text, root)
        except ConfigError:
            if not looks_like_images(root):
                raise
        else:
            say_error(f"data.root: {root}")
            return text
    seen = look_at(root)
    text = fitted_space(text, seen)
    place = "train" if seen.single is None else "one folder"
    say_error(
        f"{root}: {seen.images} images of {seen.classes} classes in {place}, read at {seen.size_text}; "
        "recipe, epochs and batch size are set for this number"
    )
    if seen.single is not None:
        say_error("a fifth of each class is the test split, the same images each time")
    smallness = student_note(text)
    for note in (*seen.notes, *([] if smallness is None else [smallness])):
        say_error(f"note: {note}")
    file, stem = shell_word(out), shell_word(Path(out.stem))
    confirm = f"tfkd confirm {file}"
    if not is_arms_file(name):
        confirm = f"tfkd tune {file} --name {stem} && tfkd confirm {stem}"
    return with_head(text, [f"{name}, fitted to the images in {root}.", "", f"  {confirm}"])


def _check_unused(out: Path) -> None:
    """Raise a ConfigError if there is something at a path: a file of the user's is never replaced."""
    try:
        out.lstat()
    except FileNotFoundError:
        return
    raise ConfigError("exists and is not overwritten; name another file: -o FILE", out)


def completion_verb(args: Namespace, parser: ArgumentParser) -> int:
    from tfkd_ray.cli.completion import completion_script

    print(completion_script(parser, args.shell), end="")
    return OK
