"""moorage-netmodules: what an old Mesos agent's network isolator module executes, as isolator_command and ipam_command.

It forwards the JSON document on stdin to the agent and prints the agent's. It holds no logic but that of not losing a
call, and most of that is the CNI hook's (netmodules/hook.py):

    no agent; allocate, reserve, isolate    wait for one, then say so in "error"
    no agent; release, cleanup              write the request into the spool, and succeed

The module ignores exit codes and fails on whatever is not JSON; so there is an answer to everything, also to wrong
arguments.
"""

import json
import posix
import sys

from netmodules import frame, hook

RELEASE_KEY = b"netmodules/release"
IFNAME = b"eth0"
"""Both are netmodules/modules/call.py's, which is too much to import here."""

USAGE = """\
usage: moorage-netmodules [--network NAME] [--socket PATH]

Answers one call of the net-modules protocol: a JSON document on stdin, one on stdout. A Mesos agent's module
executes it; give it as isolator_command and as ipam_command (docs/engines/net-modules.md).

  --network NAME  the network that is meant; without it what the agent is configured with
  --socket PATH   where the moorage agent listens  [env: MOORAGE_SOCKET; default: /run/moorage/agent.sock]
  --help          this text
"""


class Options:
    """What the command line says. socket: b"" if it says nothing of it."""

    __slots__ = ("help", "network", "socket")

    def __init__(self, arguments: tuple[str, ...]) -> None:
        """Raises Refusal."""
        self.help = False
        self.network = ""
        self.socket = b""
        rest = list(arguments)
        while rest:
            name, equals, value = rest.pop(0).partition("=")
            if name in ("--help", "-h"):
                self.help = True
                continue
            if name not in ("--network", "--socket"):
                raise hook.Refusal(
                    hook.CODE_ENVIRONMENT,
                    f"{name!r:.100} is no option of moorage-netmodules; it has --network and --socket",
                )
            if not equals:
                value = rest.pop(0) if rest else ""
            if not value:
                raise hook.Refusal(
                    hook.CODE_ENVIRONMENT, f"{name} has no value; give it one, or leave it out"
                )
            if name == "--network":
                self.network = value
            else:
                self.socket = value.encode("utf-8", "surrogateescape")
        if self.socket and self.socket[:1] != b"/":
            raise hook.Refusal(
                hook.CODE_ENVIRONMENT,
                f"--socket must be an absolute path, not {hook.text(self.socket)!r:.200}",
            )


def program() -> int:
    """Serve the call that this process was started for; returns the exit code."""
    exit_code, stdout = run(posix.environ, tuple(sys.argv[1:]))
    while stdout:
        stdout = stdout[posix.write(1, stdout) :]
    return exit_code


def run(
    environ: dict[bytes, bytes],
    arguments: tuple[str, ...],
    stdin: bytes | None = None,
    *,
    window: float = hook.WINDOW,
    answer_timeout: float = hook.ANSWER_TIMEOUT,
) -> tuple[int, bytes]:
    """The exit code and stdout of one call. stdin: read from where it comes, unless given. Times are in seconds."""
    try:
        options = Options(arguments)
        if options.help:
            return 0, USAGE.encode()
        document = hook.read_stdin() if stdin is None else stdin
        call = hook.new_call(answer_timeout)
        call.socket = options.socket or hook.socket_path(environ, b"", "")
        call.request = encode_request(document, options.network, call)
        key = spool_key(document)
        if not key:
            return hook.deliver(call, window)
        exit_code, stdout = hook.deliver_or_spool(call, key, window)
        return exit_code, stdout or b'{"error":null}'
    except hook.Refusal as refusal:
        answer = {"ipv4": [], "ipv6": [], "error": str(refusal)}
        return 1, json.dumps(answer).encode()


def encode_request(document: bytes, network: str, call: hook.Call) -> bytes:
    """The request frame. Raises Refusal if the document is too large."""
    if len(document) > frame.MAX_STDIN:
        raise hook.Refusal(hook.CODE_IO, f"the document on stdin is larger than {frame.MAX_STDIN} bytes")
    fields = {
        "call": b"netmodules",
        "request": call.id,
        "boot": hook.boot_id(),
        "started": b"%d" % call.started,
    }
    if network:
        fields["env.MOORAGE_NETWORK"] = network.encode("utf-8", "surrogateescape")
    return frame.encode({**fields, "stdin": document})


def spool_key(document: bytes) -> bytes:
    """What a release or cleanup is filed under if it has to wait; b"" for what cannot, and what is none of them."""
    try:
        parsed = json.loads(document)
        command, arguments = parsed["command"], parsed["args"]
        if command == "release" and (arguments.get("uid") or arguments.get("ips")):
            return RELEASE_KEY
        if command == "cleanup" and isinstance(arguments["container_id"], str):
            return arguments["container_id"].encode() + b"/" + IFNAME
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        # The agent is who complains.
        return b""
    return b""
