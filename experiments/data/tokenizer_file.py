"""The format of a tokenizer.json file, checked before the `tokenizers` library reads it, which lets much pass."""

from typing import Annotated, Any

import pydantic
import tokenizers

from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.text import in_short

MOST_FILE_BYTES = 1 << 28
SPARE_NUMBERS = 1024  # may be unused in any vocabulary, and in a large one as many as are used

_Number = Annotated[int, pydantic.Field(ge=0, lt=2**32)]
_Settings = dict[str, pydantic.JsonValue] | None


class _AddedToken(schemas.Schema):
    id: _Number
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _Model(schemas.OpenSchema):
    """The library knows the other fields, a set for each type."""

    vocab: dict[str, _Number] | list[tuple[str, float]]


class _File(schemas.Schema):
    version: str | None = None
    truncation: _Settings = None
    padding: _Settings = None
    added_tokens: tuple[_AddedToken, ...] = ()
    normalizer: _Settings = None
    pre_tokenizer: _Settings = None
    post_processor: _Settings = None
    decoder: _Settings = None
    model: _Model


def read_tokenizer(content: bytes, where: str) -> Any:
    """The library's tokenizer from a file's content.

    Args:
      content: of the file.
      where: names it.

    Raises:
      UserError: for what isn't such a file, numbers that two tokens have or that are far above their count, and added
        tokens that the library would give another number.
    """
    file = schemas.parse(content, _File, where, way_on="it is not a tokenizer.json file that can be used")
    try:
        model = tokenizers.Tokenizer.from_str(content.decode("utf-8-sig"))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{where} is not a tokenizer.json file that can be used ({in_short(error)})") from error
    for token in file.added_tokens:
        if (number := model.token_to_id(token.content)) != token.id:
            raise UserError(f"{where}: the added token {token.content!r} has the number {token.id}, and is {number}")
    check_numbers(model.get_vocab(), where)
    return model


def check_numbers(vocabulary: dict[str, int], where: str) -> None:
    """Refuses a vocabulary whose numbers aren't its tokens' own, or would make a model of rows that nothing uses.

    >>> check_numbers({"a": 0, "b": 4_000_000_000}, "a.json")
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: a.json: a token has the number 4000000000, in a vocabulary of 2
    """
    largest = max(vocabulary.values(), default=0)
    if largest >= 2 * len(vocabulary) + SPARE_NUMBERS:
        raise UserError(f"{where}: a token has the number {largest}, in a vocabulary of {len(vocabulary):,}")
    if len(set(vocabulary.values())) < len(vocabulary):
        names: dict[int, str] = {}
        for token, number in vocabulary.items():
            if (other := names.setdefault(number, token)) is not token:
                raise UserError(f"{where}: the tokens {other!r} and {token!r} have one number, {number}")
