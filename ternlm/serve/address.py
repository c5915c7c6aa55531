"""Where a server listens, and who may reach it there. Loads nothing heavy: what is wrong shows at once."""

import ipaddress
import socket

from ternlm.config.section import ConfigError


def check_host(host: str, api_key: str | None) -> None:
    """Raise ConfigError for a host at which others reach a server without a key, and for an empty key."""
    if api_key == "":
        raise ConfigError("the API key is empty; give a long random one, or none to serve this machine alone")
    if api_key is None and not is_local(host):
        raise ConfigError(
            f"--host {host} lets others in, and there is no API key; set TERNLM_API_KEY or --api-key, or leave --host "
            "at 127.0.0.1"
        )


def is_local(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Take a port, not open yet. Raises ConfigError where it can't be had. port 0: any that is free."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} can't be used ({error.strerror}); choose others") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Return where a bound port is found."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
