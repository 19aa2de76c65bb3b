"""Small tokenizers in the layouts of the hub's folders, trained here, and texts that are hard for them."""

import io
import json
import random

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.tokenization_utils_base import generate_merges

TEXT = "the quick brown fox jumps over a lazy dog hello world USER ASSISTANT describe this picture what is in it"
WORDS = TEXT.split()
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
IMAGE = {
    "content": "<image>",
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
    "special": True,
}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus():
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=8)) + rng.choice([".", "?", " 12345", "\n"]) for _ in range(500)]


def texts(count=300):
    """Unicode, emoji, line breaks, runs of spaces, special tokens and nothing at all, mixed."""
    rng = random.Random(1)
    special = [*LLAMA3_SPECIALS, "<s>", "</s>", "<unk>", "<image>", "<image>\n"]
    spaces = [" ", "  ", "\n", "\n\n", "\t", "▁", "\r\n", "\u00a0", "\x00"]
    characters = ["你好", "é", "e\u0301", "🙂", "👩‍👩‍👧", "Ä", "ﬁ", "١٢", "12345", "<0x0A>", "'s", ".", "A-b"]
    parts = [*WORDS, *special, *spaces, *characters]
    yield from (
        "",
        " ",
        "▁",
        "<image>",
        "<s>",
        "<s><s>a",
        "USER: <image>\nWhat? ASSISTANT:",
        "[INST] <image>\nWhat? [/INST]",
    )
    for _ in range(count):
        yield "".join(rng.choices(parts, k=rng.randint(1, 9)))


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def train_sentencepiece(**options):
    model = io.BytesIO()
    options = {
        "sentence_iterator": iter(corpus()),
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "vocab_size": 420,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        model_writer=model, model_type="bpe", character_coverage=1.0,
        allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


def write_llama3(folder):
    """Llama-3's layout: byte-level BPE in tokenizer.json, which holds the BOS rule, and more tokens beside it."""
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=LLAMA3_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(corpus(), trainer)
    library.add_special_tokens([AddedToken("<image>", normalized=False)])
    template = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    library.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    library.enable_truncation(5)  # which a caller of AutoTokenizer does not get either
    library.save(str(folder / "tokenizer.json"))
    size = library.get_vocab_size()
    added = {str(i): {**IMAGE, "content": t} for i, t in enumerate(LLAMA3_SPECIALS)} | {str(size - 1): IMAGE}
    added[str(size)] = {**IMAGE, "content": "<pad>"}
    added[str(size + 1)] = {**IMAGE, "content": "plain", "special": False}
    write(
        folder,
        config={"model_type": "llava_next"},
        tokenizer_config={
            "added_tokens_decoder": added,
            "bos_token": "<|begin_of_text|>",
            "eos_token": {**IMAGE, "__type": "AddedToken", "content": "<|eot_id|>"},
            "pad_token": "<pad>",
            "additional_special_tokens": ["<late>"],
            "clean_up_tokenization_spaces": True,  # ignored for BPE, as is the next one beside a tokenizer.json
            "add_bos_token": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def write_llama(folder, legacy, model):
    """Vicuna's layout: tokenizer.model, with either value of `legacy`."""
    (folder / "tokenizer.model").write_bytes(model)
    write(folder, tokenizer_config={"legacy": legacy, "added_tokens_decoder": {"420": IMAGE}, "pad_token": "<unk>"})


def pieces_of(model):
    """The pieces of a tokenizer.model by their ids, and the merges that say the same."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    return vocabulary, generate_merges(vocabulary)


def write_llama_json(folder, vocabulary, merges, legacy):
    """The hub's own tokenizer.json of Vicuna and Mistral: older files prepend "▁" everywhere, newer ones only once."""
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    library.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", "<image>")])
    library.save(str(folder / "tokenizer.json"))
    write(
        folder,
        config={"model_type": "llava_next"},
        special_tokens_map={"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"},
        added_tokens={"<image>": 420, "<pad>": 421},
    )
