"""Who may call, and what a call may read: paths, pickles, tokens, certificates."""

import pickle
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from merge3.client.channel import Target, translated
from merge3.errors import ConfigError, Denied, NotFound, Unauthenticated
from merge3.rpc import merge3_pb2 as pb
from merge3.rpc import merge3_pb2_grpc
from merge3_server.security import Roots, Tokens
from merge3_server.settings import Settings, is_local


def status(target):
    with target.channel() as channel, translated(target.address):
        return merge3_pb2_grpc.Merge3Stub(channel).Status(pb.StatusRequest(), metadata=target.metadata(), timeout=20)


def code_of(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name, caught.value.details()


# -- paths


@pytest.fixture
def roots(tmp_path, tiny_world):
    """allowed/ with a model, beside a secret that must stay one."""
    (tmp_path / "allowed").mkdir()
    shutil.copytree(tiny_world / "base", tmp_path / "allowed" / "model")
    shutil.copytree(tiny_world / "base", tmp_path / "secret")
    (tmp_path / "allowed-too").mkdir()
    return tmp_path


def test_paths_stay_below_the_roots(roots):
    allowed = Roots([roots / "allowed"])
    inside = str(roots / "allowed" / "model")
    for name in ("model", inside, "./model", "model/../model", f"{roots}/allowed/../allowed/model"):
        assert allowed.directory(name) == inside
    for name in (
        "../secret",
        f"{roots}/secret",
        "model/../../secret",
        "/etc",
        "..",
        "../allowed-too",
        f"{roots}/allowed-too",
        "/",
        "//etc",
        f"{roots}/no-such-thing",
    ):
        with pytest.raises(Denied, match="outside the daemon's roots"):
            allowed.directory(name)
    (roots / "allowed" / "link").symlink_to(roots / "secret")
    (roots / "allowed" / "loop").symlink_to(roots / "allowed" / "loop")
    with pytest.raises(Denied):
        allowed.directory("link")
    with pytest.raises((Denied, NotFound, ValueError)):
        allowed.directory("loop")
    (roots / "allowed" / "fine").symlink_to(roots / "allowed" / "model")
    assert allowed.directory("fine") == inside


def test_a_file_that_is_a_link_to_outside_is_refused(roots, start):
    secret = roots / "secret" / "model.safetensors"
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        model = roots / "allowed" / f"bad-{file}"
        shutil.copytree(roots / "allowed" / "model", model)
        (model / file).unlink()
        (model / file).symlink_to(roots / "secret" / file)
    daemon = start(roots / "allowed")
    stub = daemon.stub()
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        code, said = code_of(lambda f=file: stub.OpenPool(pb.OpenPoolRequest(models=["model", f"bad-{f}"])))
        assert code == "PERMISSION_DENIED" and f"{file} is a link to outside" in said
    for name in ("../secret", str(roots / "secret"), "model/../../secret"):
        assert code_of(lambda n=name: stub.OpenPool(pb.OpenPoolRequest(models=[n])))[0] == "PERMISSION_DENIED"
    assert secret.exists()

    # What is no safetensors is never parsed as anything else.
    class Bomb:
        def __reduce__(self):
            return (Path.write_text, (roots / "boom", "!"))

    broken = {
        "pickle": lambda m: (
            (m / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb())),
            (m / "model.safetensors").unlink(),
        ),
        "disguised": lambda m: (m / "model.safetensors").write_bytes(pickle.dumps(Bomb())),
        "truncated": lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-100]),
        "config": lambda m: (m / "config.json").write_text("{"),
    }
    for name, act in broken.items():
        shutil.copytree(roots / "allowed" / "model", roots / "allowed" / name)
        act(roots / "allowed" / name)
        code, said = code_of(lambda n=name: stub.OpenPool(pb.OpenPoolRequest(models=["model", n])))
        assert code == "FAILED_PRECONDITION" and name in said, (name, code, said)
    assert not (roots / "boom").exists()
    # Code that a checkpoint brings along is not run, whatever its config asks for.
    import json

    shutil.copytree(roots / "allowed" / "model", roots / "allowed" / "code")
    config = json.loads((roots / "allowed" / "code" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (roots / "allowed" / "code" / "config.json").write_text(json.dumps(config))
    (roots / "allowed" / "code" / "mine.py").write_text(f"open({str(roots / 'boom')!r}, 'w')\n")
    assert code_of(lambda: stub.OpenPool(pb.OpenPoolRequest(models=["code"])))[0] == "FAILED_PRECONDITION"
    assert not (roots / "boom").exists()
    assert stub.OpenPool(pb.OpenPoolRequest(models=["model"])).pool_id  # it still serves


# -- tokens


def test_tokens_missing_wrong_expired_and_withdrawn(tiny_world, tmp_path, start, monkeypatch):
    hour = timedelta(hours=1)
    tokens = tmp_path / "tokens"
    now = datetime.now(UTC)
    tokens.write_text(f"# drivers\ngood\nold {(now - hour).isoformat()}\nyoung {(now + hour).isoformat()}\n")
    daemon = start(tiny_world, tokens=tokens)
    stub = daemon.stub()

    def with_token(token):
        return lambda: stub.Status(pb.StatusRequest(), metadata=(("authorization", token),))

    assert code_of(lambda: stub.Status(pb.StatusRequest())) == (
        "UNAUTHENTICATED",
        "authorization: no token; expected Bearer TOKEN",
    )
    for token, words in (
        ("Bearer bad", "an unknown token"),
        ("good", "not a bearer token"),
        ("Bearer old", "has expired"),
        ("Bearer ", "not a bearer token"),
        ("Bearer good good", "not a bearer token"),
    ):
        code, said = code_of(with_token(token))
        assert code == "UNAUTHENTICATED" and words in said
    for call in (
        lambda: list(stub.Watch(pb.WatchRequest())),
        lambda: stub.RegisterItems(iter([])),
        lambda: list(stub.EvaluateStream(iter([]))),
    ):
        assert code_of(call)[0] == "UNAUTHENTICATED"
    with_token("Bearer good")(), with_token("bearer young")()
    (tmp_path / "mine").write_text("good\n")
    assert status(Target(daemon.address, token_file=tmp_path / "mine")).state == "serving"
    monkeypatch.setenv("MERGE3_TOKEN", "young")
    assert status(Target(daemon.address)).state == "serving"
    monkeypatch.setenv("MERGE3_TOKEN", "old")
    with pytest.raises(Unauthenticated, match="has expired"):
        status(Target(daemon.address))
    time.sleep(0.01)
    tokens.write_text("other\n")  # withdrawn while it runs
    assert code_of(with_token("Bearer good"))[0] == "UNAUTHENTICATED"
    with_token("Bearer other")()
    # Whether it serves at all anybody may ask.
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    health_pb2_grpc.HealthStub(grpc.insecure_channel(daemon.address)).Check(health_pb2.HealthCheckRequest())
    assert "good" not in "".join(daemon.lines) and "young" not in "".join(daemon.lines)


def test_a_token_from_the_environment(tiny_world, start, monkeypatch):
    monkeypatch.setenv("MERGE3_TOKEN", "sesame")
    daemon = start(tiny_world)
    assert code_of(lambda: daemon.stub().Status(pb.StatusRequest()))[0] == "UNAUTHENTICATED"
    daemon.stub().Status(pb.StatusRequest(), metadata=(("authorization", "Bearer sesame"),))


def test_token_files_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        Tokens(tmp_path / "none")
    (tmp_path / "empty").write_text("\n# nobody\n")
    with pytest.raises(ConfigError, match="no token"):
        Tokens(tmp_path / "empty")
    (tmp_path / "date").write_text("a\nb tomorrow\n")
    with pytest.raises(ConfigError, match="line 2: found 'tomorrow'"):
        Tokens(tmp_path / "date")


# -- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and certificates it signed: server, client, expired; and a stranger's."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, cwd=folder)

    def signed(name, authority, days=30):
        openssl(
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.csr",
            "-subj",
            f"/CN={name}",
        )
        (folder / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        openssl(
            "x509",
            "-req",
            "-in",
            f"{name}.csr",
            "-CA",
            f"{authority}.pem",
            "-CAkey",
            f"{authority}.key",
            "-CAcreateserial",
            "-days",
            days,
            "-extfile",
            "ext",
            "-out",
            f"{name}.pem",
        )

    for authority in ("ca", "other-ca"):
        openssl(
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            f"{authority}.key",
            "-out",
            f"{authority}.pem",
            "-days",
            30,
            "-subj",
            f"/CN={authority}",
        )
    signed("server", "ca")
    signed("client", "ca")
    signed("stranger", "other-ca")
    signed("expired", "ca", days=0)
    return folder


def test_tls_and_mutual_tls(tiny_world, certificates, start):
    c = certificates
    options = dict(certificate=c / "server.pem", key=c / "server.key")
    daemon = start(tiny_world, **options)
    assert status(Target(daemon.address, ca=str(c / "ca.pem"))).state == "serving"
    unreachable = [
        Target(daemon.address),
        Target(daemon.address, ca=str(c / "other-ca.pem")),
        Target(daemon.address, ca="system"),
    ]
    mutual = start(tiny_world, **options, client_ca=c / "ca.pem")
    ca = str(c / "ca.pem")
    assert status(Target(mutual.address, ca, c / "client.pem", c / "client.key")).state == "serving"
    unreachable += [
        Target(mutual.address, ca),
        Target(mutual.address, ca, c / "stranger.pem", c / "stranger.key"),
        Target(mutual.address, ca, c / "expired.pem", c / "expired.key"),
    ]
    time.sleep(1.1)  # "days 0" ends the second it begins
    for target in unreachable:
        with pytest.raises(Exception) as caught:
            status(target)
        assert type(caught.value).__name__ == "Unavailable", target
    assert status(Target(mutual.address, ca, c / "client.pem", c / "client.key")).state == "serving"


def test_beyond_this_machine_only_with_tls_or_on_purpose(tiny_world, tmp_path):
    for address, local in (
        ("127.0.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/x", True),
        ("127.8.8.8:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("example.org:1", False),
        (":1", False),
    ):
        assert is_local(address) is local, address
    with pytest.raises(ConfigError, match="--insecure"):
        Settings(("0.0.0.0:0",), (tiny_world,))
    Settings(("0.0.0.0:0",), (tiny_world,), insecure=True)
    with pytest.raises(ConfigError, match="one of them"):
        Settings(("127.0.0.1:0",), (tiny_world,), certificate=tmp_path)
    with pytest.raises(ConfigError, match="no such directory"):
        Settings(("127.0.0.1:0",), (tiny_world / "nowhere",))


def test_images_are_files_below_the_roots(world):
    from merge3.rpc import convert

    item = pb.Item(id="i", kind="classify", image="/etc/hostname", index=0)
    for path, code in (
        ("/etc/hostname", "PERMISSION_DENIED"),
        ("none.png", "NOT_FOUND"),
        ("../x.png", "PERMISSION_DENIED"),
    ):
        item.image = path
        parts = [
            pb.RegisterItemsRequest(header=pb.RegisterHeader(pool_id=world.pool.pool_id)),
            pb.RegisterItemsRequest(entries=pb.Entries(entries=[pb.Entry(digest=convert.digest(item), item=item)])),
        ]
        assert code_of(lambda parts=parts: world.stub.RegisterItems(iter(parts)))[0] == code
