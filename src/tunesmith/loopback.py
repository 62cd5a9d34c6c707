"""This machine's own addresses. What we ask there never goes through a proxy of the environment."""

from __future__ import annotations

import urllib.request
from ipaddress import ip_address
from typing import IO, Any
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return host.lower() == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def leads_to(url: str) -> bool:
    """Whether a URL leads to this machine."""
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def opened(request: urllib.request.Request, seconds: float) -> IO[bytes]:
    """The answer to a request; raises what `urlopen` does."""
    direct: Any = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return direct.open(request, timeout=seconds)
