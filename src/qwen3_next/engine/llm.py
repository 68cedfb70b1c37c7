"""Prompts in, texts out, all at once: the engine for programs that have their prompts together."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from rich.progress import Progress

from qwen3_next.engine.config import EngineConfig
from qwen3_next.engine.engine import Engine, Output
from qwen3_next.engine.loading import find_model, load_model
from qwen3_next.engine.request import FinishReason, Request, SamplingParams
from qwen3_next.engine.sampler import Drawn
from qwen3_next.errors import CheckpointError, InputError, Qwen3NextError
from qwen3_next.model.quantize import quantize_

Prompt = str | Sequence[int]
Message = Mapping[str, str]
Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer to a prompt.

    Attributes:
        finish: why it ended.
        error: with `FinishReason.ERROR`, what went wrong with this request.
        logprobs: of each token, where they were asked for.
        cached_tokens: of the prompt, how many an earlier prompt had brought.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason
    error: Qwen3NextError | None
    logprobs: tuple[Drawn, ...] | None
    prompt_tokens: int
    cached_tokens: int


@dataclass(eq=False)
class _Growing:
    wants_logprobs: bool
    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[Drawn] = field(default_factory=list[Drawn])

    def take(self, output: Output) -> Completion | None:
        """The completion, where this was its last output."""
        state = output.state
        self.text += output.text
        self.token_ids += state.tokens
        self.logprobs += output.logprobs
        if state.finish is None:
            return None
        return Completion(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish=state.finish,
            error=state.error,
            logprobs=tuple(self.logprobs) if self.wants_logprobs else None,
            prompt_tokens=state.prompt_tokens,
            cached_tokens=state.cached_tokens,
        )


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
        quantization: Literal["fp8"] | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: a directory or a hub id; None for the model in the package.
            dtype: auto, bfloat16, float16 or float32.
            device: auto, cpu, cuda or cuda:N.
            quantization: "fp8" quantises the weights as the published fp8 checkpoints do.

        Raises:
            InputError: an unknown dtype, device or quantisation.
            CheckpointError, ConfigError: the checkpoint is missing, incomplete or not of this architecture.
            BackendError, CapacityError: the device is not there, or its memory is too small.
        """
        if quantization not in (None, "fp8"):
            raise InputError(f"quantization = {quantization!r} is unknown. Allowed: None or 'fp8'.")
        loaded = load_model(find_model(model), dtype, device, mtp=(config or EngineConfig()).drafts != 0)
        if quantization == "fp8":
            quantize_(loaded.model)
        self.engine = Engine(loaded, config)
        self._numbers = itertools.count()

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
        groups = [self._requests(prompt, one) for prompt, one in zip(several, each, strict=True)]
        finished = self._run([request for group in groups for request in group], progress)
        return [tuple(finished[request.request_id] for request in group) for group in groups]

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

    def render(self, messages: Sequence[Message]) -> str:
        """The text that a conversation is to the model."""
        loaded = self.engine.loaded
        if loaded.chat_template is None:
            raise CheckpointError("the model's tokenizer has no chat template; use `generate` with a text.")
        from transformers import PreTrainedTokenizerFast  # takes longer to import than the engine to start

        renderer = PreTrainedTokenizerFast(tokenizer_object=loaded.tokenizer, chat_template=loaded.chat_template)
        turns = [dict(message) for message in messages]
        try:
            return str(renderer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program: it may be no Jinja, or raise whatever it likes
            raise CheckpointError(f"the model's chat template cannot render the messages ({error}).") from error

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

    def _requests(self, prompt: Prompt, params: SamplingParams) -> list[Request]:
        ids = self._encoded(prompt) if isinstance(prompt, str) else prompt
        name = f"request-{next(self._numbers)}"
        return Request(request_id=name, prompt=tuple(int(token) for token in ids), params=params).samples()

    def _encoded(self, text: str) -> list[int]:
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
        waiting, growing = iter(prompts), dict[str, tuple[Key, _Growing]]()
        try:
            while True:
                taken = list(itertools.islice(waiting, ahead - len(growing)))
                for key, prompt, params in taken:
                    (request,) = self._requests(prompt, params)
                    try:
                        self.engine.add(request)
                    except InputError as error:
                        yield key, error
                        continue
                    growing[request.request_id] = key, _Growing(params.logprobs is not None)
                if not growing and not taken:
                    return
                for output in self.engine.step():
                    key, one = growing[output.state.request_id]
                    completion = one.take(output)
                    if completion is not None:
                        del growing[output.state.request_id]
                        yield key, completion
        finally:
            self._abandon(growing)

    def _run(self, requests: Sequence[Request], progress: bool) -> dict[str, Completion]:
        growing: dict[str, _Growing] = {}
        try:
            for request in requests:
                self.engine.add(request)
                growing[request.request_id] = _Growing(request.params.logprobs is not None)
            return self._finish(growing, progress and len(requests) > 1)
        except BaseException:
            self._abandon(growing)
            raise

    def _abandon(self, requests: Iterable[str]) -> None:
        """Nothing of a call that was left stays in the engine."""
        for name in requests:
            self.engine.abort(name)
        while self.engine.has_work:
            self.engine.step()

    def _finish(self, growing: dict[str, _Growing], progress: bool) -> dict[str, Completion]:
        finished: dict[str, Completion] = {}
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("requests", total=len(growing))
            while len(finished) < len(growing):
                for output in self.engine.step():
                    completion = growing[output.state.request_id].take(output)
                    if completion is not None:
                        finished[output.state.request_id] = completion
                        bar.advance(task)
        return finished


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    numbers = [one for one in prompts if isinstance(one, int)]
    return [numbers] if numbers else [one for one in prompts if not isinstance(one, int)]
