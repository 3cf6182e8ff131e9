#!/usr/bin/env python3
"""Makes tests/fixtures/tokenizers.json: small tokenizers of every kind, texts and conversations, and
the ids that transformers gives them.

    python3 -m venv venv
    venv/bin/pip install transformers==5.17.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf jinja2==3.1.6
    venv/bin/python scripts/tokenizer_fixtures.py [SmolLM2-135M-Instruct.Q4_1.gguf]

Each tokenizer is a folder that `AutoTokenizer` reads. Templates are written here in the styles of
published ones: ChatML, Llama 3, Qwen2.5, Gemma and one with transformers' own blocks. With the GGUF
file (`scripts/fetch-smollm2.sh`) what the published template and vocabulary of SmolLM2 give is
recorded too. The clock stands at 4 July 2026, 9:05.
"""

import datetime
import json
import pathlib
import sys
import tempfile

import sentencepiece
import transformers.utils.chat_template_utils as chat_templates
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import generate_merges


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 7, 4, 9, 5)


chat_templates.datetime = Clock

TEXTS = [
    "The floor of a sum is what rounding alone may move.",
    "  two  spaces, a tab\tand\n\nlines ",
    "Caf\u00e9 \u00c5ngstr\u00f6m \ufb01ne \u2460 na\u00efve 12,345.678",
    "\u6570\u5b57\u3068\u8a08\u7b97 \U0001f600 unknownwords",
    "",
    " ",
    "<s>inner</s> specials <|end|> and<mask> kept",
    "Mixed CASE, don't split; it's 3+4=7!",
]
# What vocabularies are trained on: sentences of this project's own kind.
CORPUS = [
    "The floor of a sum is what rounding alone may move, and a bug moves more than that.",
    "A product of matrices adds its terms in an order that the kernel chooses.",
    "Rounding to eight bits keeps three digits; rounding to sixteen keeps more.",
    "Two runs of the same kernel give the same bits, or something is drawn at random.",
    "what is computed twice need not be computed again, and what is not known is said.",
    "Norms divide by the root of the mean of squares; attention weighs what was read.",
    "12 345 678 90 1.5 2.25 caf\u00e9 na\u00efve \u00fcber",
] * 4

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|start|>system
You are a small model that answers briefly.<|end|>
' }}{% endif %}{{ '<|start|>' + message['role'] + '
' + message['content'] + '<|end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant
' }}{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "01 Jan 2020" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system's message is taken out, so that the date comes before it. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{{- "<|head|>system<|/head|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: " + (tools | tojson(indent=4)) + "\\n" }}
{%- endif %}
{{- "Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|end|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n'+ message['content'] | trim + '<|end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One call at a time") }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
"""

QWEN = """{%- if tools %}
    {{- '<|start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|start|>system\\n' + messages[0]['content'] + '<|end|>\\n' }}
    {%- else %}
        {{- '<|start|>system\\nYou are helpful.<|end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|start|>' + message.role + '\\n' + message.content + '<|end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|start|>' + message.role + '\\n' + content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('A system message is not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate: user, assistant, user and so on') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<|start|>' + role + '
' + message['content'] | trim + '<|end|>
' }}{% endfor %}{% if add_generation_prompt %}{{'<|start|>model
'}}{% endif %}"""

BLOCKS = """{% macro laid(message, last=false) %}
    <|head|>{{ message.role }}<|/head|>
{{ message.content.strip() }}{{ '<|end|>' if not last }}
{% endmacro %}
{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}{{ laid(message) }}{% endgeneration %}
    {% else %}
        {{ laid(message) }}
    {% endif %}
    {% if loop.index > 7 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|head|>assistant<|/head|>
{% endif %}
"""

SPECIALS = ["<unk>", "<s>", "</s>", "<|end|>", "<|start|>", "<|head|>", "<|/head|>"]


def byte_level():
    """Byte-level BPE, as Qwen's and Llama 3's files have it."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def sentencepiece_bpe(prefix):
    """BPE of characters with bytes for what it lacks, as Llama 2's and Gemma's files have it."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=["<unk>", "<s>", "</s>"] + bytes_, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    # Every way to a piece, as converters of SentencePiece's own files write them.
    scores = {piece: -float(place) for piece, place in model["vocab"].items() if piece not in bytes_}
    merges = generate_merges(model["vocab"], scores, skip_tokens=["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer(BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    # The older files put a space before each part of a text, the newer ones before the first.
    if prefix == "each":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    elif prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix != "none" else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()] + strip)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", begin)])
    return tokenizer


def unigram(kind):
    """Unigram, as T5's and ALBERT's files have it: with SentencePiece's own table of characters."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = pathlib.Path(folder) / "corpus.txt"
        corpus.write_text("\n".join(CORPUS), encoding="utf-8")
        rules = pathlib.Path(folder) / "rules.tsv"
        # A ligature, a circled digit, a full-width letter; a tab and a newline become spaces.
        rules.write_text("FB01\t66 69\n2460\t31\nFF21\t41\n9\t20\nA\t20\n41 30A\tC5\n", encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=f"{folder}/m", vocab_size=100, model_type="unigram",
            character_coverage=1.0, normalization_rule_tsv=str(rules), byte_fallback=False,
            pad_id=0, unk_id=2, bos_id=-1, eos_id=1, minloglevel=2, num_threads=1,
        )
        from sentencepiece import sentencepiece_model_pb2 as proto

        model = proto.ModelProto.FromString((pathlib.Path(folder) / "m.model").read_bytes())
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    if kind == "bytes":
        pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, 2, kind == "bytes"))
    if kind == "t5":
        table = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
        tokenizer.normalizer = normalizers.Sequence([
            normalizers.Strip(left=False, right=True), table, normalizers.Replace(__import__("tokenizers").Regex(" {2,}"), "\u2581"),
        ])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        end = tokenizer.token_to_id("</s>")
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", end)])
    elif kind == "albert":
        tokenizer.normalizer = normalizers.Sequence([
            normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(),
        ])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]) if kind == "bytes" else decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    return tokenizer


def word_piece(lowercase):
    """WordPiece, as BERT's files have it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=240, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.WordPiece()
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    if lowercase:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids[1][1]), ("[CLS]", ids[0][1]))
    else:
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def folders():
    """Name, tokenizer, tokenizer_config.json, template beside it."""
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    bpe = byte_level()
    yield "byte-level-chatml", bpe, dict(named, chat_template=CHATML), None
    yield "byte-level-llama3", bpe, dict(named, chat_template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": LLAMA3}]), None
    yield "byte-level-qwen", bpe, dict(eos_token="<|end|>", add_bos_token=False, chat_template="not this one"), QWEN
    yield "byte-level-gemma", bpe, dict(named, add_bos_token=True, chat_template=GEMMA), None
    yield "byte-level-blocks", bpe, dict(named, add_bos_token=True, add_eos_token=True), BLOCKS
    decoder = {str(bpe.token_to_id(token)): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": token == "<|end|>", "single_word": False} for token in SPECIALS}
    yield "byte-level-decoder", bpe, dict(named, added_tokens_decoder=decoder, pad_token="<pad>", additional_special_tokens=["and"]), CHATML
    yield "sentencepiece-each", sentencepiece_bpe("each"), dict(named, legacy=True, chat_template=GEMMA), None
    yield "sentencepiece-first", sentencepiece_bpe("first"), dict(named, add_bos_token=True, add_eos_token=False, chat_template=CHATML), None
    yield "sentencepiece-none", sentencepiece_bpe("none"), dict(named, add_bos_token=False), GEMMA
    each = sentencepiece_bpe("each")
    # Classes that take the vocabulary and the merges alone.
    yield "class-llama", each, dict(tokenizer_class="LlamaTokenizerFast", chat_template=CHATML), None
    yield "class-llama-legacy", each, dict(named, tokenizer_class="LlamaTokenizer", legacy=True), GEMMA
    yield "class-llama-bare", each, dict(named, tokenizer_class="LlamaTokenizer", add_prefix_space=False), BLOCKS
    yield "class-gemma", each, dict(named, tokenizer_class="GemmaTokenizer", pad_token=None), GEMMA
    yield "class-qwen2", bpe, dict(tokenizer_class="Qwen2Tokenizer", bos_token=None, eos_token="<|end|>", additional_special_tokens=["and", "<mask>"]), QWEN
    yield "class-gpt2", bpe, dict(tokenizer_class="GPT2Tokenizer", add_prefix_space=True, image_token="<|image|>"), CHATML
    yield "unigram-t5", unigram("t5"), dict(eos_token="</s>"), CHATML
    yield "unigram-albert", unigram("albert"), dict(named), CHATML
    yield "unigram-bytes", unigram("bytes"), dict(named, add_bos_token=True), LLAMA3
    yield "wordpiece-bert", word_piece(True), dict(cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"), CHATML
    yield "wordpiece-cased", word_piece(False), dict(cls_token="[CLS]", sep_token="[SEP]"), BLOCKS


MESSAGES = [(None, "What is 2 + 2?"), ("Be brief.", " A caf\u00e9?\n<|end|>\n")]


def asked(tokenizer):
    """What transformers gives for each text and each conversation."""
    texts = [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    chats = []
    for system, user in MESSAGES:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        chat = {"user": user, "system": system}
        try:
            chat["ids"] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:
            chat["refused"] = str(error)
        chats.append(chat)
    return {"texts": texts, "chats": chats}


def main():
    cases = []
    for name, tokenizer, config, template in folders():
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096, **config}
            own = json.loads(tokenizer.to_str())
            (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
            (folder / "tokenizer.json").write_text(json.dumps(own))
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
            if template:
                (folder / "chat_template.jinja").write_text(template)
            answers = asked(AutoTokenizer.from_pretrained(folder))
        cases.append({"name": name, "tokenizer": own, "config": config, "template": template, **answers})
    # Tokenizers that are the same are kept once.
    kept = []
    for case in cases:
        own = case.pop("tokenizer")
        if own not in kept:
            kept.append(own)
        case["tokenizer"] = kept.index(own)
    whole = {"tokenizers": kept, "cases": cases}
    if len(sys.argv) > 1:
        path = pathlib.Path(sys.argv[1])
        whole["smollm2"] = asked(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))
    else:
        known = pathlib.Path(OUT)
        whole["smollm2"] = json.loads(known.read_text())["smollm2"] if known.exists() else None
    lines = ",\n".join(json.dumps(own, ensure_ascii=False, separators=(",", ":")) for own in kept)
    rows = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    smollm2 = json.dumps(whole["smollm2"], ensure_ascii=False)
    pathlib.Path(OUT).write_text(
        f'{{"tokenizers": [\n{lines}\n],\n"cases": [\n{rows}\n],\n"smollm2": {smollm2}}}\n', encoding="utf-8"
    )
    print(f"{OUT}: {len(cases)} folders, {len(kept)} tokenizers")


OUT = pathlib.Path(__file__).parent.parent / "tests/fixtures/tokenizers.json"

if __name__ == "__main__":
    main()
