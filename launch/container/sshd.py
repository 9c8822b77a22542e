"""Become an sshd for ranks that are started from another container; ``sshd`` as the command of the image.

It runs as the container's user on port 2222 (``SSHD_PORT``). Its host key is made now. Who may log in is said by the
public keys in ``~/.ssh/authorized_keys``, which are mounted. What is started through it has the environment of this
container: sshd itself would give it neither PATH nor the folders of the caches.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

PORT = 2222
OF_THE_SESSION = {"HOME", "HOSTNAME", "LOGNAME", "OLDPWD", "PWD", "SHELL", "SHLVL", "SSHD_PORT", "TERM", "USER", "_"}
"""Variables that sshd sets for every login, or that mean nothing there."""


def quoted(name: str, value: str) -> str:
    """Return a variable as sshd's configuration takes it."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{name}={escaped}"'


def configuration(environment: Mapping[str, str], port: int, host_key: Path, authorized_keys: Path) -> str:
    """Write the configuration of sshd.

    Args:
        environment: the variables of this container; those with line breaks cannot be handed on.
        port: where it listens.
        host_key: its private key.
        authorized_keys: the public keys of who may log in.
    """
    handed_on = {
        name: value for name, value in sorted(environment.items()) if name not in OF_THE_SESSION and "\n" not in value
    }
    lines = [
        f"Port {port}",
        f"HostKey {host_key}",
        f"AuthorizedKeysFile {authorized_keys}",
        "PidFile none",
        "UsePAM no",
        "StrictModes no",  # mounted keys belong to whom the host says
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "PrintMotd no",
        "SetEnv " + " ".join(quoted(name, value) for name, value in handed_on.items()),
    ]
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    """Check what it needs, write key and configuration, and become sshd."""
    try:
        home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        raise SystemExit(f"error: ssh needs a user that the image knows, not {os.getuid()}: run as 1000") from None
    authorized_keys = home / ".ssh/authorized_keys"
    if not os.access(authorized_keys, os.R_OK):
        raise SystemExit(f"error: cannot read {authorized_keys}: mount a folder with the keys on {home / '.ssh'}")
    port = os.environ.get("SSHD_PORT", str(PORT))
    if not port.isdigit():
        raise SystemExit(f"error: the environment variable SSHD_PORT is {port!r}: it must be a port")
    folder = Path(tempfile.mkdtemp(prefix="sshd-"))
    host_key = folder / "host_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key)], check=True)
    file = folder / "sshd_config"
    file.touch(mode=0o600)
    file.write_text(configuration(os.environ, int(port), host_key, authorized_keys))
    os.execv("/usr/sbin/sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", str(file), *sys.argv[1:]])


if __name__ == "__main__":
    main()
