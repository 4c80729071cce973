"""How an import's body is cut into chunks."""

from collections.abc import AsyncIterator

import pytest

from service.api.imports import Chunk, chunks
from service.errors import InvalidRequestError

MIB = 1024 * 1024


async def cut(body: bytes, *, piece_bytes: int = 65_536, line_max_bytes: int = 256 * 1024) -> list[Chunk]:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), piece_bytes):
            yield body[start : start + piece_bytes]

    return [chunk async for chunk in chunks(pieces(), line_max_bytes=line_max_bytes)]


def sizes(found: list[Chunk]) -> list[int]:
    return [len(chunk.lines) for chunk in found]


@pytest.mark.parametrize(
    ("lines", "expected"), [(0, [0]), (1, [1]), (200, [200]), (201, [200, 1]), (450, [200, 200, 50])]
)
async def test_a_chunk_has_two_hundred_lines_and_the_last_one_is_told(lines: int, expected: list[int]) -> None:
    found = await cut(b"line\n\n" * lines)
    assert sizes(found) == expected
    assert [chunk.last for chunk in found] == [False] * (len(expected) - 1) + [True]


async def test_long_lines_make_short_chunks() -> None:
    found = await cut(b"\n".join([b"x" * 200_000] * 20))
    assert sizes(found) == [6, 6, 6, 2]
    held = [sum(len(line) for _, line in chunk.lines if isinstance(line, bytes)) for chunk in found]
    assert max(held) < MIB + 256 * 1024


@pytest.mark.parametrize("piece_bytes", [1, 7, 4096])
async def test_the_pieces_in_which_a_body_comes_do_not_matter(piece_bytes: int) -> None:
    body = b"".join(b"x" * (number % 60) + b"\n" for number in range(500))
    found = await cut(body, piece_bytes=piece_bytes, line_max_bytes=50)
    whole = await cut(body, piece_bytes=len(body), line_max_bytes=50)
    assert sizes(found) == sizes(whole)
    for one, other in zip(found, whole, strict=True):
        assert [number for number, _ in one.lines] == [number for number, _ in other.lines]
        assert [line for _, line in one.lines if isinstance(line, bytes)] == [
            line for _, line in other.lines if isinstance(line, bytes)
        ]
    too_long = [number for chunk in found for number, line in chunk.lines if isinstance(line, InvalidRequestError)]
    assert too_long == [number for number in range(1, 501) if (number - 1) % 60 > 50]
