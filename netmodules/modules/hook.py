"""moorage-netmodules: what an old Mesos agent executes. It forwards one call to the agent and prints the answer.

    moorage-netmodules [--network NAME] [--socket PATH]

It is both isolator_command and ipam_command of the net-modules project's isolator module. As moorage-cni does
(netmodules/hook.py), it holds no logic of networking, only that of not losing a call:

    no agent, release or cleanup   write it into the spool, try once more, answer that it is done
    no agent, anything else        wait WINDOW seconds for one, then an error
    link breaks                    send the same request, with the same id, again for WINDOW seconds

The answer is one JSON document whose ``error`` is null or a sentence. Run with ``python -IS``.
"""

import posix

from netmodules import frame, hook

KIND = b"netmodules"
SPOOL_KEY = b"netmodules/calls"
"""One for all: what is spooled is carried out in the order it was called in, whatever container it is about."""

LOST_NEVER = ("release", "cleanup")

USAGE = "moorage-netmodules [--network NAME] [--socket PATH], with one document of the net-modules protocol on stdin"


def main(arguments: tuple[str, ...]) -> int:
    """Serve the call that this process was started for; returns the exit code."""
    exit_code, stdout = run(arguments, posix.environ, hook.read_stdin())
    while stdout:
        stdout = stdout[posix.write(1, stdout) :]
    return exit_code


def run(
    arguments: tuple[str, ...],
    environ: dict[bytes, bytes],
    stdin: bytes,
    *,
    window: float = hook.WINDOW,
    answer_timeout: float = hook.ANSWER_TIMEOUT,
) -> tuple[int, bytes]:
    """The exit code and stdout of one call. Times are in seconds."""
    try:
        options = read_options(arguments)
        command = read_command(stdin)
        call = hook.new_call(answer_timeout)
        call.socket = socket_path(options, environ)
        call.request = encode_request(call, command, options.get("--network", ""), stdin)
        if command in LOST_NEVER:
            code, stdout = hook.deliver_del(call, SPOOL_KEY, window)
        else:
            code, stdout = hook.deliver(call, window)
        return code, (stdout or b'{"error":null}') + b"\n"
    except hook.Refusal as refusal:
        return 1, error_answer(str(refusal))


def read_options(arguments: tuple[str, ...]) -> dict[str, str]:
    """The options by name. Raises Refusal."""
    options = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name not in ("--network", "--socket"):
            raise hook.Refusal(hook.CODE_ENVIRONMENT, f"unknown argument {name!r:.80}; usage: {USAGE}")
        if not equals:
            value = rest.pop(0) if rest else ""
        if not value:
            raise hook.Refusal(hook.CODE_ENVIRONMENT, f"{name} has no value; usage: {USAGE}")
        options[name] = value
    return options


def read_command(stdin: bytes) -> str:
    """The command, "" if it cannot be read: the agent is who complains."""
    command = hook.configuration(stdin).get("command")
    return command if isinstance(command, str) and command.isalpha() and len(command) < 32 else ""


def socket_path(options: dict[str, str], environ: dict[bytes, bytes]) -> bytes:
    """Where the agent listens: --socket, else MOORAGE_SOCKET, else the default."""
    path = options.get("--socket")
    if path is None:
        return hook.socket_path(environ, b"", "")
    if path[:1] != "/":
        raise hook.Refusal(hook.CODE_ENVIRONMENT, f"--socket must be an absolute path, not {path!r:.200}")
    return path.encode("utf-8", "surrogateescape")


def encode_request(call: hook.Call, command: str, network: str, stdin: bytes) -> bytes:
    """The request frame. A document that is too long goes without its end, so that the agent refuses it."""
    return frame.encode(
        {
            "call": KIND,
            "request": call.id,
            "boot": hook.boot_id(),
            "started": b"%d" % call.started,
            "env.NETMODULES_COMMAND": command.encode("utf-8", "replace"),
            "env.NETMODULES_NETWORK": network.encode("utf-8", "replace")[:1024],
            "stdin": stdin,
        }
    )


def error_answer(message: str) -> bytes:
    """A document with an error."""
    import json

    return json.dumps({"error": message}).encode() + b"\n"
