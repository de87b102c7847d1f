"""moorage-cni: what the engine executes. It forwards one CNI call to the agent and prints the answer.

    engine --env, stdin--> hook --one frame--> agent        and the reply back to stdout and exit code

It holds no logic of networking, only that of not losing a call:

    no agent, ADD      wait WINDOW seconds for one, then error 11
    no agent, DEL      write the request into the spool, try once more, answer 0
    no agent, STATUS   error 50 at once, it asks about now
    no agent, GC       error 11 at once: its list grows old, and the engine will come again
    link breaks        send the same request, with the same id, again for WINDOW seconds

Where a C compiler was at hand, the engine executes native/moorage-cni.c instead. That forwards the ordinary call by
itself and becomes this program for all others, with the same environment and stdin. If the agent may have the request
by then, it passes on that call's id and time in two arguments; they are between these two programs, and no
engine's to give:

    moorage-cni-py --resume <32 hex digits> <CLOCK_BOOTTIME in ns>

A container start waits for this program, and most of its time is Python's own start. So it runs with
``python -IS``, uses the builtin C modules (``import socket``, ``os`` and ``json`` cost 5-9 ms each), and
imports what only rare paths need where they need it.
"""

import _socket
import posix
import time

from netmodules import frame

DEFAULT_SOCKET = b"/run/moorage/agent.sock"
DEFAULT_VERSION = "0.2.0"
NEWEST_VERSION = "1.1.0"
SUPPORTED_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

# Seconds to keep looking for an agent; long enough for one to be restarted or upgraded.
WINDOW = 30.0
# Seconds for the agent to answer: an ADD may wait 20 s for a reservation's old holder and 10 s for an
# address, and Mesos gives an executor 60 s to register.
ANSWER_TIMEOUT = 55.0
# Seconds that a resumed call waits at least for an answer that it may have waited for already.
ANSWER_TIMEOUT_LEAST = 1.0
PAUSE_FIRST = 0.01
PAUSE_LONGEST = 0.2

REQUIRED = {
    "ADD": (b"CNI_CONTAINERID", b"CNI_NETNS", b"CNI_IFNAME"),
    "CHECK": (b"CNI_CONTAINERID", b"CNI_NETNS", b"CNI_IFNAME"),
    "DEL": (b"CNI_CONTAINERID", b"CNI_IFNAME"),
    "GC": (),
    "STATUS": (),
}
KEY_VARIABLES = (b"CNI_COMMAND", b"CNI_CONTAINERID", b"CNI_IFNAME")

JSON_BLANKS = " \t\n\r"

CODE_ENVIRONMENT = 4
CODE_IO = 5
CODE_INVALID_CONFIG = 7
CODE_TRY_AGAIN = 11
CODE_NOT_AVAILABLE = 50


