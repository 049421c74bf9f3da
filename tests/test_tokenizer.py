"""Tokenizers and chat templates, held against transformers."""

import json

import pytest

from conftest import byte_level_tokenizer, copy_of, edit_json, save_tokenizer
from splitfuse import CheckpointError, ConfigError, InvalidArgument, loader
from splitfuse.tokenizer import Tokenizer


def test_the_tokenizer_is_transformers_own(tiny_llama):
    from transformers import AutoTokenizer

    path = tiny_llama()
    reference, ours = AutoTokenizer.from_pretrained(path), loader.load(path).tokenizer
    for text in ("", " ", "the theory <|eos|> of 🙂\n", "<|bos|>the"):
        assert ours.encode(text) == reference.encode(text)
        assert ours.decode(ours.encode(text)) == reference.decode(
            reference.encode(text), skip_special_tokens=True
        )
    assert (ours.bos_token_id, ours.eos_token_id) == (reference.bos_token_id, reference.eos_token_id)
    assert ours.vocab_size == len(reference)


@pytest.mark.parametrize("edges", [([], []), (["<|bos|>"], []), (["<|bos|>"], ["<|eos|>"])])
def test_bos_and_eos_are_added_as_tokenizer_json_says(tmp_path, edges):
    """The flags in tokenizer_config.json are not asked, as transformers doesn't."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    begin, end = edges
    backend = byte_level_tokenizer()
    if begin:
        special = [(token, backend.token_to_id(token)) for token in begin + end]
        backend.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end], special_tokens=special
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=not begin)
    reference, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_directory(tmp_path)
    for text in ("", "the", " the"):
        assert ours.encode(text) == reference.encode(text)
        assert ours.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False)
    assert ours.encode("the")[: len(begin)] == [ours.bos_token_id] * len(begin)
    assert ours.encode("<|bos|>the").count(ours.bos_token_id) == 1


def test_tokens_of_tokenizer_config_are_added(tmp_path):
    save_tokenizer(tmp_path)
    added = {"content": "<|call|>", "special": True, "normalized": False}
    size = byte_level_tokenizer().get_vocab_size()
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={str(size): added})
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("<|call|>") == [size]
    assert tokenizer.is_special(size)
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={str(size + 5): added})
    with pytest.raises(CheckpointError, match=f"has id {size + 5}"):
        Tokenizer.from_directory(tmp_path)


def test_older_tokenizer_files_are_read_by_transformers(tmp_path):
    from transformers import AutoTokenizer

    model = json.loads(byte_level_tokenizer().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "unk_token": "<|eos|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_directory(tmp_path)
    text = "the theory <|eos|> of 🙂\n"
    assert ours.encode(text) == reference.encode(text) == Tokenizer(byte_level_tokenizer()).encode(text)
    assert (ours.bos_token_id, ours.eos_token_id) == (256, 257)
    assert ours.is_special(257)


def test_a_missing_or_corrupt_tokenizer_is_named(tiny_llama, tmp_path):
    path = copy_of(tiny_llama(), tmp_path)
    (path / "tokenizer.json").write_text("{}")
    model = loader.load(path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        _ = model.tokenizer
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        _ = loader.load(path).tokenizer
    (path / "tokenizer_config.json").unlink()
    assert loader.load(path).tokenizer is None
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(path)


TEMPLATES = {
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "generation block": "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% endfor %}",
    "tojson": "{{ messages | tojson(indent=2) }}{{ tools | tojson }}",
    "blocks trimmed": "{% if true %}\n  {% set x = 1 %}\n{{ x }}\n{% endif %}\nend",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "specials": "{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}{{ tools is none }}"
    "{{ extra }}",
    "prompt": "{{ messages[-1].content }}{% if add_generation_prompt %}<go>{% endif %}",
}
MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind. ", "name": None},
    {"role": "user", "content": 'é🙂 "quoted"'},
]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("go", [True, False])
def test_a_chat_is_rendered_as_transformers_renders_it(tmp_path, template, go):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
    reference, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_directory(tmp_path)
    expected = reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=go, extra="x")
    assert ours.render_chat(MESSAGES, add_generation_prompt=go, extra="x") == expected
    assert ours.encode_chat(MESSAGES, add_generation_prompt=go, extra="x") == reference.encode(
        expected, add_special_tokens=False
    )


def test_chat_templates_lie_in_three_places(tmp_path):
    save_tokenizer(tmp_path)
    named = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "tools"}]
    edit_json(tmp_path / "tokenizer_config.json", chat_template=named)
    assert Tokenizer.from_directory(tmp_path).chat_template == "list"
    edit_json(tmp_path / "tokenizer_config.json", chat_template=...)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer.from_directory(tmp_path).chat_template == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_directory(tmp_path).chat_template == "jinja"


def chat_with(template):
    return Tokenizer(byte_level_tokenizer(), {}, template)


def test_a_template_is_kept_in_its_sandbox():
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
    ):
        with pytest.raises(InvalidArgument, match="template refuses"):
            chat_with(template).render_chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "messages", "error", "named"),
    [
        (None, MESSAGES, ConfigError, "no chat template"),
        ("{% if %}", MESSAGES, ConfigError, "not valid"),
        ("{{ raise_exception('roles must alternate') }}", MESSAGES, InvalidArgument, "roles must alternate"),
        ("{{ messages[5].content + 'x' }}", MESSAGES, InvalidArgument, "template refuses"),
        ("x", [], InvalidArgument, "empty"),
        ("x", "Hello", InvalidArgument, "must be a list"),
        ("x", [{"content": "Hello"}], InvalidArgument, 'message 0 has no "role"'),
        ("x", [{"role": "user", "content": object()}], InvalidArgument, "object"),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_refused(template, messages, error, named):
    with pytest.raises(error, match=named):
        chat_with(template).render_chat(messages)
