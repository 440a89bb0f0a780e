import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sim.settings import SettingsError
from sim.watching.serving import StudyServer


def ask(
    server: StudyServer, path: str = "/", method: str = "GET", host: str | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=host is not None)
    if host:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def test_it_listens_on_the_loopback_alone(server: StudyServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/"


def test_the_numbers_are_those_of_the_study(server: StudyServer) -> None:
    status, headers, body = ask(server, "/state.json")
    row = json.loads(body)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert (row["status"], row["rounds_done"], row["rounds"]) == ("running", 2, 4)
    assert row["arms"][0]["arm"] == "<b>dml</b>"
    assert row["arms"][0]["curve"] == [[1, 0.25], [2, 0.5]]
    assert row["events"] == ["<b>dml</b> seed 0, round 2, client 1: reply rejected: <script>"]


def test_the_page_runs_its_own_script_and_no_other(server: StudyServer) -> None:
    status, headers, body = ask(server)
    policy = headers["Content-Security-Policy"]
    assert status == 200
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "connect-src 'self'" in policy
    assert headers["Cache-Control"] == "no-store"
    # Nothing is fetched from elsewhere, and what files say never becomes markup.
    page = body.decode()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "innerHTML" not in page
    assert page.count("<script>") == page.count("<style>") == 1


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:9", 200),
        ("127.0.0.1:8420", 200),
        ("evil.example", 421),
        ("evil.example:8420", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost:80@evil.example", 421),
        ("", 421),
    ],
)
def test_only_this_machine_s_names_are_answered(
    server: StudyServer, host: str, status: int
) -> None:
    assert ask(server, "/state.json", host=host)[0] == status


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/..%2f..%2fetc/passwd", "/dml/seed-0-0/settings.yaml", "/?", "/x"],
)
def test_no_request_names_a_file(server: StudyServer, path: str) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_nothing_but_get_is_answered(server: StudyServer, method: str) -> None:
    assert ask(server, method=method)[0] == 501


def test_many_pages_are_one_look(server: StudyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(server, "/state.json")
    looks: list[int] = []
    look = server._follower.look
    monkeypatch.setattr(server._follower, "look", lambda: looks.append(1) or look())
    for _ in range(3):
        ask(server, "/state.json")
    assert len(looks) <= 1


def test_a_study_that_cannot_be_read_any_more_is_said_and_served(
    run_at: Callable[..., Any], tmp_path: Path
) -> None:
    run = run_at("dml/seed-0-0")
    with StudyServer(tmp_path, 0) as serving:
        (run.folder / "settings.yaml").unlink()
        row = json.loads(serving.state())
    assert row["status"] == "unreadable"
    assert "neither a study's folder" in row["told"]


def test_a_port_that_is_taken_is_named_and_else_another_is_found(
    run_at: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_at("dml/seed-0-0")
    with StudyServer(tmp_path, 0) as first:
        with pytest.raises(SettingsError, match=rf"PORT {first.server_port} cannot be listened on"):
            StudyServer(tmp_path, first.server_port)
        monkeypatch.setattr("sim.watching.serving.PORT", first.server_port)
        with StudyServer(tmp_path) as second:
            assert second.server_port != first.server_port