class Refusal(Exception):
    """A CNI error that the hook answers by itself."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class NoAgent(Exception):
    """Nobody accepts connections on the socket."""


class Broken(Exception):
    """The connection ended before the reply was complete; the request may have been carried out."""


class Silent(Exception):
    """The agent took the request and does not answer."""


def main(arguments: tuple[str, ...]) -> int:
    """Serve the call that this process was started for; returns the exit code."""
    exit_code, stdout = run(posix.environ, read_stdin(), arguments)
    while stdout:
        stdout = stdout[posix.write(1, stdout) :]
    return exit_code


def run(
    environ: dict[bytes, bytes],
    stdin: bytes,
    arguments: tuple[str, ...] = (),
    *,
    window: float = WINDOW,
    answer_timeout: float = ANSWER_TIMEOUT,
) -> tuple[int, bytes]:
    """The exit code and stdout of one call. Times are in seconds."""
    command = text(environ.get(b"CNI_COMMAND", b""))
    try:
        call = resumed_call(arguments, answer_timeout) if arguments else new_call(answer_timeout)
        if command == "VERSION":
            return 0, version_answer(stdin)
        check_variables(environ, command)
        call.socket = socket_path(environ, stdin, command)
        call.request = encode_request(environ, stdin, command, call)
        if command == "DEL":
            return deliver_del(call, environ[b"CNI_CONTAINERID"] + b"/" + environ[b"CNI_IFNAME"], window)
        if command == "STATUS":
            return ask_once(call, CODE_NOT_AVAILABLE)
        if command == "GC":
            return ask_once(call, CODE_TRY_AGAIN)
        return deliver(call, window)
    except Refusal as refusal:
        return 1, error_answer(stdin, refusal)


class Call:
    """One request, and where it goes.

    started: CLOCK_BOOTTIME in ns.
    answer_timeout: seconds that the agent has to answer.
    patience: how many of them are left in this process.
    resumed: the agent may have the request from before.
    """

    __slots__ = ("answer_timeout", "id", "patience", "request", "resumed", "socket", "started")

    def __init__(self, call_id: bytes, started: int, answer_timeout: float) -> None:
        self.id = call_id
        self.started = started
        self.answer_timeout = answer_timeout
        self.patience = answer_timeout
        self.resumed = False
        self.socket = b""
        self.request = b""

    def ask(self) -> tuple[int, bytes]:
        """Exit code and stdout from the agent. Raises NoAgent, Broken, Silent."""
        link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            link.settimeout(self.patience)
            try:
                link.connect(self.socket)
            except OSError as error:
                raise NoAgent(error.strerror or str(error)) from None
            try:
                link.sendall(self.request)
                reply = frame.decode(receive(link, frame.payload_length(receive(link, frame.HEADER))))
                return int(reply["exit"]), reply["stdout"]
            except TimeoutError:
                raise Silent from None
            except (OSError, ValueError, KeyError) as error:
                raise Broken(str(error)) from None
        finally:
            link.close()


def new_call(answer_timeout: float) -> Call:
    """A call that begins here, under an id nobody used before."""
    return Call(posix.urandom(16).hex().encode(), boottime(), answer_timeout)


def resumed_call(arguments: tuple[str, ...], answer_timeout: float) -> Call:
    """The call that the native hook began."""
    option, call_id, started = arguments if len(arguments) == 3 else ("", "", "")
    is_id = len(call_id) == 32 and not call_id.strip("0123456789abcdef")
    is_time = 0 < len(started) < 20 and not started.strip("0123456789")
    now = boottime()
    if option != "--resume" or not is_id or not is_time or int(started) > now:
        raise Refusal(
            CODE_ENVIRONMENT, "moorage-cni is for container engines to execute, and takes no arguments"
        )
    call = Call(call_id.encode(), int(started), answer_timeout)
    call.patience = max(answer_timeout - (now - call.started) / 1e9, ANSWER_TIMEOUT_LEAST)
    call.resumed = True
    return call


def deliver(call: Call, window: float) -> tuple[int, bytes]:
    """Ask until the agent answers, for ``window`` seconds from the first failure."""
    pauses = Pauses(window)
    while True:
        try:
            return call.ask()
        except (NoAgent, Broken) as error:
            if not pauses.wait():
                raise Refusal(CODE_TRY_AGAIN, f"{no_agent(call, error)} (waited {window:g} s)") from None
        except Silent:
            raise Refusal(
                CODE_TRY_AGAIN,
                f"the moorage agent at {text(call.socket)} took the request but did not answer within "
                f"{call.answer_timeout:g} s; see the agent's log",
            ) from None


def ask_once(call: Call, code: int) -> tuple[int, bytes]:
    """For a call that means now, so that it does not wait for an agent. code: of the error if there is none."""
    try:
        return call.ask()
    except (NoAgent, Broken) as error:
        raise Refusal(code, no_agent(call, error)) from None
    except Silent:
        raise Refusal(
            code, f"the moorage agent at {text(call.socket)} does not answer; see its log"
        ) from None


def deliver_del(call: Call, key: bytes, window: float) -> tuple[int, bytes]:
    """Ask, or leave the request in the spool: either way the caller may forget the endpoint. key: what is spooled for
    the same one is carried out in order."""
    pauses = Pauses(window)
    entry = b""
    unwritable: Refusal | None = None
    broken = call.resumed
    while True:
        try:
            reply = call.ask()
            if entry:
                remove(entry)
            return reply
        except NoAgent:
            if not entry and unwritable is None:
                try:
                    entry = spool(call, key)
                except Refusal as refusal:
                    unwritable = refusal
                continue
            go_on = broken and pauses.wait()
        except Broken:
            broken = True
            go_on = pauses.wait()
        except Silent:
            go_on = False
        if go_on:
            continue
        if not entry:
            if unwritable is not None:
                raise unwritable
            spool(call, key)
        return 0, b""


class Pauses:
    """Short sleeps, growing, until ``window`` seconds after the first."""

    __slots__ = ("deadline", "pause", "window")

    def __init__(self, window: float) -> None:
        self.window = window
        self.deadline = 0.0
        self.pause = PAUSE_FIRST

    def wait(self) -> bool:
        """Sleep and say True, or say False when the window is over."""
        now = time.monotonic()
        if not self.deadline:
            self.deadline = now + self.window
        if now >= self.deadline:
            return False
        time.sleep(min(self.pause, self.deadline - now))
        self.pause = min(self.pause * 2, PAUSE_LONGEST)
        return True


def spool(call: Call, key: bytes) -> bytes:
    """Write the request beside the socket, to survive a crash; returns the file's path."""
    from zlib import crc32

    directory = call.socket.rpartition(b"/")[0] + b"/spool"
    path = directory + b"/%08x-%s.del" % (crc32(key), call.id)
    temporary = directory + b"/." + call.id
    try:
        make_directory(directory)
        file = posix.open(temporary, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC, 0o600)
        try:
            rest = call.request
            while rest:
                rest = rest[posix.write(file, rest) :]
            posix.fsync(file)
        finally:
            posix.close(file)
        posix.rename(temporary, path)
        sync_directory(directory)
    except OSError as error:
        remove(temporary)
        raise Refusal(
            CODE_IO,
            f"no moorage agent answers at {text(call.socket)}, and the spool entry {text(path)} cannot be "
            f"written: {error.strerror}; start the agent or make that directory writable",
        ) from None
    return path


