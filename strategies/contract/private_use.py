"""What an algorithm does with private rows beside learning from them; guarantees rest on it."""

from typing import NamedTuple


class PrivateUse(NamedTuple):
    """What of private data reaches others, beside what is made of models that learn from them.

    Each is a half sentence for a refusal, or empty where there is no such thing.

    Attributes:
        sent: what clients send that is made of private rows, such as class means.
        peer: which model learns beside the one that is shared, from private rows and by no rule
            that protects it, and teaches it there.
        pooled: who learns from rows of several clients, or of another.
        counts: the setting by which a client counts as much as it has private rows.
        validation: what is chosen by the accuracy on validation rows.
    """

    sent: str = ""
    peer: str = ""
    pooled: str = ""
    counts: str = ""
    validation: str = ""
