"""Names that become the names of files and folders."""

import re

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_name(name: str, what: str) -> str:
    """Return a name that a folder can have.

    Args:
        name: to check.
        what: what is named, for the message.

    Raises:
        ValueError: if it could lead to another folder.
    """
    if not NAME.fullmatch(name) or name.strip(".") == "":
        raise ValueError(
            f"{what} must be 1 to 64 letters, digits, '.', '_' or '-' (it names a folder), "
            f"got {name!r}"
        )
    return name
