"""Prompts in, texts out, all at once: the engine for programs that have their prompts together."""

import functools
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from rich.progress import Progress

from qwen3_next.engine.answers import Completion, Growing, StreamUpdate
from qwen3_next.engine.config import EngineConfig
from qwen3_next.engine.engine import Engine
from qwen3_next.engine.loading import find_model, load_model
from qwen3_next.engine.request import Request, SamplingParams
from qwen3_next.engine.stream import Output
from qwen3_next.errors import CheckpointError, InputError, Qwen3NextError
from qwen3_next.model.quantize import Quantization

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Key = TypeVar("Key")


class LLM:
    """A model with an engine around it.

    llm = LLM()                      # the model in the package
    for answers in llm.generate(["Once upon a time", "def add("]):
        print(answers[0].text)
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantization: Quantization = "auto",
        random_weights: bool = False,
        config: EngineConfig | None = None,
        tp: int = 1,
        ep: int = 1,
    ) -> None:
        """Load a model.

        Args:
            model: a directory or a hub id; None for the model in the package.
            dtype: auto, bfloat16, float16 or float32.
            device: auto, cpu, cuda or cuda:N.
            quantization: "auto" keeps the weights of a block-fp8 checkpoint so; "fp8" quantises others likewise, as
                the published fp8 checkpoints do, while they are read; "none" dequantises.
            random_weights: draw them where the model has only a config.json; see `load_model`.
            tp, ep: over how many processes heads and experts are cut, see `engine_of_ranks`.

        Raises:
            InputError: an unknown dtype, device or quantisation.
            CheckpointError, ConfigError: the checkpoint is missing, incomplete or not of this architecture.
            BackendError, CapacityError: the device is not there, or its memory is too small.
        """
        directory = find_model(model, weights=not random_weights)
        load = functools.partial(
            load_model,
            directory,
            dtype,
            quantization=quantization,
            random_weights=random_weights,
            mtp=(config or EngineConfig()).drafts != 0,
        )
        if tp == ep == 1:
            self.engine = Engine(load(device), config)
        else:
            from qwen3_next.engine.parallel import engine_of_ranks  # torch.distributed takes its time

            self.engine = engine_of_ranks(load, directory, tp, ep, device, config)
        self._numbers = itertools.count()
        self._growing: dict[str, Growing] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[tuple[Completion, ...]]:
        """Continue prompts; for each of them `params.n` completions, in the order of the prompts.

        Args:
            prompts: texts or token ids, or one of them.
            params: for all prompts, or one for each; None for those of the model's generation_config.json.
            progress: show a bar while there is more than one request.

        Raises:
            InputError, CapacityError: a prompt or parameters that cannot be served; nothing is started then.
        """
        several = _several(prompts)
        chosen = self.default_params() if params is None else params
        each = [chosen] * len(several) if isinstance(chosen, SamplingParams) else list(chosen)
        if len(each) != len(several):
            raise InputError(f"{len(several)} prompts came with {len(each)} parameters. Give one, or one for each.")
        requests = [self.requests(prompt, one) for prompt, one in zip(several, each, strict=True)]
        try:
            groups = [[self._begin(request) for request in group] for group in requests]
            self._finish({request.request_id for group in requests for request in group}, progress)
            return [tuple(growing.completion() for growing in group) for group in groups]
        finally:
            self._leave(request.request_id for group in requests for request in group)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamUpdate]:
        """Continue a prompt piece by piece; with `params.n` answers their pieces take turns.

        Leaving the iterator ends the request.

        Raises:
            InputError, CapacityError: the prompt or the parameters cannot be served.
        """
        requests = self.requests(prompt, self.default_params() if params is None else params)
        try:
            open_ = [self._begin(request) for request in requests]
            while open_:
                self._advance()
                updates = [update for growing in open_ if (update := growing.take())]
                open_ = [growing for growing in open_ if not growing.has_ended]
                yield from updates
        finally:
            self._leave(request.request_id for request in requests)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, progress: bool = False
    ) -> Completion:
        """The next message of a conversation, by the model's chat template.

        Args:
            messages: `{"role": ..., "content": ...}`, the user's last.

        Raises:
            CheckpointError: the model has no chat template, or one that cannot render the messages.
        """
        return self.generate(self.render(messages), params, progress=progress)[0][0]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        ending: Literal["answer", "nothing", "last message"] = "answer",
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that a conversation is to the model.

        Args:
            tools: as OpenAI describes them, `{"type": "function", "function": {"name": ..., "parameters": ...}}`.
            ending: what follows the messages: the beginning of an answer, nothing, or not even the last one's own end.
            variables: others that the template reads.

        Raises:
            CheckpointError: the model has no chat template, or one that cannot render the messages.
        """
        renderer, turns = self.renderer, [dict(message) for message in messages]
        try:
            text = renderer.apply_chat_template(
                turns,
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=ending == "answer",
                continue_final_message=ending == "last message",
                **(variables or {}),
            )
        except Exception as error:  # a template is a program: it may be no Jinja, or raise whatever it likes
            raise CheckpointError(f"the model's chat template cannot render the messages ({error}).") from error
        return str(text)

    @functools.cached_property
    def renderer(self) -> Any:
        """The tokenizer with its chat template, as transformers has it.

        Raises:
            CheckpointError: the model has none.
        """
        loaded = self.engine.loaded
        if loaded.chat_template is None:
            raise CheckpointError("the model's tokenizer has no chat template; use `generate` with a text.")
        from transformers import PreTrainedTokenizerFast  # takes longer to import than the engine to start

        return PreTrainedTokenizerFast(tokenizer_object=loaded.tokenizer, chat_template=loaded.chat_template)

    def default_params(self, **changes: Any) -> SamplingParams:
        """The settings of generation_config.json, some of them changed.

        Raises:
            InputError: a value outside its range.
        """
        found = self.engine.loaded.generation
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        values = {name: found[name] for name in names if found.get(name) is not None}
        if not found.get("do_sample", False):
            values["temperature"] = 0
        return SamplingParams(**(values | changes))

    def requests(self, prompt: Prompt, params: SamplingParams, name: str | None = None) -> list[Request]:
        """One request for each of `params.n` samples.

        Args:
            name: of the only one; samples of several add their number to it. None for one that is new to this object.

        Raises:
            InputError: the prompt is empty or no Unicode.
        """
        ids = self.encoded(prompt) if isinstance(prompt, str) else prompt
        name = f"request-{next(self._numbers)}" if name is None else name
        return Request(request_id=name, prompt=tuple(int(token) for token in ids), params=params).samples()

    def encoded(self, text: str) -> list[int]:
        """The tokens of a text.

        Raises:
            InputError: it is no Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"a prompt is not valid Unicode ({error.reason}); give it in UTF-8.") from error
        return self.engine.loaded.tokenizer.encode(text, add_special_tokens=False).ids

    def answers(
        self, prompts: Iterable[tuple[Key, Prompt, SamplingParams]], ahead: int
    ) -> Iterator[tuple[Key, Completion | Qwen3NextError]]:
        """Completions in the order in which they are ready, each with the key that came with its prompt.

        Prompts are taken only as the engine has room: at most `ahead` are in it. A prompt that cannot be served gives
        the error instead.
        """
        waiting, open_ = iter(prompts), dict[str, tuple[Key, Growing]]()
        try:
            while True:
                taken = list(itertools.islice(waiting, ahead - len(open_)))
                for key, prompt, params in taken:
                    (request,) = self.requests(prompt, params)
                    try:
                        open_[request.request_id] = key, self._begin(request)
                    except InputError as error:
                        yield key, error
                if not open_ and not taken:
                    return
                self._advance()
                for name, (key, growing) in list(open_.items()):
                    if growing.has_ended:
                        del open_[name]
                        yield key, growing.completion()
        finally:
            self._leave(open_)

    def _begin(self, request: Request) -> Growing:
        self.engine.add(request)
        self._growing[request.request_id] = growing = Growing(request)
        return growing

    def _advance(self) -> None:
        """One step of the engine, for every call that is open: iterators may be taken in turns."""
        try:
            self._hand_out(self.engine.step())
        except BaseException:  # an interruption too: it may have come in the middle of the step
            self._hand_out(self.engine.reset())
            raise

    def _hand_out(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            growing = self._growing[output.state.request_id]
            growing.add(output)
            if growing.has_ended:
                del self._growing[output.state.request_id]

    def _leave(self, names: Iterable[str]) -> None:
        """Nothing of a call that was left stays in the engine."""
        aborted = [name for name in names if self.engine.abort(name)]
        while any(name in self._growing for name in aborted):
            self._advance()

    def _finish(self, names: set[str], progress: bool) -> None:
        count = len(names)
        with Progress(disable=not progress or count == 1, transient=True) as bar:
            task = bar.add_task("requests", total=count)
            while names := names & self._growing.keys():
                self._advance()
                bar.update(task, completed=count - len(names))


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    numbers = [one for one in prompts if isinstance(one, int)]
    return [numbers] if numbers else [one for one in prompts if not isinstance(one, int)]
