"""The bytes between a hook and the agent: one request frame, one reply frame, on a unix stream.

    frame   := "MRG1" length(u32) payload           big endian; a request's payload is at most MAX_PAYLOAD
    payload := { keylen(u16) key vallen(u32) value } ...

Requests have the fields
    call        "cni", "netmodules" or "admin"
    request     32 hex digits, the same on every try of one call
    boot        boot_id of the caller
    started     CLOCK_BOOTTIME of the caller in ns, decimal
    env.NAME    one for each CNI_* variable; NETMODULES_COMMAND and NETMODULES_NETWORK (netmodules/modules/hook.py)
    stdin       what the engine sent
Replies have ``exit`` (decimal) and ``stdout``. What is spooled is a request frame in a file.

Standard library only and no imports at all: the hook pays for every one.
"""

MAGIC = b"MRG1"
HEADER = 8
MAX_STDIN = 1 << 20
MAX_PAYLOAD = MAX_STDIN + (1 << 16)


def encode(fields: dict[str, bytes]) -> bytes:
    """One frame."""
    parts = []
    for key, value in fields.items():
        name = key.encode()
        parts.append(len(name).to_bytes(2, "big") + name + len(value).to_bytes(4, "big") + value)
    payload = b"".join(parts)
    return MAGIC + len(payload).to_bytes(4, "big") + payload


def payload_length(header: bytes, most: int = MAX_PAYLOAD) -> int:
    """The length that a frame's first HEADER bytes announce, at most ``most``. Raises ValueError."""
    length = int.from_bytes(header[4:8], "big")
    if len(header) != HEADER or header[:4] != MAGIC or length > most:
        raise ValueError("not a moorage frame")
    return length


def decode(payload: bytes) -> dict[str, bytes]:
    """The fields of a payload. Raises ValueError when it is cut short or malformed."""
    fields: dict[str, bytes] = {}
    at = 0
    end = len(payload)
    while at < end:
        key_end = at + 2 + int.from_bytes(payload[at : at + 2], "big")
        value_at = key_end + 4
        value_end = value_at + int.from_bytes(payload[key_end:value_at], "big")
        if value_at > end or value_end > end:
            raise ValueError("frame cut short")
        fields[payload[at + 2 : key_end].decode()] = payload[value_at:value_end]
        at = value_end
    return fields
