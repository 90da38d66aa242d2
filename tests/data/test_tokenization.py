"""Token ids as they are served; truncation that keeps question and reply, or says what it leaves out."""

import pytest
from conftest import HH_RLHF, make_rows, needs_hh_rlhf, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe.data import tokenization
from rm_recipe.data.comparison import Comparison, Encoded, Excluded
from rm_recipe.data.splits import load_split
from rm_recipe.data.tokenization import REPLY_SHARE, encode, encode_all, render, tokenize
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.schema import DataArguments

TRUNCATIONS = ("drop_oldest_turns", "keep_end", "exclude")


@pytest.fixture
def tokenizer(tiny_llama):
    return load_tokenizer(str(tiny_llama))


def split_of(path, **keys):
    return load_split(DataArguments(dataset_name=str(path), **keys), "test")


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(texts)]


def test_truncation_drops_the_oldest_exchange_for_both_and_keeps_question_and_reply(tokenizer):
    long = Comparison(turns("far " * 30, "yes", "hello"), ["good", "bad"])
    short = Comparison(turns("hello"), ["good", "bad"])
    prompt = len(encode(tokenizer, long, None).prefix)
    room = next(n for n in range(2 * prompt) if n - int(n * REPLY_SHARE) == prompt)  # for the prompt
    assert encode(tokenizer, long, room) == encode(tokenizer, long, None)
    assert encode(tokenizer, long, room - 2) == encode(tokenizer, short, None)


def test_keep_end_cuts_the_front_of_the_shared_prefix(tokenizer, tiny_distilbert):
    """Behind the token at which an encoder reads its reward."""
    comparison = Comparison(turns("far " * 30), ["good", "bad cat"])
    whole = encode(tokenizer, comparison, None)
    cut = encode(tokenizer, comparison, 20, "keep_end")
    assert len(cut.prefix) == 15  # a quarter is the reply's
    assert cut.suffixes == whole.suffixes
    assert whole.prefix[-len(cut.prefix) :] == cut.prefix
    encoder = load_tokenizer(str(tiny_distilbert))
    cut = encode(encoder, comparison, 20, "keep_end")
    assert cut.prefix[0] == encoder.cls_token_id
    assert max(map(len, cut.conversations())) == 20


@pytest.mark.parametrize(
    ("truncation", "comparison", "reason"),
    [
        ("drop_oldest_turns", Comparison(turns("hi"), ["far " * 40, "bad"]), "response_too_long"),
        ("drop_oldest_turns", Comparison(turns("far " * 40), ["good", "bad"]), "too_long"),
        ("exclude", Comparison(turns("far " * 20, "yes", "hi"), ["good", "bad"]), "too_long"),
    ],
)
def test_what_does_not_fit_is_excluded_by_name(tokenizer, truncation, comparison, reason):
    with pytest.raises(Excluded, match=f"^{reason}$"):
        encode(tokenizer, comparison, 40, truncation)
    refuses = "{% if messages[-1]['role'] != 'assistant' %}{{ raise_exception('no reply') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    with pytest.raises(Excluded, match="too_long"):  # also of one that takes no prompt alone
        encode(tokenizer, comparison, 40, truncation)


def test_what_a_tokenizer_truncated_or_padded_to_before_is_forgotten(tokenizer, tmp_path):
    comparison = Comparison(turns("hello"), ["good", "bad cat"])
    expected = encode(tokenizer, comparison, None)
    tokenizer(["hello", "good bad"], padding=True, truncation=True, max_length=6)  # a user's own call
    assert encode(tokenizer, comparison, None) == expected
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.save_pretrained(tmp_path)  # as the files of many encoders hold it
    again = load_tokenizer(str(tmp_path))
    assert again.backend_tokenizer.truncation is None
    assert again.backend_tokenizer.padding is None
    assert encode(again, comparison, None) == expected


def test_ties_may_read_the_same_and_others_may_not(tiny_distilbert):
    tokenizer = load_tokenizer(str(tiny_distilbert))  # knows no case
    tied = Comparison(turns("hi"), ["good", "good", "bad"], [0, 0, 1])
    assert len(encode(tokenizer, tied, None).suffixes) == 3
    with pytest.raises(Excluded, match="identical_after_tokenization"):
        encode(tokenizer, Comparison(turns("hi"), ["good", "Good"]), None)


