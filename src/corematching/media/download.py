"""Bytes from an http(s) address, within limits; every failure becomes one of our errors."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from corematching.errors import InputError
from corematching.media.addresses import NOT_KEPT, PublicTransport
from corematching.media.limits import Limits
from corematching.sizes import format_size

if sys.version_info >= (3, 11):
    import httpx2 as httpx
else:
    import httpx

HEADERS = {
    "User-Agent": "corematching",
    "Accept": "image/*,*/*;q=0.5",
    "Accept-Encoding": "identity",
}
IDLE_SECONDS = 15.0
GRACE_SECONDS = 1.0
SHOWN = 200


def download(url: str, limits: Limits | None = None, public_only: bool = True) -> bytes:
    """Fetch an address.

    Parameters
    ----------
    url : str
        http or https; redirects lead to these two as well.
    limits : Limits, optional
        On bytes, seconds in all, and redirects.
    public_only : bool
        Refuse hosts with a private, loopback, link-local or otherwise special address, at every
        redirect, and use no proxy, which would look up names elsewhere. Without it, the proxies of
        the environment are used.

    Raises
    ------
    InputError
        The address is invalid or refused, cannot be fetched, or a limit is reached.
    """
    limits = limits or Limits()
    work = _Work(url, limits, public_only)
    # aside, as a loop cannot run inside another one, and a name's lookup cannot be stopped
    thread = threading.Thread(target=work.run, name="download", daemon=True)
    thread.start()
    thread.join(limits.seconds + GRACE_SECONDS)
    if thread.is_alive():
        raise _failure(url, f"not done after {limits.seconds:g} s")
    if work.error is not None:
        raise work.error
    return work.data


async def download_async(
    url: str,
    limits: Limits | None = None,
    public_only: bool = True,
    hosts: Collection[str] | None = None,
) -> bytes:
    """As `download`, for callers that have an event loop.

    Parameters
    ----------
    url, limits, public_only
        See `download`.
    hosts : collection of str or None
        The only hosts to ask, at every redirect too, in lower case; None: any public one. Read
        with ``public_only`` only.
    """
    limits = limits or Limits()
    with translating(url, limits):
        return await asyncio.wait_for(_stream(url, limits, public_only, hosts), limits.seconds)


class _Work:
    """One download, in a loop of its own."""

    def __init__(self, url: str, limits: Limits, public_only: bool) -> None:
        self.arguments = (url, limits, public_only)
        self.data = b""
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.data = asyncio.run(download_async(*self.arguments))
        except BaseException as error:
            self.error = error


async def _stream(
    url: str, limits: Limits, public_only: bool, hosts: Collection[str] | None
) -> bytes:
    options: dict[str, Any] = {"transport": PublicTransport(hosts)} if public_only else {}
    client = httpx.AsyncClient(
        headers=HEADERS,
        follow_redirects=True,
        max_redirects=limits.redirects,
        timeout=min(IDLE_SECONDS, limits.seconds),
        limits=NOT_KEPT,
        **options,
    )
    async with client, client.stream("GET", url) as response:
        if response.status_code != 200:
            reason = f"HTTP {response.status_code} {response.reason_phrase}".strip()
            raise _failure(url, reason)
        announced = response.headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and len(announced) < 20:
            check_bytes(shorten(url), int(announced), limits)
        data = bytearray()
        async for piece in response.aiter_bytes():
            data += piece
            check_bytes(shorten(url), len(data), limits)
        return bytes(data)


def check_bytes(source: str, count: int, limits: Limits) -> None:
    """Check the limit on bytes."""
    if count > limits.bytes:
        raise InputError(
            f"{source} has {format_size(count)} or more, the limit is {format_size(limits.bytes)}: "
            "give a smaller picture"
        )


@contextmanager
def translating(url: str, limits: Limits) -> Iterator[None]:
    """Turn every error of the HTTP client into one of ours."""
    try:
        yield
    except InputError:
        raise
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise _failure(url, f"not done after {limits.seconds:g} s") from error
    except httpx.TimeoutException as error:
        raise _failure(url, "the server does not answer in time") from error
    except httpx.TooManyRedirects as error:
        raise _failure(url, f"more than {limits.redirects} redirects") from error
    except httpx.UnsupportedProtocol as error:
        raise _failure(url, "only http and https are fetched, and a host is needed") from error
    except httpx.InvalidURL as error:
        raise InputError(f"{shorten(url)} is no web address ({error}): correct it") from error
    except (httpx.HTTPError, httpx.StreamError, OSError, ValueError, OverflowError) as error:
        raise _failure(url, str(error) or type(error).__name__) from error


def _failure(url: str, reason: str) -> InputError:
    return InputError(
        f"cannot fetch {shorten(url)} ({shorten(reason)}): check the address and the network, or "
        "give a file"
    )


def shorten(text: str) -> str:
    """A text for a message: printable, of one line, not too long, without a password."""
    scheme, separator, rest = text.partition("://")
    if separator:
        host, slash, path = rest.partition("/")
        text = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
