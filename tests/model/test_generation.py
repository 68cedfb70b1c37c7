"""`generate()` in every mode: against the full forward pass, against transformers' own model, and across caches."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import tiny_model
from tests.model.reference import peer_of, relative_error
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, StaticCache, TextStreamer

import qwen3_next
from qwen3_next import InputError, Qwen3NextForCausalLM

ASSETS = Path(qwen3_next.__file__).parent / "assets"
NEW = 8
PADDING = 5


def random_tokens(rows: int = 2, length: int = 11) -> Tensor:
    return torch.randint(0, 97, (rows, length))


def greedy(model: Any, tokens: Tensor | None, new: int = NEW, **options: Any) -> Any:
    return model.generate(tokens, do_sample=False, max_new_tokens=new, **options)


@torch.no_grad()
def token_by_token(model: Qwen3NextForCausalLM, tokens: Tensor, new: int = NEW) -> Tensor:
    """Greedy decoding without any cache: the whole row is read again for every token."""
    for _ in range(new):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def left_padded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The batch and its mask with the first row shortened by padding on the left."""
    mask = torch.ones_like(rows)
    mask[0, :PADDING] = 0
    return rows.masked_fill(mask == 0, 96), mask


def test_greedy_generation_is_the_full_forward_pass_token_by_token(model: Qwen3NextForCausalLM) -> None:
    tokens = random_tokens()
    assert torch.equal(greedy(model, tokens), token_by_token(model, tokens))
    assert torch.equal(greedy(model, tokens, use_cache=False), token_by_token(model, tokens))


def test_greedy_generation_runs_across_the_chunks_of_the_delta_rule() -> None:
    model = tiny_model(1)
    tokens = random_tokens(1, 60)
    assert torch.equal(greedy(model, tokens), token_by_token(model, tokens))


def test_sampling_with_one_seed_is_reproducible_and_with_another_differs(model: Qwen3NextForCausalLM) -> None:
    tokens = random_tokens()

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(tokens, do_sample=True, temperature=1.3, top_p=0.95, max_new_tokens=NEW)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 20, "temperature": 0.7, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 3},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    ],
    ids=["greedy", "beams", "all beams", "sampling", "sampled beams", "penalties"],
)
def test_every_decoding_mode_gives_the_tokens_of_transformers_own_model(options: dict[str, Any]) -> None:
    ours = tiny_model(2)
    theirs = peer_of(ours)
    tokens = random_tokens()
    options = options | {"max_new_tokens": NEW, "eos_token_id": 5, "pad_token_id": 0}
    torch.manual_seed(7)
    mine = ours.generate(tokens, **options)
    torch.manual_seed(7)
    assert torch.equal(mine, theirs.generate(tokens, **options))
    assert mine.shape[0] == 2 * options.get("num_return_sequences", 1)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_a_left_padded_row_generates_what_it_generates_alone(options: dict[str, Any]) -> None:
    model = tiny_model(3)
    rows = random_tokens()
    padded, mask = left_padded(rows)
    options = options | {"return_dict_in_generate": True, "output_logits": True}
    batch = greedy(model, padded, attention_mask=mask, **options)
    alone = [greedy(model, row, **options) for row in (rows[:1, PADDING:], rows[1:])]
    assert torch.equal(batch.sequences[:1, PADDING:], alone[0].sequences)
    assert torch.equal(batch.sequences[1:], alone[1].sequences)
    # Beams of both rows lie in one batch, in whatever order their scores have.
    steps = 1 if "num_beams" in options else NEW
    for step in range(steps):
        each = torch.cat([result.logits[step] for result in alone])
        assert relative_error(batch.logits[step], each) < 1e-5


def test_a_row_that_has_ended_leaves_the_others_undisturbed() -> None:
    model = tiny_model(4)
    rows = random_tokens()
    free = greedy(model, rows)
    end = int(free[0, rows.shape[1] + 2])
    ended = greedy(model, rows, eos_token_id=end, pad_token_id=96)
    alone = [greedy(model, row[None], eos_token_id=end, pad_token_id=96)[0] for row in rows]
    assert len(alone[0]) <= rows.shape[1] + 3
    for row, expected in zip(ended, alone, strict=True):
        assert torch.equal(row[: len(expected)], expected)
        assert (row[len(expected) :] == 96).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_logit(side: str) -> None:
    model = tiny_model(5)
    rows, mask = random_tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    lengths = [20, 13, 1]
    kept = [slice(20 - n, None) if side == "left" else slice(None, n) for n in lengths]
    for row, part in enumerate(kept):
        mask[row] = 0
        mask[row, part] = 1
    logits = model(rows, attention_mask=mask).logits
    for row, part in enumerate(kept):
        assert relative_error(logits[row, part], model(rows[row : row + 1, part]).logits[0]) < 1e-5


def test_a_static_cache_generates_what_a_dynamic_one_does() -> None:
    model = tiny_model(6)
    tokens = random_tokens()
    expected = greedy(model, tokens)
    assert torch.equal(greedy(model, tokens, cache_implementation="static"), expected)
    outside = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(greedy(model, tokens, past_key_values=outside), expected)
    outside.reset()
    assert torch.equal(greedy(model, tokens.flip(0), past_key_values=outside), expected.flip(0))


