"""GPT-2's alphabet: a printable character for every byte, in which byte-level BPE spells tokens."""


def _alphabet() -> str:
    """The character of each byte, at the byte's place."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return "".join(chr(b if b in printable else next(others)) for b in range(256))


ALPHABET = _alphabet()
_BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}
_SPELLING = str.maketrans(dict(enumerate(ALPHABET)))


def spell(token: bytes) -> str:
    """The token in the alphabet, a character for a byte."""
    return token.decode("latin-1").translate(_SPELLING)


def unspell(text: str) -> bytes:
    """Inverse of `spell`.

    Raises:
        KeyError: a character that stands for no byte.
    """
    return bytes(_BYTE_OF[character] for character in text)
