"""The served report: what it answers, whom it refuses, and what it says of a sweep that ends."""

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_readers import line, make_sweep

from tfkd_ray.cli.main import main
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.show import follow
from tfkd_ray.show.follow import server_of
from tfkd_ray.show.python import followed_report


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    experiment = tmp_path_factory.mktemp("storage") / "größe 2"
    make_sweep(experiment, 24)
    return experiment


@pytest.fixture(scope="module")
def server(sweep: Path) -> Iterator[ThreadingHTTPServer]:
    with server_of(followed_report(sweep), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Answer = tuple[int, dict[str, str], str]


def ask(
    server: ThreadingHTTPServer, path: str = "/page", method: str = "GET", **headers: str
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=120)
    connection.request(method, path, headers={name.replace("_", "-"): v for name, v in headers.items()})  # fmt: skip
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


@pytest.mark.slow
def test_it_serves_the_page_and_the_part_of_it_that_changes(server: ThreadingHTTPServer) -> None:
    code, headers, whole = ask(server, "/")
    assert code == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "connect-src 'self'" in whole and "Plotly" in whole
    code, _, part = ask(server, "/page")
    assert code == 200 and part in whole and part.startswith("<main>") and "<script>" not in part
    assert re.findall("data-trials", part) and "größe 2" in part


def test_it_is_read_by_nobody_but_a_page_of_its_own(server: ThreadingHTTPServer) -> None:
    _, headers, _ = ask(server)
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert headers["Cache-Control"] == "no-store" and "Python" not in headers["Server"]


def test_what_has_not_changed_is_not_sent_again(server: ThreadingHTTPServer) -> None:
    _, headers, _ = ask(server)
    code, again, text = ask(server, If_None_Match=headers["ETag"])
    assert (code, text, again["ETag"]) == (304, "", headers["ETag"])


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "X"])
def test_it_can_only_be_read(server: ThreadingHTTPServer, method: str) -> None:
    code, headers, text = ask(server, method=method)
    assert code == 405 and headers["Allow"] == "GET, HEAD"
    assert text == "only GET and HEAD: this page changes nothing\n"


def test_head_has_no_body(server: ThreadingHTTPServer) -> None:
    code, headers, text = ask(server, method="HEAD")
    assert code == 200 and int(headers["Content-Length"]) > 1000 and text == ""


@pytest.mark.parametrize(
    "path",
    ["/experiment.yaml", "/../experiment.yaml", "/%2e%2e/experiment.yaml", "//etc/passwd",
     "/page/../../etc/passwd", "/trials/t0000-ce/trial.json", "/page%00", "*"],
)  # fmt: skip
def test_no_path_names_a_file(server: ThreadingHTTPServer, path: str) -> None:
    assert ask(server, path)[::2] == (404, "there is only the report here: /\n")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8500", "127.0.0.1.evil.example", "localhost.:1", "0.0.0.0:8500",
             "", "[::2]:8500", "127.0.0.1@evil.example:80"],
)  # fmt: skip
def test_another_name_in_the_host_header_is_refused(server: ThreadingHTTPServer, host: str) -> None:
    code, _, text = ask(server, Host=host)
    assert code == 421 and "127.0.0.1" in text and "trials" not in text


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost:9000", "localhost", "LocalHost:80", "[::1]:80"])  # fmt: skip
def test_the_near_end_of_a_tunnel_may_have_another_port(
    server: ThreadingHTTPServer, host: str
) -> None:
    assert ask(server, Host=host)[0] == 200


def test_only_this_machine_reaches_it(server: ThreadingHTTPServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_broken_request_does_not_end_it(server: ThreadingHTTPServer) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"", b"GET / HTTP/1.1\r\n\r\n"):  # fmt: skip
        with socket.create_connection(server.server_address[:2], timeout=120) as raw:
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            assert b" 200 " not in raw.recv(100)
    assert ask(server)[0] == 200


def end_of(experiment: Path, number: int, status: str) -> None:
    (folder,) = experiment.glob(f"trials/t{number:04d}-*")
    about = json.loads((folder / "trial.json").read_text())
    (folder / "trial.json").write_text(json.dumps({**about, "status": status}))


@pytest.mark.slow
def test_news_is_shown_and_the_end_of_the_sweep_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "RENEW_S", 0.0)
    monkeypatch.setattr(follow, "SHARE", 1e9)
    make_sweep(tmp_path / "e", 8)
    alive = {"now": True}
    for module in ("tfkd_ray.show.status", "tfkd_ray.show.follow"):
        monkeypatch.setattr(f"{module}.is_running", lambda experiment: alive["now"])
    end_of(tmp_path / "e", 7, "running")
    report = followed_report(tmp_path / "e")
    before = report.changing()
    assert "Live: the sweep runs, and this page follows it" in before
    assert report.changing() is before  # nothing was made again
    (metrics,) = tmp_path.glob("e/trials/t0007-*/metrics.jsonl")
    with metrics.open("a") as file:
        file.write(line(18, 0.5432))
    assert report.changing() != before
    end_of(tmp_path / "e", 7, "done")
    alive["now"] = False
    assert "The sweep has ended: this is its final report" in report.changing()
    end_of(tmp_path / "e", 7, "interrupted")
    alive["now"] = True
    report.changing()
    alive["now"] = False
    assert "after tfkd resume e this page follows it again" in report.changing()


@pytest.mark.slow
def test_a_report_that_cannot_be_made_is_said_and_tried_again(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = followed_report(sweep)

    def damaged() -> Any:
        raise ConfigError("was cut", sweep / "experiment.yaml")

    report._seen, make = [], report._make
    monkeypatch.setattr(report, "_make", damaged)
    with server_of(report, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code, _, text = ask(server)
        assert code == 503 and "experiment.yaml" in text and "was cut" in text
        monkeypatch.setattr(report, "_make", make)
        monkeypatch.setattr(report, "_next", 0.0)
        assert ask(server)[0] == 200
        server.shutdown()


def test_a_port_in_use_is_told_with_a_free_one(
    sweep: Path, server: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    port = server.server_address[1]
    assert main(["report", str(sweep), "--follow", "--port", str(port)]) == 2
    assert re.search(rf"--port:\n? *.*{port} cannot be used .*: --port \d+", capsys.readouterr().err, re.DOTALL)  # fmt: skip


@pytest.mark.parametrize(
    "words, told",
    [
        (["--port", "8501"], "add --follow"),
        (["--follow", "-o", "r.html"], "--out: a followed report is served, not written"),
        (["--follow", "--figures", "f"], "--figures: a followed report is served"),
    ],
    ids=["port alone", "file", "figures"],
)
def test_an_option_without_effect_is_refused(
    sweep: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(sweep), *words]) == 2
    assert told in capsys.readouterr().err
