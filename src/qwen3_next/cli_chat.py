"""A conversation that reads each turn once."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from qwen3_next.cli_text import Speed, Writer
from qwen3_next.errors import CheckpointError
from qwen3_next.ops.sampling import Sampling

if TYPE_CHECKING:
    from qwen3_next.engine.loading import LoadedModel

_ANSWER = "\ue000"  # of the private use area: stands for an answer where only what follows it is wanted


class Conversation:
    """Turns of a user and the model, in the chat template of its tokenizer.

    The text of the earlier turns stays as the model read and wrote it, a chain of thought included, so that its cache
    can be continued.

    Raises:
        CheckpointError: the tokenizer has no chat template, or one that is broken, refuses or leaves answers out.
    """

    def __init__(self, loaded: "LoadedModel", sampling: Sampling, seed: int | None, system: str | None) -> None:
        if loaded.chat_template is None:
            raise CheckpointError("the model's tokenizer has no chat template; use `qwen3-next generate`.")
        self.loaded, self.sampling, self.seed, self.system = loaded, sampling, seed, system
        self.renderer = PreTrainedTokenizerFast(tokenizer_object=loaded.tokenizer, chat_template=loaded.chat_template)
        self.reset()

    def reset(self) -> None:
        """Forget every turn."""
        self.writer = Writer(self.loaded, self.sampling, self.seed)

    @property
    def speed(self) -> Speed:
        """Of the last answer."""
        return self.writer.speed

    def ask(self, text: str, max_tokens: int) -> Iterator[str]:
        """Yield the answer to the next turn, in pieces.

        Raises:
            InputError: the turn does not fit the context.
        """
        first = not self.writer.token_ids
        # The token that ended the last answer was never read; the template closes the turn with its own.
        self.writer.drop_unread_end()
        self.writer.read(self._first_turn(text) if first else self._next_turn(text))
        return self.writer.write(max_tokens)

    def _first_turn(self, text: str) -> str:
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return self._render([*system, {"role": "user", "content": text}])

    def _next_turn(self, text: str) -> str:
        """What the template writes from the end of an answer to the beginning of the next."""
        turns = [("user", ""), ("assistant", _ANSWER), ("user", text)]
        rendered = self._render([{"role": role, "content": content} for role, content in turns])
        if _ANSWER not in rendered:
            raise CheckpointError("the model's chat template leaves the answer out, so no turn can follow it.")
        return rendered.partition(_ANSWER)[2]

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return str(self.renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program: it may be no Jinja, or raise whatever it likes
            raise CheckpointError(
                f"the model's chat template cannot render the turns ({error}); correct it, or use `generate`."
            ) from error
