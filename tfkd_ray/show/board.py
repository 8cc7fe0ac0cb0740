"""TensorBoard as `tfkd tensorboard` serves it: with a status, narrow columns, and runs in colours.

The event files are complete for any TensorBoard. Three things are not in them, and are added when
they are served, through the arguments of `program.TensorBoard`:

- HParams has a status in words (`_Hparams`): done, stopped, failed, and after which epoch.
- The table shows it beside the trial, and has narrower columns (`adapted`), so that five
  hyperparameters, the metric and the status are visible on 1280 pixels.
- The page opens with the value pinned and the runs coloured by objective (`opening`).
"""

import io
import json
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tfkd_ray.settings.yaml import Tree
from tfkd_ray.show.tensorboard import OUTCOME_TAG, STATUS

with warnings.catch_warnings():  # of a package that TensorBoard carries with it
    warnings.simplefilter("ignore", DeprecationWarning)
    from tensorboard import assets, default, program
    from tensorboard.plugins.hparams import backend_context, hparams_plugin

BY_OBJECTIVE = r"^(?:.*/)?(?:t\d+-)?(.+?)(?:-s\d+)?$"
"""Finds the objective, or the arm, in the name of a run; runs of the same one have one colour."""
RUNNING = "running"
_SESSION_START = metadata.SESSION_START_INFO_TAG
PAGES = "index.js"
CHANGES = {
    '<vaadin-grid-column flex-grow="2" width="10em"': '<vaadin-grid-column flex-grow="1" width="6em"',
    '<div class="table-cell">[[item.name]]</div>\n        </template>\n      </vaadin-grid-column>': (
        '<div style="white-space: normal; overflow-wrap: anywhere">[[item.name]]</div>\n        </template>\n'
        '      </vaadin-grid-column>\n      <vaadin-grid-column flex-grow="0" width="7.5em" resizable="">\n'
        '        <template class="header"><div class="table-header table-cell">Status</div></template>\n'
        "        <template>\n"
        f'          <div style="white-space: normal">[[_sessionGroupHParam(item, "{STATUS}")]]</div>\n'
        "        </template>\n      </vaadin-grid-column>"
    ),
    "Math.min(5,t.length)": "Math.min(5,t.filter(x=>x.info.differs).length||t.length)",
    "this.maxNamesToEnableByDefault=40": "this.maxNamesToEnableByDefault=500",
}
"""Changes of TensorBoard's pages: columns of 6 instead of 10 em; whole trial names, and the status;
of hyperparameters only those that every trial has are ticked at first, five at most; 500 runs
instead of 40 are ticked, as in Time Series."""


def adapted(pages: str) -> tuple[str, int]:
    """Return TensorBoard's pages with `CHANGES`, and how many of these had no place there."""
    missing = 0
    for theirs, ours in CHANGES.items():
        missing += theirs not in pages
        pages = pages.replace(theirs, ours)
    return pages, missing


def adapted_assets() -> tuple[bytes, int]:
    """Return TensorBoard's zip of pages, adapted, and how many changes had no place there."""
    out, missing = io.BytesIO(), len(CHANGES)
    with (
        assets.get_default_assets_zip_provider()() as file,
        zipfile.ZipFile(file) as theirs,
        zipfile.ZipFile(out, "w") as ours,
    ):
        for name in theirs.namelist():
            content = theirs.read(name)
            if name == PAGES:
                pages, missing = adapted(content.decode())
                content = pages.encode()
            ours.writestr(name, content)
    return out.getvalue(), missing


def board_of(logdir: str, port: int, tag: str | None) -> tuple[program.TensorBoard, int]:
    """Return a configured TensorBoard, and how many changes of its pages had no place there.

    Args:
        tag: of the value, which is pinned. None: nothing is pinned.
    """
    pages, missing = adapted_assets()
    plugins = [
        _Hparams if plugin is hparams_plugin.HParamsPlugin else plugin
        for plugin in default.get_plugins()
    ]
    board = program.TensorBoard(
        plugins=plugins,
        assets_zip_provider=lambda: io.BytesIO(pages),
        server_class=lambda app, flags: program.WerkzeugServer(opening(app, tag), flags),
    )
    # read all files of a run, and drop no epoch
    board.configure(argv=["tensorboard", "--logdir", logdir, "--host", "127.0.0.1", "--port", str(port),
                          "--reload_multifile", "true", "--samples_per_plugin", "scalars=5000"])  # fmt: skip
    return board, missing


Application = Callable[[Tree, Callable[..., Any]], Iterable[bytes]]


def opening(app: Application, tag: str | None) -> Application:
    """Return a WSGI application that opens with the runs coloured by objective."""
    query = {"runColorGroup": f"regex:{BY_OBJECTIVE}", "smoothing": "0"}
    if tag is not None:
        query["pinnedCards"] = json.dumps([{"plugin": "scalars", "tag": tag}])

    def opened(environ: Tree, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/" and not environ.get("QUERY_STRING"):
            start_response("302 Found", [("Location", f"/?{urlencode(query)}")])
            return []
        return app(environ, start_response)

    return opened


class _Hparams(hparams_plugin.HParamsPlugin):  # type: ignore[misc]
    """TensorBoard's HParams, with a status in words."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._context = _WithStatus(context)


class _WithStatus(backend_context.Context):  # type: ignore[misc]
    """Adds the status to the summaries that TensorBoard has read."""

    def hparams_metadata(self, *args: Any, **options: Any) -> dict[str, dict[str, bytes]]:
        found = super().hparams_metadata(*args, **options)
        statuses = {run: _status(tags) for run, tags in found.items() if _SESSION_START in tags}
        listed = sorted(set(statuses.values()))
        return {run: _with_status(tags, statuses.get(run), listed) for run, tags in found.items()}


def _status(tags: Mapping[str, bytes]) -> str:
    """Return how the run with these summaries ended."""
    if OUTCOME_TAG in tags:
        outcome = HParamsPluginData.FromString(tags[OUTCOME_TAG]).session_start_info
        return str(outcome.hparams[STATUS].string_value)
    if metadata.SESSION_END_INFO_TAG not in tags:
        return RUNNING
    end = HParamsPluginData.FromString(tags[metadata.SESSION_END_INFO_TAG]).session_end_info
    return "failed" if end.status == api_pb2.STATUS_FAILURE else "done"


def _with_status(
    tags: dict[str, bytes], status: str | None, listed: Sequence[str]
) -> dict[str, bytes]:
    """Return a run's summaries with its status, and with a column for `listed` ones."""
    changed = {}
    if status is not None:
        data = HParamsPluginData.FromString(tags[_SESSION_START])
        data.session_start_info.hparams[STATUS].string_value = status
        changed[_SESSION_START] = data.SerializeToString()
    if metadata.EXPERIMENT_TAG in tags:
        data = HParamsPluginData.FromString(tags[metadata.EXPERIMENT_TAG])
        column = data.experiment.hparam_infos.add(name=STATUS, type=api_pb2.DATA_TYPE_STRING)
        for value in listed:
            column.domain_discrete.values.add(string_value=value)
        changed[metadata.EXPERIMENT_TAG] = data.SerializeToString()
    return {**tags, **changed}
