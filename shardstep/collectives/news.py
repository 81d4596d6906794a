"""What the side channel carries: messages of one size with JSON inside, never objects."""

import json
from typing import Any

import torch
from torch import Tensor

BYTES = 8192
_TEXT = 700
"""The longest piece of text in a message, in characters."""

Message = dict[str, Any]


def blank() -> Tensor:
    """Where a message is received."""
    return torch.zeros(BYTES, dtype=torch.uint8)


def packed(message: Message) -> Tensor:
    """The message in bytes; of records that do not fit, the latest are kept, and of a text its begin."""
    key, cut = ("records", slice(1, None)) if "records" in message else ("text", slice(-_TEXT))
    while len(raw := json.dumps(message, ensure_ascii=False).encode(errors="replace")) > BYTES:
        message = {**message, key: message[key][cut]}
    own = blank()
    own[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return own


def unpacked(received: Tensor) -> Message:
    """What was received."""
    message: Message = json.loads(received.numpy().tobytes().rstrip(b"\0"))
    return message


def shortened(text: str) -> str:
    """One line of what may be long."""
    lines = text.strip().splitlines() or [""]
    return lines[0][:_TEXT] + ("…" if len(lines[0]) > _TEXT or len(lines) > 1 else "")
