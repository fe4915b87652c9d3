"""What `generate` promises: transformers' own answers, the same in any batch, stopped at EOS, and no trace left."""

import re

import pytest
import torch
from transformers import StaticCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lit_qlora.errors import UserError
from lit_qlora.model.generate import Sampling, generate, stop_texts

PROMPTS = [[1, 77, 400, 31], [1, 9], [1, 300, 12, 45, 8, 260, 19]]
NEVER = 511
"""An EOS id that the tiny Llama does not come to in these answers."""


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(dropout=0.1)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_transformers_own(model, prompt):
    answer = generate(model, [prompt], [NEVER], Sampling(12))
    model.eval()
    ids = torch.tensor([prompt])
    expected = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=NEVER,
        pad_token_id=0,
    )
    assert answer == [expected[0, len(prompt) :].tolist()]
    assert len(answer[0]) == 12


def test_greedy_is_the_likeliest_token_each_time(model):
    ids = list(PROMPTS[0])
    model.eval()
    with torch.no_grad():
        for _ in range(6):
            ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    assert generate(model, PROMPTS[:1], [NEVER], Sampling(6)) == [ids[len(PROMPTS[0]) :]]


@pytest.fixture
def caches(model, monkeypatch):
    """The length of each cache that a generation begins with, or that it grows."""
    made, base = [], model.get_base_model()
    real = base.forward

    def forward(*args, past_key_values, **kwargs):
        if not past_key_values.get_seq_length():
            is_static = isinstance(past_key_values, StaticCache)
            made.append(past_key_values.layers[0].max_cache_len if is_static else "growing")
        return real(*args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(base, "forward", forward)
    return made


@pytest.mark.parametrize(("limit", "cache"), [(14, 21), (10, 17), (15, "growing")])
def test_each_of_a_batch_is_answered_as_if_alone(model, caches, limit, cache):
    """The cache grows, or, up to three times the longest prompt (7), does not; a shorter one follows a longer one."""
    together = generate(model, PROMPTS, [NEVER], Sampling(limit))
    alone = [generate(model, [prompt], [NEVER], Sampling(limit))[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(answer) for answer in alone}) == 3
    assert caches == [cache] + ["growing"] * 3


def test_a_static_cache_answers_what_a_growing_one_does(model, caches, monkeypatch):
    options = {"temperature": 1.5, "seed": 3, "top_k": 50, "repetition_penalty": 1.2}
    found = generate(model, PROMPTS, [NEVER], Sampling(14, **options))
    monkeypatch.setattr("lit_qlora.model.generate._static_cache", lambda *_: None)
    assert generate(model, PROMPTS, [NEVER], Sampling(14, **options)) == found
    assert caches == [21, "growing"]


def test_an_answer_ends_with_its_first_eos(model):
    whole = generate(model, PROMPTS, [NEVER], Sampling(10))
    eos_id = whole[0][2]
    stopped = generate(model, PROMPTS, [eos_id], Sampling(10))
    assert stopped[0] == whole[0][: whole[0].index(eos_id) + 1]
    assert stopped[0][-1] == eos_id
    for answer, uncut in zip(stopped, whole, strict=True):
        assert answer == (uncut[: uncut.index(eos_id) + 1] if eos_id in uncut else uncut)


def test_the_limit_cuts_off_without_eos(model):
    (answer,) = generate(model, PROMPTS[:1], [NEVER], Sampling(3))
    assert len(answer) == 3
    assert NEVER not in answer


def test_a_prompt_that_holds_eos_is_no_answer(model):
    (answer,) = generate(model, [[1, 77, NEVER, 1, 400, 31]], [NEVER], Sampling(5))
    assert len(answer) == 5


def test_a_seed_repeats_its_samples(model):
    drawn = [generate(model, PROMPTS, [NEVER], Sampling(8, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != generate(model, PROMPTS, [NEVER], Sampling(8))


def test_a_small_top_p_leaves_the_likeliest_alone(model):
    greedy = generate(model, PROMPTS, [NEVER], Sampling(8))
    assert generate(model, PROMPTS, [NEVER], Sampling(8, temperature=1.0, top_p=1e-6, seed=3)) == greedy


def test_greedy_draws_nothing(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(model, PROMPTS, [NEVER], Sampling(4))
    assert torch.equal(torch.rand(3), expected)


def drawn_by_hand(model, prompt, sampling, num_tokens):
    """Answers drawn by transformers' own processors, one after the other, token by token."""
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)] if sampling.repetition_penalty != 1 else []
    )
    if sampling.temperature:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        processors += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        processors += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        processors += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    model.eval()
    ids = torch.tensor([prompt])
    torch.manual_seed(sampling.seed)
    with torch.no_grad():
        for _ in range(num_tokens):
            scores = processors(ids, model(input_ids=ids, use_cache=False).logits[:, -1].float())
            likely = scores.softmax(-1)
            token = torch.multinomial(likely, 1) if sampling.temperature else scores.argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
    return ids[0, len(prompt) :].tolist()


DRAWN = [
    {"temperature": 1.5},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 2.0, "top_p": 0.3},
    {"temperature": 2.0, "min_p": 0.4},
    {"temperature": 1.2, "repetition_penalty": 3.0},
    {"repetition_penalty": 3.0},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("options", DRAWN, ids=map(str, DRAWN))
def test_what_is_drawn_is_by_transformers_own_processors(model, options):
    for seed in (3, 4):
        sampling = Sampling(8, seed=seed, **options)
        assert generate(model, PROMPTS[:1], [NEVER], sampling) == [drawn_by_hand(model, PROMPTS[0], sampling, 8)]


@pytest.mark.parametrize("options", DRAWN[1:], ids=map(str, DRAWN[1:]))
def test_each_option_changes_what_is_drawn(model, options):
    """One of three seeds is enough, tried until it does."""
    plain = {"temperature": options["temperature"]} if "temperature" in options else {}

    def differ(seed):
        one, other = (generate(model, PROMPTS, [NEVER], Sampling(40, seed=seed, **had)) for had in (options, plain))
        return one != other

    assert any(map(differ, range(3)))


def test_a_penalty_looks_at_a_prompt_s_own_tokens_alone(model):
    """Padding before the prompt does not count, so that an answer is the same in any batch."""
    sampling = Sampling(10, repetition_penalty=1000.0)
    alone = [generate(model, [prompt], [NEVER], sampling)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, [NEVER], sampling) == alone
    pads = alone[1][0]  # what the shortest says first would be penalised, were it the padding
    assert generate(model, PROMPTS, [NEVER, pads], sampling)[1] == [pads]
    assert generate(model, PROMPTS, [pads, NEVER], sampling)[1] == [pads]


def test_any_of_several_ids_ends_an_answer(model):
    whole = generate(model, PROMPTS, [NEVER], Sampling(10))
    stops = [NEVER, whole[0][3], whole[1][1]]
    ends = [next((place for place, token in enumerate(answer) if token in stops), 9) + 1 for answer in whole]
    assert generate(model, PROMPTS, stops, Sampling(10)) == [
        answer[:end] for answer, end in zip(whole, ends, strict=True)
    ]
    assert len({*ends}) > 1


def test_an_answer_may_end_by_what_all_its_ids_are(model):
    whole = generate(model, PROMPTS, [NEVER], Sampling(10))
    wanted = [whole[0][:3], whole[2][:5]]
    found = generate(model, PROMPTS, [NEVER], Sampling(10), is_over=lambda ids: list(ids) in wanted)
    assert found == [whole[0][:3], whole[1], whole[2][:5]]
    seen = []
    (one,) = generate(
        model, PROMPTS[:1], [NEVER], Sampling(10), lambda token: seen.append(token) is None, lambda ids: len(ids) == 4
    )
    assert one == seen == whole[0][:4]


def test_sampling_leaves_random_numbers_as_they_were(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(model, PROMPTS, [NEVER], Sampling(4, temperature=1.0, seed=9))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_as_before(model, training):
    model.train(training)
    generate(model, PROMPTS, [NEVER], Sampling(2))
    assert {module.training for module in model.modules()} == {training}


def test_the_mode_is_as_before_after_a_failure(model):
    model.train()
    with pytest.raises(IndexError):
        generate(model, [[100_000]], [NEVER], Sampling(2))
    assert model.training


def test_recomputation_does_not_get_in_its_way(make_model, model):
    recomputed = make_model(checkpointing="full", dropout=0.1)
    assert generate(recomputed, PROMPTS, [NEVER], Sampling(6)) == generate(model, PROMPTS, [NEVER], Sampling(6))


def test_answers_leave_the_gradients_alone(make_model, gradients):
    model = make_model(checkpointing="full")
    before = gradients(model)
    generate(model, PROMPTS, [NEVER], Sampling(4))
    after = gradients(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_ids_come_one_by_one_and_are_the_same(model):
    (whole,) = generate(model, PROMPTS[:1], [NEVER], Sampling(10))
    seen = []
    assert generate(model, PROMPTS[:1], [NEVER], Sampling(10), lambda token: seen.append(token) is None) == [whole]
    assert seen == whole
    eos_id, seen = whole[4], []
    first = whole[: whole.index(eos_id) + 1]
    assert generate(model, PROMPTS[:1], [eos_id], Sampling(10), lambda token: seen.append(token) is None) == [first]
    assert seen == first


def test_a_listener_stops_an_answer(model):
    (whole,) = generate(model, PROMPTS[:1], [NEVER], Sampling(10))
    seen = []

    def twice(token):
        seen.append(token)
        return len(seen) < 2

    model.train()
    assert generate(model, PROMPTS[:1], [NEVER], Sampling(10), twice) == [whole[:2]]
    assert seen == whole[:2]
    assert model.training


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("", ()),
        ("###", ("###",)),
        ("[INST]", ("[INST]",)),
        ('["###", "User:"]', ("###", "User:")),
        (r'["\n\n"]', ("\n\n",)),
        (r"\n\nUser:", ("\n\nUser:",)),
        (r'["\\neq"]', (r"\neq",)),
        ("[1]", ("[1]",)),
        ("5", ("5",)),
        ("null", ("null",)),
        ("[]", ("[]",)),
        (["a", "b"], ("a", "b")),
        ("['###', 'User:']", ("###", "User:")),
        (r"""['\n\n', "It's"]""", ("\n\n", "It's")),
        (r"['\d']", (r"\d",)),
        ("[INST, 'x']", ("[INST, 'x']",)),
        ("['a'", ("['a'",)),
        ("[" * 9000, ("[" * 9000,)),
    ],
)
def test_a_stop_text_is_a_text_or_a_list_of_them(given, texts):
    assert stop_texts(given) == texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -0.1}, "temperature: expected 0, or a number from 1e-9, got -0.1"),
        ({"temperature": 1e-40}, "temperature: expected 0, or a number from 1e-9, got 1e-40"),
        (
            {"repetition_penalty": 1e-300},
            "repetition_penalty: expected a number from 1e-9 to 1e9; 1 is none, got 1e-300",
        ),
        ({"temperature": float("nan")}, "temperature: expected 0, or a number from 1e-9, got nan"),
        ({"top_k": -1}, "top_k: expected a number of tokens, or 0 for all, got -1"),
        ({"min_p": 1.1}, "min_p: expected a share from 0 to 1, got 1.1"),
        ({"min_p": float("nan")}, "min_p: expected a share from 0 to 1, got nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number from 1e-9 to 1e9; 1 is none, got 0.0"),
        (
            {"repetition_penalty": float("inf")},
            "repetition_penalty: expected a number from 1e-9 to 1e9; 1 is none, got inf",
        ),
        ({"stop": ("a", "")}, "stop: expected texts of at least one character, got ['a', '']"),
        ({"stop": '["a", 1]'}, "stop: expected texts of at least one character, got ['a', 1]"),
        ({"top_k": 5}, "top_k: expected it left out at temperature 0, which takes the likeliest token, got 5"),
        ({"min_p": 0.5}, "min_p: expected it left out at temperature 0, which takes the likeliest token, got 0.5"),
        ({"top_p": 0.5}, "top_p: expected it left out at temperature 0, which takes the likeliest token, got 0.5"),
        ({"top_p": 0.0}, "top_p: expected a share above 0, at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: expected a share above 0, at most 1, got 1.5"),
        ({"seed": -1}, "seed: expected a whole number from 0, below 2**64, got -1"),
    ],
)
def test_what_cant_be_drawn_from_is_refused(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Sampling(**options)
