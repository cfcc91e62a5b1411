from __future__ import annotations

import asyncio
import gzip
import itertools
import socket
import threading

import pytest

from corematching.errors import ConfigError, InputError
from corematching.media import Limits, addresses, download, download_async
from tests.media.conftest import answer

HEAD = b"HTTP/1.1 200 OK\r\n"
SHORT = Limits(seconds=0.6)


def get(url: str, limits: Limits | None = None) -> bytes:
    return download(url, limits, public_only=False)


def refused(url: str, limits: Limits | None = None, public_only: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        download(url, limits, public_only)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def test_bytes_arrive(serve):
    assert get(serve(answer(b"picture")).url) == b"picture"


@pytest.mark.parametrize(
    "response",
    [
        HEAD + b"Content-Length: 100\r\n\r\nshort",  # IncompleteRead
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"hello\r\n\r\n",  # BadStatusLine
        b"",
        b"\x00\xff" * 50 + b"\r\n\r\n",
        b"HTTP/1.1 " + b"2" * 200_000,  # LineTooLong
        HEAD + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        HEAD + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n",  # too many headers
        HEAD + b"Content-Length: many\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nContent-Encoding: gzip\r\n\r\nabc",
        b"HTTP/1.1 302 Found\r\nLocation: http://[::1/\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://h:port/\r\n\r\n",
        b"HTTP/1.1 404 File not found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ],
)
def test_broken_answers_are_one_line(serve, response):
    assert "http://127.0.0.1" in refused(serve(response).url + "/a.png")


@pytest.mark.parametrize(
    "url",
    [
        "http://h:99999/",
        "http://h:abc/",
        "http://h:-1/",
        "http://a b/",
        "http://h/\n.png",
        "http://h\x00/",
        "http://h/\x00",
        "http://[::1/",
        "http://[zz]/",
        "http:///x",
        "http://",
        "http://" + "a" * 5000 + "/",
        "http://h/\ud800",
        "http://é\u2028/",
        "http://%zz/",
        "http://xn--/",
        "http://..//",
        "http://h/" + "a" * 100_000,
    ],
)
@pytest.mark.parametrize("public_only", [False, True])
def test_addresses_that_are_none(url, public_only, monkeypatch):
    def unknown(*args, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    refused(url, Limits(seconds=5), public_only)


def test_status_is_named_and_a_password_is_not(serve):
    server = serve(answer(b"", "404 File not found"))
    message = refused(server.url.replace("//", "//me:secret@") + "/b.png")
    assert "HTTP 404 File not found" in message and "secret" not in message


@pytest.mark.parametrize("where", ["header", "body"])
def test_a_server_that_drips_meets_the_deadline(serve, where):
    def drip(connection, path):
        connection.sendall(HEAD + (b"" if where == "header" else b"Content-Length: 100000\r\n\r\n"))
        letters = itertools.cycle(b"X: " if where == "header" else b"x")
        while not server.ended.wait(0.05):
            connection.sendall(bytes([next(letters)]))

    server = serve(drip)
    assert "not done after 0.6 s" in refused(server.url, SHORT)


def test_a_silent_server_meets_the_deadline(serve):
    server = serve(lambda connection, path: server.ended.wait(20))
    assert "(" in refused(server.url, SHORT)


def test_a_lookup_that_hangs_meets_the_deadline(monkeypatch):
    done = threading.Event()

    def hang(*args, **options):
        done.wait(60)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    for public_only in (False, True):
        assert "not done after 0.6 s" in refused("http://h/", SHORT, public_only)
        assert not done.is_set()
    done.set()


@pytest.mark.parametrize("announced", [True, False])
def test_more_bytes_than_the_limit(serve, announced):
    body = bytes(5000)
    said = answer(body) if announced else HEAD + b"Connection: close\r\n\r\n" + body
    server = serve(said)
    assert "the limit is 4.88 KiB" in refused(server.url, Limits(bytes=4999))
    assert get(server.url, Limits(bytes=5000)) == body


def test_compressed_bytes_count_unpacked(serve):
    packed = gzip.compress(bytes(100_000))
    server = serve(answer(packed, "200 OK", "Content-Encoding: gzip"))
    assert "the limit is" in refused(server.url, Limits(bytes=50_000))


def test_redirects_are_followed_up_to_the_limit(serve):
    def redirect(connection, path):
        left = int(path.strip("/"))
        where = f"Location: /{left - 1}"
        connection.sendall(answer(b"", "302 Found", where) if left else answer(b"there"))

    server = serve(redirect)
    assert get(f"{server.url}/5") == b"there"
    assert "more than 5 redirects" in refused(f"{server.url}/6")


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/a.png", "file:///etc/hostname", "gopher://h/"])
def test_redirects_lead_to_http_only(serve, target):
    server = serve(answer(b"", "302 Found", f"Location: {target}"))
    assert "only http and https" in refused(server.url)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "0.0.0.0", "[::ffff:127.0.0.1]"],
)
def test_loopback_is_refused_by_default(serve, host):
    server = serve(answer(b"secret"))
    with pytest.raises(InputError, match=r"no public address|cannot fetch"):
        download(f"http://{host}:{server.port}/")
    assert server.hosts == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fe80::1%2", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("::127.0.0.1", False),
        ("nonsense", False),
    ],
)
def test_public_addresses(address, public):
    assert addresses.is_public(address) is public


@pytest.fixture
def one_is_private(monkeypatch):
    """127.0.0.1 stands for the internet, 127.0.0.2 for what is behind it."""
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")


def test_redirects_to_private_addresses_are_refused(serve, one_is_private):
    inside = serve(answer(b"secret"), "127.0.0.2")
    outside = serve(answer(b"", "302 Found", f"Location: {inside.url}/"))
    message = refused(outside.url, public_only=True)
    assert "127.0.0.2, which is no public address" in message
    assert len(outside.hosts) == 1 and inside.hosts == []
    with pytest.raises(InputError, match="no public address"):
        download(inside.url)


def test_connection_goes_to_the_address_that_was_judged(serve, one_is_private, monkeypatch):
    server = serve(answer(b"picture"))

    async def find(host, port):
        assert host == "pictures.example"
        return ["127.0.0.1"]

    monkeypatch.setattr(addresses, "find_addresses", find)
    assert download(f"http://pictures.example:{server.port}/") == b"picture"
    assert server.hosts == [f"pictures.example:{server.port}"]


def test_one_private_address_among_several_is_enough(serve, one_is_private, monkeypatch):
    server = serve(answer(b"picture"))

    async def find(host, port):
        return ["127.0.0.1", "127.0.0.2"]

    monkeypatch.setattr(addresses, "find_addresses", find)
    assert "127.0.0.2" in refused(f"http://x.example:{server.port}/", public_only=True)
    assert server.hosts == []


def test_no_proxy_for_public_addresses(serve, one_is_private, monkeypatch):
    monkeypatch.delenv("no_proxy")
    proxy = serve(answer(b"of the proxy"))
    monkeypatch.setenv("http_proxy", proxy.url)
    server = serve(answer(b"picture"))
    assert download(server.url) == b"picture"
    assert get("http://nowhere.invalid/") == b"of the proxy"


def test_inside_an_event_loop(serve):
    server = serve(answer(b"picture"))

    async def both():
        return get(server.url), await download_async(server.url, public_only=False)

    assert asyncio.run(both()) == (b"picture", b"picture")


def test_limits_make_sense():
    for wrong in ({"bytes": 0}, {"pixels": -1}, {"seconds": 0}, {"redirects": -1}):
        with pytest.raises(ConfigError, match="give a limit"):
            Limits(**wrong)
