import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from entrace.analysis.trace import InputError
from entrace.trainer.pretraining.pretrain import PAD, evaluate_heldout, load_recipe, pretrain
from entrace.trainer.resources import CONFIGS, find_base_policy
from entrace.trainer.tasks import load_task

SHIPPED = CONFIGS / "base-policy.toml"
QUESTION = "State the final answer to the following arithmetic problem: 15 - 43 - 75 ="


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(find_base_policy())


@pytest.mark.parametrize("word", ["so", "then", "because", "wait", "check", "first", "therefore", "think", "answer"])
def test_words_of_reasoning_are_single_tokens(tokenizer, word):
    assert len(tokenizer.tokenize(f" {word}")) == 1


def test_digits_are_single_and_words_of_the_question_and_tags_whole(tokenizer):
    assert [piece.strip("Ġ") for piece in tokenizer.tokenize("407 -28")] == ["4", "0", "7", "-", "2", "8"]
    question = [piece.strip("Ġ") for piece in tokenizer.tokenize(QUESTION)]
    assert question[:9] == ["State", "the", "final", "answer", "to", "the", "following", "arithmetic", "problem"]
    for tag in ("<answer>", " <answer>", "</answer>"):
        assert len(tokenizer.tokenize(tag)) == 1


@pytest.mark.parametrize("text", [QUESTION, "first, 15 - 43 = -28. <answer>-28</answer>", "é 数 \n\t x_1  y\U0001f600"])
def test_decoding_returns_the_encoded_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_chat_template_opens_the_answer(tokenizer):
    chat = [{"role": "user", "content": "1 + 1"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "<user>1 + 1<assistant>"
    chat.append({"role": "assistant", "content": "2"})
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>1 + 1<assistant>2<eos>"


def test_embedded_policy_is_small_loads_as_any_folder_and_ends_where_the_tokenizer_does(tokenizer):
    folder = find_base_policy()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2_000_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.pad_token == PAD
    assert model.config.max_position_embeddings >= 192


def test_pretraining_lowers_the_loss_and_repeats_to_the_byte(small_recipe, tmp_path):
    outs, losses = [tmp_path / "a", tmp_path / "b"], []
    for out in outs:
        pretrain(small_recipe, out, lambda done, loss: losses.append((done, loss)))
    first, second = losses[:40], losses[40:]
    assert first == second
    assert [done for done, _ in first] == list(range(1, 41))
    assert sum(loss for _, loss in first[-5:]) < 0.8 * sum(loss for _, loss in first[:5])
    files = [{file.name: file.read_bytes() for file in out.iterdir()} for out in outs]
    assert files[0] == files[1]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(files[0])


def test_a_folder_in_use_is_refused_and_kept(small_recipe, tmp_path):
    (tmp_path / "out").mkdir()
    kept = tmp_path / "out" / "mine.txt"
    kept.write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        pretrain(small_recipe, tmp_path / "out", lambda done, loss: None)
    assert [*(tmp_path / "out").iterdir()] == [kept]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size =", "batchsize =", 'unknown key "training.batchsize"; did you mean "batch_size"?'),
        ("slip = ", "slips = ", 'unknown key "styles.slips"; did you mean "slip"?'),
        ("guess_right = 0.20", "guess_right = 2", "rates.guess_right: expected less than or equal to 1, found 2"),
    ],
)
def test_a_bad_recipe_is_one_line_that_names_the_key(tmp_path, old, new, message):
    path = tmp_path / "recipe.toml"
    path.write_text(re.sub(rf"^{old}", new, SHIPPED.read_text(), flags=re.MULTILINE))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_embedded_policy_has_something_to_learn_at_both_ends():
    recipe = load_recipe(SHIPPED)
    task = load_task(recipe.task, recipe.seed)
    metrics = evaluate_heldout(find_base_policy(), task, recipe)
    assert 0.25 <= metrics.accuracy <= 0.45
    assert 0.60 <= metrics.format_rate <= 0.85
    assert metrics.pass_at_k >= 0.9
    assert metrics.limit_frac <= 0.05
    assert 0.25 <= metrics.entropy_token_mean <= 0.5
