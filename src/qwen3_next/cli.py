"""The command line: `qwen3-next generate | chat | batch | serve | bench | train | info | doctor`.

torch is imported inside the commands, so that `--help` answers at once. Whatever goes wrong on purpose
(`Qwen3NextError`, a wrong option) is one line on stderr and exit code 2; Ctrl-C is exit code 130, and 1 is for an
operation that computes something else than it should.
"""

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.text import Text

from qwen3_next.errors import BackendError, InputError, Qwen3NextError

if TYPE_CHECKING:
    from qwen3_next.engine import LLM

RED, WRONG_USAGE, INTERRUPTED = 1, 2, 130

# typer carries its own click: the class of all its usage errors is reached through one that it offers.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="Qwen3-Next: write text, talk, answer files, serve, measure, train; what models need and machines do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelName = Annotated[str | None, typer.Option("--model", help="Directory or hub id; left out, the model in the box.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's; float32 on a CPU that only emulates bfloat16), bfloat16, float16 or float32."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens to write at most.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token; so does --temperature 0.")]
Temperature = Annotated[float | None, typer.Option(help="Divides the logits: below 1 is safer, above 1 is wilder.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that reach this probability.")]
TopK = Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens; 0 for all.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
Penalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1 makes used tokens less likely.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="The same seed draws the same text.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be given several times.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin, less a last line break.")],
    model: ModelName = None,
    max_tokens: MaxTokens = 128,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    stop: Stop = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Continue a text. Options of sampling default to the model's generation_config.json."""
    from qwen3_next.cli_text import SamplingOptions, write

    text = _stdin().removesuffix("\n") if prompt == "-" else prompt
    options = SamplingOptions(
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    llm = _llm(model, dtype, device, sequences=1)
    changes = options.changes(llm.engine.loaded.generation)
    params = llm.default_params(**changes, seed=seed, max_tokens=max_tokens, stop=tuple(stop or ()))
    write(llm.stream(text, params), text)


@app.command()
def chat(
    model: ModelName = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    max_tokens: MaxTokens = 512,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Talk with the model, a line a turn; /reset begins anew, /exit or the end of the input ends."""
    from qwen3_next.cli_chat import Conversation
    from qwen3_next.cli_text import SamplingOptions, write

    options = SamplingOptions(
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    llm = _llm(model, dtype, device, sequences=1)
    changes = options.changes(llm.engine.loaded.generation)
    conversation = Conversation(llm, llm.default_params(**changes, seed=seed, max_tokens=max_tokens), system)
    for line in _turns():
        if line == "/reset":
            conversation.reset()
            continue
        try:
            write(conversation.ask(line))
        except InputError as error:
            if not sys.stdin.isatty():
                raise
            _complain(error)  # whoever sits there may shorten the turn, or begin anew


@app.command()
def batch(
    prompts: Annotated[Path, typer.Argument(help='JSON lines: {"prompt": text} or {"messages": [...]}.')],
    answers: Annotated[Path, typer.Argument(help="Where the answers go, a line each; what is there stays.")],
    model: ModelName = None,
    max_tokens: MaxTokens = 256,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    sequences: Annotated[int, typer.Option(min=1, help="Prompts that are answered at the same time.")] = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Answer a file of prompts, many at a time; the same command goes on after an interruption."""
    from qwen3_next.cli_text import SamplingOptions
    from qwen3_next.engine.offline import answer_file

    options = SamplingOptions(
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    llm = _llm(model, dtype, device, sequences)
    defaults = options.changes(llm.engine.loaded.generation) | {"seed": seed, "max_tokens": max_tokens}
    count = answer_file(llm, prompts, answers, defaults, progress=sys.stderr.isatty())
    Console(soft_wrap=True, highlight=False).print(f"{count:,} prompts answered into {answers}")


@app.command()
def serve(
    model: ModelName = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's need keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for one that is free.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="Keys, one a line; clients send one of them.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve everyone who reaches the host.")] = False,
    served_model_name: Annotated[str | None, typer.Option(help="Left out, --model, or qwen3-next.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Requests that are computed at the same time.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait beyond these.")] = 1024,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", "--max-context", min=2, help="Tokens of a prompt and its answer.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 16 * 2**20,
    request_timeout: Annotated[float, typer.Option(help="Seconds for an answer, waiting included.")] = 600.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what requests hold, prompts too.")] = False,
    max_restarts: Annotated[int, typer.Option(min=0, help="Of a failing engine, in five minutes.")] = 5,
    drafts: Annotated[int | None, typer.Option(min=0, help="Of a step. Left out, as many as are fastest.")] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="For open requests at the end.")] = 30.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Serve OpenAI's completions over HTTP until Ctrl-C."""
    from qwen3_next.cli_serve import read_keys
    from qwen3_next.server import RunConfig, ServerConfig, run

    config = RunConfig(
        host=host,
        port=port,
        is_insecure=insecure,
        max_waiting=max_waiting,
        max_restarts=max_restarts,
        drain_seconds=drain_seconds,
        server=ServerConfig(
            model_name=served_model_name or model or "qwen3-next",
            api_keys=read_keys(api_key_file),
            max_body_bytes=max_body_bytes,
            request_timeout=request_timeout,
            log_prompts=log_prompts,
        ),
    )
    run(_llm(model, dtype, device, sequences, max_model_len, drafts), config)


@app.command()
def bench(
    model: ModelName = None,
    streams: Annotated[list[int] | None, typer.Option(min=1, help="Requests at a time; may be given again.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, drawn at random.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Requests of each stream, one after the other.")] = 2,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure the engine: tokens per second while prompts are read and after, and the wait for the first token."""
    from qwen3_next import cli_bench

    loads = [
        cli_bench.Load(streams=count, prompt_tokens=prompt_tokens, output_tokens=output_tokens, rounds=rounds)
        for count in streams or (1, 8)
    ]
    llm = _llm(model, dtype, device, max(load.streams for load in loads), prompt_tokens + output_tokens)
    Console().print(cli_bench.bench(llm, loads, model or "the model in the box"))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file with the tables of `qwen3_next.train.TrainConfig`.")],
) -> None:
    """Train a model, or go on where the last run stopped."""
    from qwen3_next.train import TrainConfig
    from qwen3_next.train import train as run

    settings = TrainConfig.from_toml(config)
    result = run(settings)
    if os.environ.get("RANK", "0") != "0":  # torchrun numbers its processes; the first speaks for all
        return
    output = Path(settings.run.output)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{'finished' if result.finished else 'stopped'} at step {result.step:,}, {result.tokens:,} tokens")
    for name, path in (("model", result.model), ("log", output / "log.jsonl"), ("plot", output / "loss.png")):
        console.print(f"{name:5}  {path}")
    if not result.finished:
        console.print("the same command goes on from here")
        if result.reason == "signal":
            raise typer.Exit(INTERRUPTED)


@app.command()
def info(
    model: ModelName = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16, float16, float32 or fp8.")] = "bfloat16",
) -> None:
    """Show the architecture, its parameters and memory, and what fits this machine; reads no weights."""
    from qwen3_next.cli_info import tables
    from qwen3_next.engine.loading import SHIPPED, find_model, read_config

    directory = find_model(model, weights=False)
    console = Console()
    for table in tables(read_config(directory), "the model in the box" if directory == SHIPPED else str(model), dtype):
        console.print(table)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what this machine is and what runs each operation on it, and check that it computes what it should."""
    from qwen3_next.cli_doctor import examine

    red = examine(as_json)
    if red:
        _complain(BackendError(f"these operations are wrong on this machine: {', '.join(red)}."))
        raise typer.Exit(RED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    # Imports leave next to no garbage, and looking for it during them costs a fifth of the time to the first token.
    gc.disable()
    try:
        code = app(args=arguments, prog_name="qwen3-next", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except (Qwen3NextError, UsageError) as error:
        _complain(error)
        return WRONG_USAGE
    finally:
        gc.enable()
    return code if isinstance(code, int) else 0


def _llm(
    model: str | None,
    dtype: str,
    device: str,
    sequences: int,
    max_context: int | None = None,
    drafts: int | None = None,
) -> "LLM":
    from qwen3_next.engine import LLM, EngineConfig

    config = EngineConfig(max_sequences=sequences, max_context=max_context, drafts="auto" if drafts is None else drafts)
    llm = LLM(model, dtype=dtype, device=device, config=config)
    gc.enable()  # see `main`; what follows may take hours
    return llm


def _turns() -> Iterator[str]:
    """The user's lines that say something, up to /exit or the end of the input."""
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(mark).strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not valid text ({error.reason}); give it in UTF-8.") from error


def _complain(error: Exception) -> None:
    """One line, whatever the message holds."""
    message = cast(typer.BadParameter, error).format_message() if isinstance(error, UsageError) else str(error)
    if message:  # without any argument the help was shown, and that is all
        Console(stderr=True, highlight=False).print(Text(f"qwen3-next: {' '.join(message.split())}"), soft_wrap=True)
