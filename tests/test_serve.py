"""A run behind HTTP: the application by itself, and the whole command where uvicorn is installed."""

import asyncio
import http.client
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from recipes import ROOT

import robe
from benchmarks import server as benchmark
from benchmarks.measure import BenchmarkError
from robe.cli import main
from robe.config import ConfigError
from robe.serve import Server, serve

SCHEMA = "label='click'\ndense=['price']\n[categorical]\nuser='integer'\ncity='string'\n"
TINY = "--weights 200 --batch 16 --bottom 16 --width 8 --top 16 --block 8 --lr 0.1".split()
ROWS = [{"user": i % 7, "price": i if i % 2 else i / 2, "city": f"c{i % 3}"} for i in range(60)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    lines = [f"{i % 2},{row['user']},{row['price']},{row['city']}\n" for i, row in enumerate(ROWS)]
    (folder / "own.csv").write_text("click,user,price,city\n" + "".join(lines))
    (folder / "own.toml").write_text(SCHEMA)
    reading = ["--schema", str(folder / "own.toml"), "--split", "0.8,0.1,0.1"]
    main(["prepare", str(folder / "own.csv"), *reading, "--out", str(folder / "data")])
    main(["train", "--data", str(folder / "data"), *TINY, "--out", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    return robe.load(run, backend="cpu")


def expected(model, rows):
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return model.predict_table(columns | {"price": [float(price) for price in columns["price"]]})


async def ask(server, body, method="POST", path="/predict", headers=()):
    """(status, body) of an answer; body: what is sent, in parts of 1,000 bytes."""
    parts = [body[i : i + 1000] for i in range(0, len(body), 1000)] or [b""]
    sent, said = 0, []

    async def receive():
        nonlocal sent
        sent += 1
        return {"type": "http.request", "body": parts[sent - 1], "more_body": sent < len(parts)}

    async def send(message):
        said.append(message)

    await server({"type": "http", "method": method, "path": path, "headers": list(headers)}, receive, send)
    return said[0]["status"], said[1]["body"], sent


def asked(server, body, **options):
    status, answer, _ = asyncio.run(ask(server, body, **options))
    return status, json.loads(answer)


def question(rows):
    return json.dumps({"rows": rows}).encode()


def test_those_that_ask_together_are_answered_together(model):
    server = Server(model, 100, 10**6)
    # The model is busy until all have come.
    come, busy, read = itertools.count(1), threading.Event(), server._read
    server.worker.submit(busy.wait)

    def told(body):
        found = read(body)
        if next(come) == 200:
            busy.set()
        return found

    server._read = told

    async def all_at_once():
        parts = [ROWS[i % 50 : i % 50 + 1 + i % 7] for i in range(200)]
        return parts, await asyncio.gather(*(ask(server, question(rows)) for rows in parts))

    parts, answers = asyncio.run(all_at_once())
    for rows, (status, body, _) in zip(parts, answers, strict=True):
        assert status == 200
        np.testing.assert_allclose(json.loads(body)["probabilities"], expected(model, rows), 1e-6)
    status, metrics, _ = asyncio.run(ask(server, b"", method="GET", path="/metrics"))
    found = dict(line.rsplit(" ", 1) for line in metrics.decode().splitlines())
    assert found['robe_requests_total{status="200"}'] == "200"
    assert found["robe_rows_total"] == str(sum(map(len, parts)))
    assert 1 <= int(found["robe_batches_total"]) <= 3
    assert float(found["robe_prediction_seconds_total"]) > 0


def test_values_may_lack_and_a_label_does_no_harm(model):
    rows = [{"user": None, "price": None, "city": None}, {"user": "3", "price": 2, "city": "new", "click": 1}]
    status, answer = asked(Server(model, 10, 1000), question(rows))
    table = {"user": [None, "3"], "price": [None, 2.0], "city": [None, "new"]}
    assert status == 200
    np.testing.assert_array_equal(answer["probabilities"], model.predict_table(table))
    assert asked(Server(model, 10, 1000), question(rows[:1]))[0] == 200  # columns of nothing but null


GOOD = ROWS[0]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "the body must be"),
        (b"{", 400, "the body must be"),
        (b'{"rows": [{"price": NaN}]}', 400, "the body must be"),
        (b"\xff\xfe", 400, "the body must be"),
        (b"[" * 100_000, 400, "the body must be"),
        (json.dumps([GOOD]).encode(), 400, "the body must be"),
        (json.dumps({"rows": [GOOD], "extra": 1}).encode(), 400, "`extra`"),
        (
            question([GOOD | {"city": ["c1"]}]),
            400,
            "row 0: 'city' is a list, but that column has one value a row",
        ),
        (question([GOOD | {"city": {"c": 1}}]), 400, "the body must be"),
        (question([]), 400, "give from 1 to 10 rows, not 0"),
        (question([GOOD] * 11), 413, "give from 1 to 10 rows, not 11"),
        (
            question([GOOD, GOOD | {"town": 1}]),
            400,
            "row 1: 'town' is no column; there are price, user, city",
        ),
        (question([{"user": 1, "price": 1}]), 400, "row 0: lacks 'city'; what is not known is null"),
        (question([GOOD, GOOD | {"price": "much"}]), 400, "price"),
        (question([GOOD | {"price": 1e39}]), 400, "price"),
        (question([GOOD | {"price": 10**400}]), 400, "'price' has a number that is too large"),
        (question([GOOD | {"user": 1.5}]), 400, "user"),
        (question([GOOD, GOOD | {"city": 10**30}]), 400, "city"),
        (question([GOOD | {"city": "c" * 10**6}]), 413, "a body has at most 200,000 bytes"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(model, body, status, reason):
    server = Server(model, 10, 200_000)
    found, answer = asked(server, body)
    assert (found, list(answer)) == (status, ["error"])
    assert reason in answer["error"]
    assert "\n" not in answer["error"]
    assert asked(server, question([GOOD]))[0] == 200


def test_a_long_body_is_not_read_to_its_end(model):
    server, long = Server(model, 10, 5000), b" " * 100_000
    assert asyncio.run(ask(server, long))[::2] == (413, 6)
    told = [(b"content-length", b"100000")]
    assert asyncio.run(ask(server, long, headers=told))[::2] == (413, 0)


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("GET", "/health", 200, {"status": "ok", "run": "RUN"}),
        ("GET", "/predict", 405, {"error": "/predict takes POST alone"}),
        ("POST", "/health", 405, {"error": "/health takes GET alone"}),
        ("GET", "/", 404, {"error": "there are /predict, /health, /metrics"}),
    ],
)
def test_other_paths(model, run, method, path, status, body):
    found = asked(Server(model, 10, 1000), b"", method=method, path=path)
    assert found == (status, {key: value.replace("RUN", str(run)) for key, value in body.items()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, "--port must be from 0 to 65535, not 70000"),
        ({"host": "192.0.2.1"}, "192.0.2.1, port 0: .*; choose another --host or --port"),
        ({"most_rows": 0}, "--max-rows must be at least 1, not 0"),
    ],
)
def test_an_address_that_cannot_be_is_named(model, options, message):
    pytest.importorskip("uvicorn", reason="the extra `serve`")
    settings = {"host": "127.0.0.1", "port": 0, "most_rows": 1, "most_bytes": 1} | options
    with pytest.raises(ConfigError, match=message):
        serve(model, **settings)


