"""The conversations that their models were trained with, as chat templates in Jinja: `conv_templates` of their code.

They write what `minifocus.inputs.prompt.TEMPLATES` of the same names writes, and besides the token that ends an answer.
"""

from __future__ import annotations

from ..errors import CheckpointError
from ..inputs.prompt import TEMPLATES, detect_template
from ..inputs.tokenizer import Tokenizer

# What is around a question and around an answer.
_TURNS = {
    "vicuna_v1": ("USER: ", " ", "ASSISTANT: ", "</s>"),
    "mistral": ("[INST] ", " [/INST]", " ", " </s>"),
    "chatml": ("<|im_start|>user\n", "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>"),
}
NAMES = tuple(_TURNS)


def trained_with(tokenizer: Tokenizer, text_model_type: str, place: str) -> str:
    """The name of the template that a model's vocabulary, or else its decoder, was trained with. Raises CheckpointError."""
    name = {"vicuna": "vicuna_v1"}.get(found := detect_template(tokenizer, text_model_type), found)
    if name not in NAMES:
        raise CheckpointError(
            f"{place}: its vocabulary is of {name}, expected a template to be named: {', '.join(NAMES)}"
        )
    return name


def chat_template(name: str, gap: str) -> str:
    """The template in Jinja. `gap` is what has to stand behind `<image>`, before the end of its line."""
    before, after, answering, end = _TURNS[name]
    first, _, last = TEMPLATES[name].partition("{question}")
    asking = last.removeprefix(after)  # with which a prompt ends
    lines = [
        "{%- macro words(content) -%}",
        "{%- if content is string -%}{{ content }}{%- else -%}",
        "{%- for part in content -%}",
        f"{{%- if part['type'] == 'image' -%}}{{{{ {_quoted('<image>' + gap + chr(10))} }}}}",
        "{%- else -%}{{ part['text'] }}{%- endif -%}",
        "{%- endfor -%}",
        "{%- endif -%}",
        "{%- endmacro -%}",
        f"{{{{ {_quoted(first.removesuffix(before))} }}}}",
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'user' -%}",
        f"{{{{ {_quoted(before)} }}}}{{{{ words(message['content']) }}}}{{{{ {_quoted(after)} }}}}",
        "{%- elif message['role'] == 'assistant' -%}",
        f"{{{{ {_quoted(answering)} }}}}{{{{ words(message['content']) }}}}{{{{ {_quoted(end)} }}}}",
        "{%- else -%}{{ raise_exception('expected user and assistant, no other roles') }}{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{ {_quoted(asking)} }}}}{{%- endif -%}}",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A text as Jinja writes one."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