def make_directory(path: bytes) -> None:
    """Private to root. After a reboot, before the agent was started, the socket's directory is missing too."""
    try:
        posix.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        posix.mkdir(path.rpartition(b"/")[0], 0o700)
        posix.mkdir(path, 0o700)


def sync_directory(directory: bytes) -> None:
    """Make the renames in it last."""
    descriptor = posix.open(directory, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        posix.fsync(descriptor)
    finally:
        posix.close(descriptor)


def remove(path: bytes) -> None:
    """Unlink what may be gone already: the agent watches the spool too."""
    try:
        posix.unlink(path)
    except OSError:
        return


def check_variables(environ: dict[bytes, bytes], command: str) -> None:
    """Raises Refusal naming every variable that this command needs and does not have."""
    if command and command not in REQUIRED:
        known = ", ".join([*REQUIRED, "VERSION"])
        raise Refusal(CODE_ENVIRONMENT, f"unknown CNI_COMMAND {command!r}; known are {known}")
    needed = (b"CNI_COMMAND", *REQUIRED.get(command, KEY_VARIABLES[1:]))
    missing = ", ".join([name.decode() for name in needed if not environ.get(name)])
    if missing:
        raise Refusal(CODE_ENVIRONMENT, f"missing in the environment: {missing}")


def socket_path(environ: dict[bytes, bytes], stdin: bytes, command: str) -> bytes:
    """Where the agent listens: the configuration's "socket", else MOORAGE_SOCKET, else the default."""
    if b'"socket"' in stdin:
        path = configuration(stdin).get("socket")
        if isinstance(path, str) and path[:1] == "/" and "\0" not in path:
            return path.encode("utf-8", "surrogatepass")
        if path is not None and command != "DEL":
            raise Refusal(CODE_INVALID_CONFIG, f'"socket" must be an absolute path, not {path!r:.200}')
    path_bytes = environ.get(b"MOORAGE_SOCKET", b"")
    return path_bytes if path_bytes[:1] == b"/" else DEFAULT_SOCKET


def encode_request(environ: dict[bytes, bytes], stdin: bytes, command: str, call: Call) -> bytes:
    """The request frame. A DEL that is too long is cut down to its key, which is all it needs."""
    fields = {"call": b"cni", "request": call.id, "boot": boot_id(), "started": b"%d" % call.started}
    variables = {"env." + text(name): value for name, value in environ.items() if name.startswith(b"CNI_")}
    request = frame.encode({**fields, **variables, "stdin": stdin})
    if len(request) - frame.HEADER > frame.MAX_PAYLOAD and command == "DEL":
        variables = {"env." + text(name): environ[name] for name in KEY_VARIABLES}
        request = frame.encode({**fields, **variables, "stdin": b""})
    if len(request) - frame.HEADER > frame.MAX_PAYLOAD:
        names = ", ".join([name[4:] for name, value in variables.items() if len(value) > 4096])
        raise Refusal(CODE_ENVIRONMENT, f"too long in the environment: {names}")
    return request


def receive(link: "_socket.socket", length: int) -> bytes:
    """Exactly ``length`` bytes. Raises ValueError when the connection ends before."""
    chunks = b""
    while len(chunks) < length:
        chunk = link.recv(length - len(chunks))
        if not chunk:
            raise ValueError("the agent closed the connection without a reply")
        chunks += chunk
    return chunks


def read_stdin() -> bytes:
    """What the engine sent, up to one byte more than is allowed; nothing if stdin is closed or a terminal."""
    chunks = []
    room = 0 if posix.isatty(0) else frame.MAX_STDIN + 1
    try:
        while room:
            chunk = posix.read(0, min(room, 1 << 16))
            if not chunk:
                break
            chunks.append(chunk)
            room -= len(chunk)
    except OSError:
        # Closed, which is nothing too.
        return b""
    return b"".join(chunks)


def boottime() -> int:
    """CLOCK_BOOTTIME in ns."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boot_id() -> bytes:
    """Which boot CLOCK_BOOTTIME belongs to."""
    try:
        descriptor = posix.open("/proc/sys/kernel/random/boot_id", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            return posix.read(descriptor, 64).strip()
        finally:
            posix.close(descriptor)
    except OSError as error:
        raise Refusal(CODE_IO, f"/proc/sys/kernel/random/boot_id cannot be read: {error.strerror}") from None


def text(raw: bytes) -> str:
    """For messages: never fails, whatever the bytes."""
    return raw.decode("utf-8", "backslashreplace")


def no_agent(call: Call, error: Exception) -> str:
    """The sentence for an operator who finds the agent down."""
    return (
        f"no moorage agent answers at {text(call.socket)}: {error}; start it, or name its socket with "
        '"socket" in the CNI configuration'
    )


def configuration(stdin: bytes) -> dict[str, object]:
    """The CNI configuration, or an empty one if it cannot be read: the agent is who complains."""
    try:
        parsed = parse_json(stdin)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


class JsonOptions:
    """What json.loads() gives to the scanner that does its work, which is written in C."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    array_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


def parse_json(stdin: bytes) -> object:
    """json.loads(), without importing it if it would accept this plainly. Raises ValueError, RecursionError."""
    try:
        from _json import make_scanner

        document = stdin.decode()
        start = len(document) - len(document.lstrip(JSON_BLANKS))
        # Declared for a JSONDecoder; it reads only the attributes that JsonOptions has, and importing json to
        # make a real one is what this function is there to avoid.
        parsed, end = make_scanner(JsonOptions)(document, start)  # type: ignore[arg-type]
        if not document[end:].strip(JSON_BLANKS):
            result: object = parsed
            return result
    except (ImportError, AttributeError, TypeError, StopIteration, ValueError, SystemError):
        # Not plain, or not this Python's way. SystemError: 3.11 looks up the class of its error among the
        # imported modules, and has none to raise.
        pass
    import json

    return json.loads(stdin)


def version_answer(stdin: bytes) -> bytes:
    """The answer to VERSION."""
    import json

    asked = configuration(stdin).get("cniVersion")
    version = asked if isinstance(asked, str) and asked else NEWEST_VERSION
    return json.dumps({"cniVersion": version, "supportedVersions": SUPPORTED_VERSIONS}).encode()


def error_answer(stdin: bytes, refusal: Refusal) -> bytes:
    """A CNI error, in the version the caller speaks."""
    import json

    asked = configuration(stdin).get("cniVersion")
    version = asked if asked in SUPPORTED_VERSIONS else DEFAULT_VERSION
    return json.dumps({"cniVersion": version, "code": refusal.code, "msg": str(refusal)}).encode()
