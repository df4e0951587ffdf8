"""Conversations from a file to fused blocks: two sources with templates of their own, and the target's rendering."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fusion_core.vocabulary import Vocabulary
from services.corpus.ledger import TRAIN, Corpus
from services.distill.data.join import join
from services.fusion.client import FusedWindow, StreamRequest
from services.wire.messages import read_messages
from tests.fakes.services.plain_fusion import plain_fusion
from tests.fakes.tiny_model import sentences

BRACKETS = "{% for m in messages %}{{ bos_token + '[' + m.role + ']\n' + m.content | trim + '<|eos|>' }}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if '!!' in m.content and m.role == 'user' %}{{ raise_exception('no shouting') }}"
    + ("{% endif %}{{ m.role + '\n' + m.content + '\n\n' }}{% endfor %}")
)


FROM_EOS = "{% for m in messages %}{{ eos_token + m.role + '\n' + m.content + eos_token }}{% endfor %}"


def test_a_rendering_that_begins_with_another_token_than_bos_has_no_bos(tmp_path: Path) -> None:
    """And a turn goes on where the one before ends, so that a conversation is read once."""
    chats = [
        [
            message
            for turn in range(2)
            for message in (
                {"role": "user", "content": sentences(30, seed=10 * n + turn)},
                {"role": "assistant", "content": sentences(30, seed=500 + 10 * n + turn).strip()},
            )
        ]
        for n in range(8)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    corpus_keys = {"files": [f"{tmp_path}/chats.jsonl"], "format": "conversations", "shared_run_bytes": None}
    with plain_fusion(tmp_path, windows=corpus_keys, chat_templates=["plain", "plain", FROM_EOS]) as fusion:
        target = Vocabulary.from_pretrained(fusion.recipe.target_folder)
        request = StreamRequest(dataset="words", split=TRAIN, seed=0, tokens_only=True)
        blocks = [window.block for window in fusion.client().stream(request) if isinstance(window, FusedWindow)]
    assert {block.first_id for block in blocks} == {target.eos_id}
    assert not any(np.isin(block.context_ids_C, [target.bos_id]).any() for block in blocks)
    spelled = b"".join(target.token_bytes(int(token_id)) for token_id in blocks[0].context_ids_C)
    assert spelled.startswith(b"user\n") and spelled.endswith(b"assistant\n")
    assert sorted(len(reading.blocks) for reading in join(blocks)) == [2] * (len(blocks) // 2)


def test_turns_are_fused_behind_the_targets_own_rendering(tmp_path: Path) -> None:
    chats = [
        [
            {"role": "user", "content": sentences(40, seed=n) + ("" if n % 3 else "!!")},
            {"role": "assistant", "content": f" {sentences(60, seed=n + 30)}".rstrip()},
            {"role": "user", "content": "And <|eos|>?"},
            {"role": "assistant", "content": sentences(50, seed=n + 60).strip()},
        ]
        for n in range(12)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    corpus_keys = {
        "files": [f"{tmp_path}/chats.jsonl"], "format": "conversations", "window_bytes": 512, "shared_run_bytes": None,
    }  # fmt: skip
    with plain_fusion(tmp_path, windows=corpus_keys, chat_templates=[BRACKETS, STRICT]) as fusion:
        corpus, target = (
            Corpus.open(fusion.recipe.corpus_folder),
            Vocabulary.from_pretrained(fusion.recipe.target_folder),
        )
        client, refused = fusion.client(), 0
        stream = list(client.stream(StreamRequest(dataset="words", split=TRAIN, seed=0)))
        assert len(stream) == corpus.num_windows(TRAIN) > 10
        # Turns follow each other in the ledger, and eight neighbours come together.
        indices = [window.index for window in stream]
        whole = len(indices) // 8 * 8
        assert [start % 8 for start in indices[:whole:8]] == [0] * (whole // 8)
        assert all(indices[n] == indices[n - n % 8] + n % 8 for n in range(whole))
        assert {dataset.block_windows for dataset in client.info().datasets} == {8}
        for streamed in stream:
            assert isinstance(streamed, FusedWindow)
            block, window = streamed.block, corpus.window(TRAIN, streamed.index)
            block.validate()
            messages = read_messages(window.messages).messages
            plain = "".join(f"{m['role'].capitalize()}:\n{m['content']}\n\n" for m in messages) + "Assistant:\n"
            spelled = b"".join(target.token_bytes(int(token_id)) for token_id in block.context_ids_C)
            assert spelled == plain.encode()
            assert block.text_bytes == window.text and block.ends_document
            assert block.token_ids_T[-1] == target.eos_id and block.mask_T[-1]
            takes = not any("!!" in m["content"] for m in messages if m["role"] == "user")
            assert [share.present for share in block.shares] == [True, takes]
            refused += not takes
            [alone] = client.fuse([window.passage])
            np.testing.assert_allclose(alone.gold_T, block.gold_T, atol=1e-5)
        assert 0 < refused < len(stream)
        planned = corpus.record["splits"][TRAIN]["turns"]
        assert planned["refused_by"] == {"sources[1]": refused}
        settings = client.info().settings
        assert json.loads(settings["target.chat_template"]) == "plain"
        hashes = {json.loads(settings[f"sources.source-{n}.chat_template"]) for n in range(2)}
        assert len(hashes) == 2 and "" not in hashes
