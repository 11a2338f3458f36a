"""serve-report: a real process on the loopback shows a run directory, and nothing else of the machine."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading

import pytest

from merge3.client.serve_report import make_server
from tests.commands import client


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    run = tmp_path / "run"
    (run / "report.html").write_text("<p>first")
    (run / "result.json").write_text("{}")
    (run / "best.yaml").write_text("a: 1")
    (run / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    (run / ".report.html.partial-1").write_text("half")
    (run / "out").symlink_to(tmp_path / "secret")
    (run / "up").symlink_to(tmp_path)
    (run / "again.html").symlink_to("report.html")
    return run


def ask(port, path, method="GET", host="127.0.0.1", address="127.0.0.1"):
    """(status, headers, body)"""
    connection = http.client.HTTPConnection(address, port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


@pytest.fixture
def port(directory):
    with make_server(directory) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_shows_the_page_as_it_is_rewritten(directory, number):
    command = [sys.executable, "-m", "merge3.client", "serve-report", str(directory), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = json.loads(process.stdout.readline())
            assert said["url"].startswith("http://127.0.0.1:") and said["directory"] == str(directory)
            port = int(said["url"].rsplit(":", 1)[1].strip("/"))
            status, headers, body = ask(port, "/")
            assert (status, body) == (200, b"<p>first") and headers["Cache-Control"] == "no-store"
            (directory / "report.html").write_text("<p>second, longer")
            assert ask(port, "/report.html?x=1#y")[2] == b"<p>second, longer"
        finally:
            process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest, errors) == (0, "", "")


def test_files_of_the_run_are_there_with_their_kinds(port, directory):
    for path, kind in (
        ("/", "text/html; charset=utf-8"),
        ("/result.json", "application/json; charset=utf-8"),
        ("/best.yaml", "text/plain; charset=utf-8"),
        ("/model/model.safetensors", "application/octet-stream"),
        ("/again.html", "text/html; charset=utf-8"),
    ):
        status, headers, body = ask(port, path)
        file = directory / (path.strip("/") or "report.html")
        assert status == 200 and body == file.read_bytes() and headers["Content-Type"] == kind
        assert headers["Content-Length"] == str(len(body)) and headers["X-Content-Type-Options"] == "nosniff"
        assert ask(port, path, "HEAD")[1]["Content-Length"] == str(len(body)) and ask(port, path, "HEAD")[2] == b""


@pytest.mark.parametrize(
    "path",
    [
        "/../secret",
        "/..%2fsecret",
        "/%2e%2e/secret",
        "/model/../../secret",
        "//etc/passwd",
        "/%2fetc%2fpasswd",
        "/out",
        "/up/secret",
        "/up/run/report.html/../../../secret",
        "/.report.html.partial-1",
        "/model",
        "/model/",
        "/none.json",
        "/a%00b",
        "/" + "a" * 3000,
        "/%ff%fe",
        "secret",
        "http://elsewhere/../secret",
    ],
)
def test_nothing_else_is(port, path):
    status, _, body = ask(port, path)
    assert status == 404 and b"secret" not in body.replace(path.encode(), b"") and b"half" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_can_be_changed(port, method, directory):
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    assert ask(port, "/report.html", method)[0] == 501
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", None, "[", "[::1"])
def test_a_name_that_somebody_else_gave_to_the_loopback_is_refused(port, host):
    status, _, body = ask(port, "/", host=host)
    assert status == 421 and b"first" not in body


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "127.0.0.1:8765", "[::1]:8765", "LOCALHOST"])
def test_its_own_names_are_not(port, host):
    assert ask(port, "/", host=host)[0] == 200


def test_a_page_that_is_not_there_yet_is_waited_for(port, directory):
    (directory / "report.html").unlink()
    status, _, body = ask(port, "/")
    assert status == 200 and b"No report.html yet" in body and b'http-equiv="refresh"' in body
    (directory / "report.html").write_text("there")
    assert ask(port, "/")[2] == b"there"


def test_one_that_goes_away_disturbs_nobody(port):
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /model/model.safetensors HTTP/1.1\r\nHost: localhost\r\n\r\n")
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
        assert b"400" in connection.recv(1000)
    assert ask(port, "/")[0] == 200


def test_what_it_cannot_serve_it_says(tmp_path, directory):
    done = client("serve-report", tmp_path / "none")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such directory" in done.stderr
    (tmp_path / "empty").mkdir()
    done = client("serve-report", tmp_path / "empty")
    assert done.returncode == 2 and "expected a run directory" in done.stderr
    with make_server(directory) as server:
        done = client("serve-report", directory, "--port", server.server_port)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"127.0.0.1:{server.server_port}" in done.stderr and "--port 0" in done.stderr
    done = client("serve-report", directory, "--host", "203.0.113.7", "--port", "0")  # of nobody's
    assert done.returncode == 1 and "203.0.113.7:0" in done.stderr
    assert client("serve-report", directory, "--port", "70000").returncode == 2
