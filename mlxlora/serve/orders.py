"""What is asked of the engine, and what it answers: plain values that cross threads.

An Order is one continuation of one prompt. Its answer is a stream of events: any number of
Pieces, then one End or one Fault.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from mlxlora.errors import MlxLoraError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy, whatever the rest says.

    The penalties are OpenAI's: presence once, frequency for each time that a token was generated
    already, subtracted from its logit. repetition divides a positive logit of any token that
    stands in the prompt or answer, and multiplies a negative one (Keskar et al. 2019,
    arXiv:1909.05858). bias is added to logits, by token id.
    """

    temperature: float = 0.0
    top_p: float = 1.0  # the smallest set of likeliest tokens with this much probability
    top_k: int = 0  # so many likeliest tokens; 0: all
    min_p: float = 0.0  # at least this share of the likeliest token's probability
    seed: int | None = None  # the same seed, the same answer, whoever else is in the batch
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Order:
    """One answer that is wanted.

    adapter is a name that the engine knows, None the bare base. stops end the answer, matched on
    its text, and do not become part of it. top: None for no log-probabilities, else how many of
    the likeliest tokens to tell beside each token's own. grammar is llguidance's, which the answer
    is held to. continues: the answer goes on with the prompt's text, so that a space it begins
    with is meant; a chat's is dropped where the tokenizer's own decoding drops it.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    max_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    top: int | None = None
    grammar: str | None = None
    continues: bool = False


@dataclass(frozen=True)
class Spelled:
    """A token of the answer with its log-probability, and the likeliest in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability), likeliest first


@dataclass(frozen=True)
class Piece:
    """Text that is final: no stop can begin in it any more. tokens only if they were asked for."""

    text: str
    tokens: tuple[Spelled, ...] = ()


@dataclass(frozen=True)
class End:
    """The answer is complete."""

    reason: str  # "stop", "length" or "cancelled"
    prompt_tokens: int
    cached_tokens: int  # of the prompt, that need not be computed again
    tokens: int  # generated, what a stop cut off included


@dataclass(frozen=True)
class Fault:
    """The answer will not be completed."""

    message: str
    ours: bool = True  # False: something in the order was at fault


Event = Piece | End | Fault
Sink = Callable[[Event], None]  # called in the engine's thread; must not wait


class Busy(MlxLoraError):
    """Too many orders wait already; seconds: after how long asking again makes sense."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class Unknown(MlxLoraError):
    """No adapter of this name is loaded."""
