"""A conversation of which nothing is read twice."""

from collections.abc import Generator

from qwen3_next.engine import LLM, SamplingParams, StreamUpdate
from qwen3_next.errors import CapacityError, CheckpointError

_ANSWER = "\ue000"  # of the private use area: stands for an answer where only what follows it is wanted


class Conversation:
    """Turns of a user and the model, in the chat template of its tokenizer.

    The tokens of the earlier turns stay as the model read and wrote them, a chain of thought included, so that it goes
    on from the prefix cache.

    Raises:
        CheckpointError: the tokenizer has no chat template, or one that is broken, refuses or leaves answers out.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        llm.renderer  # noqa: B018 - raises where there is no template, before the first turn
        self.llm, self.params, self.system = llm, params, system
        self.token_ids: list[int] = []

    def reset(self) -> None:
        """Forget every turn."""
        self.token_ids = []

    def ask(self, text: str) -> Generator[StreamUpdate]:
        """Yield the answer to the next turn, in pieces.

        Raises:
            CapacityError: the turn does not fit the context.
        """
        turn = self._next_turn(text) if self.token_ids else self._first_turn(text)
        prompt, answer = [*self.token_ids, *self.llm.encoded(turn)], list[int]()
        try:
            for update in self.llm.stream(prompt, self.params):
                answer += update.token_ids
                yield update
        except CapacityError as error:
            raise CapacityError(f"{error} Or begin anew with /reset.") from error
        # The token that ends an answer was never read; the template closes the turn with its own.
        if answer and answer[-1] in self.llm.engine.loaded.eos_ids:
            answer.pop()
        self.token_ids = prompt + answer

    def _first_turn(self, text: str) -> str:
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return self.llm.render([*system, {"role": "user", "content": text}])

    def _next_turn(self, text: str) -> str:
        """What the template writes from the end of an answer to the beginning of the next."""
        turns = [("user", ""), ("assistant", _ANSWER), ("user", text)]
        rendered = self.llm.render([{"role": role, "content": content} for role, content in turns])
        if _ANSWER not in rendered:
            raise CheckpointError("the model's chat template leaves the answer out, so no turn can follow it.")
        return rendered.partition(_ANSWER)[2]