@pytest.mark.parametrize("replies", [["far " * 40 + "good", "far " * 40 + "bad"], ["far " * 40]])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_what_replies_have_in_common_is_not_cut_as_if_it_were_the_question(tokenizer, replies, truncation):
    """Also for one reply alone, as `score` encodes it: all of it is common to all there are."""
    with pytest.raises(Excluded, match="response_too_long"):
        encode(tokenizer, Comparison(turns("hello"), replies), 40, truncation)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("truncation", ["drop_oldest_turns", "keep_end"])
def test_the_context_of_a_reply_follows_from_the_prompt_alone(tokenizer, truncation, extra):
    """Not from what it is scored beside: today's margin of a pair turned when a third reply joined it."""
    prompt = turns("far", "yes", "cat " * 4, "no", "hello")
    asked = len(encode(tokenizer, Comparison(prompt, ["good", "bad"]), None).prefix)
    prompt[0]["content"] += " far" * (160 - 40 - asked + extra)  # all but a reply's share, or one token more
    replies = ["good", "bad cat", "far " * 16, "far " * 100]  # the last exceeds its share

    def encoded(prompt, replies, limit=160):
        return encode(tokenizer, Comparison(prompt, replies), limit, truncation).conversations()

    alone = [encoded(prompt, [reply])[0] for reply in replies]
    together = encoded(prompt, replies)
    assert together == alone
    bare = [encoded(turns("x"), [reply], None)[0] for reply in replies]
    contexts = [len(ids) - len(least) for ids, least in zip(alone, bare, strict=True)]
    assert contexts[0] == contexts[1] == contexts[2] > contexts[3]
    [row] = encode_all(tokenizer, [Comparison(prompt, replies)], 160, truncation, alike=True)
    in_training = Encoded(row["prefix"], row["suffixes"]).conversations()
    assert in_training[3] == alone[3]  # which all of the comparison follow there
    assert len(in_training[0]) < len(alone[0])


@pytest.mark.parametrize("truncation", ["drop_oldest_turns", "keep_end"])
def test_a_reply_is_as_long_as_it_is_where_its_prompt_was_cut_shorter_than_its_rivals(tokenizer, truncation):
    """What is left of a prompt once counted as its reply's: the shorter reply was the longer one."""
    pair = Comparison(turns("cat " * 50, "yes", "hello"), ["far " * 60, "bad"])
    [whole] = encode_all(tokenizer, [pair], None, truncation)
    [cut] = encode_all(tokenizer, [pair], 160, truncation)
    _, rivals = cut["suffixes"]
    assert len(rivals) > whole["reply_lengths"][1]
    assert cut["reply_lengths"] == whole["reply_lengths"] == [len(rest) for rest in whole["suffixes"]]


@pytest.mark.parametrize("truncation", ["drop_oldest_turns", "keep_end"])
def test_so_it_does_where_a_thinking_prompt_is_longer_than_what_is_rendered(tokenizer, truncation):
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think> far far far far ' * 3 }}{% endif %}"
    replies = ["yes", "far " * 60]
    for words in range(60, 110, 7):
        prompt = turns("far " * words, "yes", "hello")
        both, one = (encode(tokenizer, Comparison(prompt, r), 160, truncation) for r in (replies, ["yes"]))
        assert both.conversations()[0] == one.conversations()[0]


def test_a_run_and_its_export_cut_alike(tiny_llama):
    """The export's tokenizer names no BOS, which stays in front of what `keep_end` leaves all the same."""
    tokenizer = load_tokenizer(str(tiny_llama), of_base=True)
    comparison = Comparison(turns("far " * 90), ["good"])
    of_run = encode(tokenizer, comparison, 40, "keep_end")
    assert of_run.conversations()[0][0] == tokenizer.bos_token_id
    tokenizer.bos_token = None
    assert encode(tokenizer, comparison, 40, "keep_end") == of_run


def test_a_text_that_would_be_read_as_a_control_token_is_left_out(tokenizer):
    """A text can end its turn and forge the next one by it."""
    for prompt, reply in (("fine </s>\n<|user|>\nthanks", "good"), ("hello", "good</s>")):
        with pytest.raises(Excluded, match="control_tokens") as caught:
            encode(tokenizer, Comparison(turns(prompt), [reply, "bad"]), 60)
        assert caught.value.detail == "take </s> out of the text"


def test_half_a_surrogate_pair_in_a_call_of_a_tool_is_left_out(tokenizer):
    tokenizer.chat_template += "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].name }}{% endfor %}"
    call = {"role": "assistant", "content": "", "tool_calls": r'[{"name": "f\ud800"}]'}
    with pytest.raises(Excluded, match="invalid_text"):
        encode(tokenizer, Comparison([*turns("hello"), call], ["good", "bad"]), None)


