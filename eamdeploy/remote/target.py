"""Another machine, as the user names it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from eamdeploy.errors import ConfigError

_SCHEME = "ssh://"
# Nothing that a shell, or a ProxyCommand in the user's configuration, could take for more than a name, and nothing
# that begins like an option.
_USER = r"[A-Za-z0-9_.][A-Za-z0-9_.+-]*"
_NAME = r"[A-Za-z0-9_.][A-Za-z0-9_.-]*"
_IPV6 = r"\[(?P<ipv6>[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?:%[A-Za-z0-9_.-]+)?)\]"
_TARGET = re.compile(rf"(?:(?P<user>{_USER})@)?(?:(?P<name>{_NAME})|{_IPV6})(?::(?P<port>\d{{1,5}}))?/?", re.ASCII)
_MOST_PORT = 65535


@dataclass(frozen=True)
class SshTarget:
    """A machine that ssh reaches.

    Attributes:
        host: its name, its address, or an alias in the user's ~/.ssh/config.
        user, port: None leaves them to that file.
    """

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> SshTarget:
        """The machine that `ssh://[user@]host[:port]` names; an IPv6 address stands in brackets.

        Raises:
            ConfigError: it is spelled otherwise.
        """
        found = _TARGET.fullmatch(text.removeprefix(_SCHEME)) if text.startswith(_SCHEME) else None
        port = int(found["port"]) if found is not None and found["port"] else None
        if found is None or port == 0 or (port or 0) > _MOST_PORT:
            raise ConfigError(
                "this names no machine for ssh",
                expected="ssh://[user@]host[:port], an IPv6 address in brackets",
                got=text,
                hint="Keys, jump hosts and all else belong into ~/.ssh/config.",
            )
        return cls(found["name"] or found["ipv6"], found["user"], port)

    def arguments(self) -> list[str]:
        """What makes ssh go there; to be followed by the command."""
        user = [] if self.user is None else ["-l", self.user]
        port = [] if self.port is None else ["-p", str(self.port)]
        return [*user, *port, "--", self.host]

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = "" if self.user is None else f"{self.user}@"
        port = "" if self.port is None else f":{self.port}"
        return f"{_SCHEME}{user}{host}{port}"

    def command(self) -> str:
        """What a person types to go there."""
        return " ".join(["ssh", *(word for word in self.arguments() if word != "--")])
