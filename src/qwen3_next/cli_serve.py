"""The keys of `qwen3-next serve`."""

from pathlib import Path

from qwen3_next.errors import InputError


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The API keys of a file, one a line; none without a file.

    Raises:
        InputError: it cannot be read, or holds none.
    """
    if path is None:
        return ()
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the API keys in {path} cannot be read ({error}). Give a text file, a key a line.") from error
    if not keys:
        raise InputError(f"{path} holds no API key. Write one a line, or leave --api-key-file out.")
    return keys
