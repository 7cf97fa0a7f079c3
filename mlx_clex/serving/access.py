"""Who may ask: web pages by their origin, hosts by their name, clients by a key.

A page that a browser shows may send requests to this machine. Its origin gives it away, or,
where its owner lets a name of theirs point to this machine, the Host header.

Not covered: encryption; anyone on the way can read the key.
"""

import hmac
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from urllib.parse import urlsplit

from .fields import RequestError


@dataclass(frozen=True)
class Access:
    """What a request's headers must have."""

    host: str  # that the server listens on
    origins: Sequence[str] = ()  # besides this machine's; "*": any, and any Host
    api_key: str | None = None

    def check_origin(self, headers: Message, address: str) -> None:
        """Refuse requests of other sites' pages.

        Args:
            headers: of the request.
            address: of this machine, that the client connected to.

        Raises:
            RequestError: with status 403.
        """
        if "*" in self.origins:
            return
        mine = {"127.0.0.1", "localhost", "::1", self.host, address, socket.gethostname()}
        hosts = {name.lower() for name in mine} | {_host(origin) for origin in self.origins}
        hosts.discard("")
        host, origin = headers.get("Host"), headers.get("Origin")
        if host is not None and _host(f"//{host}") not in hosts:
            raise RequestError(
                f"Host {host[:100]!r} is not this machine. Allow it with --allowed-origins "
                "http://NAME.",
                status=403,
            )
        own = origin is not None and origin.startswith(("http://", "https://"))
        if origin is None or origin in self.origins or (own and _host(origin) in hosts):
            return
        raise RequestError(
            f"Web pages of {origin[:100]!r} may not ask. Allow them with --allowed-origins.",
            status=403,
        )

    def allowed_origin(self, headers: Message) -> str | None:
        """Return the origin to let read an answer, of a request that `check_origin` allows."""
        return "*" if "*" in self.origins else headers.get("Origin")

    def check_key(self, headers: Message) -> None:
        """Refuse clients without the key, where there is one.

        Raises:
            RequestError: with status 401.
        """
        if self.api_key is None:
            return
        given = headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.api_key}".encode()):
            raise RequestError(
                "The API key is missing or wrong: send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                status=401,
            )


def _host(url: str) -> str:
    """Return the host of a URL without its port, or "" if it has none."""
    if any(character.isspace() for character in url):
        return ""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
