"""A byte-level BPE tokenizer trained on a corpus: lossless on any text, with special tokens of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from services.models.weights import write_errors_named

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, folder: Path, *, max_tokens: int) -> None:
    """Train on `texts` and write a Hugging Face tokenizer folder. Same texts, same tokenizer.

    The BOS token goes in front of every encoded text, as in training. Raises ValueError when the texts are too few for
    `vocabulary_size` ids (256 bytes and 3 special tokens included).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocabulary_size:
        raise ValueError(
            f"target.tokenizer.train.vocabulary_size: the corpus gives no more than {tokenizer.get_vocab_size()} "
            f"tokens, {vocabulary_size} were asked for"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    with write_errors_named(folder):
        PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=tokenizer,
            bos_token=BOS,
            eos_token=EOS,
            pad_token=PAD,
            model_max_length=max_tokens,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)