def test_a_static_cache_that_is_too_short_is_refused_with_the_length_needed(model: Qwen3NextForCausalLM) -> None:
    cache = StaticCache(config=model.config, max_cache_len=10)
    with pytest.raises(InputError, match=r"11 tokens do not fit a static cache of 10.*max_cache_len"):
        model(random_tokens(), past_key_values=cache)


@pytest.mark.parametrize("kind", ["configured", "bare", "returned"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left-padded"])
def test_continuing_a_cache_over_turns_is_one_call_over_everything(kind: str, padded: bool) -> None:
    model = tiny_model(7)
    first, mask = left_padded(random_tokens()) if padded else (random_tokens(), torch.ones(2, 11, dtype=torch.long))
    cache = {"configured": DynamicCache(config=model.config), "bare": DynamicCache(), "returned": None}[kind]
    turn = greedy(model, first, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True)
    assert cache is None or turn.past_key_values is cache
    for length in (1, 4):  # the user speaks twice
        tokens = torch.cat([turn.sequences, random_tokens(2, length)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, tokens.shape[1] - mask.shape[1]), value=1)
        at_once = greedy(model, tokens, attention_mask=mask)
        turn = greedy(
            model, tokens, attention_mask=mask, past_key_values=turn.past_key_values, return_dict_in_generate=True
        )
        assert torch.equal(turn.sequences, at_once)


def test_a_copied_cache_branches_without_touching_the_original() -> None:
    model = tiny_model(8)
    prompt = random_tokens(1)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    for _ in range(2):
        rows = torch.cat([prompt, random_tokens(1, 3)], dim=1)
        assert torch.equal(greedy(model, rows, past_key_values=copy.deepcopy(cache)), greedy(model, rows))


def test_generation_from_embeddings_is_generation_from_their_tokens() -> None:
    model = tiny_model(9)
    tokens = random_tokens()
    padded, mask = left_padded(tokens)
    embedded = model.get_input_embeddings()(padded)
    expected = greedy(model, padded, attention_mask=mask)
    assert torch.equal(greedy(model, None, inputs_embeds=embedded, attention_mask=mask), expected[:, 11:])
    assert torch.equal(greedy(model, padded, inputs_embeds=embedded, attention_mask=mask), expected)


def test_logits_are_kept_where_they_were_asked_for(model: Qwen3NextForCausalLM) -> None:
    tokens = random_tokens()
    every = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, every[:, -3:])
    picked = torch.tensor([0, 7, 4])
    torch.testing.assert_close(model(tokens, logits_to_keep=picked).logits, every[:, picked])


def test_returned_scores_are_the_logits_of_the_full_forward_pass() -> None:
    model = tiny_model(10)
    tokens = random_tokens()
    result = greedy(model, tokens, return_dict_in_generate=True, output_logits=True, output_hidden_states=True)
    full = model(result.sequences).logits[:, 10:-1]
    assert relative_error(torch.stack(result.logits, dim=1), full) < 1e-5
    assert len(result.hidden_states) == NEW
    assert all(len(step) == model.config.num_hidden_layers + 1 for step in result.hidden_states)


@pytest.mark.parametrize(
    "options",
    [
        {"assistant_model": "itself"},
        {"prompt_lookup_num_tokens": 3},
        {"use_mtp": True},
    ],
    ids=["assistant", "prompt lookup", "generic mtp"],
)
def test_assisted_decoding_is_refused_because_the_state_cannot_be_rolled_back(
    model: Qwen3NextForCausalLM, options: dict[str, Any]
) -> None:
    options = {key: model if value == "itself" else value for key, value in options.items()}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        greedy(model, random_tokens(1), **options)


def test_contrastive_search_is_refused_by_transformers_which_moved_it_out(model: Qwen3NextForCausalLM) -> None:
    with pytest.raises(ValueError, match="Contrastive Search requires `trust_remote_code=True`"):
        model.generate(random_tokens(1), penalty_alpha=0.6, top_k=4, max_new_tokens=2)


def test_rolling_a_cache_back_is_refused(model: Qwen3NextForCausalLM) -> None:
    cache = model(random_tokens(), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-2)
    # transformers' own model takes this one, crops the convolution's window and keeps the recurrent state as it was.
    recording = DynamicCache(config=model.config)
    recording.activate_past_recording()
    with pytest.raises(InputError, match=r"activate_past_recording.*cannot be.*copy the cache"):
        model(random_tokens(), past_key_values=recording)


def test_a_chat_is_rendered_generated_and_streamed_with_the_shipped_tokenizer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS, padding_side="left")
    model = tiny_model(11, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    chats = [[{"role": "user", "content": text}] for text in ("Hello!", "Tell me a longer story, please.")]
    rendered = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    prompt = rendered["input_ids"].shape[1]
    assert rendered["attention_mask"][0, 0] == 0
    batch = greedy(model, **rendered, tokens=None, pad_token_id=tokenizer.pad_token_id)
    for row, chat in enumerate(chats):
        alone = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        reply = greedy(model, **alone, tokens=None, pad_token_id=tokenizer.pad_token_id)
        assert torch.equal(batch[row, prompt:], reply[0, alone["input_ids"].shape[1] :])
    capsys.readouterr()
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    greedy(model, **alone, tokens=None, pad_token_id=tokenizer.pad_token_id, streamer=streamer)
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(batch[1, prompt:]).rstrip("\n")