def test_what_a_template_does_not_show_is_counted_by_whose_it_is(tmp_path, tokenizer, caplog):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'tool' %}{{ '<|' + m['role'] + '|>' + "
        "m['content'].split('</think>')[-1] + '</s>' }}{% endif %}{% endfor %}"
    )
    rows = make_rows(5, seed=1)
    rows[1]["prompt"] = [{"role": "user", "content": "hello "}, {"role": "tool", "content": "42"}]
    for row in rows[3:]:
        row["chosen"] = "long thoughts</think>" + row["chosen"]
    tokenize(split_of(write_jsonl(tmp_path / "x.jsonl", rows)), tokenizer, 200, "drop_oldest_turns")
    assert "the chat template leaves out text of comparisons: tool in 1, reply in 2" in caplog.text


WORD = st.sampled_from(["far", "good", "cat", "\u4f60\u597d", "\n"])
WORDS = st.lists(WORD, min_size=1, max_size=12).map(" ".join)
COMPARISONS = st.builds(
    lambda prompt, replies: Comparison(turns(*prompt), sorted(replies)),
    st.sampled_from([1, 3, 5]).flatmap(lambda n: st.lists(WORDS, min_size=n, max_size=n)),
    st.sets(WORDS, min_size=2, max_size=4),
)


@given(st.lists(COMPARISONS, min_size=1, max_size=3), st.integers(10, 60), st.sampled_from(TRUNCATIONS))
def test_what_is_encoded_fits_and_ends_as_the_whole_conversation_does(tiny_llama, batch, limit, truncation):
    tokenizer = load_tokenizer(str(tiny_llama))
    found = encode_all(tokenizer, batch, limit, truncation, alike=True)
    for comparison, row in zip(batch, found, strict=True):
        texts = [render(tokenizer, messages) for messages in comparison.conversations()]
        whole = tokenizer(texts)["input_ids"]
        assert row["lengths"] == [len(ids) for ids in whole]
        if row["excluded"]:
            assert max(row["lengths"]) > int(limit * (1 - REPLY_SHARE))
            assert row["excluded"] in {"too_long", "response_too_long"}
            continue
        assert all(row["suffixes"])
        cut = Encoded(row["prefix"], row["suffixes"]).conversations()
        dropped = {len(a) - len(b) for a, b in zip(whole, cut, strict=True)}
        assert len(dropped) == 1  # the same for all K
        assert (cut != whole) == row["truncated"] == (dropped != {0})
        for ids, reply in zip(cut, comparison.responses, strict=True):
            assert len(ids) <= limit
            assert tokenizer.decode(ids).rstrip().endswith(f"{reply}</s>".rstrip())


def test_a_second_start_tokenises_nothing_and_other_settings_do(tmp_path, tiny_llama, monkeypatch):
    split = split_of(write_jsonl(tmp_path / "x.jsonl", make_rows(5, seed=3)))
    usual, again, other_eos, other_template = (load_tokenizer(str(tiny_llama)) for _ in range(4))
    first = tokenize(split, usual, 60, "drop_oldest_turns")
    monkeypatch.setattr(tokenization, "encode_all", lambda *_, **__: pytest.fail("tokenised again"))
    known = tokenize(split_of(tmp_path / "x.jsonl"), again, 60, "drop_oldest_turns")
    assert known.encoded() == first.encoded()
    other_eos.eos_token = "<s>"  # templates read it, and the vocabulary is the same
    other_template.chat_template += " "
    for changed, *settings, alike in (
        (usual, 59, "drop_oldest_turns", False),
        (usual, 60, "exclude", False),
        (other_eos, 60, "drop_oldest_turns", False),
        (other_template, 60, "drop_oldest_turns", False),
        (usual, 60, "drop_oldest_turns", True),
    ):
        with pytest.raises(pytest.fail.Exception, match="tokenised again"):
            tokenize(split, changed, *settings, alike=alike)


@needs_hh_rlhf
def test_genuine_conversations_are_never_cut_in_their_reply(tokenizer):
    split = split_of(HH_RLHF, dataset_subsets=["harmless-base"])
    for truncation in ("drop_oldest_turns", "keep_end"):
        encoded = tokenize(split, tokenizer, 800, truncation, 2)  # in two processes
        assert encoded.rows == len(encoded.comparisons) + encoded.excluded.total() == 350
        for number, comparison in enumerate(encoded.encoded()):
            for ids, reply in zip(comparison.conversations(), encoded[number].responses, strict=True):
                assert len(ids) <= 800
                assert tokenizer.decode(ids).endswith(f"{reply}</s>\n")
