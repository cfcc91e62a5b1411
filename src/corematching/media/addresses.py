"""Connections to public addresses only, so that a server fetches nothing from its own network.

A host's name is looked up once, every address is judged, and the connection goes to an address that
was judged: a name that resolves to something else a moment later changes nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys
from collections.abc import Collection

from corematching.errors import InputError

if sys.version_info >= (3, 11):
    import httpx2 as httpx
else:
    import httpx

PORTS = {"http": 80, "https": 443}
NOT_KEPT = httpx.Limits(max_keepalive_connections=0)
"""One connection per request: a server may close a kept one at any time."""
NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


class PublicTransport(httpx.AsyncBaseTransport):
    """Sends a request, and each redirect, to a public address or not at all; without a proxy.

    Parameters
    ----------
    hosts : collection of str or None
        The only hosts to ask, in lower case; None: any.
    """

    def __init__(self, hosts: Collection[str] | None = None) -> None:
        self.hosts = hosts
        # no connection serves two hosts: those that share an address differ in certificates
        self._inner = httpx.AsyncHTTPTransport(limits=NOT_KEPT)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request.

        Raises
        ------
        InputError
            The host is none of `hosts`, or has an address that is not public.
        """
        host = request.url.host
        if not host or request.url.scheme not in PORTS:
            raise httpx.UnsupportedProtocol("no http(s) address")
        if self.hosts is not None and host.lower() not in self.hosts:
            raise InputError(f"pictures are not fetched from {host}: give one of an allowed host")
        addresses = await find_addresses(host, request.url.port or PORTS[request.url.scheme])
        for address in addresses:
            if not is_public(address):
                raise InputError(
                    f"{host} is {address}, which is no public address: give one on the internet"
                )
        failure: Exception = httpx.ConnectError(f"no address for {host}")
        for address in addresses:
            pinned = httpx.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,  # with the name in Host
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return await self._inner.handle_async_request(pinned)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure

    async def aclose(self) -> None:
        """Close the connections."""
        await self._inner.aclose()


async def find_addresses(host: str, port: int) -> list[str]:
    """The numeric addresses of a host, without repetitions."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: str) -> bool:
    """Whether a numeric address belongs to the internet at large.

    IPv4 addresses inside IPv6 ones (mapped, 6to4, Teredo, NAT64) are judged themselves.

    Examples
    --------
    >>> is_public("8.8.8.8"), is_public("::ffff:10.0.0.1"), is_public("169.254.169.254")
    (True, False, False)
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if any(ip in network for network in NAT64):
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        judged = [each for each in inner if each is not None]
        if judged:
            return all(is_public(str(each)) for each in judged)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_link_local)