def test_a_missing_package_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"serving needs uvicorn: pip install .*serve\]"):
        serve(model, "127.0.0.1", 0, 1, 1)


def test_no_part_of_an_answer_waits_for_the_other_side(model, monkeypatch):
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve`")

    def run(self, sockets):
        with socket.create_connection(sockets[0].getsockname()), sockets[0].accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", run)
    serve(model, "127.0.0.1", 0, 1, 1)


def test_the_command_answers_and_ends_after_the_requests_at_hand(model, run):
    pytest.importorskip("uvicorn", reason="the extra `serve`")
    command = [sys.executable, "run.py", "serve", str(run), "--port", "0", "--backend", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as server:
        port = int(re.search(r"http://127.0.0.1:(\d+)/predict", server.stdout.readline())[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for rows in (ROWS, ROWS[:1]):
            connection.request("POST", "/predict", question(rows))
            answer = connection.getresponse()
            assert answer.status == 200
            np.testing.assert_allclose(json.load(answer)["probabilities"], expected(model, rows), 1e-6)
        body = question(ROWS)
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as late:
            late.sendall(head + body[:100])
            connection.request("GET", "/health")  # so the half of a request has been read
            assert connection.getresponse().read()
            server.send_signal(signal.SIGTERM)
            connection.close()
            late.sendall(body[100:])
            said = b""
            while part := late.recv(65536):
                said += part
        assert b"200 OK" in said
        assert len(json.loads(said.partition(b"\r\n\r\n")[2])["probabilities"]) == 60
        assert (server.wait(60), server.stderr.read()) == (0, "")


def test_a_server_under_load_answers_as_the_model_does(model, run):
    """The benchmark, for a moment; and what would end it."""
    pytest.importorskip("uvicorn", reason="the extra `serve`")
    asked = benchmark.questions(model, 2, 8)
    with benchmark.served(run) as server:
        found = benchmark.figures(server, asked, 3, 0.5)
        assert found["requests"] == server.counter("rows") / 2
        assert 1 <= found["requests_per_call"] <= 3
        assert found["grown"] < 50e6  # a quarter of what Python and its packages take
        wrong = asked[1]._replace(probabilities=asked[1].probabilities + 2e-6)
        for bad, told in ((wrong, "wrong by 2e-06"), (asked[0]._replace(body=b"{}"), "status 400")):
            with pytest.raises(BenchmarkError, match=told):
                benchmark.ask_together(server.port, [*asked, bad], 3, time.perf_counter() + 0.5)
