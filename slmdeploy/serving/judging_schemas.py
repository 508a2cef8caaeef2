"""What /score, /rerank and /classify take and give. /rerank has the form of Cohere and Jina, which LangChain knows too.

`model` may be left out, since a server has one. Knows neither engine nor tokenizer.
"""

from typing import Annotated

from pydantic import ConfigDict, Field

from slmdeploy.serving.openai_schemas import Body

Text = Annotated[str, Field(min_length=1)]


class ScoreBody(Body):
    """POST /score: items behind one shared prefix; of a cross-encoder, texts against a query."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prefix": "Query: warm socks. Item:", "items": ["wool socks", "a lamp"]}]}
    )
    model: str | None = None
    prefix: Text
    items: list[Text] = Field(min_length=1)
    truncate: bool = Field(False, description="Of a cross-encoder: cut a pair that is too long rather than refuse it.")


class Document(Body):
    """A document as an object; only its text is read."""

    text: Text


class RerankBody(Body):
    """POST /rerank: documents in the order of how well they go with the query."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "warm socks", "documents": ["wool socks", "a lamp"], "top_n": 1}]}
    )
    model: str | None = None
    query: Text
    documents: list[Text | Document] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False
    truncate: bool = False

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


class Pair(Body):
    """Two texts that a classifier of pairs reads together."""

    text: Text
    text_pair: Text


class ClassifyBody(Body):
    """POST /classify: the label of each text, pair of texts, or token."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["it works", "it broke"]}]})
    model: str | None = None
    input: Text | Annotated[list[Text | Pair], Field(min_length=1)]
    truncate: bool = False

    @property
    def texts(self) -> list[str | tuple[str, str]]:
        """The texts and pairs, one or several."""
        given = [self.input] if isinstance(self.input, str) else self.input
        return [each if isinstance(each, str) else (each.text, each.text_pair) for each in given]
